import dataclasses
import errno
import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections import namedtuple

import pytest
import torch
from datasets import Dataset
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM

from ripple_loader import ReorderConfig, reorder
from ripple_loader.files import Workspace
from ripple_loader.format.sidecar import Sidecar
from ripple_loader.format.writer import SidecarWriter
from ripple_loader.model.architectures import ARCHITECTURES
from ripple_loader.offline import verification
from ripple_loader.offline.verification import verify

from .conftest import (
    CALIBRATION,
    GROUPED,
    MODELS,
    SMALL,
    least_budget,
    load,
    make_model,
    relative_error,
    token_ids,
)


@torch.no_grad()
@pytest.mark.parametrize("name", MODELS)
def test_the_copy_is_the_same_model_to_everyone(name, saved, reordered):
    original = AutoModelForCausalLM.from_pretrained(saved(name))
    copy, info = AutoModelForCausalLM.from_pretrained(reordered(name), output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    ids = token_ids(batch=2)
    assert relative_error(copy(ids).logits, original(ids).logits) < 1e-5
    options = {"max_new_tokens": 12, "do_sample": False}
    assert torch.equal(copy.generate(ids, **options), original.generate(ids, **options))


STOCK = """
import json, sys, torch
from transformers import AutoModelForCausalLM
for directory in sys.argv[1:]:
    model = AutoModelForCausalLM.from_pretrained(directory)
    ids = model.generate(torch.arange(3, 27)[None], max_new_tokens=12, do_sample=False)
    print(json.dumps(ids.tolist()))
assert "ripple_loader" not in sys.modules
"""


def test_transformers_alone_gives_the_same_text(saved, reordered, tmp_path):
    for file in reordered("llama").iterdir():
        (tmp_path / file.name).symlink_to(file)
    (tmp_path / "config.json").unlink()
    config = AutoConfig.from_pretrained(reordered("llama"))
    config.quantization_config = {"quant_method": "ripple", "dram_budget": "1MiB"}
    config.save_pretrained(tmp_path)
    directories = [str(saved("llama")), str(reordered("llama")), str(tmp_path)]
    run = subprocess.run([sys.executable, "-c", STOCK, *directories], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    original, copy, naming_ripple = run.stdout.splitlines()
    assert original == copy == naming_ripple


def test_only_mlp_tensors_change_and_headers_stay(saved, reordered):
    base, copy = saved("llama") / "model.safetensors", reordered("llama") / "model.safetensors"
    before, after = load_file(base), load_file(copy)
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert all("mlp" in name for name in changed)
    assert not any(name.endswith("down_proj.bias") for name in changed)
    order = torch.from_numpy(Sidecar(reordered("llama")).permutation(1)).long()
    name = "model.layers.1.mlp.{}.weight"
    assert torch.equal(after[name.format("up_proj")], before[name.format("up_proj")][order])
    assert torch.equal(after[name.format("down_proj")], before[name.format("down_proj")][:, order])
    with safe_open(base, "pt") as one, safe_open(copy, "pt") as other:
        assert one.metadata() == other.metadata()
    header = Sidecar(reordered("llama")).header
    assert header.base == {"model.safetensors": hashlib.sha256(base.read_bytes()).hexdigest()}


@torch.no_grad()
def test_a_sharded_checkpoint(saved, reordered):
    copy = reordered("qwen2", max_shard_size="20KB")
    assert (copy / "model.safetensors.index.json").exists()
    assert len(list(copy.glob("*.safetensors"))) > 2
    original, ids = AutoModelForCausalLM.from_pretrained(saved("qwen2")), token_ids()
    for model in (AutoModelForCausalLM.from_pretrained(copy), load(copy)):
        assert relative_error(model(ids).logits, original(ids).logits) < 1e-5


def test_the_profile_tells_how_the_order_was_found(reordered):
    profile = Sidecar(reordered("opt")).header.profile
    assert profile["placement"] == "linked"
    assert profile["tokens"] == SMALL.tokens
    assert 0 < profile["activity"] < 1
    assert profile["reads"] < profile["reads_identity"]


class Tokenizer:
    def __call__(self, text):
        return type("Encoding", (), {"input_ids": [3 + ord(letter) % 100 for letter in text]})


@pytest.mark.parametrize(
    ("calibration", "tokens"),
    [
        (["some text", "more of it"], 19),
        ([{"text": "rows of text"}], 12),
        ([{"input_ids": [5, 6, 7]}], 3),
        ([torch.tensor([[5, 6]])], 2),
        ([torch.ones(300, dtype=torch.int64)], SMALL.tokens),
        (Dataset.from_list([{"text": "a dataset"}, {"text": "of two"}]), 15),
        (Dataset.from_list([{"input_ids": [5, 6, 7]}] * 200).to_iterable_dataset(), SMALL.tokens),
    ],
)
def test_kinds_of_calibration(calibration, tokens, saved, tmp_path, monkeypatch):
    monkeypatch.setattr("transformers.AutoTokenizer.from_pretrained", lambda *_: Tokenizer())
    plan = reorder(saved("llama"), tmp_path / "out", calibration, SMALL)
    assert plan.profile["tokens"] == tokens


@pytest.mark.parametrize(
    ("calibration", "error", "message"),
    [
        ([], ValueError, "at least one token"),
        ("text", TypeError, "got one str"),
        ([3.5], TypeError, "got float"),
        ([{"a": 1}], TypeError, "dict"),
    ],
)
def test_bad_calibration(calibration, error, message, saved, tmp_path):
    with pytest.raises(error, match=message):
        reorder(saved("llama"), tmp_path / "out", calibration, SMALL)
    assert not list(tmp_path.iterdir())


def run(model, out, **options):
    return reorder(model, out, CALIBRATION, options.pop("config", SMALL))


def test_missing_model_directory(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"nowhere must be a model directory"):
        run(tmp_path / "nowhere", tmp_path / "out")


def test_unsupported_architecture(tmp_path):
    config = AutoConfig.for_model("bloom", hidden_size=32, n_layer=1, n_head=2, vocab_size=50)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "model")
    with pytest.raises(ValueError, match=r"must find a module in each layer .* found none in a bloom"):
        run(tmp_path / "model", tmp_path / "out")


def test_quantized_checkpoint(tmp_path):
    config = make_model("llama").config
    config.quantization_config = {"quant_method": "quanto", "weights": "int8"}
    config.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="is quantized with quanto"):
        run(tmp_path, tmp_path / "out")


