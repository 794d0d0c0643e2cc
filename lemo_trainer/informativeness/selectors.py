"""Attention's block scores in a layer: the model's own queries and keys, a predictor's, or a control's.

Shapes: B batch, S tokens, N whole blocks, D hidden width.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from lemo_trainer.config import LemoConfig
from lemo_trainer.informativeness.predictors import PatternPredictors
from lemo_trainer.informativeness.scores import attention_map, map_scores
from lemo_trainer.informativeness.selection import BlockPlan, cheap_scores
from lemo_trainer.model.capture import AttentionInputs
from lemo_trainer.model.masks import valid_tokens


@dataclass(frozen=True)
class BlockScorer:
    """Scores of the whole blocks for the choice of a layer.

    Args:
        config: the selector and its options.
        predictors: the trained predictors of `selector="predictor"`, else None.
    """

    config: LemoConfig
    predictors: PatternPredictors | None = None

    def __call__(
        self,
        layer: Any,
        x_BSD: Tensor,
        mask_B1SS: Tensor | None,
        plan: BlockPlan,
        project: Callable[[], AttentionInputs],
    ) -> tuple[Tensor, AttentionInputs | None]:
        """The scores [B, N], and the queries, keys and values of all tokens where the scores needed them.

        Args:
            layer: a patched decoder layer.
            x_BSD: the residual stream in front of it.
            project: makes the queries, keys and values of all tokens.
        """
        selector, causal = self.config.resolved_selector, self.config.causal_scores
        if not self.config.scores_text:
            return cheap_scores(selector, x_BSD, valid_tokens(mask_B1SS), plan), None
        predictors = self.predictors
        if predictors is not None and not predictors.needs_exact(layer._lemo_index):
            map_BMN = predictors.pooled_map(layer._lemo_index, x_BSD, mask_B1SS)
            return map_scores(map_BMN, causal_scores=causal), None
        inputs = project()
        map_BMN = attention_map(inputs, mask_B1SS, plan.block_size, self.config.attention_score_tokens)
        if predictors is not None:
            predictors.refresh(layer._lemo_index, x_BSD, mask_B1SS, map_BMN, plan.kept_blocks)
        return map_scores(map_BMN, causal_scores=causal), inputs
