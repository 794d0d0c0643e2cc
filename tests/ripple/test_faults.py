"""Damage to any file of a directory, and drives that misbehave: an error that names the file, or no harm."""

import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from ripple_loader import reorder
from ripple_loader.checkpoint.shards import read_shards
from ripple_loader.format.layout import SIDECAR
from ripple_loader.format.sidecar import Sidecar
from ripple_loader.offline.trace import Trace
from ripple_loader.offline.verification import verify

from .conftest import CALIBRATION, SMALL, load, relative_error, token_ids

FIXTURES = settings(
    suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None, max_examples=40
)
SHARDS = {"max_shard_size": "20KB"}


def linked_copy(directory, out, but):
    """A copy of a directory in which all files but one are links."""
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir()
    for file in directory.iterdir():
        if file.name == but:
            shutil.copyfile(file, out / file.name)
        else:
            (out / file.name).symlink_to(file)
    return out / but


@pytest.mark.parametrize("share", [0.0, 0.01, 0.5, 0.999])
def test_every_file_cut_short_is_found(share, reordered, tmp_path):
    directory = reordered("qwen2", **SHARDS)
    files = [file.name for file in directory.iterdir() if file.name != "generation_config.json"]
    assert len(files) > 5
    for name in files:
        path = linked_copy(directory, tmp_path / "copy", name)
        os.truncate(path, min(int(path.stat().st_size * share), path.stat().st_size - 3))
        with pytest.raises((ValueError, OSError)):
            load(tmp_path / "copy")
        with pytest.raises((ValueError, OSError)) as error:  # transformers' own errors may not name the file
            list(verify(tmp_path / "copy"))
        assert name in str(error.value)


@pytest.mark.parametrize("kind", ["model-00002", "model.safetensors.index.json", SIDECAR])
def test_every_missing_file_is_named(kind, reordered, tmp_path):
    directory = reordered("qwen2", **SHARDS)
    name = next(file.name for file in directory.iterdir() if file.name.startswith(kind))
    linked_copy(directory, tmp_path / "copy", name).unlink()
    with pytest.raises((ValueError, OSError), match=r"model-00002|safetensors|neurons\.ripple"):
        load(tmp_path / "copy")


@FIXTURES
@given(junk=st.binary(min_size=1, max_size=300), where=st.integers(0, 2000))
def test_a_fuzzed_weight_file_is_read_within_its_bounds_or_refused(junk, where, saved, tmp_path):
    data = bytearray((saved("llama") / "model.safetensors").read_bytes())
    data[where : where + len(junk)] = junk
    (tmp_path / "model.safetensors").write_bytes(data)
    try:
        (shard,) = read_shards(tmp_path)
    except ValueError as error:
        message = str(error)
    else:
        message = "model.safetensors"
        assert all(0 <= spot.start <= spot.stop <= len(data) for spot in shard.tensors.values())
    assert "model.safetensors" in message


@FIXTURES
@given(text=st.text(max_size=200) | st.builds(lambda name: f'{{"weight_map": {{"a": "{name}"}}}}', st.text()))
def test_a_fuzzed_index_is_refused(text, tmp_path):
    (tmp_path / "model.safetensors.index.json").write_bytes(text.encode("utf-8", "surrogatepass"))
    with pytest.raises((ValueError, FileNotFoundError), match=r"index\.json|must be a whole safetensors"):
        read_shards(tmp_path)


@pytest.mark.parametrize("file", ["trace.json", "sequence-000001.safetensors"])
@pytest.mark.parametrize("share", [0.0, 0.3, 0.99])
def test_a_trace_cut_short_is_refused(file, share, traced, tmp_path):
    path = linked_copy(traced, tmp_path / "copy", file)
    os.truncate(path, int(path.stat().st_size * share))
    with pytest.raises(ValueError, match=str(tmp_path / "copy")):
        Trace(tmp_path / "copy")


@pytest.mark.parametrize(
    "change", [{"sequences": 10**15}, {"sequences": "4"}, {"sequences": None}, {"exact_zeros": ...}]
)
def test_a_trace_that_describes_itself_wrongly_is_refused(change, traced, tmp_path):
    path = linked_copy(traced, tmp_path / "copy", "trace.json")
    description = json.loads(path.read_text()) | change
    path.write_text(json.dumps({key: value for key, value in description.items() if value is not ...}))
    with pytest.raises(ValueError, match=r"are missing|is damaged"):
        Trace(tmp_path / "copy")


@pytest.fixture(scope="module")
def traced(saved, tmp_path_factory):
    from .test_trace import trace

    out = tmp_path_factory.mktemp("traced")
    trace(saved("llama"), out)
    return out


