from __future__ import annotations

import dataclasses
import json
import re
import subprocess
import sys

import pytest
import torch
from transformers import TrainerCallback

from lemo_trainer import LemoCallback, LemoConfig, apply_lemo, remove_lemo
from lemo_trainer.compat import checkpointing_argument
from lemo_trainer.measure import ActivationBytes
from lemo_trainer.sizes import size_text

from .tiny import assert_same_step, lora, loss_and_gradients, tiny_model
from .training import losses, samples, trainer_for

CONFIG = LemoConfig(mode="eliminate", keep_ratio=0.5, block_size=4, layers="all", loss_segment=16)


class Watch(TrainerCallback):
    def __init__(self, callback):
        self.callback, self.shares = callback, []

    def on_step_end(self, *args, **kwargs):
        self.shares.append(self.callback.report.kept_share)


class Interrupt(TrainerCallback):
    def __init__(self, step):
        self.step = step

    def on_step_end(self, args, state, *_, **kwargs):
        if state.global_step == self.step:
            raise KeyboardInterrupt


def test_a_trainer_trains_saves_and_gives_the_model_back(tmp_path):
    model = lora(tiny_model())
    names, classes = list(model.state_dict()), [type(part) for part in model.modules()]
    callback = LemoCallback(CONFIG)
    trainer = trainer_for(model, tmp_path, [callback], save_strategy="steps", save_steps=2)
    trainer.train()

    for folder in (tmp_path / "checkpoint-2", tmp_path):
        saved = json.loads((folder / "lemo_config.json").read_text())
        assert LemoConfig.from_dict(saved) == CONFIG
    assert list(model.state_dict()) == names
    assert [type(part) for part in model.modules()] == classes
    assert "forward" not in vars(model.get_base_model())


def test_evaluation_and_prediction_are_dense_during_training(tmp_path):
    """The metrics of the last evaluation inside `train` equal those of the restored model."""

    def accuracy(predictions):
        return {"accuracy": float((predictions.predictions.argmax(-1) == predictions.label_ids).mean())}

    class Predict(TrainerCallback):
        def on_step_end(self, args, state, *_, **kwargs):
            if state.global_step == 3:
                self.logits = trainer.predict(samples()[:2]).predictions

    predict = Predict()
    trainer = trainer_for(
        lora(tiny_model()),
        tmp_path,
        [LemoCallback(CONFIG), predict],
        compute_metrics=accuracy,
        eval_strategy="steps",
        eval_steps=1,
    )
    trainer.train()
    last = [entry for entry in trainer.state.log_history if "eval_loss" in entry][-1]
    after = trainer.evaluate()
    assert after["eval_loss"] == pytest.approx(last["eval_loss"], abs=1e-6)
    assert after["eval_accuracy"] == last["eval_accuracy"]
    torch.testing.assert_close(predict.logits, trainer.predict(samples()[:2]).predictions)


def test_the_best_model_is_loaded_at_the_end(tmp_path):
    trainer = trainer_for(
        lora(tiny_model()),
        tmp_path,
        [LemoCallback(CONFIG)],
        learning_rate=1.0,  # gets worse
        load_best_model_at_end=True,
        eval_strategy="steps",
        save_strategy="steps",
        eval_steps=1,
        save_steps=1,
    )
    trainer.train()
    assert trainer.evaluate()["eval_loss"] == pytest.approx(trainer.state.best_metric, abs=1e-6)


def test_metrics_reach_the_history_the_progress_bar_and_tensorboard(tmp_path, capsys, monkeypatch):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(tmp_path / "runs"))
    callback = LemoCallback(CONFIG, measure=True)
    trainer = trainer_for(
        lora(tiny_model()), tmp_path, [callback], report_to="tensorboard", disable_tqdm=False
    )
    trainer.train()
    steps = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert [entry["lemo_kept_share"] for entry in steps] == [0.5] * 3
    assert [entry["lemo_patched_layers"] for entry in steps] == [3] * 3
    assert steps[0]["lemo_saved_bytes"] > 0
    assert steps[0]["lemo_step_flops"] > 0
    assert "lemo_saved_bytes" not in steps[1]
    assert "'lemo_kept_share': '0.5'" in capsys.readouterr().out

    events = EventAccumulator(str(tmp_path / "runs"))
    events.Reload()
    assert [event.value for event in events.Scalars("train/lemo_kept_share")] == [0.5] * 3
    (flops,) = events.Scalars("train/lemo_step_flops")
    assert flops.value == pytest.approx(steps[0]["lemo_step_flops"])


