"""What Ripple's tables share: copies, streamed and masked models, decoding, reads, the kernel's limits."""

import contextlib
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from common import assets
from harness import Race, require_equal, same
from models import language
from torch import Tensor
from torch.nn import functional as F

from ripple_loader import ReorderConfig, RippleConfig, RippleReport, reorder
from ripple_loader.checkpoint.source import open_source
from ripple_loader.offline.calibration import cut_sequences
from ripple_loader.offline.trace import trace_source
from ripple_loader.storage.blocks import AlignedBuffer
from ripple_loader.storage.collapse import ReadPlan
from ripple_loader.storage.reader import Reader

_CGROUPS = Path("/sys/fs/cgroup")


def trace_of(model: Path, config: ReorderConfig, folder: Path, text: Any = None) -> Any:
    """The trace of a model in `folder`, of the training text unless another is given."""
    source = open_source(model)
    sequences = cut_sequences(source, assets.texts("train") if text is None else text, config)
    return trace_source(source, sequences, config, folder)


def reordered(model: Path, folder: Path, configs: Mapping[str, ReorderConfig]) -> dict[str, Any]:
    """The plans of copies in `folder`, by their names: the model in each order, all from one trace."""
    trace_of(model, next(iter(configs.values())), folder / "trace")
    return {
        name: reorder(model, folder / name, config=config, trace=folder / "trace")
        for name, config in configs.items()
    }


def streamed(copy: Path, **options: Any) -> Any:
    return language.load(copy, quantization_config=RippleConfig(**options))


def counts(report: Any) -> dict[str, float]:
    """Reads, KiB and share of cache hits, for each token and layer."""
    calls = report.tokens * report.layers
    return {
        "reads": report.requests / calls,
        "KiB": report.bytes_read / calls / 2**10,
        "hits": report.hits / report.active,
    }


class Decoder:
    """A model that is given a text token by token; a call reads the next one."""

    def __init__(self, model: Any, text: Iterable[int] = ()) -> None:
        self.model, self.text, self.cache = model, iter(text), None

    def read(self, ids: Tensor) -> Tensor:
        """Logits of the last token of `ids` [1, tokens]."""
        output = self.model(ids, past_key_values=self.cache, use_cache=True)
        self.cache = output.past_key_values
        return output.logits[0, -1]

    def after(self, token: int) -> int:
        """The likeliest token after this one."""
        return int(self.read(torch.tensor([[token]])).argmax())

    def __call__(self) -> int:
        return self.after(next(self.text))


def same_token(got: Any, want: Any) -> None:
    """Of results that begin with a token."""
    same(got[0], want[0])


def require_same_text(race: Race) -> None:
    """The exact contenders of a race whose results begin with tokens gave the same ones all along."""
    exact = [name for name, each in race.contenders.items() if each.exact]
    texts = [(name, [result[0] for result in race.times[name].results]) for name in exact]
    require_equal(texts, same)


Mask = Callable[[Tensor, Tensor], Tensor]
"""From an MLP's input [T, H] and activations [T, N], what the activations are multiplied by."""


class Masked:
    """A model whose MLPs, each given by its first and last module, have masks that can be exchanged."""

    def __init__(self, model: Any, mlps: Iterable[tuple[Any, Any]]) -> None:
        self.model = model
        self.masks: list[Mask] = []
        for number, (first, last) in enumerate(mlps):
            self._hook(number, first, last)

    def _hook(self, number: int, first: Any, last: Any) -> None:
        seen: dict[str, Tensor] = {}

        def masked(_: Any, args: tuple[Tensor]) -> tuple[Tensor]:
            activation_TN = args[0].flatten(0, -2)
            return ((activation_TN * self.masks[number](seen["x"], activation_TN)).view_as(args[0]),)

        first.register_forward_pre_hook(lambda _, args: seen.update(x=args[0].flatten(0, -2)))
        last.register_forward_pre_hook(masked)

    def perplexity(self, masks: Iterable[Mask], ids: Tensor) -> float:
        self.masks = list(masks)
        return language.perplexity(self.model, ids)


