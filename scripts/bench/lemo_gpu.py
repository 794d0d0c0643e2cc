"""LeMo end to end on a GPU: steps of a 1B-class Llama in bfloat16 at 8k, 16k and 32k tokens.

    python scripts/bench/lemo_gpu.py [--seq-lens 8192 16384 32768] [--repeats 3] [--tiny]

The model has Llama 3.2 1B's sizes and random weights; LoRA on all linear layers, batch 1, random tokens.
All contenders step in turns on one model, Liger (where it is installed) on a second one of its own; memory is
what a step allocates at its peak beyond what was there before. --tiny is a trial on any device.
"""

import importlib.util
from collections.abc import Callable
from functools import partial
from typing import Any

import common
import torch
from common import option
from harness import Contender, Race, close
from models import language, lora
from torch import Tensor

from lemo_trainer import LemoConfig
from lemo_trainer.measure import ActivationBytes

SIZES = {
    "hidden_size": 2048,
    "intermediate_size": 8192,
    "num_hidden_layers": 16,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 64,
    "vocab_size": 128256,
}
TINY = dict(zip(SIZES, (64, 128, 4, 4, 2, 16, 256), strict=True))
SEQ_LENS = [8192, 16384, 32768]
BASELINE = "LoRA + checkpointing + segmented loss"
LIGER = "LoRA + checkpointing + Liger"
CONTENDERS: dict[str, lora.Method] = {
    BASELINE: (lora.SEGMENTED_LOSS, True),
    LIGER: (None, True),
    "LeMo, detach, 50% + checkpointing": (LemoConfig(mode="detach"), True),
    "LeMo, detach, 50% + checkpointing, the model's own parts": (
        LemoConfig(mode="detach", fused_kernels=False),
        True,
    ),
    "LeMo, detach, 50%": (LemoConfig(mode="detach"), False),
    "LeMo, eliminate, 50% + checkpointing": (lora.ELIMINATE, True),
    "LeMo, segments of 2,048": (LemoConfig(mode="segments", segment_tokens=2048), False),
}


def step(model: Any, tokens: Tensor) -> float:
    """The loss; the adapter's gradients are computed and dropped."""
    loss = lora.loss_of(model, tokens)
    loss.backward()
    model.zero_grad()
    return loss.item()


def peak_MB(run: Callable[[], Any], device: str) -> float:
    """What a step allocates at its peak beyond what was there before."""
    if device != "cuda":
        with ActivationBytes() as activations:
            run()
        return activations.peak_bytes / 1e6
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    run()
    return (torch.cuda.max_memory_allocated() - before) / 1e6


def models_of(sizes: dict[str, Any], seq_len: int, device: str) -> dict[str, Any]:
    """The model of each contender that can run here."""
    model = lora.with_lora(language.llama(sizes, seq_len, device))
    models = dict.fromkeys(CONTENDERS, model)
    if importlib.util.find_spec("liger_kernel") is None or device == "cpu":
        print(f"lemo_gpu: no row {LIGER!r}: liger_kernel is not installed here, or has no GPU.")
        del models[LIGER]
        return models
    from liger_kernel.transformers import _apply_liger_kernel_to_instance

    models[LIGER] = lora.with_lora(language.llama(sizes, seq_len, device))
    _apply_liger_kernel_to_instance(model=models[LIGER].get_base_model())
    return models


def measure(models: dict[str, Any], seq_len: int, options: Any, device: str) -> None:
    model = models[BASELINE]
    table = common.Table(
        "lemo_gpu_tiny" if options.tiny else "lemo_gpu",
        f"LeMo: a step of a randomly initialised Llama ({model.num_parameters() / 1e6:.0f}M), {seq_len} "
        "tokens",
        f"bfloat16, {seq_len} tokens, batch 1, LoRA r 8 on all linear layers, {device}, no optimizer, "
        f"median of {options.repeats}; peak is beyond weights",
    )
    tokens = torch.randint(model.config.vocab_size, (1, seq_len), device=device)
    steps = {
        name: Contender(
            partial(step, each, tokens),
            setup=partial(lora.prepared, each, *CONTENDERS[name]),
            exact="eliminate" not in name,
        )
        for name, each in models.items()
    }
    race = Race(steps, equal=close(rtol=0.02, atol=0))
    race.check()
    for name, contender in steps.items():
        with contender.setup():
            contender.call()  # of the contenders that are not exact, the first
            table.add(name, peak_MB=peak_MB(contender.call, device))
    for name, times in race.run(options.repeats).items():
        faster = race.times[BASELINE].median / times.median
        table.add(name, **times.columns("s", median="s_a_step"), times_faster=faster)
    table.finish()


def main() -> None:
    options = common.parse(
        __doc__,
        seq_lens=option(SEQ_LENS, "tokens of a sample"),
        repeats=3,
        tiny=option(False, "a model of four narrow layers, on any device"),
    )
    language.quiet()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cpu" and not options.tiny:
        raise SystemExit("lemo_gpu: no GPU: torch sees no CUDA device; --tiny tries the script without one.")
    seq_lens = [256] if options.tiny and options.seq_lens is SEQ_LENS else options.seq_lens
    models = models_of(TINY if options.tiny else SIZES, max(seq_lens), device)
    for seq_len in seq_lens:
        measure(models, seq_len, options, device)


if __name__ == "__main__":
    main()