SECTIONS = ["bundles", "sketch", "vectors", "permutation", "predictor", "checks"]


@torch.no_grad()
@pytest.mark.parametrize("kind", SECTIONS)
@pytest.mark.parametrize(
    "options",
    [{"strategy": "dense"}, {}, {"dram_budget": "60KiB", "buffer": 1 << 14}, {"recall": 0.9}],
    ids=lambda options: ",".join(options) or "sparse",
)
@pytest.mark.filterwarnings("ignore:2 of 2 MLPs compute all neurons")
def test_damage_to_what_is_read_is_found_when_it_is_read(kind, options, reordered, tmp_path):
    """Wherever the flipped bit lies, nothing is computed with it: it is not read, or its place is named."""
    directory, ids = reordered("opt"), token_ids()
    sidecar = Sidecar(directory)
    expected = load(directory, **options)(ids).logits
    path = linked_copy(directory, tmp_path / "copy", SIDECAR)
    intact, refused = path.read_bytes(), 0
    for layer in range(2):
        start, size = sidecar.section(layer, kind)
        for share in (0.01, 0.4, 0.99):
            data = bytearray(intact)
            data[start + int(share * size)] ^= 0x40
            path.write_bytes(data)
            try:
                got = load(tmp_path / "copy", **options)(ids).logits
            except ValueError as error:
                message, refused = str(error), refused + 1
                assert f"{path} is damaged at byte" in message
                damaged = int(message.split("at byte ")[1].split(":")[0])
                assert start <= damaged <= start + int(share * size)
            else:
                assert relative_error(got, expected) < 1e-6
    read = {
        "sketch": "recall" not in options and options.get("strategy") != "dense",
        "predictor": "recall" in options,
        "permutation": False,
    }
    assert refused == (6 if read.get(kind, True) else 0)


def test_reads_are_not_checked_without_the_option(reordered, tmp_path):
    path = linked_copy(reordered("llama"), tmp_path / "copy", SIDECAR)
    start, size = Sidecar(tmp_path / "copy").section(0, "bundles")
    with path.open("r+b") as file:
        file.seek(start + size // 2)
        file.write(b"damaged")
    model = load(tmp_path / "copy", check_reads=False)
    assert model(token_ids()).logits.shape == (1, 24, 120)
    assert model.ripple_report.resident["checksums"] == 0
    with pytest.raises(ValueError, match="bundles of MLP 0 do not match"):
        load(tmp_path / "copy")(token_ids())


def _edit(path, change):
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path, {"format": "pt"})


@pytest.mark.parametrize("linear", ["gate_proj", "up_proj", "down_proj"])
def test_weights_edited_after_the_first_block_are_noticed(linear, reordered, tmp_path):
    shutil.copytree(reordered("llama"), tmp_path / "copy")
    path, name = tmp_path / "copy" / "model.safetensors", f"model.layers.1.mlp.{linear}.weight"
    load(tmp_path / "copy")  # a copy as it is
    _edit(path, lambda tensors: tensors[name].mul_(1.01))
    with pytest.raises(ValueError, match=r"those of .* differ"):
        load(tmp_path / "copy")


def test_one_byte_edited_in_place_is_noticed(saved, tmp_path):
    reorder(saved("llama"), tmp_path / "out", CALIBRATION, SMALL)
    path = tmp_path / "out" / "model.safetensors"
    os.utime(path)
    load(tmp_path / "out")  # touched, but the same
    spot = read_shards(tmp_path / "out")[0].tensors["model.layers.1.mlp.up_proj.weight"]
    with path.open("r+b") as file:
        file.seek(spot.start + 5001)
        byte = file.read(1)[0]
        file.seek(spot.start + 5001)
        file.write(bytes([byte ^ 1]))
    with pytest.raises(ValueError, match=r"those of .* differ"):
        load(tmp_path / "out")


