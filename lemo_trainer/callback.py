"""LeMo as a `transformers.Trainer` callback."""

from __future__ import annotations

import logging
import statistics
import types
import weakref
from pathlib import Path
from typing import Any

from torch import nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from lemo_trainer.compat import calling_handler, calling_trainer, is_training, unwrap
from lemo_trainer.config import NO_CONFIG, WITHOUT_CHOICE, LemoConfig
from lemo_trainer.informativeness.selectors import selector_for
from lemo_trainer.layers.segments import FLOAT16
from lemo_trainer.measure import StepMeter
from lemo_trainer.patch import apply_lemo, remove_lemo
from lemo_trainer.report import LemoReport, against_plain
from lemo_trainer.session import LemoSession, session_of
from lemo_trainer.sizes import size_text

logger = logging.getLogger(__name__)

CONFIG_NAME = "lemo_config.json"


class LemoCallback(TrainerCallback):
    """Patches the model when training begins and restores it when training ends, also by an exception.

    `report` is the report of the last training; it stays readable after it.

    Each log entry of a training loss tells `lemo_kept_share`, the share of all tokens since the last entry
    that carries gradient in the `lemo_patched_layers` (`lemo_kept_share/layer_N` where the layers differ);
    and of the last batch `lemo_tokens` of a sample and its `lemo_blocks` or `lemo_segments`. Entries after
    `remove_lemo` have none of them. A warning comes once if none of the first eight batches, or none of a
    shorter training, was long enough for LeMo to do something. The first entry after a measured step gets
    `lemo_saved_bytes`, `lemo_plain_bytes` and `lemo_step_flops` too. All of them reach `log_history`, the
    progress bar and the reporting callbacks (TensorBoard, W&B). With `predictor_refresh` the recall of each
    layer is logged as `lemo_recall/layer_N`. After the first step one line tells how samples are cut, and how
    many bytes wait for the backward pass with and without LeMo, or how to get that number.

    `lemo_config.json`, and the predictors of `selector="predictor"`, are written into every checkpoint and
    into the output folder; a resumed run uses those of its checkpoint.

    Args:
        config: the configuration of LeMo; None is `LemoConfig()`.
        measure: whether to measure the first optimizer step that leaves tokens out, in this process: the
            bytes that its largest micro-batch saves for the backward pass, and the FLOPs of all its forward
            and backward passes. Only that step is slower. The bytes that plain training would save for the
            same micro-batch (`LemoReport.plain_bytes`) are counted after it.

    Raises:
        TypeError: `config` is not a LemoConfig.
    """

    def __init__(self, config: LemoConfig | None = None, *, measure: bool = False) -> None:
        if config is not None and not isinstance(config, LemoConfig):
            raise TypeError(NO_CONFIG.format(owner="LemoCallback", got=repr(config)))
        self.config = config or LemoConfig()
        self.measure = measure
        self.report: LemoReport | None = None
        self._session: LemoSession | None = None
        self._meter: StepMeter | None = None
        self._measured: dict[str, float] = {}  # for the next log entry
        self._new = True

    def on_init_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        handler = _come_first(self)
        trainer = handler and calling_trainer(handler)
        if trainer is not None and "train" not in vars(trainer):
            trainer.train = types.MethodType(_train_and_restore, trainer)

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        handler = _come_first(self)  # a callback added after the Trainer was made gets no `on_init_end`
        self.restore(kwargs["model"])  # the last train() may have been interrupted
        if args.fp16 and self.config.mode == "segments":
            raise ValueError(FLOAT16)
        self.report = apply_lemo(kwargs["model"], self._config_at(Path(args.output_dir), state))
        self._session, self._new = session_of(kwargs["model"]), True
        trainer = handler and calling_trainer(handler)
        if self._session is not None and trainer is not None:
            reference = weakref.ref(trainer)
            self._session.passes.in_scope = lambda: is_training(reference())
        if args.torch_compile:
            logger.warning("`torch_compile` compiles evaluation only: LeMo's training steps run eagerly.")
        self._meter = StepMeter() if self.measure else None

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        assert self._session is not None
        self._session.at_step(state.global_step)
        if self._meter is not None and self.report is not None and self.report.active:
            self._meter.start(unwrap(kwargs["model"]))

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if self._meter is not None:
            self._meter.stop()

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if self.report is None:
            return
        measured = ""
        if self._meter is not None and self._meter.done:
            measured = self._take_measurement(self.report, self._meter)
        if self._new and self.report.seq_len:
            self._new = False
            logger.info(
                "LeMo, first step: %s; %s.", self.report.last_batch, measured or self.report.saved_bytes
            )
        elif measured:
            logger.info("LeMo, measured step: %s.", measured)

    def _take_measurement(self, report: LemoReport, meter: StepMeter) -> str:
        """Keep what was measured for the next log entry; returns a sentence about the bytes."""
        self._meter = None
        self._measured = {"lemo_saved_bytes": meter.saved_bytes, "lemo_step_flops": meter.flops}
        try:
            plain = report.plain_bytes(*meter.shape)
        except ValueError as error:
            return f"{size_text(meter.saved_bytes)} wait for the backward pass (measured). {error}"
        self._measured["lemo_plain_bytes"] = plain
        return against_plain(meter.saved_bytes, plain, "measured")

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **kwargs: Any,
    ) -> None:
        removed = self._session is None or session_of(kwargs["model"]) is not self._session
        if self.report is None or self._session is None or removed or logs is None or "loss" not in logs:
            return
        shares = self._session.take_shares()
        metrics: dict[str, float] = {
            "lemo_kept_share": round(statistics.mean(shares.values()) if shares else 1.0, 4),
            "lemo_patched_layers": len(self.report.patched_layers),
            "lemo_tokens": self.report.seq_len,
            "lemo_segments"
            if self.report.config.mode in WITHOUT_CHOICE
            else "lemo_blocks": self.report.pieces,
        }
        if len(set(shares.values())) > 1:
            metrics |= {f"lemo_kept_share/layer_{i}": round(share, 4) for i, share in shares.items()}
        metrics |= self._session.selector.metrics()
        metrics |= self._measured
        self._measured = {}
        logs.update(metrics)
        state.log_history[-1].update(metrics)

    def on_save(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._save(_checkpoint(Path(args.output_dir), state), state, kwargs["model"])

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._save(Path(args.output_dir), state, kwargs["model"])
        if self._session is not None:
            self._session.warn_if_idle()
        self.restore(kwargs["model"])

    def restore(self, model: nn.Module) -> None:
        """Take this callback's patch off `model`; without one, nothing happens."""
        if self._meter is not None:
            self._meter.stop()
        if self._session is not None and session_of(model) is self._session:
            remove_lemo(model)
        self._session = self._meter = None

    def _config_at(self, output_dir: Path, state: TrainerState) -> LemoConfig:
        """The configuration, which a selector may point to its files in the checkpoint of a resumed run."""
        selector = type(selector_for(self.config))
        return selector.resume(self.config, _checkpoint(output_dir, state))

    def _save(self, folder: Path, state: TrainerState, model: nn.Module) -> None:
        if not state.is_world_process_zero:
            return
        folder.mkdir(parents=True, exist_ok=True)
        (folder / CONFIG_NAME).write_text(self.config.to_json(), "utf-8")
        if self._session is not None:
            self._session.selector.save(folder, model)


def _checkpoint(output_dir: Path, state: TrainerState) -> Path:
    return output_dir / f"checkpoint-{state.global_step}"


def _come_first(callback: TrainerCallback) -> Any:
    """Move `callback` in front of the reporting callbacks, which otherwise would not see its metrics.

    Returns:
        The handler that calls it; None if there is none.
    """
    handler = calling_handler(callback)
    if handler is not None:
        handler.remove_callback(callback)
        handler.callbacks.insert(0, callback)
    return handler


def _train_and_restore(trainer: Any, *args: Any, **kwargs: Any) -> Any:
    """`trainer.train`, behind which no model stays patched: a Trainer has no event for exceptions."""
    try:
        return type(trainer).train(trainer, *args, **kwargs)
    finally:
        for callback in trainer.callback_handler.callbacks:
            if isinstance(callback, LemoCallback):
                callback.restore(trainer.model)
