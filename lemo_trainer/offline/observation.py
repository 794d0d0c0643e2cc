"""Inputs of a frozen model's layers and their exact block maps, to train predictors on."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lemo_trainer.config import LemoConfig
from lemo_trainer.informativeness.scores import attention_map
from lemo_trainer.layers.wiring import find_wiring
from lemo_trainer.model.architectures import find_causal_lm
from lemo_trainer.model.calls import layer_arguments, split_arguments
from lemo_trainer.model.capture import attention_inputs
from lemo_trainer.model.masks import masked_attention


class _Enough(Exception):  # noqa: N818 - carries no error
    """Leaves the forward pass after the last observed layer."""


@dataclass(frozen=True)
class LayerInput:
    """The input of a decoder layer, and the exact block map of its attention.

    Args:
        index: number of the layer.
        hidden: the residual stream in front of the layer, [B, S, D].
        mask: the layer's attention mask, [B, 1, S, S] or None.
        exact_map: I(m, n) from all queries, [B, M, N].
    """

    index: int
    hidden: Tensor
    mask: Tensor | None
    exact_map: Tensor


class Observer:
    """Runs a frozen model and returns the inputs of its layers.

    Args:
        model: a causal LM, plain or wrapped.
        config: block size and layers.

    Raises:
        ValueError: no layer of the model can leave tokens out.
    """

    def __init__(self, model: nn.Module, config: LemoConfig) -> None:
        self.parts, self.config = find_causal_lm(model), config
        self.wiring = find_wiring(self.parts)
        total = len(self.parts.layers)
        self.layers = tuple(i for i in config.resolve_layers(total) if i not in self.wiring.dense_layers)
        if not self.layers:
            raise ValueError(f"`layers` must name a layer that can leave tokens out, got {config.layers!r}.")

    @torch.no_grad()
    def __call__(self, batch: Mapping[str, Any]) -> list[LayerInput]:
        """The observed layers' inputs and exact maps for one batch, a mapping of the model's arguments."""
        seen: list[LayerInput] = []
        with contextlib.ExitStack() as hooks:
            for index in self.layers:
                layer = self.parts.layers[index]
                hook = self._hook(index, seen)
                hooks.callback(layer.register_forward_pre_hook(hook, with_kwargs=True).remove)
            hooks.enter_context(contextlib.suppress(_Enough))
            hooks.enter_context(_evaluation(self.parts.model))
            self.parts.model(**{**batch, "use_cache": False})
        return seen

    def _hook(self, index: int, seen: list[LayerInput]) -> Any:
        architecture = self.wiring.architecture
        block_size = self.config.block_size

        def observe(layer: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            x_BSD, arguments = layer_arguments(type(layer).forward, args, kwargs)
            mask, positions, options = split_arguments(arguments)
            attention = architecture.attention_of(layer)
            mask = masked_attention(attention, mask)[1]
            source_BSD = architecture.attention_input(layer, x_BSD)
            inputs = attention_inputs(attention, source_BSD, attention_mask=mask, **positions, **options)
            seen.append(LayerInput(index, x_BSD, mask, attention_map(inputs, mask, block_size, block_size)))
            if index == self.layers[-1]:
                raise _Enough

        return observe


@contextlib.contextmanager
def _evaluation(model: nn.Module) -> Iterator[None]:
    training = [part for part in model.modules() if part.training]
    model.eval()
    try:
        yield
    finally:
        for part in training:
            part.training = True
