"""Reference of the middle of a gated MLP."""

from __future__ import annotations

from torch import Tensor, nn


def forward(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) * up."""
    return nn.functional.silu(gate) * up


def backward(grad: Tensor, gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of `gate` and `up`."""
    sigmoid = gate.sigmoid()
    active = gate * sigmoid
    return grad * up * (sigmoid + active * (1 - sigmoid)), grad * active