def test_layers_that_keep_different_shares_are_logged_one_by_one(tmp_path):
    config = LemoConfig(mode="eliminate", thresholds="0:0,2:1.2", block_size=4)
    trainer = trainer_for(tiny_model(), tmp_path, [LemoCallback(config)], max_steps=1)
    trainer.train()
    entry = trainer.state.log_history[0]
    shares = [entry[f"lemo_kept_share/layer_{layer}"] for layer in (0, 2)]
    assert shares[0] == 1
    assert 0.1 < shares[1] < 0.9
    assert entry["lemo_kept_share"] == pytest.approx(sum(shares) / 2, abs=1e-3)


def test_the_logged_share_is_that_of_all_tokens_since_the_last_entry(tmp_path):
    """Half of 32 tokens in seven micro-batches, all of 4 tokens in one."""
    data = [*samples(7), *samples(1, seq_len=4)]
    options = {"gradient_accumulation_steps": 4, "logging_steps": 2, "per_device_train_batch_size": 1}
    trainer = trainer_for(tiny_model(), tmp_path, [LemoCallback(CONFIG)], data=data, max_steps=2, **options)
    trainer.train()
    wanted = (7 * 16 + 4) / (7 * 32 + 4)
    assert trainer.state.log_history[0]["lemo_kept_share"] == pytest.approx(wanted, abs=1e-4)


class Remove(TrainerCallback):
    def on_step_end(self, args, state, control, model=None, **kwargs):
        remove_lemo(model)


def test_nothing_is_logged_after_lemo_was_removed(tmp_path):
    callback = LemoCallback(CONFIG)
    trainer = trainer_for(tiny_model(), tmp_path, [callback, Remove()], max_steps=2)
    trainer.train()
    assert not any(name.startswith("lemo") for entry in trainer.state.log_history for name in entry)
    assert not callback.report.active
    assert callback.report.kept_share == 0.5


def test_measuring_changes_no_loss_and_finds_fewer_bytes_and_flops_than_dense(tmp_path):
    def run(config, **options):
        callback = LemoCallback(config, measure=True)
        trainer = trainer_for(
            lora(tiny_model()), tmp_path, [callback], gradient_accumulation_steps=2, **options
        )
        trainer.train()
        return trainer

    kept, dense = run(CONFIG), run(LemoConfig(keep_ratio=1.0, loss_segment=16))
    plain = trainer_for(lora(tiny_model()), tmp_path, [LemoCallback(CONFIG)], gradient_accumulation_steps=2)
    plain.train()
    assert losses(kept) == losses(plain)
    for metric in ("lemo_saved_bytes", "lemo_step_flops"):
        assert kept.state.log_history[0][metric] < dense.state.log_history[0][metric]


def test_warm_up_steps_run_dense(tmp_path):
    config = LemoConfig(keep_ratio=0.5, block_size=4, warmup_steps=2)
    callback = LemoCallback(config, measure=True)
    watch = Watch(callback)
    trainer = trainer_for(tiny_model(), tmp_path, [callback, watch])
    trainer.train()
    assert watch.shares == [1.0, 1.0, 0.5]
    assert ["lemo_step_flops" in entry for entry in trainer.state.log_history[:3]] == [False, False, True]


def test_an_interrupted_training_can_be_started_again(tmp_path):
    model = tiny_model()
    interrupted = trainer_for(model, tmp_path, [LemoCallback(CONFIG, measure=True), Interrupt(1)])
    with pytest.raises(KeyboardInterrupt):
        interrupted.train()
    interrupted.remove_callback(Interrupt)
    assert interrupted.train().global_step == 3
    assert "forward" not in vars(model)


