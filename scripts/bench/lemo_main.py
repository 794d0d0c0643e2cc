"""LeMo's main tables: fine-tuning SmolLM2 with LoRA, with and without LeMo, at 2,048 and at 8,192 tokens.

    python scripts/bench/lemo_main.py [--steps 2] [--seq-len 2048] [--contenders NAME ...]

Each contender runs in a process of its own (peak memory is a process's), one after the other: `--steps` steps
of `transformers.Trainer`, the first under the counters of bytes and operations, the others timed, then the
dense held-out loss. All see the same samples in the same order from the same initial adapter. A single step,
for samples that take minutes, is timed under the counters; `--held-out 0` leaves the loss out.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from typing import Any

import common
import torch
import transformers
from peft import LoraConfig, get_peft_model
from tqdm import tqdm
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    Trainer,
    TrainerCallback,
    TrainerState,
    TrainingArguments,
)

from lemo_trainer import LemoCallback, LemoConfig
from lemo_trainer.compat import checkpointing_argument
from lemo_trainer.measure import ActivationBytes, FlopCounter, peak_rss_bytes
from lemo_trainer.texts import pack

# isort: split
import assets  # common.py puts its folder on the path

# contender: (LeMo's options or None, gradient checkpointing)
SEGMENTED_LOSS: dict[str, Any] = {"keep_ratio": 1.0, "selective_checkpointing": False}
DETACH: dict[str, Any] = {"mode": "detach", "keep_ratio": 0.5}
CONTENDERS: dict[str, tuple[dict[str, Any] | None, bool]] = {
    "LoRA": (None, False),
    "LoRA + segmented loss": (SEGMENTED_LOSS, False),
    "LoRA + checkpointing": (None, True),
    "LoRA + checkpointing + segmented loss": (SEGMENTED_LOSS, True),
    "LeMo, segments": ({"mode": "segments"}, False),
    "LeMo, detach": (DETACH, False),
    "LeMo, detach + checkpointing": (DETACH, True),
    "LeMo, eliminate": ({"mode": "eliminate", "keep_ratio": 0.5}, False),
}
DEFAULT = list(CONTENDERS)
ATTENTION: dict[str, Any] = {"save_attention": True}
CONTENDERS |= {  # named by --contenders only, for the demo's time
    "LoRA + checkpointing, attention saved + segmented loss": ({**SEGMENTED_LOSS, **ATTENTION}, True),
    "LeMo, segments, nothing recomputed": ({"mode": "segments", "selective_checkpointing": False}, False),
    "LeMo, detach, 40% + checkpointing": ({**DETACH, "keep_ratio": 0.4}, True),
    "LeMo, detach + checkpointing, attention saved": ({**DETACH, **ATTENTION}, True),
    "LeMo, detach, 40% + checkpointing, attention saved": ({**DETACH, "keep_ratio": 0.4, **ATTENTION}, True),
    "LeMo, eliminate + checkpointing": ({"mode": "eliminate", "keep_ratio": 0.5}, True),
}


class StepMeter(TrainerCallback):
    """Costs of a Trainer's steps: bytes and operations in the first, a warm-up, and seconds in the others.

    A single step is timed too. CPU seconds, of all threads, say more where others use the cores.
    """

    def __init__(self, model: Any) -> None:
        self.model = model
        self.seconds: list[float] = []
        self.cpu_seconds: list[float] = []
        self.first_loss = 0.0

    def on_step_begin(self, args: Any, state: TrainerState, control: Any, **kwargs: Any) -> None:
        if state.global_step == 0:
            self.first_step = contextlib.ExitStack()
            self.activations = self.first_step.enter_context(ActivationBytes())
            self.counter = self.first_step.enter_context(FlopCounter())

            def after_forward(module: Any, inputs: Any, output: Any) -> None:
                self.first_loss = output.loss.item()

            self.first_step.callback(self.model.register_forward_hook(after_forward).remove)
        self.start = time.perf_counter(), time.process_time()

    def on_step_end(self, args: Any, state: TrainerState, control: Any, **kwargs: Any) -> None:
        seconds, cpu_seconds = time.perf_counter() - self.start[0], time.process_time() - self.start[1]
        if state.global_step == 1:
            self.first_step.close()
        if state.global_step > 1 or args.max_steps == 1:
            self.seconds.append(seconds)
            self.cpu_seconds.append(cpu_seconds)


def run_contender(name: str, options: argparse.Namespace) -> dict[str, float]:
    """One contender's metrics, measured in this process."""
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    tokenizer = AutoTokenizer.from_pretrained(assets.model_dir())
    model = AutoModelForCausalLM.from_pretrained(assets.model_dir(), dtype=torch.float32)
    torch.manual_seed(0)
    model = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", r=8, target_modules="all-linear"))
    train = pack(assets.texts("train"), tokenizer, options.seq_len)[: options.steps]
    held_out = pack(assets.texts("held_out"), tokenizer, options.seq_len)[: options.held_out]

    lemo, checkpointing = CONTENDERS[name]
    callbacks: list[TrainerCallback] = []
    if lemo is not None:
        callbacks.append(LemoCallback(LemoConfig(**lemo)))
    meter = StepMeter(model)

    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            folder,
            max_steps=options.steps,
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
            model, arguments, train_dataset=train, eval_dataset=held_out, callbacks=[*callbacks, meter]
        )
        # A fresh adapter changes nothing, so the loss before is one number for all.
        losses = {}
        if held_out and name == options.contenders[0]:
            losses["held_out_loss_before"] = trainer.evaluate()["eval_loss"]
        trainer.train()
        peak = peak_rss_bytes()
        if held_out:
            losses["held_out_loss_after"] = trainer.evaluate()["eval_loss"]
        return {
            "first_loss": meter.first_loss,
            "saved_activations_MB": meter.activations.saved_bytes / 1e6,
            "peak_RSS_MB": peak / 1e6,
            "seconds_a_step": statistics.median(meter.seconds),
            "CPU_seconds_a_step": statistics.median(meter.cpu_seconds),
            "GFLOP_a_step": meter.counter.flops / 1e9,
            **losses,
        }


