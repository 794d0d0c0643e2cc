from __future__ import annotations

import pytest
import torch

from lemo_trainer import apply_lemo

from .tiny import assert_same_step, batch, leaving_out, loss_and_gradients, tiny_model


@pytest.mark.filterwarnings("ignore:_compile flag on create_block_mask")  # transformers' own call
@pytest.mark.parametrize(("kind", "mode"), [("mistral", "eliminate"), ("gemma2", "detach")])
def test_flex_attention_takes_the_step_of_the_others(kind, mode):
    model = tiny_model(kind)
    inputs = batch("left")
    apply_lemo(model, leaving_out(mode))
    wanted = loss_and_gradients(model, inputs)
    model = tiny_model(kind, implementation="flex_attention")
    apply_lemo(model, leaving_out(mode))
    with torch.compiler.set_stance("force_eager"):  # or the mask is compiled
        assert_same_step(loss_and_gradients(model, inputs), wanted)
