"""Token elimination (`mode="eliminate"`): a layer computes the chosen blocks, the others pass it by.

The chosen rows are read from the residual stream, go through norm, attention or MLP as a shorter sequence
with their own positions, and the result is added back at the same rows (LeMo's permutation-free form):
neither a full-length norm nor a zero-padded output is made, and the backward pass needs the row numbers only.

Shapes: B batch, S tokens, K kept tokens of a sample, D hidden width, N whole blocks.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from lemo_trainer.architectures import Architecture
from lemo_trainer.checkpointing import without_graph
from lemo_trainer.config import LemoConfig
from lemo_trainer.informativeness import (
    attention_inputs,
    attention_scores,
    mlp_intermediate,
    mlp_scores,
    score_positions,
    valid_tokens,
)
from lemo_trainer.rows import add_rows, flat_rows, take_mask, take_positions, take_rows
from lemo_trainer.selection import BlockPlan, cheap_scores, select_tokens


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
        layer: Any,
        x_BSD: Tensor,
        attention_mask: Tensor | None,
        position_embeddings: tuple[Tensor, Tensor],
        plan: BlockPlan,
        run: Callable[..., Tensor],
        **kwargs: Any,
    ) -> Tensor:
        """The layer's output [B, S, D].

        Args:
            layer: the decoder layer; `x_BSD`, `attention_mask`, `position_embeddings` and `kwargs` are the
                arguments of its own forward.
            run: calls its first argument on the others: the layer's gradient checkpointing, selective
                checkpointing, or nothing but a call.
        """
        seq_len = x_BSD.shape[1]
        valid_BS = valid_tokens(attention_mask)

        scores_BN = self._attention_scores(
            layer, x_BSD, valid_BS, plan, attention_mask, position_embeddings, **kwargs
        )
        index_BK = select_tokens(scores_BN, valid_BS, plan, self.config)
        kept = {
            "attention_mask": take_mask(attention_mask, index_BK),
            "position_embeddings": tuple(take_positions(part, index_BK) for part in position_embeddings),
        }

        def attention(x_BKD: Tensor) -> Tensor:
            return self.architecture.attention_branch(layer, x_BKD, **kept, **kwargs)

        rows = flat_rows(index_BK, seq_len)
        x_BSD = add_rows(x_BSD, run(attention, take_rows(x_BSD, rows)), rows)

        index_BK = select_tokens(self._mlp_scores(layer, x_BSD, valid_BS, plan), valid_BS, plan, self.config)

        def mlp(x_BKD: Tensor) -> Tensor:
            return self.architecture.mlp_branch(layer, x_BKD)

        rows = flat_rows(index_BK, seq_len)
        return add_rows(x_BSD, run(mlp, take_rows(x_BSD, rows)), rows)

    @without_graph()
    def _attention_scores(
        self,
        layer: Any,
        x_BSD: Tensor,
        valid_BS: Tensor | None,
        plan: BlockPlan,
        mask: Tensor | None,
        position_embeddings: Any,
        **kwargs: Any,
    ) -> Tensor:
        if self.config.selector != "informativeness":
            return cheap_scores(self.config.selector, x_BSD, valid_BS, plan)
        inputs = attention_inputs(
            layer.self_attn,
            self.architecture.attention_input(layer, x_BSD),
            attention_mask=mask,
            position_embeddings=position_embeddings,
            **kwargs,
        )
        return attention_scores(inputs.query, inputs.key, inputs.scaling, mask, plan.block_size)

    @without_graph()
    def _mlp_scores(self, layer: Any, x_BSD: Tensor, valid_BS: Tensor | None, plan: BlockPlan) -> Tensor:
        if self.config.selector != "informativeness":
            return cheap_scores(self.config.selector, x_BSD, valid_BS, plan)
        positions = score_positions(
            plan.blocks, plan.block_size, self.config.mlp_score_tokens, device=x_BSD.device
        )
        normed = self.architecture.mlp_input(layer, x_BSD[:, positions])
        intermediate = mlp_intermediate(layer.mlp, self.architecture.down_proj, normed)
        return mlp_scores(intermediate, None if valid_BS is None else valid_BS[:, positions], plan.blocks)
