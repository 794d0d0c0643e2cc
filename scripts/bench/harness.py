"""Contenders timed side by side by one rule: equal results first, then rounds in a new order each.

    race = Race({"eager": eager, "compiled": compiled}, equal=close(rtol=1e-3, atol=1e-4))
    race.run(rounds=30, calls=5)
    table.add("compiled", **race.times["compiled"].columns("ms"))

In each round every contender has a turn: an untimed call, because it finds the caches, and perhaps threads
that are still busy, as the contender before it left them; then the timed ones. The order of a round is drawn
anew from a fixed seed. A contender is a function without arguments, a `Contender` with set-up, or an
`OwnProcess`. `in_own_process` is for what is measured once, such as the peak of a process's memory.
"""

import contextlib
import functools
import multiprocessing
import os
import random
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ProcessPoolExecutor
from contextlib import AbstractContextManager
from dataclasses import KW_ONLY, dataclass
from typing import Any, NamedTuple
from unittest import mock

Equal = Callable[[Any, Any], Any]
"""Takes a result and the one wanted; raises AssertionError unless they agree. May return the error."""


def close(*, rtol: float, atol: float) -> Equal:
    """Nested tensors and numbers agree within |got - want| <= atol + rtol |want|."""
    from torch.testing import assert_close

    return functools.partial(assert_close, rtol=rtol, atol=atol)


def same(got: Any, want: Any) -> None:
    """Equal values, of tensors every element."""
    assert got.equal(want) if hasattr(got, "equal") else got == want, f"got {got}, want {want}"


def require_equal(results: Iterable[tuple[str, Any]], equal: Equal, want: Any = None) -> dict[str, Any]:
    """What `equal` returns for each named result against `want`, by default the first result.

    Raises:
        RuntimeError: a result differs, so that times must not be compared.
    """
    errors = {}
    for name, got in results:
        want = got if want is None else want
        try:
            errors[name] = equal(got, want)
        except AssertionError as difference:
            raise RuntimeError(f"{name} must give the reference's result: {difference}") from None
    return errors


class Timing(NamedTuple):
    """Seconds of a call, by the wall clock and as CPU time of its thread and of the process; its result."""

    wall: float
    thread: float
    process: float
    result: Any = None


def clocks() -> tuple[float, float, float]:
    """The readings that a `Timing` is the difference of, when the GPU is done."""
    torch = sys.modules.get("torch")  # a contender without it does not pay for its import
    if torch is not None and torch.cuda.is_initialized():
        torch.cuda.synchronize()
    return time.perf_counter(), time.thread_time(), time.process_time()


def timed(call: Callable[[], Any], calls: int = 1) -> Timing:
    """So many calls timed together: the seconds of one, and the last result."""
    before = clocks()
    for _ in range(calls):
        result = call()
    return Timing(*((end - start) / calls for end, start in zip(clocks(), before, strict=True)), result)