# glibc keeps freed blocks in its heap, and their fragmentation, not the tensors, would be the peak.
MALLOC = {"MALLOC_MMAP_THRESHOLD_": "1048576", "MALLOC_TRIM_THRESHOLD_": "1048576"}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--steps", type=int, default=2)
    parser.add_argument("--seq-len", type=int, default=2048)
    parser.add_argument(
        "--held-out", type=int, default=1, help="held-out samples of the loss; 0 leaves it out"
    )
    parser.add_argument("--contenders", nargs="*", choices=CONTENDERS, default=DEFAULT)
    parser.add_argument("--contender", choices=list(CONTENDERS), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.contender:
        print(json.dumps(run_contender(options.contender, options)))
        return

    def measure(name: str) -> dict[str, float]:
        command = [sys.executable, "-Wignore", __file__, *sys.argv[1:], "--contender", name]
        process = subprocess.run(
            command, stdout=subprocess.PIPE, text=True, check=True, env=os.environ | MALLOC
        )
        metrics: dict[str, float] = json.loads(process.stdout.splitlines()[-1])
        return metrics

    results = {name: measure(name) for name in tqdm(options.contenders, desc="lemo_main", unit="contender")}
    before = results[options.contenders[0]].pop("held_out_loss_before", None)
    dense = {name: metrics.pop("first_loss") for name, metrics in results.items()}
    dense = {name: loss for name, loss in dense.items() if name.startswith("LoRA")}
    if max(dense.values()) - min(dense.values()) > 1e-4:
        raise RuntimeError(f"The dense contenders must agree on the first loss, got {dense}.")
    table = common.Table(
        "lemo_main",
        "LeMo: fine-tuning SmolLM2-135M with LoRA",
        f"float32, {options.seq_len} tokens, batch 1, {torch.get_num_threads()} threads; LoRA r 8 on all "
        f"linear layers, lr 1e-3, {options.steps} steps; detach and eliminate keep 50% where the row does "
        f"not say it, segments are of 512 tokens; held-out loss is dense, over "
        f"{options.held_out * options.seq_len} tokens; freed blocks of 1 MiB or more go back to the system "
        f"at once",
    )
    for name, metrics in results.items():
        after = metrics.pop("held_out_loss_after", None)
        losses = {} if after is None else {"held_out_loss_before": before, "held_out_loss_after": after}
        table.add(name, **metrics, **losses)
    table.finish()


if __name__ == "__main__":
    main()