@torch.no_grad()
def test_interrupted_system_calls_and_short_reads_change_nothing(reordered, monkeypatch):
    model, ids = load(reordered("llama"), dram_budget="50KiB", io_engine="threads"), token_ids()
    reference, real = model(ids).logits, os.preadv

    def short(descriptor, views, offset):
        return real(descriptor, [views[0][: max(512, len(views[0]) // 1024 * 512)]], offset)

    monkeypatch.setattr(os, "preadv", short)
    caught: list[int] = []
    before = signal.signal(signal.SIGALRM, lambda number, _: caught.append(number))
    signal.setitimer(signal.ITIMER_REAL, 1e-3, 1e-3)
    try:
        for _ in range(10):
            assert relative_error(model(ids).logits, reference) < 1e-6
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    assert len(caught) > 3


READER = """
import sys, torch
from transformers import AutoModelForCausalLM
from ripple_loader import RippleConfig
with torch.no_grad():
    while sys.stdin.readline():
        config = RippleConfig(dram_budget="50KiB")
        model = AutoModelForCausalLM.from_pretrained(sys.argv[1], quantization_config=config)
        logits = model(torch.arange(3, 27)[None]).logits
        print(logits.double().sum().item(), flush=True)
"""


def test_two_processes_read_while_a_third_reorders(saved, reordered, tmp_path):
    command = [sys.executable, "-c", READER, str(reordered("llama"))]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    readers = [subprocess.Popen(command, **pipes) for _ in range(2)]
    stopped, found = threading.Event(), [[], []]

    def ask(reader, sums):
        while not stopped.is_set() or not sums:
            reader.stdin.write("again\n")
            reader.stdin.flush()
            sums.append(float(reader.stdout.readline()))

    threads = [threading.Thread(target=ask, args=pair) for pair in zip(readers, found, strict=True)]
    for thread in threads:
        thread.start()
    try:
        for number in range(3):
            reorder(saved("llama"), tmp_path / f"out-{number}", CALIBRATION, SMALL)
    finally:
        stopped.set()
        for thread in threads:
            thread.join()
        for reader in readers:
            reader.communicate()
    reference = AutoModelForCausalLM.from_pretrained(saved("llama"))(torch.arange(3, 27)[None]).logits
    for total in found[0] + found[1]:
        assert total == pytest.approx(reference.double().sum().item(), rel=1e-4, abs=1e-2)
    for number in range(3):
        Sidecar(tmp_path / f"out-{number}").verify()


@torch.no_grad()
@pytest.mark.parametrize("keep", [1.0, 0.4])
def test_a_drive_that_becomes_ten_times_slower_changes_no_result(keep, reordered, monkeypatch):
    options = {"keep": keep, "dram_budget": "60KiB", "buffer": 1 << 14, "io_engine": "threads"}
    model, real = load(reordered("llama"), **options), os.preadv
    engine = model.model.layers[0].mlp.backend

    def generated():
        return model.generate(token_ids(4), max_new_tokens=12, do_sample=False)

    def after(seconds):
        return lambda *arguments: time.sleep(seconds) or real(*arguments)

    monkeypatch.setattr(os, "preadv", after(2e-4))
    expected, usual = generated(), max(engine._meter.factors)
    monkeypatch.setattr(os, "preadv", after(1e-2))  # where others are at work, 2e-4 takes longer
    assert torch.equal(generated(), expected)
    slow = max(engine._meter.factors)
    assert slow > 2 * usual
    monkeypatch.setattr(os, "preadv", real)
    for _ in range(3):
        assert torch.equal(generated(), expected)
    assert max(engine._meter.factors) < slow


INTERRUPTED = """
import os, signal, sys, threading, torch
from transformers import AutoModelForCausalLM
from ripple_loader import RippleConfig
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore it
directory, keep, io_engine = sys.argv[1], float(sys.argv[2]), sys.argv[3]
config = RippleConfig(dram_budget="60KiB", buffer=1 << 14, keep=keep, strategy="sparse", io_engine=io_engine)
model = AutoModelForCausalLM.from_pretrained(directory, quantization_config=config)
ids = torch.arange(3, 20)[None]
expected = model(ids).logits
for delay in (0.05, 0.08, 0.11):
    try:
        threading.Timer(delay, os.kill, (os.getpid(), signal.SIGINT)).start()
        while True:
            model.generate(ids, max_new_tokens=50, do_sample=False)
    except KeyboardInterrupt:
        torch.testing.assert_close(model(ids).logits, expected, rtol=1e-4, atol=1e-4)
del model
import gc, time
gc.collect()

def reading():
    return sum(thread.name.startswith("ripple-read") for thread in threading.enumerate())

until = time.monotonic() + 5
while reading() and time.monotonic() < until:
    time.sleep(0.01)
links = [f"/proc/self/fd/{fd}" for fd in os.listdir("/proc/self/fd")]
files = [os.readlink(link) for link in links if os.path.lexists(link)]
print(reading(), sum("neurons.ripple" in file for file in files))
"""


@pytest.mark.parametrize(
    ("keep", "io_engine"),
    [
        (0.4, "auto"),
        pytest.param(1.0, "auto", marks=pytest.mark.slow),
        pytest.param(0.4, "threads", marks=pytest.mark.slow),
    ],
)
def test_an_interrupted_generation_leaves_a_model_that_works_and_can_be_freed(keep, io_engine, reordered):
    command = [sys.executable, "-c", INTERRUPTED, str(reordered("llama")), str(keep), io_engine]
    run = subprocess.run(command, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert run.stdout.split() == ["0", "0"]
