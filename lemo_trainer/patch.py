"""Put LeMo onto a model's layers and head, and take it off again.

A patched decoder layer becomes an instance of a subclass of its own class (same name, same module), as FSDP2
does it: that holds whichever of `forward` and `__call__` the installed transformers wraps for gradient
checkpointing. The causal LM gets an instance `forward` with the segment-wise loss.
"""

from __future__ import annotations

import functools
import inspect
import logging
import operator
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from lemo_trainer.architectures import CausalLM, find_causal_lm
from lemo_trainer.checkpointing import saving_matmuls
from lemo_trainer.config import LemoConfig
from lemo_trainer.detachment import DetachingLayer
from lemo_trainer.elimination import EliminatingLayer
from lemo_trainer.loss import segmented_cross_entropy, shift
from lemo_trainer.selection import BlockPlan

logger = logging.getLogger(__name__)


@dataclass
class LemoReport:
    """What was patched, and what the last training batch kept.

    Args:
        config: the configuration in force.
        model_type: transformers' name of the architecture.
        total_layers: decoder layers of the model.
        patched_layers: indices of those that leave tokens out.
        active: False runs dense although patched (warm-up).
        seq_len: tokens of a sample in the last training batch that met a patched layer; 0 before the first.
        kept_tokens: how many of them each patched layer computed.
        logits_made: a training batch without `labels` made all its logits, in spite of `loss_segment`: its
            loss is computed outside the model (label smoothing, `compute_loss_func`).
    """

    config: LemoConfig
    model_type: str
    total_layers: int
    patched_layers: tuple[int, ...]
    active: bool = True
    seq_len: int = 0
    kept_tokens: int = 0
    logits_made: bool = False
    undo: list[Callable[[], None]] = field(default_factory=list, repr=False)

    @property
    def kept_share(self) -> float:
        """Share of the tokens that a patched layer computed in the last training batch."""
        return self.kept_tokens / self.seq_len if self.seq_len else 1.0

    @property
    def layer_shares(self) -> dict[int, float]:
        """The same for each patched layer."""
        return dict.fromkeys(self.patched_layers, self.kept_share)

    def __str__(self) -> str:
        return f"LeMo patched {len(self.patched_layers)} of {self.total_layers} layers"

    def warn_of_logits(self) -> None:
        if not self.logits_made:
            self.logits_made = True
            logger.warning(
                "A training batch came without `labels` (label smoothing, a loss function of your own?): all "
                "its logits are made, and LeMo's `loss_segment` saves nothing."
            )

    def plan(self, seq_len: int) -> BlockPlan | None:
        """What a patched layer keeps of a training batch; None is everything."""
        plan = BlockPlan.of(seq_len, self.config)
        dense = plan.keeps_all or not self.active
        self.seq_len, self.kept_tokens = seq_len, seq_len if dense else plan.kept_tokens
        return None if dense else plan


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
            a head that the segment-wise loss cannot read).
    """
    parts = find_causal_lm(model)
    if hasattr(parts.model, "_lemo"):
        raise ValueError("This model is patched by LeMo already; call remove_lemo(model) first.")
    if config.loss_segment:
        _check_head(parts)
    report = LemoReport(
        config, parts.model.config.model_type, len(parts.layers), config.resolve_layers(len(parts.layers))
    )
    patched: EliminatingLayer | DetachingLayer = EliminatingLayer(parts.architecture, config)
    if config.mode == "detach":
        patched = DetachingLayer(parts.architecture, config, parts.layers[report.patched_layers[0]])
    for index, layer in enumerate(parts.layers):
        if index in report.patched_layers:
            _patch_layer(layer, patched, report)
        elif config.selective_checkpointing:
            _patch_layer(layer, None, report)
    _patch_causal_lm(parts, report)
    logger.info("%s", report)
    return report


def remove_lemo(model: nn.Module) -> None:
    """Give every patched part of `model` its own class and `forward` back; an unpatched model stays so."""
    report = getattr(find_causal_lm(model).model, "_lemo", None)
    while report is not None and report.undo:
        report.undo.pop()()


@functools.cache
def _patched_class(layer_class: type[nn.Module]) -> type[nn.Module]:
    """The subclass whose training forward leaves tokens out.

    It checkpoints what it recomputes by itself, the chosen rows only, and so hides the layer's
    `gradient_checkpointing` from transformers, which would recompute the choice too.
    """

    def forward(
        self: Any,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Any = None,
        use_cache: bool | None = False,
        position_embeddings: Any = None,
        **kwargs: Any,
    ) -> Tensor:
        run: Callable[..., Tensor] = operator.call
        if self.training and vars(self).get("gradient_checkpointing"):
            run = self._gradient_checkpointing_func
        elif self.training and self._lemo_report.config.selective_checkpointing:
            run = saving_matmuls
        if run is not operator.call:  # a recomputation would fill a cache again
            past_key_values, use_cache = None, False
        patched: Callable[..., Tensor] | None = self._lemo_layer
        plan = self._lemo_report.plan(hidden_states.shape[1]) if self.training and patched else None
        if patched and plan:
            return patched(self, hidden_states, attention_mask, position_embeddings, plan, run, **kwargs)
        dense = functools.partial(
            layer_class.forward,
            self,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            use_cache=use_cache,
            position_embeddings=position_embeddings,
            **kwargs,
        )
        return run(dense, hidden_states)

    def remember(self: nn.Module, value: bool) -> None:
        vars(self)["gradient_checkpointing"] = value

    namespace = {
        "forward": forward,
        "gradient_checkpointing": property(lambda self: False, remember),
        "__module__": layer_class.__module__,
        "__qualname__": layer_class.__qualname__,
    }
    return type(layer_class.__name__, (layer_class,), namespace)


def _patch_layer(layer: Any, patched: EliminatingLayer | DetachingLayer | None, report: LemoReport) -> None:
    original = layer.__class__
    layer._lemo_layer = None if patched is None else torch.compiler.disable(patched.__call__)
    layer._lemo_report = report
    layer.__class__ = _patched_class(original)

    def undo() -> None:
        layer.__class__ = original
        del layer._lemo_layer, layer._lemo_report

    report.undo.append(undo)


def _patch_causal_lm(parts: CausalLM, report: LemoReport) -> None:
    model = parts.model
    own_forward = model.__dict__.get("forward")  # accelerate's mixed precision puts one there
    forward = model.forward
    signature = inspect.signature(forward)

    @functools.partial(torch.compiler.disable, recursive=False)
    @functools.wraps(forward)
    def lemo_forward(*args: Any, **kwargs: Any) -> Any:
        arguments = signature.bind(*args, **kwargs)
        if not model.training or not hasattr(model, "_lemo"):
            return forward(*args, **kwargs)
        if arguments.arguments.get("past_key_values") is not None:
            raise ValueError("LeMo trains on whole sequences: `past_key_values` must be None, got a cache.")
        if not report.config.loss_segment or arguments.arguments.get("kwargs", {}).get("fused_lm_head"):
            return forward(*args, **kwargs)  # TRL's fused head makes its loss in pieces by itself
        if arguments.arguments.get("labels") is None:
            report.warn_of_logits()
            return forward(*args, **kwargs)
        return _forward_with_segmented_loss(parts, forward, arguments, report.config.loss_segment)

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


def _forward_with_segmented_loss(
    parts: CausalLM, forward: Callable[..., Any], arguments: inspect.BoundArguments, segment: int
) -> Any:
    """The model's own forward without labels and logits, then the loss on the decoder's last hidden state."""
    extra = arguments.arguments.get("kwargs", {})
    labels = arguments.arguments.pop("labels")
    num_items, shift_labels = extra.pop("num_items_in_batch", None), extra.pop("shift_labels", None)
    return_tuple = extra.pop("return_dict", True) is False
    arguments.arguments["logits_to_keep"] = torch.empty(0, dtype=torch.long, device=labels.device)
    seen: dict[str, Any] = {}

    def keep_hidden_state(module: nn.Module, args: Any, output: Any) -> None:
        device_type = output.last_hidden_state.device.type
        autocast = torch.is_autocast_enabled(device_type)
        seen["hidden"] = output.last_hidden_state
        seen["dtype"] = torch.get_autocast_dtype(device_type) if autocast else seen["hidden"].dtype

    hook = parts.decoder.register_forward_hook(keep_hidden_state)
    try:
        output = forward(*arguments.args, **arguments.kwargs)
    finally:
        hook.remove()

    hidden_BSD, dtype = seen["hidden"], seen["dtype"]
    if labels.shape != hidden_BSD.shape[:2]:
        raise ValueError(
            f"`labels` must have the shape of the input, {tuple(hidden_BSD.shape[:2])}, "
            f"got {tuple(labels.shape)}."
        )
    shift_labels = shift(labels) if shift_labels is None else shift_labels
    head: Any = parts.head
    config = parts.model.config.get_text_config()
    loss = segmented_cross_entropy(
        hidden_BSD.flatten(0, 1).to(dtype),
        head.weight.to(dtype),
        shift_labels.flatten().to(hidden_BSD.device),
        bias_V=None if head.bias is None else head.bias.to(dtype),
        segment=segment,
        num_items=num_items,
        scale=1 / getattr(config, "logits_scaling", 1.0),
        softcap=getattr(config, "final_logit_softcapping", None),
    )
    output = type(output)(**{**output, "loss": loss, "logits": None})
    return output.to_tuple() if return_tuple else output


def _check_head(parts: CausalLM) -> None:
    from transformers.loss.loss_utils import ForCausalLMLoss

    if not isinstance(parts.head, nn.Linear) or not parts.head.weight.is_floating_point():
        raise ValueError(
            f"The segment-wise loss needs a plain nn.Linear as output head, got {type(parts.head).__name__} "
            "(LoRA or modules_to_save on lm_head?); leave the head out or set loss_segment=0."
        )
    if parts.model.loss_function is not ForCausalLMLoss:
        raise ValueError(
            f"The segment-wise loss stands in for transformers' ForCausalLMLoss, which "
            f"{type(parts.model).__name__} does not use; set loss_segment=0."
        )
