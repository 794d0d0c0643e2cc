"""Exact mode on a model's layers, and off again."""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable
from typing import Any

from torch import nn

from lemo_trainer.exact.mode import ExactMode
from lemo_trainer.head.forward import forward_with_segmented_loss
from lemo_trainer.model.architectures import CausalLM
from lemo_trainer.model.calls import bind
from lemo_trainer.model.patching import patch_forward, subclass_of, swap_class
from lemo_trainer.session import LemoSession


def patch_exact(parts: CausalLM, session: LemoSession) -> None:
    """Let training forward passes of `parts` run in exact mode; `session.undo` takes it off again.

    Raises:
        ValueError: the layers cannot run so, by what they are or by the scheme asked for.
    """
    mode = ExactMode.of(parts, session.config)
    session.mode_notes = mode.notes
    mode.on_batch = session.note_segments
    for index, layer in enumerate(parts.layers):
        patched = _exact_layer(layer.__class__)
        swap_class(layer, patched, session.on_undo, _lemo_mode=mode, _lemo_index=index)
    run_decoder = functools.partial(_run_decoder, mode)
    patch_forward(parts.decoder, run_decoder, session, session.passes, session.on_undo)
    if not parts.has_head:
        if parts.model is not parts.decoder:
            patch_forward(parts.model, operator.call, session, session.passes, session.on_undo)
        return
    with_loss = functools.partial(_with_segmented_loss, parts, session)
    patch_forward(parts.model, with_loss, session, session.passes, session.on_undo)


@functools.cache
def _exact_layer(original: Any) -> type[nn.Module]:
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        mode: ExactMode = self._lemo_mode
        return mode.run_layer(self._lemo_index, self, original.forward, args, kwargs)

    def remember(self: nn.Module, value: bool) -> None:
        vars(self)["gradient_checkpointing"] = value

    hidden = property(lambda self: False, remember)  # transformers would checkpoint the walk once more
    return subclass_of(original, forward=forward, gradient_checkpointing=hidden)


def _run_decoder(mode: ExactMode, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """The decoder's own forward, without the cache that it would fill where its config says so."""
    with mode.running():
        return forward(*args, **{**kwargs, "use_cache": False})


def _with_segmented_loss(
    parts: CausalLM, session: LemoSession, forward: Callable[..., Any], *args: Any, **kwargs: Any
) -> Any:
    """The causal LM's own forward, with its loss made of a few tokens at a time where it makes one."""
    arguments = bind(parts.model, forward, args, kwargs)
    segment, given = session.config.loss_segment, arguments.arguments
    if given.get("labels") is None:
        session.warn_of_logits()
    elif segment and not given.get("kwargs", {}).get("fused_lm_head"):  # TRL's makes its loss in pieces
        return forward_with_segmented_loss(
            parts, forward, arguments, segment, lambda: None, session.told_of_logits
        )
    return forward(*args, **kwargs)
