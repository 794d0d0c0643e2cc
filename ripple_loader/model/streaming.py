"""Modules that replace MLPs and have no parameters: a backend computes with neurons from elsewhere.

They are opaque to torch.compile: a compiled model has a graph break at each. Import this file only when a
model is loaded, because `torch.compiler.disable` imports Dynamo.

Dimension key: T tokens, H hidden, K experts a token is routed to.
"""

from __future__ import annotations

from typing import Any, Protocol

import torch
from torch import Tensor, nn

from ripple_loader.model.architectures import MLPSite


class Backend(Protocol):
    """Computes the streamed MLPs of a model, numbered as they run: `online.engine.Engine` or the tracer."""

    def compute(self, layer: int, x_TH: Tensor, activation: nn.Module, following: int | None) -> Tensor:
        """An MLP's output for T tokens; `following` is the MLP that runs next, if it is known."""

    def begin(self, tokens: int) -> None:
        """Called when a forward call of `tokens` tokens reaches the first streamed layer."""


class StreamingMLP(nn.Module):
    """Computes an MLP with neurons that are not parameters.

    Args:
        backend: shared by all layers of a model.
        layer: which MLP this is.
        following: the MLP that runs after it.
        activation: the model's own.
    """

    def __init__(self, backend: Backend, layer: int, following: int, activation: nn.Module) -> None:
        super().__init__()
        self.backend, self.layer, self.following, self.activation = backend, layer, following, activation

    @torch.compiler.disable
    def forward(self, hidden_states: Tensor) -> Tensor:
        """Hidden states to hidden states, shape (..., H), for inference only."""
        return _InferenceOnly.apply(hidden_states, self)

    def extra_repr(self) -> str:
        return f"layer={self.layer}"

    def compute(self, hidden_states: Tensor) -> Tensor:
        x_TH = hidden_states.reshape(-1, hidden_states.shape[-1])
        if self.layer == 0:
            self.backend.begin(len(x_TH))
        y_TH = self.backend.compute(self.layer, x_TH, self.activation, self.following)
        return y_TH.view(hidden_states.shape)


class StreamingExperts(nn.Module):
    """Computes the routed experts of a layer; it does not read experts that no token is routed to.

    Args:
        backend: shared by all layers of a model.
        first: number of the layer's first expert among all streamed MLPs.
        experts: how many experts the layer has.
        activation: the model's own.
    """

    def __init__(self, backend: Backend, first: int, experts: int, activation: nn.Module) -> None:
        super().__init__()
        self.backend, self.first, self.experts, self.activation = backend, first, experts, activation

    @torch.compiler.disable
    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """Sum of the routed experts' outputs, shape (T, H), for inference only.

        Args:
            hidden_states: shape (T, H).
            top_k_index: the experts of each token, shape (T, K); numbers from `experts` on are no expert.
            top_k_weights: the factor of each of their outputs, shape (T, K).
        """
        return _InferenceOnly.apply(hidden_states, self, top_k_index, top_k_weights)

    def extra_repr(self) -> str:
        return f"first={self.first}, experts={self.experts}"

    def compute(self, x_TH: Tensor, index_TK: Tensor, weights_TK: Tensor) -> Tensor:
        if self.first == 0:
            self.backend.begin(len(x_TH))
        y_TH = torch.zeros_like(x_TH)
        routed = [expert for expert in index_TK.unique().tolist() if expert < self.experts]
        for expert, following in zip(routed, [*routed[1:], None], strict=True):
            tokens, rank = torch.where(index_TK == expert)
            out = self.backend.compute(
                self.first + expert,
                x_TH[tokens],
                self.activation,
                None if following is None else self.first + following,
            )
            y_TH.index_add_(0, tokens, (out * weights_TK[tokens, rank, None]).to(y_TH.dtype))
        return y_TH


class _InferenceOnly(torch.autograd.Function):
    """Refuses a backward pass, which would need weights that are no longer in memory."""

    @staticmethod
    def forward(ctx: Any, hidden_states: Tensor, module: Any, *more: Tensor) -> Tensor:
        return module.compute(hidden_states, *more)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        raise RuntimeError(
            "a model streamed by Ripple must only run forward, but backward was called: "
            "load it without `quantization_config` to train it."
        )


def is_streamed(model: nn.Module) -> bool:
    """Whether MLPs of a model are streamed already."""
    return any(isinstance(module, StreamingMLP | StreamingExperts) for module in model.modules())


def stream(model: nn.Module, sites: list[MLPSite], backend: Backend) -> None:
    """Replace the MLPs of a model."""
    for number, site in enumerate(sites):
        module: nn.Module
        if site.experts is not None:
            module = StreamingExperts(backend, number * site.experts, site.experts, site.activation)
        else:
            module = StreamingMLP(backend, number, (number + 1) % len(sites), site.activation)
        site.replace(model, module)
