"""Models as they are found: hub ids, `pytorch_model.bin`, variants; other formats are refused by name."""

import json

import pytest
import torch
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

from ripple_loader import ReorderConfig, RippleConfig, attach, reorder
from ripple_loader.checkpoint.shards import read_shard
from ripple_loader.checkpoint.source import open_source
from ripple_loader.cli import app
from ripple_loader.offline.trace import trace_source
from ripple_loader.offline.verification import verify
from tests.ripple.conftest import CALIBRATION, COMMIT, SMALL, load, make_model, relative_error, token_ids

ONLY = ReorderConfig(tokens=256, sequence_length=64, sidecar_only=True)


def same(out, model, **options):
    with torch.no_grad():
        stock = AutoModelForCausalLM.from_pretrained(model, **options)
        return relative_error(load(out)(token_ids()).logits, stock(token_ids()).logits) < 1e-5


@pytest.fixture
def cache(hub_cache):
    return hub_cache


@pytest.mark.parametrize("config", [SMALL, ONLY], ids=["copy", "sidecar only"])
def test_a_model_of_the_hub_is_reordered(config, cache, saved, tmp_path):
    cache(saved("llama"), "somebody/model")
    for number, revision in enumerate([None, "main", COMMIT]):
        reorder("somebody/model", tmp_path / f"out{number}", CALIBRATION, config, revision=revision)
        assert same(tmp_path / f"out{number}", saved("llama"))


@torch.no_grad()
def test_a_reordered_model_of_the_hub_is_streamed(cache, reordered, tmp_path):
    cache(reordered("llama"), "somebody/reordered")
    stock, ids = AutoModelForCausalLM.from_pretrained("somebody/reordered"), token_ids()
    streamed = load("somebody/reordered")
    assert relative_error(streamed(ids).logits, stock(ids).logits) < 1e-5
    streamed.save_pretrained(tmp_path / "saved")
    assert same(reordered("llama"), tmp_path / "saved")
    wanted = stock(ids).logits
    attach(stock, RippleConfig(dram_budget="1MiB"))
    assert relative_error(stock(ids).logits, wanted) < 1e-5


def test_a_sidecar_that_is_not_in_the_cache_is_asked_for(cache, reordered):
    snapshot = cache(reordered("llama"), "somebody/reordered")
    (snapshot / "neurons.ripple").unlink()
    with pytest.raises(
        FileNotFoundError, match=r"somebody/reordered .* neurons\.ripple could not be fetched"
    ):
        load("somebody/reordered")


@pytest.mark.parametrize("name", ["somebody/other", "other"])
def test_a_model_that_cannot_be_fetched_is_refused(name, cache, tmp_path):
    with pytest.raises(
        FileNotFoundError, match=rf"^{name} must be a directory or a model of the Hugging Face"
    ):
        reorder(name, tmp_path / "out", CALIBRATION, SMALL)


def pickled(directory, source, *, shards=1, prefix="pytorch_model"):
    """Save a model as transformers did before safetensors, with its tied weights twice."""
    directory.mkdir()
    model = AutoModelForCausalLM.from_pretrained(source)
    model.config.save_pretrained(directory)
    items = list(model.state_dict().items())
    if shards == 1:
        torch.save(dict(items), directory / f"{prefix}.bin")
        return directory
    files, index = {}, {}
    for number in range(shards):
        name = f"{prefix}-{number + 1:05}-of-{shards:05}.bin"
        files[name] = dict(items[number::shards])
        index |= dict.fromkeys(files[name], name)
        torch.save(files[name], directory / name)
    content = json.dumps({"metadata": {"total_size": 1}, "weight_map": index})
    (directory / "pytorch_model.bin.index.json").write_text(content)
    return directory


@pytest.mark.parametrize("config", [SMALL, ONLY], ids=["copy", "sidecar only"])
@pytest.mark.parametrize("shards", [1, 3])
@pytest.mark.parametrize("name", ["llama", "qwen2", "gpt2"])
def test_pytorch_model_bin_is_reordered(name, shards, config, saved, tmp_path):
    model = pickled(tmp_path / "model", saved(name), shards=shards)
    reorder(model, tmp_path / "out", CALIBRATION, config)
    assert same(tmp_path / "out", model)
    assert [check for check, _ in verify(tmp_path / "out", model)][-1] == "streamed logits"
    if config is SMALL:
        assert not [path for path in (tmp_path / "out").iterdir() if "bin" in path.name]
        AutoModelForCausalLM.from_pretrained(tmp_path / "out", use_safetensors=True)
    load(tmp_path / "out").save_pretrained(tmp_path / "saved")
    assert same(tmp_path / "out", tmp_path / "saved")


