"""Ripple and others with MLPs on disk: tokens a second, and peak memory.

    python scripts/bench/ripple_main.py [--rounds 3]
    python scripts/bench/ripple_main.py --table memory
    python scripts/train_relu_lm.py --model relu-lm-wide --steps 400 --batch 4     # once
    pip install -e ".[peers]"     # llama.cpp and airllm; without them their rows are left out
    python scripts/bench/ripple_main.py --table peers --step-tokens 8 [--rounds 5] [--memory 3]

Each contender is a process of its own, with one thread. For tokens a second they get the same held-out text
token by token, in turn; all but those that select, predict or round neurons are exact and have to think the
same tokens likeliest. Ripple reads with O_DIRECT; what the drive can do is probed first, as `ripple probe`
does. "LLM in a Flash" is that paper's strategy in this engine: bundles in the model's order, an LRU cache, no
gaps read, nothing read ahead. MB/s are of what the process read from the drive (/proc/self/io).

- main: SmolLM2 with all, half and a quarter of its neurons. "selected" always selects neurons; without it
  Ripple may read all of them where that is cheaper by its model of the drive, and is then exact. accelerate
  reads safetensors through the page cache: one row has the file cached, as after any first pass, the other
  drops it before every token. Perplexity selects neurons token by token, as decoding does.
- peers: every process is in a memory cgroup (which takes root) of a third of the model's bytes, for weights,
  buffers and page cache together. Ripple's DRAM budget is what that leaves beside its other weights and
  20 MiB. No file is in the page cache at the start.
- memory: SmolLM2 loads and generates, for DRAM budgets of 10, 25 and 50% of its MLPs. "peak" is the largest
  resident set beyond what the process held with all libraries loaded and a tiny model run, "beyond" what of
  that is neither the model's own parameters nor the budget. Ripple's rows run under an RLIMIT_DATA that
  leaves 20 MiB for it: a larger allocation would fail.
"""

import contextlib
import gc
import importlib
import importlib.util
import os
import resource
import shutil
import tempfile
import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import psutil
import ripple_parts as parts
import torch
from common import ROOT, Table, assets, option, parse, scratch
from harness import Contender, OwnProcess, Race, in_own_process
from models import language
from other_engines import airllm, llama_cpp, write_gguf
from transformers import LlamaConfig

from ripple_loader import ReorderConfig
from ripple_loader.config import parse_size
from ripple_loader.format.sidecar import Sidecar
from ripple_loader.storage.probing import probe

WARM_UP, IN_FLIGHT, HELD_OUT = 32, 32, (2, 512)  # tokens; reads; sequences, tokens
CONSTANT = 20 << 20  # bytes that Ripple may take beside its budget
SHORT, LONG = ReorderConfig(tokens=1024), ReorderConfig(sequence_length=256)
FLASH = {"cache_policy": "lru", "merge_gap": 0, "prefetch": False}
HALF, QUARTER = ({"keep": keep, "strategy": "sparse"} for keep in (0.5, 0.25))


class Case(NamedTuple):
    """A model, its copies by name, and Ripple's options; of each contender of Ripple the copy that it reads
    and more options, of another one how it is loaded from the model and the folder of the copies."""

    model: Path
    copies: dict[str, ReorderConfig]
    options: dict[str, Any]
    contenders: dict[str, Any]


def offloaded(_: Path, folder: Path) -> Any:
    """From a file of its own: pages that another process has mapped would not leave the cache."""
    return parts.offloaded(folder / "model", folder / "offload")


