from __future__ import annotations

import pytest
import torch

from lemo_trainer import apply_lemo, remove_lemo

from .tiny import MODES, assert_same_step, batch, leaving_out, loss_and_gradients, tiny_model


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("kind", ["mixtral", "qwen2_moe", "olmoe"])
def test_router_losses_come_from_all_tokens(kind, mode):
    model = tiny_model(kind, output_router_logits=True, router_aux_loss_coef=3.0)
    inputs = batch("left")
    wanted = loss_and_gradients(model, inputs)
    report = apply_lemo(model, leaving_out(keep_ratio=1.0))
    assert_same_step(loss_and_gradients(model, inputs), wanted)
    remove_lemo(model)
    report = apply_lemo(model, leaving_out(mode))
    assert report.wiring.dense_mlps == ((0, 2) if kind == "qwen2_moe" else (0, 1, 2))
    assert "works on all tokens (mixture of experts)" in str(report)
    output = model(**inputs)
    assert all(len(logits) == 2 * 45 for logits in output.router_logits)
    if mode == "detach":
        torch.testing.assert_close(output.loss, wanted[0])


def test_a_head_that_does_more_than_scaling_and_capping_is_refused():
    model = tiny_model("recurrent_gemma", attention_window_size=16)
    with pytest.raises(ValueError, match=r"must equal that of RecurrentGemmaForCausalLM.*set loss_segment=0"):
        apply_lemo(model, leaving_out())
    assert apply_lemo(model, leaving_out(loss_segment=0)).patched_layers == (2,)
