from __future__ import annotations

import statistics

import pytest
import torch
from transformers import Trainer, TrainingArguments

from lemo_trainer import LemoCallback, LemoConfig
from lemo_trainer.informativeness.predictor_files import JSON_NAME, TENSORS_NAME, load_predictors
from lemo_trainer.offline.observation import Observer
from lemo_trainer.offline.predictor_training import (
    STATE_NAME,
    PredictorTraining,
    measure_recall,
    train_predictors,
)

from .tiny import VOCAB, batch, leaving_out, tiny_model

CONFIG = leaving_out("eliminate", keep_ratio=0.5)


def samples(count=6, seq_len=48, seed=1):
    generator = torch.Generator().manual_seed(seed)
    return [{"input_ids": torch.randint(3, VOCAB, (seq_len,), generator=generator)} for _ in range(count)]


def held_out():
    return [{"input_ids": sample["input_ids"][None]} for sample in samples(2, seed=2)]


def training(**options):
    return PredictorTraining(**{"steps": 6, "ranks": (8, 8, 8), "save_steps": 2, **options})


@pytest.mark.parametrize("kind", ["llama", "gpt2", "gemma2"])
def test_the_exact_map_is_that_of_all_queries(kind):
    model, inputs = tiny_model(kind), batch("left")
    classes = [type(layer) for layer in model.base_model.modules()]
    seen = Observer(model, CONFIG)({name: inputs[name] for name in ("input_ids", "attention_mask")})
    assert [each.index for each in seen] == [0, 1, 2]
    assert all(each.exact_map.shape == (2, 12, 11) for each in seen)
    assert all((each.exact_map.triu(1) == 0).all() for each in seen)
    assert all((each.exact_map[1, :, :2] == 0).all() for each in seen)  # padding
    assert model.training
    assert classes == [type(layer) for layer in model.base_model.modules()]
    assert not any(layer._forward_pre_hooks for layer in model.modules())


@pytest.mark.parametrize("design", ["paper", "max"])
def test_training_raises_the_recall(tmp_path, design):
    model, data = tiny_model(), samples(1)
    known = [{"input_ids": data[0]["input_ids"][None]}]
    options = training(design=design, steps=60, lr=1e-2)
    trained = train_predictors(model, data, known, CONFIG, options, tmp_path)
    assert statistics.mean(trained.recall.values()) > 0.9
    again = load_predictors(tmp_path, model)
    assert measure_recall(again, Observer(model, CONFIG), known) == trained.recall
    assert sorted(p.name for p in tmp_path.iterdir()) == [JSON_NAME, TENSORS_NAME]
    assert all(p.grad is None for p in model.parameters())


class KilledError(Exception):
    pass


def test_a_killed_run_goes_on_where_it_was(tmp_path, monkeypatch):
    whole = train_predictors(
        tiny_model(), samples(), held_out(), CONFIG, training(prune_steps=3), tmp_path / "whole"
    )
    calls = []
    step = Observer.__call__

    def dying(self, inputs):
        calls.append(1)
        if len(calls) == 6:
            raise KilledError
        return step(self, inputs)

    monkeypatch.setattr(Observer, "__call__", dying)
    folder = tmp_path / "killed"
    arguments = (tiny_model(), samples(), held_out(), CONFIG, training(prune_steps=3), folder)
    with pytest.raises(KilledError):
        train_predictors(*arguments)
    assert (folder / STATE_NAME).is_file()
    monkeypatch.setattr(Observer, "__call__", step)
    with pytest.raises(ValueError, match="unfinished run with other arguments"):
        train_predictors(tiny_model(), samples(), held_out(), CONFIG, training(seed=1), folder)
    resumed = train_predictors(*arguments)
    torch.testing.assert_close(resumed.nets.state_dict(), whole.nets.state_dict())
    assert resumed.recall == whole.recall
    assert not (folder / STATE_NAME).exists()


def test_a_damaged_state_is_named(tmp_path):
    (tmp_path / STATE_NAME).write_bytes(b"no state")
    with pytest.raises(ValueError, match=f"{STATE_NAME} is damaged"):
        train_predictors(tiny_model(), samples(), held_out(), CONFIG, training(), tmp_path)


@pytest.mark.parametrize(
    ("data", "message"),
    [([], "got 0 samples of 0 tokens"), (samples(seq_len=7), "got 6 samples of 7 tokens")],
)
def test_too_little_text_is_refused(tmp_path, data, message):
    with pytest.raises(ValueError, match=message):
        train_predictors(tiny_model(), data, held_out(), CONFIG, training(), tmp_path)


def test_infinite_hidden_states_are_refused(tmp_path):
    model = tiny_model()
    model.model.embed_tokens.weight.data[:] = float("inf")
    with pytest.raises(ValueError, match="Layer 0: the hidden states of a sample must be finite"):
        train_predictors(model, samples(), held_out(), CONFIG, training(), tmp_path)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"design": "best"}, "paper or max"),
        ({"steps": 0}, "`steps` must be at least 1"),
        ({"ranks": (4, 0, 4)}, "`ranks` must be at least 1"),
        ({"lr": 0.0}, "`lr` must be above 0"),
    ],
)
def test_training_options_are_checked(options, message):
    with pytest.raises(ValueError, match=message):
        PredictorTraining(**options)


def test_the_trainer_saves_refreshed_predictors_and_resumes_with_them(tmp_path):
    from .test_predictor import predictors_for

    model = tiny_model()
    predictors_for(model, folder=tmp_path / "made")
    data = [{**each, "labels": each["input_ids"]} for each in samples(8)]
    config = leaving_out(
        "eliminate", selector="predictor", predictors=str(tmp_path / "made"), predictor_refresh=2
    )

    def trainer(steps, callback):
        args = TrainingArguments(
            str(tmp_path / "out"),
            max_steps=steps,
            per_device_train_batch_size=2,
            logging_steps=1,
            save_steps=2,
            report_to="none",
            use_cpu=True,
        )
        return Trainer(tiny_model(), args, train_dataset=data, callbacks=[callback])

    first = trainer(2, LemoCallback(config))
    first.train()
    logged = [entry for entry in first.state.log_history if "loss" in entry]
    assert set(logged[0]) >= {f"lemo_recall/layer_{i}" for i in range(3)}
    checkpoint = tmp_path / "out" / "checkpoint-2"
    refreshed = load_predictors(checkpoint, first.model)  # full fine-tuning: those of the trained weights
    with pytest.raises(ValueError, match="another base model"):
        load_predictors(checkpoint, model)
    assert LemoConfig.from_yaml(tmp_path / "out" / "lemo_config.json").selector == "predictor"

    callback = LemoCallback(config)
    resumed = trainer(3, callback)
    begun = []
    apply = callback.on_step_begin

    def watch(args, state, control, **kwargs):
        begun.append({name: p.clone() for name, p in callback.report.predictors.nets.state_dict().items()})
        apply(args, state, control, **kwargs)

    callback.on_step_begin = watch
    resumed.train(resume_from_checkpoint=str(checkpoint))
    torch.testing.assert_close(begun[0], dict(refreshed.nets.state_dict()))
