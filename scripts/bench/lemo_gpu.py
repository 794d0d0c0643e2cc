"""LeMo end to end on a GPU: steps of a 1B-class Llama in bfloat16 at 8k, 16k and 32k tokens.

    python scripts/bench/lemo_gpu.py [--seq-lens 8192 16384 32768] [--repeats 3] [--tiny]

The model has Llama 3.2 1B's sizes and random weights; LoRA on all linear layers, batch 1, random tokens.
All contenders step in turns on one model, Liger (where it is installed) on a second one of its own; memory is
what a step allocates at its peak beyond what was there before. --tiny is a trial on any device.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import importlib.util
import statistics
import time
from collections.abc import Callable
from typing import Any

import common
import torch
import transformers
from peft import LoraConfig, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM

from lemo_trainer import LemoConfig, apply_lemo, remove_lemo
from lemo_trainer.measure import ActivationBytes

SIZES: dict[str, Any] = {
    "hidden_size": 2048,
    "intermediate_size": 8192,
    "num_hidden_layers": 16,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 64,
    "vocab_size": 128256,
}
TINY: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "vocab_size": 256,
}
BASELINE = "LoRA + checkpointing + segmented loss"
LIGER = "LoRA + checkpointing + Liger"
# contender: (LeMo's options or None, gradient checkpointing)
CONTENDERS: dict[str, tuple[LemoConfig | None, bool]] = {
    BASELINE: (LemoConfig(keep_ratio=1.0, selective_checkpointing=False), True),
    LIGER: (None, True),
    "LeMo, detach, 50% + checkpointing": (LemoConfig(mode="detach"), True),
    "LeMo, detach, 50% + checkpointing, the model's own parts": (
        LemoConfig(mode="detach", fused_kernels=False),
        True,
    ),
    "LeMo, detach, 50%": (LemoConfig(mode="detach"), False),
    "LeMo, eliminate, 50% + checkpointing": (LemoConfig(mode="eliminate", keep_ratio=0.5), True),
    "LeMo, segments of 2,048": (LemoConfig(mode="segments", segment_tokens=2048), False),
}


def make_model(sizes: dict[str, Any], seq_len: int, device: str) -> Any:
    torch.manual_seed(0)
    config = LlamaConfig(**sizes, max_position_embeddings=seq_len, rope_parameters={"rope_theta": 5e5})
    with torch.device(device):
        model = LlamaForCausalLM._from_config(config, dtype=torch.bfloat16, attn_implementation="sdpa")
    return get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", r=8, target_modules="all-linear")).train()


@contextlib.contextmanager
def prepared(name: str, model: Any) -> Any:
    """`model` as the contender trains it, and as it was afterwards."""
    lemo, checkpointing = CONTENDERS[name]
    if checkpointing:
        enable = (
            getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
        )
        enable({"use_reentrant": False})
    if lemo is not None:
        apply_lemo(model, lemo)
    try:
        yield
    finally:
        remove_lemo(model)
        if checkpointing:
            getattr(model, "activation_checkpointing_disable", model.gradient_checkpointing_disable)()


def step(model: Any, tokens: torch.Tensor) -> float:
    """The loss; adapter gradients are made and dropped."""
    loss = model(input_ids=tokens, labels=tokens, use_cache=False).loss
    loss.backward()
    model.zero_grad()
    return loss.item()


def seconds(run: Callable[[], Any], device: str) -> float:
    if device == "cuda":
        torch.cuda.synchronize()
    start = time.perf_counter()
    run()
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


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


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seq-lens", nargs="*", type=int, help="tokens of a sample")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--tiny", action="store_true", help="a model of four narrow layers, on any device")
    options = parser.parse_args()
    transformers.logging.set_verbosity_error()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cpu" and not options.tiny:
        raise SystemExit("lemo_gpu: no GPU: torch sees no CUDA device; --tiny tries the script without one.")
    sizes = TINY if options.tiny else SIZES
    seq_lens = options.seq_lens or ([256] if options.tiny else [8192, 16384, 32768])

    model = make_model(sizes, max(seq_lens), device)
    models = dict.fromkeys(CONTENDERS, model)
    if importlib.util.find_spec("liger_kernel") is None or device == "cpu":
        print(f"lemo_gpu: no row {LIGER!r}: liger_kernel is not installed here, or has no GPU.")
        del models[LIGER]
    else:
        from liger_kernel.transformers import _apply_liger_kernel_to_instance

        models[LIGER] = make_model(sizes, max(seq_lens), device)
        _apply_liger_kernel_to_instance(model=models[LIGER].get_base_model())

    for seq_len in seq_lens:
        table = common.Table(
            "lemo_gpu_tiny" if options.tiny else "lemo_gpu",
            f"LeMo: a step of a randomly initialised Llama ({model.num_parameters() / 1e6:.0f}M), {seq_len} "
            "tokens",
            f"bfloat16, {seq_len} tokens, batch 1, LoRA r 8 on all linear layers, {device}, no optimizer, "
            f"median of {options.repeats}; peak is beyond weights",
        )
        tokens = torch.randint(sizes["vocab_size"], (1, seq_len), device=device)
        taken: dict[str, list[float]] = {name: [] for name in models}
        losses = {}
        for turn in range(options.repeats + 1):
            for name, trained in models.items():
                with prepared(name, trained):
                    run = functools.partial(step, trained, tokens)
                    if turn == 0:  # a warm-up, too
                        losses[name] = run()
                        table.add(name, peak_MB=peak_MB(run, device))
                    else:
                        taken[name].append(seconds(run, device))
        for name, each in taken.items():
            exact = "eliminate" not in name
            if exact and abs(losses[name] - losses[BASELINE]) > 0.02 * losses[BASELINE]:
                raise RuntimeError(f"{name} must give the loss {losses[BASELINE]}, got {losses[name]}.")
            median = statistics.median(each)
            table.add(name, s_a_step=median, times_faster=statistics.median(taken[BASELINE]) / median)
        table.finish()


if __name__ == "__main__":
    main()
