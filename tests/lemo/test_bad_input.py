"""After whatever goes wrong in a step, the next one is right, and the model can be restored."""

from __future__ import annotations

import os
import signal

import pytest
import torch

from lemo_trainer import LemoCallback, LemoConfig, apply_lemo, remove_lemo

from .tiny import assert_same_step, batch, checkpointing, lora, loss_and_gradients, tiny_model
from .training import trainer_for

CONFIGS = {
    "detach": LemoConfig(mode="detach", keep_ratio=0.5, block_size=4, layers="all", selector="recency"),
    "eliminate": LemoConfig(mode="eliminate", keep_ratio=0.5, block_size=4, layers="all", selector="recency"),
    "segments": LemoConfig(mode="segments", segment_tokens=16, loss_segment=16),
    "exact": LemoConfig(mode="exact", scheme="layers", segment_tokens=16, loss_segment=16),
    "exact, segments": LemoConfig(mode="exact", scheme="segments", segment_tokens=16, loss_segment=16),
}
modes = pytest.mark.parametrize("mode", CONFIGS)


class Harness:
    """A model with LeMo whose right step, dense and patched, is known."""

    def __init__(self, mode):
        self.model, self.inputs = tiny_model(), batch("left")
        self.before = [(type(part), sorted(vars(part))) for part in self.model.modules()]
        self.dense = loss_and_gradients(self.model, self.inputs)
        apply_lemo(self.model, CONFIGS[mode])
        self.wanted = loss_and_gradients(self.model, self.inputs)
        self.model.zero_grad()

    def check(self):
        assert_same_step(loss_and_gradients(self.model, self.inputs), self.wanted)
        remove_lemo(self.model)
        assert [(type(part), sorted(vars(part))) for part in self.model.modules()] == self.before
        assert_same_step(loss_and_gradients(self.model, self.inputs), self.dense)


@modes
@pytest.mark.parametrize("error", [RuntimeError("a hook's own"), KeyboardInterrupt()])
@pytest.mark.parametrize("part", ["model.embed_tokens", "model.layers.1.mlp", "lm_head"])
def test_an_exception_in_a_forward_hook(mode, part, error):
    def fail(*_):
        raise error

    harness = Harness(mode)
    if part in ("model.embed_tokens", "lm_head") and mode == "segments":
        part = "model.layers.0"  # hooks outside of layers are refused there
    hook = harness.model.get_submodule(part).register_forward_pre_hook(fail)
    with pytest.raises(type(error)):
        harness.model(**harness.inputs).loss.backward()
    hook.remove()
    harness.check()


@modes
@pytest.mark.parametrize("checkpointed", [False, True])
def test_out_of_memory_in_the_middle_of_a_backward_pass(mode, checkpointed):
    def fail(gradient):
        raise torch.OutOfMemoryError("CUDA out of memory")

    harness = Harness(mode)
    if checkpointed:
        checkpointing(harness.model, reentrant=False)
    hook = harness.model.model.layers[1].mlp.up_proj.weight.register_hook(fail)
    with pytest.raises(torch.OutOfMemoryError):
        harness.model(**harness.inputs).loss.backward()
    hook.remove()
    assert_same_step(loss_and_gradients(harness.model, harness.inputs), harness.wanted)
    remove_lemo(harness.model)
    assert_same_step(loss_and_gradients(harness.model, harness.inputs), harness.dense)


@modes
def test_a_loss_that_is_not_a_number(mode):
    harness = Harness(mode)
    weight = harness.model.lm_head.weight
    own = weight.detach().clone()
    with torch.no_grad():
        weight[5, 0] = torch.nan
    loss = harness.model(**harness.inputs).loss
    assert loss.isnan()
    loss.backward()
    with torch.no_grad():
        weight.copy_(own)
    harness.check()


@modes
def test_a_signal_between_forward_and_backward(mode):
    class AlarmError(Exception):
        pass

    def ring(*_):
        raise AlarmError

    harness = Harness(mode)
    old = signal.signal(signal.SIGUSR1, ring)
    try:
        loss = harness.model(**harness.inputs).loss
        with pytest.raises(AlarmError):
            os.kill(os.getpid(), signal.SIGUSR1)
    finally:
        signal.signal(signal.SIGUSR1, old)
    del loss  # a forward pass without its backward pass
    harness.check()


@modes
def test_a_training_that_failed_goes_on_as_a_new_one_would(mode, tmp_path):
    """An error in a step of a Trainer, then the same training once more, on the same model."""
    config = CONFIGS[mode]
    wanted = lora(tiny_model())
    state = {name: value.clone() for name, value in wanted.state_dict().items()}
    trainer_for(wanted, tmp_path, [LemoCallback(config)]).train()

    model = lora(tiny_model())
    hook = model.get_base_model().model.layers[1].mlp.register_forward_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        trainer_for(model, tmp_path, [LemoCallback(config, measure=True)]).train()
    hook.remove()
    model.load_state_dict(state)
    model.zero_grad()
    trainer_for(model, tmp_path, [LemoCallback(config)]).train()
    torch.testing.assert_close(model.state_dict(), wanted.state_dict(), rtol=1e-5, atol=1e-6)
