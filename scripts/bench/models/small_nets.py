"""Networks where derivation pays: narrow outputs, large kernels, mergeable weights.

Weights are random but those of `REAL` (ncnn.py says where they come from).
"""

from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional

from models.ncnn import upscaler
from models.nets import Net

_conv = partial(nn.Conv2d, kernel_size=3, padding=1)


def espcn(scale: int = 3) -> nn.Module:
    """ESPCN (arXiv 1609.05158): [batch, 1, h, w] -> [batch, 1, scale * h, scale * w]."""
    layers = (nn.Conv2d(1, 64, 5, padding=2), nn.Tanh(), _conv(64, 32), nn.Tanh(), _conv(32, scale * scale))
    return nn.Sequential(*layers, nn.PixelShuffle(scale))


def srresnet_tail() -> nn.Module:
    """The upsampling end of SRResNet (arXiv 1609.04802)."""
    return nn.Sequential(_conv(64, 256), nn.PixelShuffle(2), nn.PReLU(), nn.Conv2d(64, 3, 9, padding=4))


def dncnn(depth: int = 17) -> nn.Module:
    """DnCNN (arXiv 1608.03981)."""
    layers: list[nn.Module] = [_conv(1, 64), nn.ReLU()]
    for _ in range(depth - 2):
        layers += [_conv(64, 64, bias=False), nn.BatchNorm2d(64), nn.ReLU()]
    return nn.Sequential(*layers, _conv(64, 1))


def unet_tail() -> nn.Module:
    """The last stage of a U-Net (arXiv 1505.04597)."""
    layers = (nn.ConvTranspose2d(128, 64, 2, 2), _conv(64, 64), nn.ReLU(), _conv(64, 64), nn.ReLU())
    return nn.Sequential(*layers, nn.Conv2d(64, 2, 1))


