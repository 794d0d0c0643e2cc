import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from ripple_loader.format.sidecar import Sidecar
from ripple_loader.offline.verification import verify

from .conftest import MODELS


@pytest.mark.parametrize("name", MODELS)
def test_every_check_holds_for_a_fresh_copy(name, saved, reordered):
    checks = dict(verify(reordered(name), saved(name)))
    alone = ["checksums", "files", "bundles"]
    assert list(checks) == [*alone, "original", "tensors", "logits", "streamed logits"]
    assert list(dict(verify(reordered(name)))) == alone


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_and_shards(dtype, saved, reordered):
    assert len(dict(verify(reordered("phi3", dtype), saved("phi3", dtype)))) == 7
    sharded = {"max_shard_size": "20KB"}
    assert (
        "files as recorded"
        in dict(verify(reordered("llama", **sharded), saved("llama", **sharded)))["original"]
    )


def changed(path, name, change):
    tensors = load_file(path)
    change(tensors[name])
    save_file(tensors, path, {"format": "pt"})


def test_another_original_is_found(saved, reordered, tmp_path):
    shutil.copytree(saved("llama"), tmp_path / "other")
    changed(tmp_path / "other" / "model.safetensors", "model.norm.weight", lambda t: t.add_(1))
    with pytest.raises(ValueError, match=r"must be made from .*other"):
        list(verify(reordered("llama"), tmp_path / "other"))


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("model.layers.1.mlp.up_proj.weight", "must hold the weights of MLP 1"),
        ("model.layers.0.mlp.up_proj.bias", "original's model.layers.0.mlp.up_proj.bias"),
        ("model.layers.0.self_attn.q_proj.weight", "original's model.layers.0.self_attn.q_proj.weight"),
    ],
)
def test_changed_weights_are_found_by_their_file_and_by_comparing(
    name, message, saved, reordered, tmp_path, monkeypatch
):
    copy, header = tmp_path / "copy", Sidecar(reordered("llama")).header
    shutil.copytree(reordered("llama"), copy)
    changed(copy / "model.safetensors", name, lambda t: t.view(-1)[-1:].add_(1))
    with pytest.raises(ValueError, match=r"copy/model\.safetensors must be as `ripple reorder` wrote it"):
        list(verify(copy))

    def recorded(path):
        return (header.files if path.parent == copy else header.base)[path.name]

    monkeypatch.setattr("ripple_loader.offline.verification.sha256", recorded)
    with pytest.raises(ValueError, match=message):
        list(verify(copy, saved("llama")))
