"""Which activations make inactive neurons exactly zero."""

from __future__ import annotations

import torch
from torch import nn

_MAGNITUDES = torch.logspace(-30, 30, 2401, dtype=torch.float32, device="cpu")


@torch.no_grad()
def has_exact_zeros(activation: nn.Module) -> bool:
    """Whether an activation is exactly zero for all inputs up to zero, so that leaving these out is exact.

    It is computed for negative numbers of all magnitudes. ReLU, its square and a ReLU with a threshold are
    zero there; SiLU and GELU are not. An activation with parameters of its own is taken to be different.
    """
    if next(activation.parameters(), None) is not None or next(activation.buffers(), None) is not None:
        return False
    inputs = torch.cat([-_MAGNITUDES, _MAGNITUDES.new_zeros(1)])
    return bool((activation(inputs) == 0).all())
