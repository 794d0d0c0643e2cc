"""Peak memory of SmolLM2 that loads and generates, for DRAM budgets of 10, 25 and 50% of its MLP weights.

    python scripts/bench/ripple_memory.py

Each contender is a process of its own. "peak" is its largest resident set beyond what it held with all
libraries loaded and a tiny model run. "beyond" is what of that is neither the model's own parameters nor the
budget. Ripple's rows run under an RLIMIT_DATA that leaves 20 MiB for it: a larger allocation would fail.
"""

import gc
import resource
import tempfile
import threading
from pathlib import Path

import torch
from common import Table, assets, parse, scratch
from harness import in_own_process
from models import language
from ripple_parts import offloaded, streamed

from ripple_loader import ReorderConfig, reorder
from ripple_loader.config import parse_size
from ripple_loader.format.sidecar import Sidecar

PROMPT_TOKENS, NEW_TOKENS, CONSTANT = 32, 8, 20 << 20
CONTENDERS: dict[str, tuple[str, float] | None] = {  # Ripple's DRAM budget and share of the neurons
    "in memory, transformers": None,
    "accelerate, disk offload": None,
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
    with tempfile.TemporaryDirectory() as folder:
        LlamaForCausalLM(LlamaConfig(vocab_size=32, **sizes)).save_pretrained(folder)
        model = LlamaForCausalLM.from_pretrained(folder)
        model.generate(torch.ones(1, 2, dtype=torch.long), max_new_tokens=2)
    gc.collect()


@torch.no_grad()
def measure(name: str, directory: Path) -> dict[str, int]:
    """One contender's bytes, in this process."""
    torch.set_num_threads(1)
    threading.stack_size(256 << 10)  # RLIMIT_DATA counts stacks in full
    warm_up()
    resident, data, budget = status("VmRSS"), status("VmData"), 0
    if contender := CONTENDERS[name]:
        share, keep = contender
        budget = parse_size(share, "share", total=Sidecar(directory).header.weight_bytes)
        files = sum(path.stat().st_size for path in directory.glob("*.safetensors"))
        resource.setrlimit(resource.RLIMIT_DATA, (data + files + budget + CONSTANT,) * 2)
        model = streamed(directory, dram_budget=budget, keep=keep, strategy="sparse")
    elif "accelerate" in name:
        model = offloaded(directory, directory / "offload")
    else:
        model = language.load(directory)
    ids = torch.arange(PROMPT_TOKENS)[None]
    model.generate(ids, max_new_tokens=NEW_TOKENS, min_new_tokens=NEW_TOKENS, do_sample=False)
    own, peak = language.own_bytes(model), status("VmHWM") - resident
    return {"own": own, "budget": budget, "peak": peak, "beyond": peak - own - budget}


def main() -> None:
    parse(__doc__)
    table = Table(
        "ripple_memory",
        "Ripple: peak memory of loading SmolLM2-135M-Instruct and generating",
        f"float32; {PROMPT_TOKENS} tokens of prompt, {NEW_TOKENS} new; 1 thread; MiB; budgets: of the MLPs",
    )
    with scratch() as folder:
        config = ReorderConfig(placement="identity", tokens=32)
        reorder(assets.model_dir(), folder / "copy", [torch.arange(32)], config)
        for name in CONTENDERS:
            row = in_own_process(measure, name, folder / "copy")
            table.add(name, **{metric: size / 2**20 for metric, size in row.items()})
    table.finish()


if __name__ == "__main__":
    main()
