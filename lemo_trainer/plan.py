"""What a training step will cost, before the model is loaded: `lemo plan`.

The step itself runs, forward, backward and optimizer, on models of the same shapes with one to four layers
and random weights. Bytes, operations and seconds of the whole model follow from those on a line,

    cost = fixed + dense layers * cost of a dense layer + patched layers * cost of a patched layer

so that whatever the installed torch, the attention kernel, LoRA and LeMo really do is in the prediction.
"""

from __future__ import annotations

import copy
import dataclasses
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from lemo_trainer.config import LemoConfig
from lemo_trainer.measure import ActivationBytes, FlopCounter
from lemo_trainer.patch import apply_lemo


@dataclass(frozen=True)
class StepCost:
    """One training step.

    Args:
        saved_bytes: most bytes of activations that wait for a backward pass.
        peak_bytes: most bytes of tensors at one time: weights, gradients, optimizer states and activations.
            The process itself and its libraries come on top.
        flops: floating-point operations of the matrix products.
        seconds: of forward, backward and optimizer.
    """

    saved_bytes: float
    peak_bytes: float
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
        device: where the short models run.
    """

    model_config: Any
    seq_len: int
    batch_size: int = 1
    lora: Mapping[str, Any] | None = None
    dtype: torch.dtype = torch.float32
    device: str = "cpu"


def predict(setup: Setup, lemo: LemoConfig | None, *, checkpointing: bool, repeats: int = 2) -> StepCost:
    """The cost of a step with LeMo (None: without), with or without gradient checkpointing.

    Args:
        repeats: timed steps of each short model, of which the fastest counts.
    """
    total = setup.model_config.num_hidden_layers
    by_layer = lemo is not None and lemo.mode != "segments"
    patched = len(lemo.resolve_layers(total)) if lemo is not None and by_layer else 0

    def measure(dense: int, patched: int) -> StepCost:
        layers = tuple(range(dense, dense + patched))
        short = lemo
        if lemo is not None and by_layer:
            # A model without patched layers still has LeMo's loss and its selective checkpointing.
            short = dataclasses.replace(lemo, thresholds="", layers=layers or (0,))
            short = short if layers else dataclasses.replace(short, keep_ratio=1.0)
        return _measure(setup, dense + patched, short, checkpointing, repeats)

    at_one, at_four = measure(1, 0), measure(4, 0)
    with_patched = measure(1, 3) if patched else at_four

    def cost(name: str) -> float:
        fixed, dense, mixed = (getattr(at, name) for at in (at_one, at_four, with_patched))
        a_dense, a_patched = (dense - fixed) / 3, (mixed - fixed) / 3
        return float(fixed + (total - patched - 1) * a_dense + patched * a_patched)

    step = StepCost(*(cost(field.name) for field in dataclasses.fields(StepCost)))
    return dataclasses.replace(step, peak_bytes=step.peak_bytes + _state_bytes(setup, total))


def fit(
    setup: Setup,
    lemo: LemoConfig,
    *,
    checkpointing: bool,
    memory: float | None = None,
    flops_share: float | None = None,
) -> LemoConfig:
    """`lemo` with what makes a step fit: the largest `segment_tokens`, or in other modes the `keep_ratio`.

    Args:
        memory: bytes that `peak_bytes` must stay within.
        flops_share: share of the operations of the dense step with the same checkpointing.

    Raises:
        ValueError: there is no such value.
    """
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
    low, high = 0.1, 1.0

    def cost(keep_ratio: float) -> float:
        tried = dataclasses.replace(lemo, keep_ratio=keep_ratio)
        return float(getattr(predict(setup, tried, checkpointing=checkpointing, repeats=0), name))

    least, most = cost(low), cost(high)
    if least > limit:
        raise ValueError(
            f"Keeping a tenth of the tokens still takes {least:.3g} {name}, more than {limit:.3g}: take "
            "checkpointing, shorter samples or a smaller batch."
        )
    share = 1.0 if most <= limit else low + (high - low) * (limit - least) / (most - least)
    return dataclasses.replace(lemo, keep_ratio=int(share * 100) / 100)


def _short_config(config: Any, layers: int) -> Any:
    """`config` with so many layers, and the lists that say something of each layer cut accordingly."""
    config = copy.deepcopy(config)
    total = config.num_hidden_layers
    config.num_hidden_layers = layers
    for name, value in vars(config).items():
        if isinstance(value, list | tuple) and len(value) == total:
            setattr(config, name, value[:layers])
    return config


def _build(setup: Setup, layers: int, device: str) -> nn.Module:
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
    """Weights, and gradients and two states of AdamW for those that are trained."""
    parameters = list(_build(setup, layers, "meta").parameters())
    return sum(p.nbytes + 3 * p.nbytes * p.requires_grad for p in parameters)


def _measure(
    setup: Setup, layers: int, lemo: LemoConfig | None, checkpointing: bool, repeats: int
) -> StepCost:
    model: Any = _build(setup, layers, setup.device)
    if checkpointing:
        name = "activation_checkpointing_enable"
        enable = getattr(model, name, None) or model.gradient_checkpointing_enable
        enable({"use_reentrant": False})
    if lemo is not None:
        apply_lemo(model, lemo)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad])
    tokens = torch.randint(
        setup.model_config.vocab_size, (setup.batch_size, setup.seq_len), device=setup.device
    )

    def step() -> None:
        model(input_ids=tokens, labels=tokens, use_cache=False).loss.backward()

    for parameter in optimizer.param_groups[0]["params"]:  # so that the step makes none of its own
        parameter.grad = torch.zeros_like(parameter)
    with ActivationBytes() as activations, FlopCounter() as counter:
        step()
    seconds = []
    for _ in range(repeats):
        start = time.perf_counter()
        step()
        optimizer.step()
        if setup.device == "cuda":
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - start)
    return StepCost(activations.saved_bytes, activations.peak_bytes, counter.flops, min(seconds, default=0.0))
