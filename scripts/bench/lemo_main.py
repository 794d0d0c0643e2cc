"""LeMo's main tables: fine-tuning SmolLM2 with LoRA, with and without LeMo, at 2,048 to 8,192 tokens.

    python scripts/bench/lemo_main.py [--steps 2] [--seq-lens 2048] [--contenders NAME ...]
    python scripts/bench/lemo_main.py --steps 1 --held-out 0 --predict --limit 1.5 \\
        --seq-lens 2048 4096 8192 --contenders memory

Each contender runs in a process of its own (peak memory is a process's), one after the other: `--steps` steps
of `transformers.Trainer`, the first under the counters of bytes and operations, the others timed, then the
dense held-out loss. All see the same samples in the same order from the same initial adapter. A single step,
for samples that take minutes, is timed under the counters; `--held-out 0` leaves the loss out.

"peak" is of tensors: weights, gradients, AdamW's states and activations. With --predict, `lemo plan`'s
predictions from models of one and four layers are beside what was measured. With --limit, another table has
the longest sample whose predicted peak stays within so many GiB, and the peak measured at that length.
"""

import contextlib
import math
import statistics
import tempfile
import warnings
from dataclasses import replace
from functools import partial
from typing import Any

import common
import torch
from common import Options, assets, option
from harness import Timing, clocks, close, in_own_process, require_equal
from models import language, lora
from tqdm import tqdm
from transformers import AutoConfig, Trainer, TrainerCallback, TrainerState, TrainingArguments

from lemo_trainer import LemoCallback, LemoConfig
from lemo_trainer.compat import checkpointing_argument
from lemo_trainer.exact.ways import Way
from lemo_trainer.measure import ActivationBytes, FlopCounter, peak_rss_bytes
from lemo_trainer.offline.step_cost import Setup, StepCost, predict
from lemo_trainer.offline.way_costs import plan_ways

SEGMENTS, SAVED = LemoConfig(mode="segments"), {"save_attention": True}
LAYERS = LemoConfig(mode="exact", scheme="layers")
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
    "LeMo, nothing left out": (LemoConfig(mode="detach", keep_ratio=1.0), False),
    "LeMo, exact by layers": (LAYERS, False),
    "LeMo, exact by layers, on disk": (replace(LAYERS, boundaries="disk"), False),
    "LeMo, exact by segments": (LemoConfig(mode="exact", scheme="segments"), False),
}
LONGEST = ["LoRA", "LoRA + checkpointing + segmented loss", "LeMo, segments", "LeMo, detach"]
EXACT = [name for name in CONTENDERS if "exact" in name]
MEMORY = [*LONGEST, "LoRA + segmented loss", "LeMo, nothing left out", *EXACT, "LeMo, detach + checkpointing"]
GROUPS = {"main": DEFAULT, "memory": MEMORY}
# glibc keeps freed blocks in its heap, and their fragmentation, not the tensors, would be the peak.
ENVIRONMENT = {f"MALLOC_{kind}_THRESHOLD_": "1048576" for kind in ("MMAP", "TRIM")}


class StepMeter(TrainerCallback):
    """Costs of a Trainer's steps: bytes and operations in the first, a warm-up, and seconds in the others.

    A single step is timed too. CPU seconds, of all threads, say more where others use the cores.
    """

    def __init__(self, model: Any) -> None:
        self.model, self.trained = model, [p for p in model.parameters() if p.requires_grad]
        self.steps: list[Timing] = []
        self.first_loss = 0.0

    def on_step_begin(self, args: Any, state: TrainerState, control: Any, **kwargs: Any) -> None:
        if state.global_step == 0:
            for parameter in self.trained:  # gradients are no activations: they are there already
                parameter.grad = torch.zeros_like(parameter)
            self.first_step = contextlib.ExitStack()
            self.activations = self.first_step.enter_context(ActivationBytes())
            self.counter = self.first_step.enter_context(FlopCounter())

            def after_forward(module: Any, inputs: Any, output: Any) -> None:
                self.first_loss = output.loss.item()

            self.first_step.callback(self.model.register_forward_hook(after_forward).remove)
        self.start = clocks()

    @property
    def peak_bytes(self) -> int:
        """Of the first step's tensors, as if AdamW had its states by then."""
        state = sum(p.nbytes for p in self.model.parameters()) + 3 * sum(p.nbytes for p in self.trained)
        return self.activations.peak_bytes + state

    def on_step_end(self, args: Any, state: TrainerState, control: Any, **kwargs: Any) -> None:
        taken = Timing(*(now - start for now, start in zip(clocks(), self.start, strict=True)))
        if state.global_step == 1:
            self.first_step.close()
        if state.global_step > 1 or args.max_steps == 1:
            self.steps.append(taken)


def run_contender(name: str, seq_len: int, options: Options, before: bool = False) -> dict[str, float]:
    """One contender's metrics, measured in this process.

    Args:
        before: the held-out loss is measured before the training too.
    """
    language.quiet()
    warnings.simplefilter("ignore")
    model, steps, held_out = lora.smollm2(layers=options.layers), options.steps, options.held_out
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
        "peak_MB": meter.peak_bytes / 1e6,
        "peak_RSS_MB": peak / 1e6,
        "seconds_a_step": statistics.median(step.wall for step in meter.steps),
        "CPU_seconds_a_step": statistics.median(step.process for step in meter.steps),
        "GFLOP_a_step": meter.counter.flops / 1e9,
        **losses,
    }


