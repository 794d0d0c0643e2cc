"""The pass over Inductor's joint graph: finds operators, has them planned, and splices the winners in."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Sequence, Set
from dataclasses import asdict
from typing import Any

import torch
from torch import fx, nn

from ollie_compile import compat, store
from ollie_compile.compat import CustomGraphPass, get_hash_for_files
from ollie_compile.compat import freezing as inductor
from ollie_compile.config import OllieConfig
from ollie_compile.graph import precision, weights
from ollie_compile.graph.splicing import NOT_SPLICED, splice
from ollie_compile.lift.aten import unsupported
from ollie_compile.lift.declared import declarations
from ollie_compile.plan.candidates import Plan, compiling_s
from ollie_compile.plan.context import Context
from ollie_compile.plan.extensions import user_extensions
from ollie_compile.plan.planner import plan_all
from ollie_compile.problems import dynamic, gradients, subprograms
from ollie_compile.problems.operators import Operator
from ollie_compile.problems.subprograms import Site
from ollie_compile.report.report import Report

logger = logging.getLogger(__name__)

_SOURCES = tuple(map(str, store.sources()))

Plans = dict[Operator, Plan | Exception]


class UnchangedError(Exception):
    """Raised to stop a compilation in which nothing was rewritten."""


class DerivationPass(CustomGraphPass):
    """Replaces convolutions, subprograms of several products, and users' operators by their best programs.

    As Inductor's `joint_custom_pre_pass` it runs before constant folding in inference. In training it runs
    before the partitioner, and rewrites convolutions and their gradients only.

    Args:
        context: the plans and the machine of the process.
        before: the user's own passes.
        inputs: of the graph of Dynamo; operators that read weights which are not finite are left.
        changed: whether to stop the compilation with `UnchangedError` when nothing is rewritten.
    """

    def __init__(
        self,
        config: OllieConfig,
        report: Report,
        context: Context,
        before: Sequence[Callable[[fx.Graph], None]],
        *,
        inputs: Sequence[Any] = (),
        changed: bool = False,
    ) -> None:
        self.config, self.report, self.context = config, report, context
        self.not_finite = weights.not_finite(inputs)
        self.parameters = [place for place, one in enumerate(inputs) if isinstance(one, nn.Parameter)]
        self.before, self.changed = before, changed

    def __deepcopy__(self, memo: dict[int, Any]) -> DerivationPass:
        """Itself: AOTInductor copies its options, but decisions belong into the caller's report."""
        return self

    def uuid(self) -> Any:
        """None, so that Inductor caches nothing, if passes, rules or kernels of users have no identity."""
        theirs = [custom.uuid() if isinstance(custom, CustomGraphPass) else None for custom in self.before]
        decisive = (asdict(self.config), torch.get_num_threads(), declarations(), theirs, self.not_finite)
        return None if None in theirs or user_extensions() else get_hash_for_files(_SOURCES, repr(decisive))

    def __call__(self, graph: fx.Graph) -> None:
        self.config = self.config.budgeted(operator_count(graph))
        assert self.config.budget_s is not None, "a budget that is not given is chosen by now"
        for custom in self.before:
            custom(graph)
        rounded = self._widen(graph)
        targets = Counter(str(node.target) for node in graph.nodes if node.op == "call_function")
        spoilt = self._spoilt(graph)
        joint = [] if compat.is_joint_graph(graph) else self._subprograms(graph)
        joint = [found for found in joint if spoilt.isdisjoint(found[1].inputs)]
        targets.subtract(self._report_declared(graph, joint))
        deadline = self.context.machine.now() + self.config.budget_s
        wanted = Counter(operator for operator, _ in joint)
        wanted.update(operator for operator, _ in _single(graph, spoilt) if not isinstance(operator, str))
        plans = plan_all(wanted, self.config, self.config.budget_s, self.context)
        replaced: dict[fx.Node, fx.Node] = {}
        for operator, site in joint:
            if self._replace(graph, site, plans[operator], replaced):
                targets.subtract(str(node.target) for node in site.nodes)
        # Winners may hold convolutions that are new, and have replaced some of those above.
        single = _single(graph, spoilt)
        new = Counter(operator for operator, _ in single if not isinstance(operator, str))
        left_s = deadline - self.context.machine.now()
        left_s -= sum(compiling_s(plan, wanted[operator]) for operator, plan in plans.items())
        unplanned = {operator: count for operator, count in new.items() if operator not in plans}
        plans |= plan_all(unplanned, self.config, left_s, self.context)
        for found, site in single:
            targets[str(site.roots[0].target)] -= 1
            if isinstance(found, str):
                self.report.left(site.roots[0].name, found)
            else:
                self._replace(graph, site, plans[found], replaced)
        gradients.release(graph)
        self.report.others.update(+targets)
        self.report.guards += _guards(graph)
        logger.info("ollie: %s", self.report.summary)
        if self.changed and not rounded and not self.report.rewritten:
            raise UnchangedError

    def _spoilt(self, graph: fx.Graph) -> frozenset[fx.Node]:
        """The weights that are not finite, and what is computed from weights with one of them."""
        traced = inductor.traced_parameters()
        places = [*weights.not_finite(traced), *(len(traced) + place for place in self.not_finite)]
        # For gradients AOTAutograd does not say which inputs are weights.
        known = {*compat.static_inputs(), *range(len(traced)), *(len(traced) + n for n in self.parameters)}
        places = sorted(known.intersection(places))
        if not places:
            return frozenset()
        self.report.note(f"weights that hold values which are not finite: {len(places)}")
        placeholders = graph.find_nodes(op="placeholder")
        return weights.readers(graph, [placeholders[place] for place in places], _fixed(graph))

    def _widen(self, graph: fx.Graph) -> int:
        """Compute products of half precision in float32 if that is asked for; returns their number."""
        rounded = precision.in_float32(graph) if self.config.half_in_float32 else 0
        if rounded:
            self.report.note(
                f"{rounded} products of half precision are computed in float32: "
                "results round less than eager's"
            )
        return rounded

    def _subprograms(self, graph: fx.Graph) -> list[tuple[Operator, Site]]:
        try:
            return dynamic.find(graph, _fixed(graph))
        except Exception as error:  # as in planning: the convolutions may still be derived
            logger.warning("ollie: no subprograms are derived: finding them failed", exc_info=True)
            self.report.left("subprograms", f"finding them failed: {error}")
            return []

    def _report_declared(self, graph: fx.Graph, joint: Sequence[tuple[Operator, Site]]) -> list[str]:
        """Report the users' operators that no subprogram holds; returns their targets."""
        lifted = {node for _, site in joint for node in site.nodes}
        missed = [node for node in subprograms.declared(graph) if node not in lifted]
        why = "gradients are computed" if compat.is_joint_graph(graph) else "finding subprograms failed"
        for node in missed:
            self.report.left(node.name, unsupported(node) or why)
        return [str(node.target) for node in missed]

    def _replace(
        self, graph: fx.Graph, site: Site, plan: Plan | Exception, replaced: dict[fx.Node, fx.Node]
    ) -> bool:
        """Report a plan, and put its winner into the graph.

        Args:
            replaced: nodes that are gone, with the nodes that give their values now; extended.

        Returns:
            whether the plan holds: False if planning failed, or the winner does not fit into the graph.
        """
        name = site.roots[0].name
        if isinstance(plan, Exception):
            self.report.left(name, f"planning failed: {plan}")
            return False
        if plan.winner is not None:
            site = site.reading(replaced)
            if not subprograms.gather(graph, site):
                self.report.left(name, "another subprogram, already replaced, needs it")
                return False
            results = splice(graph, plan.operator, site.roots, site.inputs, plan.winner.program)
            if results is None:
                self.report.left(name, NOT_SPLICED)
                return False
            replaced.update(zip(site.roots, results, strict=True))
        self.report.planned(", ".join(root.name for root in site.roots), plan)
        return True


