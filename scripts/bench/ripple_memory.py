"""Peak memory of SmolLM2 that loads and generates, for DRAM budgets of 10, 25 and 50% of its MLP weights.

    python scripts/bench/ripple_memory.py

Each contender is a process of its own. "peak" is its largest resident set beyond what it held with all
libraries loaded and a tiny model run. "beyond" is what of that is neither the model's own parameters nor the
budget. Ripple's rows run under an RLIMIT_DATA that leaves 20 MiB for it: a larger allocation would fail.
"""

from __future__ import annotations

import argparse
import gc
import json
import resource
import subprocess
import sys
import tempfile
import threading
from pathlib import Path
from typing import Any

import torch
from common import ROOT, Table  # also makes `assets` importable

from ripple_loader import ReorderConfig, RippleConfig, reorder
from ripple_loader.config import parse_size
from ripple_loader.format.sidecar import Sidecar

PROMPT_TOKENS, NEW_TOKENS, CONSTANT = 32, 8, 20 << 20
CONTENDERS = {
    "in memory, transformers": None,
    "accelerate, disk offload": "accelerate",
    "Ripple, 100% kept, budget 10%": ("10%", 1.0),
    "Ripple, 50% kept, budget 10%": ("10%", 0.5),
    "Ripple, 100% kept, budget 25%": ("25%", 1.0),
    "Ripple, 100% kept, budget 50%": ("50%", 1.0),
}


def status(field: str) -> int:
    """Bytes of a line of /proc/self/status."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith(field)).split()[1]) << 10


def warm_up() -> None:
    """Load whatever code loading and generating need."""
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    with tempfile.TemporaryDirectory() as scratch:
        LlamaForCausalLM(LlamaConfig(vocab_size=32, **sizes)).save_pretrained(scratch)
        LlamaForCausalLM.from_pretrained(scratch).generate(
            torch.ones(1, 2, dtype=torch.long), max_new_tokens=2
        )
    gc.collect()


@torch.no_grad()
def measure(name: str, directory: Path) -> dict[str, int]:
    """Run one contender in this process; bytes."""
    from ripple_main import accelerate_offload
    from transformers import AutoModelForCausalLM

    torch.set_num_threads(1)
    threading.stack_size(256 << 10)  # RLIMIT_DATA counts stacks in full
    warm_up()
    resident, data, budget = status("VmRSS"), status("VmData"), 0
    contender: Any = CONTENDERS[name]
    if contender is None:
        model = AutoModelForCausalLM.from_pretrained(directory)
    elif contender == "accelerate":
        model = accelerate_offload(directory, directory / "offload")
    else:
        share, keep = contender
        budget = parse_size(share, "share", total=Sidecar(directory).header.weight_bytes)
        files = sum(path.stat().st_size for path in directory.glob("*.safetensors"))
        resource.setrlimit(resource.RLIMIT_DATA, (data + files + budget + CONSTANT,) * 2)
        options = RippleConfig(dram_budget=budget, keep=keep, strategy="sparse")
        model = AutoModelForCausalLM.from_pretrained(directory, quantization_config=options)
    ids = torch.arange(PROMPT_TOKENS)[None]
    model.generate(ids, max_new_tokens=NEW_TOKENS, min_new_tokens=NEW_TOKENS, do_sample=False)
    own = {p.data_ptr(): p.nbytes for p in model.parameters() if p.device.type != "meta"}
    return {"own": sum(own.values()), "budget": budget, "peak": status("VmHWM") - resident}


def main() -> None:
    import assets

    (ROOT / "out").mkdir(exist_ok=True)
    table = Table(
        "ripple_memory",
        "Ripple: peak memory of loading SmolLM2-135M-Instruct and generating",
        f"float32; {PROMPT_TOKENS} tokens of prompt, {NEW_TOKENS} new; 1 thread; MiB; budgets: of the MLPs",
    )
    with tempfile.TemporaryDirectory(dir=ROOT / "out") as scratch:
        copy = Path(scratch) / "copy"
        config = ReorderConfig(placement="identity", tokens=32)
        reorder(assets.model_dir(), copy, [torch.arange(32)], config)
        for name in CONTENDERS:
            command = [sys.executable, __file__, "--contender", name, "--directory", str(copy)]
            output = subprocess.run(command, capture_output=True, text=True, check=True).stdout
            found = json.loads(output.splitlines()[-1])
            found["beyond"] = found["peak"] - found["own"] - found["budget"]
            table.add(name, **{key: value / 2**20 for key, value in found.items()})
    table.finish()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--contender", choices=CONTENDERS, help="measure this one only, and print JSON")
    parser.add_argument("--directory", type=Path, help="the reordered model, for --contender")
    arguments = parser.parse_args()
    if arguments.contender:
        print(json.dumps(measure(arguments.contender, arguments.directory)))
    else:
        main()
