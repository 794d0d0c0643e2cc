"""Offline step 2: how often neurons are active together."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from ripple_loader.trace import BitSets, unpack

_TOKENS_AT_ONCE = 4096
_NEURONS_AT_ONCE = 1024


Indices = npt.NDArray[np.int64]


@dataclass(frozen=True)
class CoActivation:
    """The sparse co-activation graph of one layer: each neuron with its most frequent partners.

    The paper turns the counts f(i, j) into P(i, j) = f(i, j) / sum f and dist = 1 - P; both are monotone in
    f, so that the nearest pair is the pair of the largest count and placement uses the counts as they are.

    Attributes:
        first, second: the pairs, first < second, each once.
        count: f(first, second), int64, in falling order.
    """

    first: Indices
    second: Indices
    count: Indices


def coactivation(sets: BitSets, neurons: int, partners: int, among: Indices | None = None) -> CoActivation:
    """Count one layer's co-activations and keep the `partners` most frequent partners of each neuron.

    Memory is about (tokens at once + neurons at once) x N floats, time tokens x N^2.

    Args:
        sets: the layer's active sets.
        neurons: N.
        partners: how many to keep; pairs that are never active together are left out.
        among: look at these neurons only.
    """
    members = np.arange(neurons) if among is None else among
    M, partners = len(members), min(partners, len(members) - 1)
    low, high, count = (np.empty(0, np.int64) for _ in range(3))
    for start in range(0, M if partners else 0, _NEURONS_AT_ONCE):
        block = np.arange(start, min(start + _NEURONS_AT_ONCE, M))
        count_BM = _pair_counts(sets, neurons, members[block], members)
        count_BM[range(len(block)), block] = 0
        top = count_BM.topk(partners, dim=1)
        first, second = np.repeat(block, partners), top.indices.numpy().ravel()
        low = np.append(low, np.minimum(first, second))
        high = np.append(high, np.maximum(first, second))
        count = np.append(count, top.values.long().numpy().ravel())
    _, once = np.unique(low * M + high, return_index=True)
    once = once[np.argsort(-count[once], kind="stable")]
    once = once[count[once] > 0]
    return CoActivation(members[low[once]], members[high[once]], count[once])


def _pair_counts(sets: BitSets, neurons: int, rows: Indices, columns: Indices) -> torch.Tensor:
    """f(i, j) for i in `rows` and j in `columns`: float32 counts, exact below 2**24 tokens."""
    counts = torch.zeros(len(rows), len(columns))
    for start in range(0, len(sets), _TOKENS_AT_ONCE):
        active_TN = torch.from_numpy(unpack(sets[start : start + _TOKENS_AT_ONCE], neurons)).float()
        counts.addmm_(active_TN[:, rows].T, active_TN[:, columns])
    return counts
