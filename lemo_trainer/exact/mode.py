"""How the layers of a patched model run in exact mode.

Scheme "layers": each layer is a walk of its own, and its input waits for the backward pass.

Scheme "segments": one walk goes through all layers. The model calls its layers one by one, so all but the
last hand their input on and note how they were called; the last one walks.
"""

from __future__ import annotations

import contextlib
import functools
import operator
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from lemo_trainer.architectures import CausalLM, is_whole
from lemo_trainer.checkpointing import saving_attention, saving_inputs, saving_matmuls
from lemo_trainer.config import LemoConfig, Scheme
from lemo_trainer.exact import recorded
from lemo_trainer.exact.boundaries import saved_in
from lemo_trainer.exact.check import try_layers
from lemo_trainer.exact.layer import LayerCall, segments_of
from lemo_trainer.exact.masks import LazyMask, lazy_masks, made
from lemo_trainer.exact.walk import Walk, walk_through
from lemo_trainer.probe import CACHES, layer_arguments

Forward = Callable[..., Any]


@dataclass
class ExactMode:
    """What the layers of one model share.

    Args:
        config: the configuration in force.
        total_layers: decoder layers of the model.
        uncut: indices of the layers that run over a whole sequence at a time, and why.
        implementation: of the model's attention.
        lazy: the model hands masks to its layers as it got them, so that they may be lazy.
    """

    config: LemoConfig
    total_layers: int
    uncut: dict[int, str]
    implementation: str
    lazy: bool
    calls: list[LayerCall] = field(default_factory=list)

    @classmethod
    def of(cls, parts: CausalLM, config: LemoConfig) -> ExactMode:
        """The mode of the layers of `parts`.

        Raises:
            ValueError: the scheme asked for needs what they lack.
        """
        uncut, lazy = try_layers(parts)
        model = parts.model
        if config.scheme == "segments":
            name = type(model).__name__
            if uncut:
                index, reason = next(iter(uncut.items()))
                raise ValueError(
                    f'scheme="segments" needs layers that keep keys and values alone, got {name}, whose '
                    f'layer {index} does not ({reason}); use scheme="layers".'
                )
            if layerdrop := getattr(model.config, "layerdrop", 0):
                raise ValueError(
                    f'scheme="segments" needs a model that runs all its layers, got {name} with layerdrop '
                    f'{layerdrop}; use scheme="layers".'
                )
            if not all(weight.is_meta or is_whole(weight) for weight in model.parameters()):
                raise ValueError(
                    'scheme="segments" needs whole weights, and these are sharded (FSDP, ZeRO-3); use '
                    'scheme="layers".'
                )
        return cls(config, len(parts.layers), uncut, model.config._attn_implementation, lazy)

    @property
    def notes(self) -> list[str]:
        """Which layers run over a whole sequence at a time."""
        notes = []
        for reason in dict.fromkeys(self.uncut.values()):
            indices = ", ".join(str(index) for index, why in self.uncut.items() if why == reason)
            notes.append(f"layers {indices} run over a whole sample at a time ({reason})")
        return notes

    def masks(self) -> contextlib.AbstractContextManager[None]:
        """The attention masks of a forward pass inside the block are those that exact mode runs with."""
        return lazy_masks(self.implementation) if self.lazy else contextlib.nullcontext()

    def run_layer(
        self, index: int, layer: Any, forward: Forward, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        """The output of layer number `index`; `forward` is its class's own."""
        x_BSD, arguments = layer_arguments(forward, args, kwargs)
        cached = any(arguments.get(name) is not None for name in CACHES if name != "use_cache")
        if not layer.training or not torch.is_grad_enabled() or cached:
            if isinstance(mask := arguments.get("attention_mask"), LazyMask):
                arguments["attention_mask"] = made(mask, x_BSD.shape[1])
                return forward(layer, x_BSD, **arguments)
            return forward(layer, *args, **kwargs)
        _check_constants(arguments)
        if self._scheme(index) == "layers":
            return self._walk_layer(index, layer, forward, x_BSD, arguments)
        return self._walk_all(index, layer, forward, x_BSD, arguments)

    def _scheme(self, index: int) -> Scheme:
        """The scheme of the running forward pass, chosen at its first layer."""
        return "segments" if self.config.scheme == "segments" else "layers"

    def _walk_layer(
        self, index: int, layer: Any, forward: Forward, x_BSD: Tensor, arguments: dict[str, Any]
    ) -> Tensor:
        seq_len = x_BSD.shape[1]
        size = seq_len if index in self.uncut else self.config.segment_tokens
        call = LayerCall(layer, forward, arguments, seq_len)
        walk = Walk([call], segments_of(seq_len, size), keep_heads=False, run=operator.call)
        with saved_in(self.config.boundaries, x_BSD, self.total_layers - index):
            return walk_through(walk, x_BSD)

    def _walk_all(
        self, index: int, layer: Any, forward: Forward, x_BSD: Tensor, arguments: dict[str, Any]
    ) -> Tensor:
        segments = segments_of(x_BSD.shape[1], self.config.segment_tokens)
        run = _recomputing(layer, self.config)
        if len(segments) == 1:
            return run(functools.partial(forward, layer, **arguments), x_BSD)
        if index == 0:
            recorded.check_no_hidden_states()
            self.calls = []
        last = index == self.total_layers - 1
        _check_hooks(layer, "_forward_pre_hooks", index, index == 0)
        _check_hooks(layer, "_forward_hooks", index, last)
        self.calls.append(LayerCall(layer, forward, arguments, x_BSD.shape[1]))
        if not last:
            return x_BSD
        calls, self.calls = self.calls, []
        assert len(calls) == self.total_layers
        return walk_through(Walk(calls, segments, keep_heads=True, run=run), x_BSD)


def _check_hooks(layer: Any, kind: str, index: int, sees_hidden_states: bool) -> None:
    """Raise ValueError for a hook that would be given hidden states which no layer has made."""
    hooks = [hook for hook in getattr(layer, kind).values() if not recorded.is_recording(hook)]
    if hooks and not sees_hidden_states:
        raise ValueError(
            f'scheme="segments" has no hidden states of a whole sample between its layers, got the hook '
            f'{getattr(hooks[0], "__qualname__", hooks[0])} on layer {index}; use scheme="layers".'
        )


def _recomputing(layer: Any, config: LemoConfig) -> Callable[..., Tensor]:
    """What runs a layer with graph, of which it saves all, or less under checkpointing."""
    if vars(layer).get("gradient_checkpointing"):
        return saving_attention if config.save_attention else saving_inputs
    return saving_matmuls if config.selective_checkpointing else operator.call


def _check_constants(arguments: dict[str, Any]) -> None:
    """Raise ValueError for an argument with a gradient: the walk passes on that of the hidden states only."""
    from torch.utils._pytree import tree_leaves

    for name, value in arguments.items():
        if any(isinstance(leaf, Tensor) and leaf.requires_grad for leaf in tree_leaves(value)):
            raise ValueError(
                f'mode="exact" needs layers that get a gradient through their hidden states only, got one '
                f"through `{name}`; train without LeMo."
            )
