from __future__ import annotations

import copy
import inspect

import pytest
import torch

from lemo_trainer import LemoConfig, apply_lemo, remove_lemo
from lemo_trainer.measure import ActivationBytes
from lemo_trainer.session import session_of

from .tiny import CASES, assert_same_step, batch, checkpointing, lora, loss_and_gradients, tiny_model

CONFIG = LemoConfig(mode="eliminate", keep_ratio=0.4, block_size=4, layers="all", loss_segment=16)
EVERYTHING = LemoConfig(keep_ratio=1.0, block_size=4, layers="all", loss_segment=16)


def snapshot(model):
    return [(name, type(m), vars(m).keys() - {"training"}) for name, m in model.named_modules()]


@pytest.mark.parametrize(("kind", "name"), CASES)
def test_keeping_everything_is_the_unpatched_step(kind, name):
    model = tiny_model(kind)
    inputs = batch(name)
    wanted = loss_and_gradients(model, inputs)
    apply_lemo(model, EVERYTHING)
    assert_same_step(loss_and_gradients(model, inputs), wanted)
    checkpointing(model, reentrant=False)
    assert_same_step(loss_and_gradients(model, inputs), wanted)


def test_keeping_everything_saves_no_byte_more():
    model = tiny_model()
    inputs = batch("plain", seq_len=64)

    def saved():
        with ActivationBytes() as activations:
            loss = model(**inputs).loss
            return activations.bytes, loss

    plain, _ = saved()
    apply_lemo(
        model,
        LemoConfig(keep_ratio=1.0, block_size=4, layers="all", loss_segment=0, selective_checkpointing=False),
    )
    assert saved()[0] == plain
    remove_lemo(model)
    apply_lemo(model, LemoConfig(keep_ratio=0.25, block_size=4, layers="all", loss_segment=0))
    assert saved()[0] < 0.6 * plain


@pytest.mark.parametrize("num_items", [None, torch.tensor(17)])
def test_a_peft_model_is_patched_inside(num_items):
    model = lora(tiny_model())
    inputs = {**batch("left"), "num_items_in_batch": num_items}
    wanted = loss_and_gradients(model, inputs)
    assert len(wanted[1]) == 2 * 7 * 3
    report = apply_lemo(model, EVERYTHING)
    assert str(report) == "LeMo patched 3 of 3 layers"
    assert_same_step(loss_and_gradients(model, inputs), wanted)


def test_lora_dropout_leaves_the_choice_alone_and_checkpointing_recomputes_it():
    model = lora(tiny_model(), lora_dropout=0.3)
    inputs = batch("plain")
    apply_lemo(model, CONFIG)
    torch.manual_seed(3)
    wanted = loss_and_gradients(model, inputs)
    checkpointing(model.get_base_model(), reentrant=False)
    torch.manual_seed(3)
    assert_same_step(loss_and_gradients(model, inputs), wanted)


def test_evaluation_and_generation_are_dense():
    model = tiny_model().eval()
    inputs = batch("left")
    wanted = model(**inputs)
    prompt = {name: inputs[name] for name in ("input_ids", "attention_mask")}
    wanted_text = model.generate(**prompt, max_new_tokens=5, do_sample=False)
    apply_lemo(model, CONFIG)
    got = model(**inputs)
    torch.testing.assert_close(got.logits, wanted.logits)
    torch.testing.assert_close(got.loss, wanted.loss)
    assert model.generate(**prompt, max_new_tokens=5, do_sample=False).tolist() == wanted_text.tolist()


def test_training_makes_no_logits_unless_asked(caplog):
    model = tiny_model()
    inputs = batch("plain")
    apply_lemo(model, CONFIG)
    output = model(**inputs)
    assert output["loss"] is output[0] is output.loss
    assert not any(torch.is_tensor(value) and value.ndim == 3 for value in output.values())
    assert "made all logits" not in caplog.text
    assert model(**inputs, return_dict=False)[1].shape == (2, 45, 97)
    assert "made all logits" in caplog.text
    labels = inputs.pop("labels")
    assert model(**inputs).logits.shape == (2, 45, 97)
    remove_lemo(model)
    apply_lemo(model, LemoConfig(keep_ratio=0.4, block_size=4, loss_segment=0))
    assert model(**inputs, labels=labels).logits.shape == (2, 45, 97)


def test_shift_labels_stand_in_for_the_shift():
    model = tiny_model()
    inputs = batch("plain")
    wanted = loss_and_gradients(model, inputs)
    shifted = torch.nn.functional.pad(inputs["labels"], (0, 1), value=-100)[:, 1:]
    apply_lemo(model, EVERYTHING)
    assert_same_step(loss_and_gradients(model, {**inputs, "shift_labels": shifted}), wanted)


def test_autocast_reaches_the_segmented_loss():
    model = tiny_model()
    inputs = batch("plain")
    with torch.autocast("cpu", torch.bfloat16):
        wanted = loss_and_gradients(model, inputs)
        apply_lemo(model, EVERYTHING)
        got = loss_and_gradients(model, inputs)
    assert_same_step(got, wanted, rtol=2e-2, atol=2e-2)


