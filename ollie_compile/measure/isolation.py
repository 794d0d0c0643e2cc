"""Measuring while a compilation is under way: outside its fake tensors, modes and autocast."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch


@contextlib.contextmanager
def outside_compilation() -> Iterator[None]:
    """Leave the fake tensors, the tracing context and the modes of a compilation that is under way."""
    from torch._dispatch.python import no_python_dispatcher
    from torch._guards import tracing
    from torch._subclasses.fake_tensor import unset_fake_temporarily

    with (
        unset_fake_temporarily(),
        no_python_dispatcher(),
        tracing(None),
        torch.inference_mode(False),
        torch.no_grad(),
        without_autocast(),
    ):
        yield


@contextlib.contextmanager
def without_autocast() -> Iterator[None]:
    """Operators keep the dtypes they are given."""
    with contextlib.ExitStack() as stack:
        for device in ("cpu", "cuda"):
            if torch.is_autocast_enabled(device):
                stack.enter_context(torch.autocast(device, enabled=False))
        yield
