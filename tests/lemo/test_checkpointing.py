from __future__ import annotations

import dataclasses

import pytest
import torch

from lemo_trainer import apply_lemo
from lemo_trainer.measure import ActivationBytes, FlopCounter

from .tiny import assert_same_step, batch, checkpointing, leaving_out, lora, loss_and_gradients, tiny_model

CONFIGS = {
    "nothing left out": leaving_out(keep_ratio=1.0),
    "detach": leaving_out(),
    "eliminate": leaving_out("eliminate"),
    "segments": leaving_out("segments", layers="auto", block_size=64, segment_tokens=16, keep_ratio=1.0),
}


def step(config, inputs):
    """Loss and gradients of a checkpointed step, its saved bytes and its operations."""
    torch.manual_seed(0)
    model = lora(tiny_model())
    checkpointing(model.get_base_model(), reentrant=False)
    apply_lemo(model, config)
    with ActivationBytes() as activations, FlopCounter() as counter:
        result = loss_and_gradients(model, inputs)
    return result, activations.saved_bytes, counter.flops


@pytest.mark.parametrize("name", CONFIGS)
def test_attention_that_is_saved_gives_the_same_step_with_fewer_operations(name):
    inputs = batch("plain", seq_len=96)
    wanted, saved, flops = step(CONFIGS[name], inputs)
    got, more_saved, fewer_flops = step(dataclasses.replace(CONFIGS[name], save_attention=True), inputs)
    assert_same_step(got, wanted)
    assert fewer_flops < flops
    assert saved < more_saved < 2.2 * saved


def test_attention_that_no_kernel_of_sdpa_computes_cannot_be_saved():
    with pytest.raises(ValueError, match=r"`save_attention` .* got 'eager'"):
        apply_lemo(tiny_model(implementation="eager"), leaving_out(save_attention=True))
