"""The decisions of the backend, operator by operator, as text and as JSON."""

from __future__ import annotations

import json
import math
from collections import Counter
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

from ollie_compile.report.numbers import numbers
from ollie_compile.rules.bilinear import growth

if TYPE_CHECKING:  # these bring the planner, which a report of the command line or of a script does not need
    from ollie_compile.plan.candidates import Candidate, Plan


@dataclass(slots=True)
class Report:
    """Decisions in the order of the graph.

    Attributes:
        plans: (names of the nodes, their common plan) of the operators that were lifted.
        untouched: (node name, reason) of convolutions, subprograms and users' operators that were not.
        others: how often each other operator occurs; they are Inductor's.
        notes: each deviation from the options, with its reason.
        guards: the sizes for which a graph with dynamic shapes holds; others make a graph of their own.
        kept: how many replacements were taken back, for a whole graph was faster without them.
    """

    plans: list[tuple[list[str], Plan]] = field(default_factory=list)
    untouched: list[tuple[str, str]] = field(default_factory=list)
    others: Counter[str] = field(default_factory=Counter)
    notes: list[str] = field(default_factory=list)
    guards: list[str] = field(default_factory=list)
    kept: int = 0

    def note(self, text: str) -> None:
        if text not in self.notes:
            self.notes.append(text)

    def clear(self) -> None:
        """Forget a compilation that is made anew."""
        self.plans, self.untouched, self.others, self.kept = [], [], Counter(), 0

    def planned(self, node: str, plan: Plan) -> None:
        for nodes, known in self.plans:
            if known is plan:
                nodes.append(node)
                return
        self.plans.append(([node], plan))

    def left(self, node: str, reason: str) -> None:
        self.untouched.append((node, reason))

    @property
    def rewritten(self) -> int:
        """How many operators were replaced."""
        return sum(len(nodes) for nodes, plan in self.plans if plan.winner is not None) - self.kept

    @property
    def summary(self) -> str:
        total = sum(len(nodes) for nodes, _ in self.plans) + len(self.untouched)
        return f"{self.rewritten} of {total} convolutions and subprograms rewritten"

    def to_dict(self) -> dict[str, Any]:
        """Plain data: operators with expressions, steps, candidates, times in seconds."""
        return {
            "rewritten": self.rewritten,
            "operators": [{"nodes": nodes, **_plan_dict(plan)} for nodes, plan in self.plans],
            "untouched": [{"node": node, "reason": reason} for node, reason in self.untouched],
            "others": dict(self.others),
            "notes": list(self.notes),
            "guards": list(self.guards),
        }

    def to_json(self) -> str:
        return json.dumps(self.to_dict(), indent=1)

    def to_html(self) -> str:
        """One page that needs nothing else: decisions, times, and each operator's derivations as a graph."""
        from ollie_compile.report.page import render

        return render(
            self.plans,
            summary=self.summary,
            notes=self.notes,
            untouched=self.untouched,
            guards=self.guards,
            others=self.others,
        )

    def __str__(self) -> str:
        lines = [f"ollie: {self.summary}", *self.notes]
        for nodes, plan in self.plans:
            lines += ["", f"{', '.join(nodes)}: {plan.operator}", *_plan_lines(plan)]
        lines += [f"\n{node}: left as it is: {reason}" for node, reason in self.untouched]
        if self.guards:
            lines += ["\nsizes for which the graph holds:", *(f"  {guard}" for guard in self.guards)]
        if self.others:
            counted = ", ".join(f"{name} {count}" for name, count in self.others.most_common())
            lines += [f"\nleft to Inductor: {counted}"]
        return "\n".join(lines)


_COUNTED = (
    "does not beat the original",
    "came first",
    "a lower bound",
    "what another takes",
    "in the budget",
    "in one tensor",
    "fewer products",
)


def _plan_lines(plan: Plan) -> list[str]:
    lines = [f"  {plan.operator.expression()}"]
    stats = plan.stats
    cut = "" if stats.complete else ", cut by the budget"
    lines.append(
        f"  search: {stats.states} states, {stats.duplicates} met again, {stats.candidates} lowerable, "
        f"{stats.seconds:.2f} s{cut}; in all {plan.seconds:.1f} s"
    )
    if plan.original_s is not None:
        lines.append(f"  original: {_ms(plan.original_s)}")
    chosen = "original kept" if plan.winner is None else f"rewritten, products as {plan.winner.program}"
    lines.append(f"  {chosen}: {plan.reason}")
    if plan.winner is not None:
        lines.append(f"  {numbers(plan.winner)}")
        lines += [f"    {line}" for step in plan.winner.derivation.steps for line in str(step).split("\n")]
    others: Counter[str] = Counter()
    for candidate in plan.candidates:
        reason = candidate.rejected or "chosen"
        if candidate.measured_s is None and reason.endswith(_COUNTED):
            others[reason] += 1
        else:
            lines.append(f"  candidate {_candidate_line(candidate)}")
    lines += [f"  {count} more candidates: {reason}" for reason, count in others.items()]
    return lines


def _candidate_line(candidate: Candidate) -> str:
    measured = "" if candidate.measured_s is None else f", measured {_ms(candidate.measured_s)}"
    steps = " > ".join(step.rules[0] for step in candidate.derivation.steps) or "as lifted"
    verdict = candidate.rejected or "chosen"
    factor, rounding = growth(candidate.program.scope), ""
    if candidate.error is not None and factor > 1:
        mixed = "" if candidate.mixed_error is None else f", {candidate.mixed_error:.1e} on mixed magnitudes"
        rounding = f", error {candidate.error:.1e}{mixed} (values up to {factor:.0f} times larger)"
    return f"[{candidate.program}] {steps}: bound {_ms(candidate.bound_s)}{measured}{rounding}: {verdict}"


def _plan_dict(plan: Plan) -> dict[str, Any]:
    return {
        "operator": str(plan.operator),
        "expression": str(plan.operator.expression()),
        "original_s": plan.original_s,
        "reason": plan.reason,
        "seconds": plan.seconds,
        "search": asdict(plan.stats),
        "winner": None if plan.winner is None else _candidate_dict(plan.winner),
        "candidates": [_candidate_dict(candidate) for candidate in plan.candidates],
    }


def _candidate_dict(candidate: Candidate) -> dict[str, Any]:
    return {
        "layout": candidate.program.layout,
        "expression": str(candidate.program.scope),
        "steps": [
            {"rules": list(step.rules), "expression": str(step.scope)} for step in candidate.derivation.steps
        ],
        "bound_s": candidate.bound_s if math.isfinite(candidate.bound_s) else None,
        "measured_s": candidate.measured_s,
        "error": candidate.error,
        "mixed_error": candidate.mixed_error,
        "growth": growth(candidate.program.scope),
        "kernels": candidate.program.kernels,
        "rejected": candidate.rejected,
        "reproducer": candidate.reproducer,
    }


def _ms(seconds: float) -> str:
    return f"{seconds * 1e3:.3f} ms"