@pytest.mark.parametrize("selector", ["informativeness", "random"])
def test_a_killed_run_resumes_to_the_same_weights(tmp_path, selector):
    config = LemoConfig(selector=selector, keep_ratio=0.5, block_size=4, layers="all", loss_segment=16)
    options = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2}
    options[checkpointing_argument()] = True
    whole = trainer_for(lora(tiny_model()), tmp_path / "whole", [LemoCallback(config)], **options)
    whole.train()
    killed = trainer_for(
        lora(tiny_model()), tmp_path / "killed", [LemoCallback(config), Interrupt(3)], **options
    )
    with pytest.raises(KeyboardInterrupt):
        killed.train()
    torch.rand(7)  # the new process stands elsewhere in its random numbers
    resumed = trainer_for(lora(tiny_model()), tmp_path / "killed", [LemoCallback(config)], **options)
    resumed.train(resume_from_checkpoint=True)
    torch.testing.assert_close(resumed.model.state_dict(), whole.model.state_dict(), rtol=0, atol=0)
    assert losses(resumed)[-2:] == losses(whole)[-2:]


def test_a_merged_adapter_loads_where_this_package_is_not(tmp_path):
    model = lora(tiny_model())
    trainer_for(model, tmp_path, [LemoCallback(CONFIG)]).train()
    ids = samples(1)[0]["input_ids"][None]
    merged = model.merge_and_unload().eval()
    wanted = merged(input_ids=ids).logits
    merged.save_pretrained(tmp_path / "merged")
    torch.save((ids, wanted), tmp_path / "wanted.pt")
    code = f"""
import sys
sys.modules["lemo_trainer"] = None
import torch
from transformers import AutoModelForCausalLM
ids, wanted = torch.load({str(tmp_path / "wanted.pt")!r})
loaded = AutoModelForCausalLM.from_pretrained({str(tmp_path / "merged")!r}).eval()
torch.testing.assert_close(loaded(input_ids=ids).logits, wanted)
print(type(loaded).__name__)
"""
    process = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert process.stdout == "LlamaForCausalLM\n"
    files = "".join(path.read_text() for path in (tmp_path / "merged").glob("*.json"))
    assert not re.search("lemo", files, re.IGNORECASE)


def test_a_model_that_somebody_patched_is_refused(tmp_path):
    model = tiny_model()
    apply_lemo(model, CONFIG)
    with pytest.raises(ValueError, match="already"):
        trainer_for(model, tmp_path, [LemoCallback(CONFIG)]).train()


MODES = {
    "detach": LemoConfig(mode="detach", keep_ratio=0.5, block_size=4, layers="all"),
    "eliminate": LemoConfig(mode="eliminate", keep_ratio=0.5, block_size=4, layers="all"),
    "segments": LemoConfig(mode="segments", segment_tokens=8),
    "exact": LemoConfig(mode="exact", segment_tokens=8),
}
modes = pytest.mark.parametrize("mode", MODES)


class Raise(TrainerCallback):
    """Raises at an event of the Trainer."""

    def __init__(self, event, error):
        setattr(self, event, self.fail)
        self.error = error

    def fail(self, *args, **kwargs):
        raise self.error


@modes
@pytest.mark.parametrize("event", ["on_step_begin", "on_step_end", "on_log", "on_epoch_begin"])
def test_any_exit_restores_the_model(tmp_path, mode, event):
    model = lora(tiny_model())
    before = [type(part) for part in model.modules()]
    callback = LemoCallback(MODES[mode], measure=True)
    with pytest.raises(KeyboardInterrupt):
        trainer_for(model, tmp_path, [callback, Raise(event, KeyboardInterrupt)]).train()
    assert [type(part) for part in model.modules()] == before
    assert "forward" not in vars(model.get_base_model())
    assert callback.report is not None


