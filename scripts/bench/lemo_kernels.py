"""LeMo's parts alone: the branch without permutations, attention of chosen queries, head and loss.

    python scripts/bench/lemo_kernels.py [--tokens 2048 8192] [--widths 576 2048] [--repeats 7]
    python scripts/bench/lemo_kernels.py --tables loss --tokens 2048 --repeats 5

All contenders give equal results first. On CUDA LeMo's rows are Triton's.

- branches: a chain of eight residual branches, forward and backward, on half of the rows in blocks of 64. A
  branch is its norm and a factor: attention and MLP are left out, so that what is measured is what surrounds
  them.
- attention: of half of the tokens over all.
- loss: SmolLM2's head (49,152 x 576, frozen) and loss, forward and backward, on the CPU, beside torch's
  linear_cross_entropy and all logits at once. MB are what a process of its own needs beyond its tensors.
"""

import itertools
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import common
import psutil
import torch
from common import option
from harness import Race, close, in_own_process
from torch import Tensor, nn
from torch.nn import functional
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from lemo_trainer.head.loss import segmented_cross_entropy
from lemo_trainer.kernels.attention import attend, reference
from lemo_trainer.kernels.dispatch import runs_triton
from lemo_trainer.kernels.norm import norm_rows
from lemo_trainer.kernels.rows import gather
from lemo_trainer.layers.stream import Streams
from lemo_trainer.measure import ActivationBytes, peak_rss_bytes

BRANCHES, BLOCK, EPS = 8, 64, 1e-5
HEADS, GROUPS, HEAD, WIDTH, VOCABULARY = 9, 3, 64, 576, 49152  # SmolLM2's
SEGMENT = 256  # tokens of the loss, or queries, at a time
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
Norm = Callable[..., Tensor]


def padded(x: Tensor, rows: Tensor, update: Tensor) -> Tensor:
    zeros = x.new_zeros(x[..., 0].numel(), x.shape[2])
    return x + zeros.index_copy_(0, rows, update.flatten(0, 1)).view_as(x)


def added(x: Tensor, rows: Tensor, update: Tensor) -> Tensor:
    return x.flatten(0, 1).index_add(0, rows, update.flatten(0, 1)).view_as(x)


def out_of_place(norm: Norm, add: Callable[..., Tensor], x: Tensor, rows: list[Tensor]) -> Tensor:
    for each in rows:
        x = add(x, each, 0.5 * norm(x, each))
    return x


def in_place(norm: Norm, x: Tensor, rows: list[Tensor]) -> Tensor:
    streams, layer = Streams(), nn.Identity()
    for pair in zip(rows[::2], rows[1::2], strict=True):
        stream = streams.enter(layer, x)
        for each in pair:
            stream.add(0.5 * norm(stream.take(each)), each)
        x = streams.leave(layer, stream)
    return x


def contenders_of(norm: LlamaRMSNorm) -> dict[str, Callable[[Tensor, list[Tensor]], Tensor]]:
    fused = partial(norm_rows, weight_D=norm.weight, eps=EPS)
    own = {"gather, run, pad, add": padded, "gather, run, index_add": added}
    return {
        **{
            name: partial(out_of_place, lambda x, rows: norm(gather(x, rows)), add)
            for name, add in own.items()
        },
        "rows normed from a kept stream, index_add": partial(out_of_place, fused, added),
        "added in place, the model's norm": partial(in_place, norm),
        "LeMo: added in place, LeMo's norm": partial(in_place, lambda x: fused(x, None)),
    }


