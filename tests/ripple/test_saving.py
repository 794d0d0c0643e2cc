"""What is saved of a streamed model is the whole model."""

import pytest
import torch
from safetensors.torch import load_file, save_model
from transformers import AutoConfig, AutoModelForCausalLM

from ripple_loader import RippleConfig, attach

from .conftest import MODELS, load, make_model, relative_error, token_ids


def attached(directory):
    model = AutoModelForCausalLM.from_pretrained(directory)
    attach(model, RippleConfig(dram_budget="1MiB"))
    return model


@torch.no_grad()
@pytest.mark.parametrize("how", [load, attached])
@pytest.mark.parametrize("name", MODELS)
def test_a_saved_model_is_whole(name, how, saved, reordered, tmp_path):
    model, ids = how(reordered(name)), token_ids()
    model.save_pretrained(tmp_path)
    written, info = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert not hasattr(AutoConfig.from_pretrained(tmp_path), "quantization_config")
    reference = AutoModelForCausalLM.from_pretrained(reordered(name))
    for key, tensor in reference.state_dict().items():
        assert torch.equal(written.state_dict()[key], tensor), key
    assert relative_error(written(ids).logits, model(ids).logits) < 1e-5


@pytest.mark.parametrize("name", ["llama", "opt", "gpt2", "phi3", "gemma3_multimodal"])
def test_the_state_dict_is_the_stock_models(name, reordered, tmp_path):
    model, stock = load(reordered(name)), AutoModelForCausalLM.from_pretrained(reordered(name))
    got, wanted = model.state_dict(), stock.state_dict()
    assert got.keys() == wanted.keys()
    assert all(torch.equal(got[key], wanted[key]) for key in wanted)
    stock.load_state_dict(got)
    model.load_state_dict(wanted)
    save_model(model, tmp_path / "model.safetensors")
    stored = load_file(tmp_path / "model.safetensors")
    assert all(torch.equal(stored[key], wanted[key]) for key in stored)
    assert any("fc1" in key or "mlp" in key for key in stored)


@pytest.mark.parametrize("name", ["llama", "mixtral"])
@pytest.mark.parametrize("strict", [True, False])
def test_other_weights_are_not_loaded_without_a_word(name, strict, reordered):
    model = load(reordered(name))
    state = model.state_dict()
    key = next(key for key in state if "layers.1" in key and key.endswith(("down_proj.weight", "w2.weight")))
    state[key] = state[key] + 1
    with pytest.raises(RuntimeError, match=r"must be the weight that Ripple streams, but differs"):
        model.load_state_dict(state, strict=strict)


def test_the_weights_of_a_cast_model_are_cast(reordered):
    state = load(reordered("llama")).to(torch.bfloat16).state_dict()
    assert {tensor.dtype for tensor in state.values()} == {torch.bfloat16}


def test_weights_that_were_replaced_are_not_saved(reordered, tmp_path):
    for file in reordered("llama").iterdir():
        (tmp_path / file.name).symlink_to(file)
    model = load(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    changed = make_model("llama")
    changed.model.layers[0].mlp.up_proj.weight.data[0] += 1
    changed.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"those of .* differ"):
        model.save_pretrained(tmp_path / "saved")
