"""Token elimination: a layer computes the chosen blocks of each sample, the others pass by on the residual.

The chosen rows are read from the residual stream, go through norm, attention or MLP as a shorter sequence
with their own positions, and the result is added back at the same rows (LeMo's permutation-free form):
neither a full-length norm nor a zero-padded output is made, and the backward pass needs the row numbers only.

Shapes: B batch, S tokens, K kept tokens of a sample, D hidden width, N whole blocks.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from .architectures import Architecture
from .config import LemoConfig
from .informativeness import (
    allowed_pairs,
    attention_scores,
    mlp_intermediate,
    mlp_scores,
    queries_and_keys,
    score_positions,
)


@dataclass(frozen=True)
class BlockPlan:
    """How many blocks of a sequence are kept; one number for all samples, so that a batch stays a tensor.

    Args:
        blocks: whole blocks of the sequence.
        kept_blocks: how many of them are kept.
        tail: tokens of the last, partial block; they are always kept.
        block_size: tokens of a whole block.
    """

    blocks: int
    kept_blocks: int
    tail: int
    block_size: int

    @classmethod
    def of(cls, seq_len: int, config: LemoConfig) -> BlockPlan:
        """The plan nearest to `keep_ratio` that keeps all protected blocks."""
        blocks, tail = divmod(seq_len, config.block_size)
        wanted = int((config.keep_ratio * seq_len - tail) / config.block_size + 0.5)
        kept = max(wanted, config.sink_blocks + config.recent_blocks, 0 if tail else 1)
        return cls(blocks, min(kept, blocks), tail, config.block_size)

    @property
    def kept_tokens(self) -> int:
        return self.kept_blocks * self.block_size + self.tail

    @property
    def keeps_all(self) -> bool:
        return self.kept_blocks == self.blocks


def select_tokens(
    scores_BN: Tensor, valid_BS: Tensor | None, plan: BlockPlan, *, sink_blocks: int, recent_blocks: int
) -> Tensor:
    """Ascending positions [B, K] of the tokens of each sample's highest-scoring blocks.

    The first `sink_blocks` and the last `recent_blocks` whole blocks that hold tokens of the sample are kept
    before any other, blocks of padding only after all others. Equal scores go to the earlier block.

    Args:
        scores_BN: informativeness of the whole blocks.
        valid_BS: False at padding; None when there is none.

    Raises:
        ValueError: a score is NaN.
    """
    if scores_BN.isnan().any():
        raise ValueError("Block scores must be numbers, got NaN: the hidden states of this batch hold NaN.")
    whole = plan.blocks * plan.block_size
    if valid_BS is None:
        filled_BN = torch.ones_like(scores_BN, dtype=torch.bool)
    else:
        filled_BN = valid_BS[:, :whole].unflatten(1, (plan.blocks, -1)).any(-1).expand_as(scores_BN)
    rank_BN = filled_BN.cumsum(1)
    protected_BN = (rank_BN <= sink_blocks) | (rank_BN > rank_BN[:, -1:] - recent_blocks)
    scores_BN = scores_BN.masked_fill(protected_BN, torch.inf).masked_fill(~filled_BN, -torch.inf)
    order_BN = scores_BN.sort(dim=1, descending=True, stable=True).indices
    blocks_BK = order_BN[:, : plan.kept_blocks].sort(dim=1).values
    offsets = torch.arange(plan.block_size, device=scores_BN.device)
    kept_BK = (blocks_BK[..., None] * plan.block_size + offsets).flatten(1)
    tail = torch.arange(whole, whole + plan.tail, device=scores_BN.device)
    return torch.cat([kept_BK, tail.expand(len(kept_BK), -1)], dim=1)


def flat_rows(index_BK: Tensor, seq_len: int) -> Tensor:
    """Rows [B * K] of a flattened [B * S, D] residual stream for positions [B, K]."""
    return (index_BK + torch.arange(len(index_BK), device=index_BK.device)[:, None] * seq_len).flatten()


def take_rows(x_BSD: Tensor, rows: Tensor) -> Tensor:
    """Rows of the stream as [B, K, D]. Saves the row numbers for the backward pass, not the stream."""
    return x_BSD.flatten(0, 1).index_select(0, rows).unflatten(0, (len(x_BSD), -1))


class _AddRows(torch.autograd.Function):
    """x with `update` added at `rows`; unlike index_add, the backward pass keeps nothing but the rows."""

    @staticmethod
    def forward(ctx: Any, x_BSD: Tensor, update_BKD: Tensor, rows: Tensor) -> Tensor:
        ctx.save_for_backward(rows)
        ctx.update_dtype = update_BKD.dtype
        update = update_BKD.flatten(0, 1).to(x_BSD.dtype)
        return x_BSD.flatten(0, 1).index_add(0, rows, update).view_as(x_BSD)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_BSD: Tensor) -> tuple[Tensor, Tensor, None]:
        (rows,) = ctx.saved_tensors
        return grad_BSD, take_rows(grad_BSD, rows).to(ctx.update_dtype), None


def add_rows(x_BSD: Tensor, update_BKD: Tensor, rows: Tensor) -> Tensor:
    """The stream [B, S, D] with `update_BKD` added at the flat row numbers `rows` [B * K]."""
    out: Tensor = _AddRows.apply(x_BSD, update_BKD, rows)
    return out


def take_positions(values_BS: Tensor, index_BK: Tensor) -> Tensor:
    """[B or 1, S, ...] at positions [B, K] of each sample: [B, K, ...]."""
    batch = torch.arange(len(index_BK), device=index_BK.device)[:, None]
    return values_BS.expand(len(index_BK), *values_BS.shape[1:])[batch, index_BK]


def take_mask(mask_B1SS: Tensor | None, index_BK: Tensor) -> Tensor | None:
    """The rows and columns [B, 1, K, K] of an attention mask at positions [B, K]; plain causal stays so."""
    if mask_B1SS is None:
        return None
    rows = take_positions(mask_B1SS[:, 0], index_BK)
    return rows.gather(2, index_BK[:, None, :].expand(-1, rows.shape[1], -1))[:, None]


class EliminatingLayer:
    """One decoder layer's token elimination, for the batches of a training step.

    Args:
        architecture: how the layer is wired.
        config: which tokens are kept.
    """

    def __init__(self, architecture: Architecture, config: LemoConfig) -> None:
        self.architecture = architecture
        self.config = config

    def __call__(
        self,
        layer: nn.Module,
        x_BSD: Tensor,
        attention_mask: Tensor | None,
        position_ids: Tensor | None,
        position_embeddings: tuple[Tensor, Tensor],
        plan: BlockPlan,
        **kwargs: Any,
    ) -> Tensor:
        """The layer's output [B, S, D]. The arguments are those of the model's own layer."""
        seq_len = x_BSD.shape[1]
        valid_BS = None
        if attention_mask is not None:
            valid_BS = allowed_pairs(attention_mask[:, 0]).diagonal(dim1=1, dim2=2)

        scores_BN = self._attention_scores(layer, x_BSD, attention_mask, position_embeddings, **kwargs)
        index_BK = self._select(scores_BN, valid_BS, plan)
        rows = flat_rows(index_BK, seq_len)
        update_BKD = self.architecture.attention_branch(
            layer,
            take_rows(x_BSD, rows),
            attention_mask=take_mask(attention_mask, index_BK),
            position_ids=None if position_ids is None else take_positions(position_ids, index_BK),
            position_embeddings=tuple(take_positions(part, index_BK) for part in position_embeddings),
            **kwargs,
        )
        x_BSD = add_rows(x_BSD, update_BKD, rows)

        index_BK = self._select(self._mlp_scores(layer, x_BSD, valid_BS, plan), valid_BS, plan)
        rows = flat_rows(index_BK, seq_len)
        return add_rows(x_BSD, self.architecture.mlp_branch(layer, take_rows(x_BSD, rows)), rows)

    def _select(self, scores_BN: Tensor, valid_BS: Tensor | None, plan: BlockPlan) -> Tensor:
        config = self.config
        return select_tokens(
            scores_BN, valid_BS, plan, sink_blocks=config.sink_blocks, recent_blocks=config.recent_blocks
        )

    @torch.no_grad()
    def _attention_scores(
        self, layer: Any, x_BSD: Tensor, mask: Tensor | None, position_embeddings: Any, **kwargs: Any
    ) -> Tensor:
        normed_BSD = self.architecture.attention_input(layer, x_BSD)
        q, k, scaling = queries_and_keys(
            layer.self_attn,
            normed_BSD,
            attention_mask=mask,
            position_embeddings=position_embeddings,
            **kwargs,
        )
        return attention_scores(q, k, scaling, mask, self.config.block_size)

    @torch.no_grad()
    def _mlp_scores(self, layer: Any, x_BSD: Tensor, valid_BS: Tensor | None, plan: BlockPlan) -> Tensor:
        positions = score_positions(
            plan.blocks, plan.block_size, self.config.mlp_score_tokens, device=x_BSD.device
        )
        normed = self.architecture.mlp_input(layer, x_BSD[:, positions])
        intermediate = mlp_intermediate(layer.mlp, self.architecture.down_proj, normed)
        return mlp_scores(intermediate, None if valid_BS is None else valid_BS[:, positions], plan.blocks)
