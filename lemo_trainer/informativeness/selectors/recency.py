"""selector="recency": later blocks first."""

from __future__ import annotations

import torch
from torch import Tensor

from lemo_trainer.informativeness.selectors.base import LayerView, Selector, register


@register("recency")
class RecencySelector(Selector):
    """The position of a block in its sequence."""

    summary = "later blocks first"
    modes = ("detach", "eliminate", "segments")

    def attention_scores(self, view: LayerView) -> Tensor:
        positions_N = torch.arange(view.plan.blocks, dtype=torch.float32, device=view.x_BSD.device)
        return positions_N.expand(len(view.x_BSD), -1)

    def segment_order(self, segments: int) -> list[int]:
        return list(range(segments))
