"""Networks of OLLIE's tables, with random weights."""

import itertools
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import ResNetConfig, ResNetForImageClassification


def fsrcnn(scale: int = 2, wide: int = 56, narrow: int = 12, middle: int = 4) -> nn.Module:
    """FSRCNN (arXiv 1608.00367): [batch, 1, 32, 32] -> [batch, 1, 32 * scale, 32 * scale]."""
    layers: list[nn.Module] = [nn.Conv2d(1, wide, 5, padding=2), nn.PReLU(wide)]
    layers += [nn.Conv2d(wide, narrow, 1), nn.PReLU(narrow)]
    for _ in range(middle):
        layers += [nn.Conv2d(narrow, narrow, 3, padding=1), nn.PReLU(narrow)]
    layers += [nn.Conv2d(narrow, wide, 1), nn.PReLU(wide)]
    layers += [nn.ConvTranspose2d(wide, 1, 9, stride=scale, padding=4, output_padding=scale - 1)]
    return nn.Sequential(*layers)


def _generator(channels: Sequence[int], first_taps: int, taps: int = 4) -> nn.Module:
    """Transposed convolutions with batch norms; the first makes a map, the others double it."""
    layers: list[nn.Module] = [nn.ConvTranspose2d(*channels[:2], first_taps, bias=False)]
    for before, after in itertools.pairwise(channels[1:]):
        layers += [nn.BatchNorm2d(before), nn.ReLU()]
        layers.append(nn.ConvTranspose2d(before, after, taps, 2, 1, bias=False))
    return nn.Sequential(*layers, nn.Tanh())


def dcgan() -> nn.Module:
    """The DCGAN generator (arXiv 1511.06434): [batch, 100, 1, 1] -> [batch, 3, 64, 64]."""
    return _generator((100, 512, 256, 128, 64, 3), first_taps=4)


def infogan() -> nn.Module:
    """The InfoGAN generator (arXiv 1606.03657): [batch, 228, 1, 1] -> [batch, 3, 32, 32]."""
    return _generator((228, 448, 256, 128, 64, 3), first_taps=2)


def _resnet() -> ResNetForImageClassification:
    """ResNet-18 (arXiv 1512.03385)."""
    sizes = {"depths": [2, 2, 2, 2], "hidden_sizes": [64, 128, 256, 512]}
    return ResNetForImageClassification(ResNetConfig(layer_type="basic", num_labels=1000, **sizes))


def resnet18() -> nn.Module:
    """ResNet-18: [batch, 3, 224, 224] -> [batch, 1000]."""
    model = _resnet()
    encoder = model.resnet
    return nn.Sequential(encoder.embedder, *encoder.encoder.stages, encoder.pooler, model.classifier)


class LargeKernel(nn.Module):
    """k x 1 then 1 x k, and 1 x k then k x 1, added: GCN's block."""

    def __init__(self, before: int, after: int, taps: int) -> None:
        super().__init__()
        tall = {"kernel_size": (taps, 1), "padding": (taps // 2, 0)}
        wide = {"kernel_size": (1, taps), "padding": (0, taps // 2)}
        self.left = nn.Sequential(nn.Conv2d(before, after, **tall), nn.Conv2d(after, after, **wide))
        self.right = nn.Sequential(nn.Conv2d(before, after, **wide), nn.Conv2d(after, after, **tall))

    def forward(self, x: Tensor) -> Tensor:
        return self.left(x) + self.right(x)


class Refinement(nn.Module):
    """GCN's boundary refinement: a residual of two 3x3 convolutions."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        first, second = (nn.Conv2d(channels, channels, 3, padding=1) for _ in range(2))
        self.body = nn.Sequential(first, nn.ReLU(), second)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.body(x)


class GCN(nn.Module):
    """Large Kernel Matters (arXiv 1703.02719) on ResNet-18, kernels of 7 on large maps and 5 on small ones:
    [batch, 3, 224, 224] -> [batch, 21, 224, 224]."""

    def __init__(self, classes: int = 21) -> None:
        super().__init__()
        resnet = _resnet().resnet
        self.stem, self.stages = resnet.embedder, resnet.encoder.stages
        sizes = ((64, 7), (128, 7), (256, 5), (512, 5))
        self.blocks = nn.ModuleList(LargeKernel(channels, classes, taps) for channels, taps in sizes)
        self.refined = nn.ModuleList(Refinement(classes) for _ in range(9))
        self.up = nn.ModuleList(nn.ConvTranspose2d(classes, classes, 4, 2, 1) for _ in range(5))

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        maps = []
        for stage, block, refined in zip(self.stages, self.blocks, self.refined[:4], strict=True):
            x = stage(x)
            maps.append(refined(block(x)))
        x = self.up[0](maps.pop())
        for up, refined in zip(self.up[1:4], self.refined[4:7], strict=True):
            x = up(refined(x + maps.pop()))
        return self.refined[8](self.up[4](self.refined[7](x)))


def csrnet() -> nn.Module:
    """CSRNet's back end (arXiv 1802.10062): [batch, 512, 14, 14] -> [batch, 64, 14, 14]."""
    layers: list[nn.Module] = []
    for before, after in itertools.pairwise((512, 512, 512, 512, 256, 128, 64)):
        layers += [nn.Conv2d(before, after, 3, padding=2, dilation=2), nn.ReLU()]
    return nn.Sequential(*layers)


class SlidingAttention(nn.Module):
    """Longformer's attention (arXiv 2004.05150): each token attends to `side` tokens on both
    sides, `dilation` apart. [batch, length, features] -> the same."""

    def __init__(self, features: int = 512, heads: int = 8, side: int = 32, dilation: int = 4) -> None:
        super().__init__()
        self.heads, self.side, self.dilation = heads, side, dilation
        self.qkv = nn.Linear(features, 3 * features)
        self.out = nn.Linear(features, features)

    def forward(self, x: Tensor) -> Tensor:
        batch, length, features = x.shape
        size = features // self.heads
        q, k, v = (
            part.view(batch, length, self.heads, size).transpose(1, 2).reshape(-1, length, size)
            for part in self.qkv(x).chunk(3, -1)
        )
        reach = self.side * self.dilation
        keys, values = (
            functional.pad(t, (0, 0, reach, reach)).unfold(1, 2 * reach + 1, 1)[..., :: self.dilation]
            for t in (k, v)
        )
        scores = torch.einsum("bmk,bmkw->bmw", q, keys) / size**0.5
        mixed = torch.einsum("bmw,bmkw->bmk", scores.softmax(-1), values)
        mixed = mixed.view(batch, self.heads, length, size).transpose(1, 2).reshape(batch, length, features)
        return self.out(mixed)


Net = tuple[Callable[[], nn.Module], tuple[int, ...]]
"""Builds a network, and the shape of its input at batch 1."""

NETS: dict[str, Net] = {
    "infogan": (infogan, (1, 228, 1, 1)),
    "dcgan": (dcgan, (1, 100, 1, 1)),
    "fsrcnn": (fsrcnn, (1, 1, 32, 32)),
    "gcn": (GCN, (1, 3, 224, 224)),
    "resnet18": (resnet18, (1, 3, 224, 224)),
    "csrnet": (csrnet, (1, 512, 14, 14)),
    "longformer": (SlidingAttention, (1, 1024, 512)),
}
"""The seven networks of the paper; Longformer at a tenth of its length, because eager torch holds every
window in memory."""
