"""The pass over Inductor's joint graph: finds operators, has them planned, splices what won."""

from __future__ import annotations

import logging
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from torch import fx
from torch._inductor.custom_graph_pass import CustomGraphPass, get_hash_for_files

from ollie_compile import plan as plans
from ollie_compile import rules, subprograms
from ollie_compile.config import OllieConfig
from ollie_compile.custom import declarations
from ollie_compile.lift.aten import unsupported
from ollie_compile.operators import Convolution, Operator, Subprogram, recognize
from ollie_compile.report import Report
from ollie_compile.splicing import NOT_SPLICED, splice

logger = logging.getLogger(__name__)

_SOURCES = tuple(sorted(str(path) for path in Path(__file__).parent.rglob("*.py")))


class DerivationPass(CustomGraphPass):
    """Replaces convolutions, subprograms of several products, and users' operators by their best programs.

    As Inductor's `joint_custom_pre_pass` it runs before constant folding in inference, and before the
    partitioner in training, where convolutions of the forward are all that it rewrites. `before` are the
    user's own passes.
    """

    def __init__(
        self, config: OllieConfig, report: Report, before: Sequence[Callable[[fx.Graph], None]]
    ) -> None:
        self.config, self.report, self.before = config, report, before

    def __deepcopy__(self, memo: dict[int, Any]) -> DerivationPass:
        """Itself: AOTInductor copies its options, and what was decided belongs into the caller's report."""
        return self

    def uuid(self) -> Any:
        """None, so that Inductor caches nothing, where passes or rules of users have no identity."""
        theirs = [custom.uuid() if isinstance(custom, CustomGraphPass) else None for custom in self.before]
        decisive = (asdict(self.config), torch.get_num_threads(), declarations(), theirs)
        return None if None in theirs or rules.of_users() else get_hash_for_files(_SOURCES, repr(decisive))

    def __call__(self, graph: fx.Graph) -> None:
        for custom in self.before:
            custom(graph)
        targets = Counter(str(node.target) for node in graph.nodes if node.op == "call_function")
        training = _is_training(graph)
        together = [] if training else self._subprograms(graph)
        lifted = {node for _, place in together for node in place.nodes}
        for node in subprograms.declared(graph):
            if node not in lifted:
                targets[str(node.target)] -= 1
                why = "gradients are computed" if training else "finding subprograms failed"
                self.report.left(node.name, unsupported(node) or why)
        convolutions = _convolutions(graph)
        count = len({operator for operator, _ in together} | {c for _, c in convolutions})
        budget = _Budget(self.config, count)
        replaced: dict[fx.Node, fx.Node] = {}
        for operator, place in together:
            made = budget.plan(operator)
            if isinstance(made, str):
                self.report.left(place.roots[0].name, made)
                continue
            if made.winner is not None:
                place = replace(place, inputs=tuple(replaced.get(source, source) for source in place.inputs))
                if not subprograms.gather(graph, place):
                    self.report.left(place.roots[0].name, "another subprogram, already replaced, needs it")
                    continue
                results = splice(graph, operator, place.roots, place.inputs, made.winner.program)
                if results is None:
                    self.report.left(place.roots[0].name, NOT_SPLICED)
                    continue
                replaced.update(zip(place.roots, results, strict=True))
            self.report.planned(", ".join(root.name for root in place.roots), made)
            targets.subtract(str(node.target) for node in place.nodes)
        # Once more: those that a winner holds are new, those that it replaced are gone.
        for node, found in _convolutions(graph):
            made = found if isinstance(found, str) else budget.plan(found)
            targets[str(node.target)] -= 1
            if isinstance(made, str):
                self.report.left(node.name, made)
                continue
            if made.winner is not None:
                inputs = node.args[:2]
                if splice(graph, made.operator, [node], inputs, made.winner.program) is None:
                    self.report.left(node.name, NOT_SPLICED)
                    continue
            self.report.planned(node.name, made)
        self.report.others.update(+targets)
        logger.info("ollie: %s", self.report.summary)

    def _subprograms(self, graph: fx.Graph) -> list[tuple[Subprogram, subprograms.Place]]:
        try:
            return subprograms.find(graph, _fixed(graph))
        except Exception as error:  # as in planning: the convolutions are left to be derived
            logger.warning("ollie: no subprograms are derived: finding them failed", exc_info=True)
            self.report.left("subprograms", f"finding them failed: {error}")
            return []


class _Budget:
    """Plans operators, each with its share of the time; what one leaves goes to those after it."""

    def __init__(self, config: OllieConfig, operators: int) -> None:
        self.config, self.left = config, operators
        self.stop = time.perf_counter() + config.budget_s
        self.made: dict[Operator, plans.Plan | str] = {}

    def plan(self, operator: Operator) -> plans.Plan | str:
        """The plan of an operator, or why planning failed."""
        if operator not in self.made:
            share = (self.stop - time.perf_counter()) / max(1, self.left)
            self.left -= 1
            try:
                self.made[operator] = plans.plan(operator, self.config, share)
            except Exception as error:  # a fault in planning must not take the user's model with it
                logger.warning("ollie: %s: left as it is, planning failed", operator, exc_info=True)
                self.made[operator] = f"planning failed: {error}"
        return self.made[operator]


def _convolutions(graph: fx.Graph) -> list[tuple[fx.Node, Convolution | str]]:
    nodes = graph.find_nodes(op="call_function", target=torch.ops.aten.convolution.default)
    return [(node, recognize(node)) for node in nodes]


def _is_training(graph: fx.Graph) -> bool:
    """Whether this is a joint graph: values of its forward are used by its backward too."""
    return any("tangents" in node.name for node in graph.find_nodes(op="placeholder"))


def _fixed(graph: fx.Graph) -> frozenset[fx.Node]:
    """Parameters and buffers, and what is computed from them alone."""
    context = torch._guards.TracingContext.try_get()
    places = context.fw_metadata.static_input_indices if context and context.fw_metadata else []
    placeholders = graph.find_nodes(op="placeholder")
    fixed = {placeholders[place] for place in places if place < len(placeholders)}
    fixed.update(graph.find_nodes(op="get_attr"))
    for node in graph.nodes:
        if node.op == "call_function" and node.all_input_nodes and set(node.all_input_nodes) <= fixed:
            fixed.add(node)
    return frozenset(fixed)