def test_integer_weights(saved, tmp_path):
    shutil.copytree(saved("llama"), tmp_path / "model")
    path = tmp_path / "model" / "model.safetensors"
    tensors = {k: v.to(torch.int8) if "mlp" in k else v for k, v in load_file(path).items()}
    save_file(tensors, path, {"format": "pt"})
    with pytest.raises(ValueError, match="got I8 in"):
        run(tmp_path / "model", tmp_path / "out")


def test_a_reordered_directory_is_not_reordered_again(reordered, tmp_path):
    with pytest.raises(ValueError, match="reordered already"):
        run(reordered("llama"), tmp_path / "out")


def test_no_safetensors(saved, tmp_path):
    shutil.copy(saved("llama") / "config.json", tmp_path)
    with pytest.raises(FileNotFoundError, match="holds none of them"):
        run(tmp_path, tmp_path / "out")


def test_truncated_shard(saved, tmp_path):
    shutil.copytree(saved("llama"), tmp_path / "model")
    path = tmp_path / "model" / "model.safetensors"
    os.truncate(path, path.stat().st_size - 10)
    with pytest.raises(ValueError, match=rf"{path} must be a whole safetensors file"):
        run(tmp_path / "model", tmp_path / "out")


@pytest.mark.parametrize("name", ["../secret.safetensors", "/etc/passwd", 7])
def test_an_index_that_points_outside_the_directory(name, saved, tmp_path):
    shutil.copy(saved("llama") / "config.json", tmp_path)
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": name}}))
    with pytest.raises(ValueError, match="must name files in its own directory"):
        run(tmp_path, tmp_path / "out")


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"weight_map": [1]}', '{"weight_map": {"a": [1]}}'])
def test_an_index_that_is_none(text, saved, tmp_path):
    shutil.copy(saved("llama") / "config.json", tmp_path)
    (tmp_path / "model.safetensors.index.json").write_text(text)
    with pytest.raises(ValueError, match=r"index\.json must"):
        run(tmp_path, tmp_path / "out")


