"""The whole graph, rewritten, as Inductor has it and eager, timed in turn: the fastest stays."""

from __future__ import annotations

import contextlib
import functools
import math
from collections.abc import Callable, Collection, Sequence
from dataclasses import asdict, replace
from typing import Any

import torch
from torch import Tensor, fx

from ollie_compile import store
from ollie_compile.config import OllieConfig
from ollie_compile.graph.comparing import copied, copies, is_static
from ollie_compile.graph.derivation_pass import UnchangedError, operator_count
from ollie_compile.graph.effects import Effects
from ollie_compile.measure.isolation import outside_compilation
from ollie_compile.measure.machine import Machine
from ollie_compile.measure.timing import fastest_first
from ollie_compile.plan.extensions import user_extensions
from ollie_compile.report.report import Report

MEASURE_S = 5.0  # after which no more than the fewest rounds are timed
REWRITTEN, INDUCTOR, EAGER = "rewritten", "Inductor", "eager"
CONTIGUOUS, TUNED = ", contiguous convolutions", ", tuned products"
FURTHER: dict[str, dict[str, Any]] = {
    CONTIGUOUS: {"layout_optimization": False},
    TUNED: {"max_autotune_gemm": True},
}
LONG_S = 20.0  # a budget that pays for one compilation more
TUNING_S = 5.0  # what Inductor takes to tune a product
FEW_ROWS = 4  # of a product, for which Inductor's own kernels may be faster than the libraries'
AGAIN = 0.25  # of Inductor's time, what it takes for a graph most of whose kernels it has built before
NOISE = 0.03  # share by which times of equally fast graphs may differ

Compiled = Callable[..., Any]
Compiler = Callable[..., Compiled]


def fastest(
    gm: fx.GraphModule,
    inputs: Sequence[Any],
    config: OllieConfig,
    inductor: dict[str, Any],
    report: Report,
    machine: Machine,
    rewritten: Compiler,
    original: Compiler,
    effects: Effects,
) -> Compiled:
    """What a graph is compiled to: with derived programs, by Inductor alone, or eager torch, whichever is
    fastest; with a long budget also with convolutions that Inductor does not make channels-last, and with
    frozen products of few rows by Inductor's own kernels. The choice is kept on disk.

    Inductor's own comes first: the time it takes is the default budget, and a graph in which nothing is
    rewritten need not be compiled again. Graphs whose gradients are computed, those of dynamic shapes and
    those that must not run to be timed are rewritten without this comparison, operator by operator.

    Args:
        inductor: options of Inductor, part of what the choice depends on.
        rewritten: compiles a graph with further options, a config with a budget of planning, and whether to
            raise `UnchangedError` where nothing is rewritten.
        original: compiles a graph with further options and without derived programs.
        effects: of the graph; they say whether it may run to be timed.
    """

    build = functools.partial(_build, rewritten, original)
    measured = config.tune == "measure" and config.budget_s != 0 and not torch.is_grad_enabled()
    if measured and effects.unsafe:
        report.note(f"the whole graph was not compared: {effects.unsafe}")
    if not measured or effects.unsafe or not is_static(inputs):
        return build(REWRITTEN, gm, config.budgeted(operator_count(gm.graph)))
    name = _name(gm, inputs, config, inductor)
    known = store.read(name) if name is not None else None
    if known is not None and _is_decision(known):
        _say(report, known["chosen"], known["seconds"])
        return build(known["chosen"], gm, replace(config, budget_s=known["planning_s"]))
    compiled, decision = _compared(gm, inputs, config, report, machine, build)
    if name is not None and decision is not None:
        store.write(name, decision)
    return compiled


def _build(
    rewritten: Compiler,
    original: Compiler,
    which: str,
    graph: fx.GraphModule,
    config: OllieConfig,
    *,
    changed: bool = False,
) -> Compiled:
    """A graph compiled in one of the ways that are compared."""
    if which == EAGER:
        return graph
    more = {name: value for end in FURTHER if end in which for name, value in FURTHER[end].items()}
    if which.startswith(REWRITTEN):
        return rewritten(graph, more, config, changed)
    return original(graph, more)


def _compared(
    gm: fx.GraphModule,
    inputs: Sequence[Any],
    config: OllieConfig,
    report: Report,
    machine: Machine,
    build: Compiler,
) -> tuple[Compiled, dict[str, Any] | None]:
    """The fastest way, and the entry to keep on disk; None where nothing was compared."""
    spare = copied(gm)
    start = machine.now()
    first = build(INDUCTOR, copied(spare), config)
    config, further = _for_planning(config, spare.graph, machine.now() - start)
    before = _counts(report)
    built: dict[str, Compiled] = {}
    with contextlib.suppress(UnchangedError):
        built[REWRITTEN] = build(REWRITTEN, gm, config, changed=True)
    seen, lifted, replaced = (now - then for now, then in zip(_counts(report), before, strict=True))
    if not lifted and TUNED not in further and (seen or REWRITTEN not in built):
        return built.get(REWRITTEN, first), None
    last = next(iter(built.values()), first)
    try:
        built[EAGER] = copied(spare)
        if replaced or REWRITTEN not in built or not seen:  # Inductor's cache may have answered
            built[INDUCTOR] = first
        seconds = _measured(built, inputs, machine)
        for end in further:
            best = _chosen(seconds.keys() - {EAGER}, seconds)
            # What is merged may be tuned less well than what it was merged from.
            for which in [it for it in built if it in (best, INDUCTOR)] if end == TUNED else [best]:
                built[which + end] = build(which + end, copied(spare), config)
            seconds = _measured(built, inputs, machine)
    except Exception as error:  # such as too little memory for all of them
        report.note(f"the whole graph was not compared: {str(error).partition(chr(10))[0]}")
        return last, None
    chosen = _chosen(seconds.keys(), seconds)
    _say(report, chosen, seconds)
    if not chosen.startswith(REWRITTEN):
        report.kept += replaced
    return built[chosen], {"chosen": chosen, "seconds": seconds, "planning_s": config.budget_s}


