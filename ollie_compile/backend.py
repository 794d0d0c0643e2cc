"""The torch.compile backend "ollie": Inductor with derived operators spliced into its joint graph."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, fx

import ollie_compile.kernels.library  # noqa: F401  # graphs that Inductor has cached call its operators
from ollie_compile import compat
from ollie_compile.config import OllieConfig, mode_options
from ollie_compile.graph import gate
from ollie_compile.graph.comparing import copied
from ollie_compile.graph.derivation_pass import DerivationPass
from ollie_compile.graph.effects import Effects, effects_of
from ollie_compile.graph.frozen import frozen, unfit_by_default, unfit_to_freeze
from ollie_compile.graph.library_pass import LibraryPass
from ollie_compile.plan.context import Context
from ollie_compile.report.report import Report

compat.require()

CONTEXT = Context()
"""The plans and the machine of this process, for all graphs that no other context is given for."""


def ollie(
    gm: fx.GraphModule,
    example_inputs: Sequence[Tensor],
    mode: str | None = None,
    options: Mapping[str, Any] | None = None,
) -> Any:
    """The backend that `torch.compile(model, backend="ollie")` finds through its entry point.

    Args:
        mode: a mode of Inductor, as in torch.compile.
        options: fields of `OllieConfig`, and Inductor's own options.

    Raises:
        ValueError: an unknown mode or option, or a value out of its range, in the first call of the compiled
            function: torch.compile hands options to a backend with the first graph.
    """
    return compile_with(gm, example_inputs, Report(), mode=mode, options=options)


def compile_with(
    gm: fx.GraphModule,
    example_inputs: Sequence[Tensor],
    report: Report,
    *,
    mode: str | None = None,
    options: Mapping[str, Any] | None = None,
    context: Context = CONTEXT,
) -> Any:
    """Compile a graph as `ollie` does, with the plans of `context`, and write the decisions into `report`."""
    try:
        config, inductor = OllieConfig.with_inductor(options)
        config, inductor = config.for_mode(mode), mode_options(mode) | inductor
    except ValueError as error:
        compat.refuse(error)
    effects = effects_of(gm, example_inputs)
    if effects.communicates:
        report.note(
            f"nothing is derived or measured, so that all processes decide alike: `{effects.communicates}` "
            "exchanges data between them"
        )
        config = replace(config, budget_s=0.0)
    if compat.inductor_config.freezing:
        config = replace(config, freeze=True)
    asked = bool(config.freeze)
    config = _freezing(config, example_inputs, effects, report)
    spare = copied(gm) if config.freeze else gm
    try:
        return _fastest(gm, example_inputs, config, inductor, report, context, effects)
    except Exception as error:  # in some versions Inductor cannot freeze convolutions in float64
        if not config.freeze:
            raise
        report.clear()
        why = f"Inductor failed: {str(error).partition(chr(10))[0]}"
        config = _unfrozen(config, report, why, aloud=asked)
        return _fastest(spare, example_inputs, config, inductor, report, context, effects)


def _fastest(
    gm: fx.GraphModule,
    example_inputs: Sequence[Tensor],
    config: OllieConfig,
    inductor: dict[str, Any],
    report: Report,
    context: Context,
    effects: Effects,
) -> Any:
    reports = iter([report])  # of the first of several compilations

    def rewritten(graph: fx.GraphModule, more: dict[str, Any], config: OllieConfig, changed: bool) -> Any:
        return build(
            graph,
            patches(
                config,
                inductor | more,
                next(reports, Report()),
                context,
                inputs=example_inputs,
                changed=changed,
            ),
        )

    def original(graph: fx.GraphModule, more: dict[str, Any]) -> Any:
        return build(
            graph, _libraries(config, inductor | more, report, context) | {"freezing": config.freeze}
        )

    def build(graph: fx.GraphModule, options: dict[str, Any]) -> Any:
        if config.freeze:
            return frozen(graph, example_inputs, options, config, report, effects)
        return compat.compile_fx(graph, list(example_inputs), config_patches=options)

    return gate.fastest(
        gm, example_inputs, config, inductor, report, context.machine, rewritten, original, effects
    )


def _freezing(config: OllieConfig, inputs: Sequence[Any], effects: Effects, report: Report) -> OllieConfig:
    """`config` with `freeze` decided: as asked for where that can be done, by itself where it is None."""
    if config.freeze is False:
        return config
    if config.freeze:
        why = unfit_to_freeze(inputs)
    elif config.portable or config.budget_s == 0 or torch.is_grad_enabled():
        return replace(config, freeze=False)
    else:
        why = unfit_to_freeze(inputs) or unfit_by_default(inputs, effects)
    if why is not None:
        return _unfrozen(config, report, why, aloud=bool(config.freeze))
    return replace(config, freeze=True)


def _unfrozen(config: OllieConfig, report: Report, why: str, *, aloud: bool) -> OllieConfig:
    if aloud:
        warnings.warn(f"ollie: `freeze`: {why}: compiled without freezing.", stacklevel=5)
    report.note(f"compiled without freezing: {why}")
    return replace(config, freeze=False)


def patches(
    config: OllieConfig,
    inductor: dict[str, Any],
    report: Report,
    context: Context = CONTEXT,
    *,
    inputs: Sequence[Any] = (),
    changed: bool = False,
) -> dict[str, Any]:
    """Inductor's options with the pass behind the user's own; `inputs`, `changed` as in `DerivationPass`."""
    before = _passes(inductor, "joint_custom_pre_pass")
    derivation = DerivationPass(config, report, context, before, inputs=inputs, changed=changed)
    own = {"joint_custom_pre_pass": derivation, "freezing": config.freeze}
    return _libraries(config, inductor, report, context) | own


def _libraries(
    config: OllieConfig, inductor: dict[str, Any], report: Report, context: Context
) -> dict[str, Any]:
    """Inductor's options with products by the fastest library, where that may be measured."""
    if config.tune != "measure" or config.budget_s == 0:
        return inductor
    before = _passes(inductor, "post_grad_custom_pre_pass")
    return inductor | {
        "post_grad_custom_pre_pass": LibraryPass(config.margin, report, context.machine, before)
    }


def _passes(inductor: dict[str, Any], name: str) -> Sequence[Any]:
    """The user's own passes of one of Inductor's options."""
    given = inductor.get(name, getattr(compat.inductor_config, name)) or ()
    return given if isinstance(given, (list, tuple)) else (given,)


ollie.reset = CONTEXT.reset  # type: ignore[attr-defined]
