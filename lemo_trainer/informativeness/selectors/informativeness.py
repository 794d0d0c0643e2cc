"""selector="informativeness": the paper's scores (LeMo, section 3), from the model's own queries and keys."""

from __future__ import annotations

from torch import Tensor

from lemo_trainer.informativeness.scores import attention_map, map_scores, mlp_scores, score_positions
from lemo_trainer.informativeness.selectors.base import LayerView, Selector, register


@register("informativeness")
class InformativenessSelector(Selector):
    """How much later queries look at a block; for an MLP, how large its intermediate activations are."""

    summary = "the paper's scores: how much later queries look at a block"
    searchable = True

    def attention_scores(self, view: LayerView) -> Tensor:
        map_BMN = self.exact_map(view)
        return map_scores(map_BMN, causal_scores=self.config.causal_scores)

    def exact_map(self, view: LayerView) -> Tensor:
        """I(m, n) from the queries that `attention_score_tokens` samples, [B, M, N] float32."""
        queries = self.config.attention_score_tokens
        return attention_map(view.attention_inputs(), view.mask_B1SS, view.plan.block_size, queries)

    def mlp_scores(self, view: LayerView) -> Tensor:
        plan, valid_BS = view.plan, view.valid_BS
        sampled_P = score_positions(
            plan.blocks, plan.block_size, self.config.mlp_score_tokens, device=view.x_BSD.device
        )
        valid_BP = None if valid_BS is None else valid_BS[:, sampled_P]
        return mlp_scores(view.mlp_intermediate(sampled_P), valid_BP, plan.blocks)
