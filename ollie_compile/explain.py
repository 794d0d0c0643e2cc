"""Compile a model with the backend and say what was decided, operator by operator."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, fx

from ollie_compile.config import OllieConfig
from ollie_compile.report import Report


def explain(model: torch.nn.Module, *inputs: Any, **options: Any) -> Report:
    """Compile `model` for `inputs` under no_grad and report every decision.

    Args:
        model: called as model(*inputs).
        options: fields of `OllieConfig`.

    Raises:
        ValueError: an unknown option, or a value out of its range.

    Returns:
        a report; print it, or take `to_json()`.
    """
    # These bring Dynamo and Inductor, which take a second to import.
    from torch._dynamo import config as dynamo_config
    from torch._functorch import config as functorch_config

    from ollie_compile.backend import compile_with

    OllieConfig.with_inductor(options)
    report = Report()

    def backend(gm: fx.GraphModule, example_inputs: Sequence[Tensor]) -> Any:
        return compile_with(gm, example_inputs, report, options=options)

    # AOTAutograd's cache would answer for a graph that was compiled before, without running the pass, and
    # Dynamo would give up after some compilations of the same code.
    with (
        functorch_config.patch(enable_autograd_cache=False),
        dynamo_config.patch(recompile_limit=2**20, accumulated_recompile_limit=2**20),
        torch.no_grad(),
    ):
        torch.compile(model, backend=backend, dynamic=False)(*inputs)
    return report