@modes
def test_after_an_interrupt_a_callback_that_was_added_later_is_out_of_force(tmp_path, mode):
    """Such a callback hears of no Trainer before `train`; the patch ends with that call all the same."""
    sample = {name: values[None] for name, values in samples(1)[0].items()}
    model = tiny_model()
    trainer = trainer_for(model, tmp_path, [])
    trainer.add_callback(LemoCallback(MODES[mode]))
    trainer.add_callback(Raise("on_step_begin", KeyboardInterrupt))
    wanted = loss_and_gradients(model, sample)
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    assert_same_step(loss_and_gradients(model, sample), wanted, rtol=0, atol=0)
    trainer_for(model, tmp_path, [LemoCallback(MODES[mode])], max_steps=1).train()
    assert "forward" not in vars(model)


def test_the_report_is_readable_after_training(tmp_path):
    callback = LemoCallback(CONFIG)
    trainer_for(tiny_model(), tmp_path, [callback], max_steps=1).train()
    assert (callback.report.seq_len, callback.report.pieces, callback.report.kept_share) == (32, 8, 0.5)
    assert callback.report.last_batch == (
        "samples of 32 tokens in 8 blocks of 4; 50% of the tokens are computed in a patched layer"
    )


@modes
def test_the_log_says_what_a_batch_was_cut_into(tmp_path, mode, caplog):
    caplog.set_level("INFO", "lemo_trainer")
    trainer = trainer_for(tiny_model(), tmp_path, [LemoCallback(MODES[mode])], max_steps=2)
    trainer.train()
    entry = trainer.state.log_history[0]
    pieces = ("lemo_segments", 4) if mode in ("segments", "exact") else ("lemo_blocks", 8)
    assert (entry["lemo_tokens"], entry[pieces[0]]) == (32, pieces[1])
    assert caplog.text.count("LeMo, first step: samples of 32 tokens in") == 1


@modes
def test_one_warning_when_samples_are_too_short(tmp_path, mode, caplog):
    config = LemoConfig(mode=mode)
    trainer = trainer_for(tiny_model(), tmp_path, [LemoCallback(config)])
    trainer.train()
    option = "segment_tokens" if mode in ("segments", "exact") else "block_size"
    assert caplog.text.count("LeMo has had nothing to do") == 1
    assert f"Lower `{option}`" in caplog.text
    caplog.clear()
    data = [*samples(3), *samples(1, seq_len=4)]  # one of which is short
    options = {"per_device_train_batch_size": 1, "max_steps": 4}
    trainer_for(tiny_model(), tmp_path, [LemoCallback(MODES[mode])], data=data, **options).train()
    assert "nothing to do" not in caplog.text


def test_a_loop_that_tells_no_steps_stays_in_the_warm_up_and_is_told_once(caplog):
    model = tiny_model()
    report = apply_lemo(model, dataclasses.replace(CONFIG, warmup_steps=1))
    sample = {name: values[None] for name, values in samples(1)[0].items()}
    for batches in range(1, 11):
        model(**sample).loss.backward()
        assert caplog.text.count("call report.at_step(step)") == (batches >= 8)
    assert (report.active, report.kept_share) == (False, 1.0)
    report.at_step(1)
    model(**sample)
    assert (report.active, report.kept_share) == (True, 0.5)
    remove_lemo(model)
    assert not report.active


def test_a_loop_without_a_callback_is_told_after_some_batches(caplog):
    model = tiny_model()
    apply_lemo(model, LemoConfig(mode="segments"))
    sample = {name: values[None] for name, values in samples(1)[0].items()}
    for batches in range(1, 10):
        model(**sample).loss.backward()
        assert ("nothing to do" in caplog.text) == (batches >= 8)


