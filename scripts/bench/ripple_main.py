"""Ripple's main table: SmolLM2 with all, half and a quarter of its neurons, against memory and accelerate.

    python scripts/bench/ripple_main.py [--rounds 3] [--dram-budget 96MiB] [--threads 1] [--placements ...]

Ripple's rows read with O_DIRECT, so the drive is measured; what it can do is probed first, as `ripple probe`
does. "LLM in a Flash" is that paper's strategy in this engine: bundles in the model's
order, an LRU cache, no gaps read, nothing read ahead. "selected" always selects neurons; without it Ripple
may read all of them where that is cheaper by its model of the drive, and is then exact. accelerate reads
safetensors through the page cache: one row has the file cached, as after any first pass, the other drops it
before every token. MB/s are of what the process read from the drive (/proc/self/io). Perplexity selects
neurons token by token, as decoding does; it does not depend on the order.
"""

import contextlib
import functools
import os
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import ripple_parts as parts
import torch
from common import Table, assets, option, parse, scratch
from harness import Contender, Race, close, require_equal
from models import language

from ripple_loader import ReorderConfig, RippleConfig
from ripple_loader.checkpoint.source import open_source
from ripple_loader.storage.probing import probe

PLACEMENTS = ("identity", "random", "frequency", "linked")
KEEPS = (0.5, 0.25)  # and 1.0, where the order does not matter
IN_FLIGHT = 32
PROMPT_TOKENS, STEP_TOKENS = 32, 3
HELD_OUT = (2, 512)  # sequences, tokens


class Counted(parts.Decoder):
    """A decoder whose call gives the token and the bytes that it read from drives."""

    def __call__(self) -> tuple[int, int]:
        before = self.bytes_from_drives()
        return super().__call__(), self.bytes_from_drives() - before

    def bytes_from_drives(self) -> int:
        """What this process has read that was not in the page cache."""
        lines = Path("/proc/self/io").read_text().splitlines()
        return int(dict(line.split(": ") for line in lines)["read_bytes"])

    @property
    def report(self) -> Any:
        return getattr(self.model, "ripple_report", None)

    @property
    def keep(self) -> float:
        """The share of its neurons that it computes with."""
        selects = self.report and self.model.model.layers[0].mlp.backend.selects
        return self.model.hf_quantizer.quantization_config.keep if selects else 1.0


def configs(dram_budget: str, placements: list[str]) -> dict[str, tuple[str, RippleConfig]]:
    """The order and options of each of Ripple's contenders."""
    config = functools.partial(RippleConfig, dram_budget=dram_budget, queue_depth=IN_FLIGHT)
    found = {"Ripple, 100%, linked": ("linked", config())}
    for keep in KEEPS:
        selected = config(keep=keep, strategy="sparse")
        flash = replace(selected, cache_policy="lru", merge_gap=0, prefetch=False)
        found[f"LLM in a Flash, {keep:.0%}, identity"] = ("identity", flash)
        for placement in placements:
            found[f"Ripple, {keep:.0%} selected, {placement}"] = (placement, selected)
        found[f"Ripple, {keep:.0%}, linked"] = ("linked", config(keep=keep))
    return found


def contenders(
    copies: dict[str, Path], base: Path, folder: Path, options: Any, prompt: torch.Tensor
) -> tuple[dict[str, Counted], dict[str, Contender]]:
    """Each contender's decoder after the prompt, and its call."""
    decoders = {"in memory, transformers": Counted(language.load(base), prompt=prompt)}
    for name, (placement, config) in configs(options.dram_budget, options.placements).items():
        model = language.load(copies[placement], quantization_config=config)
        decoders[name] = Counted(model, prompt=prompt)
    # A file of its own: pages that another model has mapped would not leave the cache.
    own = Path(shutil.copytree(base, folder / "accelerate"))
    for kind, directory in (("page cache", base), ("from disk", own)):
        model = parts.offloaded(directory, folder / "offload")
        decoders[f"accelerate, {kind}"] = Counted(model, prompt=prompt)
    calls = {name: Contender(each, exact=each.keep == 1.0) for name, each in decoders.items()}
    uncached = functools.partial(parts.drop_from_page_cache, own / "model.safetensors")
    calls["accelerate, from disk"].setup = lambda: contextlib.nullcontext(uncached())
    return decoders, calls


def row(decoder: Counted, times: Any) -> dict[str, float | str]:
    found: dict[str, float | str] = {
        "resident_MB": language.own_bytes(decoder.model) / 2**20,
        "tokens_per_s": 1 / times.median,
        "slowest": 1 / max(times.wall),
        "MB_per_s": sum(read for _, read in times.results) / sum(times.wall) / 1e6,
    }
    if report := decoder.report:
        counted = parts.counts(report)
        found["resident_MB"] += report.resident_bytes / 2**20
        found |= {"reads": counted["reads"], "KiB": counted["KiB"], "hits": f"{counted['hits']:.0%}"}
        found["recall"] = f"{report.recall:.0%}" if report.asked else ""
    return found


@torch.no_grad()
def main() -> None:
    options = parse(
        __doc__,
        rounds=3,
        dram_budget="96MiB",
        placements=option(list(PLACEMENTS), choices=PLACEMENTS),
        copies=option(Path, "keep the reordered models there"),
        threads=option(1, "of torch; the reads need a core as well"),
    )
    base, source = assets.model_dir(), open_source(assets.model_dir())
    ids = language.tokens("held_out", *HELD_OUT)
    prompt = ids[:1, :PROMPT_TOKENS]
    with scratch() as folder:
        kept = options.copies or folder
        copies = {placement: kept / placement for placement in options.placements}
        orders = {name: ReorderConfig(tokens=1024, placement=name) for name in copies}
        parts.reordered(base, kept, {name: orders[name] for name in orders if not copies[name].exists()})
        os.environ["XDG_CACHE_HOME"] = str(folder)  # the probe is this run's
        profile = probe(copies[options.placements[0]])
        profile.save()
        drive = profile.at(IN_FLIGHT)
        decoders, calls = contenders(copies, base, folder, options, prompt)
        exact = [(name, decoders[name].logits) for name in calls if calls[name].exact]
        largest = exact[0][1].abs().max().item()
        require_equal(exact, close(rtol=0, atol=1e-5 * largest))
        judged = {each.keep: each.model for each in reversed(decoders.values())}  # the first of each
        perplexities = {keep: language.perplexity(model, ids) for keep, model in judged.items()}
        race = Race(calls, equal=parts.same_token, keep=True)
        race.check()
        for decoder in decoders.values():
            if decoder.report:
                decoder.report.reset()
        race.run(options.rounds, samples=STEP_TOKENS)
        parts.require_same_text(race)
        conditions = (
            f"float32, {source.layers} MLPs of {source.neurons} neurons",
            f"DRAM budget {options.dram_budget}",
            f"batch 1, {options.rounds} x {STEP_TOKENS} tokens after {PROMPT_TOKENS}",
            f"{torch.get_num_threads()} threads",
            f"perplexity on {HELD_OUT[0]} x {HELD_OUT[1]} held-out tokens",
            "reads and KiB: per token and layer",
            f"drive: {drive.summary()}",
        )
        title = "Ripple: SmolLM2-135M-Instruct with its MLPs on disk"
        table = Table("ripple_main", title, "; ".join(conditions))
        for name, decoder in decoders.items():
            table.add(name, **row(decoder, race.times[name]), perplexity=perplexities[decoder.keep])
        table.finish()


if __name__ == "__main__":
    main()
