"""Ripple's main table: SmolLM2 with all, half and a quarter of its neurons, against memory and accelerate.

    python scripts/bench/ripple_main.py [--rounds 3] [--dram-budget 96MiB] [--threads 1] [--placements ...]

Ripple's rows read with O_DIRECT, so the drive is measured; what it can do is probed first, as `ripple probe`
does, and in each round. "LLM in a Flash" is that paper's strategy in this engine: bundles in the model's
order, an LRU cache, no gaps read, nothing read ahead. "selected" always selects neurons; without it Ripple
may read all of them where that is cheaper by its model of the drive, and is then exact. accelerate reads
safetensors through the page cache: one row has the file cached, as after any first pass, the other drops it
before every token. MB/s are of what the process read from the drive (/proc/self/io). Perplexity selects
neurons token by token, as decoding does; it does not depend on the order.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import math
import os
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from common import ROOT, Table  # also makes `assets` importable

from ripple_loader import ReorderConfig, RippleConfig, RippleReport, reorder
from ripple_loader.checkpoint.source import open_source
from ripple_loader.format.layout import SIDECAR
from ripple_loader.format.sidecar import Sidecar
from ripple_loader.offline.calibration import cut_sequences
from ripple_loader.offline.trace import trace_source
from ripple_loader.storage.blocks import AlignedBuffer
from ripple_loader.storage.collapse import ReadPlan
from ripple_loader.storage.probing import probe
from ripple_loader.storage.reader import Reader

PLACEMENTS = ("identity", "random", "frequency", "linked")
KEEPS = (0.5, 0.25)  # and 1.0, where the order does not matter
IN_FLIGHT = 32
PROMPT_TOKENS, STEP_TOKENS = 32, 3
HELD_OUT = (2, 512)  # sequences, tokens


def bytes_from_drives() -> int:
    """What this process has read that was not in the page cache."""
    lines = Path("/proc/self/io").read_text().splitlines()
    return int(dict(line.split(": ") for line in lines)["read_bytes"])


class Drive:
    """Measures the drive that a file lies on, with as many reads in flight as Ripple has."""

    def __init__(self, path: Path) -> None:
        self.reader = Reader(path, IN_FLIGHT, RippleReport(directory="", layers=1, neurons=1, budget=0))
        self.blocks, self.random = path.stat().st_size // 4096, np.random.default_rng(0)
        self.buffer = AlignedBuffer(64 << 20)
        self.bandwidth = self.iops = 0.0
        self.buffer.bytes.zero_()  # pages are there before anything is timed

    def probe(self) -> None:
        """The best so far: bytes/s of one long read, and reads of 4 KiB a second."""
        length = len(self.buffer.bytes)
        self.bandwidth = max(self.bandwidth, length / self._seconds(np.array([0]), length))
        places = np.sort(self.random.choice(self.blocks, 4000, replace=False)) * 4096
        self.iops = max(self.iops, len(places) / self._seconds(places, 4096))

    def _seconds(self, offsets: Any, length: int) -> float:
        lengths, targets = np.full(len(offsets), length), np.arange(len(offsets)) * length
        plan = ReadPlan(offsets, offsets, lengths, targets, targets)
        start = time.perf_counter()
        for read in self.reader.submit(plan, self.buffer):
            read.result()
        return time.perf_counter() - start


class Decoder:
    """A model that decodes greedily, a few tokens at a time."""

    def __init__(
        self, model: Any, prompt: torch.Tensor, before_token: Callable[[], None] | None = None
    ) -> None:
        self.model, self.before_token = model, before_token
        self.seconds: list[float] = []
        self.bytes_read = 0
        output = model(prompt, use_cache=True)
        self.cache, self.logits, self.tokens = output.past_key_values, output.logits, []

    def step(self, *, timed: bool) -> None:
        for _ in range(STEP_TOKENS):
            token = self.logits[:, -1:].argmax(-1)
            if self.before_token:
                self.before_token()
            before, start = bytes_from_drives(), time.perf_counter()
            output = self.model(token, past_key_values=self.cache, use_cache=True)
            if timed:
                self.seconds.append(time.perf_counter() - start)
                self.bytes_read += bytes_from_drives() - before
            self.cache, self.logits = output.past_key_values, output.logits
            self.tokens.append(int(token))


def perplexity(model: Any, ids: torch.Tensor) -> float:
    losses = [model(row[None], labels=row[None]).loss.item() for row in ids]
    return math.exp(statistics.mean(losses))


def held_in_memory(model: Any) -> float:
    """MiB of parameters, each counted once, and of what Ripple holds."""
    own = {p.data_ptr(): p.nbytes for p in model.parameters() if p.device.type != "meta"}
    report = getattr(model, "ripple_report", None)
    return (sum(own.values()) + (report.resident_bytes if report else 0)) / 2**20


def selects(model: Any) -> bool:
    """Whether it computes with some of its neurons only."""
    return bool(getattr(model, "ripple_report", None)) and model.model.layers[0].mlp.backend.selects


def accelerate_offload(directory: Path, scratch: Path) -> Any:
    """The model with its MLPs offloaded to disk by accelerate."""
    from transformers import AutoConfig, AutoModelForCausalLM

    with torch.device("meta"):
        skeleton = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(directory))
    places: dict[str, str] = {}
    for name, _ in skeleton.named_modules():
        if name.endswith(".mlp"):
            places[name] = "disk"
        elif name.endswith(("self_attn", "layernorm", "embed_tokens", "model.norm", "rotary_emb", "lm_head")):
            places[name] = "cpu"
    return AutoModelForCausalLM.from_pretrained(directory, device_map=places, offload_folder=scratch)


def drop_from_page_cache(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
    os.close(descriptor)


@torch.no_grad()
def main(rounds: int, dram_budget: str, placements: list[str], kept: Path | None) -> None:
    import assets
    from transformers import AutoModelForCausalLM, AutoTokenizer

    base = assets.model_dir()
    tokenizer = AutoTokenizer.from_pretrained(base)
    count, length = HELD_OUT
    held_out = torch.cat([tokenizer(t, return_tensors="pt").input_ids[0] for t in assets.texts("held_out")])
    ids = held_out[: count * length].view(count, length)
    prompt = ids[:1, :PROMPT_TOKENS]

    source, config = open_source(base), ReorderConfig(tokens=1024)
    (ROOT / "out").mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory(dir=ROOT / "out") as scratch:
        folder = kept or Path(scratch)
        trace = folder / "trace"
        copies = {placement: folder / placement for placement in placements}
        for placement, copy in copies.items():
            if not copy.exists():
                trace_source(source, cut_sequences(source, assets.texts("train"), config), config, trace)
                reorder(base, copy, config=dataclasses.replace(config, placement=placement), trace=trace)
        runs = {name: Sidecar(copy).header.profile["reads"] for name, copy in copies.items()}

        os.environ["XDG_CACHE_HOME"] = scratch  # the probe is this run's
        probe(copies[placements[0]]).save()
        dense = AutoModelForCausalLM.from_pretrained(base)
        reference = dense(prompt).logits
        decoders = {"in memory, transformers": Decoder(dense, prompt)}
        perplexities = {1.0: perplexity(dense, ids)}
        config_of = functools.partial(RippleConfig, dram_budget=dram_budget, queue_depth=IN_FLIGHT)
        streamed = {"Ripple, 100%, linked": ("linked", config_of())}
        for keep in KEEPS:
            selected = config_of(keep=keep, strategy="sparse")
            flash = dataclasses.replace(selected, cache_policy="lru", merge_gap=0, prefetch=False)
            streamed[f"LLM in a Flash, {keep:.0%}, identity"] = ("identity", flash)
            for placement in placements:
                streamed[f"Ripple, {keep:.0%} selected, {placement}"] = (placement, selected)
            streamed[f"Ripple, {keep:.0%}, linked"] = ("linked", config_of(keep=keep))
        for name, (placement, options) in streamed.items():
            model = AutoModelForCausalLM.from_pretrained(copies[placement], quantization_config=options)
            if not selects(model):
                error = (model(prompt).logits - reference).abs().max() / reference.abs().max()
                assert error < 1e-5, f"{placement} differs from the dense model by {error:.1e}"
            elif options.keep not in perplexities:
                perplexities[options.keep] = perplexity(model, ids)
            decoders[name] = Decoder(model, prompt)
        # A file of its own: pages that another model has mapped would not leave the cache.
        own = Path(shutil.copytree(base, Path(scratch) / "accelerate"))
        for kind, directory, hook in (
            ("page cache", base, None),
            ("from disk", own, lambda: drop_from_page_cache(own / "model.safetensors")),
        ):
            model = accelerate_offload(directory, Path(scratch) / "offload")
            decoders[f"accelerate, {kind}"] = Decoder(model, prompt, hook)

        for decoder in decoders.values():
            decoder.step(timed=False)
            if report := getattr(decoder.model, "ripple_report", None):
                report.reset()
        drive = Drive(copies["linked"] / SIDECAR)
        for _ in range(rounds):
            drive.probe()
            for decoder in decoders.values():
                decoder.step(timed=True)

        exact = [decoder.tokens for decoder in decoders.values() if not selects(decoder.model)]
        assert all(tokens == exact[0] for tokens in exact), "exact contenders generate different text"
        conditions = (
            f"float32, {source.layers} MLPs of {source.neurons} neurons",
            f"DRAM budget {dram_budget}",
            f"batch 1, {rounds} x {STEP_TOKENS} tokens after {PROMPT_TOKENS}",
            f"{torch.get_num_threads()} threads",
            f"perplexity on {count} x {length} held-out tokens",
            "runs: of half of the neurons, without cache or merging",
            "reads and KiB: per token and layer",
            f"drive, best of {rounds} probes, {IN_FLIGHT} reads in flight: "
            f"{drive.bandwidth / 1e6:,.0f} MB/s, {drive.iops:,.0f} reads of 4 KiB a second",
        )
        title = "Ripple: SmolLM2-135M-Instruct with its MLPs on disk"
        table = Table(name="ripple_main", title=title, config="; ".join(conditions))
        for name, decoder in decoders.items():
            row: dict[str, float | str] = {
                "runs": runs.get(name.split(", ")[-1], ""),
                "resident_MB": held_in_memory(decoder.model),
                "tokens_per_s": 1 / statistics.median(decoder.seconds),
                "slowest": 1 / max(decoder.seconds),
                "MB_per_s": decoder.bytes_read / sum(decoder.seconds) / 1e6,
            }
            keep = 1.0
            if report := getattr(decoder.model, "ripple_report", None):
                keep = decoder.model.hf_quantizer.quantization_config.keep if selects(decoder.model) else 1.0
                calls = report.tokens * report.layers
                row["reads"] = report.requests / calls
                row["KiB"] = report.bytes_read / calls / 2**10
                row["hits"] = f"{report.hits / report.active:.0%}"
                row["recall"] = f"{report.recall:.0%}" if report.asked else ""
            table.add(name, **row, perplexity=perplexities[keep])
        table.finish()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--dram-budget", default="96MiB")
    parser.add_argument("--placements", nargs="+", choices=PLACEMENTS, default=list(PLACEMENTS))
    parser.add_argument("--copies", type=Path, default=None, help="keep the reordered models there")
    parser.add_argument("--threads", type=int, default=1, help="of torch; the reads need a core as well")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    main(arguments.rounds, arguments.dram_budget, arguments.placements, arguments.copies)
