"""Exact mode on a model's layers, and off again."""

from __future__ import annotations

import contextlib
import functools
import inspect
import operator
from collections.abc import Callable
from typing import Any

from torch import nn

from lemo_trainer.compat import makes_cache, one_document
from lemo_trainer.exact.auto import AutoChoice, batch_shape
from lemo_trainer.exact.mode import ExactMode
from lemo_trainer.exact.ways import Detached
from lemo_trainer.head.checks import why_all_logits
from lemo_trainer.head.forward import forward_with_segmented_loss
from lemo_trainer.model.architectures import CausalLM, first_depths
from lemo_trainer.model.calls import bind, kept_apart
from lemo_trainer.model.patching import patch_forward, subclass_of, swap_class
from lemo_trainer.session import LemoSession


def patch_exact(parts: CausalLM, session: LemoSession, leave: Callable[[float], None] | None = None) -> None:
    """Let training forward passes of `parts` run in exact mode; `session.undo` takes it off again.

    Args:
        leave: under `mode="auto"`, puts mode "detach" with this kept share on in place of exact mode.

    Raises:
        ValueError: the layers cannot run so, by what they are or by the scheme asked for.
    """
    mode = ExactMode.of(parts, session.config)
    session.mode_notes = mode.notes
    mode.on_batch, mode.passes = session.note_segments, session.passes
    for layer, index in first_depths(parts.layers).items():
        swap_class(layer, _exact_layer(layer.__class__), session.on_undo, _lemo_mode=mode, _lemo_index=index)
    patches: dict[Any, Callable[..., Any]] = {
        parts.decoder: functools.partial(_run_decoder, mode, parts.decoder)
    }
    if parts.model is not parts.decoder:
        with_loss = functools.partial(_with_segmented_loss, parts, session)
        patches[parts.model] = with_loss if parts.has_head else operator.call
    if mode.auto is not None:
        assert leave is not None
        choosing = Choosing(mode.auto, leave, parts, session)
        patches = {module: choosing.before(run, module) for module, run in patches.items()}
    for module, run in patches.items():
        patch_forward(module, run, session, session.passes, session.on_undo)


@functools.cache
def _exact_layer(original: Any) -> type[nn.Module]:
    @functools.wraps(original.forward)
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        mode: ExactMode = self._lemo_mode
        return mode.run_layer(self._lemo_index, self, original.forward, args, kwargs)

    def remember(self: nn.Module, value: bool) -> None:
        vars(self)["gradient_checkpointing"] = value

    hidden = property(lambda self: False, remember)  # transformers would checkpoint the walk once more
    return subclass_of(original, forward=forward, gradient_checkpointing=hidden)


def _run_decoder(
    mode: ExactMode, decoder: Any, forward: Callable[..., Any], *args: Any, **kwargs: Any
) -> Any:
    """The decoder's own forward, without the cache that it would fill where its config says so."""
    masks = one_document() if makes_cache(decoder, kwargs) else contextlib.nullcontext()
    with mode.running(), masks:
        return forward(*args, **{**kept_apart(kwargs), "use_cache": False})


class Choosing:
    """Lets `auto` choose the way of a batch before its forward pass.

    The outermost call chooses: that of the causal LM, or of its decoder if a loss outside calls that alone.

    Args:
        leave: puts mode "detach" with this kept share on in place of exact mode.
    """

    def __init__(
        self, auto: AutoChoice, leave: Callable[[float], None], parts: CausalLM, session: LemoSession
    ) -> None:
        self._auto, self._leave, self._parts, self._session = auto, leave, parts, session
        self._own_forward = parts.model.forward
        self._why_all_logits = ""
        self._chosen = self._counting = False

    def before(self, run: Callable[..., Any], module: Any) -> Callable[..., Any]:
        """`run`, the patch of the forward of `module`, behind the choice."""
        return functools.partial(self._run, run, module)

    def _run(
        self, run: Callable[..., Any], module: Any, forward: Callable[..., Any], *args: Any, **kwargs: Any
    ) -> Any:
        left = self._session.config.mode != "auto"  # for another mode, and still inside somebody's wrapper
        if left or self._counting:
            return forward(*args, **kwargs)
        if self._chosen:
            return run(forward, *args, **kwargs)
        why = why_all_logits(self._parts) if self._parts.has_head else ""
        if why != self._why_all_logits:  # the head costs something else than before
            self._auto.choice, self._why_all_logits = None, why
        whole = forward if module is self._parts.model else self._own_forward
        count = loss_forward(self._parts, whole, self._session.config.loss_segment)
        shape = batch_shape(bind(module, forward, args, kwargs).arguments)
        self._counting = True
        try:
            choice = self._session.choice = self._auto.of_batch(count, *shape)
        finally:
            self._counting = False
        if isinstance(choice.way, Detached):
            self._leave(choice.way.keep_ratio)
            return module.forward(*args, **kwargs)
        self._chosen = True
        try:
            return run(forward, *args, **kwargs)
        finally:
            self._chosen = False


def loss_forward(parts: CausalLM, forward: Callable[..., Any], segment: int) -> Callable[..., Any]:
    """The causal LM's `forward` by keywords, with the loss that exact mode gives it."""
    if not segment or not parts.has_head or why_all_logits(parts):
        return forward
    signature = inspect.signature(forward)

    def run(**inputs: Any) -> Any:
        return forward_with_segmented_loss(
            parts, forward, signature.bind(**inputs), segment, lambda: None, [True]
        )

    return run


def _with_segmented_loss(
    parts: CausalLM, session: LemoSession, forward: Callable[..., Any], *args: Any, **kwargs: Any
) -> Any:
    return session.forward_with_loss(parts, forward, bind(parts.model, forward, args, kwargs))