CASES = {
    "main": Case(
        assets.cache_dir() / assets.SMOLLM2,
        {"linked": SHORT, "identity": replace(SHORT, placement="identity")},
        {"dram_budget": "96MiB", "queue_depth": IN_FLIGHT},
        {
            "in memory, transformers": lambda model, _: language.load(model),
            "Ripple, 100%, linked": ("linked", {}),
            "Ripple, 50%, linked": ("linked", {"keep": 0.5}),
            "Ripple, 25%, linked": ("linked", {"keep": 0.25}),
            "LLM in a Flash, 50%, identity": ("identity", HALF | FLASH),
            "Ripple, 50% selected, identity": ("identity", HALF),
            "Ripple, 50% selected, linked": ("linked", HALF),
            "LLM in a Flash, 25%, identity": ("identity", QUARTER | FLASH),
            "Ripple, 25% selected, identity": ("identity", QUARTER),
            "Ripple, 25% selected, linked": ("linked", QUARTER),
            "accelerate, page cache": lambda model, folder: parts.offloaded(model, folder / "cached"),
            "accelerate, from disk": offloaded,
        },
    ),
    "memory": Case(
        assets.cache_dir() / assets.SMOLLM2,
        {"linked": ReorderConfig(tokens=32, placement="identity")},
        {"strategy": "sparse"},
        {
            "in memory, transformers": lambda model, _: language.load(model),
            "accelerate, disk offload": offloaded,
            "Ripple, 100% kept, budget 10%": ("linked", {"dram_budget": "10%"}),
            "Ripple, 50% kept, budget 10%": ("linked", {"dram_budget": "10%", "keep": 0.5}),
            "Ripple, 100% kept, budget 25%": ("linked", {"dram_budget": "25%"}),
            "Ripple, 100% kept, budget 50%": ("linked", {"dram_budget": "50%"}),
        },
    ),
    "peers": Case(
        ROOT / ".cache" / "relu-lm-wide",
        {
            "linked": LONG,
            "unpinned": replace(LONG, hot_share=0.0),
            "identity": replace(LONG, placement="identity"),
            "int8": replace(LONG, bundles="int8"),
        },
        {"strategy": "sparse", "buffer": "1MiB"},
        {
            "accelerate, disk offload": offloaded,
            "llama.cpp, mmap": lambda _, folder: llama_cpp(folder / "model.gguf"),
            "airllm": lambda _, folder: airllm(folder / "model", folder / "shards"),
            "LLM in a Flash": ("identity", FLASH),
            "Ripple": ("linked", {}),
            "Ripple, recall 99%": ("linked", {"recall": 0.99}),
            "Ripple, int8 bundles": ("int8", {}),
            "Ripple, the model's order": ("identity", {}),
            "Ripple, nothing pinned": ("unpinned", {}),
            "Ripple, nothing pinned, LRU": ("unpinned", {"cache_policy": "lru"}),
            "Ripple, no collapse": ("linked", {"merge_gap": 0}),
            "Ripple, nothing read ahead": ("linked", {"prefetch": False}),
            "Ripple, all neurons read": ("linked", {"strategy": "dense", "buffer": "2MiB"}),
        },
    ),
}
JUDGED = {  # the contender whose perplexity is that of a share of the neurons
    1.0: "in memory, transformers",
    0.5: "Ripple, 50% selected, linked",
    0.25: "Ripple, 25% selected, linked",
}
LIBRARIES = {"llama.cpp, mmap": "llama_cpp", "airllm": "airllm"}  # of the contenders that need one


def load(table: str, name: str, folder: Path, memory: int = 0) -> Any:
    """A contender's model; llama.cpp's is a function of tokens that gives the likeliest one after them."""
    case = CASES[table]
    if callable(how := case.contenders[name]):
        return how(case.model, folder)
    copy, options = how
    if memory:
        own = sum(path.stat().st_size for path in (folder / copy).glob("*.safetensors"))
        own -= Sidecar(folder / "linked").header.weight_bytes
        options = {"dram_budget": memory - own - CONSTANT, **options}
    return parts.streamed(folder / copy, **case.options | options)


def held(model: Any) -> dict[str, float]:
    """MiB of a model's weights and Ripple's memory, and the share of the neurons that it computes with."""
    size, keep = language.own_bytes(model), 1.0
    if report := getattr(model, "ripple_report", None):
        size += report.resident_bytes
        if next(module.backend for module in model.modules() if hasattr(module, "backend")).selects:
            keep = model.hf_quantizer.quantization_config.keep
    return {"resident_MB": size / 2**20, "keep": keep}


@contextlib.contextmanager
def contender(table: str, name: str, folder: Path, memory: int, tokens: list[int]) -> Iterator[Contender]:
    """One contender in this process, under the limit: a call decodes the next token, and counts."""
    torch.set_num_threads(1)
    torch.set_grad_enabled(False)
    warm_up()
    if name in LIBRARIES:
        importlib.import_module(LIBRARIES[name])
    with parts.limited_memory(memory) if memory else contextlib.nullcontext():
        model = load(table, name, folder, memory)
        after = model if name == "llama.cpp, mmap" else parts.Decoder(model).after
        text, report = iter(tokens), getattr(model, "ripple_report", None)
        for _ in range(WARM_UP):
            after(next(text))
        if report:
            report.reset()
        fixed, process = {} if name in LIBRARIES else held(model), psutil.Process()

        def call() -> tuple[int, int, dict[str, float]]:
            before = process.io_counters().read_bytes  # what was not in the page cache
            token = after(next(text))
            read = process.io_counters().read_bytes - before
            return token, read, fixed | (parts.counts(report) if report else {})

        files = [folder / "model" / "model.safetensors"] if name == "accelerate, from disk" else []
        yield Contender(call, lambda: contextlib.nullcontext(parts.drop_from_page_cache(*files)))


def perplexity(table: str, name: str, folder: Path) -> float:
    """Of a contender without a limit, in this process."""
    ids = language.tokens("held_out", *HELD_OUT, folder=CASES[table].model)
    return language.perplexity(load(table, name, folder), ids)


def make_copies(case: Case, folder: Path) -> None:
    """The model as each contender reads it, none of it in the page cache."""
    parts.reordered(case.model, folder, case.copies)
    shutil.copytree(case.model, folder / "model")
    if "llama.cpp, mmap" in case.contenders:
        write_gguf(case.model, folder / "model.gguf")
    if "airllm" in case.contenders:
        airllm(folder / "model", folder / "shards")
    os.sync()
    parts.drop_from_page_cache(*(path for path in folder.rglob("*") if path.is_file()))


