"""The head and the loss alone: LeMo's segment-wise loss, torch's linear_cross_entropy, all logits at once.

    python scripts/bench/lemo_loss.py [--tokens 2048] [--repeats 5]

SmolLM2's head (49,152 x 576, frozen), forward and backward. Seconds are medians of interleaved runs in one
process; the memory column is what a process of its own needs beyond its tensors.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import common
import psutil
import torch
from torch import Tensor
from torch.nn import functional

from lemo_trainer.head.loss import segmented_cross_entropy
from lemo_trainer.measure import peak_rss_bytes

WIDTH, VOCABULARY, SEGMENT = 576, 49152, 256


def all_logits(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    return functional.cross_entropy((hidden @ weight.T).float(), labels)


def segmented(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    return segmented_cross_entropy(hidden, weight, labels, segment=SEGMENT)


def torch_chunked(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    options = torch.nn.LinearCrossEntropyOptions(batch_chunk_size=SEGMENT)
    return functional.linear_cross_entropy(hidden, weight, labels, options=options)


CONTENDERS: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {
    "all logits": all_logits,
    "LeMo, segments of 256": segmented,
}
if hasattr(functional, "linear_cross_entropy"):  # torch >= 2.13
    CONTENDERS["F.linear_cross_entropy, chunks of 256"] = torch_chunked


def problem(tokens: int, ignored: float, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    torch.manual_seed(0)
    hidden = torch.randn(tokens, WIDTH).to(dtype).requires_grad_()
    labels = torch.randint(0, VOCABULARY, (tokens,))
    labels[torch.rand(tokens) < ignored] = -100
    return hidden, torch.randn(VOCABULARY, WIDTH).mul_(0.04).to(dtype), labels


def step(name: str, tensors: tuple[Tensor, Tensor, Tensor]) -> tuple[float, Tensor]:
    hidden = tensors[0]
    hidden.grad = None
    loss = CONTENDERS[name](*tensors)
    loss.backward()
    assert hidden.grad is not None
    return loss.item(), hidden.grad


def memory(name: str, tokens: int, dtype: str) -> float:
    """MB that one step adds to a process of its own."""
    command = [sys.executable, __file__, "--tokens", str(tokens), "--alone", name, "--dtype", dtype]
    return float(json.loads(subprocess.run(command, stdout=subprocess.PIPE, check=True).stdout))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--alone", help=argparse.SUPPRESS)
    parser.add_argument("--dtype", default="float32", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.alone:
        tensors = problem(options.tokens, 0.0, getattr(torch, options.dtype))
        if (refs := Path("/proc/self/clear_refs")).exists():
            refs.write_text("5")  # the peak starts anew, without what making the tensors took
        before = psutil.Process().memory_info().rss
        step(options.alone, tensors)
        print((peak_rss_bytes() - before) / 1e6)
        return

    table = common.Table(
        "lemo_loss",
        "Language-model head and loss, forward and backward",
        f"{options.tokens} tokens x {WIDTH}, vocabulary {VOCABULARY}, head frozen, "
        f"{torch.get_num_threads()} threads, median of {options.repeats}",
    )
    for dtype in ("float32", "bfloat16"):
        for ignored in (0.0, 0.5):
            tensors = problem(options.tokens, ignored, getattr(torch, dtype))
            results = {name: step(name, tensors) for name in CONTENDERS}
            wanted = results["all logits"]
            for name, (loss, gradient) in results.items():
                if abs(loss - wanted[0]) > 1e-2 * wanted[0]:
                    raise RuntimeError(f"{name} must give the loss {wanted[0]}, got {loss}.")
                torch.testing.assert_close(gradient, wanted[1], rtol=2e-2, atol=1e-4)
            seconds: dict[str, list[float]] = {name: [] for name in CONTENDERS}
            for _ in range(options.repeats):
                for name in CONTENDERS:
                    start = time.perf_counter()
                    step(name, tensors)
                    seconds[name].append(time.perf_counter() - start)
            for name in CONTENDERS:
                column = f"s_{dtype}_{ignored:.0%}_unlabelled"
                table.add(name, **{column: statistics.median(seconds[name])})
        for name in CONTENDERS:
            table.add(name, **{f"MB_{dtype}": memory(name, options.tokens, dtype)})
    table.finish()


if __name__ == "__main__":
    main()
