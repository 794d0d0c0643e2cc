"""Put LeMo onto a model's layers and head, and take it off again.

A patched decoder layer becomes an instance of a subclass of its own class (same name, same module), as FSDP2
does it: that holds whichever of `forward` and `__call__` the installed transformers wraps for gradient
checkpointing. The causal LM gets an instance `forward` with the segment-wise loss.
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

from lemo_trainer.architectures import CausalLM, find_causal_lm, unwrap
from lemo_trainer.checkpointing import saving_attention, saving_inputs, saving_matmuls
from lemo_trainer.config import LemoConfig
from lemo_trainer.detachment import DetachingLayer
from lemo_trainer.elimination import EliminatingLayer
from lemo_trainer.exact.patch import patch_exact
from lemo_trainer.head import check_head, forward_with_segmented_loss
from lemo_trainer.kernels.dispatch import backend
from lemo_trainer.norms import recognised_norms
from lemo_trainer.predictor_files import predictors_of
from lemo_trainer.probe import CACHES, Wiring, find_wiring, layer_arguments, split_arguments
from lemo_trainer.report import LemoReport
from lemo_trainer.scoring import BlockScorer
from lemo_trainer.segments import SegmentCache, check_batch, check_segments, forward_in_segments
from lemo_trainer.stream import Streams

logger = logging.getLogger(__name__)


def apply_lemo(model: nn.Module, config: LemoConfig) -> LemoReport:
    """Make the training steps of `model` leave uninformative tokens out.

    Evaluation and generation (`model.eval()`) stay dense. In training with labels, and with
    `config.loss_segment` above 0, the output's `logits` are None; a cache that a training forward returns
    lacks the layers that left tokens out.

    Args:
        model: a causal LM of a supported architecture, plain or wrapped by PEFT.
        config: which tokens are kept, where and when.

    Raises:
        ValueError: the model is patched already, or it cannot be (architecture, attention implementation,
            a head that the segment-wise loss cannot read), or the predictors are damaged or another model's.
        FileNotFoundError: there are no predictors for `selector="predictor"`.
    """
    parts = find_causal_lm(model)
    if hasattr(parts.model, "_lemo"):
        raise ValueError("This model is patched by LeMo already; call remove_lemo(model) first.")
    model_type, total = parts.model.config.model_type, len(parts.layers)
    implementation = parts.model.config._attn_implementation
    if config.save_attention and implementation != "sdpa":
        raise ValueError(
            f"`save_attention` saves the outputs of SDPA's kernels and needs attn_implementation='sdpa', got "
            f"{implementation!r}; leave it out."
        )
    if config.mode == "exact":
        return _apply_exact(parts, config)
    if config.mode == "segments":
        check_segments(parts)
        report = LemoReport(config, model_type, total, tuple(range(total)), None)
        patched = wiring = None
    else:
        if layerdrop := getattr(parts.model.config, "layerdrop", 0):
            if config.shared_blocks:
                raise ValueError(
                    f"`shared_blocks` needs a model that runs all its layers, got {model_type} with "
                    f"layerdrop {layerdrop}, which may drop the layer that chooses; set either to none."
                )
            config = dataclasses.replace(config, shared_blocks=False)
        wiring = find_wiring(parts)
        chosen = _chosen_layers(wiring, config, total)
        report = LemoReport(config, model_type, total, chosen, wiring)
        choosing = chosen[:1] if config.resolved_shared_blocks else chosen
        report.predictors = predictors_of(config, parts.model, choosing)
        patched = _leaving_out(report, wiring, parts.layers[chosen[0]])
    if config.loss_segment:
        check_head(parts)
    report.kernel_backend = backend(parts.model.get_input_embeddings().weight)
    try:
        for index, layer in enumerate(parts.layers):
            leaves_out = patched is not None and index in report.patched_layers
            recomputes = config.selective_checkpointing or config.save_attention or config.mode == "segments"
            if leaves_out or recomputes:
                _patch_layer(index, layer, patched if leaves_out else None, report)
                if leaves_out and wiring and config.fused_kernels:
                    layer._lemo_norms = recognised_norms(wiring.architecture, layer)
                    report.fused_norms.update(norm.name for norm in layer._lemo_norms.values())
        _patch_causal_lm(parts, report)
    except BaseException:
        _undo(report)
        raise
    logger.log(logging.WARNING if report.notes else logging.INFO, "%s", report)
    return report


def _apply_exact(parts: CausalLM, config: LemoConfig) -> LemoReport:
    total = len(parts.layers)
    report = LemoReport(config, parts.model.config.model_type, total, tuple(range(total)), None)
    if config.loss_segment:
        check_head(parts)
    try:
        patch_exact(parts, report)
    except BaseException:
        _undo(report)
        raise
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


def _leaving_out(report: LemoReport, wiring: Wiring, first: nn.Module) -> EliminatingLayer | DetachingLayer:
    config, scorer = report.config, BlockScorer(report.config, report.predictors)
    # A table of known models has those only that hand a stream from layer to layer and keep none for later.
    streams = Streams(in_place=not wiring.probed)
    if config.mode == "detach":
        return DetachingLayer(wiring.architecture, config, scorer, first, streams)
    return EliminatingLayer(wiring.architecture, config, scorer, streams)


def remove_lemo(model: nn.Module) -> None:
    """Give every patched part of `model` its own class and `forward` back; an unpatched model stays so."""
    report = getattr(unwrap(model), "_lemo", None)
    if report is not None:
        _undo(report)


def _undo(report: LemoReport) -> None:
    while report.undo:
        report.undo.pop()()


@functools.cache
def _patched_class(layer_class: type[nn.Module]) -> type[nn.Module]:
    """The subclass whose training forward leaves tokens out.

    It checkpoints what it recomputes by itself, the chosen rows only, and so hides the layer's
    `gradient_checkpointing` from transformers, which would recompute the choice too.
    """

    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        hidden_states, arguments = layer_arguments(layer_class.forward, args, kwargs)
        run: Callable[..., Any] = operator.call
        config = self._lemo_report.config
        if self.training and vars(self).get("gradient_checkpointing"):
            if config.save_attention:
                run = saving_attention
            else:
                run = saving_inputs if config.mode == "segments" else self._gradient_checkpointing_func
        elif self.training and config.selective_checkpointing:
            run = saving_matmuls
        if run is not operator.call:  # a recomputation would fill a cache again
            arguments = {
                name: value
                for name, value in arguments.items()
                if name not in CACHES or isinstance(value, SegmentCache)
            }
        patched: Callable[..., Any] | None = self._lemo_layer
        plan = None
        if self.training and patched:
            plan = self._lemo_report.plan(self._lemo_index, hidden_states.shape[1])
        if patched and plan:
            mask, positions, options = split_arguments(arguments)
            try:
                return patched(self, hidden_states, mask, positions, plan, run, **options)
            except ValueError as error:
                raise ValueError(f"Layer {self._lemo_index}: {error}") from error
        return run(functools.partial(layer_class.forward, self, **arguments), hidden_states)

    def remember(self: nn.Module, value: bool) -> None:
        vars(self)["gradient_checkpointing"] = value

    namespace = {
        "forward": forward,
        "gradient_checkpointing": property(lambda self: False, remember),
        "__module__": layer_class.__module__,
        "__qualname__": layer_class.__qualname__,
    }
    return type(layer_class.__name__, (layer_class,), namespace)


def _patch_layer(
    index: int, layer: Any, patched: EliminatingLayer | DetachingLayer | None, report: LemoReport
) -> None:
    original = layer.__class__
    layer._lemo_index, layer._lemo_layer, layer._lemo_report = index, patched, report
    layer._lemo_norms = {}
    layer.__class__ = _patched_class(original)

    def undo() -> None:
        layer.__class__ = original
        del layer._lemo_index, layer._lemo_layer, layer._lemo_report, layer._lemo_norms

    report.undo.append(undo)


def _patch_causal_lm(parts: CausalLM, report: LemoReport) -> None:
    model = parts.model
    own_forward = model.__dict__.get("forward")  # accelerate's mixed precision puts one there
    forward = model.forward
    signature = inspect.signature(forward)

    def train(*args: Any, **kwargs: Any) -> Any:
        arguments = signature.bind(*args, **kwargs)
        report.start_batch(arguments.arguments.get("labels"))
        if arguments.arguments.get("past_key_values") is not None:
            raise ValueError("LeMo trains on whole sequences: `past_key_values` must be None, got a cache.")
        if arguments.arguments.get("labels") is None:
            report.warn_of_logits()
            return forward(*args, **kwargs)
        makes_loss = report.config.mode == "segments" or report.config.label_weights != "all"
        if makes_loss and arguments.arguments.get("kwargs", {}).get("fused_lm_head"):
            raise ValueError(
                'mode="segments" and `label_weights` make the loss, and TRL makes its own from the '
                'log-probabilities of all tokens; use mode="detach" and label_weights="all", or '
                "transformers' Trainer."
            )
        if report.config.mode == "segments":
            check_batch(parts, arguments)  # in the warm-up too, so that nothing is refused after it
            if report.active:
                return forward_in_segments(
                    parts, with_loss, arguments, report.config.segment_tokens, report.choose_segments
                )
        return with_loss(arguments)

    def with_loss(arguments: inspect.BoundArguments) -> Any:
        if not report.config.loss_segment or arguments.arguments.get("kwargs", {}).get("fused_lm_head"):
            # TRL's fused head makes its loss in pieces by itself
            return forward(*arguments.args, **arguments.kwargs)
        return forward_with_segmented_loss(
            parts, forward, arguments, report.config.loss_segment, report.label_weights
        )

    # Inside torch.compile, the training step runs eagerly, and evaluation compiled.
    train = torch.compiler.disable(train)

    @functools.partial(torch.compiler.disable, recursive=False)
    @functools.wraps(forward)
    def lemo_forward(*args: Any, **kwargs: Any) -> Any:
        # One that an earlier apply_lemo left inside somebody's wrapper hands every call on.
        run = train if model.training and getattr(model, "_lemo", None) is report else forward
        return run(*args, **kwargs)

    model.forward = lemo_forward
    model._lemo = report

    def undo() -> None:
        # Where somebody wrapped lemo_forward since, it stays inside and hands every call on.
        if model.__dict__.get("forward") is lemo_forward:
            del model.forward
            if own_forward is not None:
                model.forward = own_forward
        del model._lemo

    report.undo.append(undo)