def operator_count(graph: fx.Graph) -> int:
    return sum(node.op.startswith("call_") for node in graph.nodes)


def _single(graph: fx.Graph, spoilt: Set[fx.Node]) -> list[tuple[Operator | str, Site]]:
    """Convolutions and their gradients, or why one cannot be derived, with where they stand.

    Args:
        spoilt: nodes that no derived operator may read.
    """
    found: list[tuple[Operator | str, Site]] = []
    for node in graph.find_nodes(op="call_function", target=torch.ops.aten.convolution.default):
        found.append((dynamic.recognize(node), Site((node,), (node,), tuple(node.args[:2]))))
    for node, inputs, operator in gradients.find(graph):
        found.append((operator, Site((node,), (node,), inputs)))
    return [
        (operator if spoilt.isdisjoint(site.inputs) else weights.REASON, site) for operator, site in found
    ]


def _guards(graph: fx.Graph) -> list[str]:
    """The conditions on dynamic sizes under which the graph holds."""
    for node in graph.nodes:
        value = node.meta.get("val")
        if dynamic.is_dynamic(value):
            return compat.guards_of(value)
    return []


def _fixed(graph: fx.Graph) -> frozenset[fx.Node]:
    """Parameters, buffers, and the nodes that are computed from these alone."""
    placeholders = graph.find_nodes(op="placeholder")
    fixed = {placeholders[place] for place in compat.static_inputs() if place < len(placeholders)}
    fixed.update(graph.find_nodes(op="get_attr"))
    for node in graph.nodes:
        if node.op == "call_function" and node.all_input_nodes and set(node.all_input_nodes) <= fixed:
            fixed.add(node)
    return frozenset(fixed)
