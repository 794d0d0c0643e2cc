"""A layer's own attention for some of its rows, over the keys and values of all of them.

Used by detached tokens, whose chosen and other rows go through the attention one after the other.

Shapes: B batch, S tokens, T rows of a sample, D hidden width, H query and G key heads of width d.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface

from lemo_trainer.compat import attention_function, attention_implementation
from lemo_trainer.kernels.attention import attend, fits
from lemo_trainer.model.architectures import Architecture
from lemo_trainer.model.capture import AttentionInputs, attention_inputs, dispatching_to
from lemo_trainer.model.hooks import Rows
from lemo_trainer.model.masks import masked_attention
from lemo_trainer.model.rows import take_arguments, take_queries

QUERIES_OF_A_PIECE = 256  # that attend under one mask; fewer skip more keys, more use the cores better

_GIVEN = "lemo_given"


def _attend_as_given(
    module: nn.Module,
    query_BHTd: Tensor,
    key_BGTd: Tensor,
    value_BGTd: Tensor,
    attention_mask: None,
    *,
    lemo_attend: Callable[..., Tensor],
    **options: Any,
) -> tuple[Tensor, None]:
    return lemo_attend(query_BHTd, key_BGTd, value_BGTd, **options), None


AttentionInterface.register(_GIVEN, _attend_as_given)


class AttentionOfRows:
    """The attention of one layer for one batch.

    Args:
        architecture: how the layer is wired.
        layer: the decoder layer.
        attention_mask: as the layer gets it.
        positions: the layer's arguments with one entry a token.
        options: its other arguments.
        fused: whether LeMo's kernel may take the place of SDPA.
        hooks: lets the layer's hooks act on some rows.
    """

    def __init__(
        self,
        architecture: Architecture,
        layer: Any,
        attention_mask: Any,
        positions: dict[str, Any],
        options: dict[str, Any],
        *,
        fused: bool,
        hooks: Rows,
    ) -> None:
        self.hooks = hooks
        self.architecture, self.layer = architecture, layer
        self.positions, self.options = positions, options
        self.attention: Any = architecture.attention_of(layer)
        implementation, self.mask = masked_attention(self.attention, attention_mask)
        self.function = attention_function(self.attention, implementation)
        self.fused = fused and attention_implementation(self.attention.config) == "sdpa"

    def project(self, x_BTD: Tensor, index_BT: Tensor | None = None) -> AttentionInputs:
        """Queries, keys and values of the rows at positions `index_BT`; None is all rows."""
        positions = self.positions if index_BT is None else take_arguments(self.positions, index_BT)
        with self.hooks(index_BT):
            source = self.architecture.attention_input(self.layer, x_BTD)
            return attention_inputs(
                self.attention, source, attention_mask=self.mask, **positions, **self.options
            )

    def attend(
        self, query_BHTd: Tensor, key_BGSd: Tensor, value_BGSd: Tensor, index_BT: Tensor, **options: Any
    ) -> Tensor:
        """The model's attention function for queries at ascending positions `index_BT`: heads [B, T, H, d].

        If the function is SDPA under a plain causal mask and Triton runs, LeMo's kernel computes it.
        Otherwise the queries go in pieces, each with the keys up to its last position, since a causal mask
        hides the others.
        """
        if self.fused and self.mask is None and fits(query_BHTd, value_BGSd, options):
            return attend(query_BHTd, key_BGSd, value_BGSd, index_BT, scaling=options["scaling"])
        if not index_BT.shape[1]:  # thresholds may choose every token, so that no rows are left
            return query_BHTd.transpose(1, 2)[..., : value_BGSd.shape[-1]]
        heads = []
        pieces = query_BHTd.split(QUERIES_OF_A_PIECE, 2), index_BT.split(QUERIES_OF_A_PIECE, 1)
        for query, index in zip(*pieces, strict=True):
            keys = int(index[:, -1].max()) + 1
            mask = take_queries(self.mask, index, keys)
            key, value = key_BGSd[:, :, :keys], value_BGSd[:, :, :keys]
            heads.append(self.function(self.attention, query, key, value, mask, **options)[0])
        return torch.cat(heads, 1)

    def update(self, x_BTD: Tensor, index_BT: Tensor, attend: Callable[..., Tensor]) -> Tensor:
        """The attention's update of rows `x_BTD` at positions `index_BT`, [B, T, D].

        Args:
            attend: gets the rows' queries, keys and values and the attention's options; returns the heads.
        """
        with dispatching_to(self.attention, _GIVEN), self.hooks(index_BT):
            return self.architecture.attention_branch(
                self.layer,
                x_BTD,
                attention_mask=None,
                lemo_attend=attend,
                **take_arguments(self.positions, index_BT),
                **self.options,
            )

    def update_from_heads(self, x_BTD: Tensor, index_BT: Tensor, heads_BTHd: Tensor) -> Tensor:
        """The same update from heads that are known already."""
        if self.architecture.output is None:
            return self.update(x_BTD, index_BT, lambda *qkv, **options: heads_BTHd)
        with self.hooks(index_BT):
            return self.architecture.finish_attention(self.layer, x_BTD, heads_BTHd)
