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

from __future__ import annotations

import argparse
import contextlib
import importlib
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from common import ROOT, Table  # also makes `assets` importable
from other_engines import Decoder, airllm, llama_cpp, transformers_decoder, write_gguf
from ripple_main import accelerate_offload, drop_from_page_cache
from ripple_memory import CONSTANT, warm_up
from throttle import limited_memory

from ripple_loader import ReorderConfig, RippleConfig, reorder
from ripple_loader.checkpoint.source import open_source
from ripple_loader.format.sidecar import Sidecar
from ripple_loader.offline.calibration import cut_sequences
from ripple_loader.offline.trace import trace_source
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


def load(name: str, folder: Path, memory: int) -> tuple[Decoder, Any]:
    """A contender, and its model if it is one of Ripple's."""
    from transformers import AutoModelForCausalLM

    if name == "llama.cpp, mmap":
        return llama_cpp(folder / "model.gguf"), None
    if name == "airllm":
        return airllm(folder / "model", folder / "shards"), None
    if name == "accelerate, disk offload":
        return transformers_decoder(accelerate_offload(folder / "model", folder / "offload")), None
    copy, options = CONTENDERS[name]
    own = sum(path.stat().st_size for path in (folder / copy).glob("*.safetensors"))
    own -= Sidecar(folder / "linked").header.weight_bytes
    config = RippleConfig(dram_budget=memory - own - CONSTANT, **options)
    model = AutoModelForCausalLM.from_pretrained(folder / copy, quantization_config=config)
    return transformers_decoder(model), model


@torch.no_grad()
def serve(name: str, folder: Path, memory: int) -> None:
    """Load one contender under the limit; decode some tokens for each line of stdin, and tell of them."""
    torch.set_num_threads(1)
    warm_up()
    with contextlib.ExitStack() as stack:
        stack.enter_context(contextlib.redirect_stdout(sys.stderr))  # stdout is for the answers
        if name in PEERS[1:]:
            importlib.import_module("airllm" if name == "airllm" else "llama_cpp")
        stack.enter_context(limited_memory(memory))
        decode, model = load(name, folder, memory)
        report = model.ripple_report if model else None
        for line in sys.stdin:
            if report:
                report.reset()
            seconds, likeliest = [], []
            for token in json.loads(line):
                start = time.perf_counter()
                likeliest.append(decode(token))
                seconds.append(time.perf_counter() - start)
            found: dict[str, Any] = {"seconds": seconds, "likeliest": likeliest}
            if report:
                calls = report.tokens * report.layers
                found |= {"reads": report.requests / calls, "KiB": report.bytes_read / calls / 2**10}
                found |= {"hits": report.hits / report.active}
            print(json.dumps(found), file=sys.__stdout__, flush=True)


class Contender:
    """A process that serves one contender."""

    def __init__(self, name: str, folder: Path, memory: int) -> None:
        self.name = name
        command = [sys.executable, __file__, "--contender", name, "--folder", str(folder)]
        self.process = subprocess.Popen(
            [*command, "--bytes", str(memory)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        self.found: list[dict[str, Any]] = []

    def give(self, tokens: list[int]) -> dict[str, Any]:
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(json.dumps(tokens) + "\n")
        self.process.stdin.flush()
        line = self.process.stdout.readline()
        if not line:
            raise RuntimeError(f"{self.name} ended with {self.process.wait()}: the limit is too low for it")
        answer: dict[str, Any] = json.loads(line)
        return answer

    def close(self) -> None:
        self.process.communicate()


def copies(model: Path, folder: Path) -> None:
    """The model reordered in each way, from one trace."""
    import assets

    source, config = open_source(model), COPIES["linked"]
    trace = folder / "trace"
    trace_source(source, cut_sequences(source, assets.texts("train"), config), config, trace)
    for name, each in COPIES.items():
        reorder(model, folder / name, config=each, trace=trace)
    shutil.copytree(model, folder / "model")
    write_gguf(model, folder / "model.gguf")
    airllm(folder / "model", folder / "shards")
    probe(folder / "linked").save()
    os.sync()
    for path in folder.rglob("*"):
        if path.is_file():
            drop_from_page_cache(path)


def main(model: Path, rounds: int, share: float) -> None:
    import assets
    from transformers import AutoTokenizer

    text = "".join(assets.texts("held_out"))[:2000]
    tokens = AutoTokenizer.from_pretrained(model)(text).input_ids
    size = sum(path.stat().st_size for path in model.glob("*.safetensors"))
    (ROOT / "out").mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory(dir=ROOT / "out") as scratch:
        folder = Path(scratch)
        os.environ["XDG_CACHE_HOME"] = scratch  # the probe is this run's
        copies(model, folder)
        running = {name: Contender(name, folder, int(size / share)) for name in (*CONTENDERS, *PEERS)}
        for each in running.values():
            each.give(tokens[:WARM_UP])
        for start in range(WARM_UP, WARM_UP + rounds * STEP_TOKENS, STEP_TOKENS):
            for each in running.values():
                each.found.append(each.give(tokens[start : start + STEP_TOKENS]))
        for each in running.values():
            each.close()
    exact = [
        [token for found in each.found for token in found["likeliest"]]
        for name, each in running.items()
        if "int8" not in name and "recall" not in name
    ]
    assert all(likeliest == exact[0] for likeliest in exact), "exact contenders differ"
    table = Table(
        "ripple_peers",
        f"Ripple: {model.name}, {size / 1e6:.0f} MB, in {size / share / 1e6:.0f} MB",
        f"{model.name}, ReLU model trained here, float32; memory cgroup of {1 / share:.0%} of its bytes; "
        f"batch 1, 1 thread, {rounds} x {STEP_TOKENS} tokens after {WARM_UP}; reads, "
        f"KiB: a token and layer",
    )
    for name, each in running.items():
        seconds = [one for found in each.found for one in found["seconds"]]
        row: dict[str, float | str] = {
            "tokens_per_s": 1 / statistics.median(seconds),
            "slowest": 1 / max(seconds),
        }
        for metric in ("reads", "KiB", "hits"):
            if metric in each.found[0]:
                row[metric] = statistics.mean(found[metric] for found in each.found)
        table.add(name, **row)
    table.finish()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", type=Path, default=ROOT / ".cache" / "relu-lm-wide")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--memory", type=float, default=3, help="the model is so many times as large")
    parser.add_argument("--contender", choices=[*CONTENDERS, *PEERS], help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--bytes", type=int, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.contender:
        serve(arguments.contender, arguments.folder, arguments.bytes)
    else:
        main(arguments.model, arguments.rounds, arguments.memory)
