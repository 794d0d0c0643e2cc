"""Put LeMo onto a model's layers and head, and take it off again.

A patched decoder layer becomes an instance of a subclass of its own class (same name, same module), as in
FSDP2. That works whether the installed transformers wraps `forward` or `__call__` for gradient checkpointing.
The causal LM gets an instance `forward` with the segment-wise loss. Only training passes run patched: in
training mode, while gradients are recorded, without a cache.
"""

from __future__ import annotations

import dataclasses
import functools
import logging
import operator
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from lemo_trainer.compat import (
    CHECKPOINTING,
    attention_implementation,
    checkpointing_function,
    loss_is_made_by_trl,
)
from lemo_trainer.config import NO_CONFIG, LemoConfig
from lemo_trainer.exact.patch import patch_exact
from lemo_trainer.head.checks import check_head
from lemo_trainer.informativeness.selectors import selector_for
from lemo_trainer.kernels.dispatch import backend
from lemo_trainer.layers.causality import check_causal
from lemo_trainer.layers.checkpointing import saving_attention, saving_inputs, saving_matmuls
from lemo_trainer.layers.detachment import DetachingLayer
from lemo_trainer.layers.elimination import EliminatingLayer
from lemo_trainer.layers.segments import (
    NO_LABELS,
    SegmentCache,
    check_batch,
    check_segments,
    forward_in_segments,
)
from lemo_trainer.layers.stream import Streams
from lemo_trainer.layers.wiring import Wiring, find_wiring
from lemo_trainer.model.architectures import CausalLM, check_attention, find_causal_lm, first_depths
from lemo_trainer.model.calls import CACHES, bind, kept_apart, layer_arguments, split_arguments
from lemo_trainer.model.hooks import counts_from_the_end, hooks_on_rows
from lemo_trainer.model.norms import recognised_norms
from lemo_trainer.model.patching import patch_forward, subclass_of, swap_class
from lemo_trainer.model.state import repeating
from lemo_trainer.report import LemoReport
from lemo_trainer.session import LemoSession, session_of

logger = logging.getLogger(__name__)

LayerForward = Callable[..., Any]  # the training forward of a layer that leaves tokens out


def apply_lemo(model: nn.Module, config: LemoConfig) -> LemoReport:
    """Make the training steps of `model` leave uninformative tokens out.

    Only training passes run patched: in training mode, while gradients are recorded, without a cache.
    Evaluation, generation and passes under `torch.no_grad()` are the model's own. A copy or a pickle of the
    patched model is unpatched. In training with labels, and with `config.loss_segment` above 0, the output's
    `logits` are None.

    Args:
        model: a causal LM of a supported architecture, plain or wrapped by PEFT. One with another head, for
            classification or rewards, works in all modes but segments.
        config: the configuration of LeMo.

    Raises:
        TypeError: `config` is not a LemoConfig.
        ValueError: the model is patched already; LeMo does not support its architecture, its attention
            implementation or its head; or the predictors are damaged or belong to another model.
        FileNotFoundError: `selector="predictor"` found no predictors.
    """
    if not isinstance(config, LemoConfig):
        raise TypeError(NO_CONFIG.format(owner="apply_lemo(model, config)", got=type(config).__name__))
    parts = find_causal_lm(model, head=False)
    session = session_of(parts.model)
    if session is not None and not session.passes.in_scope():  # the Trainer that it was for has stopped
        session.undo()
    elif session is not None:
        raise ValueError("This model is patched by LeMo already; call remove_lemo(model) first.")
    _check_model(parts, config)
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
    if config.loss_segment and parts.has_head:
        check_head(parts)
    session.kernel_backend = backend(parts.model.get_input_embeddings().weight)
    try:
        _patch_layers(parts, layer_forward, session)
        _patch_forwards(parts, session)
    except BaseException:
        session.undo()
        raise
    report = LemoReport(session, parts.model)
    logger.log(logging.WARNING if report.notes else logging.INFO, "%s", report)
    return report


def remove_lemo(model: nn.Module) -> None:
    """Give every patched part of `model` its own class and `forward` back. Unpatched models are ignored."""
    session = session_of(model)
    if session is not None:
        session.undo()


