"""PEFT's adapters on a streamed model: they act as on the stock one, or are refused by name."""

import copy
import dataclasses
import json
import pickle

import peft
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM

from ripple_loader import RippleConfig, attach, reorder

from .conftest import CALIBRATION, SMALL, load, relative_error, token_ids

# PEFT asks transformers by a name that is deprecated.
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
GATED = ["q_proj", "gate_proj", "up_proj", "down_proj"]
TARGETS = {
    "llama": GATED,
    "gemma2": GATED,
    "qwen2": ["down_proj"],
    "gpt2": ["c_attn", "c_fc", "c_proj"],
    "phi3": ["gate_up_proj", "down_proj"],
    "gpt_neox": ["query_key_value", "dense_h_to_4h", "dense_4h_to_h"],
    "nemotron": ["up_proj", "down_proj"],
    "arcee": "all-linear",
    "mistral": "all-linear",
    "opt": "all-linear",
    "starcoder2": "all-linear",
}


def adapted(saved, name, tmp_path, **options):
    """The stock model with a random adapter, and the folder that the adapter is saved in."""
    torch.manual_seed(1)
    options = {"target_modules": TARGETS.get(name, "all-linear"), "r": 4, "lora_alpha": 8} | options
    config = LoraConfig(init_lora_weights=False, task_type="CAUSAL_LM", **options)
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(saved(name)), config).eval()
    model.save_pretrained(tmp_path / "adapter")
    return model, tmp_path / "adapter"


@torch.no_grad()
@pytest.mark.filterwarnings("ignore:fan_in_fan_out is set")
@pytest.mark.parametrize("name", TARGETS)
def test_lora_in_streamed_mlps(name, saved, reordered, tmp_path):
    stock, folder = adapted(saved, name, tmp_path)
    ids = token_ids(batch=2)
    wanted, plain = stock(ids).logits, stock.get_base_model()
    model = PeftModel.from_pretrained(load(reordered(name), buffer=1 << 14, dram_budget="100%"), folder)
    assert relative_error(model.eval()(ids).logits, wanted) < 1e-5
    assert torch.equal(
        model.generate(input_ids=ids, max_new_tokens=8, do_sample=False),
        stock.generate(input_ids=ids, max_new_tokens=8, do_sample=False),
    )
    with stock.disable_adapter(), model.disable_adapter():
        base = plain(ids).logits
        assert relative_error(model(ids).logits, base) < 1e-5
        assert relative_error(base, wanted) > 0.01
    attached = AutoModelForCausalLM.from_pretrained(saved(name))
    attach(attached, RippleConfig(dram_budget="1MiB"), reordered(name))
    attached.load_adapter(str(folder))
    assert relative_error(attached(ids).logits, wanted) < 1e-5


@torch.no_grad()
@pytest.mark.filterwarnings("ignore:fan_in_fan_out is set")
@pytest.mark.parametrize("name", ["llama", "gpt2", "opt", "phi3"])
@pytest.mark.parametrize("safe", [False, True])
def test_merged_adapters(name, safe, saved, reordered, tmp_path):
    stock, folder = adapted(saved, name, tmp_path)
    ids = token_ids()
    wanted, base = stock(ids).logits, stock.get_base_model()
    with stock.disable_adapter():
        plain = base(ids).logits
    model = PeftModel.from_pretrained(load(reordered(name)), folder).eval()
    model.merge_adapter(safe_merge=safe)
    assert relative_error(model(ids).logits, wanted) < 1e-5
    model.unmerge_adapter()
    assert relative_error(model(ids).logits, wanted) < 1e-5
    with model.disable_adapter():
        assert relative_error(model(ids).logits, plain) < 1e-5
    whole = model.merge_and_unload(safe_merge=safe)
    assert relative_error(whole(ids).logits, wanted) < 1e-5
    whole.save_pretrained(tmp_path / "merged")
    written = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert relative_error(written(ids).logits, wanted) < 1e-5
    assert relative_error(whole.to(torch.bfloat16)(ids).logits, wanted) < 5e-2


