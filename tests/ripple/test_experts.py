"""Mixtures of experts: each routed expert is an MLP of its own, and the others are not read."""

import os

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM

from ripple_loader.checkpoint.shards import read_shards
from ripple_loader.format.sidecar import Sidecar
from ripple_loader.offline.reordering import open_reorderable
from ripple_loader.offline.verification import verify

from .conftest import load, relative_error, token_ids

NAMES = ["mixtral", "olmoe", "qwen2_moe", "qwen3_moe"]
STACKED = {"save_original_format": False}  # a layer's experts in one tensor, as transformers 5 holds them


@torch.no_grad()
@pytest.mark.parametrize("save", [{}, STACKED], ids=["one by one", "stacked"])
@pytest.mark.parametrize("name", NAMES)
def test_only_routed_experts_are_read(name, save, reordered, monkeypatch):
    model = load(reordered(name, **save), dram_budget="200KiB", buffer=1 << 14, io_engine="threads")
    routers = [module for path, module in model.named_modules() if path.endswith("mlp.gate")]
    routed: list[set[int]] = []
    for router in routers:
        router.register_forward_hook(lambda *args: routed.append(set(args[2][2].flatten().tolist())))
    sidecar = Sidecar(reordered(name, **save))
    header, read, real = sidecar.header, set(), os.preadv

    def noted(descriptor, views, offset):
        for mlp in range(header.layers):
            start, size = sidecar.section(mlp, "bundles")
            if offset < start + size and offset + len(views[0]) > start:
                read.add(mlp)
        return real(descriptor, views, offset)

    monkeypatch.setattr(os, "preadv", noted)
    model(token_ids(1))
    assert len(routed) * header.experts == header.layers
    wanted = {layer * header.experts + expert for layer, chosen in enumerate(routed) for expert in chosen}
    assert read == wanted
    assert len(wanted) < header.layers


@torch.no_grad()
@pytest.mark.parametrize("name", ["mixtral", "qwen3_moe"])
def test_keep_and_cache_work_on_experts(name, reordered):
    exact, half = load(reordered(name)), load(reordered(name), keep=0.5)
    error = relative_error(half(token_ids()).logits, exact(token_ids()).logits)
    assert 0 < error < 0.7
    report = half.ripple_report
    assert report.tokens == 24
    assert report.layers == 2
    before = report.hits
    half(token_ids())
    assert report.hits > before


def test_experts_of_a_layer_with_a_missing_tensor_are_named(saved, tmp_path):
    for file in saved("mixtral").iterdir():
        (tmp_path / file.name).symlink_to(file)
    path = tmp_path / "model.safetensors"
    tensors = load_file(path)
    del tensors["model.layers.1.block_sparse_moe.experts.2.w3.weight"]
    path.unlink()
    save_file(tensors, path, {"format": "pt"})
    with pytest.raises(ValueError, match="weight of w3 of layer 1, expert 2"):
        open_reorderable(tmp_path)


@torch.no_grad()
def test_dense_layers_and_shared_experts_stay_with_the_model(reordered):
    model = load(reordered("qwen2_moe"))
    stock = AutoModelForCausalLM.from_pretrained(reordered("qwen2_moe"))
    names = {name for name, _ in model.named_parameters()}
    assert "model.layers.1.mlp.gate_proj.weight" in names
    assert "model.layers.0.mlp.shared_expert.gate_proj.weight" in names
    assert {name for name, _ in stock.named_parameters()} - names == {
        f"model.layers.{layer}.mlp.experts.{kind}"
        for layer in (0, 2)
        for kind in ("gate_up_proj", "down_proj")
    }


@torch.no_grad()
@pytest.mark.parametrize(
    ("name", "save"),
    [*((name, STACKED) for name in NAMES), ("qwen2_moe", STACKED | {"max_shard_size": "20KB"})],
)
def test_experts_in_one_tensor_stream_as_experts_one_by_one(name, save, saved, reordered):
    stacked, sidecar = Sidecar(reordered(name, **save)), Sidecar(reordered(name))
    held = {tensor for shard in read_shards(reordered(name, **save)) for tensor in shard.tensors}
    assert "model.layers.0.mlp.experts.gate_up_proj" in held
    assert not any(".experts.0." in tensor for tensor in held)
    assert stacked.header.experts == sidecar.header.experts
    for mlp in range(sidecar.header.layers):
        assert torch.equal(stacked.bundles(mlp), sidecar.bundles(mlp))
    assert len(dict(verify(reordered(name, **save), saved(name, **save)))) == 7
    stock = AutoModelForCausalLM.from_pretrained(saved(name))
    assert relative_error(load(reordered(name, **save))(token_ids()).logits, stock(token_ids()).logits) < 1e-5


def test_experts_stacked_in_a_layout_that_is_not_known_are_refused(saved, tmp_path):
    for file in saved("qwen3_moe", **STACKED).iterdir():
        (tmp_path / file.name).symlink_to(file)
    path = tmp_path / "model.safetensors"
    tensors = load_file(path)
    for name, tensor in tensors.items():
        if name.endswith("gate_up_proj"):
            tensors[name] = tensor.transpose(1, 2).contiguous()
    path.unlink()
    save_file(tensors, path, {"format": "pt"})
    with pytest.raises(ValueError, match=r"gate_up_proj in .* must be \(96, 32\).* got \(32, 96\)"):
        open_reorderable(tmp_path)


def test_experts_with_a_gate_of_their_own_kind_are_refused(tmp_path):
    AutoConfig.for_model("gpt_oss", num_hidden_layers=1).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"found none in a gpt_oss: .* needs an entry in"):
        open_reorderable(tmp_path)
