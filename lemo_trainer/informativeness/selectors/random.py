"""selector="random": a fresh draw for each choice."""

from __future__ import annotations

import torch
from torch import Tensor

from lemo_trainer.informativeness.selectors.base import LayerView, Selector, register


@register("random")
class RandomSelector(Selector):
    """A uniform draw, by torch's generator of the device."""

    summary = "a fresh draw for each batch"
    modes = ("detach", "eliminate", "segments")

    def attention_scores(self, view: LayerView) -> Tensor:
        return torch.rand(len(view.x_BSD), view.plan.blocks, device=view.x_BSD.device)

    def segment_order(self, segments: int) -> list[int]:
        order: list[int] = torch.randperm(segments).tolist()
        return order
