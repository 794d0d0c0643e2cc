"""Graphs of Dynamo compiled with their weights as constants, right for whatever weights a call brings."""

from __future__ import annotations

import contextlib
import logging
import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import fx, nn

from ollie_compile.compat import freezing as inductor
from ollie_compile.config import OllieConfig
from ollie_compile.graph.comparing import check, copied, is_static
from ollie_compile.graph.effects import Effects
from ollie_compile.graph.freezing import Freezer
from ollie_compile.graph.held import OtherWeightsError
from ollie_compile.graph.library_pass import LibraryPass
from ollie_compile.measure.isolation import outside_compilation
from ollie_compile.report.report import Report

logger = logging.getLogger(__name__)

INSIST = "; `freeze=True` does it all the same"
MOST_OF_MEMORY = 0.5  # that weights may take, which freezing may hold twice


class Frozen:
    """A frozen graph; with weights that it cannot serve, the same graph without constants.

    Args:
        compiled: raises `OtherWeightsError` for such weights.
        graph: the graph of Dynamo.
        static: whether the graph is for the sizes of one call.
        held: the places of its inputs that are constants.
        options: Inductor's, without passes of this package.
    """

    def __init__(
        self,
        compiled: Callable[..., Any],
        graph: fx.GraphModule,
        held: frozenset[int],
        options: Mapping[str, Any],
        *,
        static: bool,
    ) -> None:
        self.held, self._static = held, static
        self._compiled, self._graph, self._options = compiled, graph, options
        self._unfrozen: Callable[..., Any] | None = None

    def __call__(self, *values: Any) -> Any:
        try:
            return self._compiled(*values)
        except OtherWeightsError:
            return self._without_constants(values)(*values)

    def _without_constants(self, values: Sequence[Any]) -> Callable[..., Any]:
        if self._unfrozen is None:
            logger.warning("ollie: a graph is compiled without freezing too, for weights that it cannot hold")
            with outside_compilation(autocast=True):
                self._unfrozen = (
                    inductor.compile_unfrozen(copied(self._graph), values, self._options)
                    if self._static
                    else self._graph
                )
        return self._unfrozen


def unfit_to_freeze(inputs: Sequence[Any]) -> str | None:
    """Why the weights among a graph's inputs cannot be held as constants now, or None if they can."""
    if torch.is_grad_enabled():
        return "it needs torch.no_grad(), and gradients are enabled"
    weights = sum(value.nbytes for value in inputs if isinstance(value, nn.Parameter))
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    if weights > MOST_OF_MEMORY * memory:
        sizes = f"{weights / 2**30:.1f} GiB of the memory's {memory / 2**30:.1f} GiB"
        return f"it may hold the weights twice, and they take {sizes}"
    return None


def unfit_by_default(inputs: Sequence[Any], effects: Effects) -> str | None:
    """Why a graph is not frozen unless that is asked for, or None if it is.

    Inductor's freezing has faults of its own, so it is the default only where `frozen` compares its results.
    """
    if not is_static(inputs):
        return f"results cannot be compared first (sizes are dynamic){INSIST}"
    if effects.unsafe is not None:
        return f"results cannot be compared first ({effects.unsafe}){INSIST}"
    if any(value.device.type != "cpu" for value in inputs):
        return f"it is tested on CPUs alone{INSIST}"
    return None


def frozen(
    graph: fx.GraphModule,
    inputs: Sequence[Any],
    options: Mapping[str, Any],
    config: OllieConfig,
    report: Report,
    effects: Effects,
) -> Frozen:
    """Compile a graph of Dynamo with its weights as constants.

    Args:
        options: Inductor's, with passes of this package.

    Raises:
        RuntimeError: its results are not eager's.
    """
    static = is_static(inputs)
    comparable = config.verify and effects.unsafe is None and static
    libraries = options.get("post_grad_custom_pre_pass")
    freezer = Freezer(
        inputs,
        libraries.choose_packed if isinstance(libraries, LibraryPass) else None,
        tuned=bool(options.get("max_autotune") or options.get("max_autotune_gemm")),
        verify=config.verify,
    )
    with contextlib.nullcontext() if comparable else inductor.sums_out_of_place():
        compiled = freezer.compile(copied(graph), options)
    plain = {name: value for name, value in options.items() if not name.endswith("custom_pre_pass")}
    result = Frozen(compiled, graph, freezer.held, plain, static=static)
    if freezer.not_held:
        left = ", ".join(f"{count} {why}" for why, count in freezer.not_held.items())
        report.note(f"parameters and buffers that are no constants: {left}")
    if comparable:
        check(graph, result, inputs, freezer.held)
    return result
