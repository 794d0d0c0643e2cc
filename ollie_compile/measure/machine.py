"""The machine that programs are planned for: its clock, its timings, and how long it takes to compile."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Sequence
from typing import Any

import torch
from torch import Tensor

from ollie_compile.lower.lowering import Program
from ollie_compile.measure import bounds, calls, clock, timing
from ollie_compile.measure.pace import Pace
from ollie_compile.measure.profile import Profile


class Machine:
    """Answers what planning asks of the machine; tests put another in its place.

    Attributes:
        profile: seconds of library calls, on disk too.
        pace: how long Inductor takes to compile candidates.
        built: names of the C++ kernels that this process has built.
    """

    def __init__(self) -> None:
        self.profile, self.pace = Profile(), Pace()
        self.built: set[str] = set()

    def now(self) -> float:
        """Seconds of the clock of budgets, which never goes back."""
        return clock.now()

    def bound_seconds(
        self, program: Program, dtype: torch.dtype, device: torch.device, *, limit: float = math.inf
    ) -> float:
        """As `bounds.bound_seconds`, with the timings of this machine."""
        return bounds.bound_seconds(program, dtype, device, self.profile, limit=limit)

    def called(
        self, function: Callable[..., Any], inputs: Sequence[Tensor], constant: Collection[int]
    ) -> calls.Called:
        """A call of `function(*inputs)` operator by operator; `constant` as in `calls.called`."""
        return calls.called(function, inputs, constant, self.profile)

    def compiled(
        self, function: Callable[..., Any], inputs: Sequence[Tensor], constant: Collection[int]
    ) -> timing.Call:
        """A call of `function(*inputs)` through Inductor; `constant` as in `calls.called`."""
        return calls.compiled(function, inputs, constant, self.profile)

    def least_seconds(self, call: timing.Call, *, budget_s: float = timing.BUDGET_S) -> float:
        """Least time of a call, repeated for about `budget_s`."""
        return timing.least_seconds(call, budget_s=budget_s)

    def measure(self, calls: Sequence[timing.Call], deadline: float = math.inf) -> list[float]:
        """Least seconds of each call, all in turn in every round; few rounds after `deadline` of `now`."""
        return timing.measure(calls, deadline)
