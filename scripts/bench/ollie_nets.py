"""Networks of OLLIE's tables, with random weights."""

from __future__ import annotations

import itertools

from torch import nn


def fsrcnn(scale: int = 2, wide: int = 56, narrow: int = 12, middle: int = 4) -> nn.Module:
    """FSRCNN (arXiv 1608.00367): [batch, 1, 32, 32] -> [batch, 1, 32 * scale, 32 * scale]."""
    layers: list[nn.Module] = [nn.Conv2d(1, wide, 5, padding=2), nn.PReLU(wide)]
    layers += [nn.Conv2d(wide, narrow, 1), nn.PReLU(narrow)]
    for _ in range(middle):
        layers += [nn.Conv2d(narrow, narrow, 3, padding=1), nn.PReLU(narrow)]
    layers += [nn.Conv2d(narrow, wide, 1), nn.PReLU(wide)]
    layers += [nn.ConvTranspose2d(wide, 1, 9, stride=scale, padding=4, output_padding=scale - 1)]
    return nn.Sequential(*layers)


def dcgan() -> nn.Module:
    """The DCGAN generator (arXiv 1511.06434): [batch, 100, 1, 1] -> [batch, 3, 64, 64]."""
    channels = (100, 512, 256, 128, 64, 3)
    layers: list[nn.Module] = []
    for place, (before, after) in enumerate(itertools.pairwise(channels)):
        first, last = place == 0, place == len(channels) - 2
        stride, padding = (1, 0) if first else (2, 1)
        layers.append(nn.ConvTranspose2d(before, after, 4, stride, padding, bias=False))
        layers += [nn.Tanh()] if last else [nn.BatchNorm2d(after), nn.ReLU()]
    return nn.Sequential(*layers)
