"""Prediction of the cost of a training step without loading the model (`lemo plan`).

Real steps, forward, backward and optimizer, run on models of the same shapes with one to five layers and
random weights. Bytes, operations and seconds of the whole model are extrapolated from them, linearly in the
layers:

    cost = fixed + dense layers * cost of a dense layer + patched layers * cost of a patched layer

The prediction therefore contains all that the installed torch, the attention kernel, LoRA and LeMo really do.
"""

from __future__ import annotations

import copy
import dataclasses
import time
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from lemo_trainer.compat import enable_checkpointing
from lemo_trainer.config import LemoConfig
from lemo_trainer.measure import ActivationBytes, FlopCounter
from lemo_trainer.model.architectures import find_causal_lm
from lemo_trainer.patch import apply_lemo
from lemo_trainer.registry import SELECTORS


@dataclass(frozen=True)
class StepCost:
    """One training step.

    Args:
        saved_bytes: the most bytes of activations that wait for a backward pass at one time.
        peak_bytes: the most bytes of tensors at one time: weights, gradients, optimizer states and
            activations. The process itself and its libraries come on top.
        flops: floating-point operations of the matrix products.
        seconds: duration of forward, backward and optimizer.
    """

    saved_bytes: float
    peak_bytes: float
    flops: float
    seconds: float


@dataclass(frozen=True)
class _Measured:
    """A measured step. Every field is linear in the number of layers; the peaks do not count weights."""

    saved_bytes: float
    layers_peak: float
    head_peak: float
    flops: float
    seconds: float


@dataclass(frozen=True, kw_only=True)
class Setup:
    """The run whose steps are predicted.

    Args:
        model_config: transformers' config of the causal LM.
        seq_len: tokens of a sample.
        batch_size: samples of a step.
        lora: fields of `peft.LoraConfig`; None trains all weights.
        dtype: of the weights.
        device: the device on which the short models run.

    Raises:
        ValueError: `seq_len` below 2 or `batch_size` below 1.
    """

    model_config: Any
    seq_len: int
    batch_size: int = 1
    lora: Mapping[str, Any] | None = None
    dtype: torch.dtype = torch.float32
    device: str = "cpu"

    def __post_init__(self) -> None:
        for name, least in (("seq_len", 2), ("batch_size", 1)):
            if getattr(self, name) < least:
                raise ValueError(f"`{name}` must be at least {least}, got {getattr(self, name)}.")


def predict(setup: Setup, lemo: LemoConfig | None, *, checkpointing: bool, repeats: int = 2) -> StepCost:
    """The cost of a step with or without gradient checkpointing.

    Under `mode="segments"` it assumes that the last segments carry gradient, since they cost most. A selector
    that needs a trained model is replaced by its stand-in: exact scores, which cost more than predicted ones.

    Args:
        lemo: the configuration of LeMo; None predicts the plain model.
        repeats: timed steps of each short model, of which the fastest counts; 0 gives 0 seconds.

    Raises:
        ValueError: `lemo` has thresholds, or the model has fewer positions than `setup.seq_len`.
    """
    if lemo is not None:
        if lemo.mode == "auto":
            raise ValueError(
                '`mode` must be named for a prediction, got "auto", which chooses by the costs that '
                "`plan_ways` gives."
            )
        check_predictable(lemo)
        lemo = _predictable(lemo)
    kinds = _layer_kinds(setup.model_config)
    weighted = []
    for kind, count in Counter(kinds).items():
        alike = dataclasses.replace(setup, model_config=_alike(setup.model_config, kinds.index(kind)))
        weighted.append((_predict_alike(alike, lemo, checkpointing, repeats), count / len(kinds)))
    step = _sum(weighted)
    peak = max(step.layers_peak, step.head_peak) + _state_bytes(setup, len(kinds))
    return StepCost(step.saved_bytes, peak, step.flops, step.seconds)


def _sum(weighted: list[tuple[_Measured, float]]) -> _Measured:
    names = [field.name for field in dataclasses.fields(_Measured)]
    return _Measured(
        *(float(sum(weight * getattr(step, name) for step, weight in weighted)) for name in names)
    )


def check_predictable(lemo: LemoConfig) -> None:
    """Raise ValueError for thresholds."""
    if lemo.thresholds:
        raise ValueError(
            "`thresholds` must be left out of a prediction, which has no weights and text to compare them "
            "with; give `layers` and `keep_ratio` instead, got thresholds "
            f"{lemo.thresholds!r}."
        )