@torch.no_grad()
def test_selection_is_of_the_adapted_neurons(saved, reordered, tmp_path):
    """A neuron that only the adapter makes active is selected."""
    stock, folder = adapted(saved, "arcee", tmp_path, target_modules=["up_proj"], lora_alpha=64)
    model = PeftModel.from_pretrained(load(reordered("arcee"), strategy="sparse"), folder).eval()
    for seed in range(6):
        ids = token_ids(1, seed=seed)
        assert relative_error(model(ids).logits, stock(ids).logits) < 1e-5
    assert 0 < model.ripple_report.active < 6 * 2 * 96

    stock, folder = adapted(saved, "llama", tmp_path / "llama", target_modules=["gate_proj"], lora_alpha=64)
    model = PeftModel.from_pretrained(load(reordered("llama"), keep=0.5), folder).eval()
    layer, mlp = model.get_base_model().model.layers[0].mlp, stock.get_base_model().model.layers[0].mlp
    x = torch.randn(5, 32)
    activation = (mlp.act_fn(mlp.gate_proj(x)) * mlp.up_proj(x)).abs()
    threshold = activation.topk(48, dim=-1).values[:, -1:]
    kept = torch.where(activation >= threshold, mlp.act_fn(mlp.gate_proj(x)) * mlp.up_proj(x), 0)
    reference = mlp.down_proj(kept)
    assert (layer(x) - reference).norm() < 0.1 * reference.norm()


@pytest.mark.parametrize("targets", [["q_proj", "v_proj"], GATED])
def test_adapters_train_and_are_saved(targets, saved, reordered, tmp_path):
    """Gradients of an adapter, in attention or in the MLP, are the stock model's."""
    _, folder = adapted(saved, "llama", tmp_path, target_modules=targets)
    ids, grads = token_ids(batch=2), []
    for base in (AutoModelForCausalLM.from_pretrained(saved("llama")), load(reordered("llama"))):
        model = PeftModel.from_pretrained(base, folder, is_trainable=True).train()
        model(ids, labels=ids).loss.backward()
        grads.append({name: weight.grad for name, weight in model.named_parameters() if weight.requires_grad})
    assert grads[0].keys() == grads[1].keys()
    for name, grad in grads[0].items():
        torch.testing.assert_close(grads[1][name], grad, rtol=1e-4, atol=1e-5, msg=name)
    optimizer = torch.optim.SGD([w for w in model.parameters() if w.requires_grad], lr=0.1)
    optimizer.step()
    model.save_pretrained(tmp_path / "trained")
    again = PeftModel.from_pretrained(load(reordered("llama")), tmp_path / "trained").eval()
    stock = PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(saved("llama")), tmp_path / "trained"
    )
    assert relative_error(again(ids).logits, model.eval()(ids).logits) < 1e-5
    assert relative_error(again(ids).logits, stock.eval()(ids).logits) < 1e-5


def test_dropout_of_an_adapter(saved, reordered, tmp_path):
    """Every neuron is dropped or kept once, whatever the batches of neurons: gradients are consistent."""
    _, folder = adapted(saved, "llama", tmp_path, target_modules=GATED, lora_dropout=0.5)
    base = load(reordered("llama"), dram_budget="60KiB", buffer=1 << 14)
    model = PeftModel.from_pretrained(base, folder, is_trainable=True).double()
    model.train()
    layer = model.get_base_model().model.layers[0].mlp
    x = torch.randn(2, 32, dtype=torch.float64, requires_grad=True)

    def product(x):
        torch.manual_seed(3)
        return layer(x)

    assert torch.autograd.gradcheck(product, (x,), eps=1e-7, atol=1e-4, nondet_tol=1e-12)
    model.eval()
    assert not torch.allclose(layer(x), product(x) * 0)


@torch.no_grad()
def test_two_adapters(saved, reordered, tmp_path):
    first, one = adapted(saved, "llama", tmp_path / "one")
    torch.manual_seed(5)
    second, two = adapted(saved, "llama", tmp_path / "two", r=2, use_rslora=True)
    model = PeftModel.from_pretrained(load(reordered("llama")), one, adapter_name="one")
    model.load_adapter(two, adapter_name="two")
    ids = token_ids()
    for name, reference in (("one", first), ("two", second), ("one", first)):
        model.set_adapter(name)
        assert relative_error(model.eval()(ids).logits, reference(ids).logits) < 1e-5
    model.delete_adapter("one")
    model.set_adapter("two")
    assert relative_error(model.eval()(ids).logits, second(ids).logits) < 1e-5
    with pytest.raises(ValueError, match="`adapter_names` must not choose"):
        model(ids, adapter_names=["two"])


