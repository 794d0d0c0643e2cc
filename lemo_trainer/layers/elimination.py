"""Token elimination (`mode="eliminate"`): a layer computes the chosen blocks, the others pass it by.

The chosen rows are read from the residual stream, go through norm, attention or MLP as a shorter sequence
with their own positions, and the result is added in place at the same rows (LeMo's permutation-free form):
neither a full-length norm nor a zero-padded output nor a second stream is made, and the backward pass needs
the row numbers only.

Shapes: B batch, S tokens, K kept tokens of a sample, D hidden width, N whole blocks.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from lemo_trainer.config import LemoConfig
from lemo_trainer.informativeness.scores import mlp_scores, score_positions
from lemo_trainer.informativeness.selection import BlockPlan, cheap_scores, select_tokens
from lemo_trainer.informativeness.selectors import BlockScorer
from lemo_trainer.kernels.mlp import in_segments
from lemo_trainer.layers.checkpointing import without_graph
from lemo_trainer.layers.stream import Streams
from lemo_trainer.model.architectures import Architecture
from lemo_trainer.model.capture import AttentionInputs, attention_function, attention_inputs, mlp_intermediate
from lemo_trainer.model.masks import masked_attention, valid_tokens
from lemo_trainer.model.rows import flat_rows, take_arguments, take_mask


class EliminatingLayer:
    """One decoder layer's token elimination, for the batches of a training step.

    Args:
        architecture: how the layer is wired.
        config: which tokens are kept.
        scorer: makes the attention's scores.
        streams: what hands the residual stream from layer to layer.
    """

    def __init__(
        self,
        architecture: Architecture,
        config: LemoConfig,
        scorer: BlockScorer,
        streams: Streams | None = None,
    ) -> None:
        self.architecture = architecture
        self.config = config
        self.scorer = scorer
        self.streams = streams or Streams()

    def __call__(
        self,
        layer: Any,
        x_BSD: Tensor,
        attention_mask: Any,
        positions: dict[str, Any],
        plan: BlockPlan,
        run: Callable[..., Tensor],
        **kwargs: Any,
    ) -> Tensor:
        """The layer's output [B, S, D].

        Args:
            layer: the decoder layer; `x_BSD`, `attention_mask` and `kwargs` are arguments of its own forward.
            positions: its arguments with one entry a token.
            run: calls its first argument on the others: the layer's gradient checkpointing, selective
                checkpointing, or nothing but a call.
        """
        architecture = self.architecture
        seq_len = x_BSD.shape[1]
        implementation, mask = masked_attention(architecture.attention_of(layer), attention_mask)
        valid_BS = valid_tokens(mask)

        def project() -> AttentionInputs:
            return attention_inputs(
                architecture.attention_of(layer),
                architecture.attention_input(layer, x_BSD),
                attention_mask=mask,
                **positions,
                **kwargs,
            )

        with without_graph():
            scores_BN, _ = self.scorer(layer, x_BSD, mask, plan, project)
        index_BK = select_tokens(scores_BN, valid_BS, plan, self.config)
        kept = {"attention_mask": take_mask(mask, index_BK), **take_arguments(positions, index_BK)}

        def attention(x: Tensor, rows: Tensor | None = None) -> Tensor:
            with attention_function(architecture.attention_of(layer), implementation):
                return architecture.attention_branch(layer, x, rows, **kept, **kwargs)

        def mlp(x: Tensor, rows: Tensor | None = None) -> Tensor:
            return architecture.mlp_branch(layer, x, rows)

        def on_rows(branch: Callable[..., Tensor], rows: Tensor) -> Tensor:
            """The branch's output. Without gradients its norm reads the rows from the stream, not a copy."""
            return run(branch, stream.take(rows)) if torch.is_grad_enabled() else branch(stream.x_BSD, rows)

        segment = self.config.mlp_segment

        def mlp_update() -> tuple[Tensor, Tensor]:
            """The MLP's output and its rows, which it chooses from the stream as it is now."""
            if architecture.has_dense_mlp(layer):
                rows = torch.arange(x_BSD[..., 0].numel(), device=x_BSD.device)
            else:
                scores_BN = self._mlp_scores(layer, stream.x_BSD, valid_BS, plan)
                rows = flat_rows(select_tokens(scores_BN, valid_BS, plan, self.config), seq_len)
            if segment and not architecture.has_dense_mlp(layer):
                return in_segments(mlp, stream.take(rows), segment), rows
            return on_rows(mlp, rows), rows

        stream = self.streams.enter(layer, x_BSD)
        rows = flat_rows(index_BK, seq_len)
        updates = [(on_rows(attention, rows), rows)]
        if architecture.is_parallel(layer):
            updates.append(mlp_update())
        for update in updates:
            stream.add(*update)
        if not architecture.is_parallel(layer):
            stream.add(*mlp_update())
        return self.streams.leave(layer, stream)

    @without_graph()
    def _mlp_scores(self, layer: Any, x_BSD: Tensor, valid_BS: Tensor | None, plan: BlockPlan) -> Tensor:
        if not self.config.scores_text:
            return cheap_scores(self.config.resolved_selector, x_BSD, valid_BS, plan)
        sampled = score_positions(
            plan.blocks, plan.block_size, self.config.mlp_score_tokens, device=x_BSD.device
        )
        intermediate = mlp_intermediate(self.architecture, layer, x_BSD[:, sampled])
        return mlp_scores(intermediate, None if valid_BS is None else valid_BS[:, sampled], plan.blocks)
