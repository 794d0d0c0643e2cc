"""What would be wrong without a word, found by trying what people do to models: it works, or says why not."""

import dataclasses
import shutil

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM, T5EncoderModel

from ripple_loader import RippleConfig, attach, reorder
from ripple_loader.format.sidecar import Sidecar
from tests.ripple.conftest import CALIBRATION, SMALL, load, make_model, relative_error, token_ids
from tests.ripple.test_encoder_decoder import save

CONFIG = RippleConfig(dram_budget="1MiB")
EDITED = {
    "llama": "layers.1.mlp.gate_proj.weight",
    "gpt2": "h.1.mlp.c_fc.weight",
    "phi3": "layers.0.mlp.gate_up_proj.weight",
    "qwen3_moe": "layers.1.mlp.experts.gate_up_proj",
    "opt": "layers.1.fc1.bias",
    "starcoder2": "layers.0.mlp.c_proj.bias",
}


@pytest.mark.parametrize("name", EDITED)
@pytest.mark.parametrize("loaded", ["original", "copy"])
def test_attach_compares_every_weight(name, loaded, saved, reordered):
    model = AutoModelForCausalLM.from_pretrained(saved(name) if loaded == "original" else reordered(name))
    (edited,) = (p for key, p in model.named_parameters() if key.endswith(EDITED[name]))
    edited.data.view(-1)[-7] += 0.01
    with pytest.raises(ValueError, match="must be made from this model's weights, but layer"):
        attach(model, CONFIG, reordered(name))


@pytest.mark.parametrize("name", ["llama", "gpt2", "phi3", "qwen3_moe"])
@pytest.mark.parametrize("loaded", ["original", "copy"])
def test_attach_compares_checksums_and_reads_no_bundle(name, loaded, saved, reordered, monkeypatch):
    model = AutoModelForCausalLM.from_pretrained(saved(name) if loaded == "original" else reordered(name))
    monkeypatch.setattr(Sidecar, "bundles", lambda *_: pytest.fail("bundles were read"))
    assert attach(model, CONFIG, reordered(name)).budget


@torch.no_grad()
@pytest.mark.parametrize("bundles", ["bfloat16", "int8", "int4"])
def test_attach_to_rounded_bundles(bundles, saved, tmp_path):
    reorder(saved("llama"), tmp_path / "out", CALIBRATION, dataclasses.replace(SMALL, bundles=bundles))
    model = AutoModelForCausalLM.from_pretrained(saved("llama"))
    weight = model.model.layers[0].mlp.up_proj.weight.data
    before = weight.clone()
    weight += torch.randn(len(weight), 1) @ torch.randn(1, weight.shape[1]) * 0.02  # as a merged adapter does
    with pytest.raises(ValueError, match="but layer 0 differs"):
        attach(model, CONFIG, tmp_path / "out")
    weight.copy_(before)
    attach(model, CONFIG, tmp_path / "out")
    assert relative_error(model(token_ids()).logits, load(tmp_path / "out")(token_ids()).logits) < 1e-5


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_attach_in_another_dtype(dtype, saved, reordered):
    model = AutoModelForCausalLM.from_pretrained(saved("llama"), dtype=dtype)
    assert attach(model, CONFIG, reordered("llama")).budget


def test_attach_needs_the_weights_in_memory(saved, reordered, tmp_path):
    parts = ["model.embed_tokens", "model.layers.0", "model.norm", "model.rotary_emb", "lm_head"]
    device_map = dict.fromkeys(parts, "cpu") | {"model.layers.1": "disk"}
    model = AutoModelForCausalLM.from_pretrained(
        saved("llama"), device_map=device_map, offload_folder=str(tmp_path)
    )
    with pytest.raises(ValueError, match=r"must be in memory to attach .* accelerate has offloaded"):
        attach(model, CONFIG, reordered("llama"))


@pytest.mark.parametrize("name", ["llama", "opt"])
def test_attach_keeps_no_hooks_of_what_it_replaces(name, saved, reordered):
    model = AutoModelForCausalLM.from_pretrained(saved(name))
    down = next(module for key, module in model.named_modules() if key.endswith(("down_proj", "fc2")))
    handle = down.register_forward_hook(lambda *_: None)
    with pytest.raises(ValueError, match=r"(down_proj|fc2) must have no hooks, .* register them afterwards"):
        attach(model, CONFIG, reordered(name))
    handle.remove()
    attach(model, CONFIG, reordered(name))


