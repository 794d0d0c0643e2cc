"""LeMo's main tables: fine-tuning SmolLM2 with LoRA, with and without LeMo, at 2,048 and at 8,192 tokens.

    python scripts/bench/lemo_main.py [--steps 2] [--seq-len 2048] [--contenders NAME ...]

Each contender runs in a process of its own (peak memory is a process's), one after the other: `--steps` steps
of `transformers.Trainer`, the first under the counters of bytes and operations, the others timed, then the
dense held-out loss. All see the same samples in the same order from the same initial adapter. A single step,
for samples that take minutes, is timed under the counters; `--held-out 0` leaves the loss out.
"""

import contextlib
import statistics
import tempfile
import warnings
from dataclasses import replace
from typing import Any

import common
import torch
from common import option
from harness import Timing, clocks, close, in_own_process, require_equal
from models import language, lora
from tqdm import tqdm
from transformers import Trainer, TrainerCallback, TrainerState, TrainingArguments

from lemo_trainer import LemoCallback, LemoConfig
from lemo_trainer.compat import checkpointing_argument
from lemo_trainer.measure import ActivationBytes, FlopCounter, peak_rss_bytes

SEGMENTS, SAVED = LemoConfig(mode="segments"), {"save_attention": True}
DETACH_40 = replace(lora.DETACH, keep_ratio=0.4)
CONTENDERS: dict[str, lora.Method] = {
    "LoRA": (None, False),
    "LoRA + segmented loss": (lora.SEGMENTED_LOSS, False),
    "LoRA + checkpointing": (None, True),
    "LoRA + checkpointing + segmented loss": (lora.SEGMENTED_LOSS, True),
    "LeMo, segments": (SEGMENTS, False),
    "LeMo, detach": (lora.DETACH, False),
    "LeMo, detach + checkpointing": (lora.DETACH, True),
    "LeMo, eliminate": (lora.ELIMINATE, False),
}
DEFAULT = list(CONTENDERS)
CONTENDERS |= {  # only where --contenders names them, for the demo's time
    "LoRA + checkpointing, attention saved + segmented loss": (replace(lora.SEGMENTED_LOSS, **SAVED), True),
    "LeMo, segments, nothing recomputed": (replace(SEGMENTS, selective_checkpointing=False), False),
    "LeMo, detach, 40% + checkpointing": (DETACH_40, True),
    "LeMo, detach + checkpointing, attention saved": (replace(lora.DETACH, **SAVED), True),
    "LeMo, detach, 40% + checkpointing, attention saved": (replace(DETACH_40, **SAVED), True),
    "LeMo, eliminate + checkpointing": (lora.ELIMINATE, True),
}
# glibc keeps freed blocks in its heap, and their fragmentation, not the tensors, would be the peak.
ENVIRONMENT = {f"MALLOC_{kind}_THRESHOLD_": "1048576" for kind in ("MMAP", "TRIM")}


class StepMeter(TrainerCallback):
    """Costs of a Trainer's steps: bytes and operations in the first, a warm-up, and seconds in the others.

    A single step is timed too. CPU seconds, of all threads, say more where others use the cores.
    """

    def __init__(self, model: Any) -> None:
        self.model = model
        self.steps: list[Timing] = []
        self.first_loss = 0.0

    def on_step_begin(self, args: Any, state: TrainerState, control: Any, **kwargs: Any) -> None:
        if state.global_step == 0:
            self.first_step = contextlib.ExitStack()
            self.activations = self.first_step.enter_context(ActivationBytes())
            self.counter = self.first_step.enter_context(FlopCounter())

            def after_forward(module: Any, inputs: Any, output: Any) -> None:
                self.first_loss = output.loss.item()

            self.first_step.callback(self.model.register_forward_hook(after_forward).remove)
        self.start = clocks()

    def on_step_end(self, args: Any, state: TrainerState, control: Any, **kwargs: Any) -> None:
        taken = Timing(*(now - start for now, start in zip(clocks(), self.start, strict=True)))
        if state.global_step == 1:
            self.first_step.close()
        if state.global_step > 1 or args.max_steps == 1:
            self.steps.append(taken)


def run_contender(name: str, steps: int, seq_len: int, held_out: int, before: bool) -> dict[str, float]:
    """One contender's metrics, measured in this process.

    Args:
        before: the held-out loss is measured before the training too.
    """
    language.quiet()
    warnings.simplefilter("ignore")
    model = lora.smollm2()
    train, judged = (lora.samples(split, seq_len) for split in ("train", "held_out"))
    lemo, checkpointing = CONTENDERS[name]
    meter = StepMeter(model)
    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            folder,
            max_steps=steps,
            per_device_train_batch_size=1,
            per_device_eval_batch_size=1,
            learning_rate=1e-3,
            lr_scheduler_type="constant",
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            logging_strategy="no",
            dataloader_pin_memory=False,
            prediction_loss_only=True,
            seed=0,
            **{checkpointing_argument(): checkpointing},
        )
        trainer = Trainer(
            model,
            arguments,
            train_dataset=train[:steps],
            eval_dataset=judged[:held_out],
            callbacks=[*([] if lemo is None else [LemoCallback(lemo)]), meter],
        )
        losses = {}
        if held_out and before:
            losses["held_out_loss_before"] = trainer.evaluate()["eval_loss"]
        trainer.train()
        peak = peak_rss_bytes()
        if held_out:
            losses["held_out_loss_after"] = trainer.evaluate()["eval_loss"]
    return {
        "first_loss": meter.first_loss,
        "saved_activations_MB": meter.activations.saved_bytes / 1e6,
        "peak_RSS_MB": peak / 1e6,
        "seconds_a_step": statistics.median(step.wall for step in meter.steps),
        "CPU_seconds_a_step": statistics.median(step.process for step in meter.steps),
        "GFLOP_a_step": meter.counter.flops / 1e9,
        **losses,
    }


def main() -> None:
    options = common.parse(
        __doc__,
        steps=2,
        seq_len=2048,
        held_out=option(1, "held-out samples of the loss; 0 leaves it out"),
        contenders=option(DEFAULT, choices=CONTENDERS),
    )
    sizes = options.steps, options.seq_len, options.held_out
    first = options.contenders[0]  # a fresh adapter changes nothing: the loss before is one number for all
    results = {
        name: in_own_process(run_contender, name, *sizes, name == first, environment=ENVIRONMENT)
        for name in tqdm(options.contenders, desc="lemo_main", unit="contender")
    }
    losses = [(name, metrics.pop("first_loss")) for name, metrics in results.items()]
    require_equal([each for each in losses if each[0].startswith("LoRA")], close(rtol=0, atol=1e-4))
    table = common.Table(
        "lemo_main",
        "LeMo: fine-tuning SmolLM2-135M with LoRA",
        f"float32, {options.seq_len} tokens, batch 1, {torch.get_num_threads()} threads; LoRA r 8 on all "
        f"linear layers, lr 1e-3, {options.steps} steps; detach and eliminate keep 50% where the row does "
        f"not say it, segments are of 512 tokens; held-out loss is dense, over "
        f"{options.held_out * options.seq_len} tokens; freed blocks of 1 MiB or more go back to the system "
        f"at once",
    )
    before = results[first].pop("held_out_loss_before", None)
    for name, metrics in results.items():
        after = metrics.pop("held_out_loss_after", None)
        judged = {} if after is None else {"held_out_loss_before": before, "held_out_loss_after": after}
        table.add(name, **metrics, **judged)
    table.finish()


if __name__ == "__main__":
    main()
