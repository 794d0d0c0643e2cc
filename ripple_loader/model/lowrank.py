"""Low-rank additions to the projections of a streamed MLP: adapters such as LoRA.

Dimension key: T tokens, N neurons, U of them in a batch, H hidden, r rank.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F


@dataclass(frozen=True)
class LowRank:
    """Adds `b a x` to a projection of x, as two small products beside the streamed one.

    Attributes:
        row: the projection, by its row in a bundle; the last row is the output's.
        a: shape (r, H), or (r, N) for the output's, its neurons in placement order.
        b: with its scale, shape (N, r), its neurons in placement order, or (H, r) for the output's.
        keep: factors of the inputs for dropout, shape (T, H) or (T, N); None for no dropout.
    """

    row: int
    a: Tensor
    b: Tensor
    keep: Tensor | None = None

    def on_neurons(self, x_TH: Tensor, places: Tensor | None = None) -> Tensor:
        """What it adds to the given neurons, or to all, for a projection to neurons: shape (T, U)."""
        x_TH = x_TH.to(self.a) if self.keep is None else x_TH.to(self.a) * self.keep
        return F.linear(F.linear(x_TH, self.a), self.b if places is None else self.b[places])

    def of_neurons(self, a_TU: Tensor, places: Tensor) -> Tensor:
        """What the given neurons add through it to the output: shape (T, H)."""
        a_TU = a_TU.to(self.a) if self.keep is None else a_TU.to(self.a) * self.keep[:, places]
        return F.linear(F.linear(a_TU, self.a[:, places]), self.b)

    def with_tensors(self, a: Tensor, b: Tensor) -> LowRank:
        """The same addition with other tensors."""
        return LowRank(self.row, a, b, self.keep)


def added_to(
    factor_TU: Tensor, row: int, low_rank: tuple[LowRank, ...], x_TH: Tensor, places: Tensor | None
) -> Tensor:
    """A projection to neurons together with all additions to it, in its own dtype."""
    for addition in low_rank:
        if addition.row == row:
            factor_TU = (factor_TU + addition.on_neurons(x_TH, places)).to(factor_TU.dtype)
    return factor_TU


def tensors_of(low_rank: tuple[LowRank, ...]) -> list[Tensor]:
    """All their tensors: a and b of each."""
    return [tensor for addition in low_rank for tensor in (addition.a, addition.b)]


def with_tensors(low_rank: tuple[LowRank, ...], tensors: list[Tensor]) -> tuple[LowRank, ...]:
    """The same additions with other tensors, in the order of `tensors_of`."""
    pairs = zip(tensors[::2], tensors[1::2], strict=True)
    return tuple(one.with_tensors(a, b) for one, (a, b) in zip(low_rank, pairs, strict=True))


def dense(a: Tensor, b: Tensor) -> Tensor:
    """The weight that a low-rank addition stands for, float32, shape (outputs, inputs)."""
    return torch.mm(b.float(), a.float())
