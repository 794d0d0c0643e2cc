"""Which neurons count as active for a token, kept as bit sets.

Dimension key: T tokens, N neurons.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from ripple_loader.config import ActiveRule

_COUNTED_AT_ONCE = 1024


BitSets = npt.NDArray[np.uint8]
"""Active sets of one MLP: shape (tokens, ceil(N / 8)), as `numpy.packbits` packs them."""


def active_mask(activation_TN: Tensor, rule: ActiveRule, share: float, *, exact_zeros: bool) -> Tensor:
    """Which neurons count as active, bool of shape (T, N).

    With exact zeros all that are not zero; elsewhere by `rule`, see `ReorderConfig.active`.
    """
    if exact_zeros:
        return activation_TN != 0
    size_TN = activation_TN.float().abs()
    if rule == "threshold":
        return size_TN >= share * size_TN.amax(-1, keepdim=True)
    mask_TN = torch.zeros_like(size_TN, dtype=torch.bool)
    if rule == "top_k":
        count = max(1, round(share * size_TN.shape[-1]))
        return mask_TN.scatter_(-1, size_TN.topk(count, dim=-1).indices, True)
    energy_TN, order_TN = size_TN.square().sort(dim=-1, descending=True)
    before_TN = energy_TN.cumsum(-1) - energy_TN
    return mask_TN.scatter_(-1, order_TN, before_TN < share * energy_TN.sum(-1, keepdim=True))


def unpack(sets: BitSets, neurons: int) -> npt.NDArray[np.uint8]:
    """Active sets as zeros and ones of shape (tokens, N)."""
    return np.unpackbits(sets, axis=1, count=neurons)


def count_uses(sets: BitSets, neurons: int) -> npt.NDArray[np.int64]:
    """For how many tokens each neuron is active, shape (N,)."""
    counts = np.zeros(neurons, np.int64)
    for start in range(0, len(sets), _COUNTED_AT_ONCE):
        counts += unpack(sets[start : start + _COUNTED_AT_ONCE], neurons).sum(0, dtype=np.int64)
    return counts