def test_an_index_of_missing_files(saved, tmp_path):
    shutil.copy(saved("llama") / "config.json", tmp_path)
    (tmp_path / "model.safetensors.index.json").write_text('{"weight_map": {"a": "b.safetensors"}}')
    with pytest.raises(FileNotFoundError, match=r"names b\.safetensors"):
        run(tmp_path, tmp_path / "out")


def test_existing_output_is_left_alone(saved, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "keep").write_text("me")
    with pytest.raises(FileExistsError, match="out must not exist yet"):
        run(saved("llama"), tmp_path / "out")
    assert (tmp_path / "out" / "keep").read_text() == "me"


def test_no_disk_space(saved, tmp_path, monkeypatch):
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(10, 9, 1))
    monkeypatch.setattr(
        "ripple_loader.offline.reordering.trace_source", pytest.fail
    )  # it is found before the trace
    with pytest.raises(OSError, match=r"must have .* MiB free"):
        run(saved("llama"), tmp_path / "new" / "out")
    assert not list(tmp_path.iterdir())


def test_a_full_disk_leaves_the_trace_and_no_output(saved, tmp_path, monkeypatch, capsys):
    def stop(self, *_):
        if self.layout.file_bytes > self._file.tell() > len(self.layout.container) + 10_000:
            raise OSError(errno.ENOSPC, "No space left on device")
        return original(self, *_)

    original = SidecarWriter._write
    with monkeypatch.context() as patch:
        patch.setattr(SidecarWriter, "_write", stop)
        with pytest.raises(OSError, match="No space left"):
            run(saved("llama"), tmp_path / "out")
    work = tmp_path / ".out.partial"
    assert list(tmp_path.iterdir()) == [work]
    assert sorted(path.name for path in work.iterdir() if path.is_dir()) == ["orders", "trace"]
    assert f"{work} keeps the work so far" in capsys.readouterr().err
    run(saved("llama"), tmp_path / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out"]


KILLED = """
import sys, time, torch
from pathlib import Path
from ripple_loader import ReorderConfig, reorder
from ripple_loader.format import writer
from ripple_loader.offline import trace, writing
ready = Path(sys.argv[2]).parent / "ready"
kind, seen = sys.argv[3], []
def pause(at):
    seen.append(at)
    if len(seen) == 2:
        ready.touch()
        time.sleep(60)
module, name = {
    "trace": (trace, "save_file"),
    "weights": (writing, "permuted"),
    "sidecar": (writer.SidecarWriter, "write_layer"),
}[kind]
original = getattr(module, name)
def paused(*arguments):
    pause(arguments)
    return original(*arguments)
setattr(module, name, paused)
calibration = [torch.arange(3, 90) for _ in range(4)]
reorder(sys.argv[1], sys.argv[2], calibration, ReorderConfig(tokens=256, sequence_length=64, workers=1))
"""


@pytest.mark.parametrize("stage", ["trace", "weights", "sidecar"])
def test_a_run_killed_in_any_stage_is_gone_on_with(stage, saved, tmp_path, monkeypatch):
    sharded = saved("llama", max_shard_size="40KB")
    process = subprocess.Popen([sys.executable, "-c", KILLED, str(sharded), str(tmp_path / "out"), stage])
    try:
        while not (tmp_path / "ready").exists():
            assert process.poll() is None
            time.sleep(0.05)
        with pytest.raises(FileExistsError, match="another is writing it"):
            run(sharded, tmp_path / "out")
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
    assert not (tmp_path / "out").exists()
    work = tmp_path / ".out.partial"
    done = [path for path in work.rglob("*") if path.is_file() and not path.name.startswith(".")]
    before = {path.name: path.stat().st_mtime_ns for path in done}
    seen, original = {}, Workspace.stage

    def noted(self, name, key):
        path = original(self, name, key)
        seen.update({file.name: file.stat().st_mtime_ns for file in path.iterdir()})
        return path

    monkeypatch.setattr(Workspace, "stage", noted)
    calibration = [torch.arange(3, 90) for _ in range(4)]
    config = ReorderConfig(tokens=256, sequence_length=64)
    reorder(sharded, tmp_path / "out", calibration, config)
    kept = {name for name, time_ns in before.items() if seen.get(name) == time_ns}
    assert any(name.startswith("sequence-") for name in kept)
    assert any(name.endswith(".npz") for name in kept) == (stage != "trace")
    assert stage != "sidecar" or any(name.startswith("model-") for name in kept)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "ready"]
    assert not list((tmp_path / "out").glob(".*"))
    assert len(dict(verify(tmp_path / "out", sharded))) == 7