def _predictable(lemo: LemoConfig) -> LemoConfig:
    """`lemo` with a selector that runs on short models with random weights."""
    if lemo.mode == "segments":
        return dataclasses.replace(lemo, selector="recency")
    traits = SELECTORS[lemo.resolved_selector]
    if traits.stand_in is None:
        return lemo
    changes: dict[str, Any] = {"selector": traits.stand_in}
    changes |= {each.name: each.default for each in dataclasses.fields(lemo) if each.name in traits.options}
    return dataclasses.replace(lemo, **changes)


def _predict_alike(setup: Setup, lemo: LemoConfig | None, checkpointing: bool, repeats: int) -> _Measured:
    """A step of a model in which all layers are of one kind."""
    total = setup.model_config.num_hidden_layers
    chosen = () if lemo is None or lemo.mode in ("exact", "segments") else lemo.resolve_layers(total)
    patched = len(chosen)

    def measure(layers: int, patched: tuple[int, ...]) -> _Measured:
        short = lemo
        if lemo is not None and chosen:
            # Even without a patched layer the model has LeMo's loss and selective checkpointing.
            short = dataclasses.replace(lemo, layers=patched or (0,))
            short = short if patched else dataclasses.replace(short, keep_ratio=1.0)
        return _measure(setup, layers, short, checkpointing, repeats)

    if patched == total:
        # At least two layers: where only the first one chooses blocks, its peak is higher than the others'.
        two, five = measure(2, (0, 1)), measure(5, (0, 1, 2, 3, 4))
        weighted = [(two, 1 - (total - 2) / 3), (five, (total - 2) / 3)]
    else:
        # First and last layer are as in the model: the peak and the saved bytes depend on them.
        first = 0 if 0 in chosen else 1
        beside = max(1, first + (total - 1 not in chosen))  # dense layers of the mixed model
        dense = total - 1 - patched - (beside - 1) * patched / 3
        one, four = measure(1, ()), measure(4, ())
        weighted = [(one, 1 - (patched + dense) / 3), (four, dense / 3)]
        if patched:
            mixed = measure(3 + beside, tuple(range(first, first + 3)))
            weighted.append((mixed, patched / 3))

    return _sum(weighted)


def fit(
    setup: Setup,
    lemo: LemoConfig,
    *,
    checkpointing: bool,
    memory: float | None = None,
    flops_share: float | None = None,
) -> LemoConfig:
    """`lemo` changed so that the predicted step stays within a limit.

    A limit on memory under `mode="segments"` changes `segment_tokens`, which is halved until the step fits;
    every other limit changes `keep_ratio`, which stays at least 0.1.

    Args:
        memory: limit on `peak_bytes`; give this or `flops_share`.
        flops_share: limit on the operations, as a share of the dense step with the same checkpointing.

    Raises:
        ValueError: no value fits, or both limits or neither are given.
    """
    if (memory is None) == (flops_share is None):
        raise ValueError(f"Give one of `memory` and `flops_share`, got {memory} and {flops_share}.")
    if memory is not None and lemo.mode == "segments":
        tokens = min(lemo.segment_tokens, setup.seq_len)
        while tokens >= 32:
            tried = dataclasses.replace(lemo, segment_tokens=tokens)
            if predict(setup, tried, checkpointing=checkpointing, repeats=0).peak_bytes <= memory:
                return tried
            tokens //= 2
        raise ValueError(f"No segment of 32 tokens or more fits {memory:.3g} bytes.")
    if memory is not None:
        limit, name = memory, "peak_bytes"
    else:
        assert flops_share is not None
        dense = predict(setup, None, checkpointing=checkpointing, repeats=0)
        limit, name = flops_share * dense.flops, "flops"

    def cost(keep_ratio: float) -> float:
        tried = dataclasses.replace(lemo, keep_ratio=keep_ratio)
        return float(getattr(predict(setup, tried, checkpointing=checkpointing, repeats=0), name))

    if cost(1.0) <= limit:
        return dataclasses.replace(lemo, keep_ratio=1.0)
    low, high = 0.1, 0.9  # not up to 1, where the model's own code runs and may cost less
    least, most = cost(low), cost(high)
    if least > limit:
        raise ValueError(
            f"Keeping a tenth of the tokens still takes {least:.3g} {name}, more than {limit:.3g}: take "
            "checkpointing, shorter samples or a smaller batch."
        )
    share = high if most <= limit else low + (high - low) * (limit - least) / (most - least)
    share = int(share * 100) / 100
    while share > low and cost(share) > limit:  # the cost rises in steps, by whole blocks
        share = max(low, round(share - 0.05, 2))
    return dataclasses.replace(lemo, keep_ratio=share)