def _chosen(among: Collection[str], seconds: dict[str, float]) -> str:
    """The fastest way; of equally fast ones the rewritten graph, then Inductor's, then eager torch."""
    order = sorted(among, key=lambda which: (which == EAGER, not which.startswith(REWRITTEN), which))
    return fastest_first(order, seconds.__getitem__, NOISE)[0]


def _for_planning(config: OllieConfig, graph: fx.Graph, inductor_s: float) -> tuple[OllieConfig, list[str]]:
    """A config with what the budget leaves for planning, and which of `FURTHER` it pays for.

    Args:
        inductor_s: what Inductor took for the graph.
    """
    config = config.budgeted(operator_count(graph), inductor_s)
    assert config.budget_s is not None, "a budget that is not given is chosen by now"
    convolved = any("conv" in str(node.target) for node in graph.nodes)
    takes_s = {CONTIGUOUS: inductor_s} if convolved else {}
    if config.freeze and (products := _products_of_few_rows(graph)):
        takes_s[TUNED] = inductor_s + TUNING_S * products
    left_s = config.budget_s - inductor_s * AGAIN
    further = []
    for end, seconds in takes_s.items():
        if config.budget_s >= LONG_S and seconds < left_s:
            further.append(end)
            left_s -= seconds
    return replace(config, budget_s=max(0.0, left_s)), further


def _products_of_few_rows(graph: fx.Graph) -> int:
    """How many different products of few rows a graph of Dynamo has."""
    found = set()
    for node in graph.nodes:
        value = node.meta.get("example_value")
        if "linear" in str(node.target) and isinstance(value, Tensor):
            source = node.args[0] if node.args else node.kwargs.get("input")
            read = source.meta.get("example_value") if isinstance(source, fx.Node) else None
            if value.numel() <= FEW_ROWS * value.shape[-1] and isinstance(read, Tensor):
                found.add((value.numel(), value.shape[-1], read.shape[-1]))
    return len(found)


def _counts(report: Report) -> tuple[int, int, int]:
    """How many operators were seen, lifted and replaced until now."""
    lifted = sum(len(nodes) for nodes, _ in report.plans)
    return lifted + len(report.untouched) + report.others.total(), lifted, report.rewritten


def _say(report: Report, chosen: str, seconds: dict[str, float]) -> None:
    times = ", ".join(f"{which} {taken * 1e3:.3f} ms" for which, taken in seconds.items())
    report.note(f"the whole graph: {times}; chosen: {chosen}")


def _is_decision(entry: dict[str, Any]) -> bool:
    """Whether an entry on disk says what `_compared` writes; another is decided anew."""
    seconds, planning_s = entry.get("seconds"), entry.get("planning_s")
    return (
        isinstance(seconds, dict)
        and all(_is_time(value) for value in (*seconds.values(), planning_s))
        and isinstance(entry.get("chosen"), str)
        and entry["chosen"] in seconds
    )


def _is_time(value: Any) -> bool:
    return isinstance(value, (int, float)) and math.isfinite(value) and value >= 0


def _name(
    gm: fx.GraphModule, inputs: Sequence[Tensor], config: OllieConfig, inductor: dict[str, Any]
) -> str | None:
    """The name of the decision's entry; None where users' rules or kernels have no identity."""
    if user_extensions():
        return None
    held = [*gm.named_parameters(), *gm.named_buffers()]
    layouts = [
        (tuple(v.shape), v.stride(), str(v.dtype), str(v.device))
        for v in [*inputs, *(value for _, value in held)]
    ]
    devices = {value.device for value in inputs} or {torch.device("cpu")}
    where = sorted(store.conditions(device) for device in devices)
    options = asdict(replace(config, workers=1))
    return store.key("graph", gm.code, layouts, options, repr(sorted(inductor.items(), key=str)), where)


def _measured(built: dict[str, Compiled], inputs: Sequence[Tensor], machine: Machine) -> dict[str, float]:
    """Seconds of each call on copies of the inputs, which calls may change."""
    held = frozenset().union(*(getattr(call, "held", ()) for call in built.values()))
    with outside_compilation(autocast=True):
        values = copies(inputs, held)
        calls = [functools.partial(call, *values) for call in built.values()]
        return dict(zip(built, machine.measure(calls, machine.now() + MEASURE_S), strict=True))
