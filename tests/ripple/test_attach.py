import pytest
import torch
from transformers import AutoModelForCausalLM

from ripple_loader import RippleConfig, attach

from .conftest import MODELS, load, make_model, relative_error, token_ids

CONFIG = RippleConfig(dram_budget="1MiB")


@torch.no_grad()
@pytest.mark.parametrize("name", MODELS)
def test_attach_streams_a_loaded_model(name, saved, reordered):
    ids = token_ids(batch=2)
    for directory in (reordered(name), saved(name)):  # loaded from the copy, or from the original
        model = AutoModelForCausalLM.from_pretrained(directory)
        reference, size = model(ids).logits, model.num_parameters()
        report = attach(model, CONFIG, reordered(name))
        assert model.num_parameters() < size
        assert relative_error(model(ids).logits, reference) < 1e-5
        assert report is model.ripple_report
        assert report.tokens == 48


def test_attach_finds_the_directory_of_the_model(reordered):
    model = AutoModelForCausalLM.from_pretrained(reordered("llama"))
    assert attach(model, CONFIG).directory == str(reordered("llama"))


def test_attach_refuses_a_sidecar_of_other_weights(reordered):
    model = make_model("llama")
    model.model.layers[1].mlp.down_proj.weight.data += 1
    with pytest.raises(ValueError, match="layer 1 differs"):
        attach(model, CONFIG, reordered("llama"))
    assert hasattr(model.model.layers[0].mlp, "down_proj")


@pytest.mark.parametrize("other", ["mistral", "opt"])
def test_attach_refuses_a_sidecar_of_another_kind_of_model(other, reordered):
    with pytest.raises(ValueError, match="must fit the model"):
        attach(make_model("llama"), CONFIG, reordered(other))


def test_attach_refuses_a_model_of_another_size(reordered):
    with pytest.raises(ValueError, match="must fit the model"):
        attach(make_model("llama", num_hidden_layers=1), CONFIG, reordered("llama"))


@pytest.mark.parametrize("name", ["llama", "opt", "mixtral"])
def test_a_model_is_attached_once(name, reordered):
    attached = AutoModelForCausalLM.from_pretrained(reordered(name))
    attach(attached, CONFIG)
    for model in (attached, load(reordered(name))):
        with pytest.raises(ValueError, match="streamed already"):
            attach(model, CONFIG, reordered(name))