def status(name: str) -> int:
    """Bytes of a line of /proc/self/status."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith(name)).split()[1]) << 10


def warm_up() -> None:
    """Load whatever code loading and generating need."""
    with tempfile.TemporaryDirectory() as folder:
        language.random(LlamaConfig, 16, 16, 1, 2, 2, vocab_size=32).save_pretrained(folder)
        model = language.load(Path(folder), dtype=torch.float32)
        model.generate(torch.ones(1, 2, dtype=torch.long), max_new_tokens=2)
    gc.collect()


@torch.no_grad()
def peak(name: str, folder: Path) -> dict[str, float]:
    """MiB that one contender of "memory" takes to load and generate, in this process."""
    torch.set_num_threads(1)
    threading.stack_size(256 << 10)  # RLIMIT_DATA counts stacks in full
    warm_up()
    resident, data, budget = status("VmRSS"), status("VmData"), 0
    if not callable(how := CASES["memory"].contenders[name]):
        total = Sidecar(folder / "linked").header.weight_bytes
        budget = parse_size(how[1]["dram_budget"], "dram_budget", total=total)
        files = sum(path.stat().st_size for path in (folder / "linked").glob("*.safetensors"))
        resource.setrlimit(resource.RLIMIT_DATA, (data + files + budget + CONSTANT,) * 2)
    model = load("memory", name, folder)
    model.generate(torch.arange(32)[None], max_new_tokens=8, min_new_tokens=8, do_sample=False)
    own, most = language.own_bytes(model), status("VmHWM") - resident
    row = {"own": own, "budget": budget, "peak": most, "beyond": most - own - budget}
    return {metric: size / 2**20 for metric, size in row.items()}


def memory_table() -> Table:
    table = Table(
        "ripple_memory",
        "Ripple: peak memory of loading SmolLM2-135M-Instruct and generating",
        "float32; 32 tokens of prompt, 8 new; 1 thread; MiB; budgets: of the MLPs",
    )
    with scratch() as folder:
        make_copies(CASES["memory"], folder)
        for name in CASES["memory"].contenders:
            table.add(name, **in_own_process(peak, name, folder))
    return table


def speed_table(options: Any) -> Table:
    case = CASES[options.table]
    for name, library in LIBRARIES.items():
        if not importlib.util.find_spec(library):
            case.contenders.pop(name, None)
    size = sum(path.stat().st_size for path in case.model.glob("*.safetensors"))
    memory = int(size / options.memory) if options.table == "peers" else 0
    tokens = language.tokens("held_out", folder=case.model).tolist()
    with scratch() as folder, contextlib.ExitStack() as stack:
        os.environ["XDG_CACHE_HOME"] = str(folder)  # the probe is this run's
        make_copies(case, folder)
        profile = probe(folder / "linked")
        profile.save()
        perplexities = {
            keep: in_own_process(perplexity, options.table, name, folder)
            for keep, name in JUDGED.items()
            if name in case.contenders
        }
        running = {}
        for name, how in case.contenders.items():
            exact = callable(how) or not (how[0] == "int8" or {"keep", "recall"} & how[1].keys())
            arguments = options.table, name, folder, memory, tokens
            running[name] = OwnProcess(contender, *arguments, exact=exact)
            stack.callback(running[name].close)
        race = Race(running, equal=parts.same_token, keep=True)
        race.run(options.rounds, samples=options.step_tokens)
    parts.require_same_text(race)
    table = Table(
        f"ripple_{options.table}",
        f"Ripple: {case.model.name} with its MLPs on disk",
        f"{case.model.name}, float32, {size / 1e6:.0f} MB, cgroup of {memory / 1e6:.0f} MB (0: none), "
        f"{case.options}; 1 thread, {options.rounds} x {options.step_tokens} tokens after {WARM_UP}; "
        f"perplexity on {HELD_OUT[0]} x {HELD_OUT[1]} held-out tokens; reads, KiB: a token and layer; "
        f"drive: {profile.at(IN_FLIGHT).summary()}",
    )
    for name, times in race.times.items():
        read, counted = sum(result[1] for result in times.results), times.results[-1][2]
        judged = perplexities.get(counted.pop("keep", None))
        speed = {"tokens_per_s": 1 / times.median, "slowest": 1 / max(times.wall)}
        table.add(name, **speed, MB_per_s=read / sum(times.wall) / 1e6, **counted)
        if judged:
            table.add(name, perplexity=judged)
    return table


def main() -> None:
    options = parse(
        __doc__,
        table=option("main", choices=CASES),
        rounds=3,
        step_tokens=option(3, "tokens of a turn"),
        memory=option(3.0, "the peers' model is so many times as large"),
    )
    table = memory_table() if options.table == "memory" else speed_table(options)
    table.finish()


if __name__ == "__main__":
    main()
