"""The whole graph, rewritten, as Inductor has it and eager, timed in turn: the fastest stays."""

from __future__ import annotations

import contextlib
import copy
import functools
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from typing import Any

import torch
from torch import Tensor, fx
from torch._subclasses.fake_tensor import FakeTensor

from ollie_compile import store, tune
from ollie_compile.config import OllieConfig
from ollie_compile.passes import UnchangedError, operator_count
from ollie_compile.report import Report
from ollie_compile.rules import of_users

MEASURE_S = 5.0  # after which no more than the fewest rounds are timed
REWRITTEN, INDUCTOR, EAGER = "rewritten", "Inductor", "eager"
CONTIGUOUS = ", contiguous convolutions"
LONG_S = 20.0  # a budget that pays for one compilation more
AGAIN = 0.25  # of Inductor's time, what it takes for a graph most of whose kernels it has built before
MARGIN = 0.03  # by which eager torch must be faster
PLAIN = {"layout_optimization": False}

Compiled = Callable[..., Any]
Compiler = Callable[..., Compiled]


def fastest(
    gm: fx.GraphModule,
    inputs: Sequence[Any],
    config: OllieConfig,
    inductor: dict[str, Any],
    report: Report,
    rewritten: Compiler,
    original: Compiler,
) -> Compiled:
    """What a graph is compiled to: with derived programs, by Inductor alone, or eager torch, whichever is
    fastest; with a long budget also with convolutions that Inductor does not make channels-last. The choice
    is kept on disk.

    Inductor's own comes first: the time it takes is the default budget, and a graph in which nothing is
    rewritten need not be compiled again. Graphs whose gradients are computed, and those of dynamic shapes,
    are rewritten without this comparison.

    Args:
        inductor: options of Inductor, part of what the choice depends on.
        rewritten: compiles a graph with further options, a config with a budget of planning, and whether to
            raise `UnchangedError` where nothing is rewritten.
        original: compiles a graph with further options and without derived programs.
    """

    def build(which: str, graph: fx.GraphModule, config: OllieConfig, *, changed: bool = False) -> Compiled:
        if which == EAGER:
            return graph
        more = PLAIN if which.endswith(CONTIGUOUS) else {}
        if which.startswith(REWRITTEN):
            return rewritten(graph, more, config, changed)
        return original(graph, more)

    tensors = all(isinstance(value, Tensor) for value in inputs)
    fixed = tensors and all(type(size) is int for value in inputs for size in value.shape)
    if config.tune != "measure" or config.budget_s == 0 or torch.is_grad_enabled() or not fixed:
        return build(REWRITTEN, gm, config.budgeted(operator_count(gm.graph)))
    name = _name(gm, inputs, config, inductor)
    known = store.read(name) if name is not None else None
    if known is not None and known.get("chosen") in known.get("seconds", ()):
        _say(report, known["chosen"], known["seconds"])
        return build(known["chosen"], gm, replace(config, budget_s=known.get("planning_s", config.budget_s)))
    spare = _copied(gm)
    start = time.perf_counter()
    first = build(INDUCTOR, _copied(spare), config)
    config, contiguous = _for_planning(config, spare.graph, time.perf_counter() - start)
    before = _counts(report)
    built: dict[str, Compiled] = {}
    with contextlib.suppress(UnchangedError):
        built[REWRITTEN] = build(REWRITTEN, gm, config, changed=True)
    seen, lifted, replaced = (now - then for now, then in zip(_counts(report), before, strict=True))
    if not lifted and (seen or REWRITTEN not in built):
        return built.get(REWRITTEN, first)
    last = next(iter(built.values()), first)
    try:
        built[EAGER] = _copied(spare)
        if replaced or REWRITTEN not in built or not seen:  # Inductor's cache may have answered
            built[INDUCTOR] = first
        seconds = _measured(built, inputs)
        if contiguous:
            best = min(seconds.keys() - {EAGER}, key=seconds.__getitem__)
            built[best + CONTIGUOUS] = build(best + CONTIGUOUS, spare, config)
            seconds = _measured(built, inputs)
    except Exception as error:  # such as too little memory for all of them
        report.note(f"the whole graph was not compared: {str(error).partition(chr(10))[0]}")
        return last
    chosen = min(seconds, key=lambda which: seconds[which] * (1 + MARGIN * (which == EAGER)))
    if name is not None:
        store.write(name, {"chosen": chosen, "seconds": seconds, "planning_s": config.budget_s})
    _say(report, chosen, seconds)
    if not chosen.startswith(REWRITTEN):
        report.kept += replaced
    return built[chosen]


def _for_planning(config: OllieConfig, graph: fx.Graph, inductor_s: float) -> tuple[OllieConfig, bool]:
    """A config with what the budget leaves for planning, and whether it pays for contiguous convolutions.

    Args:
        inductor_s: what Inductor took for the graph.
    """
    config = config.budgeted(operator_count(graph), inductor_s)
    assert config.budget_s is not None, "a budget that is not given is chosen by now"
    convolved = any("conv" in str(node.target) for node in graph.nodes)
    contiguous = convolved and config.budget_s >= LONG_S
    compiling_s = inductor_s * (AGAIN + contiguous)
    return replace(config, budget_s=max(0.0, config.budget_s - compiling_s)), contiguous


def _copied(gm: fx.GraphModule) -> fx.GraphModule:
    """A copy of a graph that shares its tensors, so that what it changes is changed for the user."""
    shared = {id(value): value for value in (*gm.parameters(), *gm.buffers())}
    return copy.deepcopy(gm, shared)


def _counts(report: Report) -> tuple[int, int, int]:
    """How many operators were seen, lifted and replaced until now."""
    lifted = sum(len(nodes) for nodes, _ in report.plans)
    return lifted + len(report.untouched) + report.others.total(), lifted, report.rewritten


def _say(report: Report, chosen: str, seconds: dict[str, float]) -> None:
    times = ", ".join(f"{which} {taken * 1e3:.3f} ms" for which, taken in seconds.items())
    report.note(f"the whole graph: {times}; chosen: {chosen}")


def _name(
    gm: fx.GraphModule, inputs: Sequence[Tensor], config: OllieConfig, inductor: dict[str, Any]
) -> str | None:
    """The name of the decision's entry; None where users' rules have no identity."""
    if of_users():
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


def _measured(built: dict[str, Compiled], inputs: Sequence[Tensor]) -> dict[str, float]:
    """Seconds of each call on copies of the inputs, which calls may change."""
    with tune.outside_compilation(), torch.random.fork_rng():
        calls = [functools.partial(call, *[_real(value) for value in inputs]) for call in built.values()]
        return dict(zip(built, tune.measure(calls, time.perf_counter() + MEASURE_S), strict=True))


def _real(value: Tensor) -> Tensor:
    if not isinstance(value, FakeTensor):
        return value.detach().clone()
    shape, stride = tuple(map(int, value.shape)), tuple(map(int, value.stride()))
    made = torch.empty_strided(shape, stride, dtype=value.dtype, device=value.device)
    return made.normal_() if value.is_floating_point() else made.zero_()
