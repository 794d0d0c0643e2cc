"""Without a second copy: the sidecar alone, with everything else streamed from the original weight files."""

import dataclasses
import hashlib
import os
import shutil
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from ripple_loader import ReorderConfig, RippleConfig, attach, reorder
from ripple_loader.checkpoint.shards import read_shards
from ripple_loader.cli import app
from ripple_loader.format.sidecar import Sidecar
from ripple_loader.offline.verification import verify
from tests.ripple.conftest import CALIBRATION, load, make_model, relative_error, token_ids

pytestmark = [
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore:fan_in_fan_out is set"),
]
ONLY = ReorderConfig(tokens=256, sequence_length=64, sidecar_only=True)


def digests(directory):
    return {
        path.name: (hashlib.sha256(path.read_bytes()).hexdigest(), path.stat().st_mtime_ns)
        for path in directory.iterdir()
    }


def written_bytes(directory):
    return sum(path.lstat().st_size for path in directory.iterdir())


@pytest.fixture
def made(tmp_path):
    """`made(name)`: the directory of a random model, and that of its sidecar."""

    def make(name, config=ONLY, **save):
        make_model(name).save_pretrained(tmp_path / "model", **save)
        before = digests(tmp_path / "model")
        reorder(tmp_path / "model", tmp_path / "out", CALIBRATION, config)
        assert digests(tmp_path / "model") == before
        return tmp_path / "model", tmp_path / "out"

    return make


@torch.no_grad()
@pytest.mark.parametrize("shards", ["1GB", "40KB"])
@pytest.mark.parametrize("name", ["llama", "opt", "gpt2", "phi3", "mixtral"])
def test_the_original_files_are_streamed_from(name, shards, made):
    model, out = made(name, max_shard_size=shards)
    assert len(read_shards(out)) == len(read_shards(model))
    assert not list(out.glob("*.safetensors"))
    ids, stock = token_ids(), AutoModelForCausalLM.from_pretrained(model)
    streamed = load(out)
    assert relative_error(streamed(ids).logits, stock(ids).logits) < 1e-5
    attached = AutoModelForCausalLM.from_pretrained(model)
    attach(attached, RippleConfig(dram_budget="1MiB"), out)
    assert relative_error(attached(ids).logits, stock(ids).logits) < 1e-5
    assert [check for check, _ in verify(out, model)][-1] == "streamed logits"
    plain = AutoModelForCausalLM.from_pretrained(out)
    assert torch.equal(plain(ids).logits, stock(ids).logits)


@torch.no_grad()
def test_rounded_bundles_beside_the_original(made):
    model, out = made("llama", dataclasses.replace(ONLY, bundles="int8"))
    stock = AutoModelForCausalLM.from_pretrained(model)
    assert relative_error(load(out)(token_ids()).logits, stock(token_ids()).logits) < 0.05


def test_no_more_is_written_than_the_mlps(made):
    model, out = made("llama")
    sidecar = Sidecar(out)
    others = sum(path.stat().st_size for path in model.iterdir() if path.suffix != ".safetensors")
    assert written_bytes(out) < (out / "neurons.ripple").stat().st_size + others + 8192
    assert sum(size for kind, size in sidecar.header.section_bytes().items() if kind == "bundles") > 0


@torch.no_grad()
def test_a_sidecar_without_sketches_is_smaller_and_streams_all_neurons(tmp_path, saved, reordered):
    config = ReorderConfig(tokens=256, sequence_length=64, sketches=False)
    reorder(saved("llama"), tmp_path / "out", CALIBRATION, config)
    header = Sidecar(tmp_path / "out").header
    saving = header.layers * 2 * header.neurons * header.hidden  # int8 rows of gate and up
    files = [directory / "neurons.ripple" for directory in (reordered("llama"), tmp_path / "out")]
    assert files[0].stat().st_size - files[1].stat().st_size == pytest.approx(saving, abs=8192)
    stock = AutoModelForCausalLM.from_pretrained(saved("llama"))
    assert relative_error(load(tmp_path / "out")(token_ids()).logits, stock(token_ids()).logits) < 1e-5
    with pytest.raises(ValueError, match="must have sketches to select neurons with"):
        load(tmp_path / "out", keep=0.5)


@torch.no_grad()
def test_a_relu_model_without_sketches_selects_with_predictors_only(tmp_path, saved):
    config = ReorderConfig(tokens=1024, sequence_length=64, sketches=False)
    reorder(saved("opt"), tmp_path / "out", [token_ids(64, seed=seed)[0] for seed in range(16)], config)
    stock, ids = AutoModelForCausalLM.from_pretrained(saved("opt")), token_ids()
    dense = load(tmp_path / "out", strategy="auto")
    assert relative_error(dense(ids).logits, stock(ids).logits) < 1e-5
    assert "the sidecar has no sketches" in dense.ripple_report.strategy
    load(tmp_path / "out", recall=0.99)(ids)
    with pytest.raises(ValueError, match="must have sketches to select neurons with"):
        load(tmp_path / "out")


@torch.no_grad()
@pytest.mark.parametrize("name", ["llama", "mixtral"])
def test_a_saved_model_is_the_original(name, made, tmp_path):
    model, out = made(name)
    load(out).save_pretrained(tmp_path / "saved")
    stock = AutoModelForCausalLM.from_pretrained(model).state_dict()
    written = AutoModelForCausalLM.from_pretrained(tmp_path / "saved").state_dict()
    assert written.keys() == stock.keys()
    assert all(torch.equal(written[key], stock[key]) for key in stock)


