"""Put LeMo onto a model's layers and head, and take it off again.

A patched decoder layer becomes an instance of a subclass of its own class (same name, same module), as in
FSDP2. That works whether the installed transformers wraps `forward` or `__call__` for gradient checkpointing.
The causal LM gets an instance `forward` with the segment-wise loss.
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
import logging
import operator
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from lemo_trainer.compat import (
    CHECKPOINTING,
    attention_implementation,
    checkpointing_function,
    loss_is_made_by_trl,
)
from lemo_trainer.config import LemoConfig
from lemo_trainer.exact.patch import patch_exact
from lemo_trainer.head.forward import check_head, forward_with_segmented_loss
from lemo_trainer.informativeness.selectors import selector_for
from lemo_trainer.kernels.dispatch import backend
from lemo_trainer.layers.checkpointing import saving_attention, saving_inputs, saving_matmuls
from lemo_trainer.layers.detachment import DetachingLayer
from lemo_trainer.layers.elimination import EliminatingLayer
from lemo_trainer.layers.segments import SegmentCache, check_batch, check_segments, forward_in_segments
from lemo_trainer.layers.stream import Streams
from lemo_trainer.layers.wiring import Wiring, find_wiring
from lemo_trainer.model.architectures import CausalLM, find_causal_lm
from lemo_trainer.model.calls import CACHES, layer_arguments, split_arguments
from lemo_trainer.model.norms import recognised_norms
from lemo_trainer.report import LemoReport
from lemo_trainer.session import LemoSession, session_of

logger = logging.getLogger(__name__)

LayerForward = Callable[..., Any]  # the training forward of a layer that leaves tokens out


def apply_lemo(model: nn.Module, config: LemoConfig) -> LemoReport:
    """Make the training steps of `model` leave uninformative tokens out.

    Evaluation and generation (`model.eval()`) stay dense. In training with labels, and with
    `config.loss_segment` above 0, the output's `logits` are None; a cache that a training forward returns
    lacks the layers that left tokens out.

    Args:
        model: a causal LM of a supported architecture, plain or wrapped by PEFT.
        config: the configuration of LeMo.

    Raises:
        ValueError: the model is patched already; LeMo does not support its architecture, its attention
            implementation or its head; or the predictors are damaged or belong to another model.
        FileNotFoundError: `selector="predictor"` found no predictors.
    """
    parts = find_causal_lm(model)
    if session_of(parts.model) is not None:
        raise ValueError("This model is patched by LeMo already; call remove_lemo(model) first.")
    implementation = attention_implementation(parts.model.config)
    if config.save_attention and implementation != "sdpa":
        raise ValueError(
            f"`save_attention` saves the outputs of SDPA's kernels and needs attn_implementation='sdpa', got "
            f"{implementation!r}; leave it out."
        )
    if config.mode in ("auto", "exact"):
        return _apply_exact(parts, config)
    if config.mode == "segments":
        session, layer_forward = _session_of_segments(parts, config), None
    else:
        session, layer_forward = _session_of_blocks(parts, config)
    if config.loss_segment:
        check_head(parts)
    session.kernel_backend = backend(parts.model.get_input_embeddings().weight)
    try:
        _patch_layers(parts, layer_forward, session)
        _patch_causal_lm(parts, session)
    except BaseException:
        session.undo()
        raise
    report = LemoReport(session)
    logger.log(logging.WARNING if report.notes else logging.INFO, "%s", report)
    return report


def remove_lemo(model: nn.Module) -> None:
    """Give every patched part of `model` its own class and `forward` back. Unpatched models are ignored."""
    session = session_of(model)
    if session is not None:
        session.undo()


def _session_of_segments(parts: CausalLM, config: LemoConfig) -> LemoSession:
    check_segments(parts)
    total = len(parts.layers)
    return LemoSession(selector_for(config), parts.model.config.model_type, total, tuple(range(total)))


def _session_of_blocks(parts: CausalLM, config: LemoConfig) -> tuple[LemoSession, LayerForward]:
    """The session of a mode that chooses blocks in each layer, and the training forward of those layers."""
    model_type, total = parts.model.config.model_type, len(parts.layers)
    if layerdrop := getattr(parts.model.config, "layerdrop", 0):
        if config.shared_blocks:
            raise ValueError(
                f"`shared_blocks` needs a model that runs all its layers, got {model_type} with "
                f"layerdrop {layerdrop}, which may drop the layer that chooses; leave one of them out."
            )
        config = dataclasses.replace(config, shared_blocks=False)
    wiring = find_wiring(parts)
    chosen = _chosen_layers(wiring, config, total)
    choosing = chosen[:1] if config.resolved_shared_blocks else chosen
    selector = selector_for(config)
    selector.prepare(parts.model, choosing)
    session = LemoSession(selector, model_type, total, chosen, wiring)
    # Models of the table keep no layer's input for later; a probed model might.
    streams = Streams(in_place=not wiring.probed)
    if config.mode == "detach":
        first = parts.layers[chosen[0]]
        return session, DetachingLayer(wiring.architecture, selector, first, streams)
    return session, EliminatingLayer(wiring.architecture, selector, streams)


def _apply_exact(parts: CausalLM, config: LemoConfig) -> LemoReport:
    total = len(parts.layers)
    session = LemoSession(selector_for(config), parts.model.config.model_type, total, tuple(range(total)))
    if config.loss_segment:
        check_head(parts)

    def leave(keep_ratio: float) -> None:
        kept = LemoConfig(mode="detach", keep_ratio=keep_ratio, loss_segment=config.loss_segment)
        sparse, layer_forward = _session_of_blocks(parts, kept)
        sparse.kernel_backend = backend(parts.model.get_input_embeddings().weight)
        session.undo()
        session.become(sparse)
        _patch_layers(parts, layer_forward, session)
        _patch_causal_lm(parts, session)

    try:
        patch_exact(parts, session, leave)
    except BaseException:
        session.undo()
        raise
    report = LemoReport(session)
    logger.log(logging.WARNING if report.notes else logging.INFO, "%s", report)
    return report


def _chosen_layers(wiring: Wiring, config: LemoConfig, total: int) -> tuple[int, ...]:
    chosen = tuple(index for index in config.resolve_layers(total) if index not in wiring.dense_layers)
    if not chosen:
        notes = "; ".join([f"the model has {total}", *wiring.notes(chosen)])
        raise ValueError(
            f"`layers` must name a layer that can leave tokens out, got {config.layers!r}: {notes}."
        )
    return chosen


def _patch_layers(parts: CausalLM, layer_forward: LayerForward | None, session: LemoSession) -> None:
    """Patch the layers that leave tokens out, and all others if recomputation in them saves bytes."""
    config, wiring = session.config, session.wiring
    recomputes = config.selective_checkpointing or config.save_attention or config.mode == "segments"
    for index, layer in enumerate(parts.layers):
        leaves_out = layer_forward is not None and index in session.patched_layers
        if not leaves_out and not recomputes:
            continue
        _patch_layer(index, layer, layer_forward if leaves_out else None, session)
        if leaves_out and wiring and config.fused_kernels:
            layer._lemo_norms = recognised_norms(wiring.architecture, layer)
            session.fused_norms.update(norm.name for norm in layer._lemo_norms.values())


@functools.cache
def _patched_class(layer_class: type[nn.Module]) -> type[nn.Module]:
    """The subclass of a layer's class whose training forward leaves tokens out.

    It checkpoints the chosen rows itself. It therefore hides the layer's `gradient_checkpointing` from
    transformers, which would recompute the choice too.
    """

    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        hidden_states, arguments = layer_arguments(layer_class.forward, args, kwargs)
        run: Callable[..., Any] = operator.call
        session: LemoSession = self._lemo_session
        config = session.config
        if self.training and vars(self).get(CHECKPOINTING):
            if config.save_attention:
                run = saving_attention
            else:
                run = saving_inputs if config.mode == "segments" else checkpointing_function(self)
        elif self.training and config.selective_checkpointing:
            run = saving_matmuls
        if run is not operator.call:  # a recomputation would fill the model's cache again
            arguments = {
                name: value
                for name, value in arguments.items()
                if name not in CACHES or isinstance(value, SegmentCache)
            }
        leave_out: LayerForward | None = self._lemo_forward
        plan = None
        if self.training and leave_out:
            plan = session.plan(self._lemo_index, hidden_states.shape[1])
        if leave_out and plan:
            mask, positions, options = split_arguments(arguments)
            try:
                return leave_out(self, hidden_states, mask, positions, plan, run, **options)
            except ValueError as error:
                raise ValueError(f"Layer {self._lemo_index}: {error}") from error
        return run(functools.partial(layer_class.forward, self, **arguments), hidden_states)

    def remember(self: nn.Module, value: bool) -> None:
        vars(self)[CHECKPOINTING] = value

    namespace = {
        "forward": forward,
        CHECKPOINTING: property(lambda self: False, remember),
        "__module__": layer_class.__module__,
        "__qualname__": layer_class.__qualname__,
    }
    return type(layer_class.__name__, (layer_class,), namespace)


def _patch_layer(index: int, layer: Any, layer_forward: LayerForward | None, session: LemoSession) -> None:
    original = layer.__class__
    layer._lemo_index, layer._lemo_forward, layer._lemo_session = index, layer_forward, session
    layer._lemo_norms = {}
    layer.__class__ = _patched_class(original)

    def undo() -> None:
        layer.__class__ = original
        del layer._lemo_index, layer._lemo_forward, layer._lemo_session, layer._lemo_norms

    session.on_undo(undo)


def _patch_causal_lm(parts: CausalLM, session: LemoSession) -> None:
    model = parts.model
    own_forward = model.__dict__.get("forward")  # accelerate's mixed precision puts one there
    forward = model.forward
    signature = inspect.signature(forward)

    def train(*args: Any, **kwargs: Any) -> Any:
        arguments = signature.bind(*args, **kwargs)
        session.start_batch(arguments.arguments.get("labels"))
        if arguments.arguments.get("past_key_values") is not None:
            raise ValueError("LeMo trains on whole sequences: `past_key_values` must be None, got a cache.")
        if arguments.arguments.get("labels") is None:
            session.warn_of_logits()
            return forward(*args, **kwargs)
        makes_loss = session.config.mode == "segments" or session.config.label_weights != "all"
        if makes_loss and loss_is_made_by_trl(arguments.arguments):
            raise ValueError(
                'mode="segments" and `label_weights` compute the loss, and so does TRL, from the '
                'log-probabilities of all tokens; use mode="detach" and label_weights="all", or '
                "transformers' Trainer."
            )
        if session.config.mode == "segments":
            check_batch(parts, arguments)  # in the warm-up too, so that errors come early
            if session.active:
                return forward_in_segments(
                    parts, with_loss, arguments, session.config.segment_tokens, session.choose_segments
                )
        return with_loss(arguments)

    def with_loss(arguments: inspect.BoundArguments) -> Any:
        if not session.config.loss_segment or loss_is_made_by_trl(arguments.arguments):
            # TRL's fused head computes its loss in pieces itself
            return forward(*arguments.args, **arguments.kwargs)
        return forward_with_segmented_loss(
            parts, forward, arguments, session.config.loss_segment, session.label_weights
        )

    # Inside torch.compile, the training step runs eagerly, and evaluation compiled.
    train = torch.compiler.disable(train)

    @functools.partial(torch.compiler.disable, recursive=False)
    @functools.wraps(forward)
    def lemo_forward(*args: Any, **kwargs: Any) -> Any:
        # If an earlier apply_lemo's forward is still inside a wrapper, it only passes calls on.
        run = train if model.training and session_of(model) is session else forward
        return run(*args, **kwargs)

    model.forward = lemo_forward
    model._lemo = session

    def undo() -> None:
        # If other code wrapped lemo_forward since, it stays inside and only passes calls on.
        if model.__dict__.get("forward") is lemo_forward:
            del model.forward
            if own_forward is not None:
                model.forward = own_forward
        del model._lemo

    session.on_undo(undo)
