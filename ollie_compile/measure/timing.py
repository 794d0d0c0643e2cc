"""Timing calls: one alone, or several in turn, so that drifts of the machine hit all alike.

A call's time is the least of its samples. Beside other programs even the processor time of a call grows, for
they share its core and its caches: the median of a short call can be ten times what a quiet machine takes,
the least time stays.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from operator import itemgetter
from typing import TypeVar

import torch

from ollie_compile.measure import clock

Call = Callable[[], object]
T = TypeVar("T")
ROUNDS, FEWEST_ROUNDS, MOST_ROUNDS = 15, 3, 100
SETTLED = 5  # samples that must be about as short as the least
SAMPLE_S = 0.001  # one sample repeats a call for about this long,
BLOCK_S = 0.0001  # in blocks of about this length, the shortest of which counts
BUDGET_S = 0.02  # for which one call is repeated
NOISE = 0.05  # share by which times of equally fast calls may differ


def measure(
    calls: Sequence[Call],
    deadline: float = math.inf,
    *,
    sample_s: float = SAMPLE_S,
    now: Callable[[], float] = clock.now,
) -> list[float]:
    """Least seconds of each call, all in turn in every round, so that drifts hit all alike.

    `ROUNDS` rounds are made, and on a busy machine more, until the least times of all calls have settled.

    Args:
        deadline: the time of `now` after which no more than `FEWEST_ROUNDS` rounds are made.
        sample_s: seconds for which one sample repeats a call, at most 10 blocks.
        now: the clock of the deadline; samples are taken by `clock.of_calls`.
    """
    sizes = []
    for call in calls:
        call()
        taken = _block(call, 1)
        if taken < sample_s:
            taken = min(taken, *(_block(call, 1) for _ in range(2)))
        count = max(1, min(100, round(min(BLOCK_S, sample_s) / max(taken, 1e-7))))
        sizes.append((count, max(1, min(10, round(sample_s / (count * max(taken, 1e-7)))))))
    samples: list[list[float]] = [[] for _ in calls]
    for number in range(MOST_ROUNDS):
        late = number >= FEWEST_ROUNDS and now() > deadline
        if late or (number >= ROUNDS and all(_settled(times) for times in samples)):
            break
        for call, (count, blocks), into in zip(calls, sizes, samples, strict=True):
            into.append(min(_block(call, count) for _ in range(blocks)))
    return [min(times) for times in samples]


def _settled(times: Sequence[float]) -> bool:
    """Whether several samples differ from the least by noise alone, so that it was no exception."""
    return sorted(times)[SETTLED - 1] <= min(times) * (1 + NOISE)


def least_seconds(call: Call, *, budget_s: float = BUDGET_S) -> float:
    """The least time of a call after one warm-up, repeated for about `budget_s`."""
    call()
    times: list[float] = []
    stop = clock.of_calls() + budget_s
    while not times or (clock.of_calls() < stop and len(times) < 100):
        times.append(_block(call, 1))
    return min(times)


def _block(call: Call, count: int) -> float:
    """Mean time of so many calls in a row."""
    start = clock.of_calls()
    for _ in range(count):
        call()
    synchronize()
    return (clock.of_calls() - start) / count


def fastest_first(things: Iterable[T], seconds: Callable[[T], float], noise: float = NOISE) -> list[T]:
    """Sort by time; things that differ by noise alone keep their order, so that noise decides nothing.

    Args:
        noise: share of the fastest thing's time by which another may take longer and count as equally fast.
    """
    timed = [(seconds(thing), place, thing) for place, thing in enumerate(things)]
    groups: list[list[tuple[int, T]]] = []
    limit = -math.inf
    for taken, place, thing in sorted(timed, key=itemgetter(0)):
        if taken > limit:
            groups.append([])
            limit = taken * (1 + noise)
        groups[-1].append((place, thing))
    return [thing for group in groups for _, thing in sorted(group, key=itemgetter(0))]


def synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
