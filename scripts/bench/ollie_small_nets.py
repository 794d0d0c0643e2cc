"""Networks where derivation pays: narrow outputs, large kernels, mergeable weights; random weights."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional


def espcn(scale: int = 3) -> nn.Module:
    """ESPCN (arXiv 1609.05158): [batch, 1, h, w] -> [batch, 1, scale * h, scale * w]."""
    return nn.Sequential(
        nn.Conv2d(1, 64, 5, padding=2),
        nn.Tanh(),
        nn.Conv2d(64, 32, 3, padding=1),
        nn.Tanh(),
        nn.Conv2d(32, scale * scale, 3, padding=1),
        nn.PixelShuffle(scale),
    )


def srresnet_tail() -> nn.Module:
    """The upsampling end of SRResNet (arXiv 1609.04802)."""
    up = (nn.Conv2d(64, 256, 3, padding=1), nn.PixelShuffle(2), nn.PReLU())
    return nn.Sequential(*up, nn.Conv2d(64, 3, 9, padding=4))


def dncnn(depth: int = 17) -> nn.Module:
    """DnCNN (arXiv 1608.03981)."""
    layers: list[nn.Module] = [nn.Conv2d(1, 64, 3, padding=1), nn.ReLU()]
    for _ in range(depth - 2):
        layers += [nn.Conv2d(64, 64, 3, padding=1, bias=False), nn.BatchNorm2d(64), nn.ReLU()]
    return nn.Sequential(*layers, nn.Conv2d(64, 1, 3, padding=1))


def unet_tail() -> nn.Module:
    """The last stage of a U-Net (arXiv 1505.04597)."""
    return nn.Sequential(
        nn.ConvTranspose2d(128, 64, 2, 2),
        nn.Conv2d(64, 64, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(64, 64, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(64, 2, 1),
    )


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

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv1d(80, 128, 7, padding=3)
        channels = (128, 64, 32, 16, 8)
        self.up, self.blocks = nn.ModuleList(), nn.ModuleList()
        for before, after, stride in zip(channels, channels[1:], (8, 8, 2, 2), strict=False):
            self.up.append(nn.ConvTranspose1d(before, after, 2 * stride, stride, stride // 2))
            self.blocks.append(nn.ModuleList(ResidualBlock(after, taps) for taps in (3, 7, 11)))
        self.last = nn.Conv1d(8, 1, 7, padding=3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        for up, blocks in zip(self.up, self.blocks, strict=True):
            x = up(functional.leaky_relu(x, 0.1))
            x = torch.stack([block(x) for block in blocks]).mean(0)
        return torch.tanh(self.last(functional.leaky_relu(x, 0.1)))


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
        self.down, self.up = (
            nn.Linear(features, rank, bias=False),
            nn.Linear(rank, features, bias=False),
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + 2.0 * self.up(self.down(x))


class Projections(nn.Module):
    """Queries, keys and values of one tensor, as grouped attention has them."""

    def __init__(self, features: int = 576, keys: int = 192) -> None:
        super().__init__()
        self.q = nn.Linear(features, features, bias=False)
        self.k, self.v = nn.Linear(features, keys, bias=False), nn.Linear(features, keys, bias=False)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return self.q(x), self.k(x), self.v(x)


SMALL_NETS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "espcn": (espcn, (1, 1, 64, 64)),
    "srresnet tail": (srresnet_tail, (1, 64, 32, 32)),
    "dncnn": (dncnn, (1, 1, 64, 64)),
    "unet tail": (unet_tail, (1, 128, 48, 48)),
    "hifigan": (Vocoder, (1, 80, 32)),
    "repvgg": (repvgg, (1, 64, 28, 28)),
    "lora, 64 tokens": (LoRA, (64, 768)),
    "qkv, 1 token": (Projections, (1, 576)),
}
