"""LeMo as a `transformers.Trainer` callback."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from lemo_trainer.config import LemoConfig
from lemo_trainer.patch import LemoReport, apply_lemo, remove_lemo

CONFIG_NAME = "lemo_config.json"


class LemoCallback(TrainerCallback):
    """Patches the model when training begins and restores it when training ends.

    Writes `lemo_config.json` into every checkpoint and into the output folder, and the kept share and the
    number of patched layers into the logs. `Trainer`'s reporting callbacks (TensorBoard, W&B) run before this
    one and do not see these two.

    Args:
        config: which tokens are kept, where and when.
    """

    def __init__(self, config: LemoConfig) -> None:
        self.config = config
        self.report: LemoReport | None = None

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if self.report is not None:  # the last train() was interrupted
            remove_lemo(kwargs["model"])
        self.report = apply_lemo(kwargs["model"], self.config)

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        assert self.report is not None
        self.report.active = state.global_step >= self.config.warmup_steps

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **kwargs: Any,
    ) -> None:
        if self.report is None or logs is None or "loss" not in logs:
            return
        metrics = {
            "lemo_kept_share": round(self.report.kept_share, 4),
            "lemo_patched_layers": len(self.report.patched_layers),
        }
        logs.update(metrics)
        state.log_history[-1].update(metrics)

    def on_save(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._save_config(Path(args.output_dir) / f"checkpoint-{state.global_step}", state)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        remove_lemo(kwargs["model"])
        self.report = None
        self._save_config(Path(args.output_dir), state)

    def _save_config(self, folder: Path, state: TrainerState) -> None:
        if state.is_world_process_zero:
            folder.mkdir(parents=True, exist_ok=True)
            (folder / CONFIG_NAME).write_text(self.config.to_json(), "utf-8")
