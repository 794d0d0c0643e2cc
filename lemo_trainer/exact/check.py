"""Which layers can run in segments: tried out on a few tokens."""

from __future__ import annotations

import contextlib
from typing import Any

import torch
from torch import Tensor

from lemo_trainer.architectures import ARCHITECTURES, REFUSED, CausalLM, is_whole
from lemo_trainer.exact.layer import LayerCall, Segment, segments_of
from lemo_trainer.exact.masks import lazy_masks
from lemo_trainer.informativeness import without_dropout
from lemo_trainer.probe import CACHES, TOKENS, dry_options, idle_layers

SEGMENT = 3  # of the 8 tokens: two whole segments and a shorter one
_STATE = "their state is more than keys and values of attention"


def try_layers(parts: CausalLM) -> tuple[dict[int, str], bool]:
    """The layers that must run over a whole sequence, by index, and why; and whether masks may be lazy.

    Every kind of layer is run on eight tokens in segments and whole, with and without padding. Where the
    weights are not whole (on the meta device, sharded), the table of known architectures decides.

    Raises:
        ValueError: the layers do not turn hidden states into hidden states.
    """
    model_type = parts.model.config.model_type
    known = model_type in ARCHITECTURES
    if model_type in REFUSED:
        return dict.fromkeys(range(len(parts.layers)), REFUSED[model_type]), False
    if not all(map(is_whole, parts.model.parameters())):
        reason = f"the layers of {model_type} cannot be tried out with weights that are not whole"
        return {} if known else dict.fromkeys(range(len(parts.layers)), reason), known
    with contextlib.suppress(Exception):  # the model computes with its masks before the layers get them
        return _uncut(parts, lazy=True), True
    return _uncut(parts, lazy=False), False


def _uncut(parts: CausalLM, lazy: bool) -> dict[int, str]:
    found: dict[str, bool] = {}
    with torch.compiler.set_stance("force_eager"):  # nothing is worth compiling (flex attention) for 8 tokens
        for padding in (0, 2):  # of two samples, one is padded
            for layer, (x_BSD, arguments) in zip(parts.layers, _calls(parts, padding, lazy), strict=True):
                if found.get(repr(layer), True):
                    found[repr(layer)] = _runs_in_segments(layer, x_BSD, arguments, padding)
    return {index: _STATE for index, layer in enumerate(parts.layers) if not found[repr(layer)]}


def _calls(parts: CausalLM, padding: int, lazy: bool) -> list[tuple[Tensor, dict[str, Any]]]:
    """The arguments of each layer for two samples of eight tokens, the first `padding` of which are none."""
    model = parts.model
    tokens = torch.arange(1, TOKENS + 1, device=model.get_input_embeddings().weight.device).expand(2, -1)
    inputs = {"input_ids": tokens}
    if padding:
        inputs["attention_mask"] = torch.ones_like(tokens)
        inputs["attention_mask"][1, :padding] = 0
    try:
        masks = lazy_masks(model.config._attn_implementation, 0 if lazy else None)
        with torch.no_grad(), without_dropout(model), masks, idle_layers(parts.layers) as calls:
            model(**inputs, **dry_options(model))
        assert len(calls) == len(parts.layers), f"{len(calls)} of {len(parts.layers)} layers were called"
    except Exception as error:
        raise ValueError(
            f'mode="exact" needs layers that turn hidden states into hidden states; {type(model).__name__} '
            f"(config.model_type {model.config.model_type!r}) fails when they hand their input on unchanged: "
            f"{error}"
        ) from error
    return calls


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
