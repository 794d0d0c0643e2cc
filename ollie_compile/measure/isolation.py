"""Measuring while a compilation is under way: outside its fake tensors and modes."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch

from ollie_compile.compat import suspended_compilation


@contextlib.contextmanager
def outside_compilation(*, autocast: bool = False) -> Iterator[None]:
    """Compute real tensors, without gradients, whatever compilation is under way.

    Args:
        autocast: whether the caller's autocast stays on, which a graph of Dynamo relies on; operators of an
            aten graph have their casts beside them.
    """
    casts = contextlib.nullcontext() if autocast else without_autocast()
    with suspended_compilation(), torch.inference_mode(False), torch.no_grad(), casts:
        yield


@contextlib.contextmanager
def without_autocast() -> Iterator[None]:
    """Operators keep the dtypes they are given."""
    with contextlib.ExitStack() as stack:
        for device in ("cpu", "cuda"):
            if torch.is_autocast_enabled(device):
                stack.enter_context(torch.autocast(device, enabled=False))
        yield
