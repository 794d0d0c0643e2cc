"""The torch.compile backend "ollie": Inductor with derived operators spliced into its joint graph."""

from __future__ import annotations

import logging
import time
import warnings
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx
from torch._inductor.custom_graph_pass import CustomGraphPass, get_hash_for_files
from torch._subclasses.fake_tensor import FakeTensorMode, unset_fake_temporarily

import ollie_compile.kernels  # noqa: F401  # graphs that Inductor has cached call its operators
from ollie_compile import plan as plans
from ollie_compile import rules, subprograms
from ollie_compile.config import OllieConfig
from ollie_compile.custom import declarations
from ollie_compile.lift.aten import unsupported
from ollie_compile.lower import Program
from ollie_compile.operators import Convolution, Operator, Subprogram, recognize
from ollie_compile.report import Report

logger = logging.getLogger(__name__)

NOT_SPLICED = "its program does not fit into the graph"
_OWN_META = ("val", "tensor_meta", "original_aten", "from_node")

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
                results = _splice(graph, operator, place.roots, place.inputs, made.winner.program)
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
                if _splice(graph, made.operator, [node], inputs, made.winner.program) is None:
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


def _splice(
    graph: fx.Graph,
    operator: Operator,
    nodes: Sequence[fx.Node],
    inputs: Sequence[fx.Node],
    program: Program,
) -> Sequence[fx.Node] | None:
    """Put the aten calls of `program` in the place of the nodes that give an operator's results.

    Returns:
        what now gives them; None, with the graph as it was, where the program does not give the same tensors.
    """
    from torch._inductor.decomposition import select_decomp_table
    from torch.fx.experimental.proxy_tensor import make_fx

    finished = operator.finished(program)
    bias = nodes[0].args[2] if isinstance(operator, Convolution) else None

    def results(*values: Tensor) -> tuple[Tensor, ...]:
        if bias is None:
            made = finished(*values)
            return made if isinstance(made, tuple) else (made,)
        result = finished(*values[1:])
        assert isinstance(result, Tensor), "a convolution has one result"
        return (result + values[0].view(-1, *[1] * (result.dim() - 2)),)

    order = {node: place for place, node in enumerate(graph.nodes)}
    first = min(nodes, key=order.__getitem__)
    with graph.inserting_before(first):
        before = first.prev
        fake_mode = first.meta["val"].fake_mode
        constants = _constants(graph, operator, program, fake_mode)
        operands = [*([] if bias is None else [bias]), *inputs, *constants]
        try:
            with fake_mode:
                traced = make_fx(results, decomposition_table=select_decomp_table())(
                    *(operand.meta["val"] for operand in operands)
                )
            for node, result in zip(nodes, traced.graph.output_node().args[0], strict=True):
                _check_same(node.meta["val"], result.meta["val"])
        except Exception:  # a fault here must not take the user's model with it
            logger.warning("ollie: %s: left as it is, its program is none", operator, exc_info=True)
            while first.prev is not before:
                graph.erase_node(first.prev)
            return None
        places = dict(zip(traced.graph.find_nodes(op="placeholder"), operands, strict=True))
        made = graph.graph_copy(traced.graph, places)
    # Recomputation tags, source lines and module names hold for all that stands in the node's place.
    inherited = {key: value for key, value in first.meta.items() if key not in _OWN_META}
    new = before.next
    while new is not first:
        new.meta = {**new.meta, **inherited}
        new = new.next
    for node, result in zip(nodes, made, strict=True):
        node.replace_all_uses_with(result, propagate_meta=False)
        _erase(node)
    return made


def _check_same(wanted: Tensor, got: Tensor) -> None:
    layouts = [
        (t.shape, t.dtype, t.device, [s for s, n in zip(t.stride(), t.shape, strict=True) if n != 1])
        for t in (wanted, got)
    ]
    if layouts[0] != layouts[1]:
        raise ValueError(f"The program must give {layouts[0]}, got {layouts[1]}.")


def _erase(node: fx.Node) -> None:
    """Erase a node and what only it used."""
    sources = node.all_input_nodes
    node.graph.erase_node(node)
    for source in sources:
        if not source.users and source.op == "call_function":
            _erase(source)


def _constants(
    graph: fx.Graph, operator: Operator, program: Program, fake_mode: FakeTensorMode
) -> list[fx.Node]:
    """Nodes for the constants of `program`, held by the graph's module as torch.tensor literals are."""
    module = graph.owning_module
    assert module is not None, "Inductor's graphs belong to a module"
    nodes = []
    with unset_fake_temporarily():
        constants = program.constants(operator.dtype, operator.device)
    for name, value in constants.items():
        attribute = f"_ollie_{name}_{value.dtype}_{value.device}".replace(".", "_").replace(":", "_")
        module.register_buffer(attribute, value, persistent=False)
        held = graph.get_attr(attribute)
        lifted = graph.call_function(torch.ops.aten.lift_fresh_copy.default, (held,))
        lifted.meta["val"] = held.meta["val"] = fake_mode.from_tensor(value)
        nodes.append(lifted)
    return nodes


def ollie(
    gm: fx.GraphModule,
    example_inputs: Sequence[Tensor],
    mode: str | None = None,
    options: Mapping[str, Any] | None = None,
) -> Any:
    """The backend that `torch.compile(model, backend="ollie")` finds through its entry point.

    Args:
        mode: a mode of Inductor, as in torch.compile.
        options: fields of `OllieConfig`; "inductor" may hold a mapping of Inductor's own options.

    Raises:
        ValueError: an unknown option, or a value out of its range; Dynamo wraps it in its
            BackendCompilerFailed.
    """
    return compile_with(gm, example_inputs, Report(), mode=mode, options=options)


def compile_with(
    gm: fx.GraphModule,
    example_inputs: Sequence[Tensor],
    report: Report,
    *,
    mode: str | None = None,
    options: Mapping[str, Any] | None = None,
) -> Any:
    """Compile a graph as `ollie` does and write what was decided into `report`."""
    from torch._inductor import config as inductor_config
    from torch._inductor import list_mode_options
    from torch._inductor.compile_fx import compile_fx

    config, inductor = OllieConfig.with_inductor(options)
    patches = (list_mode_options(mode) if mode else {}) | inductor
    if config.freeze and torch.is_grad_enabled():
        warnings.warn(
            "ollie: `freeze` needs torch.no_grad(), and gradients are enabled: compiled without freezing.",
            stacklevel=2,
        )
        config = replace(config, freeze=False)
    before = patches.get("joint_custom_pre_pass", inductor_config.joint_custom_pre_pass) or ()
    before = before if isinstance(before, (list, tuple)) else (before,)
    patches["joint_custom_pre_pass"] = DerivationPass(config, report, before)
    if config.freeze:
        patches["freezing"] = True
    return compile_fx(gm, list(example_inputs), config_patches=patches)


ollie.reset = plans.reset  # type: ignore[attr-defined]
