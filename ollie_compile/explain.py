"""Compile a model with the backend and say what was decided, operator by operator."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, fx

from ollie_compile.report import Report


def explain(model: torch.nn.Module, *inputs: Any, **options: Any) -> Report:
    """Compile `model` for `inputs` under no_grad and report every decision.

    Args:
        model: called as model(*inputs).
        options: fields of `OllieConfig`.

    Returns:
        a report; print it, or take `to_json()`.
    """
    from ollie_compile.backend import compile_with  # brings Inductor, which takes a second to import

    report = Report()

    def backend(gm: fx.GraphModule, example_inputs: Sequence[Tensor]) -> Any:
        return compile_with(gm, example_inputs, report, options=options)

    # AOTAutograd's cache would answer for a graph that was compiled before, without running the pass.
    with torch._functorch.config.patch(enable_autograd_cache=False), torch.no_grad():
        torch.compile(model, backend=backend)(*inputs)
    return report