def test_another_run_to_the_same_directory_does_not_take_what_was_left(saved, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(SidecarWriter, "write_layer", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            run(saved("llama"), tmp_path / "out")
    assert (tmp_path / ".out.partial" / Workspace.OUTPUT / "model.safetensors").exists()
    run(saved("mistral"), tmp_path / "out")
    assert len(dict(verify(tmp_path / "out", saved("mistral")))) == 7


@torch.no_grad()
@pytest.mark.parametrize("bundles", ["float16", "int8", "int4"])
@pytest.mark.parametrize("name", ["llama", "opt", "mixtral"])
def test_bundles_may_be_stored_otherwise(bundles, name, saved, tmp_path):
    config = dataclasses.replace(SMALL, bundles=bundles)
    run(saved(name), tmp_path / "out", config=config)
    stock, model = AutoModelForCausalLM.from_pretrained(saved(name)), load(tmp_path / "out")
    error = relative_error(model(token_ids()).logits, stock(token_ids()).logits)
    assert 0 < error < {"float16": 0.01, "int8": 0.05, "int4": 0.7}[bundles]
    checks = dict(verify(tmp_path / "out", saved(name)))
    assert "differ by" in checks["streamed logits"]
    assert 0 < Sidecar(tmp_path / "out").header.profile["rounding_error"] < 0.1
    small = load(tmp_path / "out", dram_budget=least_budget(tmp_path / "out", buffer=1 << 14), buffer=1 << 14)
    for _ in range(2):
        assert relative_error(small(token_ids()).logits, model(token_ids()).logits) < 1e-5


@pytest.mark.parametrize("placement", ["identity", "random", "frequency", "spectral"])
def test_other_placements(placement, saved, tmp_path):
    run(saved("opt"), tmp_path / "out", config=ReorderConfig(placement=placement, tokens=64))
    original, copy = (AutoModelForCausalLM.from_pretrained(d) for d in (saved("opt"), tmp_path / "out"))
    assert relative_error(copy(token_ids()).logits, original(token_ids()).logits) < 1e-5


@pytest.mark.parametrize(
    ("model_type", "entry"), [("apertus", "arcee"), ("bitnet", "llama"), ("cohere", "opt")]
)
def test_an_entry_that_does_not_fit_is_refused_before_the_copy_has_its_name(
    model_type, entry, tmp_path, monkeypatch
):
    monkeypatch.setitem(MODELS, model_type, {"model_type": model_type, **GROUPED})
    monkeypatch.setitem(ARCHITECTURES, model_type, ARCHITECTURES[entry])
    make_model(model_type).save_pretrained(tmp_path / "model")
    with pytest.raises(
        ValueError, match=r"the apertus must compute the same|must hold the weight|ffn_sub_norm|differ"
    ):
        reorder(tmp_path / "model", tmp_path / "out", CALIBRATION, SMALL)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("bundles", ["int8", "float16"])
def test_rounded_bundles_are_compared_with_the_stock_model_of_rounded_weights(
    bundles, saved, tmp_path, monkeypatch
):
    seen = []
    real = verification._difference
    monkeypatch.setattr(verification, "_difference", lambda *pair: seen.append(real(*pair)) or seen[-1])
    for name in ("llama", "gpt2", "phi3", "opt", "mixtral"):
        reorder(saved(name), tmp_path / name, CALIBRATION, dataclasses.replace(SMALL, bundles=bundles))
    assert len(seen) == 10
    assert max(seen) < 1e-5


def test_a_model_without_a_tokenizer_is_told_so(saved, tmp_path):
    with pytest.raises(ValueError, match="must hold a tokenizer to read texts with"):
        reorder(saved("llama"), tmp_path / "out", ["some text"], SMALL)


def test_a_model_with_code_of_its_own_is_refused(saved, tmp_path):
    shutil.copytree(saved("llama"), tmp_path / "model")
    config = json.loads((tmp_path / "model" / "config.json").read_text())
    config |= {"model_type": "own", "auto_map": {"AutoConfig": "own.OwnConfig"}}
    (tmp_path / "model" / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="must be a model of transformers' own, but runs code"):
        reorder(tmp_path / "model", tmp_path / "out", CALIBRATION, SMALL)
