"""The patch acts in training passes of one model only: nowhere else, and on no copy."""

from __future__ import annotations

import copy
import io
import pickle
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState

from lemo_trainer import LemoConfig, apply_lemo, remove_lemo
from lemo_trainer.exact import check
from lemo_trainer.session import session_of

from .tiny import assert_same_step, batch, checkpointing, every_mode, lora, loss_and_gradients, tiny_model

CONFIGS = every_mode(0.4) | {"segments": LemoConfig(mode="segments", segment_tokens=16, loss_segment=16)}
modes = pytest.mark.parametrize("mode", CONFIGS)


@modes
def test_a_pass_without_gradients_is_dense(mode):
    model, inputs = tiny_model(), batch("left")
    with torch.no_grad():
        wanted = model(**inputs)
        apply_lemo(model, CONFIGS[mode])
        got = model(**inputs)
    assert torch.equal(got.logits, wanted.logits)
    assert torch.equal(got.loss, wanted.loss)


@modes
def test_a_disabled_adapter_is_a_dense_reference(mode):
    """As in the KL terms of TRL's trainers."""
    model, inputs = lora(tiny_model()), batch("left")
    with torch.no_grad(), model.disable_adapter():
        wanted = model(**inputs).logits
    apply_lemo(model, CONFIGS[mode])
    model(**inputs).loss.backward()
    with torch.no_grad(), model.disable_adapter():
        assert torch.equal(model(**inputs).logits, wanted)


@modes
@pytest.mark.parametrize("recomputing", [False, True])
def test_generation_in_train_mode_is_that_of_the_plain_model(mode, recomputing):
    model = tiny_model()
    prompt = batch("plain")["input_ids"][:, :8]
    wanted = model.generate(prompt, max_new_tokens=6, do_sample=False)
    if recomputing:
        checkpointing(model, reentrant=False)
    apply_lemo(model, CONFIGS[mode])
    assert torch.equal(model.generate(prompt, max_new_tokens=6, do_sample=False), wanted)
    model(**batch("plain")).loss.backward()
    assert torch.equal(model.generate(prompt, max_new_tokens=6, do_sample=False), wanted)


@modes
def test_a_training_pass_with_a_cache_is_dense_and_says_so_once(mode, caplog):
    model, inputs = tiny_model(), batch("plain")
    wanted = loss_and_gradients(model, {**inputs, "use_cache": True})
    apply_lemo(model, CONFIGS[mode])
    for _ in range(2):
        assert_same_step(loss_and_gradients(model, {**inputs, "use_cache": True}), wanted)
    assert caplog.text.count("runs without LeMo") == 1


def test_a_sample_in_chunks_is_refused_by_its_name():
    model, ids = tiny_model(), batch("plain")["input_ids"]
    apply_lemo(model, CONFIGS["exact"])
    first = model(input_ids=ids[:, :20], labels=ids[:, :20], use_cache=True)
    with pytest.raises(ValueError, match=r"the cache of an earlier one \(a sample in chunks\)"):
        model(input_ids=ids[:, 20:], labels=ids[:, 20:], past_key_values=first.past_key_values)


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")  # by peft 0.21
@modes
def test_keys_and_values_with_a_gradient_are_refused_as_prefix_tuning(mode):
    from peft import PrefixTuningConfig, get_peft_model

    model = get_peft_model(tiny_model(), PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3))
    apply_lemo(model, CONFIGS[mode])
    with pytest.raises(ValueError, match="prefix tuning"):
        model.train()(**batch("left"))


@modes
def test_copies_and_pickles_are_models_of_their_own(mode):
    model, inputs = lora(tiny_model()), batch("left")
    wanted = loss_and_gradients(model, inputs)
    report = apply_lemo(model, CONFIGS[mode])
    model(**inputs).loss.backward()
    model.zero_grad()
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    copies = [copy.deepcopy(model), pickle.loads(pickle.dumps(model)), torch.load(buffer, weights_only=False)]
    kept = report.kept_tokens
    for parameter in model.parameters():
        parameter.data.zero_()
    for other in copies:
        assert_same_step(loss_and_gradients(other, inputs), wanted)
        assert not [name for part in other.modules() for name in vars(part) if "lemo" in name]
        assert session_of(other) is None
    assert report.kept_tokens == kept


@modes
def test_a_copy_can_be_patched_and_restored_alone(mode):
    model, inputs = tiny_model(), batch("left")
    wanted = loss_and_gradients(model, inputs)
    apply_lemo(model, CONFIGS[mode])
    other = copy.deepcopy(model)
    got = loss_and_gradients(model, inputs)
    apply_lemo(other, CONFIGS[mode])
    assert_same_step(loss_and_gradients(other, inputs), got)
    remove_lemo(other)
    assert_same_step(loss_and_gradients(other, inputs), wanted)
    assert_same_step(loss_and_gradients(model, inputs), got)


@pytest.fixture
def no_accelerator():
    """accelerate keeps the precision of the first Trainer of a process for all later ones."""
    AcceleratorState._reset_state(reset_partial_state=True)
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


@modes
def test_a_copy_of_a_model_that_somebody_wrapped_is_its_own(mode, no_accelerator):
    """accelerate's mixed precision wraps `forward` as a method of the model."""
    model, inputs = tiny_model(), batch("left")
    apply_lemo(model, CONFIGS[mode])
    model = Accelerator(mixed_precision="bf16", cpu=True).prepare(model)
    wanted = model.eval()(**inputs).logits
    other = copy.deepcopy(model)
    for parameter in model.parameters():
        parameter.data.zero_()
    assert torch.equal(other(**inputs).logits, wanted)


