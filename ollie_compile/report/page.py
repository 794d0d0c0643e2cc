"""The report as one HTML page: decisions, times, and the derivations of each operator as a tree."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ollie_compile.plan.candidates import Candidate, Plan
from ollie_compile.report.numbers import numbers

WIDTH, HEIGHT, GAP_X, GAP_Y = 190, 34, 46, 12  # of a state in the drawing, in pixels
MOST_DRAWN = 24  # derivations of one operator; those with the lowest times


@dataclass(slots=True)
class State:
    """An expression of the derivation tree and where it is drawn.

    Args:
        rule: what led to it; empty for the operator itself.
        programs: layout, time and verdict of each program of the expression.
    """

    rule: str
    expression: str
    programs: list[dict[str, str]] = field(default_factory=list)
    after: dict[str, State] = field(default_factory=dict)
    chosen: bool = False
    x: int = 0
    y: int = 0

    def all(self) -> Iterator[State]:
        yield self
        for state in self.after.values():
            yield from state.all()


@dataclass(frozen=True, slots=True)
class Tree:
    """A drawing of derivations with a common start."""

    states: list[State]
    edges: list[tuple[State, State]]
    width: int
    height: int
    left_out: int


def tree(plan: Plan) -> Tree:
    """The derivations of an operator's candidates, equal beginnings drawn once."""
    root = State("", str(plan.operator.expression()), chosen=plan.winner is None)
    drawn = sorted(plan.candidates, key=_rank)[:MOST_DRAWN]
    if plan.winner is not None and plan.winner not in drawn:
        drawn[-1] = plan.winner
    for candidate in drawn:
        state, chosen = root, candidate is plan.winner
        state.chosen |= chosen
        for step in candidate.derivation.steps:
            text = str(step.scope)
            state = state.after.setdefault(text, State(" + ".join(step.rules), text))
            state.chosen |= chosen
        state.programs.append(_program(candidate, chosen))
    depth = _place(root, 0, 0)
    states = list(root.all())
    return Tree(
        states=states,
        edges=[(state, after) for state in states for after in state.after.values()],
        width=max(state.x for state in states) + WIDTH,
        height=depth,
        left_out=len(plan.candidates) - len(drawn),
    )


def _rank(candidate: Candidate) -> tuple[bool, float]:
    return candidate.measured_s is None, candidate.measured_s or candidate.bound_s


def _program(candidate: Candidate, chosen: bool) -> dict[str, str]:
    timed = candidate.measured_s
    time = f"{timed * 1e3:.3f} ms" if timed is not None else f"bound {candidate.bound_s * 1e3:.3f} ms"
    verdict = "chosen" if chosen else candidate.rejected or ""
    kind = "chosen" if chosen else "measured" if timed is not None else "rejected"
    return {"written": str(candidate.program), "time": time, "verdict": verdict, "kind": kind}


def _place(state: State, depth: int, top: int) -> int:
    """Set the positions of a state and of those derived from it; returns where the next may begin."""
    bottom = top
    state.x = depth * (WIDTH + GAP_X)
    for after in state.after.values():
        bottom = _place(after, depth + 1, bottom)
    own = HEIGHT + 14 * len(state.programs) + GAP_Y
    state.y = top
    return max(bottom, top + own)


def render(plans: Sequence[tuple[list[str], Plan]], **described: Any) -> str:
    """A page that needs nothing but itself.

    Args:
        plans: names of the nodes that each plan is for.
        described: `summary`, `notes`, `untouched`, `guards` and `others` of a `Report`.
    """
    import jinja2

    source = Path(__file__).with_name("page.html.j2").read_text("utf-8")
    template = jinja2.Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True).from_string(source)
    rows = [_row(nodes, plan) for nodes, plan in plans]
    longest = max((time for row in rows for time in (row["original"], row["best"]) if time), default=1.0)
    return template.render(**described, rows=rows, longest=longest, width=WIDTH, height=HEIGHT)


def _row(nodes: list[str], plan: Plan) -> dict[str, Any]:
    measured = [candidate.measured_s for candidate in plan.candidates if candidate.measured_s is not None]
    winner = plan.winner
    return {
        "nodes": nodes,
        "plan": plan,
        "original": plan.original_s and plan.original_s * 1e3,
        "best": min(measured) * 1e3 if measured else None,
        "chosen": winner is not None,
        "numbers": numbers(winner) if winner is not None else "",
        "steps": winner.derivation.steps if winner is not None else (),
        "tree": tree(plan),
    }
