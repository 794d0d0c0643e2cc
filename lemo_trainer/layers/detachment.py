"""Detached tokens (`mode="detach"`): every token is computed, the chosen blocks alone carry gradient.

The forward pass of the layer stays that of the model. Rows that were not chosen run without graph (and
without dropout) and enter the attention of the chosen ones as constant keys and values; their gradient goes
through the residual connection only. The chosen rows run with graph; under gradient checkpointing they alone
are recomputed, and without it selective checkpointing saves their matrix products only. No row is computed
twice, unless the choice itself needs the queries and keys of all.

Shapes: B batch, S tokens, K chosen and R other tokens of a sample, D hidden width, H query and G key heads of
width d.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from lemo_trainer.informativeness.selection import BlockPlan, select_tokens
from lemo_trainer.informativeness.selectors import LayerView, Selector
from lemo_trainer.kernels.rows import gather
from lemo_trainer.layers.attention_of_rows import AttentionOfRows
from lemo_trainer.layers.checkpointing import in_segments, without_graph
from lemo_trainer.layers.stream import Stream, Streams
from lemo_trainer.model.architectures import Architecture
from lemo_trainer.model.capture import AttentionInputs, without_dropout
from lemo_trainer.model.hooks import Rows, hooks_on_rows
from lemo_trainer.model.masks import valid_tokens
from lemo_trainer.model.rows import flat_rows, merge_heads, other_positions


class DetachingLayer:
    """One decoder layer in which only chosen tokens carry gradient.

    Args:
        architecture: how the layer is wired.
        selector: ranks the blocks; its configuration says how many are chosen.
        first: the layer that chooses for all when blocks are shared.
        streams: what hands the residual stream from layer to layer.
    """

    def __init__(
        self,
        architecture: Architecture,
        selector: Selector,
        first: nn.Module,
        streams: Streams | None = None,
    ) -> None:
        self.architecture = architecture
        self.selector, self.config = selector, selector.config
        self.first = first
        self.streams = streams or Streams()
        self.shared_index_BK: Tensor | None = None

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
        """The layer's output [B, S, D]; the arguments are those of `EliminatingLayer`."""
        architecture, seq_len = self.architecture, x_BSD.shape[1]
        hooks = hooks_on_rows(layer, seq_len)
        attention = AttentionOfRows(
            architecture,
            layer,
            attention_mask,
            positions,
            kwargs,
            fused=self.config.fused_kernels,
            hooks=hooks,
        )
        with without_graph():
            index_BK, everything = self._select(layer, x_BSD, attention, plan)
            rest_BR = other_positions(index_BK, seq_len)
            rest_rows = flat_rows(rest_BR, seq_len)
            x_BRD = gather(x_BSD, rest_rows)
            rest = attention.project(x_BRD, rest_BR) if everything is None else everything.take(rest_BR)
            del everything

        stream = self.streams.enter(layer, x_BSD)
        rows = flat_rows(index_BK, seq_len)
        x_BKD = stream.take(rows)
        finish = functools.partial(self._with_mlp, layer, hooks, index_BK)
        chosen = _ChosenRows(attention, index_BK, rest_BR, None if self.config.mlp_segment else finish)
        update = run(chosen, x_BKD, rest.key, rest.value)
        if self.config.mlp_segment:  # its recomputation is its own
            update = finish(x_BKD, update)
        keys_and_values = chosen.take_keys_and_values()
        with without_graph(), without_dropout(layer):
            heads = attention.attend(
                rest.query, *keys_and_values, rest_BR, scaling=rest.scaling, **rest.options
            )
            del keys_and_values
            update_of_rest = attention.update_from_heads(x_BRD, rest_BR, heads)
            constant = self._with_mlp(layer, hooks, rest_BR, x_BRD, update_of_rest)

        updates = [(constant, rest_rows), (update, rows)]
        dense, parallel = architecture.has_dense_mlp(layer), architecture.is_parallel(layer)
        if dense and parallel:
            updates.append(self._dense_mlp_update(layer, stream, run, hooks))
        for each in updates:
            stream.add(*each)
        if dense and not parallel:
            stream.add(*self._dense_mlp_update(layer, stream, run, hooks))
        return self.streams.leave(layer, stream)

    def start_batch(self) -> None:
        """Forget the choice of the last batch."""
        self.shared_index_BK = None

    def _with_mlp(self, layer: nn.Module, hooks: Rows, index: Tensor, x: Tensor, update: Tensor) -> Tensor:
        """The layer's update of rows `x` at positions `index` from that of its attention."""
        if self.architecture.has_dense_mlp(layer):
            return update
        source = x if self.architecture.is_parallel(layer) else x + update
        mlp = functools.partial(self.architecture.mlp_branch, layer)
        segment = self.config.mlp_segment
        if segment:
            return update + in_segments(mlp, layer, source, segment)
        with hooks(index):
            return update + mlp(source)

    def _dense_mlp_update(
        self, layer: nn.Module, stream: Stream, run: Callable[..., Tensor], hooks: Rows
    ) -> tuple[Tensor, Tensor]:
        """The output of an MLP that works on all rows, from the stream as it is now, and the rows."""
        every_row = torch.arange(stream.x_BSD[..., 0].numel(), device=stream.x_BSD.device)

        def mlp(x: Tensor) -> Tensor:
            with hooks(None):
                return self.architecture.mlp_branch(layer, x)

        return run(mlp, stream.take(every_row)), every_row

    def _select(
        self, layer: Any, x_BSD: Tensor, attention: AttentionOfRows, plan: BlockPlan
    ) -> tuple[Tensor, AttentionInputs | None]:
        """The chosen positions [B, K], and the projections of all rows if the choice needed them."""
        if self.config.resolved_shared_blocks and layer is not self.first:
            if self.shared_index_BK is None:
                raise ValueError(
                    "`shared_blocks` needs the first patched layer, which chooses for all, to run before the "
                    "others in each batch; use shared_blocks=False, or change layers before apply_lemo."
                )
            plan.on_chosen(self.shared_index_BK)
            return self.shared_index_BK, None
        view = LayerView(x_BSD, attention.mask, plan, project=functools.partial(attention.project, x_BSD))
        scores_BN = self.selector.attention_scores(view)
        self.shared_index_BK = select_tokens(scores_BN, valid_tokens(attention.mask), plan, self.config)
        return self.shared_index_BK, view.projected


