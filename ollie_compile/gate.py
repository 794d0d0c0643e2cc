"""The whole graph, rewritten and as Inductor has it, timed in turn: the faster one stays."""

from __future__ import annotations

import copy
import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from typing import Any

import torch
from torch import Tensor, fx
from torch._subclasses.fake_tensor import FakeTensor

from ollie_compile import store, tune
from ollie_compile.config import OllieConfig
from ollie_compile.report import Report
from ollie_compile.rules import of_users

logger = logging.getLogger(__name__)

MEASURE_S = 5.0  # after which no more than the fewest rounds are timed
Compiled = Callable[..., Any]


def faster(
    gm: fx.GraphModule,
    inputs: Sequence[Any],
    config: OllieConfig,
    inductor: dict[str, Any],
    report: Report,
    rewritten: Callable[[fx.GraphModule], Compiled],
    original: Callable[[fx.GraphModule], Compiled],
) -> Compiled:
    """What compiles a graph to the faster function; the choice is kept on disk.

    Graphs whose gradients are computed, and those of dynamic shapes, are rewritten without this comparison.

    Args:
        rewritten, original: compile a graph with and without derived programs.
    """
    tensors = all(isinstance(value, Tensor) for value in inputs)
    fixed = tensors and all(type(size) is int for value in inputs for size in value.shape)
    if config.tune != "measure" or config.budget_s == 0 or torch.is_grad_enabled() or not fixed:
        return rewritten(gm)
    name = _name(gm, inputs, config, inductor)
    known = store.read(name) if name is not None else None
    if known is not None and known.get("rewritten") is False:
        _kept(report, known)
        return original(gm)
    plain = copy.deepcopy(gm) if known is None else gm
    made = rewritten(gm)
    passed = report.plans or report.untouched or report.others  # otherwise Inductor's cache has answered
    if known is not None or (passed and not report.rewritten):
        return made
    try:
        other = original(plain)
        ours, theirs = _measured([made, other], inputs)
    except Exception as error:  # such as too little memory for both
        report.note(f"the whole graph was not compared with Inductor's: {str(error).partition(chr(10))[0]}")
        return made
    decision = {"rewritten": ours <= theirs, "rewritten_s": ours, "original_s": theirs}
    if name is not None:
        store.write(name, decision)
    report.note(f"the whole graph: {theirs * 1e3:.3f} ms by Inductor, {ours * 1e3:.3f} ms rewritten")
    if ours <= theirs:
        return made
    _kept(report, decision)
    return other


def _kept(report: Report, decision: dict[str, Any]) -> None:
    report.original_kept = True
    report.note(
        f"the whole graph is kept as it was: {decision['original_s'] * 1e3:.3f} ms by Inductor, "
        f"{decision['rewritten_s'] * 1e3:.3f} ms rewritten"
    )


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


def _measured(calls: Sequence[Compiled], inputs: Sequence[Tensor]) -> list[float]:
    """Seconds of each call on copies of the inputs, which calls may change."""
    with tune.outside_compilation(), torch.random.fork_rng():
        values = [[_real(value) for value in inputs] for _ in calls]
        bound = [
            (lambda call=call, given=given: call(*given)) for call, given in zip(calls, values, strict=True)
        ]
        return tune.measure(bound, time.perf_counter() + MEASURE_S)


def _real(value: Tensor) -> Tensor:
    if not isinstance(value, FakeTensor):
        return value.detach().clone()
    shape, stride = tuple(map(int, value.shape)), tuple(map(int, value.stride()))
    made = torch.empty_strided(shape, stride, dtype=value.dtype, device=value.device)
    return made.normal_() if value.is_floating_point() else made.zero_()
