"""2-opt: improve an order by turning pieces of it around.

It lowers exactly the expected reads. A token's reads are the runs of its active neurons, and a run is
one active neuron more than it has neighbouring active pairs, so that, over the traced tokens,
reads = sum of counts - sum of f(neighbours).
"""

from __future__ import annotations

import numpy as np

from ripple_loader.offline.coactivation import Activity, CoActivation, Indices

_MOST_ROUNDS = 20
_LEAST_GAIN = 1e-3  # stop after a round that gains less than this share of the sum


def two_opt(order: Indices, activity: Activity, graph: CoActivation) -> Indices:
    """Apply 2-opt moves that bring a pair of `graph` together, the best first, until a round gains little.

    Args:
        order: a permutation of some neurons.
        activity: of their layer.
        graph: partners worth bringing together; others of its pairs are ignored.

    Returns:
        A permutation of the same neurons whose neighbours are active together at least as often.
    """
    order = order.copy()
    position = np.full(activity.neurons, -1)
    position[order] = np.arange(len(order))
    known = (position[graph.first] >= 0) & (position[graph.second] >= 0)
    first, second, count = graph.first[known], graph.second[known], graph.count[known]
    for _ in range(_MOST_ROUNDS):
        joined = activity.together(order[:-1], order[1:])
        if _round(order, position, activity, joined, first, second, count) <= _LEAST_GAIN * joined.sum():
            break
    return order


def _round(
    order: Indices,
    position: Indices,
    activity: Activity,
    joined: Indices,
    first: Indices,
    second: Indices,
    count: Indices,
) -> int:
    """Find all improving moves on the order as it is, apply those that stay possible; returns the gain."""
    i, j = position[first], position[second]
    left, right, moves = np.minimum(i, j), np.maximum(i, j), []
    # A position's link and neighbour on either side; an end has no neighbour, -1, and nothing to lose.
    after, before = (
        (np.append(joined, 0), np.append(order[1:], -1)),
        (np.append(0, joined), np.append(-1, order[:-1])),
    )
    for lost, neighbour in (after, before):
        hopeful = np.flatnonzero((right - left > 1) & (count > np.minimum(lost[left], lost[right])))
        a, b = left[hopeful], right[hopeful]
        inside = (neighbour[a] >= 0) & (neighbour[b] >= 0)
        gain = count[hopeful] - lost[a] - lost[b]
        gain[inside] += activity.together(neighbour[a][inside], neighbour[b][inside])
        good = np.flatnonzero(gain > 0)
        a, b = a[good], b[good]
        moves.append(np.stack([gain[good], order[a], neighbour[a], order[b], neighbour[b]]))
    moves_MG = np.concatenate(moves, axis=1)
    best_first = moves_MG[:, np.argsort(-moves_MG[0], kind="stable")].T.tolist()
    return sum(gain for gain, *ends in best_first if _turn(order, position, *ends))


def _turn(order: Indices, position: Indices, a: int, next_a: int, b: int, next_b: int) -> bool:
    """Replace the links (a, next_a) and (b, next_b) by (a, b) and (next_a, next_b) where they still exist."""
    at_a, at_b = int(position[a]), int(position[b])
    step = int(position[next_a]) - at_a if next_a >= 0 else int(position[next_b]) - at_b
    for at, neighbour in ((at_a, next_a), (at_b, next_b)):
        if neighbour >= 0 and position[neighbour] - at != step:
            return False
        if neighbour < 0 and 0 <= at + step < len(order):
            return False
    if abs(step) != 1:
        return False
    low, high = min(at_a, at_b), max(at_a, at_b)
    piece = slice(low + 1, high + 1) if step == 1 else slice(low, high)
    order[piece] = order[piece][::-1].copy()
    position[order[piece]] = np.arange(piece.start, piece.stop)
    return True