def _check_model(parts: CausalLM, config: LemoConfig) -> None:
    """Raise ValueError for a model or an adapter that the mode cannot serve."""
    check_attention(parts, str(config.mode))
    check_causal(parts)
    name = type(parts.model).__name__
    if not parts.has_head:
        needs_head = {"mode": config.mode == "segments", "protect_labels": config.protect_labels}
        needs_head["label_weights"] = config.label_weights != "all"
        for option in (option for option, used in needs_head.items() if used):
            raise ValueError(
                f"`{option}`={getattr(config, option)!r} needs labels of tokens and a language-model head, "
                f'which {name} has not; use mode="exact" or "detach" without it.'
            )
    adapted = [part for part in parts.model.modules() if "adaption_prompt" in type(part).__module__]
    if adapted:
        raise ValueError(
            f"PEFT's adaption prompt computes attention of its own beside the model's ({name}), of which "
            "LeMo cannot leave tokens out; train without LeMo, or use another tuner, such as LoRA."
        )


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
        detaching = DetachingLayer(wiring.architecture, selector, parts.layers[chosen[0]], streams)
        session.on_batch = detaching.start_batch
        return session, detaching
    return session, EliminatingLayer(wiring.architecture, selector, streams)


def _apply_exact(parts: CausalLM, config: LemoConfig) -> LemoReport:
    total = len(parts.layers)
    session = LemoSession(selector_for(config), parts.model.config.model_type, total, tuple(range(total)))
    if config.loss_segment and parts.has_head:
        check_head(parts)

    def leave(keep_ratio: float) -> None:
        kept = LemoConfig(mode="detach", keep_ratio=keep_ratio, loss_segment=config.loss_segment)
        sparse, layer_forward = _session_of_blocks(parts, kept)
        sparse.kernel_backend = backend(parts.model.get_input_embeddings().weight)
        session.undo()
        session.become(sparse)
        _patch_layers(parts, layer_forward, session)
        _patch_forwards(parts, session)

    try:
        patch_exact(parts, session, leave)
    except BaseException:
        session.undo()
        raise
    report = LemoReport(session, parts.model)
    logger.log(logging.WARNING if report.notes else logging.INFO, "%s", report)
    return report


def _chosen_layers(wiring: Wiring, config: LemoConfig, total: int) -> tuple[int, ...]:
    chosen = tuple(index for index in config.resolve_layers(total) if index not in wiring.dense_layers)
    if not chosen:
        if config.layers == "auto" and not wiring.dense_layers:
            raise ValueError(
                f'`layers` must be "all" for a model of {total} layers: "auto" leaves the first and the last '
                "ones dense, and there is no other."
            )
        notes = "; ".join([f"the model has {total}", *wiring.notes(chosen)])
        raise ValueError(
            f"`layers` must name a layer that can leave tokens out, got {config.layers!r}: {notes}."
        )
    return chosen


def _patch_layers(parts: CausalLM, layer_forward: LayerForward | None, session: LemoSession) -> None:
    """Patch the layers that leave tokens out, and all others if recomputation in them saves bytes."""
    config, wiring = session.config, session.wiring
    recomputes = config.selective_checkpointing or config.save_attention or config.mode == "segments"
    for layer, index in first_depths(parts.layers).items():
        leaves_out = layer_forward is not None and index in session.patched_layers
        if not leaves_out and not recomputes:
            continue
        _patch_layer(index, layer, layer_forward if leaves_out else None, session)
        if leaves_out and wiring and config.fused_kernels:
            layer._lemo_norms = recognised_norms(wiring.architecture, layer)
            session.fused_norms.update(norm.name for norm in layer._lemo_norms.values())