def _by_layer(config: Any) -> dict[str, list[Any]]:
    """The fields of `config` with one entry for each layer, such as `layer_types`."""
    return {
        name: list(value)
        for name, value in vars(config).items()
        if isinstance(value, list | tuple) and len(value) == config.num_hidden_layers
    }


def _layer_kinds(config: Any) -> list[str]:
    """The kind of each layer; layers of one kind cost the same."""
    fields = _by_layer(config).values()
    return [repr([values[layer] for values in fields]) for layer in range(config.num_hidden_layers)]


def _alike(config: Any, layer: int) -> Any:
    """`config` with every layer of the kind of layer number `layer`."""
    alike = copy.deepcopy(config)
    for name, values in _by_layer(config).items():
        setattr(alike, name, [values[layer]] * len(values))
    return alike


def _short_config(config: Any, layers: int) -> Any:
    """`config` with this many layers, cut off or repeated from the first one on."""
    short = copy.deepcopy(config)
    short.num_hidden_layers = layers
    for name, values in _by_layer(config).items():
        setattr(short, name, [values[index % len(values)] for index in range(layers)])
    return short


def build(setup: Setup, layers: int, device: str) -> nn.Module:
    """The model of `setup` with this many layers and random weights, in training mode."""
    from transformers import AutoModelForCausalLM

    with torch.device(device):
        model: Any = AutoModelForCausalLM.from_config(
            _short_config(setup.model_config, layers), dtype=setup.dtype
        )
        if setup.lora is not None:
            from peft import LoraConfig, get_peft_model

            model = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", **setup.lora))
    trained: nn.Module = model.train()
    return trained


def _state_bytes(setup: Setup, layers: int) -> int:
    """Bytes of the weights, and of the gradients and two AdamW states of the trained ones."""
    parameters = list(build(setup, layers, "meta").parameters())
    return sum(p.nbytes + 3 * p.nbytes * p.requires_grad for p in parameters)


def _measure(
    setup: Setup, layers: int, lemo: LemoConfig | None, checkpointing: bool, repeats: int
) -> _Measured:
    model: Any = build(setup, layers, setup.device)
    if checkpointing:
        enable_checkpointing(model)
    if lemo is not None:
        apply_lemo(model, dataclasses.replace(lemo, warmup_steps=0, ramp_steps=0))
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad])
    tokens = torch.randint(
        setup.model_config.vocab_size, (setup.batch_size, setup.seq_len), device=setup.device
    )

    def step() -> None:
        model(input_ids=tokens, labels=tokens, use_cache=False).loss.backward()

    for parameter in optimizer.param_groups[0][
        "params"
    ]:  # allocated before the step, as in all steps but the first
        parameter.grad = torch.zeros_like(parameter)
    activations = ActivationBytes()
    layers_of_model = find_causal_lm(model).layers
    hooks = [
        layers_of_model[0].register_forward_pre_hook(lambda *_: setattr(activations, "phase", "layers")),
        layers_of_model[-1].register_forward_hook(lambda *_: setattr(activations, "phase", "head")),
    ]
    try:
        with activations, FlopCounter() as counter:
            step()
    except IndexError as error:
        raise ValueError(
            f"`seq_len` must be within the model's positions, "
            f"{getattr(setup.model_config, 'max_position_embeddings', 'unknown')}, got {setup.seq_len}."
        ) from error
    for hook in hooks:
        hook.remove()
    seconds = []
    for _ in range(repeats):
        start = time.perf_counter()
        step()
        optimizer.step()
        if setup.device == "cuda":
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - start)
    return _Measured(
        activations.saved_bytes,
        max(activations.peaks["layers"], activations.peaks[""]),
        activations.peaks["head"],
        counter.flops,
        min(seconds, default=0.0),
    )
