import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM

from ripple_loader import ReorderConfig, reorder
from ripple_loader.checkpoint.source import open_source
from ripple_loader.offline import trace as module
from ripple_loader.offline.active_sets import active_mask, unpack
from ripple_loader.offline.calibration import cut_sequences
from ripple_loader.offline.trace import Trace, trace_source

from .conftest import CALIBRATION, SMALL, make_model


def trace(model, out, config=SMALL):
    source = open_source(model)
    return trace_source(source, cut_sequences(source, CALIBRATION, config), config, out)


@torch.no_grad()
@pytest.mark.parametrize("name", ["gpt2", "llama", "opt", "phi3"])
def test_a_dense_model_is_traced_as_the_stock_model_computes_it(name, saved, tmp_path):
    stock, source = AutoModelForCausalLM.from_pretrained(saved(name)), open_source(saved(name))
    seen = {layer: [] for layer in range(source.layers)}
    for layer, site in enumerate(source.architecture.find(stock)):
        down = getattr(site.container, source.architecture.down.linear)
        down.register_forward_pre_hook(
            lambda _, args, layer=layer: seen[layer].append(args[0].flatten(0, -2))
        )
    for ids in CALIBRATION[:4]:
        stock(ids[None])
    found = trace(saved(name), tmp_path)
    assert found.exact_zeros == (name == "opt")
    for layer, parts in seen.items():
        a_TN = torch.cat(parts)
        wanted = active_mask(a_TN, "top_k", 0.5, exact_zeros=found.exact_zeros).numpy()
        got = unpack(found.sets(layer), source.neurons)
        assert got.shape == wanted.shape == (SMALL.tokens, source.neurons)
        assert (got == wanted).mean() > 0.999  # ties and rounding at the threshold


def test_a_file_of_a_trace_is_opened_once_for_all_mlps(saved, tmp_path, monkeypatch):
    """Each lists all MLPs: opened for every one, it would take the square of their number."""
    found, opened = trace(saved("llama"), tmp_path), []
    open_file = module.safe_open
    monkeypatch.setattr(module, "safe_open", lambda *given: opened.append(given) or open_file(*given))
    for layer in range(2):
        found.sets(layer)
    assert len(opened) == found.description["sequences"]


