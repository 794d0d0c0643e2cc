"""How the layers of a patched model run in exact mode.

Scheme "layers": each layer is a walk of its own, and its input waits for the backward pass. Scheme "segments":
one walk goes through all layers. The model calls its layers one by one, so all but the last hand their input
on and note how they were called; the last one walks.
"""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from lemo_trainer.architectures import CausalLM, is_whole
from lemo_trainer.checkpointing import saving_attention, saving_inputs, saving_matmuls
from lemo_trainer.config import LemoConfig
from lemo_trainer.exact.boundaries import saved_in
from lemo_trainer.exact.check import uncut_layers
from lemo_trainer.exact.layer import LayerCall, Segment, segments_of
from lemo_trainer.exact.walk import Walk, walk_through
from lemo_trainer.probe import CACHES, layer_arguments


@dataclass
class ExactMode:
    """What the layers of one model share.

    Args:
        config: the configuration in force.
        total_layers: decoder layers of the model.
        uncut: indices of the layers that run over a whole sequence at a time, and why.
    """

    config: LemoConfig
    total_layers: int
    uncut: dict[int, str]
    calls: list[LayerCall] = field(default_factory=list)

    @classmethod
    def of(cls, parts: CausalLM, config: LemoConfig) -> ExactMode:
        """The mode of the layers of `parts`.

        Raises:
            ValueError: the scheme asked for needs what they lack.
        """
        uncut = uncut_layers(parts)
        model = parts.model
        if config.scheme == "segments":
            name = type(model).__name__
            if uncut:
                index, reason = next(iter(uncut.items()))
                raise ValueError(
                    f'scheme="segments" needs layers that keep keys and values alone, got {name}, whose layer '
                    f'{index} does not ({reason}); use scheme="layers".'
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
        return cls(config, len(parts.layers), uncut)

    @property
    def notes(self) -> list[str]:
        """Which layers run over a whole sequence at a time."""
        notes = []
        for reason in dict.fromkeys(self.uncut.values()):
            indices = ", ".join(str(index) for index, why in self.uncut.items() if why == reason)
            notes.append(f"layers {indices} run over a whole sample at a time ({reason})")
        return notes

    def run_layer(
        self, index: int, layer: Any, forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        """The output of layer number `index`; `forward` is its class's own."""
        x_BSD, arguments = layer_arguments(forward, args, kwargs)
        cached = any(arguments.get(name) is not None for name in CACHES if name != "use_cache")
        if not layer.training or not torch.is_grad_enabled() or cached:
            return forward(layer, *args, **kwargs)
        _check_constants(arguments)
        seq_len = x_BSD.shape[1]
        call = LayerCall(layer, forward, arguments, seq_len)
        if self.config.scheme != "segments":
            whole = [Segment(0, seq_len, seq_len)]
            segments = whole if index in self.uncut else segments_of(seq_len, self.config.segment_tokens)
            walk = Walk([call], segments, keep_heads=False, run=operator.call)
            with saved_in(self.config.boundaries, x_BSD, self.total_layers - index):
                return walk_through(walk, x_BSD)
        segments = segments_of(seq_len, self.config.segment_tokens)
        if len(segments) == 1:
            return _recomputing(layer, self.config)(functools.partial(forward, layer, **arguments), x_BSD)
        if index == 0:
            self.calls = []
        self.calls.append(call)
        if index < self.total_layers - 1:
            return x_BSD
        calls, self.calls = self.calls, []
        assert len(calls) == self.total_layers
        return walk_through(Walk(calls, segments, keep_heads=True, run=_recomputing(layer, self.config)), x_BSD)


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