class Times(list[Timing]):
    """Samples of one contender."""

    @property
    def wall(self) -> list[float]:
        return [each.wall for each in self]

    @property
    def median(self) -> float:
        return statistics.median(self.wall)

    @property
    def results(self) -> list[Any]:
        return [each.result for each in self]

    def columns(self, unit: str = "ms", median: str = "", parts: int = 1) -> dict[str, float]:
        """Median, first and last tenth by the wall clock, and median CPU time of the calling thread.

        Args:
            unit: "s", "ms" or "us", and the end of the columns' names.
            median: the name of the first column, by default "median_" and the unit.
            parts: equal parts of a call; the columns are of one.
        """
        scale, ordered = {"s": 1, "ms": 1e3, "us": 1e6}[unit] / parts, sorted(self.wall)
        return {
            median or f"median_{unit}": self.median * scale,
            f"p10_{unit}": ordered[len(ordered) // 10] * scale,
            f"p90_{unit}": ordered[len(ordered) * 9 // 10] * scale,
            f"cpu_{unit}": statistics.median(each.thread for each in self) * scale,
        }


@dataclass
class Contender:
    """A call in this process; `setup` is entered before each sample and left after it, untimed. The result of
    an `exact` contender must equal the reference's."""

    call: Callable[[], Any]
    setup: Callable[[], AbstractContextManager[Any]] = contextlib.nullcontext
    exact: bool = True

    def turn(self, untimed: int = 1, samples: int = 1, calls: int = 1) -> list[Timing]:
        """Untimed calls, then samples of `calls` timed together."""
        timings = []
        for sample in range(-untimed, samples):
            with self.setup():
                timings.append(timed(self.call, 1 if sample < 0 else calls))
        return timings[untimed:]


@contextlib.contextmanager
def _process(environment: Mapping[str, str] | None) -> Iterator[ProcessPoolExecutor]:
    """A new interpreter with these variables beside the others; it starts with its first task."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        with mock.patch.dict(os.environ, environment or {}):
            pool.submit(os.getpid).result()
        yield pool


def in_own_process(function: Callable[..., Any], *args: Any, environment: Any = None) -> Any:
    """`function(*args)` in a process of its own, which imports the function's module anew."""
    with _process(environment) as pool:
        return pool.submit(function, *args).result()


class OwnProcess:
    """A call in a process of its own, which times it and hands back its result.

    Args:
        target: a function at a module's top level that returns a context manager, which yields the call, or a
            `Contender`.
        args: its arguments.
        environment: variables that are set in that process only.
        exact: whether its result must equal the reference's.
    """

    _entered = contextlib.ExitStack()  # these two in the process itself
    _contender: Contender

    def __init__(
        self, target: Callable[..., Any], *args: Any, environment: Any = None, exact: bool = True
    ) -> None:
        self.exact, self._stack = exact, contextlib.ExitStack()
        self._pool = self._stack.enter_context(_process(environment))
        self._pool.submit(self._enter, target, args).result()

    def turn(self, **counts: int) -> list[Timing]:
        return self._pool.submit(self._turn, counts).result()

    def close(self) -> None:
        self._pool.submit(self._leave).result()
        self._stack.close()

    @classmethod
    def _enter(cls, target: Callable[..., Any], args: tuple[Any, ...]) -> None:
        call = cls._entered.enter_context(target(*args))
        cls._contender = call if isinstance(call, Contender) else Contender(call)

    @classmethod
    def _turn(cls, counts: dict[str, int]) -> list[Timing]:
        return cls._contender.turn(**counts)

    @classmethod
    def _leave(cls) -> None:
        cls._entered.close()


@dataclass
class Race:
    """Contenders in turns.

    Args:
        contenders: functions without arguments, `Contender`s or `OwnProcess`es, by name.
        equal: how results are compared before anything is timed; None where there is nothing to compare.
        want: the result to be equal to, by default that of the first contender.
        keep: whether `times` keeps the results too.
        seed: of the order in each round.
    """

    contenders: Mapping[str, Any]
    _: KW_ONLY
    equal: Equal | None
    want: Any = None
    keep: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        pairs = self.contenders.items()
        self.contenders = {name: Contender(each) if callable(each) else each for name, each in pairs}
        self.times = {name: Times() for name in self.contenders}
        self.errors: dict[str, Any] | None = None
        self._random = random.Random(self.seed)

    def check(self) -> dict[str, Any]:
        """Call each contender once if results are compared; what `equal` returns for the exact ones.

        Raises:
            RuntimeError: a contender's result differs.
        """
        called = {} if self.equal is None else self.contenders
        results = ((name, each.turn(untimed=0)[0].result) for name, each in called.items())
        exact = ((name, result) for name, result in results if called[name].exact)
        self.errors = require_equal(exact, self.equal, self.want)
        return self.errors

    def round(self, **counts: int) -> None:
        """A turn of each contender (`Contender.turn`) in a new order; before the first, `check`."""
        if self.errors is None:
            self.check()
        for name in self._random.sample(list(self.contenders), len(self.contenders)):
            timings = self.contenders[name].turn(**counts)
            self.times[name] += timings if self.keep else [each._replace(result=None) for each in timings]

    def run(self, rounds: int, **counts: int) -> dict[str, Times]:
        """So many rounds; returns all times so far."""
        for _ in range(rounds):
            self.round(**counts)
        return self.times