@pytest.mark.parametrize("how", ["model", "forward", "compile"])
def test_attach_comes_before_compile(how, saved, reordered):
    model = AutoModelForCausalLM.from_pretrained(saved("llama"))
    if how == "model":
        model = torch.compile(model, backend="eager")
    elif how == "forward":
        model.forward = torch.compile(model.forward, backend="eager")
    else:
        model.compile(backend="eager")
    with pytest.raises(ValueError, match=r"must be attached before `torch\.compile`"):
        attach(model, CONFIG, reordered("llama"))


@pytest.mark.parametrize("name", ["llama", "opt"])
def test_hooks_that_are_never_called_are_warned_of(name, reordered):
    model = load(reordered(name))
    linear = next(module for key, module in model.named_modules() if key.endswith(("gate_proj", "fc1")))
    for register in (linear.register_forward_hook, linear.register_forward_pre_hook):
        with pytest.warns(UserWarning, match=r"hooks of (gate_proj|fc1) .* hook the MLP"):
            register(lambda *_: None)


@pytest.mark.parametrize("name", ["llama", "opt", "mixtral"])
def test_the_activation_of_a_streamed_mlp_is_not_replaced(name, reordered):
    model = load(reordered(name))
    layer = model.model.decoder.layers[0] if name == "opt" else model.model.layers[0]
    holder = {"llama": "mlp", "mixtral": "mlp.experts"}.get(name, "")
    with pytest.raises(ValueError, match=r"act\w*_fn must not be replaced, .* streamed by Ripple"):
        setattr(layer.get_submodule(holder), "activation_fn" if name == "opt" else "act_fn", nn.Tanh())


@pytest.mark.parametrize(("name", "key"), [("llama", "hidden_act"), ("opt", "activation_function")])
def test_an_activation_without_zeros_does_not_select_by_them(name, key, tmp_path):
    make_model(name, **{key: "relu"}).save_pretrained(tmp_path / "model")
    reorder(tmp_path / "model", tmp_path / "out", CALIBRATION, SMALL)
    options = {"quantization_config": CONFIG, key: "gelu"}
    with pytest.raises(ValueError, match=r"made for an activation that is exactly zero .* model has GELU"):
        AutoModelForCausalLM.from_pretrained(tmp_path / "out", **options)


@pytest.mark.filterwarnings("ignore:.*torch.jit.trace.* is deprecated:DeprecationWarning")
@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
@pytest.mark.parametrize("name", ["llama", "qwen3_moe"])
def test_a_streamed_model_is_not_traced(name, reordered):
    model = load(reordered(name))

    class Logits(nn.Module):
        def __init__(self):
            super().__init__()
            self.model = model

        def forward(self, ids):
            return self.model(ids, use_cache=False).logits

    with pytest.raises(ValueError, match=r"must not be traced or exported"):
        torch.jit.trace(Logits(), (token_ids(5),), check_trace=False)
    with pytest.raises(ValueError, match=r"must not be traced or exported"):
        torch.export.export(Logits(), (token_ids(5),), strict=False)


def test_a_directory_with_an_adapter_is_refused(saved, tmp_path):
    """`from_pretrained` would load the adapter with the model."""
    shutil.copytree(saved("llama"), tmp_path / "model")
    (tmp_path / "model" / "adapter_config.json").write_text("{}")
    with pytest.raises(ValueError, match=r"must hold a model without an adapter"):
        reorder(tmp_path / "model", tmp_path / "out", CALIBRATION, SMALL)


def test_dropout_inside_a_streamed_mlp_is_warned_of(tmp_path):
    reorder(save("t5", tmp_path / "model"), tmp_path / "out", CALIBRATION, SMALL)
    model = AutoModelForSeq2SeqLM.from_pretrained(tmp_path / "out", quantization_config=CONFIG)
    model.eval()(input_ids=token_ids(4), decoder_input_ids=token_ids(4))
    with pytest.warns(UserWarning, match=r"dropout inside of streamed MLPs \(p=0\.1\) is left out"):
        model.train()(input_ids=token_ids(4), decoder_input_ids=token_ids(4))


def test_half_of_an_encoder_decoder_is_refused_by_its_size(tmp_path):
    reorder(save("t5", tmp_path / "model"), tmp_path / "out", CALIBRATION, SMALL)
    with pytest.raises(ValueError, match=r"must fit the model, but is made for \('t5', 5, .* has \('t5', 3,"):
        T5EncoderModel.from_pretrained(tmp_path / "out", quantization_config=CONFIG)
