"""Ways to run a function that differ in what they save for the backward pass and what they recompute in it.

Between two matrix products a decoder layer is elementwise: norms, rotary embedding, activation function,
masks, copies of shared heads, scaling and sums of LoRA. Autograd saves most of these results. Recomputing
them in the backward pass costs little and halves the bytes that a layer keeps in a LoRA fine-tuning. Gradient
checkpointing saves a layer's input only. The attention's output beside it takes as many bytes again, and
saves the recomputation of the one part of a layer that grows with the square of the sample.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from lemo_trainer.compat import SDPA_KERNELS, uncached_parametrizations
from lemo_trainer.kernels import attention
from lemo_trainer.model.state import repeating

_LINEAR = {
    torch.ops.aten.mm.default: 0,
    torch.ops.aten.addmm.default: 1,
}  # operator: index of its left factor
_ATTENTION = SDPA_KERNELS | {attention.OPERATOR}
NARROW = 64  # inner width up to which recomputing a product (LoRA's second factor) beats saving it


def _saving_matmuls(context: Any, operator: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    if operator in _LINEAR:
        wide = args[_LINEAR[operator]].shape[1] > NARROW
        return CheckpointPolicy.MUST_SAVE if wide else CheckpointPolicy.PREFER_RECOMPUTE
    return CheckpointPolicy.MUST_SAVE if operator in _ATTENTION else CheckpointPolicy.PREFER_RECOMPUTE


def saving_matmuls(function: Callable[..., Tensor], *args: Tensor) -> Tensor:
    """`function(*args)`; saves only the arguments, linear projections and attention outputs."""
    return _checkpoint_selectively(_saving_matmuls, function, *args)


def saving_attention(function: Callable[..., Tensor], *args: Tensor) -> Tensor:
    """`function(*args)`; saves only the arguments and the outputs of SDPA's kernels."""
    return _checkpoint_selectively(list(_ATTENTION), function, *args)


def _checkpoint_selectively(saved: Any, function: Callable[..., Tensor], *args: Tensor) -> Tensor:
    contexts = functools.partial(create_selective_checkpoint_contexts, saved)
    once = functools.partial(_once_backward, function)
    output: Tensor = checkpoint(once, *args, use_reentrant=False, context_fn=contexts)
    return output


def _once_backward(function: Callable[..., Tensor], *args: Tensor) -> Tensor:
    try:
        return function(*args)
    except RuntimeError as error:
        if "backward an extra time" not in str(error):
            raise
        raise RuntimeError(
            "A second backward pass through the same graph (retain_graph=True) needs "
            'selective_checkpointing=False and save_attention=False, and mode="exact" in place of "auto", '
            "which chooses that itself: torch's selective checkpointing keeps results for one only."
        ) from error


def saving_inputs(function: Callable[..., Tensor], *args: Tensor) -> Tensor:
    """`function(*args)`; saves only the arguments.

    Unlike reentrant checkpointing it works under `torch.autograd.grad`.
    """
    output: Tensor = checkpoint(function, *args, use_reentrant=False)
    return output


def in_segments(
    function: Callable[[Tensor], Tensor], layer: nn.Module, x_BKD: Tensor, segment: int
) -> Tensor:
    """`function(x_BKD)`, with the intermediate results of one segment at a time, forward and backward.

    Args:
        function: acts on each row independently, through any modules of `layer`, plain or with adapters. The
            backward pass recomputes it, one segment after the other.
        layer: the decoder layer.
        segment: rows of a sample that are computed together.
    """
    run = repeating(saving_inputs, layer)
    parts = [run(function, part) for part in x_BKD.split(segment, 1)]
    return torch.cat(parts, 1) if len(parts) > 1 else parts[0]


@contextlib.contextmanager
def without_graph() -> Iterator[None]:
    """No gradient inside, and nothing that is cached for later; usable as a decorator.

    A cast of a trained weight that autocast cached here, or a parametrized weight, would have no graph, and
    the rows that carry gradient would then use it as a constant.
    """
    cached = torch.is_autocast_cache_enabled()
    torch.set_autocast_cache_enabled(False)
    try:
        with torch.no_grad(), uncached_parametrizations():
            yield
    finally:
        torch.set_autocast_cache_enabled(cached)
