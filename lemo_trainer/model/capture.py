"""Reads the model's own queries, keys, values and MLP intermediates out of the middle of a layer.

The model's modules run without gradient and dropout, up to the point where the wanted tensors exist.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface

from lemo_trainer.compat import set_attention_implementation
from lemo_trainer.model.architectures import Architecture
from lemo_trainer.model.rows import take_heads

_CAPTURE = "lemo_capture"


class _Captured(Exception):  # noqa: N818 - carries a result, not an error
    """Leaves a module's forward as soon as the wanted tensors exist."""


@dataclass(frozen=True)
class AttentionInputs:
    """The arguments that a model's attention passes to its attention function.

    Query is [B, H, S, d], key and value are [B, G, S, d]; `scaling` is the factor on their products.
    """

    query: Tensor
    key: Tensor
    value: Tensor
    scaling: float
    options: dict[str, Any]

    def take(self, index_BK: Tensor) -> AttentionInputs:
        """The inputs at positions [B, K] only."""
        query, key, value = (take_heads(x, index_BK) for x in (self.query, self.key, self.value))
        return dataclasses.replace(self, query=query, key=key, value=value)


def _capture_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Any,
    *,
    scaling: float,
    **options: Any,
) -> None:
    raise _Captured(AttentionInputs(query, key, value, scaling, options))


AttentionInterface.register(_CAPTURE, _capture_attention)


@contextlib.contextmanager
def dispatching_to(attention: Any, name: str) -> Iterator[None]:
    """Let an attention module dispatch to the registered attention function `name`."""
    config = attention.config
    attention.config = copy.copy(config)
    set_attention_implementation(attention.config, name)
    try:
        yield
    finally:
        attention.config = config


@contextlib.contextmanager
def without_dropout(module: nn.Module) -> Iterator[None]:
    """Run `module` in evaluation mode, and restore the mode of every part afterwards.

    Linear projections keep their mode: nothing in them is random, and those of bitsandbytes repack their
    weights for inference when they run in evaluation mode.
    """
    training = [part for part in module.modules() if part.training and not isinstance(part, nn.Linear)]
    for part in training:
        part.training = False
    try:
        yield
    finally:
        for part in training:
            part.training = True


@torch.no_grad()
def attention_inputs(attention: Any, x_BSD: Tensor, **kwargs: Any) -> AttentionInputs:
    """The arguments that `attention` passes to its attention function, without gradient and dropout.

    Args:
        attention: an attention module that dispatches through transformers' `AttentionInterface`.
        x_BSD: its input.
        kwargs: its other arguments (position embeddings, mask).
    """
    try:
        with dispatching_to(attention, _CAPTURE), without_dropout(attention):
            attention(x_BSD, **kwargs)
    except _Captured as captured:
        inputs: AttentionInputs = captured.args[0]
        return inputs
    raise AssertionError(f"{type(attention).__name__} does not dispatch through AttentionInterface.")


@torch.no_grad()
def dispatches(attention: Any, layer: nn.Module, x_BSD: Tensor, **kwargs: Any) -> bool:
    """Whether `attention`, a part of `layer`, calls transformers' `AttentionInterface`."""
    try:
        with dispatching_to(attention, _CAPTURE), without_dropout(layer):
            layer(x_BSD, **kwargs)
    except _Captured:
        return True
    return False


@torch.no_grad()
def mlp_intermediate(architecture: Architecture, layer: nn.Module, x_BSD: Tensor) -> Tensor:
    """The input of the MLP's last projection for rows of the residual stream: [B, S, intermediate width]."""
    assert architecture.down_proj is not None

    def capture(module: nn.Module, args: tuple[Tensor, ...]) -> None:
        raise _Captured(args[0])

    hook = layer.get_submodule(architecture.down_proj).register_forward_pre_hook(capture, prepend=True)
    try:
        with without_dropout(layer):
            architecture.run_mlp(layer, architecture.mlp_input(layer, x_BSD))
    except _Captured as captured:
        return captured.args[0]
    finally:
        hook.remove()
    raise AssertionError(f"{type(layer).__name__} does not call its {architecture.down_proj}.")