class _ChosenRows:
    """The chosen rows' way through a layer, which a checkpoint may repeat in the backward pass.

    The first run notes the keys and values of all rows, which the other rows need next.

    Args:
        finish: gets the rows and the attention's update, and returns the layer's; None returns the former.
    """

    def __init__(
        self,
        attention: AttentionOfRows,
        index_BK: Tensor,
        rest_BR: Tensor,
        finish: Callable[[Tensor, Tensor], Tensor] | None,
    ) -> None:
        self.attention, self.index_BK, self.rest_BR, self.finish = attention, index_BK, rest_BR, finish
        self._first_run = True
        self._keys_and_values: tuple[Tensor, Tensor] | None = None

    def __call__(self, x_BKD: Tensor, rest_key_BGRd: Tensor, rest_value_BGRd: Tensor) -> Tensor:
        def attend(query: Tensor, key: Tensor, value: Tensor, **options: Any) -> Tensor:
            keys = merge_heads(key, self.index_BK, rest_key_BGRd, self.rest_BR)
            values = merge_heads(value, self.index_BK, rest_value_BGRd, self.rest_BR)
            if self._first_run:
                self._keys_and_values = keys.detach(), values.detach()
            return self.attention.attend(query, keys, values, self.index_BK, **options)

        update = self.attention.update(x_BKD, self.index_BK, attend)
        return update if self.finish is None else self.finish(x_BKD, update)

    def take_keys_and_values(self) -> tuple[Tensor, Tensor]:
        """Keys and values of all rows, which this object then drops; later runs note nothing."""
        noted, self._keys_and_values, self._first_run = self._keys_and_values, None, False
        assert noted is not None
        return noted
