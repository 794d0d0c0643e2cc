"""PEFT's tuners by modes: each cell of the table in docs/lemo_works_with.md."""

from __future__ import annotations

import dataclasses
import os
from unittest import mock

import peft
import pytest
import torch

from lemo_trainer import apply_lemo

from .tiny import EVERY_MODE, assert_same_step, batch, documented, every_mode, loss_and_gradients, tiny_model

# peft 0.21 still reads transformers' old name.
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")

QV = {"target_modules": ["q_proj", "v_proj"]}
LINEAR = {"target_modules": "all-linear"}
TUNERS = {
    "LoRA": lambda: peft.LoraConfig(**LINEAR, r=2, init_lora_weights=False),
    "DoRA": lambda: peft.LoraConfig(**LINEAR, r=2, use_dora=True, init_lora_weights=False),
    "rsLoRA": lambda: peft.LoraConfig(**LINEAR, r=2, use_rslora=True, init_lora_weights=False),
    "aLoRA": lambda: peft.LoraConfig(**LINEAR, r=2, alora_invocation_tokens=[5, 6], init_lora_weights=False),
    "AdaLoRA": lambda: peft.AdaLoraConfig(**QV, target_r=2, init_r=3, total_step=10),
    "AdaptionPrompt": lambda: peft.AdaptionPromptConfig(adapter_len=3, adapter_layers=2),
    "BOFT": lambda: peft.BOFTConfig(**QV, boft_block_size=4, init_weights=False),
    "C3A": lambda: peft.C3AConfig(**QV, block_size=8),
    "DeLoRA": lambda: peft.DeloraConfig(**QV, r=2),
    "FourierFT": lambda: peft.FourierFTConfig(**QV, n_frequency=20),
    "GraLoRA": lambda: peft.GraloraConfig(**QV, r=4, gralora_k=2),
    "HiRA": lambda: peft.HiraConfig(**QV, r=2),
    "HRA": lambda: peft.HRAConfig(**QV, r=2),
    "IA3": lambda: peft.IA3Config(
        target_modules=["k_proj", "v_proj", "down_proj"], feedforward_modules=["down_proj"]
    ),
    "LN tuning": lambda: peft.LNTuningConfig(target_modules=["input_layernorm", "post_attention_layernorm"]),
    "LoHa": lambda: peft.LoHaConfig(**QV, r=2, init_weights=False),
    "LoKr": lambda: peft.LoKrConfig(**QV, r=2, init_weights=False),
    "MiSS": lambda: peft.MissConfig(**QV, r=2),
    "OFT": lambda: peft.OFTConfig(**QV, r=0, oft_block_size=4, init_weights=False),
    "P-tuning": lambda: peft.PromptEncoderConfig(num_virtual_tokens=3, encoder_hidden_size=16),
    "Prefix tuning": lambda: peft.PrefixTuningConfig(num_virtual_tokens=3),
    "Prompt tuning": lambda: peft.PromptTuningConfig(num_virtual_tokens=3),
    "RandLoRA": lambda: peft.RandLoraConfig(**QV, r=2),
    "RoAd": lambda: peft.RoadConfig(**QV, group_size=4, init_weights=False),
    "SHiRA": lambda: peft.ShiraConfig(**QV, r=2),
    "Trainable tokens": lambda: peft.TrainableTokensConfig(token_indices=[5, 6, 7]),
    "VBLoRA": lambda: peft.VBLoRAConfig(**QV, r=2, num_vectors=8, vector_length=8, topk=2),
    "VeRA": lambda: peft.VeraConfig(**QV, r=2),
    "WaveFT": lambda: peft.WaveFTConfig(**QV, n_frequency=20),
}
REFUSED = {("Prefix tuning", mode): "PEFT's prefix tuning" for mode in EVERY_MODE}
REFUSED |= {("AdaptionPrompt", mode): "PEFT's adaption prompt" for mode in EVERY_MODE}
REFUSED |= {
    ("aLoRA", "segments"): "PEFT's aLoRA",
    ("Prompt tuning", "segments"): "prompt tuning",
    ("P-tuning", "segments"): "prompt tuning",
}
KEEPING_ALL, HALF = every_mode(), every_mode(0.5)
HALF["segments"] = dataclasses.replace(HALF["segments"], selector="recency")


@pytest.fixture(autouse=True)
def _same_compiler():
    """PEFT's BOFT leaves the compiler of its kernels in the environment, and Inductor reads it there."""
    with mock.patch.dict(os.environ):
        yield


def tuned(name):
    config = TUNERS[name]()
    config.task_type = "CAUSAL_LM"
    torch.manual_seed(0)
    model = peft.get_peft_model(tiny_model(), config).train()
    for parameter in model.parameters():  # nothing starts at the identity, where gradients are 0
        if parameter.requires_grad and parameter.is_floating_point():
            with torch.no_grad():
                parameter.add_(0.02 * torch.randn_like(parameter))
    return model


def inputs_for(name):
    inputs = batch("right")
    if name == "aLoRA":
        inputs["input_ids"][:, 20:22] = torch.tensor([5, 6])
    if name == "Trainable tokens":
        inputs["input_ids"][:, 20:23] = torch.tensor([5, 6, 7])
    return inputs


def refused_step(model, mode, inputs):
    apply_lemo(model, KEEPING_ALL[mode])
    model(**inputs)


@pytest.mark.parametrize("mode", KEEPING_ALL)
@pytest.mark.parametrize("name", TUNERS)
def test_tuner(name, mode):
    """Loss and gradients equal the plain ones where everything is kept, and half works; or it is refused."""
    model, inputs = tuned(name), inputs_for(name)
    if sentence := REFUSED.get((name, mode)):
        with pytest.raises(ValueError, match=sentence):
            refused_step(model, mode, inputs)
        return
    torch.manual_seed(1)
    wanted = loss_and_gradients(model, inputs)
    apply_lemo(model, KEEPING_ALL[mode])
    torch.manual_seed(1)
    assert_same_step(loss_and_gradients(model, inputs), wanted, rtol=1e-4, atol=1e-5)
    half = tuned(name)
    report = apply_lemo(half, HALF[mode])
    loss, gradients = loss_and_gradients(half, inputs)
    if mode != "eliminate":
        torch.testing.assert_close(loss, wanted[0], rtol=1e-4, atol=1e-5)
    assert mode in ("auto", "exact") or 0.3 < report.kept_share < 0.72
    assert all(gradient.isfinite().all() for gradient in gradients.values())
    assert any(gradient.norm() > 0 for gradient in gradients.values())


def test_the_table_in_the_docs_is_this_one():
    assert documented("PEFT's tuners") == {
        name: ["refused" if (name, mode) in REFUSED else "equal" for mode in KEEPING_ALL] for name in TUNERS
    }
