"""Nets of `ollie_main.py --nets pays` that are read from files or have parts with a known answer."""

import struct
import sys
from pathlib import Path

import pytest
import torch
from torch.nn import functional

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "scripts"))
sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "scripts" / "bench"))
import assets
from models.ncnn import read, upscaler
from models.small_nets import InverseSTFT

needs_weights = pytest.mark.skipif(
    not (assets.cache_dir() / assets.UPSCALERS / "manifest.json").exists(),
    reason="weights are missing: run `python scripts/assets.py --upscalers`",
)


def test_the_inverse_transform_is_that_of_torch():
    torch.manual_seed(0)
    spectrum = torch.view_as_complex(torch.randn(2, 9, 20, 2))
    spectrum.imag[:, [0, 8]] = 0  # where a real signal has none
    want = torch.istft(spectrum, 16, 4, window=torch.hann_window(16))
    got = InverseSTFT(16)(torch.cat([spectrum.real, spectrum.imag], 1))
    torch.testing.assert_close(got[:, 0, 4:-4], want[:, 4:-4])


def half(x):
    """As a .bin file has it: a tag, float16, and zeros up to a multiple of four bytes."""
    data = x.half().numpy().tobytes()
    return struct.pack("<I", 0x01306B47) + data + bytes(-len(data) % 4)


def single(x):
    return bytes(4) + plain(x)


def plain(x):
    return x.contiguous().numpy().tobytes()


def loaded(folder, layers, *weights):
    (folder / "net.param").write_text("\n".join(["7767517", f"{len(layers)} {len(layers)}", *layers]))
    (folder / "net.bin").write_bytes(b"".join(weights))
    return read(folder / "net.param", folder / "net.bin")


def values(*shape):
    """Such that float16 holds them."""
    return torch.randint(-8, 9, shape) / 8


def scattered(x, weight, stride):
    """A transposed convolution by its definition; weight [out, in, kh, kw]."""
    (batch, _, height, width), (out, _, tall, wide) = x.shape, weight.shape
    result = torch.zeros(batch, out, (height - 1) * stride + tall, (width - 1) * stride + wide)
    for i in range(height):
        for j in range(width):
            spread = torch.einsum("bc,ockl->bokl", x[:, :, i, j], weight)
            result[:, :, i * stride : i * stride + tall, j * stride : j * stride + wide] += spread
    return result


def test_convolutions_that_are_read_are_those_of_torch(tmp_path):
    torch.manual_seed(0)
    weight, bias, slope, back = values(3, 1, 3, 1), values(3), values(3), values(4, 3, 3, 2)
    layers = [
        "Input         in   0 1 x   0=8 1=8 2=1",
        "Convolution   one  1 1 x a 0=3 1=1 11=3 4=0 14=1 5=1 6=9 9=2 -23310=1,2.500000e-01",
        "PReLU         two  1 1 a b 0=3",
        "Deconvolution last 1 1 b c 0=4 1=2 11=3 3=2 4=1 6=72",
    ]
    net = loaded(tmp_path, layers, half(weight), plain(bias), plain(slope), single(back))
    x = values(2, 1, 5, 6)
    a = functional.leaky_relu(functional.conv2d(x, weight, bias, padding=(1, 0)), 0.25)
    want = scattered(functional.prelu(a, slope), back, 2)[:, :, 1:-1, 1:-1]
    torch.testing.assert_close(net(x), want)


def test_other_layers_that_are_read_are_those_of_torch(tmp_path):
    torch.manual_seed(0)
    weight, bias = values(2, 2), values(2)
    layers = [
        "Input        input 0 1 x",
        "Split        split 1 5 x x0 x1 x2 x3 x4",
        "Pooling      pool  1 1 x0 mean 0=1 4=1",
        "InnerProduct fc    1 1 mean gate 0=2 1=1 2=4 9=4",
        "Scale        scale 2 1 x1 gate scaled 0=-233",
        "Eltwise      sum   2 1 scaled x2 y 0=1 -23301=2,2.0,1.0",
        "ReLU         relu  1 1 y z 0=0.5",
        "Concat       cat   2 1 x3 z both 0=0",
        "BinaryOp     mul   1 1 both most 0=2 1=1 2=3.0",
        "PixelShuffle up    1 1 most large 0=2",
        "Split        share 1 2 large large0 large1",
        "Interp       near  1 1 x4 wide 0=1 1=3.0 2=3.0",
        "Crop         crop  2 1 wide large0 part 0=1 1=2",
        "BinaryOp     add   2 1 large1 part out 0=0",
    ]
    net = loaded(tmp_path, layers, half(weight), plain(bias))
    x = values(1, 2, 4, 4)
    gate = torch.sigmoid(functional.linear(x.mean((2, 3)), weight, bias))
    z = functional.leaky_relu(2 * x * gate[:, :, None, None] + x, 0.5)
    large = functional.pixel_shuffle(3 * torch.cat([x, z], 1), 2)
    part = x.repeat_interleave(3, 2).repeat_interleave(3, 3)[:, :1, 2:10, 1:9]
    torch.testing.assert_close(net(x), large + part)


@pytest.mark.parametrize(
    ("line", "weights"),
    [
        ("Pooling p 1 1 x y 0=0 1=2 2=2", b""),
        ("Softmax s 1 1 x y 0=0", b""),
        ("ReLU    r 1 1 x y 0=0.1 7=1", b""),
        ("ReLU    r 1 1 x y", bytes(4)),
        ("Convolution c 1 1 x y 0=1 1=1 4=-233 6=1", bytes(8)),
        ("Convolution c 1 1 x y 0=1 1=1 6=1", b"\x4b8\r\0"),
    ],
    ids=["windows", "layer", "parameter", "left over", "padding", "int8"],
)
def test_what_cannot_be_read_is_an_error(tmp_path, line, weights):
    with pytest.raises(ValueError, match=r"not supported|has \d+ bytes"):
        loaded(tmp_path, ["Input i 0 1 x", line], weights)


def picture(size):
    """[1, 3, size, size]: a gradient with a disc and a bar."""
    y, x = torch.meshgrid(*[torch.linspace(0, 1, size)] * 2, indexing="ij")
    disc = torch.sigmoid(60 * (0.25 - ((x - 0.4) ** 2 + (y - 0.5) ** 2).sqrt()))
    bar = torch.sigmoid(60 * (0.08 - (x - 0.8).abs()))
    return torch.stack([0.3 + 0.5 * x - 0.3 * disc, 0.2 + 0.6 * disc, 0.4 + 0.3 * y + 0.3 * bar])[None]


@needs_weights
@pytest.mark.parametrize(
    ("name", "border", "factor"),
    [
        ("waifu2x-upconv_7", 7, 2),
        ("waifu2x-cunet", 18, 2),
        ("realesr-animevideov3-x2", 0, 2),
        ("realesrgan-x4plus-anime", 0, 4),
    ],
)
def test_trained_upscalers_upscale(name, border, factor):
    x = picture(48)
    with torch.no_grad():
        got = upscaler(name)(functional.pad(x, [border] * 4, mode="replicate"))
    want = functional.interpolate(x, scale_factor=factor, mode="bicubic")
    assert got.shape == want.shape
    for channel, expected in zip(got[0], want[0], strict=True):
        assert torch.corrcoef(torch.stack([channel.flatten(), expected.flatten()]))[0, 1] > 0.95
        assert (channel - expected).abs().mean() < 0.05