measured = partial(in_own_process, run_contender, environment=ENVIRONMENT)


def predicted(name: str, seq_len: int, options: Options) -> StepCost:
    """What `lemo plan` says that a step costs; its seconds, where several steps are run."""
    lemo, checkpointing = CONTENDERS[name]
    config = AutoConfig.from_pretrained(assets.model_dir())
    config.num_hidden_layers = options.layers or config.num_hidden_layers
    setup = Setup(model_config=config, seq_len=seq_len, lora=lora.LORA)
    if lemo is not None and lemo.mode == "exact":
        plans = plan_ways(setup, LemoConfig(segment_tokens=lemo.segment_tokens), math.inf)
        where = {"segment_tokens": lemo.segment_tokens, "boundaries": lemo.boundaries}
        way = Way(scheme=lemo.scheme, selective=lemo.scheme == "segments", **where)
        plan = next(plan for plan in plans if plan.cost.way == way)
        return StepCost(plan.cost.saved, plan.peak, plan.cost.flops, math.nan)
    return predict(setup, lemo, checkpointing=checkpointing, repeats=2 if options.steps > 1 else 0)


def longest(name: str, options: Options) -> int:
    """The most tokens, in steps of 256, whose predicted peak stays within the limit.

    The next length to try lies on the line through the last two, until that is a length already tried.
    """
    peaks: dict[int, float] = {}
    last, tokens, limit = 1024, 2048, options.limit * 2**30
    while tokens not in peaks:
        peaks |= {each: predicted(name, each, options).peak_bytes for each in {last, tokens} - peaks.keys()}
        slope = (peaks[tokens] - peaks[last]) / (tokens - last)
        last, tokens = tokens, max(256, int((tokens + (limit - peaks[tokens]) / slope) / 256) * 256)
    return max(tokens for tokens, peak in peaks.items() if peak <= limit)


def table_of(seq_len: int, names: list[str], options: Options) -> common.Table:
    """All contenders at one length; the loss before is one number, for a fresh adapter changes nothing."""
    results = {
        name: measured(name, seq_len, options, name == names[0])
        for name in tqdm(names, desc=f"{seq_len} tokens", unit="contender")
    }
    losses = [(name, metrics.pop("first_loss")) for name, metrics in results.items()]
    require_equal([each for each in losses if each[0].startswith("LoRA")], close(rtol=0, atol=1e-4))
    table = common.Table(
        "lemo_main",
        "LeMo: fine-tuning SmolLM2-135M with LoRA",
        f"float32, {options.layers or 'all'} layers, {seq_len} tokens, batch 1, {torch.get_num_threads()} "
        f"threads; LoRA r 8 on all linear layers, lr 1e-3, {options.steps} steps; detach and eliminate keep "
        f"50% where the row does not say it, segments are of 512 tokens; held-out loss is dense, over "
        f"{options.held_out * seq_len} tokens; freed blocks of 1 MiB or more go back to the system at once",
    )
    before = results[names[0]].pop("held_out_loss_before", None)
    for name, metrics in results.items():
        after = metrics.pop("held_out_loss_after", None)
        judged = {} if after is None else {"held_out_loss_before": before, "held_out_loss_after": after}
        table.add(name, **metrics, **judged)
        if options.predict:
            cost = predicted(name, seq_len, options)
            row = {"predicted_saved_MB": cost.saved_bytes / 1e6, "predicted_peak_MB": cost.peak_bytes / 1e6}
            table.add(name, **row, **({"predicted_seconds": cost.seconds} if options.steps > 1 else {}))
    return table


def main() -> None:
    options = common.parse(
        __doc__,
        steps=2,
        seq_lens=[2048],
        held_out=option(1, "held-out samples of the loss; 0 leaves it out"),
        contenders=option(["main"], choices=[*GROUPS, *CONTENDERS]),
        layers=option(0, "layers of the model, for long samples; 0 keeps all"),
        predict=option(False, "predictions beside the measurements"),
        limit=option(0.0, "GiB for the longest sample; 0 leaves it out"),
    )
    language.quiet()
    names = [name for chosen in options.contenders for name in GROUPS.get(chosen, [chosen])]
    for seq_len in options.seq_lens:
        table_of(seq_len, names, options).finish()
    if options.limit:
        table = common.Table(
            "lemo_longest",
            f"LeMo: the longest sample whose step fits {options.limit:g} GiB, SmolLM2-135M with LoRA",
            f"float32, batch 1, in steps of 256 tokens; limit {options.limit:g} GiB on the tensors' peak as "
            "predicted, then measured at the length found",
        )
        for name in tqdm(LONGEST, desc="longest", unit="contender"):
            tokens = longest(name, options)
            peak = measured(name, tokens, options)["peak_MB"] * 1e6 / 2**30
            table.add(name, tokens=float(tokens), measured_peak_GiB=peak)
        table.finish()


if __name__ == "__main__":
    main()
