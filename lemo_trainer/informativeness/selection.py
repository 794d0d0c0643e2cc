"""The choice of the blocks that a layer keeps: how many, and which.

Shapes: B batch, S tokens, K kept tokens of a sample, N whole blocks.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from lemo_trainer.config import LemoConfig


def _ignore(values: Tensor) -> None:
    pass


@dataclass(frozen=True)
class BlockPlan:
    """How many blocks of a sequence are kept, the same number in each sample so that a batch stays a tensor.

    Args:
        blocks: whole blocks of the sequence.
        kept_blocks: number of kept blocks; the least number with a `threshold`.
        tail: tokens of the last, partial block; they are always kept.
        block_size: tokens of a whole block.
        threshold: keep the blocks whose score is this many times the sample's mean, or more; None keeps
            `kept_blocks`. A batch keeps as many as its sample with the most.
        labelled: bool [B, S], True for tokens with a label, for `protect_labels`.
        layer: number of the decoder layer that it is for.
        on_chosen: called with the chosen positions [B, K].
        on_scored: called under a `threshold` with the relative scores that are compared with it, one number
            for each block that holds tokens of a sample.
    """

    blocks: int
    kept_blocks: int
    tail: int
    block_size: int
    threshold: float | None = None
    labelled: Tensor | None = None
    layer: int = 0
    on_chosen: Callable[[Tensor], None] = _ignore
    on_scored: Callable[[Tensor], None] = _ignore

    @classmethod
    def of(cls, seq_len: int, config: LemoConfig, keep_ratio: float | None = None) -> BlockPlan:
        """The plan nearest to a kept share, by default that of `config`, that keeps all protected blocks."""
        keep_ratio = config.resolved_keep_ratio if keep_ratio is None else keep_ratio
        blocks, tail = divmod(seq_len, config.block_size)
        wanted = int((keep_ratio * seq_len - tail) / config.block_size + 0.5)
        kept = max(wanted, config.sink_blocks + config.recent_blocks, 0 if tail else 1)
        return cls(blocks, min(kept, blocks), tail, config.block_size)

    @property
    def kept_tokens(self) -> int:
        return self.kept_blocks * self.block_size + self.tail

    @property
    def keeps_all(self) -> bool:
        return self.kept_blocks == self.blocks and self.threshold is None


def select_tokens(scores_BN: Tensor, valid_BS: Tensor | None, plan: BlockPlan, config: LemoConfig) -> Tensor:
    """Ascending positions [B, K] of the tokens of each sample's highest-scoring blocks.

    The first `sink_blocks` and the last `recent_blocks` whole blocks that hold tokens of the sample are kept
    before any other, then those with labels if the plan has labels, and blocks of padding after all others.
    Equal scores go to the earlier block.

    Args:
        scores_BN: informativeness of the whole blocks.
        valid_BS: False at padding; None without padding.

    Raises:
        ValueError: a score is NaN or infinite.
    """
    if not scores_BN.isfinite().all():
        wrong = "NaN" if scores_BN.isnan().any() else "inf"
        raise ValueError(
            f"Block scores must be finite, got {wrong}: the hidden states of this batch hold NaN or inf."
        )
    whole = plan.blocks * plan.block_size
    filled_BN = torch.ones_like(scores_BN, dtype=torch.bool)
    if valid_BS is not None:
        filled_BN = whole_blocks(valid_BS, plan).any(-1).expand_as(scores_BN)
    rank_BN = filled_BN.cumsum(1)
    protected_BN = (rank_BN <= config.sink_blocks) | (rank_BN > rank_BN[:, -1:] - config.recent_blocks)
    tier_BN = filled_BN.int() + (filled_BN & protected_BN) * 2
    if plan.labelled is not None:
        tier_BN += filled_BN & whole_blocks(plan.labelled, plan).any(-1)
    kept_blocks = plan.kept_blocks
    if plan.threshold is not None:
        mean_B1 = (scores_BN * filled_BN).sum(1, keepdim=True) / filled_BN.sum(1, keepdim=True).clamp(min=1)
        above_BN = filled_BN & (scores_BN >= plan.threshold * mean_B1)
        plan.on_scored((scores_BN / mean_B1.clamp(min=torch.finfo(scores_BN.dtype).tiny))[filled_BN])
        kept_blocks = max(kept_blocks, int((above_BN | (tier_BN > 1)).sum(1).max()))
    order_BN = scores_BN.sort(dim=1, descending=True, stable=True).indices
    tier_BN = tier_BN.gather(1, order_BN).sort(dim=1, descending=True, stable=True).indices
    blocks_BK = order_BN.gather(1, tier_BN)[:, :kept_blocks].sort(dim=1).values
    offsets = torch.arange(plan.block_size, device=scores_BN.device)
    kept_BK = (blocks_BK[..., None] * plan.block_size + offsets).flatten(1)
    tail = torch.arange(whole, whole + plan.tail, device=scores_BN.device)
    index_BK = torch.cat([kept_BK, tail.expand(len(kept_BK), -1)], dim=1)
    plan.on_chosen(index_BK)
    return index_BK


def whole_blocks(values_BS: Tensor, plan: BlockPlan) -> Tensor:
    """Values of tokens [B, S, ...] as [B, N, block size, ...], without the partial block at the end."""
    return values_BS[:, : plan.blocks * plan.block_size].unflatten(1, (plan.blocks, -1))