REFUSED = {
    "DoRA": LoraConfig(target_modules=GATED, use_dora=True),
    "PiSSA": LoraConfig(target_modules=GATED, init_lora_weights="pissa"),
    "bias": LoraConfig(target_modules=["down_proj"], lora_bias=True),
    "IA3": peft.IA3Config(target_modules=["q_proj", "down_proj"], feedforward_modules=["down_proj"]),
    "LoHa": peft.LoHaConfig(target_modules=GATED),
    "LoKr": peft.LoKrConfig(target_modules=GATED),
    "OFT": peft.OFTConfig(target_modules=GATED, oft_block_size=4, r=0),
    "AdaLoRA": peft.AdaLoraConfig(target_modules=GATED, total_step=10),
    "VeRA": peft.VeraConfig(target_modules=["gate_proj"]),
    "modules_to_save": LoraConfig(target_modules=["q_proj"], modules_to_save=["down_proj"]),
}


@pytest.mark.filterwarnings("ignore:`lora_bias=True` was passed")
@pytest.mark.parametrize("kind", REFUSED)
def test_other_tuners_are_refused_by_name(kind, reordered):
    with pytest.raises(ValueError, match=r"stream.* by Ripple"):
        get_peft_model(load(reordered("llama")), dataclasses.replace(REFUSED[kind]))


@torch.no_grad()
@pytest.mark.parametrize("kind", ["IA3", "LoHa", "LoKr"])
def test_other_tuners_work_outside_of_the_mlps(kind, saved, reordered):
    outputs, options = [], {"target_modules": ["q_proj", "v_proj"]}
    if kind == "IA3":
        options["feedforward_modules"] = []
    for base in (AutoModelForCausalLM.from_pretrained(saved("llama")), load(reordered("llama"))):
        torch.manual_seed(0)
        model = get_peft_model(base, type(REFUSED[kind])(**options)).eval()
        outputs.append(model(token_ids()).logits)
    assert relative_error(*outputs) < 1e-5


@pytest.mark.parametrize(
    "config",
    [
        peft.LoHaConfig(target_modules=["fc1"]),
        LoraConfig(target_modules=["fc2"], use_dora=True),
        LoraConfig(target_modules=["q_proj"], modules_to_save=["fc2"]),
    ],
)
def test_other_tuners_are_refused_on_linears_that_lie_in_the_layer_itself(config, reordered):
    with pytest.raises(ValueError, match=r"stream.* by Ripple"):
        get_peft_model(load(reordered("opt")), config)


@torch.no_grad()
def test_copies_of_layers_that_hold_adapted_linears(saved, reordered, tmp_path):
    stock, folder = adapted(saved, "opt", tmp_path)
    wanted = stock(token_ids()).logits
    model = PeftModel.from_pretrained(load(reordered("opt")), folder).eval()
    for one in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert relative_error(one(token_ids()).logits, wanted) < 1e-5
        one.merge_and_unload().save_pretrained(tmp_path / "merged")
        merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
        assert relative_error(merged(token_ids()).logits, wanted) < 1e-5


@pytest.mark.parametrize("parameter", ["gate_up_proj", "down_proj"])
def test_adapters_on_routed_experts_are_refused(parameter, reordered, saved, tmp_path):
    targets = {"target_modules": ["q_proj"], "target_parameters": [f"mlp.experts.{parameter}"]}
    with pytest.raises(ValueError, match=rf"{parameter} of routed experts must have no adapter"):
        get_peft_model(load(reordered("qwen3_moe")), LoraConfig(**targets))
    _, folder = adapted(saved, "qwen3_moe", tmp_path, **targets)
    with pytest.raises(ValueError, match=rf"{parameter} of routed experts must have no adapter"):
        PeftModel.from_pretrained(load(reordered("qwen3_moe")), folder)
    with pytest.raises(ValueError, match=rf"{parameter} of routed experts must have no adapter"):
        load(reordered("qwen3_moe")).load_adapter(str(folder))