def test_tensors_of_a_pickled_file_are_found_in_it(tmp_path):
    whole = torch.arange(60.0).view(6, 10)
    tensors = {"a": whole[2:4], "b": torch.ones(3, dtype=torch.bfloat16), "c": torch.tensor(7)}
    torch.save(tensors, tmp_path / "x.bin")
    spots = read_shard(tmp_path / "x.bin").tensors
    assert torch.equal(spots["a"].read(), tensors["a"])
    assert torch.equal(spots["b"].read(), tensors["b"])
    assert spots["c"].dtype == "I64"


class Evil:
    def __reduce__(self):
        return (print, ("ran",))


@pytest.mark.parametrize("kind", ["code", "cut", "legacy", "strided", "list"])
def test_other_pickled_files_are_refused(kind, tmp_path, capfd):
    path, tensors = tmp_path / "pytorch_model.bin", {"a": torch.ones(50, 50)}
    content = {"code": {"a": Evil()}, "strided": {"a": torch.ones(4, 5).T}, "list": [torch.ones(2)]}
    torch.save(content.get(kind, tensors), path, _use_new_zipfile_serialization=kind != "legacy")
    if kind == "cut":
        path.write_bytes(path.read_bytes()[:2000])
    with pytest.raises(ValueError, match=r"pytorch_model\.bin must be a whole file of tensors"):
        read_shard(path)
    assert "ran" not in capfd.readouterr().out


@pytest.mark.parametrize("config", [SMALL, ONLY], ids=["copy", "sidecar only"])
@pytest.mark.parametrize("size", ["1GB", "40KB"])
def test_a_variant_is_reordered(size, config, tmp_path):
    plain, variant = make_model("llama"), make_model("llama")
    variant.model.layers[0].mlp.up_proj.weight.data.mul_(2)
    plain.save_pretrained(tmp_path / "model", max_shard_size=size)
    variant.save_pretrained(tmp_path / "model", variant="fp16", max_shard_size=size)
    reorder(tmp_path / "model", tmp_path / "out", CALIBRATION, config, variant="fp16")
    assert same(tmp_path / "out", tmp_path / "model", variant="fp16")
    assert not [path for path in (tmp_path / "out").iterdir() if "fp16" in path.name]
    with pytest.raises(FileNotFoundError, match=r"must hold model\.int8\.safetensors"):
        open_source(tmp_path / "model", "int8")


def test_the_command_line_takes_a_hub_id(cache, saved, tmp_path):
    cache(saved("llama"), "somebody/model")
    trace_source(open_source(saved("llama")), [token_ids(64)], ReorderConfig(), tmp_path / "trace")
    options = ["--trace", str(tmp_path / "trace"), "--revision", "main", "--out", str(tmp_path / "out")]
    result = CliRunner().invoke(app, ["reorder", "somebody/model", *options])
    assert result.exit_code == 0, result.output
    assert same(tmp_path / "out", saved("llama"))


def test_every_command_that_takes_a_hub_id_takes_a_revision(cache, saved, reordered, tmp_path):
    cache(saved("llama"), "somebody/model")
    cache(reordered("llama"), "somebody/reordered")
    (tmp_path / "text.jsonl").write_text(json.dumps({"text": "x"}) + "\n")
    trace_source(
        open_source(saved("llama")),
        [ids[None] for ids in CALIBRATION[:4]],
        ReorderConfig(),
        tmp_path / "trace",
    )
    trace, out = ["--trace", str(tmp_path / "trace")], str(tmp_path / "new")
    text = ["--calibration", str(tmp_path / "text.jsonl")]
    commands = {
        "trace": ["trace", "somebody/model", *text, "--out", out],
        "reorder": ["reorder", "somebody/model", *trace, "--out", out],
        "simulate": ["simulate", "somebody/model", *trace, "--tokens", "64", "--device", "ufs-4.0"],
        "report": ["report", "somebody/model", *trace, "--tokens", "64", "--out", str(tmp_path / "x.html")],
        "verify": ["verify", str(reordered("llama")), "--original", "somebody/model"],
        "generate": ["generate", "somebody/reordered", "a"],
    }
    for name, arguments in commands.items():
        result = CliRunner().invoke(app, [*arguments, "--revision", "nowhere"])
        assert result.exit_code == 2, name
        assert "could not be fetched" in result.output, name
    for name in ("reorder", "simulate", "report", "verify"):
        result = CliRunner().invoke(app, [*commands[name], "--revision", COMMIT])
        assert result.exit_code == 0, result.output
