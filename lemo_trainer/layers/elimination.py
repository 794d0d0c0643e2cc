"""Token elimination (`mode="eliminate"`): a layer computes the chosen blocks, the others pass it by.

The chosen rows are read from the residual stream, go through norm, attention or MLP as a shorter sequence
with their own positions, and the result is added in place at the same rows (LeMo's permutation-free form): no
full-length norm, no zero-padded output and no second stream is allocated, and the backward pass needs only
the row numbers.

Shapes: B batch, S tokens, K kept tokens of a sample, D hidden width, N whole blocks.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from lemo_trainer.informativeness.selection import BlockPlan, select_tokens
from lemo_trainer.informativeness.selectors import LayerView, Selector
from lemo_trainer.layers.checkpointing import in_segments, without_graph
from lemo_trainer.layers.stream import Stream, Streams
from lemo_trainer.model.architectures import Architecture
from lemo_trainer.model.capture import AttentionInputs, attention_inputs, dispatching_to, mlp_intermediate
from lemo_trainer.model.hooks import Rows, hooks_on_rows
from lemo_trainer.model.masks import masked_attention, valid_tokens
from lemo_trainer.model.rows import flat_rows, take_arguments, take_mask


class EliminatingLayer:
    """One decoder layer's token elimination, for the batches of a training step.

    Args:
        architecture: how the layer is wired.
        selector: ranks the blocks; its configuration says how many are kept.
        streams: what hands the residual stream from layer to layer.
    """

    def __init__(
        self, architecture: Architecture, selector: Selector, streams: Streams | None = None
    ) -> None:
        self.architecture = architecture
        self.selector, self.config = selector, selector.config
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
        attention = architecture.attention_of(layer)
        implementation, mask = masked_attention(attention, attention_mask)
        hooks = hooks_on_rows(layer, x_BSD.shape[1])

        def project() -> AttentionInputs:
            source = architecture.attention_input(layer, x_BSD)
            return attention_inputs(attention, source, attention_mask=mask, **positions, **kwargs)

        with without_graph():
            view = LayerView(x_BSD, mask, plan, project=project)
            scores_BN = self.selector.attention_scores(view)
        index_BK = select_tokens(scores_BN, valid_tokens(mask), plan, self.config)
        kept = {"attention_mask": take_mask(mask, index_BK), **take_arguments(positions, index_BK)}

        def attention_branch(x: Tensor, rows: Tensor | None = None) -> Tensor:
            with dispatching_to(attention, implementation), hooks(index_BK):
                return architecture.attention_branch(layer, x, rows, **kept, **kwargs)

        stream = self.streams.enter(layer, x_BSD)
        rows = flat_rows(index_BK, x_BSD.shape[1])
        updates = [(_on_rows(attention_branch, stream, rows, run), rows)]
        if architecture.is_parallel(layer):
            updates.append(self._mlp_update(layer, stream, mask, plan, run, hooks))
        for update in updates:
            stream.add(*update)
        if not architecture.is_parallel(layer):
            stream.add(*self._mlp_update(layer, stream, mask, plan, run, hooks))
        return self.streams.leave(layer, stream)

    def _mlp_update(
        self,
        layer: Any,
        stream: Stream,
        mask: Tensor | None,
        plan: BlockPlan,
        run: Callable[..., Tensor],
        hooks: Rows,
    ) -> tuple[Tensor, Tensor]:
        """The MLP's output and its rows, which it chooses from the stream as it is now."""
        index_BK: Tensor | None = None  # all rows

        def mlp(x: Tensor, rows: Tensor | None = None) -> Tensor:
            with hooks(index_BK):
                return self.architecture.mlp_branch(layer, x, rows)

        if self.architecture.has_dense_mlp(layer):
            every_row = torch.arange(stream.x_BSD[..., 0].numel(), device=stream.x_BSD.device)
            return _on_rows(mlp, stream, every_row, run), every_row
        with without_graph():
            intermediate = functools.partial(self._intermediate, layer, stream.x_BSD)
            scores_BN = self.selector.mlp_scores(
                LayerView(stream.x_BSD, mask, plan, intermediate=intermediate)
            )
        index_BK = select_tokens(scores_BN, valid_tokens(mask), plan, self.config)
        rows = flat_rows(index_BK, stream.x_BSD.shape[1])
        if self.config.mlp_segment:
            return in_segments(mlp, layer, stream.take(rows), self.config.mlp_segment), rows
        return _on_rows(mlp, stream, rows, run), rows

    def _intermediate(self, layer: Any, x_BSD: Tensor, positions_P: Tensor) -> Tensor:
        return mlp_intermediate(self.architecture, layer, x_BSD[:, positions_P])


def _on_rows(
    branch: Callable[..., Tensor], stream: Stream, rows: Tensor, run: Callable[..., Tensor]
) -> Tensor:
    """The branch's output. Without gradients its norm reads the rows from the stream, not a copy."""
    return run(branch, stream.take(rows)) if torch.is_grad_enabled() else branch(stream.x_BSD, rows)
