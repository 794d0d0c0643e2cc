import subprocess
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ripple_loader import ReorderConfig, RippleConfig, reorder
from ripple_loader.format.layout import SidecarHeader
from ripple_loader.online.budget import allocate

from .conftest import make_model, token_ids

HEADERS = st.builds(
    lambda **sizes: SidecarHeader(
        model_type="llama", checkpoint="", files={}, base={}, hot=[0] * sizes["layers"], **sizes
    ),
    layers=st.integers(1, 40),
    neurons=st.integers(1, 5000),
    hidden=st.integers(1, 40000),
    rows=st.sampled_from([2, 3]),
    dtype=st.sampled_from(["F32", "BF16", "I8", "I4"]),
    exact_zeros=st.booleans(),
)


@settings(deadline=None)
@given(
    header=HEADERS,
    budget=st.integers(1, 1 << 34),
    keep=st.sampled_from([1.0, 0.3]),
    buffer=st.integers(1, 1 << 24),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
)
def test_an_allocation_never_exceeds_the_budget(header, budget, keep, buffer, dtype):
    config = RippleConfig(dram_budget=budget, keep=keep, buffer=buffer)
    try:
        allocation = allocate(header, config, dtype)
    except ValueError as error:
        least = int(str(error).split("at least ")[1].split()[0])
        assert budget < least
        allocation = allocate(header, RippleConfig(dram_budget=least, keep=keep, buffer=buffer), dtype)
        assert allocation.budget == least
    assert sum(allocation.resident.values()) <= allocation.budget
    assert all(0 <= slots <= header.neurons for slots in allocation.cache_slots)
    assert len(allocation.cache_slots) == header.layers
    assert 0 <= allocation.sketch_layers <= header.layers
    assert allocation.buffer >= header.bundle_bytes
    assert allocation.buffer <= max(allocation.budget // 8 + 4096, header.bundle_bytes + 4 * 4096)


def test_a_share_is_of_the_streamed_weights():
    sizes = {"model_type": "x", "layers": 10, "neurons": 1000, "hidden": 1000, "rows": 3, "dtype": "F32"}
    header = SidecarHeader(**sizes, exact_zeros=False, hot=[0] * 10, checkpoint="", files={}, base={})
    assert allocate(header, RippleConfig(dram_budget="25%"), torch.float32).budget == 30_000_000


PEAK = """
import gc, resource, sys, threading, torch
from pathlib import Path
from transformers import AutoModelForCausalLM
from ripple_loader import RippleConfig
from ripple_loader.format.sidecar import Sidecar
from ripple_loader.config import parse_size

def status(field):
    line = next(line for line in open("/proc/self/status") if line.startswith(field))
    return int(line.split()[1]) * 1024

copy, warm_up, share, keep, recall, own, constant = sys.argv[1:]
threading.stack_size(256 << 10)

def run(directory, budget):
    config = RippleConfig(dram_budget=budget, keep=float(keep), recall=float(recall), strategy="sparse")
    model = AutoModelForCausalLM.from_pretrained(directory, quantization_config=config)
    model.generate(torch.ones(1, 16, dtype=torch.long), max_new_tokens=8)
    return model

run(warm_up, "100%")  # brings in the code of libraries, which the kernel may drop again
gc.collect()
resident, data = status("VmRSS"), status("VmData")
budget = parse_size(share, "", total=Sidecar(copy).header.weight_bytes)
files = sum(path.stat().st_size for path in Path(copy).glob("*.safetensors"))
resource.setrlimit(resource.RLIMIT_DATA, (data + files + budget + int(constant),) * 2)
model = run(copy, share)
assert sum(parameter.nbytes for parameter in model.parameters()) == int(own)
assert model.ripple_report.resident_bytes <= model.ripple_report.budget == budget
print(status("VmHWM") - resident - int(own) - budget)
try:
    bytearray(files)
except MemoryError:
    print("the limit is one")
"""
CONSTANT = 20 << 20  # activations, logits, thread stacks, the allocator's slack


@pytest.fixture(scope="module")
def large(tmp_path_factory):
    """`large(name, bundles)`: a model with 70 to 100 MB of MLP weights, reordered, and its other bytes."""
    made = {}

    def get(name, bundles):
        if (name, bundles) not in made:
            path = tmp_path_factory.mktemp(name)
            model = make_model(name, hidden_size=256, intermediate_size=4096, num_hidden_layers=8)
            model.save_pretrained(path / "model")
            own = sum(p.nbytes for key, p in model.named_parameters() if ".mlp." not in key)
            config = ReorderConfig(placement="identity", tokens=192, sequence_length=64, bundles=bundles)
            calibration = [token_ids(64, seed=seed)[0] for seed in range(3)]
            reorder(path / "model", path / "copy", calibration, config)
            made[name, bundles] = path / "copy", own
        return made[name, bundles]

    return get


@pytest.mark.parametrize(
    ("name", "bundles", "budget", "keep", "recall"),
    [
        ("llama", "same", "10%", 1.0, 1.0),
        ("llama", "same", "25%", 1.0, 1.0),
        ("llama", "same", "50%", 0.25, 1.0),
        ("llama", "int8", "50%", 1.0, 1.0),
        ("llama", "int4", "75%", 1.0, 1.0),
        ("arcee", "same", "25%", 1.0, 0.95),
    ],
)
def test_loading_and_generating_stay_within_the_budget_and_a_constant(
    name, bundles, budget, keep, recall, large, reordered
):
    """RLIMIT_DATA stops every allocation beyond it; the weight files, which transformers maps whole, count.
    The peak resident set counts what is read of them.
    """
    directory, own = large(name, bundles)
    command = [sys.executable, "-c", PEAK, directory, reordered(name), budget, keep, recall, own, CONSTANT]
    run = subprocess.run(list(map(str, command)), capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    beyond, limited = run.stdout.splitlines()
    assert int(beyond) <= CONSTANT
    assert limited == "the limit is one"