@functools.cache
def _patched_class(layer_class: Any) -> type[nn.Module]:
    """The subclass of a layer's class whose training forward leaves tokens out.

    It checkpoints the chosen rows itself. It therefore hides the layer's `gradient_checkpointing` from
    transformers, which would recompute the choice too.
    """

    @functools.wraps(layer_class.forward)
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        session: LemoSession = self._lemo_session
        config = session.config
        kind = _kind_of_recomputation(self, session)
        if not session.passes.running and kind is operator.call:
            return layer_class.forward(self, *args, **kwargs)
        hidden_states, arguments = layer_arguments(layer_class.forward, args, kwargs)
        if kind is not operator.call:  # a recomputation would fill the model's cache again
            arguments = {
                name: value
                for name, value in arguments.items()
                if name not in CACHES or isinstance(value, SegmentCache)
            }
        run = _recomputation(kind, self, session, arguments)
        leave_out: LayerForward | None = self._lemo_forward
        plan = None
        if self.training and session.passes.running and leave_out:
            plan = session.plan(self._lemo_index, hidden_states.shape[1], len(hidden_states))
        if leave_out and plan:
            if config.mlp_segment and counts_from_the_end(self):
                raise ValueError(
                    f"`mlp_segment` must be 0 with PEFT's aLoRA, which counts tokens from the end, got "
                    f"{config.mlp_segment}."
                )
            mask, positions, options = split_arguments(arguments)
            try:
                return leave_out(self, hidden_states, mask, positions, plan, run, **options)
            except ValueError as error:
                raise ValueError(f"Layer {self._lemo_index}: {error}") from error
        hooks = hooks_on_rows(self, hidden_states.shape[1])

        def whole(x_BSD: Tensor) -> Any:
            with hooks(None):
                return layer_class.forward(self, x_BSD, **arguments)

        return run(whole, hidden_states)

    def remember(self: nn.Module, value: bool) -> None:
        vars(self)[CHECKPOINTING] = value

    hidden = property(lambda self: False, remember)
    return subclass_of(layer_class, forward=forward, **{CHECKPOINTING: hidden})


def _recomputation(
    kind: Callable[..., Any], layer: Any, session: LemoSession, arguments: dict[str, Any]
) -> Callable[..., Any]:
    """`kind` of checkpointing, whose recomputation meets the layer and its arguments as they are now."""
    if kind is operator.call:
        return kind
    # Segments recompute inside of the forward pass, on a GPU in a thread of autograd's.
    if not session.passes.running or session.config.mode == "segments":
        return repeating(kind, layer, arguments)
    return session.passes.alone(kind, layer, arguments)


def _kind_of_recomputation(layer: Any, session: LemoSession) -> Callable[..., Any]:
    """What runs a layer in the present pass: a kind of checkpointing, or nothing but a call."""
    config, running = session.config, session.passes.running
    if not layer.training or not (running or torch.is_grad_enabled()):
        return operator.call
    if vars(layer).get(CHECKPOINTING):
        if running and config.save_attention:
            return saving_attention
        return saving_inputs if running and config.mode == "segments" else checkpointing_function(layer)
    return saving_matmuls if running and config.selective_checkpointing else operator.call


def _patch_layer(index: int, layer: Any, layer_forward: LayerForward | None, session: LemoSession) -> None:
    attributes = {"_lemo_index": index, "_lemo_forward": layer_forward, "_lemo_session": session}
    swap_class(layer, _patched_class(layer.__class__), session.on_undo, **attributes, _lemo_norms={})


def _patch_forwards(parts: CausalLM, session: LemoSession) -> None:
    """Patch the causal LM, and the decoder, which a loss outside may call by itself."""
    if session.config.mode != "segments":
        run_decoder = functools.partial(_run_decoder, session)
        patch_forward(parts.decoder, run_decoder, session, session.passes, session.on_undo)
    if parts.model is parts.decoder:
        return
    train = functools.partial(_train, parts, session)
    patch_forward(parts.model, train, session, session.passes, session.on_undo)


def _run_decoder(session: LemoSession, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    session.start_batch()
    return forward(*args, **kept_apart(kwargs))


def _train(
    parts: CausalLM, session: LemoSession, forward: Callable[..., Any], *args: Any, **kwargs: Any
) -> Any:
    """A training pass of the causal LM, whose own forward is `forward`."""
    arguments = bind(parts.model, forward, args, kwargs)
    labels, mode = arguments.arguments.get("labels"), session.config.mode
    session.labels_BS = labels
    if not parts.has_head:
        return forward(*args, **kwargs)
    if labels is None and mode == "segments":
        raise ValueError(NO_LABELS)
    makes_loss = mode == "segments" or session.config.label_weights != "all"
    if makes_loss and loss_is_made_by_trl(arguments.arguments):
        raise ValueError(
            'mode="segments" and `label_weights` compute the loss, and so does TRL, from the '
            'log-probabilities of all tokens; use mode="exact", or mode="detach" with label_weights="all".'
        )
    with_loss = functools.partial(session.forward_with_loss, parts, forward)
    if mode == "segments":
        check_batch(parts, arguments)  # in the warm-up too, so that errors come early
        session.start_batch()
        if session.active:
            segment = session.config.segment_tokens
            return forward_in_segments(
                parts, with_loss, arguments, segment, session.choose_segments, session.told_of_logits
            )
    return with_loss(arguments)
