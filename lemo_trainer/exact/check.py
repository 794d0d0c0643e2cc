"""Which layers can run in segments: tried out on a few tokens."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import statistics
import threading
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lemo_trainer.compat import attention_implementation, is_whole
from lemo_trainer.exact.choice import LayerBytes
from lemo_trainer.exact.layer import LayerCall, Segment, segments_of
from lemo_trainer.exact.masks import lazy_masks
from lemo_trainer.exact.walk import Run
from lemo_trainer.measure import ActivationBytes
from lemo_trainer.model.architectures import ARCHITECTURES, REFUSED, CausalLM
from lemo_trainer.model.calls import CACHES, dry_options, idle_layers
from lemo_trainer.model.capture import without_dropout
from lemo_trainer.model.hooks import without_hooks

TOKENS = 8  # of each of two samples
SEGMENT = 3  # of the 8 tokens: two whole segments and a shorter one
_STATE = "their state is more than keys and values of attention"


@dataclass(frozen=True)
class Trial:
    """How a model's layers run in exact mode.

    Args:
        uncut: the layers that must run over a whole sequence at a time, by index, and why.
        lazy_masks: the model hands masks to its layers as it got them, so that they may be lazy.
        layer_bytes: what a token takes in a layer, on average; None where it could not be measured.
    """

    uncut: dict[int, str]
    lazy_masks: bool
    layer_bytes: LayerBytes | None = None


def try_layers(parts: CausalLM, run: Run) -> Trial:
    """Run every kind of layer on eight tokens in segments and whole, with and without padding.

    Where the weights are not whole (on the meta device, sharded), the table of known architectures decides.

    Args:
        run: what calls a layer in scheme "segments", for the measurement of its bytes.

    Raises:
        ValueError: the layers do not turn hidden states into hidden states.
    """
    model_type = parts.model.config.model_type
    known = model_type in ARCHITECTURES
    if model_type in REFUSED:
        return Trial(dict.fromkeys(range(len(parts.layers)), REFUSED[model_type]), False)
    if not all(map(is_whole, parts.model.parameters())):
        reason = f"the layers of {model_type} cannot be tried out with weights that are not whole"
        return Trial({} if known else dict.fromkeys(range(len(parts.layers)), reason), known)
    with contextlib.suppress(Exception):  # the model computes with its masks before the layers get them
        return _try(parts, run, lazy=True)
    return _try(parts, run, lazy=False)


_STANCE = threading.Lock()


def _try(parts: CausalLM, run: Run, lazy: bool) -> Trial:
    runs: dict[str, bool] = {}
    sizes: dict[str, LayerBytes] = {}
    # Nothing is worth compiling (flex attention) for 8 tokens. The stance is the whole process's: threads
    # would restore each other's.
    with _STANCE, torch.compiler.set_stance("force_eager"):
        for padding in (0, 2):  # of two samples, one is padded
            for layer, (x_BSD, arguments) in zip(parts.layers, _calls(parts, padding, lazy), strict=True):
                kind = repr(layer)
                if runs.get(kind, True):
                    runs[kind] = _runs_in_segments(layer, x_BSD, arguments, padding)
                if runs[kind] and kind not in sizes:
                    sizes[kind] = _bytes_of(layer, x_BSD, arguments, run)
    uncut = {index: _STATE for index, layer in enumerate(parts.layers) if not runs[repr(layer)]}
    if uncut:
        return Trial(uncut, lazy)
    return Trial(uncut, lazy, _mean([sizes[repr(layer)] for layer in parts.layers]))


def _calls(parts: CausalLM, padding: int, lazy: bool) -> list[tuple[Tensor, dict[str, Any]]]:
    """The arguments of each layer for two samples of eight tokens, the first `padding` of which are none."""
    model = parts.model if parts.has_head else parts.decoder
    tokens = torch.arange(1, TOKENS + 1, device=model.get_input_embeddings().weight.device).expand(2, -1)
    inputs = {"input_ids": tokens}
    if padding:
        inputs["attention_mask"] = torch.ones_like(tokens)
        inputs["attention_mask"][1, :padding] = 0
    try:
        masks = lazy_masks(attention_implementation(model.config), 0 if lazy else None)
        calling = idle_layers(parts.layers)
        with torch.no_grad(), without_dropout(model), without_hooks(model), masks, calling as calls:
            model(**inputs, **dry_options(model))
        assert len(calls) == len(parts.layers), f"{len(calls)} of {len(parts.layers)} layers were called"
    except Exception as error:
        raise ValueError(
            f'mode="exact" needs layers that turn hidden states into hidden states; {type(model).__name__} '
            f"(config.model_type {model.config.model_type!r}) fails when they hand their input on unchanged: "
            f"{error}"
        ) from error
    return calls


def _bytes_of(layer: Any, like_BSD: Tensor, arguments: dict[str, Any], run: Run) -> LayerBytes:
    """What a token takes in a layer: measured on a segment of three that saves for a backward pass."""
    call = LayerCall(layer, type(layer).forward, arguments, TOKENS)
    segment = segments_of(TOKENS, SEGMENT)[0]
    x_BnD = segment.of(torch.ones_like(like_BSD)).requires_grad_()
    tokens = x_BnD.shape[0] * x_BnD.shape[1]
    with without_dropout(layer), ActivationBytes() as made:
        output = run(functools.partial(call, segment=segment), x_BnD)
    heads = [buffer.data for pair in call.attention.buffers.values() for buffer in pair]
    whole = sum(head.nbytes for head in heads if head is not None)
    of_heads = whole / (like_BSD.shape[0] * TOKENS)
    return LayerBytes(
        hidden=output.nbytes / tokens,
        heads=of_heads,
        head_gradients=of_heads * max(1.0, 4 / output.element_size()),
        activations=max(0, made.bytes - whole - output.nbytes) / tokens,
    )


def _mean(sizes: list[LayerBytes]) -> LayerBytes:
    names = [field.name for field in dataclasses.fields(LayerBytes)]
    return LayerBytes(*(statistics.mean(getattr(size, name) for size in sizes) for name in names))


@torch.no_grad()
def _runs_in_segments(layer: Any, like_BSD: Tensor, arguments: dict[str, Any], padding: int) -> bool:
    generator = torch.Generator().manual_seed(0)
    x_BSD = torch.randn(like_BSD.shape, generator=generator).to(like_BSD)
    arguments = {name: value for name, value in arguments.items() if name not in CACHES}
    with without_dropout(layer):
        wanted = LayerCall(layer, type(layer).forward, arguments, TOKENS)(x_BSD, Segment(0, TOKENS, TOKENS))
        if not isinstance(wanted, Tensor):
            raise ValueError(
                f'mode="exact" needs layers that return hidden states, got {type(wanted).__name__} from '
                f"{type(layer).__name__}."
            )
        call = LayerCall(layer, type(layer).forward, arguments, TOKENS)
        try:
            got = [call(segment.of(x_BSD), segment) for segment in segments_of(TOKENS, SEGMENT)]
        except Exception:  # a layer that cannot be called so runs over the whole sequence
            return False
        if not call.attention.buffers:
            return False
    tolerance = 1e-4 if wanted.dtype in (torch.float32, torch.float64) else 3e-2
    result, wanted = torch.cat(got, 1)[:, padding:], wanted[:, padding:]
    return torch.allclose(result, wanted, rtol=tolerance, atol=tolerance * float(wanted.abs().max()))
