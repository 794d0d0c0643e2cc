"""What transformers records inside a decoder layer: router logits, of which a loss may be made.

transformers' hooks append to the collector of the running forward pass. Inside a walk they append to a
collector of its own, so that the walk can hand the results on as outputs with a gradient.

Shapes: B batch, S tokens of the sequence, n tokens of a segment.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from transformers.utils.output_capturing import _active_collector, install_output_capuring_hook

_OF_LAYERS = ("hidden_states", "_hidden_states_layers")  # recorded from a layer's output, not inside it


def recorded_names() -> tuple[str, ...]:
    """What the running forward pass asks the parts of a layer for.

    Raises:
        ValueError: attention weights, which no segment has whole.
    """
    names = tuple(name for name in _active_collector.get() or () if name not in _OF_LAYERS)
    if refused := [name for name in names if "attentions" in name]:
        raise ValueError(
            f'mode="exact" computes attention in segments and keeps no attention weights, got a request for '
            f"{', '.join(refused)}; leave `output_attentions` out or train without LeMo."
        )
    return names


def wants_hidden_states() -> bool:
    """Whether the running forward pass asks for the hidden states between the layers."""
    return "hidden_states" in (_active_collector.get() or ())


def is_recording(hook: Callable[..., Any]) -> bool:
    """Whether a forward hook is one of transformers' own, which record where they are asked to."""
    return getattr(hook, "__qualname__", "").startswith(install_output_capuring_hook.__qualname__)


@contextlib.contextmanager
def recording(names: tuple[str, ...]) -> Iterator[dict[str, list[Tensor]]]:
    """Collects what is recorded under `names` inside the block."""
    collected: dict[str, list[Tensor]] = {name: [] for name in names}
    token = _active_collector.set(collected)
    try:
        yield collected
    finally:
        _active_collector.reset(token)


def hand_on(names: list[str], recorded: list[Tensor]) -> None:
    """Append to the collector of the running forward pass."""
    collected = _active_collector.get()
    for name, value in zip(names, recorded, strict=True):
        collected[name].append(value)


def join(parts: list[Tensor], batch: int) -> Tensor:
    """What the segments of a sequence recorded, [B * n, ...] or [B, n, ...] each, as one recording of it."""
    if len(parts) == 1:
        return parts[0]
    whole = torch.cat([part.reshape(batch, -1, *_rest(part, batch)) for part in parts], 1)
    return whole if _is_batched(parts[0], batch) else whole.flatten(0, 1)


def part_of(whole: Tensor, like: Tensor, batch: int, start: int, stop: int) -> Tensor:
    """The part of a recording, or of its gradient, that belongs to the tokens `start` to `stop`."""
    if whole.shape == like.shape:
        return whole
    return whole.reshape(batch, -1, *_rest(like, batch))[:, start:stop].reshape(like.shape)


def _is_batched(part: Tensor, batch: int) -> bool:
    return part.ndim > 2 and part.shape[0] == batch


def _rest(part: Tensor, batch: int) -> torch.Size:
    return part.shape[2:] if _is_batched(part, batch) else part.shape[1:]
