"""The state of planning in one process, handed on from the backend to all that plans or measures."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from ollie_compile.config import OllieConfig
from ollie_compile.measure.machine import Machine
from ollie_compile.plan.candidates import Plan
from ollie_compile.plan.checks import Checks
from ollie_compile.problems.operators import Operator

PlanKey = tuple[Operator, OllieConfig, int, frozenset[str]]
"""An operator, the options without the budget, the number of threads, and the names of users' extensions."""


@dataclass(slots=True)
class Context:
    """The plans of a process, and the machine that they are for.

    Args:
        machine: its clock, timings and compilations.
        plans: those made, or read from the disk.
        checks: makes the checks of one operator's candidates; called like `Checks`.
    """

    machine: Machine = field(default_factory=Machine)
    plans: dict[PlanKey, Plan] = field(default_factory=dict)
    checks: Callable[..., Checks] = Checks

    def reset(self) -> None:
        """Forget the plans. Timings stay: they are the machine's, not the plans'."""
        self.plans.clear()
