from __future__ import annotations

import json
import re
import subprocess
import sys

import pytest
import torch
from transformers import TrainerCallback

from lemo_trainer import LemoCallback, LemoConfig, apply_lemo
from lemo_trainer.compat import checkpointing_argument

from .tiny import lora, tiny_model
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


def test_layers_that_keep_different_shares_are_logged_one_by_one(tmp_path, monkeypatch):
    from lemo_trainer import LemoReport

    monkeypatch.setattr(LemoReport, "layer_shares", {0: 0.5, 2: 0.25})
    trainer = trainer_for(tiny_model(), tmp_path, [LemoCallback(CONFIG)], max_steps=1)
    trainer.train()
    entry = trainer.state.log_history[0]
    assert (entry["lemo_kept_share/layer_0"], entry["lemo_kept_share/layer_2"]) == (0.5, 0.25)


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
