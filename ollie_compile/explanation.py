"""`explain`: compile a model with the backend and report the decision for each operator."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, fx

from ollie_compile.config import OllieConfig, mode_options
from ollie_compile.report.report import Report

_SETTINGS = threading.Lock()
"""Held while those of the whole process are changed: threads would restore each other's."""


def explain(
    model: Callable[..., Any],
    *inputs: Any,
    mode: str | None = None,
    dynamic: bool = False,
    training: bool = False,
    **options: Any,
) -> Report:
    """Compile `model` for `inputs` and report every decision.

    Args:
        model: a module or a function, called as model(*inputs).
        mode: a mode of torch.compile.
        dynamic: whether one graph is to serve all sizes; the report then lists the sizes it holds for.
        training: compile for gradients, backward included; otherwise under `torch.no_grad()`.
        options: fields of `OllieConfig`, and Inductor's own options.

    Raises:
        ValueError: an unknown mode or option, or a value out of its range.

    Returns:
        a report; print it, or take `to_json()` or `to_html()`.
    """
    # These bring Dynamo and Inductor, which take a second to import.
    from ollie_compile.backend import compile_with
    from ollie_compile.compat import dynamo_config, functorch_config

    mode_options(mode)
    OllieConfig.with_inductor(options)
    report = Report()

    def backend(gm: fx.GraphModule, example_inputs: Sequence[Tensor]) -> Any:
        return compile_with(gm, example_inputs, report, mode=mode, options=options)

    # AOTAutograd's cache would answer for a graph that was compiled before, without running the pass, and
    # Dynamo would give up after some compilations of the same code.
    with (
        _SETTINGS,
        functorch_config.patch(enable_autograd_cache=False),
        dynamo_config.patch(recompile_limit=2**20, accumulated_recompile_limit=2**20),
        torch.set_grad_enabled(training),
    ):
        torch.compile(model, backend=backend, dynamic=dynamic)(*inputs)
    return report