@torch.no_grad()
def test_saving_into_the_directory_itself_leaves_the_original_alone(made):
    model, out = made("llama")
    before = digests(model)
    load(out).save_pretrained(out)
    assert digests(model) == before
    stock = AutoModelForCausalLM.from_pretrained(model)
    for again in (AutoModelForCausalLM.from_pretrained(out), load(out)):
        assert relative_error(again(token_ids()).logits, stock(token_ids()).logits) < 1e-5


@torch.no_grad()
@pytest.mark.parametrize("name", ["llama", "gpt2", "phi3"])
def test_an_adapter_works_and_merges(name, made, tmp_path):
    import peft

    model, out = made(name)
    torch.manual_seed(0)
    config = peft.LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False)
    stock = peft.get_peft_model(AutoModelForCausalLM.from_pretrained(model), config)
    stock.save_pretrained(tmp_path / "adapter")
    ids, wanted = token_ids(), stock(token_ids()).logits
    streamed = peft.PeftModel.from_pretrained(load(out), tmp_path / "adapter")
    assert relative_error(streamed(ids).logits, wanted) < 1e-5
    streamed.merge_and_unload().save_pretrained(tmp_path / "merged")
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert relative_error(merged(ids).logits, wanted) < 1e-5


def test_an_adapter_of_the_directory_has_the_models_order(made, tmp_path):
    import peft

    model, out = made("llama")
    config = peft.LoraConfig(r=4, target_modules=["down_proj", "up_proj"], init_lora_weights=False)
    own = peft.get_peft_model(load(out), config)
    own.save_pretrained(tmp_path / "adapter")
    stock = peft.PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(model), tmp_path / "adapter")
    with torch.no_grad():
        assert relative_error(own(token_ids()).logits, stock(token_ids()).logits) < 1e-5


def test_a_moved_original_is_refused_and_can_be_linked_again(made, tmp_path):
    model, out = made("llama")
    model.rename(tmp_path / "elsewhere")
    with pytest.raises(FileNotFoundError, match=r"must find them in .*model, but nothing is there: move"):
        load(out)
    (out / "original").unlink()
    (out / "original").symlink_to(tmp_path / "elsewhere")
    load(out)


@pytest.mark.parametrize("how", ["in place", "replaced"])
def test_a_changed_original_is_refused(how, made):
    model, out = made("llama")
    tensors = load_file(model / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.weight"][0] += 1
    if how == "replaced":
        (model / "model.safetensors").unlink()
    save_file(tensors, model / "model.safetensors", {"format": "pt"})
    os.utime(model / "model.safetensors")
    with pytest.raises(ValueError, match=r"must lie beside the weights .* those of .*model differ"):
        load(out)


def test_a_copy_of_the_original_is_as_good(made, tmp_path):
    model, out = made("llama")
    shutil.copytree(model, tmp_path / "copy")
    shutil.rmtree(model)
    (tmp_path / "copy").rename(model)
    load(out)


def test_the_command_line_option(saved, tmp_path):
    from typer.testing import CliRunner

    (tmp_path / "text.jsonl").write_text('{"text": "a"}\n')
    trace = tmp_path / "trace"
    from ripple_loader.checkpoint.source import open_source
    from ripple_loader.offline.trace import trace_source

    trace_source(open_source(saved("llama")), [token_ids(64)], ReorderConfig(), trace)
    options = ["--trace", str(trace), "--sidecar-only", "--no-sketches", "--out", str(tmp_path / "out")]
    result = CliRunner().invoke(app, ["reorder", str(saved("llama")), *options])
    assert result.exit_code == 0, result.output
    header = Sidecar(tmp_path / "out").header
    assert header.in_original_order
    assert not header.sketches


MEASURE = """
import resource, sys, torch
from pathlib import Path
from ripple_loader.checkpoint.source import open_source
from ripple_loader.offline.orders import plan_orders
from ripple_loader.offline.trace import Trace
from ripple_loader.offline.writing import write_copy
from ripple_loader.config import ReorderConfig
from ripple_loader.files import Workspace
model, trace, out = map(Path, sys.argv[1:])
config = ReorderConfig(sidecar_only=True, partners=4, two_opt=False)
source = open_source(model)
plan = plan_orders(source, Trace(trace), config, Workspace(out.parent))
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10
write_copy(source, plan, Trace(trace), out)
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10) - before)
"""


def test_writing_takes_the_memory_of_a_few_mlps(tmp_path):
    from ripple_loader.checkpoint.source import open_source
    from ripple_loader.offline.trace import trace_source

    sizes = {"hidden_size": 256, "intermediate_size": 1024, "num_hidden_layers": 16}
    make_model("llama", **sizes).save_pretrained(tmp_path / "model")
    source, trace = open_source(tmp_path / "model"), tmp_path / "trace"
    trace_source(source, [token_ids(64)], ReorderConfig(), trace)
    (tmp_path / "out").mkdir()
    command = [sys.executable, "-c", MEASURE, *map(str, (tmp_path / "model", trace, tmp_path / "out"))]
    peak = int(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    mlps = Sidecar(tmp_path / "out").header.weight_bytes
    assert peak < 8 * mlps // 16 + (8 << 20) < mlps
    assert written_bytes(tmp_path / "out") < 1.3 * mlps
