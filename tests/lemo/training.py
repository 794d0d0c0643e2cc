"""A Trainer on a tiny model, for LeMo's tests."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer, Trainer, TrainingArguments

from .tiny import VOCAB, tiny_model

TOKENIZER = Path(__file__).resolve().parents[2] / ".cache" / "assets" / "SmolLM2-135M-Instruct"


def samples(count: int = 8, seq_len: int = 32) -> list[dict[str, torch.Tensor]]:
    """Token sequences whose labels are masked more from sample to sample, as a chat's prompt is."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(3, VOCAB, (count, seq_len), generator=generator)
    labels = ids.clone()
    for i in range(count):
        labels[i, : 3 * i] = -100
    return [{"input_ids": row, "labels": row_labels} for row, row_labels in zip(ids, labels, strict=True)]


def training_arguments(folder: Path, **options: Any) -> dict[str, Any]:
    """Arguments of a short CPU run, for TrainingArguments and its subclasses."""
    return {
        "output_dir": str(folder),
        "max_steps": 3,
        "per_device_train_batch_size": 2,
        "learning_rate": 1e-2,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "dataloader_pin_memory": False,
        "seed": 0,
        "use_cpu": True,
        **options,
    }


def trainer_for(
    model: Any,
    folder: Path,
    callbacks: list[Any],
    *,
    data: Any = None,
    compute_metrics: Any = None,
    compute_loss_func: Any = None,
    **options: Any,
) -> Trainer:
    data = samples() if data is None else data
    return Trainer(
        model,
        TrainingArguments(**training_arguments(folder, **options)),
        train_dataset=data,
        eval_dataset=data[:2],
        callbacks=callbacks,
        compute_metrics=compute_metrics,
        compute_loss_func=compute_loss_func,
    )


def losses(trainer: Trainer) -> list[float]:
    """The logged training losses."""
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def save_model_and_text(folder: Path) -> None:
    """A tiny model with SmolLM2's tokenizer as `folder`/model, and `folder`/text.txt."""
    tokenizer = AutoTokenizer.from_pretrained(TOKENIZER)
    model = tiny_model()
    model.resize_token_embeddings(len(tokenizer))
    model.save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    (folder / "text.txt").write_text("The quick brown fox jumps over the lazy dog.\n" * 80)