@torch.no_grad()
def test_experts_are_traced_on_the_tokens_routed_to_them(saved, tmp_path):
    found, source = trace(saved("mixtral"), tmp_path), open_source(saved("mixtral"))
    counts = [len(found.sets(mlp)) for mlp in range(source.layers)]
    assert len(counts) == 8
    assert sum(counts[:4]) == sum(counts[4:]) == 2 * SMALL.tokens  # each token goes to two experts
    assert all(
        (unpack(found.sets(mlp), source.neurons).sum(1) == source.neurons // 2).all() for mlp in range(8)
    )


@settings(deadline=None)
@given(st.integers(0, 1 << 30), st.sampled_from(["top_k", "threshold", "energy"]), st.floats(0.01, 1.0))
def test_rules_of_what_is_active(seed, rule, share):
    a_TN = torch.randn(5, 40, generator=torch.Generator().manual_seed(seed)).double()
    mask_TN = active_mask(a_TN, rule, share, exact_zeros=False)
    smallest_T = torch.where(mask_TN, a_TN.abs(), torch.inf).amin(1)
    assert (torch.where(mask_TN, 0, a_TN.abs()).amax(1) <= smallest_T).all()  # the largest ones
    energy_T = (a_TN**2 * mask_TN).sum(1) / (a_TN**2).sum(1)
    match rule:
        case "top_k":
            assert (mask_TN.sum(1) == max(1, round(share * 40))).all()
        case "threshold":
            assert (smallest_T >= share * a_TN.abs().amax(1) * (1 - 1e-6)).all()
        case "energy":
            assert (energy_T >= share - 1e-5).all()
            assert (energy_T - smallest_T**2 / (a_TN**2).sum(1) < share + 1e-5).all()


def test_a_trace_is_gone_on_with(saved, tmp_path, monkeypatch):
    first = trace(saved("llama"), tmp_path / "whole")
    partial = tmp_path / "partial"
    trace(saved("llama"), partial)
    (partial / "sequence-000001.safetensors").unlink()
    os.truncate(partial / "sequence-000003.safetensors", 50)
    with pytest.raises(ValueError, match="2 are missing"):
        Trace(partial)
    times = {path.name: path.stat().st_mtime_ns for path in partial.glob("sequence*")}
    again = trace(saved("llama"), partial)
    for layer in range(2):
        assert (again.sets(layer) == first.sets(layer)).all()
    changed = {
        path.name for path in partial.glob("sequence*") if times.get(path.name) != path.stat().st_mtime_ns
    }
    assert changed == {"sequence-000001.safetensors", "sequence-000003.safetensors"}


def test_a_trace_of_something_else_is_refused(saved, tmp_path):
    trace(saved("llama"), tmp_path)
    with pytest.raises(ValueError, match="differs in active_share"):
        trace(saved("llama"), tmp_path, ReorderConfig(tokens=256, sequence_length=64, active_share=0.3))
    with pytest.raises(ValueError, match="differs in model"):
        trace(saved("qwen2"), tmp_path)
    with pytest.raises(FileNotFoundError, match=r"has no trace\.json"):
        Trace(tmp_path / "nowhere")


SHARED = """
import sys, torch
from pathlib import Path
from ripple_loader import ReorderConfig
from ripple_loader.offline import trace as module
from ripple_loader.offline.calibration import cut_sequences
from ripple_loader.checkpoint.source import open_source
original = module.save_file
def noted(tensors, path):
    print("wrote", flush=True)
    original(tensors, path)
module.save_file = noted
source, config = open_source(Path(sys.argv[1])), ReorderConfig(tokens=256, sequence_length=64)
calibration = [torch.arange(3, 67) + number for number in range(4)]
sequences = cut_sequences(source, calibration, config)
module.trace_source(source, sequences, config, Path(sys.argv[2]))
"""


def test_processes_of_accelerate_share_a_trace(saved, tmp_path):
    script, out = tmp_path / "script.py", tmp_path / "out"
    script.write_text(SHARED)
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--cpu", "--num_processes", "2"]
    launch += ["--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no"]
    command = [*launch, str(script), str(saved("llama")), str(out)]
    output = subprocess.run(command, capture_output=True, text=True, check=True, timeout=600).stdout
    assert output.count("wrote") == 4
    assert len(Trace(out).sets(0)) == 256


PEAK = """
import sys, torch
from pathlib import Path
from ripple_loader import ReorderConfig
from ripple_loader.checkpoint.source import open_source
from ripple_loader.offline.calibration import cut_sequences
from ripple_loader.offline.trace import trace_source
def status(field):
    line = next(line for line in open("/proc/self/status") if line.startswith(field))
    return int(line.split()[1]) * 1024
def run(model, out):
    source, config = open_source(Path(model)), ReorderConfig(tokens=32, sequence_length=16)
    trace_source(source, cut_sequences(source, [torch.arange(3, 35)], config), config, Path(out))
run(sys.argv[1], sys.argv[3] + "-warm")  # loads whatever code tracing needs
before = status("VmRSS")
run(sys.argv[2], sys.argv[3])
print(status("VmHWM") - before)
"""


def test_a_trace_holds_one_mlp_at_a_time(saved, tmp_path):
    model = make_model("llama", hidden_size=256, intermediate_size=4096, num_hidden_layers=12)
    model.save_pretrained(tmp_path / "model", max_shard_size="30MB")
    sizes = {name: parameter.nbytes for name, parameter in model.named_parameters()}
    mlps = sum(size for name, size in sizes.items() if "mlp" in name)
    command = [
        sys.executable,
        "-c",
        PEAK,
        str(saved("llama")),
        str(tmp_path / "model"),
        str(tmp_path / "out"),
    ]
    output = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    peak = int(output.split()[-1])
    assert peak < sum(sizes.values()) - mlps + 2 * mlps // 12 + (24 << 20) < mlps / 2
    assert len(Trace(tmp_path / "out").sets(11)) == 32


def test_a_trace_orders_as_the_text_it_was_made_of_does(saved, tmp_path):
    trace(saved("llama"), tmp_path / "trace")
    one = reorder(saved("llama"), tmp_path / "one", CALIBRATION, SMALL)
    other = reorder(saved("llama"), tmp_path / "other", config=SMALL, trace=tmp_path / "trace")
    assert all(np.array_equal(*orders) for orders in zip(one.orders, other.orders, strict=True))
