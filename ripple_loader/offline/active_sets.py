"""Active sets: the neurons that count as active for each token, as bit sets.

Dimension key: T tokens, N neurons.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from ripple_loader.registry import ACTIVE_RULES

_TOKENS_AT_ONCE = 1024

BitSets = npt.NDArray[np.uint8]
"""Active sets of one MLP: shape (tokens, ceil(N / 8)), as `numpy.packbits` packs them."""


@ACTIVE_RULES.register("top_k")
def largest(size_TN: Tensor, share: float) -> Tensor:
    """That share of a layer's neurons, those of the largest activation."""
    count = max(1, round(share * size_TN.shape[-1]))
    mask_TN = torch.zeros_like(size_TN, dtype=torch.bool)
    return mask_TN.scatter_(-1, size_TN.topk(count, dim=-1).indices, True)


@ACTIVE_RULES.register("threshold")
def above_threshold(size_TN: Tensor, share: float) -> Tensor:
    """All neurons with at least that share of the token's largest activation."""
    return size_TN >= share * size_TN.amax(-1, keepdim=True)


@ACTIVE_RULES.register("energy")
def most_energy(size_TN: Tensor, share: float) -> Tensor:
    """The fewest neurons that make up that share of the sum of squares."""
    energy_TN, order_TN = size_TN.square().sort(dim=-1, descending=True)
    before_TN = energy_TN.cumsum(-1) - energy_TN
    mask_TN = torch.zeros_like(size_TN, dtype=torch.bool)
    return mask_TN.scatter_(-1, order_TN, before_TN < share * energy_TN.sum(-1, keepdim=True))


def active_mask(activation_TN: Tensor, rule: str, share: float, *, exact_zeros: bool) -> Tensor:
    """The neurons that count as active, bool of shape (T, N).

    Args:
        activation_TN: the factors of the columns of `down_proj`.
        rule: a name of `registry.ACTIVE_RULES`, for activations without exact zeros.
        share: the rule's parameter, see `ReorderConfig.active`.
        exact_zeros: whether inactive neurons are exactly zero; then all others are active.
    """
    if exact_zeros:
        return activation_TN != 0
    mask_TN: Tensor = ACTIVE_RULES[rule](activation_TN.float().abs(), share)
    return mask_TN


def unpack(sets: BitSets, neurons: int) -> npt.NDArray[np.uint8]:
    """Active sets as zeros and ones of shape (tokens, N)."""
    return np.unpackbits(sets, axis=1, count=neurons)


def unpack_in_parts(sets: BitSets, neurons: int) -> Iterator[tuple[slice, npt.NDArray[np.uint8]]]:
    """Like `unpack`, for 1,024 tokens at a time: which they are, and their zeros and ones."""
    for start in range(0, len(sets), _TOKENS_AT_ONCE):
        part = slice(start, start + _TOKENS_AT_ONCE)
        yield part, unpack(sets[part], neurons)


def count_uses(sets: BitSets, neurons: int) -> npt.NDArray[np.int64]:
    """The number of tokens that each neuron is active for, shape (N,)."""
    counts = np.zeros(neurons, np.int64)
    for _, active_TN in unpack_in_parts(sets, neurons):
        counts += active_TN.sum(0, dtype=np.int64)
    return counts
