"""The head and the loss alone: LeMo's segment-wise loss, torch's linear_cross_entropy, all logits at once.

    python scripts/bench/lemo_loss.py [--tokens 2048] [--repeats 5]

SmolLM2's head (49,152 x 576, frozen), forward and backward. Seconds are medians of interleaved runs in one
process; the memory column is what a process of its own needs beyond its tensors.
"""

from collections.abc import Callable
from functools import partial
from pathlib import Path

import common
import psutil
import torch
from harness import Race, close, in_own_process
from torch import Tensor
from torch.nn import functional

from lemo_trainer.head.loss import segmented_cross_entropy
from lemo_trainer.measure import peak_rss_bytes

WIDTH, VOCABULARY, SEGMENT = 576, 49152, 256


def all_logits(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    return functional.cross_entropy((hidden @ weight.T).float(), labels)


def torch_chunked(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    options = torch.nn.LinearCrossEntropyOptions(batch_chunk_size=SEGMENT)
    return functional.linear_cross_entropy(hidden, weight, labels, options=options)


CONTENDERS: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {
    "all logits": all_logits,
    "LeMo, segments of 256": partial(segmented_cross_entropy, segment=SEGMENT),
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


def equal(got: tuple[float, Tensor], want: tuple[float, Tensor]) -> None:
    close(rtol=1e-2, atol=0)(got[0], want[0])
    close(rtol=2e-2, atol=1e-4)(got[1], want[1])


def memory(name: str, tokens: int, dtype: str) -> float:
    """MB that one step adds to this process."""
    tensors = problem(tokens, 0.0, getattr(torch, dtype))
    if (refs := Path("/proc/self/clear_refs")).exists():
        refs.write_text("5")  # the peak starts anew, without what making the tensors took
    before = psutil.Process().memory_info().rss
    step(name, tensors)
    return (peak_rss_bytes() - before) / 1e6


def main() -> None:
    options = common.parse(__doc__, tokens=2048, repeats=5)
    table = common.Table(
        "lemo_loss",
        "Language-model head and loss, forward and backward",
        f"{options.tokens} tokens x {WIDTH}, vocabulary {VOCABULARY}, head frozen, "
        f"{torch.get_num_threads()} threads, median of {options.repeats}",
    )
    for dtype in ("float32", "bfloat16"):
        for ignored in (0.0, 0.5):
            tensors = problem(options.tokens, ignored, getattr(torch, dtype))
            race = Race({name: partial(step, name, tensors) for name in CONTENDERS}, equal=equal)
            for name, times in race.run(options.repeats).items():
                table.add(name, **{f"s_{dtype}_{ignored:.0%}_unlabelled": times.median})
        for name in CONTENDERS:
            table.add(name, **{f"MB_{dtype}": in_own_process(memory, name, options.tokens, dtype)})
    table.finish()


if __name__ == "__main__":
    main()
