"""Property: where LeMo keeps everything, a step is that of the plain model, whatever a user adds."""

from __future__ import annotations

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from lemo_trainer import LemoConfig, apply_lemo

from .exact import relative_error
from .tiny import EVERY_MODE, VOCAB, checkpointing, lora, tiny_model


@st.composite
def steps(draw):
    """A model, its inputs, and what else happens in the step."""
    seq_len = draw(st.integers(5, 40))
    return {
        "kind": draw(st.sampled_from(["llama", "gpt2", "qwen3", "gemma3_text", "gpt_neox", "mixtral"])),
        "layers": draw(st.integers(1, 3)),
        "seq_len": seq_len,
        "batch": draw(st.integers(1, 3)),
        "padding": draw(st.sampled_from(["none", "left", "right", "packed", "shifted"])),
        "unlabelled": draw(st.integers(0, seq_len - 2)),
        "micro_batches": draw(st.integers(1, 2)),
        "forwards": draw(st.integers(1, 2)),
        "hooks": draw(st.booleans()),
        "adapter": draw(st.booleans()),
        "checkpointed": draw(st.booleans()),
        "loss_segment": draw(st.sampled_from([0, 7])),
        "segment": draw(st.integers(1, 40)),
        "seed": draw(st.integers(0, 2**16)),
    }


def inputs_of(case, seed):
    generator = torch.Generator().manual_seed(seed)
    size, seq_len = case["batch"], case["seq_len"]
    ids = torch.randint(3, VOCAB, (size, seq_len), generator=generator)
    labels = ids.clone()
    labels[:, : case["unlabelled"]] = -100
    inputs = {"input_ids": ids, "labels": labels, "use_cache": False}
    if case["padding"] in ("left", "right"):
        mask = torch.ones_like(ids)
        for row in range(size):
            mask[row, : int(torch.randint(0, seq_len // 2 + 1, (), generator=generator))] = 0
        inputs["attention_mask"] = mask if case["padding"] == "left" else mask.flip(1)
        real = inputs["attention_mask"].bool()
        labels[~real | ~real.roll(1, 1)] = -100
        labels[:, 1 if case["padding"] == "right" else -1] = 5  # some label is left
    elif case["padding"] == "packed":
        first = int(torch.randint(1, seq_len, (), generator=generator))
        inputs["position_ids"] = torch.cat([torch.arange(first), torch.arange(seq_len - first)])[None]
    elif case["padding"] == "shifted":
        inputs["position_ids"] = (torch.arange(seq_len) + 3)[None]
    return inputs


def model_of(case):
    torch.manual_seed(case["seed"])
    layers = 3 if case["kind"] == "gemma3_text" else case["layers"]  # whose kinds of layers are listed
    model = tiny_model(case["kind"], layers=layers).double()
    model.config._experts_implementation = "eager"  # torch's grouped products have no float64
    if case["adapter"]:
        model = lora(model, target_modules=["c_attn"] if case["kind"] == "gpt2" else "all-linear").double()
        model.enable_input_require_grads()
    if case["checkpointed"]:
        checkpointing(getattr(model, "get_base_model", lambda: model)(), reentrant=False)
    if case["hooks"]:
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        trained[len(trained) // 2].register_hook(lambda gradient: 3 * gradient)
    return model


def step(model, case):
    model.zero_grad()
    total = 0.0
    for number in range(case["micro_batches"]):
        loss = sum(
            model(**inputs_of(case, case["seed"] + 10 * number + more)).loss
            for more in range(case["forwards"])
        )
        (loss / case["micro_batches"]).backward()
        total += loss.detach()
    return total, {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def config_of(mode, case):
    common = {"mode": mode, "loss_segment": case["loss_segment"]}
    if mode in ("auto", "exact"):
        return LemoConfig(**common, segment_tokens=case["segment"])
    if mode == "segments":  # one segment is the whole sample
        return LemoConfig(**common, segment_tokens=case["seq_len"])
    return LemoConfig(**common, keep_ratio=1.0, block_size=4, layers="all")


@pytest.mark.parametrize("mode", EVERY_MODE)
@settings(max_examples=15, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(case=steps())
def test_a_step_is_that_of_the_plain_model(mode, case):
    if mode == "segments" and case["padding"] == "packed":
        case = {**case, "padding": "none"}  # refused
    wanted = step(model_of(case), case)
    model = model_of(case)
    apply_lemo(model, config_of(mode, case))
    assert relative_error(step(model, case), wanted) < 1e-6


@pytest.mark.parametrize("mode", ["auto", "exact", "detach", "eliminate"])
@settings(max_examples=6, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(case=steps())
def test_so_is_a_step_of_a_loss_from_outside(mode, case):
    def smoothed(model):
        model.zero_grad()
        inputs = inputs_of(case, case["seed"])
        labels = inputs.pop("labels")[:, 1:].flatten()
        logits = model(**inputs).logits[:, :-1].flatten(0, 1)
        loss = F.cross_entropy(logits, labels, label_smoothing=0.1)
        loss.backward()
        return loss.detach(), {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}

    wanted = smoothed(model_of(case))
    model = model_of(case)
    apply_lemo(model, config_of(mode, case))
    assert relative_error(smoothed(model), wanted) < 1e-6
