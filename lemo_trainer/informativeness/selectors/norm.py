"""selector="norm": a control that looks at the residual stream only."""

from __future__ import annotations

import torch
from torch import Tensor

from lemo_trainer.informativeness.selection import whole_blocks
from lemo_trainer.informativeness.selectors.base import LayerView, Selector, register


@register("norm")
class NormSelector(Selector):
    """The mean length of a block's hidden states; padding counts as 0."""

    summary = "the length of the hidden states"
    searchable = True

    def attention_scores(self, view: LayerView) -> Tensor:
        norm_BNb = whole_blocks(view.x_BSD, view.plan).norm(dim=-1, dtype=torch.float32)
        if view.valid_BS is not None:
            norm_BNb = norm_BNb * whole_blocks(view.valid_BS, view.plan)
        return norm_BNb.mean(-1)
