"""The torch.compile backend "ollie": Inductor with derived operators spliced into its joint graph."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, fx

import ollie_compile.kernels  # noqa: F401  # graphs that Inductor has cached call its operators
from ollie_compile import plan as plans
from ollie_compile.config import OllieConfig
from ollie_compile.passes import DerivationPass
from ollie_compile.report import Report


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