class ResidualBlock(nn.Module):
    """HiFi-GAN's residual block of dilated convolutions."""

    def __init__(self, channels: int, taps: int) -> None:
        super().__init__()
        self.convs = nn.ModuleList(
            nn.Conv1d(channels, channels, taps, padding=d * (taps // 2), dilation=d) for d in (1, 3, 5)
        )

    def forward(self, x: Tensor) -> Tensor:
        for conv in self.convs:
            x = x + conv(functional.leaky_relu(x, 0.1))
        return x


class Vocoder(nn.Module):
    """HiFi-GAN V2's upsampling (arXiv 2010.05646): [batch, 80, frames] -> [batch, 1, 256 * frames]."""

    def __init__(self, strides: Sequence[int] = (8, 8, 2, 2), out: int = 1) -> None:
        super().__init__()
        self.first = nn.Conv1d(80, 128, 7, padding=3)
        self.up, self.blocks = nn.ModuleList(), nn.ModuleList()
        for number, stride in enumerate(strides):
            before, after = 128 >> number, 64 >> number
            self.up.append(nn.ConvTranspose1d(before, after, 2 * stride, stride, stride // 2))
            self.blocks.append(nn.ModuleList(ResidualBlock(after, taps) for taps in (3, 7, 11)))
        self.last = nn.Conv1d(after, out, 7, padding=3)

    def upsampled(self, x: Tensor) -> Tensor:
        """[batch, 80, frames] -> [batch, channels, product of the strides * frames]."""
        x = self.first(x)
        for up, blocks in zip(self.up, self.blocks, strict=True):
            x = up(functional.leaky_relu(x, 0.1))
            x = torch.stack([block(x) for block in blocks]).mean(0)
        return functional.leaky_relu(x, 0.1)

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(self.last(self.upsampled(x)))


class InverseSTFT(nn.Module):
    """The inverse short-time Fourier transform as a transposed convolution with fixed bases.

    [batch, size + 2, frames], real parts before imaginary ones -> [batch, 1, size / 4 * (frames - 1)]. As
    torch.istft of a centred transform with a Hann window and a hop of size / 4, but for the first and the
    last size / 4 samples: fewer windows overlap there than the 4 whose squares sum to 1.5.
    """

    def __init__(self, size: int) -> None:
        super().__init__()
        self.hop, self.centre = size // 4, size // 2
        k, n = torch.arange(size // 2 + 1)[:, None], torch.arange(size)
        angle = 2 * torch.pi * k * n / size
        count = torch.where(k % (size // 2) == 0, 1, 2)  # a frequency stands for its negative one too
        bases = torch.cat([count * angle.cos(), -count * angle.sin()]) / size
        self.register_buffer("bases", (bases * torch.hann_window(size) / 1.5)[:, None])

    def forward(self, spectrum: Tensor) -> Tensor:
        return functional.conv_transpose1d(spectrum, self.bases, stride=self.hop, padding=self.centre)


class SpectralVocoder(Vocoder):
    """iSTFTNet V2-C8C8I (arXiv 2203.02395): [batch, 80, frames] -> [batch, 1, 256 * frames].

    HiFi-GAN's last two upsamplings give way to the inverse transform of a magnitude and a phase.
    """

    def __init__(self, size: int = 16) -> None:
        super().__init__((8, 8), size + 2)
        self.wave = InverseSTFT(size)

    def forward(self, x: Tensor) -> Tensor:
        x = self.last(functional.pad(self.upsampled(x), (1, 0), mode="reflect"))
        magnitude, phase = x.chunk(2, 1)
        magnitude, phase = magnitude.exp(), phase.sin()
        return self.wave(torch.cat([magnitude * phase.cos(), magnitude * phase.sin()], 1))


class RepBlock(nn.Module):
    """RepVGG's block as it is trained (arXiv 2101.03697): 3x3, 1x1 and identity, each with its norm."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.wide = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.point = nn.Conv2d(channels, channels, 1, bias=False)
        self.norms = nn.ModuleList(nn.BatchNorm2d(channels) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        branches = (self.wide(x), self.point(x), x)
        total = sum(norm(branch) for norm, branch in zip(self.norms, branches, strict=True))
        return functional.relu(total)


def repvgg() -> nn.Module:
    return nn.Sequential(*(RepBlock(64) for _ in range(4)))


class LoRA(nn.Module):
    """A linear layer beside its adapter (arXiv 2106.09685)."""

    def __init__(self, features: int = 768, rank: int = 16) -> None:
        super().__init__()
        self.base = nn.Linear(features, features)
        self.down = nn.Linear(features, rank, bias=False)
        self.up = nn.Linear(rank, features, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + 2.0 * self.up(self.down(x))


class Projections(nn.Module):
    """Queries, keys and values of one tensor, as grouped attention has them."""

    def __init__(self, features: int = 576, keys: int = 192) -> None:
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(features, out, bias=False) for out in (features, keys, keys))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return self.q(x), self.k(x), self.v(x)


REAL: dict[str, Net] = {
    "waifu2x upconv_7": (partial(upscaler, "waifu2x-upconv_7"), (1, 3, 78, 78)),
    "waifu2x cunet": (partial(upscaler, "waifu2x-cunet"), (1, 3, 68, 68)),
    "realesr animevideov3 x2": (partial(upscaler, "realesr-animevideov3-x2"), (1, 3, 64, 64)),
}
"""With trained weights, which must have been fetched (scripts/assets.py --upscalers).

realesrgan-x4plus-anime is not among them: with freezing, Inductor of torch 2.13 gives wrong results for it.
What reads a residual may run before the second of two convolutions that add to it in place.
"""

SMALL_NETS: dict[str, Net] = {
    "espcn": (espcn, (1, 1, 64, 64)),
    "srresnet tail": (srresnet_tail, (1, 64, 32, 32)),
    "dncnn": (dncnn, (1, 1, 64, 64)),
    "unet tail": (unet_tail, (1, 128, 48, 48)),
    "hifigan": (Vocoder, (1, 80, 32)),
    "istftnet": (SpectralVocoder, (1, 80, 32)),
    "repvgg": (repvgg, (1, 64, 28, 28)),
    "lora, 64 tokens": (LoRA, (64, 768)),
    "qkv, 1 token": (Projections, (1, 576)),
    **REAL,
}
