"""How long Inductor takes to compile a candidate, learnt from those that it has compiled."""

from __future__ import annotations

# Seconds that Inductor takes for a candidate within a graph, for one alone, and for each operator: a guess
# until the first candidates are compiled.
IN_GRAPH_S, ALONE_S, OPERATOR_S = 0.05, 0.5, 0.006


class Pace:
    """The time that compilations take, relative to the first guess."""

    def __init__(self) -> None:
        self.taken_s = self.guessed_s = 0.0

    def seconds(self, operators: int) -> float:
        """The time expected for a candidate of so many operators, compiled alone."""
        return self._paced(ALONE_S + OPERATOR_S * operators)

    def seconds_in_graph(self, operators: int) -> float:
        """The time expected for so many more operators in a graph that is compiled anyway."""
        return self._paced(IN_GRAPH_S + OPERATOR_S * operators)

    def _paced(self, guess_s: float) -> float:
        return guess_s * self.taken_s / self.guessed_s if self.guessed_s else guess_s

    def took(self, seconds: float, operators: int) -> None:
        """Learn from a candidate that was compiled alone."""
        self.taken_s += seconds
        self.guessed_s += ALONE_S + OPERATOR_S * operators
