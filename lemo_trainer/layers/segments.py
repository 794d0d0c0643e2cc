"""Gradient segments (`mode="segments"`): a sample goes forward and backward one segment after the other.

A segment's queries attend to the keys and values of all segments before it, which enter as constants. The
forward pass is therefore exact, and every token's loss reaches every layer at its own position and through
the keys and values of its own segment. The gradient through the keys and values of earlier segments is cut.
The activations of only one segment exist at a time; of earlier segments, only keys and values do.

With `keep_ratio` below 1, some segments run without graph: their labels count in the loss, not in the
gradient.

Shapes: B batch, S tokens of a sample, G key heads of width d.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from lemo_trainer.compat import (
    Cache,
    DynamicLayer,
    first_gradients_only,
    in_backward,
    is_whole,
    uses_causal_lm_loss,
)
from lemo_trainer.head.checks import hook_on_head, unusual_loss
from lemo_trainer.head.logits import (
    LogitsOnDemand,
    WithoutGradient,
    logits_on_demand,
    with_logits_on_demand,
)
from lemo_trainer.head.loss import IGNORE_INDEX, shift
from lemo_trainer.informativeness.selectors import Selector
from lemo_trainer.layers.checkpointing import without_graph
from lemo_trainer.measure import are_gradients
from lemo_trainer.model.architectures import CausalLM
from lemo_trainer.model.calls import ask_for_dict
from lemo_trainer.model.capture import without_dropout
from lemo_trainer.model.hooks import counts_from_the_end, hooks_outside_layers, without_hooks
from lemo_trainer.model.leaves import Leaves, trained_parameters

FLOAT16 = (
    'mode="segments" computes its gradients before a loss scaler can scale them: train in bfloat16 or '
    'float32, or use mode="detach".'
)
NO_LABELS = (
    'mode="segments" computes its gradients while the model makes the loss, so that a training pass must '
    "have `labels`, got none (label smoothing, `compute_loss_func`, a `compute_loss` that pops them, "
    'TRL\'s preference trainers?); use mode="exact", in which any loss works.'
)
_OTHER_LAYERS = (
    'mode="segments" needs layers that all run in each segment, each with its own number in the cache '
    '(`layer_idx`), got others; use mode="exact".'
)
Forward = Callable[[inspect.BoundArguments], Any]


class _SegmentLayer(DynamicLayer):
    """Keys and values [B, G, S, d] of one layer: those of earlier segments are constants.

    `finish` adds the current segment's to the constants. Until then a recomputation in the backward pass may
    pass them to `update` again, which changes nothing.
    """

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        if hasattr(self, "latest") and not in_backward():
            raise ValueError(_OTHER_LAYERS)  # two layers write to one entry
        self.latest = key_states.detach(), value_states.detach()
        return self._after_past(key_states, value_states)

    def finish(self) -> None:
        if not self.is_initialized:
            return  # no layer writes to it
        if not hasattr(self, "latest"):
            raise ValueError(_OTHER_LAYERS)
        self.keys, self.values = self._after_past(*self.latest)
        del self.latest

    def _after_past(self, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        return torch.cat([self.keys, key], dim=-2), torch.cat([self.values, value], dim=-2)


class SegmentCache(Cache):
    """A cache that recomputation may fill again without harm; see `_SegmentLayer`."""

    def __init__(self) -> None:
        super().__init__(layer_class_to_replicate=_SegmentLayer)

    def finish_segment(self) -> None:
        """Make the keys and values of the latest segment constants of the next ones."""
        for layer in self.layers:
            layer.finish()


class _InSegments(torch.autograd.Function):
    """The loss of `run`, which computes the gradients too; the backward pass only hands them on."""

    @staticmethod
    def forward(
        ctx: Any, run: Callable[[tuple[Tensor, ...]], tuple[Tensor, list[Tensor | None]]], *parameters: Tensor
    ) -> Tensor:
        loss, gradients = run(parameters)
        ctx.save_for_backward(*gradients)
        return loss

    @staticmethod
    @first_gradients_only
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return None, *(None if saved is None else saved * grad for saved in ctx.saved_tensors)


def choose_segments(seq_len: int, selector: Selector, keep_ratio: float) -> list[bool]:
    """Which segments carry gradient: `keep_ratio` of them, at least one, the last in the selector's order."""
    count = -(-seq_len // selector.config.segment_tokens)
    kept = max(1, int(keep_ratio * count + 0.5))
    chosen = set(selector.segment_order(count)[count - kept :])
    return [segment in chosen for segment in range(count)]


def forward_in_segments(
    parts: CausalLM,
    forward: Forward,
    arguments: inspect.BoundArguments,
    segment_tokens: int,
    choose: Callable[[int], list[bool]],
    told: list[bool],
) -> Any:
    """The causal LM's output with its loss, whose gradients are computed before this returns.

    Args:
        forward: the training forward of the causal LM on bound arguments.
        arguments: those of the whole sample.
        segment_tokens: tokens of a segment.
        choose: maps the tokens of a sample to a list that says of each segment whether it carries gradient.
        told: see `LogitsOnDemand`.
    """
    labels = arguments.arguments["labels"]
    arguments.arguments.setdefault("kwargs", {})
    wants_tuple = ask_for_dict(arguments)
    shift_labels = _shift_labels(arguments)
    kept = choose(labels.shape[1])
    outputs: list[Any] = []
    logits: list[LogitsOnDemand] = []

    def run(parameters: tuple[Tensor, ...]) -> tuple[Tensor, list[Tensor | None]]:
        total = torch.zeros((), device=labels.device)
        leaves, cache = Leaves(parameters), SegmentCache()
        for number, start in enumerate(range(0, labels.shape[1], segment_tokens)):
            stop = min(start + segment_tokens, labels.shape[1])
            segment = _segment(arguments, start, stop)
            segment.arguments["kwargs"]["shift_labels"] = shift_labels[:, start:stop].contiguous()
            segment.arguments |= {"past_key_values": cache, "use_cache": False}
            if kept[number] and parameters:
                output = _forward_and_backward(parts, forward, segment, leaves)
            else:
                with without_graph():
                    output = forward(segment)
            total += output.loss.detach()
            cache.finish_segment()
            logits.append(_detached_logits(output))
        outputs.append(output)
        return total, leaves.gradients()

    trained = trained_parameters([parts.model]) if torch.is_grad_enabled() else []
    loss = _InSegments.apply(run, *trained)

    def all_logits() -> Tensor:
        with torch.no_grad():
            whole = torch.cat([make() for make in logits], 1)
        result: Tensor = WithoutGradient.apply(whole, loss)
        return result

    made = LogitsOnDemand(all_logits, dtype=logits[0].dtype, told=told)
    output = with_logits_on_demand(type(outputs[0])(loss=loss), made)
    return output.to_tuple() if wants_tuple else output


def _shift_labels(arguments: inspect.BoundArguments) -> Tensor:
    """The label that each token of the whole sample predicts, [B, S]; notes how many there are."""
    extra = arguments.arguments["kwargs"]
    shift_labels: Tensor | None = extra.pop("shift_labels", None)
    if shift_labels is None:
        shift_labels = shift(arguments.arguments["labels"])
    if extra.get("num_items_in_batch") is None:
        extra["num_items_in_batch"] = (shift_labels != IGNORE_INDEX).sum()
    return shift_labels


def _forward_and_backward(
    parts: CausalLM, forward: Forward, segment: inspect.BoundArguments, leaves: Leaves
) -> Any:
    """The output of a segment, whose gradients are added to those of `leaves`."""
    with torch.enable_grad(), leaves.in_place_of_parameters(parts.model.modules()):
        output = forward(segment)
        output.loss.backward()
    leaves.add_up()
    are_gradients(leaves.sums())
    return output


def _detached_logits(output: Any) -> LogitsOnDemand:
    """What makes the logits of a segment, without graph."""
    on_demand = logits_on_demand(output)
    if on_demand is not None:
        return on_demand.detached()
    logits: Tensor = output.logits.detach()  # loss_segment=0
    return LogitsOnDemand(lambda made: made, logits, dtype=logits.dtype, told=[True])


def _segment(arguments: inspect.BoundArguments, start: int, stop: int) -> inspect.BoundArguments:
    """The arguments cut to tokens `start` to `stop`; the attention mask is cut to 0 to `stop`."""
    given = dict(arguments.arguments)
    given["kwargs"] = dict(given["kwargs"])
    for name in ("input_ids", "inputs_embeds", "position_ids", "labels"):
        if given.get(name) is not None:
            given[name] = given[name][:, start:stop]
    if given.get("attention_mask") is not None:
        given["attention_mask"] = given["attention_mask"][:, :stop]
    segment = inspect.BoundArguments(arguments.signature, {})
    segment.arguments = given
    return segment


def check_batch(parts: CausalLM, arguments: inspect.BoundArguments) -> None:
    """Raise ValueError unless the arguments of a training forward can be cut into segments."""
    given = arguments.arguments
    labels = given["labels"]
    mask, positions, embeddings = (given.get(n) for n in ("attention_mask", "position_ids", "inputs_embeds"))
    whole = given["input_ids"] if embeddings is None else embeddings
    if labels.shape != whole.shape[:2]:
        raise ValueError(
            f"`labels` must have the shape of the input, {tuple(whole.shape[:2])}, got {tuple(labels.shape)}."
        )
    if mask is not None and (not isinstance(mask, Tensor) or mask.ndim != 2):
        raise ValueError(
            'mode="segments" takes attention masks [batch, tokens] only; use mode="detach" for others.'
        )
    if positions is not None and mask is None and (positions.diff(dim=-1) != 1).any():
        raise ValueError(
            'mode="segments" does not know packed documents (`position_ids` that start anew); '
            'use mode="detach", or pad instead of packing.'
        )
    _check_outputs(parts, {**given.get("kwargs", {}), **given})
    if hooks := hooks_outside_layers(parts):
        raise ValueError(
            'mode="segments" runs a sample piece by piece, and a hook on the embeddings (NEFTune?), the last '
            f'norm or the decoder wants it whole, got {", ".join(hooks)}; use mode="exact".'
        )
    if why := unusual_loss(parts.model, arguments) or hook_on_head(parts.head):
        raise ValueError(f'mode="segments" makes the loss piece by piece, and {why}; use mode="exact".')
    if any(map(counts_from_the_end, parts.layers)):
        raise ValueError(
            'mode="segments" runs a sample piece by piece, and PEFT\'s aLoRA counts tokens from its end; '
            'use mode="exact", or LoRA.'
        )
    if embeddings is not None and embeddings.requires_grad:
        raise ValueError(
            'mode="segments" trains the model\'s own weights only, got `inputs_embeds` with a gradient '
            '(prompt tuning?); use mode="detach".'
        )
    if torch.is_autocast_enabled(labels.device.type) and (
        torch.get_autocast_dtype(labels.device.type) == torch.float16
    ):
        raise ValueError(FLOAT16)


def _check_outputs(parts: CausalLM, given: dict[str, Any]) -> None:
    def asked_for(name: str) -> bool:
        value = given.get(name)
        return bool(getattr(parts.model.config, name, False) if value is None else value)

    if asked_for("output_router_logits"):
        raise ValueError(
            'mode="segments" has no balancing loss of the experts, which is that of a whole sample, got '
            'output_router_logits=True; set it to False, or use mode="exact" or "detach".'
        )
    for name in ("output_hidden_states", "output_attentions"):
        if asked_for(name):
            raise ValueError(
                f'mode="segments" keeps no outputs of layers of a whole sample, got {name}=True; leave it '
                'out, or use mode="detach".'
            )


def check_segments(parts: CausalLM) -> None:
    """Raise ValueError unless the model computes the same in two segments as in one, and its loss adds up."""
    model = parts.model
    if not uses_causal_lm_loss(model):
        raise ValueError(
            f'mode="segments" needs transformers\' ForCausalLMLoss, whose parts add up, and '
            f'{type(model).__name__} has a loss of its own; use mode="detach".'
        )
    if not all(weight.is_meta or is_whole(weight) for weight in model.parameters()):
        raise ValueError(
            'mode="segments" takes gradients with respect to whole weights, and these are sharded (FSDP, '
            'ZeRO-3); use mode="detach", DDP or ZeRO-2.'
        )
    embeddings = model.get_input_embeddings().weight
    if embeddings.is_meta:
        return
    tokens = torch.arange(1, 9, device=embeddings.device)[None] % embeddings.shape[0]
    cache = SegmentCache()
    pieces = []
    with torch.no_grad(), without_dropout(model), without_hooks(model):
        wanted = model.base_model(input_ids=tokens, use_cache=False)[0]
        for piece in tokens.split(5, 1):
            pieces.append(model.base_model(input_ids=piece, past_key_values=cache, use_cache=False)[0])
            cache.finish_segment()
    got = torch.cat(pieces, 1)
    tolerance = 1e-3 if wanted.dtype == torch.float32 else 5e-2
    if got.shape != wanted.shape or (got - wanted).norm() > tolerance * wanted.norm():
        raise ValueError(
            f'mode="segments" needs a model whose layers keep keys and values of all earlier tokens; '
            f'{type(model).__name__} gives other hidden states in two pieces than in one; use mode="detach".'
        )
