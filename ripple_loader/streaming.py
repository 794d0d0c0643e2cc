"""The module that takes an MLP's place: no parameters, its neurons come from the engine.

Dimension key: T tokens, U neurons of a batch, H hidden.
"""

from __future__ import annotations

from contextlib import closing
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ripple_loader.architectures import MLPSite
from ripple_loader.engine import Engine


class StreamingMLP(nn.Module):
    """Computes an MLP with the neurons that its input needs, batch by batch as they arrive.

    Args:
        engine: shared by all layers of a model.
        layer: which MLP this is.
        activation: the model's own.
    """

    def __init__(self, engine: Engine, layer: int, activation: nn.Module) -> None:
        super().__init__()
        self.engine, self.layer, self.activation = engine, layer, activation

    def forward(self, hidden_states: Tensor) -> Tensor:
        """Hidden states to hidden states, shape (..., H), for inference only."""
        return _InferenceOnly.apply(hidden_states, self)

    def extra_repr(self) -> str:
        header = self.engine.header
        return f"layer={self.layer}, neurons={header.neurons}, hidden={header.hidden}"

    def compute(self, x_TH: Tensor) -> Tensor:
        """The MLP's output for T tokens, shape (T, H)."""
        engine, layer, last = self.engine, self.layer, self.engine.header.rows - 1
        selection = engine.select(layer, x_TH, self.activation)
        y_TH = torch.zeros_like(x_TH, dtype=torch.float32)
        with closing(engine.fetch(layer, selection.places)) as batches:
            for batch, rows in batches:
                *selecting, down_UH = rows.to(x_TH.device).view(len(rows), -1).chunk(last + 1, dim=1)
                places = torch.from_numpy(selection.places[batch])
                factors = [
                    F.linear(x_TH, weight_UH, engine.bias(layer, row)[places].to(x_TH))
                    for row, weight_UH in enumerate(selecting)
                ]
                a_TU = self.activation(factors[0])
                for factor_TU in factors[1:]:
                    a_TU = a_TU * factor_TU
                if selection.mask is not None:
                    a_TU = a_TU * selection.mask[:, torch.from_numpy(batch)].to(a_TU.device)
                y_TH += a_TU @ down_UH
        return (y_TH + engine.bias(layer, last).to(y_TH.device)).to(x_TH.dtype)


class _InferenceOnly(torch.autograd.Function):
    """Refuses a backward pass: the weights it would need are gone by then."""

    @staticmethod
    def forward(ctx: Any, hidden_states: Tensor, mlp: StreamingMLP) -> Tensor:
        x_TH = hidden_states.reshape(-1, hidden_states.shape[-1])
        engine = mlp.engine
        with engine.lock:
            if mlp.layer == 0:
                engine.report.tokens += len(x_TH)
            return mlp.compute(x_TH).view(hidden_states.shape)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        raise RuntimeError(
            "a model streamed by Ripple should only run forward, but backward was called: "
            "load it without `quantization_config` to train it."
        )


def stream(model: nn.Module, sites: list[MLPSite], engine: Engine) -> None:
    """Replace the MLPs of a model and hang the engine's report on it as `model.ripple_report`."""
    for layer, site in enumerate(sites):
        site.replace(model, StreamingMLP(engine, layer, site.activation))
    model.ripple_report = engine.report
