from __future__ import annotations

import json

import pytest
import torch
from transformers import AutoModelForCausalLM, Trainer, TrainerCallback, TrainingArguments

from lemo_trainer import LemoCallback, LemoConfig, apply_lemo

from .tiny import VOCAB, lora, tiny_model

CONFIG = LemoConfig(mode="eliminate", keep_ratio=0.5, block_size=4, layers="all", loss_segment=16)


def samples(count=8, seq_len=32):
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(3, VOCAB, (count, seq_len), generator=generator)
    return [{"input_ids": row, "labels": row} for row in ids]


def trainer_for(model, folder, callbacks, **options):
    arguments = TrainingArguments(
        str(folder),
        **{
            "max_steps": 3,
            "per_device_train_batch_size": 2,
            "learning_rate": 1e-2,
            "logging_steps": 1,
            "save_steps": 2,
            "report_to": "none",
            "disable_tqdm": True,
            "dataloader_pin_memory": False,
            "seed": 0,
            "use_cpu": True,
            **options,
        },
    )
    data = samples()
    return Trainer(model, arguments, train_dataset=data, eval_dataset=data[:2], callbacks=callbacks)


class Watch(TrainerCallback):
    def __init__(self, callback):
        self.callback, self.active = callback, []

    def on_step_end(self, *args, **kwargs):
        self.active.append(self.callback.report.kept_share)


def test_a_trainer_trains_logs_saves_and_gives_the_model_back(tmp_path):
    model = lora(tiny_model())
    layer_class = type(model.get_base_model().model.layers[0])
    callback = LemoCallback(CONFIG)
    trainer = trainer_for(model, tmp_path, [callback], eval_strategy="steps", eval_steps=1)
    trainer.train()

    steps = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert [entry["lemo_kept_share"] for entry in steps] == [0.5] * 3
    assert [entry["lemo_patched_layers"] for entry in steps] == [3] * 3
    for folder in (tmp_path / "checkpoint-2", tmp_path):
        saved = json.loads((folder / "lemo_config.json").read_text())
        assert LemoConfig.from_dict(saved) == CONFIG
    assert type(model.get_base_model().model.layers[0]) is layer_class
    assert "forward" not in vars(model.get_base_model())

    # Evaluation was dense while training went on: the last one equals one by the restored model.
    last = [entry["eval_loss"] for entry in trainer.state.log_history if "eval_loss" in entry][-1]
    assert trainer.evaluate()["eval_loss"] == pytest.approx(last, abs=1e-6)


def test_keeping_everything_trains_as_without_the_callback(tmp_path):
    plain = trainer_for(lora(tiny_model()), tmp_path / "plain", [], gradient_accumulation_steps=2)
    plain.train()
    config = LemoConfig(keep_ratio=1.0, layers="all", loss_segment=16)
    lemo = trainer_for(
        lora(tiny_model()), tmp_path / "lemo", [LemoCallback(config)], gradient_accumulation_steps=2
    )
    lemo.train()
    torch.testing.assert_close(lemo.model.state_dict(), plain.model.state_dict(), rtol=1e-4, atol=1e-5)


def test_bf16_autocast_trains_as_without_the_callback(tmp_path):
    losses = []
    for callbacks in ([], [LemoCallback(LemoConfig(keep_ratio=1.0, loss_segment=16))]):
        trainer = trainer_for(tiny_model(), tmp_path, callbacks, bf16=True, save_strategy="no")
        losses.append(trainer.train().training_loss)
    assert losses[1] == pytest.approx(losses[0], rel=1e-2)


def test_warm_up_steps_run_dense(tmp_path):
    callback = LemoCallback(LemoConfig(keep_ratio=0.5, block_size=4, warmup_steps=2))
    watch = Watch(callback)
    trainer_for(tiny_model(), tmp_path, [callback, watch], save_strategy="no").train()
    assert watch.active == [1.0, 1.0, 0.5]


def test_an_interrupted_training_can_be_started_again(tmp_path):
    class Interrupt(TrainerCallback):
        def on_step_end(self, *args, **kwargs):
            raise KeyboardInterrupt

    model = tiny_model()
    callback = LemoCallback(CONFIG)
    interrupted = trainer_for(model, tmp_path, [callback, Interrupt()])
    with pytest.raises(KeyboardInterrupt):
        interrupted.train()
    interrupted.remove_callback(Interrupt)
    assert interrupted.train().global_step == 3


def test_a_checkpoint_resumes_to_the_same_weights(tmp_path):
    whole = trainer_for(lora(tiny_model()), tmp_path / "a", [LemoCallback(CONFIG)])
    whole.train()
    resumed = trainer_for(lora(tiny_model()), tmp_path / "b", [LemoCallback(CONFIG)])
    resumed.train(resume_from_checkpoint=str(tmp_path / "a" / "checkpoint-2"))
    torch.testing.assert_close(resumed.model.state_dict(), whole.model.state_dict())


def test_a_merged_adapter_loads_without_this_package(tmp_path):
    model = lora(tiny_model())
    trainer = trainer_for(model, tmp_path, [LemoCallback(CONFIG)])
    trainer.train()
    model.eval()
    ids = samples(1)[0]["input_ids"][None]
    wanted = model(input_ids=ids).logits
    model.merge_and_unload().save_pretrained(tmp_path / "merged")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "merged").eval()
    assert json.loads((tmp_path / "merged" / "config.json").read_text())["architectures"] == [
        "LlamaForCausalLM"
    ]
    torch.testing.assert_close(loaded(input_ids=ids).logits, wanted, rtol=1e-3, atol=1e-3)


def test_a_model_that_somebody_patched_is_refused(tmp_path):
    model = tiny_model()
    apply_lemo(model, CONFIG)
    with pytest.raises(ValueError, match="already"):
        trainer_for(model, tmp_path, [LemoCallback(CONFIG)]).train()
