"""Offline step 2: how often neurons are active together.

Counts of single pairs are exact, from bit sets over tokens. A matrix product proposes the pairs to count; for
wide layers it takes a sample of the tokens, because the whole product would be 2 T N^2 operations.

Dimension key: T tokens, N neurons, M members looked at, B of them at once.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from ripple_loader.offline.active_sets import BitSets, unpack, unpack_in_parts

_NEURONS_AT_ONCE = 1024
_PAIRS_AT_ONCE = 8192
_PRODUCTS = 1 << 36
_CANDIDATES = 2  # for each partner to keep, when a sample proposes them

Indices = npt.NDArray[np.int64]


class Activity:
    """One layer's active sets by neuron, for counting.

    Args:
        sets: the active sets, by token.
        neurons: N.

    Attributes:
        counts: tokens each neuron is active for, int64, shape (N,).
    """

    def __init__(self, sets: BitSets, neurons: int) -> None:
        self.sets, self.neurons, self.tokens = sets, neurons, len(sets)
        words = np.zeros((neurons, -(-len(sets) // 64) * 8), np.uint8)
        for part, active_TN in unpack_in_parts(sets, neurons):
            packed = np.packbits(active_TN, axis=0)
            words[:, part.start // 8 : part.start // 8 + len(packed)] = packed.T
        self._words: npt.NDArray[np.uint64] = words.view(np.uint64)
        self.counts: Indices = np.bitwise_count(self._words).sum(1, dtype=np.int64)

    def together(self, first: Indices, second: Indices) -> Indices:
        """f(first, second): for how many tokens both neurons of each pair are active, int64."""
        counts = np.empty(len(first), np.int64)
        for start in range(0, len(first), _PAIRS_AT_ONCE):
            part = slice(start, start + _PAIRS_AT_ONCE)
            both = self._words[first[part]] & self._words[second[part]]
            counts[part] = np.bitwise_count(both).sum(1, dtype=np.int64)
        return counts


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


def sampled_tokens(tokens: int, members: int) -> int:
    """How many of a layer's tokens propose partners among `members` neurons."""
    return min(tokens, max(64, _PRODUCTS // max(1, members * members)))


def coactivation(
    activity: Activity, partners: int, members: Indices | None = None, *, sample: int | None = None
) -> CoActivation:
    """Keep the `partners` most frequent partners of each neuron; memory is that of B x M floats.

    Args:
        activity: the layer's active sets.
        partners: the number to keep; pairs that are never active together are not kept.
        members: look at these neurons only, ascending.
        sample: tokens that propose partners, by default `sampled_tokens`; if these are not all tokens,
            twice as many candidates are counted exactly and the best are kept.
    """
    members = np.arange(activity.neurons) if members is None else members
    M, T = len(members), activity.tokens
    sample = sampled_tokens(T, M) if sample is None else min(sample, T)
    partners = min(partners, M - 1)
    wanted = partners if sample == T else min(_CANDIDATES * partners, M - 1)
    if wanted < 1 or not T:
        nothing = np.empty(0, np.int64)
        return CoActivation(nothing, nothing, nothing)
    chosen = activity.sets[np.arange(sample) * T // sample]
    active_TM = torch.from_numpy(unpack(chosen, activity.neurons)[:, members]).float()
    pairs = []
    for start in range(0, M, _NEURONS_AT_ONCE):
        block = np.arange(start, min(start + _NEURONS_AT_ONCE, M))
        count_BM = active_TM[:, start : start + len(block)].T @ active_TM
        count_BM[range(len(block)), block] = -1
        pairs.append((np.repeat(block, wanted), count_BM.topk(wanted, dim=1).indices.numpy().ravel()))
    one, other = (np.concatenate(side) for side in zip(*pairs, strict=True))
    code = np.sort(np.minimum(one, other) * M + np.maximum(one, other))
    code = code[np.append(True, np.diff(code) > 0)]
    first, second = members[code // M], members[code % M]
    count = activity.together(first, second)
    if wanted > partners:
        kept = _best_of_each(first, second, count, partners)
        first, second, count = first[kept], second[kept], count[kept]
    order = np.argsort(-count, kind="stable")
    order = order[count[order] > 0]
    return CoActivation(first[order], second[order], count[order])


def _best_of_each(first: Indices, second: Indices, count: Indices, partners: int) -> Indices:
    """Positions of the pairs that are among the `partners` most frequent of either of their neurons."""
    neuron, pair = np.concatenate([first, second]), np.tile(np.arange(len(first)), 2)
    order = np.lexsort((-np.tile(count, 2), neuron))
    starts = np.flatnonzero(np.append(True, np.diff(neuron[order]) != 0))
    rank = np.arange(len(order)) - np.repeat(starts, np.diff(np.append(starts, len(order))))
    kept = np.zeros(len(first), bool)
    kept[pair[order[rank < partners]]] = True
    return np.flatnonzero(kept)
