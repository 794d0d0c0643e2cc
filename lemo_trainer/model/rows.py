"""Cuts heads, arguments and masks to the positions of chosen tokens.

Shapes: B batch, S tokens, K chosen tokens of a sample.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def flat_rows(index_BK: Tensor, seq_len: int) -> Tensor:
    """Rows [B * K] of a flattened [B * S, D] residual stream for positions [B, K]."""
    return (index_BK + torch.arange(len(index_BK), device=index_BK.device)[:, None] * seq_len).flatten()


def take_heads(values_BHSd: Tensor, index_BK: Tensor) -> Tensor:
    """Queries, keys or values [B, H, S, d] at positions [B, K]: [B, H, K, d]."""
    heads, width = values_BHSd.shape[1], values_BHSd.shape[3]
    return values_BHSd.gather(2, index_BK[:, None, :, None].expand(-1, heads, -1, width))


def merge_heads(kept_BHKd: Tensor, kept_BK: Tensor, rest_BHRd: Tensor, rest_BR: Tensor) -> Tensor:
    """Keys or values [B, H, S, d] of all tokens from those at positions `kept_BK` and at `rest_BR`."""
    order_BS = torch.cat([kept_BK, rest_BR], 1).argsort(1)
    return take_heads(torch.cat([kept_BHKd, rest_BHRd], 2), order_BS)


def take_positions(values_BS: Tensor, index_BK: Tensor) -> Tensor:
    """[B or 1, S, ...] at positions [B, K] of each sample: [B, K, ...]."""
    batch = torch.arange(len(index_BK), device=index_BK.device)[:, None]
    return values_BS.expand(len(index_BK), *values_BS.shape[1:])[batch, index_BK]


def take_arguments(arguments: Any, index_BK: Tensor) -> Any:
    """A layer's arguments per token ([B or 1, S, ...], tuples, dicts of them) at positions [B, K]."""
    if isinstance(arguments, Tensor):
        return take_positions(arguments, index_BK)
    if isinstance(arguments, dict):
        return {name: take_arguments(part, index_BK) for name, part in arguments.items()}
    if isinstance(arguments, tuple):
        return tuple(take_arguments(part, index_BK) for part in arguments)
    return arguments


def take_queries(mask_B1SS: Tensor | None, index_BK: Tensor, keys: int) -> Tensor:
    """The rows [B, 1, K, keys] of an attention mask at positions [B, K]; None is plain causal."""
    if mask_B1SS is None:
        return torch.arange(keys, device=index_BK.device) <= index_BK[:, None, :, None]
    return take_positions(mask_B1SS[:, 0, :, :keys], index_BK)[:, None]


def take_mask(mask_B1SS: Tensor | None, index_BK: Tensor) -> Tensor | None:
    """The rows and columns [B, 1, K, K] of an attention mask at positions [B, K]; plain causal stays so."""
    if mask_B1SS is None:
        return None
    rows = take_queries(mask_B1SS, index_BK, mask_B1SS.shape[-1])
    return rows.gather(3, index_BK[:, None, None, :].expand(-1, -1, rows.shape[2], -1))


def other_positions(index_BK: Tensor, seq_len: int) -> Tensor:
    """Ascending positions [B, S - K] that are not in `index_BK`."""
    chosen_BS = torch.zeros(len(index_BK), seq_len, dtype=torch.bool, device=index_BK.device)
    chosen_BS.scatter_(1, index_BK, True)
    return (~chosen_BS).nonzero()[:, 1].view(len(index_BK), -1)
