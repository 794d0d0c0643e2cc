"""Attention masks as tensors, and attention functions that take them.

A mask is None (plain causal) or [B, 1, S, S], bool (True where a query may look at a key) or additive. The
`BlockMask` of flex attention cannot be cut to chosen tokens; it is written out as a bool mask once a batch.
"""

from __future__ import annotations

from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.nn.attention.flex_attention import BlockMask, create_mask
from transformers import AttentionInterface

from lemo_trainer.compat import NOT_IN_SDPA, attention_function, attention_implementation

_GROUPED = "lemo_grouped_sdpa"
_WRITTEN_OUT = "lemo_written_out"
_written_out: WeakKeyDictionary[BlockMask, Tensor] = WeakKeyDictionary()


def masked_attention(attention: Any, mask: Any) -> tuple[str, Tensor | None]:
    """The registered name of the attention for chosen tokens, and the mask in the form that it takes."""
    if not isinstance(mask, BlockMask):
        return segment_implementation(attention_implementation(attention.config)), mask
    if mask not in _written_out:
        batch, heads, queries, keys = mask.shape
        device = mask.kv_num_blocks.device
        _written_out[mask] = create_mask(mask.mask_mod, batch, heads, queries, keys, device=device)
    return _WRITTEN_OUT, _written_out[mask]


def segment_implementation(own: str) -> str:
    """The registered name of what computes attention `own` for some queries and the rows of their mask."""
    return {"sdpa": _GROUPED, "flex_attention": _WRITTEN_OUT}.get(own, own)


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
    """SDPA on shared key heads. transformers copies them under a mask, which a CPU does not need."""
    unusual = any(options.get(name) is not None for name in NOT_IN_SDPA)
    if attention_mask is None or query.device.type != "cpu" or unusual:
        sdpa = attention_function(module, "sdpa")
        return sdpa(module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **options)
    heads = nn.functional.scaled_dot_product_attention(
        query, key, value, attention_mask, dropout, scale=scaling, enable_gqa=True
    )
    return heads.transpose(1, 2).contiguous(), None


def _written_out_attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor, **options: Any
) -> tuple[Tensor, Any]:
    """Flex attention for a bool mask: by SDPA, or by eager attention under soft caps and sinks."""
    if options.get("softcap") is None and options.get("s_aux") is None:
        return attention_function(module, "sdpa")(module, query, key, value, attention_mask, **options)
    additive = torch.zeros_like(attention_mask, dtype=query.dtype)
    additive.masked_fill_(~attention_mask, torch.finfo(query.dtype).min)
    return attention_function(module, "eager")(module, query, key, value, additive, **options)


AttentionInterface.register(_GROUPED, _grouped_attention)
AttentionInterface.register(_WRITTEN_OUT, _written_out_attention)


def allowed_pairs(mask_B1SS: Tensor) -> Tensor:
    """Bool [B, 1, S, S], True where a query may look at a key, of a bool or an additive attention mask."""
    return mask_B1SS if mask_B1SS.dtype == torch.bool else mask_B1SS == 0


def allowed_blocks(mask_B1SS: Tensor, block_size: int) -> Tensor:
    """Bool [B, N, N]: whether some query of a whole block may look at some key of another."""
    whole = mask_B1SS.shape[-1] // block_size * block_size
    pairs_BSS = allowed_pairs(mask_B1SS[:, 0, :whole, :whole])
    return pairs_BSS.unflatten(1, (-1, block_size)).unflatten(3, (-1, block_size)).any(4).any(2)


def valid_tokens(mask_B1SS: Tensor | None) -> Tensor | None:
    """Bool [B, S], False at padding, of an attention mask; None when every token counts."""
    return None if mask_B1SS is None else allowed_pairs(mask_B1SS[:, 0]).diagonal(dim1=1, dim2=2)
