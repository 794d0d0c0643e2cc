"""Tokens a second of a ReLU model three times as large as memory: Ripple, without its parts, and its peers.

    python scripts/train_relu_lm.py --model relu-lm-wide --steps 400 --batch 4     # once
    pip install -e ".[peers]"                                                      # llama.cpp and airllm
    python scripts/bench/ripple_peers.py [--rounds 5] [--memory 3]

Each contender is a process of its own that loads its libraries and runs a tiny model, and then goes into a
memory cgroup (this takes root): a limit of a third of the model's bytes for everything from there on,
weights, buffers and the page cache. Ripple's budget is what that leaves beside the other weights and 20 MiB.
The contenders are given the same held-out text token by token, in turn, a few tokens each; all but int8
bundles and recall are exact and have to think the same tokens likeliest. No file is in the page cache at the
start.
"""

import contextlib
import importlib
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import ripple_parts as parts
import torch
from common import ROOT, Table, assets, option, parse, scratch
from harness import OwnProcess, Race
from models import language
from other_engines import airllm, llama_cpp, write_gguf
from ripple_memory import CONSTANT, warm_up

from ripple_loader import ReorderConfig
from ripple_loader.format.sidecar import Sidecar
from ripple_loader.storage.probing import probe

WARM_UP, STEP_TOKENS = 32, 8
COPIES = {
    "linked": ReorderConfig(sequence_length=256),
    "unpinned": ReorderConfig(sequence_length=256, hot_share=0.0),
    "identity": ReorderConfig(sequence_length=256, placement="identity"),
    "int8": ReorderConfig(sequence_length=256, bundles="int8"),
}
RIPPLE: dict[str, Any] = {"strategy": "sparse", "buffer": "1MiB"}
FLASH = {**RIPPLE, "cache_policy": "lru", "merge_gap": 0, "prefetch": False}
CONTENDERS: dict[str, tuple[str, dict[str, Any]]] = {
    "Ripple": ("linked", RIPPLE),
    "Ripple, the model's order": ("identity", RIPPLE),
    "Ripple, nothing pinned": ("unpinned", RIPPLE),
    "Ripple, nothing pinned, LRU": ("unpinned", {**RIPPLE, "cache_policy": "lru"}),
    "Ripple, no collapse": ("linked", {**RIPPLE, "merge_gap": 0}),
    "Ripple, nothing read ahead": ("linked", {**RIPPLE, "prefetch": False}),
    "Ripple, int8 bundles": ("int8", RIPPLE),
    "Ripple, recall 99%": ("linked", {**RIPPLE, "recall": 0.99}),
    "Ripple, all neurons read": ("linked", {**RIPPLE, "strategy": "dense", "buffer": "2MiB"}),
    "LLM in a Flash": ("identity", FLASH),
}
PEERS = ["accelerate, disk offload", "llama.cpp, mmap", "airllm"]


def load(name: str, folder: Path, memory: int) -> tuple[Callable[[int], int], Any]:
    """What gives the likeliest token after a token, and the report if it is Ripple."""
    if name == "llama.cpp, mmap":
        return llama_cpp(folder / "model.gguf"), None
    if name == "airllm":
        return parts.Decoder(airllm(folder / "model", folder / "shards")).after, None
    if name == "accelerate, disk offload":
        return parts.Decoder(parts.offloaded(folder / "model", folder / "offload")).after, None
    copy, options = CONTENDERS[name]
    own = sum(path.stat().st_size for path in (folder / copy).glob("*.safetensors"))
    own -= Sidecar(folder / "linked").header.weight_bytes
    model = parts.streamed(folder / copy, dram_budget=memory - own - CONSTANT, **options)
    return parts.Decoder(model).after, model.ripple_report


@contextlib.contextmanager
def contender(name: str, folder: Path, memory: int, tokens: list[int]) -> Iterator[Callable[[], Any]]:
    """One contender in this process, under the limit: a call decodes the next token, and counts."""
    torch.set_num_threads(1)
    torch.set_grad_enabled(False)
    warm_up()
    if name in PEERS[1:]:
        importlib.import_module("airllm" if name == "airllm" else "llama_cpp")
    with parts.limited_memory(memory):
        after, report = load(name, folder, memory)
        text = iter(tokens)
        for _ in range(WARM_UP):
            after(next(text))
        if report:
            report.reset()
        yield lambda: (after(next(text)), parts.counts(report) if report else {})


def make_copies(model: Path, folder: Path) -> None:
    """The model as each contender reads it, none of it in the page cache."""
    parts.reordered(model, folder, COPIES)
    shutil.copytree(model, folder / "model")
    write_gguf(model, folder / "model.gguf")
    airllm(folder / "model", folder / "shards")
    probe(folder / "linked").save()
    os.sync()
    parts.drop_from_page_cache(*(path for path in folder.rglob("*") if path.is_file()))


def main() -> None:
    options = parse(
        __doc__,
        model=option(ROOT / ".cache" / "relu-lm-wide"),
        rounds=5,
        memory=option(3.0, "the model is so many times as large"),
    )
    model, share, rounds = options.model, options.memory, options.rounds
    text = "".join(assets.texts("held_out"))[:2000]
    tokens = language.tokenizer(model)(text).input_ids
    size = sum(path.stat().st_size for path in model.glob("*.safetensors"))
    with scratch() as folder, contextlib.ExitStack() as stack:
        os.environ["XDG_CACHE_HOME"] = str(folder)  # the probe is this run's
        make_copies(model, folder)
        arguments = folder, int(size / share), tokens
        running = {}
        for name in (*CONTENDERS, *PEERS):
            exact = "int8" not in name and "recall" not in name
            running[name] = OwnProcess(contender, name, *arguments, exact=exact)
            stack.callback(running[name].close)
        race = Race(running, equal=parts.same_token, keep=True)
        race.run(rounds, samples=STEP_TOKENS)
    parts.require_same_text(race)
    table = Table(
        "ripple_peers",
        f"Ripple: {model.name}, {size / 1e6:.0f} MB, in {size / share / 1e6:.0f} MB",
        f"{model.name}, ReLU model trained here, float32; memory cgroup of {1 / share:.0%} of its bytes; "
        f"batch 1, 1 thread, {rounds} x {STEP_TOKENS} tokens after {WARM_UP}; reads, "
        f"KiB: a token and layer",
    )
    for name, times in race.times.items():
        table.add(name, tokens_per_s=1 / times.median, slowest=1 / max(times.wall), **times.results[-1][1])
    table.finish()


if __name__ == "__main__":
    main()
