"""The pass over Inductor's joint graph: finds operators, has them planned, splices what won."""

from __future__ import annotations

import logging
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from typing import Any

import torch
from torch import fx
from torch._inductor.custom_graph_pass import CustomGraphPass, get_hash_for_files

from ollie_compile import rules, store
from ollie_compile.config import OllieConfig
from ollie_compile.graph import precision
from ollie_compile.graph.splicing import NOT_SPLICED, splice
from ollie_compile.lift.aten import unsupported
from ollie_compile.lift.declared import declarations
from ollie_compile.plan import candidates, planner
from ollie_compile.problems import dynamic, gradients, subprograms
from ollie_compile.problems.operators import Operator
from ollie_compile.report.report import Report

logger = logging.getLogger(__name__)

_SOURCES = tuple(map(str, store.sources()))


class UnchangedError(Exception):
    """A graph that Inductor compiles for what is rewritten in it, and nothing is."""


class DerivationPass(CustomGraphPass):
    """Replaces convolutions, subprograms of several products, and users' operators by their best programs.

    As Inductor's `joint_custom_pre_pass` it runs before constant folding in inference, and before the
    partitioner in training, where convolutions and their gradients are all that it rewrites.

    Args:
        before: the user's own passes.
        changed: whether to stop the compilation with `UnchangedError` where nothing is rewritten.
    """

    def __init__(
        self,
        config: OllieConfig,
        report: Report,
        before: Sequence[Callable[[fx.Graph], None]],
        *,
        changed: bool = False,
    ) -> None:
        self.config, self.report, self.before, self.changed = config, report, before, changed

    def __deepcopy__(self, memo: dict[int, Any]) -> DerivationPass:
        """Itself: AOTInductor copies its options, and what was decided belongs into the caller's report."""
        return self

    def uuid(self) -> Any:
        """None, so that Inductor caches nothing, where passes or rules of users have no identity."""
        theirs = [custom.uuid() if isinstance(custom, CustomGraphPass) else None for custom in self.before]
        decisive = (asdict(self.config), torch.get_num_threads(), declarations(), theirs)
        return None if None in theirs or rules.of_users() else get_hash_for_files(_SOURCES, repr(decisive))

    def __call__(self, graph: fx.Graph) -> None:
        self.config = self.config.budgeted(operator_count(graph))
        assert self.config.budget_s is not None, "a budget that is not given is chosen by now"
        for custom in self.before:
            custom(graph)
        rounded = precision.in_float32(graph) if self.config.half_in_float32 else 0
        if rounded:
            self.report.note(
                f"{rounded} products of half precision are computed in float32: "
                "results round less than eager's"
            )
        targets = Counter(str(node.target) for node in graph.nodes if node.op == "call_function")
        training = _is_training(graph)
        together = [] if training else self._subprograms(graph)
        lifted = {node for _, place in together for node in place.nodes}
        for node in subprograms.declared(graph):
            if node not in lifted:
                targets[str(node.target)] -= 1
                why = "gradients are computed" if training else "finding subprograms failed"
                self.report.left(node.name, unsupported(node) or why)
        alone = _alone(graph)
        stop = time.perf_counter() + self.config.budget_s
        wanted: Counter[Operator] = Counter(operator for operator, _ in together)
        wanted.update(found for _, _, found in alone if not isinstance(found, str))
        made_all = planner.plan_all(wanted, self.config, self.config.budget_s)
        replaced: dict[fx.Node, fx.Node] = {}
        for operator, place in together:
            made = made_all[operator]
            if isinstance(made, Exception):
                self.report.left(place.roots[0].name, f"planning failed: {made}")
                continue
            if made.winner is not None:
                place = replace(place, inputs=tuple(replaced.get(source, source) for source in place.inputs))
                if not subprograms.gather(graph, place):
                    self.report.left(place.roots[0].name, "another subprogram, already replaced, needs it")
                    continue
                results = splice(graph, made.operator, place.roots, place.inputs, made.winner.program)
                if results is None:
                    self.report.left(place.roots[0].name, NOT_SPLICED)
                    continue
                replaced.update(zip(place.roots, results, strict=True))
            self.report.planned(", ".join(root.name for root in place.roots), made)
            targets.subtract(str(node.target) for node in place.nodes)
        # Once more: those that a winner holds are new, those that it replaced are gone.
        alone = _alone(graph)
        new: Counter[Operator] = Counter(found for _, _, found in alone if not isinstance(found, str))
        made_all |= planner.plan_all(
            {operator: count for operator, count in new.items() if operator not in made_all},
            self.config,
            stop
            - time.perf_counter()
            - sum(candidates.rewriting_s(made_all[it], wanted[it]) for it in made_all),
        )
        for node, inputs, found in alone:
            targets[str(node.target)] -= 1
            if isinstance(found, str):
                self.report.left(node.name, found)
                continue
            made = made_all[found]
            if isinstance(made, Exception):
                self.report.left(node.name, f"planning failed: {made}")
                continue
            if made.winner is not None:
                inputs = [replaced.get(source, source) for source in inputs]
                results = splice(graph, made.operator, [node], inputs, made.winner.program)
                if results is None:
                    self.report.left(node.name, NOT_SPLICED)
                    continue
                replaced[node] = results[0]
            self.report.planned(node.name, made)
        gradients.release(graph)
        self.report.others.update(+targets)
        self.report.guards += _guards(graph)
        logger.info("ollie: %s", self.report.summary)
        if self.changed and not rounded and not self.report.rewritten:
            raise UnchangedError

    def _subprograms(self, graph: fx.Graph) -> list[tuple[Operator, subprograms.Place]]:
        try:
            return dynamic.find(graph, _fixed(graph))
        except Exception as error:  # as in planning: the convolutions are left to be derived
            logger.warning("ollie: no subprograms are derived: finding them failed", exc_info=True)
            self.report.left("subprograms", f"finding them failed: {error}")
            return []


def operator_count(graph: fx.Graph) -> int:
    return sum(node.op.startswith("call_") for node in graph.nodes)


def _alone(graph: fx.Graph) -> list[tuple[fx.Node, Sequence[fx.Node], Operator | str]]:
    """Convolutions and their gradients: the node, what it reads, and what it is or why it is left."""
    nodes = graph.find_nodes(op="call_function", target=torch.ops.aten.convolution.default)
    return [*((node, node.args[:2], dynamic.recognize(node)) for node in nodes), *gradients.find(graph)]


def _guards(graph: fx.Graph) -> list[str]:
    """The conditions on dynamic sizes under which the graph holds."""
    for node in graph.nodes:
        value = node.meta.get("val")
        if dynamic.is_dynamic(value):
            return [str(guard.expr) for guard in value.fake_mode.shape_env.guards]
    return []


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
