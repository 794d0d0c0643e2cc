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
from transformers import AttentionInterface

from lemo_trainer.config import LemoConfig
from lemo_trainer.informativeness.scores import QUERY_ROWS
from lemo_trainer.informativeness.selection import BlockPlan, select_tokens
from lemo_trainer.informativeness.selectors import BlockScorer
from lemo_trainer.kernels.attention import attend, fits
from lemo_trainer.kernels.mlp import in_segments
from lemo_trainer.kernels.rows import gather
from lemo_trainer.layers.checkpointing import without_graph
from lemo_trainer.layers.stream import Streams
from lemo_trainer.model.architectures import Architecture
from lemo_trainer.model.capture import AttentionInputs, attention_function, attention_inputs, without_dropout
from lemo_trainer.model.masks import attention_interface, masked_attention, valid_tokens
from lemo_trainer.model.rows import flat_rows, merge_heads, other_positions, take_arguments, take_queries

_KEPT = "lemo_kept"


def _attend_kept(
    module: nn.Module,
    query_BHKd: Tensor,
    key_BGKd: Tensor,
    value_BGKd: Tensor,
    attention_mask: None,
    *,
    lemo_attend: Callable[..., Tensor],
    **options: Any,
) -> tuple[Tensor, None]:
    return lemo_attend(query_BHKd, key_BGKd, value_BGKd, **options), None


AttentionInterface.register(_KEPT, _attend_kept)


def _attend(
    attention: nn.Module,
    function: Callable[..., tuple[Tensor, Any]],
    fused: bool,
    mask_B1SS: Tensor | None,
    query_BHKd: Tensor,
    key_BGSd: Tensor,
    value_BGSd: Tensor,
    index_BK: Tensor,
    **options: Any,
) -> Tensor:
    """The attention function of the model for queries at positions `index_BK`: heads [B, K, H, d].

    Where it is SDPA under a plain causal mask, and Triton runs, LeMo's kernel takes its place. Else the
    ascending queries go in pieces, each with the keys up to its last position: under a causal mask the others
    would be computed in vain.
    """
    if fused and mask_B1SS is None and fits(query_BHKd, value_BGSd, options):
        return attend(query_BHKd, key_BGSd, value_BGSd, index_BK, scaling=options["scaling"])
    heads = []
    for query, index in zip(query_BHKd.split(QUERY_ROWS, 2), index_BK.split(QUERY_ROWS, 1), strict=True):
        keys = int(index[:, -1].max()) + 1
        mask = take_queries(mask_B1SS, index, keys)
        key, value = key_BGSd[:, :, :keys], value_BGSd[:, :, :keys]
        heads.append(function(attention, query, key, value, mask, **options)[0])
    return torch.cat(heads, 1)


