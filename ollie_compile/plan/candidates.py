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
    """A program with what is known about it; times in seconds, `error` relative to the largest output.

    `operators` are those that it consists of, `compile_s` is what Inductor took for it, or may take.
    `reproducer` is Python source that shows again what is wrong with it.
    """

    program: Program
    derivation: Derivation
    bound_s: float = math.inf
    measured_s: float | None = None
    operators: int = 0
    compile_s: float = 0.0
    error: float | None = None
    rejected: str | None = None
    reproducer: str | None = None


@dataclass(slots=True)
class Plan:
    """What was found for one operator in `budget_s`; `winner` None keeps the original.

    `places` is how often the operator occurs in the graph that it was made for.
    """

    operator: Operator
    budget_s: float
    places: int = 1
    winner: Candidate | None = None
    reason: str = ""
    original_s: float | None = None
    candidates: list[Candidate] = field(default_factory=list)
    stats: SearchStats = field(default_factory=SearchStats)
    seconds: float = 0.0

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
        """Seconds of one call that the candidates left could save at best."""
        bounds = [candidate.bound_s for candidate in self.candidates if candidate.rejected is None]
        return max(0.0, (self.original_s or 0.0) - min(bounds, default=math.inf))


def rewriting_s(made: Plan | Exception, places: int) -> float:
    """What Inductor may take for the programs that a plan puts in so many places of a graph."""
    winner = made.winner if isinstance(made, Plan) else None
    return 0.0 if winner is None else places * winner.compile_s
