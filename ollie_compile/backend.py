"""The torch.compile backend "ollie": Inductor with derived operators spliced into its joint graph."""

from __future__ import annotations

import logging
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx
from torch._inductor.custom_graph_pass import CustomGraphPass, get_hash_for_files
from torch._subclasses.fake_tensor import FakeTensorMode, unset_fake_temporarily

from ollie_compile import plan as plans
from ollie_compile.config import OllieConfig
from ollie_compile.lower import Program
from ollie_compile.operators import Convolution, recognize
from ollie_compile.report import Report

logger = logging.getLogger(__name__)

_OWN_META = ("val", "tensor_meta", "original_aten", "from_node")

_SOURCES = tuple(sorted(str(path) for path in Path(__file__).parent.rglob("*.py")))


class DerivationPass(CustomGraphPass):
    """Replaces the convolutions of an aten graph by their best derived programs.

    As Inductor's `joint_custom_pre_pass` it runs before the partitioner in training, whose backward it
    leaves untouched, and before constant folding in inference. `before` are the user's own passes.
    """

    def __init__(
        self, config: OllieConfig, report: Report, before: Sequence[Callable[[fx.Graph], None]]
    ) -> None:
        self.config, self.report, self.before = config, report, before

    def uuid(self) -> Any:
        theirs = [custom.uuid() if isinstance(custom, CustomGraphPass) else None for custom in self.before]
        decisive = (asdict(self.config), torch.get_num_threads(), theirs)
        return None if None in theirs else get_hash_for_files(_SOURCES, repr(decisive))

    def __call__(self, graph: fx.Graph) -> None:
        for custom in self.before:
            custom(graph)
        found = [
            (node, recognize(node))
            for node in graph.find_nodes(op="call_function", target=torch.ops.aten.convolution.default)
        ]
        distinct = dict.fromkeys(lifted for _, lifted in found if isinstance(lifted, Convolution))
        stop = time.perf_counter() + self.config.budget_s
        made: dict[Convolution, plans.Plan] = {}
        failed: dict[Convolution, str] = {}
        for done, operator in enumerate(distinct):
            # What an operator leaves of its share goes to those after it.
            share = (stop - time.perf_counter()) / (len(distinct) - done)
            try:
                made[operator] = plans.plan(operator, self.config, share)
            except Exception as error:  # a fault in planning must not take the user's model with it
                logger.warning("ollie: %s: left as it is, planning failed", operator, exc_info=True)
                failed[operator] = f"planning failed: {error}"
        for node, lifted in found:
            if isinstance(lifted, str) or lifted in failed:
                self.report.left(node.name, lifted if isinstance(lifted, str) else failed[lifted])
                continue
            self.report.planned(node.name, made[lifted])
            winner = made[lifted].winner
            if winner is not None:
                _splice(graph, node, lifted, winner.program)
        logger.info("ollie: %s", self.report.summary)


def _splice(graph: fx.Graph, node: fx.Node, operator: Convolution, program: Program) -> None:
    """Put the aten calls of `program` in the place of a convolution."""
    from torch._inductor.decomposition import select_decomp_table
    from torch.fx.experimental.proxy_tensor import make_fx

    finished = operator.finished(program)

    def with_bias(x: Tensor, weight: Tensor, bias: Tensor | None, *constants: Tensor) -> Tensor:
        result = finished(x, weight, *constants)
        return result if bias is None else result + bias.view(-1, *[1] * len(operator.stride))

    with graph.inserting_before(node):
        before = node.prev
        constants = _constants(graph, operator, program, node.meta["val"].fake_mode)
        operands = [*node.args[:3], *constants]
        values = [None if operand is None else operand.meta["val"] for operand in operands]
        with node.meta["val"].fake_mode:
            traced = make_fx(with_bias, decomposition_table=select_decomp_table())(*values)
        places = dict(zip(traced.graph.find_nodes(op="placeholder"), operands, strict=True))
        result = graph.graph_copy(traced.graph, places)
    # Recomputation tags, source lines and module names hold for all that stands in the node's place.
    inherited = {key: value for key, value in node.meta.items() if key not in _OWN_META}
    new = before.next
    while new is not node:
        new.meta = {**new.meta, **inherited}
        new = new.next
    node.replace_all_uses_with(result, propagate_meta=False)
    graph.erase_node(node)


def _constants(
    graph: fx.Graph, operator: Convolution, program: Program, fake_mode: FakeTensorMode
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