class WrittenBytes(TorchDispatchMode):
    """Bytes that operations write: their outputs, and of indexed additions in place the rows alone."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if func is torch.ops.aten.index_add_.default:
            self.bytes += args[3].nbytes
        elif not func.is_view and "empty" not in str(func):
            self.bytes += sum(each.nbytes for each in tree_leaves(out) if isinstance(each, Tensor))
        return out


def allocated(step: Callable[[], Any], full: int) -> tuple[float, float]:
    """Bytes that a step allocates, and how many allocations are of a stream's size."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        step()
    sizes = [event.self_cpu_memory_usage for event in profiler.events() if event.self_cpu_memory_usage > 0]
    return float(sum(sizes)), float(sum(size // full for size in sizes))


def blocks_of(tokens: int) -> Tensor:
    """Half of the rows of so many tokens, in blocks at random, ascending: [tokens / 2]."""
    blocks = torch.randperm(tokens // BLOCK)[: tokens // BLOCK // 2].sort().values
    return (blocks[:, None] * BLOCK + torch.arange(BLOCK)).flatten().to(DEVICE)


def bytes_of(step: Callable[[], Any], stream: int) -> dict[str, float]:
    """MB of a step, and its allocations of a stream's bytes, for each of its branches."""
    with ActivationBytes() as activations:
        step()
    with WrittenBytes() as written:
        step()
    row: dict[str, float] = {"saved_MB": activations.saved_bytes}
    if DEVICE == "cuda":  # Triton's kernels write where no mode sees it
        before = torch.cuda.memory_stats()["allocated_bytes.all.allocated"]
        step()
        row["allocated_MB"] = torch.cuda.memory_stats()["allocated_bytes.all.allocated"] - before
    else:
        row["allocated_MB"], full = allocated(step, stream)
        row = {"full_size_allocations": full * 1e6, **row, "written_MB": written.bytes}
    return {metric: value / BRANCHES / 1e6 for metric, value in row.items()}


def branches(tokens: int, dtype: torch.dtype, width: int, repeats: int) -> None:
    table = common.Table(
        "lemo_kernels",
        f"A residual branch's surroundings, {tokens} tokens x {width}, {str(dtype).removeprefix('torch.')}",
        f"per branch of {BRANCHES}, forward and backward, {tokens} tokens x {width}, {dtype}, half of the "
        f"rows in blocks of {BLOCK}, {DEVICE}, {torch.get_num_threads()} threads, median of {repeats}",
    )
    torch.manual_seed(0)
    norm = LlamaRMSNorm(width, EPS).to(DEVICE, dtype).requires_grad_(False)
    x = torch.randn(1, tokens, width, device=DEVICE, dtype=dtype, requires_grad=True)
    grad = torch.randn_like(x)
    rows = [blocks_of(tokens) for _ in range(BRANCHES)]

    def step(run: Callable[..., Tensor]) -> tuple[Tensor, Tensor]:
        y = run(x, rows)
        return y.detach(), torch.autograd.grad(y, x, grad)[0]

    tolerance = 1e-4 if dtype == torch.float32 else 5e-2
    steps = {name: partial(step, run) for name, run in contenders_of(norm).items()}
    race = Race(steps, equal=close(rtol=tolerance, atol=tolerance))
    race.check()
    for name, run in steps.items():
        table.add(name, **bytes_of(run, x.nbytes))
    if repeats:
        for name, times in race.run(repeats).items():
            table.add(name, **times.columns("ms", median="ms", parts=BRANCHES))
    table.finish()


def pieces(query: Tensor, key: Tensor, value: Tensor, index: Tensor) -> Tensor:
    """What LeMo does where no kernel runs."""
    heads = []
    for q, at in zip(query.split(SEGMENT, 2), index.split(SEGMENT, 1), strict=True):
        keys = int(at[:, -1].max()) + 1
        mask = torch.arange(keys, device=at.device) <= at[:, None, :, None]
        kv = key[:, :, :keys], value[:, :, :keys]
        heads.append(functional.scaled_dot_product_attention(q, *kv, mask, scale=0.1, enable_gqa=True))
    return torch.cat(heads, 2).transpose(1, 2)


def attention(tokens: int, dtype: torch.dtype, repeats: int) -> None:
    table = common.Table(
        "lemo_attention",
        f"Attention of half of {tokens} tokens over all",
        f"forward and backward, {tokens} tokens, {HEADS} heads over {GROUPS} of {HEAD}, {dtype}, queries in "
        f"blocks of {BLOCK}, {DEVICE}, {torch.get_num_threads()} threads, median of {repeats}",
    )
    torch.manual_seed(0)
    index = blocks_of(tokens)[None]
    random = partial(torch.randn, device=DEVICE, dtype=dtype)
    shapes = ((HEADS, index.shape[1]), (GROUPS, tokens), (GROUPS, tokens))
    qkv = [random(1, *shape, HEAD, requires_grad=True) for shape in shapes]
    grad = random(1, index.shape[1], HEADS, HEAD)
    contenders = {
        "masked SDPA": lambda: reference(*qkv, index, 0.1),
        "masked SDPA, 256 queries at a time": lambda: pieces(*qkv, index),
    }
    if runs_triton(qkv[0]):
        contenders["LeMo: Triton, by positions"] = lambda: attend(*qkv, index, scaling=0.1)

    def step(run: Callable[[], Tensor]) -> Tensor:
        out = run()
        torch.autograd.grad(out, qkv, grad)
        return out.detach()

    steps = {name: partial(step, run) for name, run in contenders.items()}
    for name, times in Race(steps, equal=close(rtol=2e-2, atol=2e-2)).run(repeats).items():
        table.add(name, **times.columns("ms", median="ms"))
    table.finish()


def all_logits(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    return functional.cross_entropy((hidden @ weight.T).float(), labels)


def torch_chunked(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    options = nn.LinearCrossEntropyOptions(batch_chunk_size=SEGMENT)
    return functional.linear_cross_entropy(hidden, weight, labels, options=options)


LOSSES: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {
    "all logits": all_logits,
    "LeMo, segments of 256": partial(segmented_cross_entropy, segment=SEGMENT),
}
if hasattr(functional, "linear_cross_entropy"):  # torch >= 2.13
    LOSSES["F.linear_cross_entropy, chunks of 256"] = torch_chunked


def labelled(tokens: int, ignored: float, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """Hidden states [tokens, width], the head's weight, and labels of which a share is ignored."""
    torch.manual_seed(0)
    hidden = torch.randn(tokens, WIDTH).to(dtype).requires_grad_()
    labels = torch.randint(0, VOCABULARY, (tokens,))
    labels[torch.rand(tokens) < ignored] = -100
    return hidden, torch.randn(VOCABULARY, WIDTH).mul_(0.04).to(dtype), labels


def loss_step(name: str, tensors: tuple[Tensor, Tensor, Tensor]) -> tuple[float, Tensor]:
    loss = LOSSES[name](*tensors)
    return loss.item(), torch.autograd.grad(loss, tensors[0])[0]


def equal_losses(got: tuple[float, Tensor], want: tuple[float, Tensor]) -> None:
    close(rtol=1e-2, atol=0)(got[0], want[0])
    close(rtol=2e-2, atol=1e-4)(got[1], want[1])


def loss_memory(name: str, tokens: int, dtype: torch.dtype) -> float:
    """MB that one step adds to this process."""
    tensors = labelled(tokens, 0.0, dtype)
    if (refs := Path("/proc/self/clear_refs")).exists():
        refs.write_text("5")  # the peak starts anew, without what making the tensors took
    before = psutil.Process().memory_info().rss
    loss_step(name, tensors)
    return (peak_rss_bytes() - before) / 1e6


def losses(tokens: int, dtype: torch.dtype, repeats: int) -> None:
    table = common.Table(
        "lemo_loss",
        f"Language-model head and loss, {dtype}",
        f"{tokens} tokens x {WIDTH}, vocabulary {VOCABULARY}, head frozen, "
        f"{torch.get_num_threads()} threads, median of {repeats}",
    )
    kind = str(dtype).removeprefix("torch.")
    for ignored in (0.0, 0.5):
        tensors = labelled(tokens, ignored, dtype)
        race = Race({name: partial(loss_step, name, tensors) for name in LOSSES}, equal=equal_losses)
        for name, times in race.run(repeats).items():
            table.add(name, **{f"s_{kind}_{ignored:.0%}_unlabelled": times.median})
    for name in LOSSES:
        table.add(name, **{f"MB_{kind}": in_own_process(loss_memory, name, tokens, dtype)})
    table.finish()


def main() -> None:
    options = common.parse(
        __doc__,
        tables=option(["branches", "attention"], choices=("branches", "attention", "loss")),
        tokens=[2048, 8192],
        widths=option([576, 2048], "of branches"),
        dtypes=option(["float32", "bfloat16"], choices=("float32", "bfloat16")),
        repeats=option(7, "0 counts the bytes of branches only"),
    )
    for dtype, tokens in itertools.product(options.dtypes, options.tokens):
        size = tokens, getattr(torch, dtype)
        if "branches" in options.tables:
            for width in options.widths:
                branches(*size, width, options.repeats)
        if "attention" in options.tables and options.repeats:
            attention(*size, options.repeats if DEVICE == "cuda" else 1)
        if "loss" in options.tables:
            losses(*size, options.repeats)


if __name__ == "__main__":
    main()
