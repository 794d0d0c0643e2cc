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
from transformers import LlamaConfig

from lemo_trainer import LemoConfig
from lemo_trainer.measure import ActivationBytes

BASELINE, LIGER = "LoRA + checkpointing + segmented loss", "LoRA + checkpointing + Liger"
_DETACH = LemoConfig(mode="detach")
_OWN_PARTS = LemoConfig(mode="detach", fused_kernels=False)
CONTENDERS: dict[str, lora.Method] = {
    BASELINE: (lora.SEGMENTED_LOSS, True),
    LIGER: (None, True),
    "LeMo, detach, 50% + checkpointing": (_DETACH, True),
    "LeMo, detach, 50% + checkpointing, the model's own parts": (_OWN_PARTS, True),
    "LeMo, detach, 50%": (_DETACH, False),
    "LeMo, eliminate, 50% + checkpointing": (lora.ELIMINATE, True),
    "LeMo, segments of 2,048": (LemoConfig(mode="segments", segment_tokens=2048), False),
}


def step(model: Any, tokens: Tensor) -> float:
    """The loss; the adapter's gradients are computed and dropped."""
    loss = lora.loss_of(model, tokens)
    loss.backward()
    model.zero_grad()
    return loss.item()


def peak_MB(run: Callable[[], Any]) -> float:
    """What a step allocates at its peak beyond what was there before."""
    if not torch.cuda.is_available():
        with ActivationBytes() as activations:
            run()
        return activations.peak_bytes / 1e6
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    run()
    return (torch.cuda.max_memory_allocated() - before) / 1e6


def models_of(build: Callable[[], Any]) -> dict[str, Any]:
    """The model of each contender that can run here."""
    models = dict.fromkeys(CONTENDERS, lora.with_lora(build()))
    if importlib.util.find_spec("liger_kernel") is None or not torch.cuda.is_available():
        print(f"lemo_gpu: no row {LIGER!r}: liger_kernel is not installed here, or has no GPU.")
        del models[LIGER]
        return models
    from liger_kernel.transformers import _apply_liger_kernel_to_instance

    models[LIGER] = lora.with_lora(build())
    _apply_liger_kernel_to_instance(model=models[LIGER].get_base_model())
    return models


def measure(models: dict[str, Any], seq_len: int, options: Any, device: str) -> None:
    model = models[BASELINE]
    table = common.Table(
        "lemo_gpu_tiny" if options.tiny else "lemo_gpu",
        f"LeMo: a step of a random Llama ({model.num_parameters() / 1e6:.0f}M), {seq_len} tokens",
        f"bfloat16, {seq_len} tokens, batch 1, LoRA r 8 on all linear layers, {device}, no optimizer, "
        f"median of {options.repeats}; peak is beyond weights",
    )
    tokens = torch.randint(model.config.vocab_size, (1, seq_len), device=device)
    steps = {}
    for name, each in models.items():
        setup = partial(lora.prepared, each, *CONTENDERS[name])
        steps[name] = Contender(partial(step, each, tokens), setup, exact="eliminate" not in name)
    race = Race(steps, equal=close(rtol=0.02, atol=0))
    race.check()
    for name, contender in steps.items():
        with contender.setup():
            table.add(name, peak_MB=peak_MB(contender.call))
    for name, times in race.run(options.repeats).items():
        faster = race.times[BASELINE].median / times.median
        table.add(name, **times.columns("s", median="s_a_step"), times_faster=faster)
    table.finish()


def main() -> None:
    options = common.parse(
        __doc__,
        seq_lens=option([8192, 16384, 32768], "tokens of a sample"),
        repeats=3,
        tiny=option(False, "a model of four narrow layers and 256 tokens at most, on any device"),
    )
    language.quiet()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cpu" and not options.tiny:
        raise SystemExit("lemo_gpu: no GPU: torch sees no CUDA device; --tiny tries the script without one.")
    seq_lens = sorted({min(256, each) for each in options.seq_lens}) if options.tiny else options.seq_lens
    sizes = (64, 128, 4, 4, 2) if options.tiny else (2048, 8192, 16, 32, 8)  # those of Llama 3.2 1B
    config = {"vocab_size": 256 if options.tiny else 128256, "max_position_embeddings": max(seq_lens)}
    with torch.device(device):
        models = models_of(
            partial(language.random, LlamaConfig, *sizes, rope_parameters={"rope_theta": 5e5}, **config)
        )
    for seq_len in seq_lens:
        measure(models, seq_len, options, device)


if __name__ == "__main__":
    main()
