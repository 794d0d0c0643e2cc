"""A plan for one operator, and the candidates that it chooses among."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from ollie_compile.lower.lowering import Program
from ollie_compile.problems.operators import Operator
from ollie_compile.search.hybrid import Derivation, SearchStats

SAME_BUDGET = 1.05  # equal budgets of a graph leave an operator shares that differ by the clock
OUT_OF_TIME = "no time left in the budget"


@dataclass(slots=True, eq=False)
class Candidate:
    """A program for an operator, with its predicted and measured times.

    Attributes:
        order: its place among the operator's candidates by their work, which no measurement changes.
        bound_s: seconds that one call takes at least, by the cost model.
        measured_s: seconds of one call, as measured last.
        operators: how many operators of torch the program calls, without views.
        compile_s: seconds that Inductor took for it, or is expected to take.
        error: largest rounding error, relative to the largest output.
        mixed_error: largest rounding error on inputs of mixed magnitude, relative to each output's own sum of
            |products|; None where no constant matrix is applied.
        rejected: why the candidate was dropped; None while it may still win, and for the winner.
        reproducer: Python source that shows a wrong result again.
    """

    program: Program
    derivation: Derivation
    order: int = 0
    bound_s: float = math.inf
    measured_s: float | None = None
    operators: int = 0
    compile_s: float = 0.0
    error: float | None = None
    mixed_error: float | None = None
    rejected: str | None = None
    reproducer: str | None = None


@dataclass(slots=True)
class Plan:
    """The decision for one operator, made within `budget_s` seconds.

    Attributes:
        occurrences: how often the graph that was planned for holds the operator.
        winner: the candidate that replaces the operator; None keeps the original.
        reason: why.
        original_s: seconds of one call of the original.
        seconds: time that planning took.
    """

    operator: Operator
    budget_s: float
    occurrences: int = 1
    winner: Candidate | None = None
    reason: str = ""
    original_s: float | None = None
    candidates: list[Candidate] = field(default_factory=list)
    stats: SearchStats = field(default_factory=SearchStats)
    seconds: float = 0.0

    @property
    def open(self) -> list[Candidate]:
        """The candidates that are not rejected."""
        return [candidate for candidate in self.candidates if candidate.rejected is None]

    @property
    def complete(self) -> bool:
        """Whether nothing was left out for lack of time."""
        return self.stats.complete and not self.cut and self.reason != OUT_OF_TIME

    @property
    def cut(self) -> bool:
        """Whether candidates were left out for lack of time."""
        return any(candidate.rejected == OUT_OF_TIME for candidate in self.candidates)

    @property
    def gain_s(self) -> float:
        """Seconds of one call that the open candidates could save at best."""
        best_s = min((candidate.bound_s for candidate in self.open), default=math.inf)
        return max(0.0, (self.original_s or 0.0) - best_s)


def compiling_s(result: Plan | Exception, occurrences: int) -> float:
    """Seconds that Inductor is expected to take for a plan's winner at all its occurrences in a graph."""
    winner = result.winner if isinstance(result, Plan) else None
    return 0.0 if winner is None else occurrences * winner.compile_s
