from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import yaml

from lemo_trainer import LemoConfig
from scripts import finetune

from .training import losses, save_model_and_text

ROOT = Path(__file__).resolve().parents[2]
SHORT = {"max_steps": 1, "use_cpu": True, "report_to": "none", "save_strategy": "no", "logging_steps": 1}

# peft 0.21 still reads transformers' old name.
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A tiny model with the real tokenizer, a text and a chat."""
    folder = tmp_path_factory.mktemp("finetune")
    save_model_and_text(folder)
    chat = [{"role": "user", "content": "How many?"}, {"role": "assistant", "content": "Twenty-two. " * 9}]
    (folder / "chat.jsonl").write_text(f"{json.dumps({'messages': chat})}\n" * 9)
    return folder


def flags(**options):
    return [text for name, value in {**SHORT, **options}.items() for text in (f"--{name}", str(value))]


def run(monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", ["finetune.py", *map(str, arguments)])
    return finetune.main()


def test_flags_run_lora_with_lemo(monkeypatch, folder, tmp_path):
    options = {
        "model_name_or_path": folder / "model",
        "train_file": folder / "text.txt",
        "eval_file": folder / "chat.jsonl",
        "seq_len": 64,
        "lora_r": 2,
        "output_dir": tmp_path,
    }
    trainer = run(
        monkeypatch, *flags(**options), "--lemo", "--lemo_keep_ratio", "0.4", "--lemo_block_size", "8"
    )
    assert trainer.state.log_history[0]["lemo_kept_share"] == 0.375
    assert (tmp_path / "adapter_model.safetensors").exists()
    assert LemoConfig.from_yaml(tmp_path / "lemo_config.json").keep_ratio == 0.4
    assert "eval_loss" in trainer.state.log_history[-1]


def test_a_yaml_file_says_the_same_as_flags(monkeypatch, folder, tmp_path):
    options = {
        "model_name_or_path": str(folder / "model"),
        "train_file": str(folder / "chat.jsonl"),
        "seq_len": 64,
        "output_dir": str(tmp_path),
    }
    (tmp_path / "options.yaml").write_text(
        yaml.safe_dump({**SHORT, **options, "lemo": True, "lemo_mode": "detach", "lemo_layers": [0, 2]})
    )
    by_file = run(monkeypatch, tmp_path / "options.yaml")
    by_flags = run(monkeypatch, *flags(**options), "--lemo", "--lemo_mode", "detach", "--lemo_layers", "0,2")
    assert losses(by_file) == losses(by_flags)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (["--lemo", "--lemo_keep_ratio", "2"], "`keep_ratio` must be above 0 and at most 1, got 2.0"),
        (["--lemo_keep_ratio", "0.4"], "`lemo_keep_ratio` must come with `--lemo`"),
        (["--train_file", "absent.jsonl"], "No such text file: absent.jsonl"),
        (["--seq_len", "100000"], "at least `seq_len` 100000 tokens"),
    ],
)
def test_what_cannot_run_says_why(monkeypatch, capsys, folder, tmp_path, change, message):
    options = {"model_name_or_path": folder / "model", "train_file": folder / "text.txt"}
    with pytest.raises(SystemExit, match="2"):
        run(monkeypatch, *flags(**options, output_dir=tmp_path / "out"), *change)
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_the_published_options_are_valid(monkeypatch):
    from transformers import HfArgumentParser, TrainingArguments

    monkeypatch.chdir(ROOT)
    classes = (finetune.ModelArguments, finetune.DataArguments, TrainingArguments, finetune.LemoArguments)
    model, data, _, lemo = HfArgumentParser(classes).parse_yaml_file("configs/lemo/finetune.yaml")
    assert Path(model.model_name_or_path).is_dir()
    assert Path(data.train_file).is_file()
    assert lemo.config() is not None
