"""LeMo's permutation-free branch against gather, run, pad and add; attention of chosen queries.

    python scripts/bench/lemo_kernels.py [--tokens 2048 8192] [--widths 576 2048] [--repeats 7]

A chain of eight residual branches, forward and backward, on half of the rows in blocks of 64. A branch is its
norm and a factor: attention and MLP are left out, so that what is measured is what surrounds them. On CUDA
LeMo's rows are Triton's. All contenders give equal results first.
"""

from __future__ import annotations

import argparse
import functools
import statistics
import time
from collections.abc import Callable
from typing import Any

import common
import torch
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from lemo_trainer.kernels.attention import attend, reference
from lemo_trainer.kernels.dispatch import runs_triton
from lemo_trainer.kernels.norm import norm_rows
from lemo_trainer.kernels.rows import gather
from lemo_trainer.layers.stream import Stream, Streams
from lemo_trainer.measure import ActivationBytes

BRANCHES, BLOCK, EPS = 8, 64, 1e-5
HEADS, GROUPS, HEAD = 9, 3, 64  # SmolLM2's attention
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
Branches = Callable[[Tensor, list[Tensor], LlamaRMSNorm], Tensor]


def padded(x: Tensor, rows: list[Tensor], norm: LlamaRMSNorm) -> Tensor:
    for each in rows:
        update = 0.5 * norm(gather(x, each))
        zeros = x.new_zeros(x[..., 0].numel(), x.shape[2])
        x = x + zeros.index_copy_(0, each, update.flatten(0, 1)).view_as(x)
    return x


def out_of_place(x: Tensor, rows: list[Tensor], norm: LlamaRMSNorm) -> Tensor:
    for each in rows:
        update = 0.5 * norm(gather(x, each))
        x = x.flatten(0, 1).index_add(0, each, update.flatten(0, 1)).view_as(x)
    return x


def from_a_kept_stream(x: Tensor, rows: list[Tensor], norm: LlamaRMSNorm) -> Tensor:
    for each in rows:
        update = 0.5 * norm_rows(x, each, norm.weight, eps=EPS)
        x = x.flatten(0, 1).index_add(0, each, update.flatten(0, 1)).view_as(x)
    return x


def in_place(
    x: Tensor, rows: list[Tensor], norm: LlamaRMSNorm, apply: Callable[[Tensor], Tensor] | None = None
) -> Tensor:
    streams, layer = Streams(), nn.Identity()
    for first, second in zip(rows[::2], rows[1::2], strict=True):
        stream: Stream = streams.enter(layer, x)
        for each in (first, second):
            stream.add(0.5 * (apply or norm)(stream.take(each)), each)
        x = streams.leave(layer, stream)
    return x


def in_place_fused(x: Tensor, rows: list[Tensor], norm: LlamaRMSNorm) -> Tensor:
    return in_place(x, rows, norm, lambda taken: norm_rows(taken, None, norm.weight, eps=EPS))


