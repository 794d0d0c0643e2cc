"""Attention of chosen queries over all keys, causal by position.

A query at position p attends to the keys at positions up to p. torch's fused attention takes such a mask only
as a tensor of every pair; the Triton kernel needs the positions alone, and skips the tiles of keys after a
tile of queries. On other devices the model's own attention runs with the mask of a few queries at a time
(`lemo_trainer.layers.attention_of_rows`); the reference here computes the same in one piece.

Shapes: B batch, K queries, T keys, H query heads, G key heads, d head width.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from lemo_trainer.compat import NOT_IN_SDPA
from lemo_trainer.kernels.dispatch import runs_triton

WIDEST_HEAD = 128  # wider tiles do not fit a GPU's shared memory


def fits(query_BHKd: Tensor, value_BGTd: Tensor, options: dict[str, Any]) -> bool:
    """Whether the Triton kernel equals SDPA under the options that a model passes to its attention."""
    plain = not options.get("dropout") and all(options.get(name) is None for name in NOT_IN_SDPA)
    same = (
        query_BHKd.shape[-1] == value_BGTd.shape[-1] <= WIDEST_HEAD and query_BHKd.dtype == value_BGTd.dtype
    )
    return plain and same and options.get("scaling") is not None and runs_triton(query_BHKd)


def attend(
    query_BHKd: Tensor, key_BGTd: Tensor, value_BGTd: Tensor, positions_BK: Tensor, *, scaling: float
) -> Tensor:
    """Attention outputs [B, K, H, d].

    Args:
        query_BHKd, key_BGTd, value_BGTd: G divides H; one floating dtype and one head width.
        positions_BK: of the queries, ascending; the keys are those at positions 0 to T - 1.
    """
    arguments = (query_BHKd, key_BGTd, value_BGTd, positions_BK, scaling)
    return _triton(*arguments)[0] if runs_triton(query_BHKd) else reference(*arguments)


def reference(
    query_BHKd: Tensor, key_BGTd: Tensor, value_BGTd: Tensor, positions_BK: Tensor, scaling: float
) -> Tensor:
    """`attend` by torch's fused attention and a mask of every pair."""
    mask = torch.arange(key_BGTd.shape[2], device=key_BGTd.device) <= positions_BK[:, None, :, None]
    shared = query_BHKd.shape[1] // key_BGTd.shape[1]
    key, value = (x.repeat_interleave(shared, 1) for x in (key_BGTd, value_BGTd))
    heads = nn.functional.scaled_dot_product_attention(query_BHKd, key, value, mask, scale=scaling)
    return heads.transpose(1, 2)


@torch.library.custom_op("lemo::attend", mutates_args=())
def _triton(
    query: Tensor, key: Tensor, value: Tensor, positions: Tensor, scaling: float
) -> tuple[Tensor, Tensor]:
    """Outputs and log-sum-exps; an operator, so that selective checkpointing can save its output."""
    from lemo_trainer.kernels import triton_attention

    return triton_attention.forward(query, key, value, positions, scaling)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    *tensors, ctx.scaling = inputs
    ctx.save_for_backward(*tensors, *output)
    ctx.mark_non_differentiable(output[1])


def _backward(ctx: Any, grad: Tensor, _: Any) -> tuple[Tensor | None, ...]:
    from lemo_trainer.kernels import triton_attention

    gradients = triton_attention.backward(grad, *ctx.saved_tensors, scaling=ctx.scaling)
    return *gradients, None, None


_triton.register_autograd(_backward, setup_context=_save)
OPERATOR = torch.ops.lemo.attend.default
