"""Exact mode on a model's layers, and off again.

A patched module becomes an instance of a subclass of its own class, with the same name. It runs the model's
own code unless a training forward pass records gradients and fills no cache. Copies and pickles of it are
of its own class: unpatched, and complete.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from lemo_trainer.exact.auto import AutoChoice, batch_shape
from lemo_trainer.exact.mode import ExactMode
from lemo_trainer.exact.ways import Detached
from lemo_trainer.head.forward import forward_with_segmented_loss
from lemo_trainer.model.architectures import CausalLM
from lemo_trainer.session import LemoSession

_OURS = "_lemo"  # what the names of all our attributes begin with


def patch_exact(parts: CausalLM, session: LemoSession, leave: Callable[[float], None] | None = None) -> None:
    """Let training forward passes of `parts` run in exact mode; `session.undo` takes it off again.

    Args:
        leave: under `mode="auto"`, puts mode "detach" with this kept share on in place of exact mode.

    Raises:
        ValueError: the layers cannot run so, by what they are or by the scheme asked for.
    """
    mode = ExactMode.of(parts, session.config)
    session.mode_notes = mode.notes
    for index, layer in enumerate(parts.layers):
        _swap_class(layer, _exact_layer(layer.__class__), session, _lemo_mode=mode, _lemo_index=index)
    decoder = next(part for part in parts.model.modules() if parts.layers in part.children())
    _patch_forward(decoder, functools.partial(_run_decoder, mode), session)
    run_model = functools.partial(_with_segmented_loss, parts, session)
    if mode.auto is not None:
        assert leave is not None
        run_model = functools.partial(_choosing, mode.auto, leave, run_model, parts, session)
    _patch_forward(parts.model, run_model, session)


def _swap_class(module: Any, patched: type[nn.Module], session: LemoSession, **attributes: Any) -> None:
    original = module.__class__
    vars(module).update(attributes)
    module.__class__ = patched

    def undo() -> None:
        module.__class__ = original
        for name in attributes:
            del vars(module)[name]

    session.on_undo(undo)


def _own_copies(original: type[nn.Module]) -> dict[str, Any]:
    """What makes copies and pickles of a patched module instances of `original`."""

    def reduce(self: Any, protocol: Any) -> Any:
        parent: Any = super(type(self), self)
        _, _, state, *rest = parent.__reduce_ex__(protocol)
        state = {name: value for name, value in state.items() if not name.startswith(_OURS)}
        if "_lemo_own_forward" in vars(self):
            del state["forward"]
            if self._lemo_own_forward is not None:
                state["forward"] = self._lemo_own_forward
        # the usual way, copyreg.__newobj__, insists on the object's own class
        return (object.__new__, (original,), state, *rest)

    names = {"__module__": original.__module__, "__qualname__": original.__qualname__}
    return {"__reduce_ex__": reduce, **names}


@functools.cache
def _exact_layer(original: Any) -> type[nn.Module]:
    @functools.wraps(original.forward)
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        mode: ExactMode = self._lemo_mode
        return mode.run_layer(self._lemo_index, self, original.forward, args, kwargs)

    def remember(self: nn.Module, value: bool) -> None:
        vars(self)["gradient_checkpointing"] = value

    hidden = property(lambda self: False, remember)  # transformers would checkpoint the walk once more
    namespace = {"forward": forward, "gradient_checkpointing": hidden, **_own_copies(original)}
    return type(original.__name__, (original,), namespace)


@functools.cache
def _copied_clean(original: Any) -> type[nn.Module]:
    return type(original.__name__, (original,), _own_copies(original))


def _patch_forward(module: Any, patched: Callable[..., Any], session: LemoSession) -> None:
    """Let `patched(forward, ...)` run training forward passes that record gradients, without a cache."""
    own_forward = vars(module).get("forward")  # accelerate's mixed precision puts one there
    forward = module.forward
    signature = inspect.signature(forward)
    patched = torch.compiler.disable(patched)  # inside torch.compile, the training step runs eagerly

    @functools.partial(torch.compiler.disable, recursive=False)
    @functools.wraps(forward)
    def lemo_forward(*args: Any, **kwargs: Any) -> Any:
        # One that remove_lemo left inside somebody's wrapper hands every call on.
        if getattr(module, "_lemo", None) is session and module.training and torch.is_grad_enabled():
            given = {**signature.bind_partial(*args).arguments, **kwargs} if args else kwargs
            if given.get("past_key_values") is None and not given.get("use_cache"):
                return patched(forward, *args, **kwargs)
        return forward(*args, **kwargs)

    module.forward = lemo_forward
    _swap_class(
        module, _copied_clean(module.__class__), session, _lemo=session, _lemo_own_forward=own_forward
    )

    def undo() -> None:
        if vars(module).get("forward") is lemo_forward:
            del module.forward
            if own_forward is not None:
                module.forward = own_forward

    session.on_undo(undo)


def _run_decoder(mode: ExactMode, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """The decoder's own forward, without the cache that it would fill where its config says so."""
    with mode.running():
        return forward(*args, **{**kwargs, "use_cache": False})


def _choosing(
    auto: AutoChoice,
    leave: Callable[[float], None],
    run: Callable[..., Any],
    parts: CausalLM,
    session: LemoSession,
    forward: Callable[..., Any],
    *args: Any,
    **kwargs: Any,
) -> Any:
    """The causal LM's forward in the way that `auto` chooses for this batch."""
    if session.config.mode != "auto":  # left for another mode, and still inside somebody's wrapper
        return forward(*args, **kwargs)
    arguments = inspect.signature(forward).bind(*args, **kwargs).arguments
    count = loss_forward(parts, forward, session.config.loss_segment)
    session.choice = auto.of_batch(count, *batch_shape(arguments))
    if isinstance(session.choice.way, Detached):
        leave(session.choice.way.keep_ratio)
        return parts.model.forward(*args, **kwargs)
    return run(forward, *args, **kwargs)


def loss_forward(parts: CausalLM, forward: Callable[..., Any], segment: int) -> Callable[..., Any]:
    """The causal LM's `forward` by keywords, with the loss that exact mode gives it."""
    if not segment:
        return forward
    signature = inspect.signature(forward)

    def run(**inputs: Any) -> Any:
        return forward_with_segmented_loss(parts, forward, signature.bind(**inputs), segment, lambda: None)

    return run


def _with_segmented_loss(
    parts: CausalLM, session: LemoSession, forward: Callable[..., Any], *args: Any, **kwargs: Any
) -> Any:
    """The causal LM's own forward, with its loss made of a few tokens at a time where it makes one."""
    arguments = inspect.signature(forward).bind(*args, **kwargs)
    segment, given = session.config.loss_segment, arguments.arguments
    if given.get("labels") is None:
        session.warn_of_logits()
    elif segment and not given.get("kwargs", {}).get("fused_lm_head"):  # TRL's makes its loss in pieces
        return forward_with_segmented_loss(parts, forward, arguments, segment, lambda: None)
    return forward(*args, **kwargs)