@torch.no_grad()
def test_adapters_beside_routed_experts_work(reordered, saved, tmp_path):
    stock, folder = adapted(saved, "qwen3_moe", tmp_path, target_modules=["q_proj", "o_proj"])
    model = PeftModel.from_pretrained(load(reordered("qwen3_moe")), folder).eval()
    assert relative_error(model(token_ids()).logits, stock(token_ids()).logits) < 1e-5
    assert not [name for name, _ in model.named_parameters() if "experts" in name]


def test_an_adapted_model_is_not_attached(saved, reordered, tmp_path):
    model, _ = adapted(saved, "llama", tmp_path)
    for one in (model, model.get_base_model()):
        with pytest.raises(ValueError, match="before its adapters"):
            attach(one, RippleConfig(), reordered("llama"))


@torch.no_grad()
def test_lora_on_rounded_bundles(saved, tmp_path):
    reorder(saved("llama"), tmp_path / "out", CALIBRATION, dataclasses.replace(SMALL, bundles="int8"))
    stock, folder = adapted(saved, "llama", tmp_path)
    model = PeftModel.from_pretrained(load(tmp_path / "out"), folder).eval()
    assert relative_error(model(token_ids()).logits, stock(token_ids()).logits) < 0.1


@torch.no_grad()
@pytest.mark.filterwarnings("ignore:fan_in_fan_out is set")
@pytest.mark.parametrize("name", ["llama", "gpt2", "phi3"])
def test_an_adapter_of_the_copy_has_the_copys_order(name, reordered, tmp_path):
    """The base that an adapter names says which order of neurons it has, also after a copy and a merge."""
    stock, folder = adapted(reordered, name, tmp_path)
    ids = token_ids()
    model = PeftModel.from_pretrained(load(reordered(name)), folder).eval()
    wanted = stock(ids).logits
    assert relative_error(copy.deepcopy(model)(ids).logits, wanted) < 1e-5
    assert relative_error(model(ids).logits, wanted) < 1e-5
    whole = model.merge_and_unload()
    assert relative_error(whole(ids).logits, wanted) < 1e-5
    whole.save_pretrained(tmp_path / "merged")
    written = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert relative_error(written(ids).logits, wanted) < 1e-5


def renamed(folder, base):
    """The adapter in `folder` names `base` as its base model from now on."""
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"base_model_name_or_path": str(base)}))


@torch.no_grad()
def test_an_adapter_whose_base_is_gone_is_refused(reordered, tmp_path):
    stock, folder = adapted(reordered, "llama", tmp_path)
    renamed(folder, tmp_path / "gone")
    model = PeftModel.from_pretrained(load(reordered("llama")), folder).eval()
    with pytest.raises(FileNotFoundError, match=r"gone is gone: set `base_model_name_or_path`"):
        model(token_ids())
    renamed(folder, reordered("llama"))
    model = PeftModel.from_pretrained(load(reordered("llama")), folder).eval()
    assert relative_error(model(token_ids()).logits, stock(token_ids()).logits) < 1e-5


@torch.no_grad()
def test_an_adapter_of_a_copy_on_the_hub_has_the_copys_order(reordered, saved, hub_cache, tmp_path):
    stock, folder = adapted(reordered, "llama", tmp_path)
    hub_cache(reordered("llama"), "somebody/reordered")
    renamed(folder, "somebody/reordered")
    model = PeftModel.from_pretrained(load(reordered("llama")), folder).eval()
    assert relative_error(model(token_ids()).logits, stock(token_ids()).logits) < 1e-5
    stock, folder = adapted(saved, "llama", tmp_path)
    renamed(folder, "somebody/unknown")
    model = PeftModel.from_pretrained(load(reordered("llama")), folder).eval()
    with pytest.warns(UserWarning, match="somebody/unknown, is neither a directory nor in the cache"):
        assert relative_error(model(token_ids()).logits, stock(token_ids()).logits) < 1e-5