class DetachingLayer:
    """One decoder layer in which only chosen tokens carry gradient.

    Args:
        architecture: how the layer is wired.
        config: which tokens are chosen.
        scorer: makes the scores of the choice.
        first: the layer that chooses for all when blocks are shared.
        streams: what hands the residual stream from layer to layer.
    """

    def __init__(
        self,
        architecture: Architecture,
        config: LemoConfig,
        scorer: BlockScorer,
        first: nn.Module,
        streams: Streams | None = None,
    ) -> None:
        self.architecture = architecture
        self.config = config
        self.scorer = scorer
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
        seq_len = x_BSD.shape[1]
        architecture = self.architecture
        attention = architecture.attention_of(layer)
        implementation, mask = masked_attention(attention, attention_mask)
        fused = self.config.fused_kernels and attention.config._attn_implementation == "sdpa"
        function = attention_interface(attention, implementation)
        attend_rows = functools.partial(_attend, attention, function, fused, mask)

        def project(x_BTD: Tensor, positions: dict[str, Any]) -> AttentionInputs:
            return attention_inputs(
                attention,
                architecture.attention_input(layer, x_BTD),
                attention_mask=mask,
                **positions,
                **kwargs,
            )

        with without_graph():
            project_all = functools.partial(project, x_BSD, positions)
            index_BK, everything = self._select(layer, x_BSD, mask, plan, project_all)
            rest_BR = other_positions(index_BK, seq_len)
            rest_rows = flat_rows(rest_BR, seq_len)
            x_BRD = gather(x_BSD, rest_rows)
            if everything is None:
                rest = project(x_BRD, take_arguments(positions, rest_BR))
            else:
                rest = everything.take(rest_BR)
            del everything

        def attention_update(x_BTD: Tensor, index_BT: Tensor, lemo_attend: Callable[..., Tensor]) -> Tensor:
            with attention_function(attention, _KEPT):
                return architecture.attention_branch(
                    layer,
                    x_BTD,
                    attention_mask=None,
                    lemo_attend=lemo_attend,
                    **take_arguments(positions, index_BT),
                    **kwargs,
                )

        first_run, complete = True, None  # and the keys and values of all rows, which it makes

        def kept(x_BKD: Tensor, rest_key_BGRd: Tensor, rest_value_BGRd: Tensor) -> Tensor:
            def lemo_attend(query: Tensor, key: Tensor, value: Tensor, **options: Any) -> Tensor:
                nonlocal complete
                keys = merge_heads(key, index_BK, rest_key_BGRd, rest_BR)
                values = merge_heads(value, index_BK, rest_value_BGRd, rest_BR)
                if first_run:
                    complete = keys.detach(), values.detach()
                return attend_rows(query, keys, values, index_BK, **options)

            update = attention_update(x_BKD, index_BK, lemo_attend)
            return update if self.config.mlp_segment else self._with_mlp(layer, x_BKD, update)

        stream = self.streams.enter(layer, x_BSD)
        rows = flat_rows(index_BK, seq_len)
        x_BKD = stream.take(rows)
        update = run(kept, x_BKD, rest.key, rest.value)
        if self.config.mlp_segment:  # it recomputes by itself
            update = self._with_mlp(layer, x_BKD, update)
        first_run = False
        assert complete is not None
        with without_graph(), without_dropout(layer):
            heads = attend_rows(rest.query, *complete, rest_BR, scaling=rest.scaling, **rest.options)
            complete = None
            if architecture.output is None:
                constant = attention_update(x_BRD, rest_BR, lambda *args, **options: heads)
            else:
                constant = architecture.finish_attention(layer, x_BRD, heads)
            constant = self._with_mlp(layer, x_BRD, constant)

        def mlp_of_all() -> tuple[Tensor, Tensor]:
            """The output of an MLP that works on all rows, from the stream as it is now, and the rows."""
            everything = torch.arange(x_BSD[..., 0].numel(), device=x_BSD.device)
            mlp = functools.partial(architecture.mlp_branch, layer)
            return run(mlp, stream.take(everything)), everything

        dense, parallel = architecture.has_dense_mlp(layer), architecture.is_parallel(layer)
        updates = [(constant, rest_rows), (update, rows)]
        if dense and parallel:
            updates.append(mlp_of_all())
        for each in updates:
            stream.add(*each)
        if dense and not parallel:
            stream.add(*mlp_of_all())
        return self.streams.leave(layer, stream)

    def _with_mlp(self, layer: nn.Module, x: Tensor, update: Tensor) -> Tensor:
        """The layer's update of rows `x` from that of its attention."""
        if self.architecture.has_dense_mlp(layer):
            return update
        source = x if self.architecture.is_parallel(layer) else x + update
        mlp = functools.partial(self.architecture.mlp_branch, layer)
        segment = self.config.mlp_segment
        return update + (in_segments(mlp, source, segment) if segment else mlp(source))

    def _select(
        self,
        layer: Any,
        x_BSD: Tensor,
        mask: Tensor | None,
        plan: BlockPlan,
        project: Callable[[], AttentionInputs],
    ) -> tuple[Tensor, AttentionInputs | None]:
        """The chosen positions [B, K], and what `project` made where the choice needed it."""
        inputs = None
        if layer is self.first or not self.config.resolved_shared_blocks:
            scores_BN, inputs = self.scorer(layer, x_BSD, mask, plan, project)
            self.shared_index_BK = select_tokens(scores_BN, valid_tokens(mask), plan, self.config)
        else:
            assert self.shared_index_BK is not None
            plan.on_chosen(self.shared_index_BK)
        return self.shared_index_BK, inputs
