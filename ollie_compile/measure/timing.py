"""Timing calls: one alone, or several in turn, so that drifts of the machine hit all alike."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from operator import itemgetter
from typing import TypeVar

import torch

from ollie_compile.measure import clock

Call = Callable[[], object]
T = TypeVar("T")
ROUNDS, FEWEST_ROUNDS = 15, 3
SAMPLE_S = 0.001  # one sample repeats a call for about this long
BUDGET_S, LEAST_BUDGET_S = 0.02, 0.04  # for which one call is repeated, to find its median and its least time
NOISE = 0.05  # share by which times of equally fast calls may differ


def measure(
    calls: Sequence[Call],
    deadline: float = math.inf,
    *,
    sample_s: float = SAMPLE_S,
    now: Callable[[], float] = clock.now,
) -> list[float]:
    """Median seconds of each call, all in turn in every round, so that drifts hit all alike.

    Args:
        deadline: the time of `now` after which no more than `FEWEST_ROUNDS` rounds are made.
        sample_s: seconds for which one sample repeats a call.
        now: the clock of the deadline; samples are taken by `clock.of_calls`.
    """
    repeats = []
    for call in calls:
        call()
        start = clock.of_calls()
        call()
        synchronize()
        repeats.append(max(1, min(100, round(sample_s / max(clock.of_calls() - start, 1e-7)))))
    samples: list[list[float]] = [[] for _ in calls]
    for number in range(ROUNDS):
        if number >= FEWEST_ROUNDS and now() > deadline:
            break
        for call, count, into in zip(calls, repeats, samples, strict=True):
            start = clock.of_calls()
            for _ in range(count):
                call()
            synchronize()
            into.append((clock.of_calls() - start) / count)
    return [sorted(times)[len(times) // 2] for times in samples]


def median_seconds(call: Call, *, budget_s: float = BUDGET_S) -> float:
    """Median time of a call after one warm-up, repeated for about `budget_s`."""
    times = _times(call, budget_s)
    return times[len(times) // 2]


def least_seconds(call: Call) -> float:
    """The least time of a call, which other programs on the machine disturb least: for bounds."""
    return _times(call, LEAST_BUDGET_S)[0]


def _times(call: Call, budget_s: float) -> list[float]:
    call()
    times: list[float] = []
    stop = clock.of_calls() + budget_s
    while not times or (clock.of_calls() < stop and len(times) < 100):
        start = clock.of_calls()
        call()
        synchronize()
        times.append(clock.of_calls() - start)
    return sorted(times)


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