@modes
def test_the_logged_bytes_are_those_that_activation_bytes_measures(tmp_path, mode):
    config = MODES[mode]
    model = lora(tiny_model())
    trainer = trainer_for(
        model, tmp_path, [LemoCallback(config, measure=True)], data=samples(2), gradient_accumulation_steps=2
    )
    trainer.train()
    logged = trainer.state.log_history[0]["lemo_saved_bytes"]
    inputs = {name: torch.stack([sample[name] for sample in samples(2)]) for name in ("input_ids", "labels")}
    apply_lemo(model, config)
    with ActivationBytes() as activations:
        model(**inputs, num_items_in_batch=torch.tensor(59)).loss.backward()
    assert logged == pytest.approx(activations.saved_bytes, abs=64)


@modes
@pytest.mark.parametrize("checkpointed", [False, True], ids=["plain", "checkpointed"])
def test_the_first_line_of_the_log_compares_with_the_bytes_of_plain_training(
    tmp_path, mode, checkpointed, caplog
):
    """Those that ActivationBytes measures without LeMo and without checkpointing."""
    caplog.set_level("INFO", "lemo_trainer")
    model, inputs = lora(tiny_model()), {name: values[None] for name, values in samples(1)[0].items()}
    with ActivationBytes() as plain:
        model(**inputs, use_cache=False).loss.backward()
    callback = LemoCallback(MODES[mode], measure=True)
    options = {checkpointing_argument(): checkpointed, "per_device_train_batch_size": 1}
    trainer = trainer_for(model, tmp_path, [callback], max_steps=1, **options)
    trainer.train()
    entry = trainer.state.log_history[0]
    assert entry["lemo_plain_bytes"] == pytest.approx(plain.saved_bytes, abs=64)
    assert callback.report.plain_bytes(1, 32) == entry["lemo_plain_bytes"]
    saved, whole = (size_text(entry[f"lemo_{name}_bytes"]) for name in ("saved", "plain"))
    line = f"{saved} wait for the backward pass (measured), {whole} in plain training."
    assert caplog.text.count("LeMo, first step: ") == caplog.text.count(line) == 1


def test_bytes_are_measured_in_the_first_step_after_the_warm_up(tmp_path, caplog):
    caplog.set_level("INFO", "lemo_trainer")
    config = dataclasses.replace(CONFIG, warmup_steps=1)
    trainer = trainer_for(tiny_model(), tmp_path, [LemoCallback(config, measure=True)], max_steps=2)
    trainer.train()
    assert ["lemo_plain_bytes" in entry for entry in trainer.state.log_history[:2]] == [False, True]
    assert "LeMo, first step: samples of 32 tokens" in caplog.text
    assert caplog.text.count("LeMo, measured step: ") == 1


@modes
def test_the_first_line_of_the_log_says_how_to_measure_bytes(tmp_path, mode, caplog):
    caplog.set_level("INFO", "lemo_trainer")
    trainer_for(tiny_model(), tmp_path, [LemoCallback(MODES[mode])], max_steps=1).train()
    told = "LemoCallback(measure=True) measures the bytes that wait for the backward pass."
    assert caplog.text.count(told) == 1


def test_auto_predicts_the_bytes_of_the_first_line(tmp_path, caplog):
    caplog.set_level("INFO", "lemo_trainer")
    callback = LemoCallback(LemoConfig(segment_tokens=8))
    trainer_for(tiny_model(), tmp_path, [callback], max_steps=1).train()
    saved, plain = callback.report.choice.saved_bytes
    assert plain == pytest.approx(callback.report.plain_bytes(2, 32), rel=0.05)
    assert saved <= plain
    saved, plain = size_text(saved), size_text(plain)
    line = f"{saved} wait for the backward pass (predicted), {plain} in plain training."
    assert caplog.text.count(line) == 1


@pytest.mark.parametrize("given", ["segments", {"mode": "segments"}, 0.5])
def test_a_callback_without_a_config_says_at_once_what_it_takes(given):
    with pytest.raises(TypeError, match=r"LemoCallback takes a LemoConfig, such as LemoConfig\(mode="):
        LemoCallback(given)


def test_the_class_alone_is_a_callback_with_defaults(tmp_path):
    trainer = trainer_for(tiny_model(), tmp_path, [LemoCallback], max_steps=1)
    trainer.train()
    assert "lemo_kept_share" in trainer.state.log_history[0]
