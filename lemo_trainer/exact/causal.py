"""Causal attention of the last tokens of a sequence over all of it, without a mask.

A segment of n queries meets T - n earlier keys, all of them, and its own n keys up to the diagonal. The CPU's
flash kernel computes both parts without a mask, which costs it a quarter more time. The two are merged by the
logarithms of their softmax sums, and the backward kernel, given the merged ones, makes each part's share of
the gradient (the blockwise form of ring attention, arXiv 2310.01889).

Shapes: B batch, H query and G key heads of width d, n queries, T keys.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

_flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_flash_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward
_OTHER = ("softcap", "position_bias", "s_aux", "cache")


class _CausalTail(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q_BHnd: Tensor, k_BGTd: Tensor, v_BGTd: Tensor, scale: float | None) -> Tensor:
        earlier = k_BGTd.shape[2] - q_BHnd.shape[2]
        before, own = slice(0, earlier), slice(earlier, None)
        out, lse = _flash(q_BHnd, k_BGTd[:, :, own], v_BGTd[:, :, own], is_causal=True, scale=scale)
        if earlier:
            out_before, lse_before = _flash(q_BHnd, k_BGTd[:, :, before], v_BGTd[:, :, before], scale=scale)
            both = torch.logaddexp(lse, lse_before)
            out = out * _share(lse, both) + out_before * _share(lse_before, both)
            out, lse = out.to(q_BHnd.dtype), both
        ctx.save_for_backward(q_BHnd, k_BGTd, v_BGTd, out, lse)
        ctx.scale = scale
        result: Tensor = out
        return result

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, out, lse = ctx.saved_tensors
        earlier = k.shape[2] - q.shape[2]

        def of_part(part: slice, causal: bool) -> tuple[Tensor, Tensor, Tensor]:
            keys, values = k[:, :, part], v[:, :, part]
            gradients: tuple[Tensor, Tensor, Tensor] = _flash_backward(
                grad, q, keys, values, out, lse, 0.0, causal, scale=ctx.scale
            )
            return gradients

        grad_q, grad_k, grad_v = of_part(slice(earlier, None), True)
        if earlier:
            more_q, *before = of_part(slice(0, earlier), False)
            grad_q = grad_q + more_q
            grad_k, grad_v = torch.cat([before[0], grad_k], 2), torch.cat([before[1], grad_v], 2)
        return grad_q, grad_k, grad_v, None


def _share(part_BHn: Tensor, whole_BHn: Tensor) -> Tensor:
    """The part's share of the softmax sum, [B, H, n, 1], from the logarithms of both."""
    return (part_BHn - whole_BHn).exp().unsqueeze(-1)


def fits(query: Tensor, key: Tensor, value: Tensor, options: dict[str, Any]) -> bool:
    """Whether the attention of these heads needs no mask and no kernel but flash."""
    unusual = any(options.get(name) is not None for name in _OTHER)
    if unusual or options.get("dropout") or key.shape[-1] != value.shape[-1]:
        return False
    return query.device.type == "cpu" or (query.device.type == "cuda" and key.shape[-1] <= 256)


def attend_tail(query: Tensor, key: Tensor, value: Tensor, scale: float | None) -> Tensor:
    """Heads [B, H, n, d] of the last n queries [B, H, n, d] over keys and values [B, G, T, d], causal."""
    if query.device.type == "cpu":
        if torch.is_autocast_enabled("cpu"):  # which casts for SDPA, but not for the kernel in it
            dtype = torch.get_autocast_dtype("cpu")
            query, key, value = query.to(dtype), key.to(dtype), value.to(dtype)
        heads: Tensor = _CausalTail.apply(query, key, value, scale)
        return heads
    from torch.nn.attention.bias import causal_lower_right

    bias = causal_lower_right(query.shape[2], key.shape[2])
    grouped = query.shape[1] != key.shape[1]
    return nn.functional.scaled_dot_product_attention(
        query, key, value, bias, scale=scale, enable_gqa=grouped
    )