@modes
def test_everything_is_restored(mode):
    model = lora(tiny_model())
    before = [(type(part), sorted(vars(part))) for part in model.modules()]
    apply_lemo(model, CONFIGS[mode])
    model(**batch("left")).loss.backward()
    remove_lemo(model)
    assert [(type(part), sorted(vars(part))) for part in model.modules()] == before


@modes
def test_another_thread_evaluates_during_a_training_pass(mode):
    """Here from a hook in the middle of the pass, as a server beside the training might."""
    model, inputs = tiny_model(), batch("left")
    with torch.no_grad():
        wanted = model(**inputs).logits
    apply_lemo(model, CONFIGS[mode])
    step, got = loss_and_gradients(model, inputs), []

    def evaluate():
        with torch.no_grad():
            got.append(model(**inputs).logits)

    def in_a_thread(*_):
        if threading.current_thread() is threading.main_thread():
            thread = threading.Thread(target=evaluate)
            thread.start()
            thread.join()

    handle = model.model.rotary_emb.register_forward_hook(in_a_thread)
    assert_same_step(loss_and_gradients(model, inputs), step)
    handle.remove()
    assert got
    for logits in got:
        assert torch.equal(logits, wanted)


@modes
@pytest.mark.parametrize("phase", ["forward", "backward"])
def test_a_second_thread_that_trains_the_same_model_is_refused(mode, phase):
    """Here from a hook in the middle of the pass; the first thread's step is right all the same."""
    model, inputs = tiny_model(), batch("left")
    apply_lemo(model, CONFIGS[mode])
    wanted = loss_and_gradients(model, inputs)
    phases, errors = ["forward"], []

    def train():
        try:
            model(**inputs)
        except RuntimeError as error:
            errors.append(str(error))

    def in_a_thread(*_):
        if phases[-1] == phase and threading.current_thread() is threading.main_thread():
            thread = threading.Thread(target=train)
            thread.start()
            thread.join()

    handle = model.model.layers[1].mlp.act_fn.register_forward_hook(in_a_thread)
    model.zero_grad()
    loss = model(**inputs).loss
    phases.append("backward")
    loss.backward()
    handle.remove()
    gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
    assert_same_step((loss.detach(), gradients), wanted)
    runs_again = mode in ("exact", "detach", "eliminate")  # auto runs such a small model as it is
    assert bool(errors) == (phase == "forward" or runs_again)
    assert all(error.startswith("LeMo trains a model in one thread at a time") for error in errors)
    assert_same_step(loss_and_gradients(model, inputs), wanted)  # and afterwards


@modes
def test_threads_take_turns_with_one_model(mode):
    """Each between the forward and the backward pass of the other."""
    model, inputs = tiny_model(), [batch("left"), batch("plain")]
    apply_lemo(model, CONFIGS[mode])
    wanted = [loss_and_gradients(model, each)[0] for each in inputs]
    weights = [p for p in model.parameters() if p.requires_grad]

    def forward(each):
        return model(**each).loss

    def backward(loss):
        return torch.autograd.grad(loss, weights, allow_unused=True)

    alone = [backward(forward(each)) for each in inputs]
    with ThreadPoolExecutor(1) as one, ThreadPoolExecutor(1) as other:
        pools = (one, other)
        losses = [pools[n].submit(forward, inputs[n]).result() for n in range(2)]
        gradients = [pools[n].submit(backward, losses[n]).result() for n in range(2)]
    torch.testing.assert_close(torch.stack(losses).detach(), torch.stack(wanted))
    torch.testing.assert_close(gradients, alone)


@modes
def test_threads_train_models_of_their_own(mode):
    inputs = batch("left")
    models = [tiny_model() for _ in range(2)]
    apply_lemo(models[0], CONFIGS[mode])
    wanted = loss_and_gradients(models[0], inputs)
    remove_lemo(models[0])
    start = threading.Barrier(2)

    def train(model):
        start.wait()
        apply_lemo(model, CONFIGS[mode])
        return [loss_and_gradients(model, inputs) for _ in range(3)]

    with ThreadPoolExecutor(2) as pool:
        for steps in pool.map(train, models):
            for step in steps:
                assert_same_step(step, wanted)


def test_threads_that_patch_at_once_leave_torch_compile_as_it_was(monkeypatch):
    """Trying out the layers has torch.compile do nothing, in the whole process."""
    first_in, second_in, first_done = threading.Event(), threading.Event(), threading.Event()
    calls, compiled = check._calls, []

    def in_turn(*arguments):
        if threading.current_thread() is threading.main_thread():
            first_in.set()
            second_in.wait(0.2)
        else:
            second_in.set()
            first_done.wait()
        return calls(*arguments)

    def patch_second():
        first_in.wait()
        apply_lemo(tiny_model(), CONFIGS["exact"])

    monkeypatch.setattr(check, "_calls", in_turn)
    with ThreadPoolExecutor(1) as pool:
        second = pool.submit(patch_second)
        apply_lemo(tiny_model(), CONFIGS["exact"])
        first_done.set()
        second.result()

    def backend(graph, _):
        compiled.append(graph)
        return graph

    torch.compile(lambda x: x + 1, backend=backend)(torch.ones(2))
    assert compiled


@pytest.mark.parametrize("mode", ["detach", "eliminate", "exact", "auto"])
def test_a_decoder_that_is_called_by_itself_is_patched_too(mode):
    """As TRL's and Liger's losses call it."""
    model, ids = tiny_model(), batch("plain")["input_ids"]
    report = apply_lemo(model, CONFIGS[mode])
    model.model(input_ids=ids).last_hidden_state.sum().backward()
    assert report.seq_len == 45
