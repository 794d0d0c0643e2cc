"""Measuring while a compilation is under way: outside its fake tensors, modes and autocast."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch

from ollie_compile.compat import suspended_compilation


@contextlib.contextmanager
def outside_compilation() -> Iterator[None]:
    """Compute real tensors, without gradients and casts, whatever compilation is under way."""
    with suspended_compilation(), torch.inference_mode(False), torch.no_grad(), without_autocast():
        yield


@contextlib.contextmanager
def without_autocast() -> Iterator[None]:
    """Operators keep the dtypes they are given."""
    with contextlib.ExitStack() as stack:
        for device in ("cpu", "cuda"):
            if torch.is_autocast_enabled(device):
                stack.enter_context(torch.autocast(device, enabled=False))
        yield