def test_remove_restores_classes_attributes_and_signature():
    model = lora(tiny_model())
    base = model.get_base_model()
    before, signature = snapshot(model), inspect.signature(base.forward)
    layer_class, name = type(base.model.layers[0]), repr(model)
    apply_lemo(model, CONFIG)
    assert inspect.signature(base.forward) == signature
    assert isinstance(base.model.layers[0], layer_class)
    assert repr(model) == name
    assert list(model.state_dict()) == list(lora(tiny_model()).state_dict())
    remove_lemo(model)
    assert snapshot(model) == before
    remove_lemo(model)
    assert snapshot(model) == before


def test_remove_restores_a_forward_that_was_there_before():
    model = tiny_model()
    original = model.forward
    model.forward = lambda *args, **kwargs: original(*args, **kwargs)
    wrapper = model.forward
    apply_lemo(model, CONFIG)
    remove_lemo(model)
    assert model.__dict__["forward"] is wrapper


def test_after_removal_a_wrapper_around_the_patch_runs_dense():
    model = tiny_model()
    inputs = batch("plain")
    wanted = loss_and_gradients(model, inputs)
    apply_lemo(model, CONFIG)
    patched = model.forward
    model.forward = lambda *args, **kwargs: patched(*args, **kwargs)
    remove_lemo(model)
    assert_same_step(loss_and_gradients(model, inputs), wanted)
    assert model(**inputs).logits is not None


@pytest.mark.parametrize("mode", ["detach", "segments"])
def test_a_wrapper_around_an_earlier_patch_leaves_the_next_one_alone(mode):
    model, inputs = tiny_model(), batch("plain")
    config = LemoConfig(mode=mode, keep_ratio=1.0, loss_segment=16)
    apply_lemo(model, config)
    old = session_of(model)
    wanted = loss_and_gradients(model, inputs)
    patched = model.forward
    model.forward = lambda *args, **kwargs: patched(*args, **kwargs)
    remove_lemo(model)
    old.seq_len = 0
    apply_lemo(model, config)
    assert_same_step(loss_and_gradients(model, inputs), wanted)
    assert (old.seq_len, old.all_logits) == (0, [])


def test_a_failure_while_patching_leaves_the_model_unpatched(monkeypatch):
    model, inputs = tiny_model(), batch("plain")
    before, wanted = snapshot(model), loss_and_gradients(model, inputs)
    monkeypatch.setattr(inspect, "signature", lambda function: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        apply_lemo(model, CONFIG)
    monkeypatch.undo()
    assert snapshot(model) == before
    assert_same_step(loss_and_gradients(model, inputs), wanted)


def test_a_crash_inside_leaves_the_model_restorable():
    model = tiny_model()
    inputs = batch("plain")
    before, wanted = snapshot(model), loss_and_gradients(model, inputs)
    apply_lemo(model, CONFIG)
    with torch.no_grad():
        model.model.layers[1].mlp.gate_proj.weight[0, 0] = torch.nan
    with pytest.raises(ValueError, match="NaN"):
        model(**inputs)
    remove_lemo(model)
    assert snapshot(model) == before
    assert not model.model._forward_hooks
    model = copy.deepcopy(tiny_model())
    assert_same_step(loss_and_gradients(model, inputs), wanted)


def test_the_report_says_what_was_kept():
    model = tiny_model(layers=6)
    report = apply_lemo(model, LemoConfig(mode="eliminate", keep_ratio=0.5, block_size=8))
    assert report.patched_layers == (3, 4)
    assert report.kept_share == 1.0
    model(**batch("plain"))
    assert (report.seq_len, report.kept_tokens) == (45, 21)
    session_of(model).active = False
    model(**batch("plain"))
    assert report.kept_share == 1.0


@pytest.mark.parametrize(
    ("prepare", "message"),
    [
        (lambda: _patched(), "patched by LeMo already"),
        (lambda: lora(tiny_model(), target_modules=["q_proj", "lm_head"]), "nn.Linear as output head"),
        (lambda: lora(tiny_model(), modules_to_save=["lm_head"]), "nn.Linear as output head"),
        (lambda: torch.nn.Linear(2, 2), "got Linear with config.model_type None"),
    ],
)
def test_models_that_cannot_be_patched_are_refused_untouched(prepare, message):
    model = prepare()
    before = snapshot(model)
    with pytest.raises(ValueError, match=message):
        apply_lemo(model, CONFIG)
    assert snapshot(model) == before


def _patched():
    model = tiny_model()
    apply_lemo(model, CONFIG)
    return model


def test_wrong_label_shapes_are_named():
    model = tiny_model()
    apply_lemo(model, CONFIG)
    inputs = batch("plain")
    with pytest.raises(ValueError, match=r"`labels` must have .*\(2, 45\), got \(2, 44\)"):
        model(input_ids=inputs["input_ids"], labels=inputs["labels"][:, 1:])
