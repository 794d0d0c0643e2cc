"""Attention masks as tensors, whatever the model's attention implementation hands to its layers.

A mask is None (plain causal) or [B, 1, S, S], bool (True where a query may look at a key) or additive. The
`BlockMask` of flex attention cannot be cut to chosen tokens; it is written out as a bool mask once a batch.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.nn.attention.flex_attention import BlockMask, create_mask
from transformers import AttentionInterface
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

AttentionFunction = Callable[..., tuple[Tensor, Any]]

_GROUPED = "lemo_grouped_sdpa"
_WRITTEN_OUT = "lemo_written_out"
_written_out: WeakKeyDictionary[BlockMask, Tensor] = WeakKeyDictionary()


def masked_attention(attention: Any, mask: Any) -> tuple[str, Tensor | None]:
    """The attention implementation for chosen tokens, by its registered name, and the mask as it takes it."""
    if not isinstance(mask, BlockMask):
        return segment_implementation(attention.config._attn_implementation), mask
    if mask not in _written_out:
        batch, heads, queries, keys = mask.shape
        device = mask.kv_num_blocks.device
        _written_out[mask] = create_mask(mask.mask_mod, batch, heads, queries, keys, device=device)
    return _WRITTEN_OUT, _written_out[mask]


def segment_implementation(own: str) -> str:
    """The registered name of what computes attention `own` for some queries and the rows of their mask."""
    return {"sdpa": _GROUPED, "flex_attention": _WRITTEN_OUT}.get(own, own)


def attention_interface(attention: nn.Module, implementation: str) -> AttentionFunction:
    """The function that `attention` calls for an implementation."""
    modeling: Any = sys.modules[type(attention).__module__]
    function: AttentionFunction = ALL_ATTENTION_FUNCTIONS.get_interface(
        implementation, modeling.eager_attention_forward
    )
    return function


def _grouped_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    dropout: float = 0.0,
    scaling: float | None = None,
    **options: Any,
) -> tuple[Tensor, Any]:
    """SDPA on shared key heads as they are; under a mask transformers copies them, which the CPU need not."""
    unusual = any(options.get(name) is not None for name in ("softcap", "position_bias", "cache"))
    if attention_mask is None or query.device.type != "cpu" or unusual:
        sdpa = attention_interface(module, "sdpa")
        return sdpa(module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **options)
    heads = nn.functional.scaled_dot_product_attention(
        query, key, value, attention_mask, dropout, scale=scaling, enable_gqa=True
    )
    return heads.transpose(1, 2).contiguous(), None


def _written_out_attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor, **options: Any
) -> tuple[Tensor, Any]:
    """What flex attention computes, for a bool mask: SDPA knows neither soft caps nor sinks, eager both."""
    if options.get("softcap") is None and options.get("s_aux") is None:
        return attention_interface(module, "sdpa")(module, query, key, value, attention_mask, **options)
    additive = torch.zeros_like(attention_mask, dtype=query.dtype)
    additive.masked_fill_(~attention_mask, torch.finfo(query.dtype).min)
    return attention_interface(module, "eager")(module, query, key, value, additive, **options)


AttentionInterface.register(_GROUPED, _grouped_attention)
AttentionInterface.register(_WRITTEN_OUT, _written_out_attention)