def sketched(mlp: Any, bits: int) -> Mask:
    """The size of a gated MLP's activations by copies of its weights in so many bits, one scale a row."""

    def rounded(weight_NH: Tensor) -> Tensor:
        scale_N1 = weight_NH.abs().amax(1, keepdim=True) / (2 ** (bits - 1) - 1)
        return (weight_NH / scale_N1).round() * scale_N1

    gate_NH, up_NH = rounded(mlp.gate_proj.weight), rounded(mlp.up_proj.weight)
    return lambda x_TH, _: (mlp.act_fn(F.linear(x_TH, gate_NH)) * F.linear(x_TH, up_NH)).abs()


class Reads:
    """Reads of a file with O_DIRECT, by Ripple's engine, into a buffer whose pages are there."""

    def __init__(self, file: Path, in_flight: int, buffer: int, engine: Any = "auto") -> None:
        report = RippleReport(directory="", layers=1, neurons=1, budget=0)
        self.reader, self.buffer = Reader(file, in_flight, report, engine), AlignedBuffer(buffer)
        self.buffer.bytes.zero_()

    def __call__(self, offsets: Any, lengths: Any) -> None:
        targets = np.cumsum(lengths) - lengths
        for read in self.reader.submit(ReadPlan(offsets, offsets, lengths, targets, targets), self.buffer):
            read.result()


def drop_from_page_cache(*paths: Path) -> None:
    for path in paths:
        descriptor = os.open(path, os.O_RDONLY)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(descriptor)


def offloaded(directory: Path, folder: Path) -> Any:
    """The model with its MLPs offloaded to disk by accelerate."""
    from transformers import AutoConfig, AutoModelForCausalLM

    with torch.device("meta"):
        skeleton = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(directory))
    parts = ("self_attn", "layernorm", "embed_tokens", "model.norm", "rotary_emb", "lm_head")
    names = [name for name, _ in skeleton.named_modules()]
    devices = {name: "disk" for name in names if name.endswith(".mlp")}
    devices |= {name: "cpu" for name in names if name.endswith(parts)}
    return language.load(directory, device_map=devices, offload_folder=folder)


@contextlib.contextmanager
def _group(controller: str, v1: dict[str, str], v2: dict[str, str]) -> Iterator[None]:
    """This process in a cgroup of its own with these limits, of the version of cgroups that the system has.

    Raises:
        OSError: neither can be written, which takes root.
    """
    old = (_CGROUPS / controller).is_dir()
    base = _CGROUPS / controller if old else _CGROUPS
    lines = [line.split(":", 2) for line in Path("/proc/self/cgroup").read_text().splitlines()]
    own = next(path for _, names, path in lines if names == (controller if old else ""))
    parent = base / own.strip("/")
    group = parent / f"ripple-bench-{os.getpid()}"
    group.mkdir()
    try:
        for name, value in (v1 if old else v2).items():
            (group / name).write_text(value)
        (group / "cgroup.procs").write_text(str(os.getpid()))
        yield
    finally:
        (parent / "cgroup.procs").write_text(str(os.getpid()))
        group.rmdir()


def limited_drive(path: Path, *, iops: int, bandwidth: int) -> contextlib.AbstractContextManager[None]:
    """Hold this process to so many reads and bytes a second from the drive under `path`."""
    number = os.stat(path).st_dev
    device = Path(f"/sys/dev/block/{os.major(number)}:{os.minor(number)}").resolve(strict=True)
    whole = device.parent if (device / "partition").exists() else device  # only whole drives can be limited
    drive = (whole / "dev").read_text().strip()
    limits = {"read_iops": f"{drive} {iops}", "read_bps": f"{drive} {bandwidth}"}
    v1 = {f"blkio.throttle.{name}_device": limit for name, limit in limits.items()}
    return _group("blkio", v1, {"io.max": f"{drive} riops={iops} rbps={bandwidth}"})


def limited_memory(size: int) -> contextlib.AbstractContextManager[None]:
    """Hold this process to so many bytes more than it has, the page cache of what it reads included."""
    return _group("memory", {"memory.limit_in_bytes": str(size)}, {"memory.max": str(size)})
