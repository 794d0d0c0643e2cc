"""How long Inductor takes to compile a candidate, learnt from those that it has compiled."""

from __future__ import annotations

# What Inductor takes for a candidate in a graph, alone, and for each operator, until some are compiled.
PLACE_S, CANDIDATE_S, OPERATOR_S = 0.05, 0.5, 0.006


class Pace:
    """How long Inductor takes for a candidate, by those that it has compiled."""

    def __init__(self) -> None:
        self.taken = self.expected = 0.0

    def seconds(self, operators: int) -> float:
        """What a candidate of so many operators is expected to take."""
        return self._paced(CANDIDATE_S + OPERATOR_S * operators)

    def placed_seconds(self, operators: int) -> float:
        """What they are expected to take more in a graph that is compiled anyway."""
        return self._paced(PLACE_S + OPERATOR_S * operators)

    def _paced(self, usual: float) -> float:
        return usual * self.taken / self.expected if self.expected else usual

    def took(self, seconds: float, operators: int) -> None:
        self.taken += seconds
        self.expected += CANDIDATE_S + OPERATOR_S * operators


pace = Pace()