CONTENDERS: dict[str, Branches] = {
    "gather, run, pad, add": padded,
    "gather, run, index_add": out_of_place,
    "rows normed from a kept stream, index_add": from_a_kept_stream,
    "added in place, the model's norm": in_place,
    "LeMo: added in place, LeMo's norm": in_place_fused,
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


def seconds(step: Callable[[], Any]) -> float:
    if DEVICE == "cuda":
        torch.cuda.synchronize()
    start = time.perf_counter()
    step()
    if DEVICE == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def medians(steps: dict[str, Callable[[], Any]], repeats: int) -> dict[str, float]:
    taken: dict[str, list[float]] = {name: [] for name in steps}
    for step in steps.values():
        seconds(step)  # warm-up
    for _ in range(repeats):
        for name, step in steps.items():
            taken[name].append(seconds(step))
    return {name: statistics.median(each) for name, each in taken.items()}


def branches(tokens: int, width: int, dtype: torch.dtype, repeats: int) -> None:
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
    rows = []
    for _ in range(BRANCHES):
        blocks = torch.randperm(tokens // BLOCK)[: tokens // BLOCK // 2].sort().values
        rows.append((blocks[:, None] * BLOCK + torch.arange(BLOCK)).flatten().to(DEVICE))

    def step(run: Branches) -> tuple[Tensor, Tensor]:
        y = run(x, rows, norm)
        return y.detach(), torch.autograd.grad(y, x, grad)[0]

    wanted = step(padded)
    tolerance = {"rtol": 1e-4, "atol": 1e-4} if dtype == torch.float32 else {"rtol": 5e-2, "atol": 5e-2}
    for name, run in CONTENDERS.items():
        torch.testing.assert_close(step(run), wanted, **tolerance)
        with ActivationBytes() as activations:
            step(run)
        with WrittenBytes() as written:
            step(run)
        row = {"saved_MB": activations.saved_bytes}
        if DEVICE == "cuda":  # Triton's kernels write where no mode sees it
            before = torch.cuda.memory_stats()["allocated_bytes.all.allocated"]
            step(run)
            row["allocated_MB"] = torch.cuda.memory_stats()["allocated_bytes.all.allocated"] - before
        else:
            row["allocated_MB"], full = allocated(functools.partial(step, run), x.nbytes)
            row["written_MB"] = written.bytes
            table.add(name, full_size_allocations=full / BRANCHES)
        table.add(name, **{metric: value / BRANCHES / 1e6 for metric, value in row.items()})
    steps = {name: functools.partial(step, run) for name, run in CONTENDERS.items()} if repeats else {}
    for name, taken in medians(steps, repeats).items():
        table.add(name, ms=taken / BRANCHES * 1e3)
    table.finish()


def pieces(query: Tensor, key: Tensor, value: Tensor, index: Tensor, size: int = 256) -> Tensor:
    """What `detachment` does where no kernel runs."""
    heads = []
    for q, at in zip(query.split(size, 2), index.split(size, 1), strict=True):
        keys = int(at[:, -1].max()) + 1
        mask = torch.arange(keys, device=at.device) <= at[:, None, :, None]
        heads.append(
            nn.functional.scaled_dot_product_attention(
                q, key[:, :, :keys], value[:, :, :keys], mask, scale=0.1, enable_gqa=True
            )
        )
    return torch.cat(heads, 2).transpose(1, 2)


def attention(tokens: int, dtype: torch.dtype, repeats: int) -> None:
    table = common.Table(
        "lemo_attention",
        f"Attention of half of {tokens} tokens over all",
        f"forward and backward, {tokens} tokens, {HEADS} heads over {GROUPS} of {HEAD}, {dtype}, queries in "
        f"blocks of {BLOCK}, {DEVICE}, {torch.get_num_threads()} threads, median of {repeats}",
    )
    torch.manual_seed(0)
    blocks = torch.randperm(tokens // BLOCK)[: tokens // BLOCK // 2].sort().values
    index = (blocks[:, None] * BLOCK + torch.arange(BLOCK)).view(1, -1).to(DEVICE)
    shapes = ((HEADS, index.shape[1]), (GROUPS, tokens), (GROUPS, tokens))
    qkv = [
        torch.randn(1, n, length, HEAD, device=DEVICE, dtype=dtype, requires_grad=True)
        for n, length in shapes
    ]
    contenders = {
        "masked SDPA": lambda: reference(*qkv, index, 0.1),
        "masked SDPA, 256 queries at a time": lambda: pieces(*qkv, index),
    }
    if runs_triton(qkv[0]):
        contenders["LeMo: Triton, by positions"] = lambda: attend(*qkv, index, scaling=0.1)
    wanted = contenders["masked SDPA"]()
    grad = torch.randn_like(wanted)
    for run in contenders.values():
        torch.testing.assert_close(run(), wanted, rtol=2e-2, atol=2e-2)
    steps = {
        name: lambda run=run: torch.autograd.grad(run(), qkv, grad)  # type: ignore[misc]
        for name, run in contenders.items()
    }
    for name, taken in medians(steps, repeats).items():
        table.add(name, ms=taken * 1e3)
    table.finish()


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--tokens", nargs="*", type=int, default=[2048, 8192])
    parser.add_argument("--widths", nargs="*", type=int, default=[576, 2048])
    parser.add_argument(
        "--dtypes", nargs="*", choices=["float32", "bfloat16"], default=["float32", "bfloat16"]
    )
    parser.add_argument("--repeats", type=int, default=7, help="0 counts bytes only")
    options = parser.parse_args()
    for dtype in (getattr(torch, name) for name in options.dtypes):
        for tokens in options.tokens:
            for width in options.widths:
                branches(tokens, width, dtype, options.repeats)
            if options.repeats:
                attention(tokens, dtype, options.repeats if DEVICE == "cuda" else 1)


if __name__ == "__main__":
    main()
