"""Copies, casts, forks and gradients of a streamed model."""

import copy
import multiprocessing
import pickle

import pytest
import torch
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM

from ripple_loader import RippleConfig, attach

from .conftest import load, relative_error, token_ids

NAMES = ["llama", "opt", "mixtral"]
CASTS = {torch.bfloat16: 3e-2, torch.float16: 4e-3, torch.float64: 1e-5}


@torch.no_grad()
@pytest.mark.parametrize("dtype", CASTS)
@pytest.mark.parametrize("name", NAMES)
def test_casts_after_loading_and_back(name, dtype, reordered):
    stock, ids = AutoModelForCausalLM.from_pretrained(reordered(name)), token_ids(batch=2)
    if name == "mixtral":
        stock.set_experts_implementation("eager")  # the other one has no float64
    before = stock(ids).logits
    attached = AutoModelForCausalLM.from_pretrained(reordered(name))
    attach(attached, RippleConfig(dram_budget="1MiB"))
    for model in (load(reordered(name)), attached):
        model(ids)
        assert relative_error(model.to(dtype)(ids).logits, stock.to(dtype)(ids).logits) < CASTS[dtype]
        assert model.ripple_report.resident_bytes <= model.ripple_report.budget
        if dtype == torch.float64:
            assert relative_error(model.float()(ids).logits, before) < 1e-5


@torch.no_grad()
@pytest.mark.parametrize("clone", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
@pytest.mark.parametrize("name", NAMES)
def test_a_copy_opens_the_directory_again(name, clone, reordered):
    model, ids = load(reordered(name), keep=1.0 if name == "opt" else 0.5), token_ids()
    expected = model(ids).logits
    other = clone(model)
    assert other.ripple_report is not model.ripple_report
    assert other.ripple_report.calls == 0
    assert relative_error(other(ids).logits, expected) < 1e-6
    assert other.ripple_report.calls == 1
    del model
    assert relative_error(other(ids).logits, expected) < 1e-6
    assert other.ripple_report.strategy == "sparse, as `strategy` says"


@torch.no_grad()
def test_a_model_of_a_relative_path_is_copied_and_saved_from_another_folder(reordered, tmp_path, monkeypatch):
    monkeypatch.chdir(reordered("llama").parent)
    model = load(reordered("llama").name)
    monkeypatch.chdir(tmp_path)
    assert copy.deepcopy(model)(token_ids()).logits.equal(model(token_ids()).logits)
    model.save_pretrained("saved")
    assert (tmp_path / "saved" / "model.safetensors").is_file()


def test_a_copy_of_a_directory_that_was_replaced_is_refused(reordered, tmp_path):
    for file in reordered("llama").iterdir():
        (tmp_path / file.name).symlink_to(file)
    data = pickle.dumps(load(tmp_path))
    (tmp_path / "neurons.ripple").unlink()
    (tmp_path / "neurons.ripple").symlink_to(reordered("mistral") / "neurons.ripple")
    with pytest.raises(ValueError, match="was replaced"):
        pickle.loads(data)


@torch.no_grad()
def _answer(model, ids, queue):
    queue.put(model(ids).logits.double().sum().item())


@torch.no_grad()
@pytest.mark.parametrize("io_engine", ["auto", "threads"])
def test_a_forked_child_answers_and_so_does_its_parent(io_engine, reordered):
    model, ids = load(reordered("llama"), io_engine=io_engine, dram_budget="60KiB"), token_ids()
    expected = model(ids).logits.double().sum().item()
    context = multiprocessing.get_context("fork")
    queue = context.Queue()
    children = [context.Process(target=_answer, args=(model, ids, queue)) for _ in range(2)]
    for child in children:
        child.start()
    own = [model(ids).logits.double().sum().item() for _ in range(5)]
    answers = [queue.get(timeout=60) for _ in children]
    for child in children:
        child.join(60)
        assert child.exitcode == 0
    assert answers + own == pytest.approx([expected] * 7, rel=1e-6)


class Scored(torch.utils.data.Dataset):
    """Rows that a streamed model computes in the worker."""

    def __init__(self, model):
        self.model = model

    def __len__(self):
        return 6

    @torch.no_grad()
    def __getitem__(self, number):
        return self.model(token_ids(5, seed=number)).logits[0, -1]


@pytest.mark.parametrize("start", ["fork", "spawn"])
def test_workers_of_a_data_loader(start, reordered):
    scored = Scored(load(reordered("llama")))
    expected = torch.stack([scored[number] for number in range(6)])
    loader = DataLoader(scored, batch_size=2, num_workers=2, multiprocessing_context=start, timeout=120)
    assert relative_error(torch.cat(list(loader)), expected) < 1e-5


@pytest.mark.parametrize("name", ["llama", "opt", "gpt2", "phi3", "mixtral", "qwen2_moe"])
def test_gradients_pass_through_streamed_mlps(name, reordered):
    stock, ids = AutoModelForCausalLM.from_pretrained(reordered(name)), token_ids(batch=2)
    attached = AutoModelForCausalLM.from_pretrained(reordered(name))
    attach(attached, RippleConfig(dram_budget="60KiB", buffer=1 << 14))
    for model in (load(reordered(name), dram_budget="60KiB", buffer=1 << 14), attached):
        assert not any(parameter.requires_grad for parameter in model.parameters())
        grads = []
        for one in (stock, model):
            one.requires_grad_(True).zero_grad()
            one(ids, labels=ids).loss.backward()
            grads.append({key: weight.grad for key, weight in one.named_parameters()})
        assert any("attn" in key or "attention" in key for key in grads[1])
        for key, grad in grads[1].items():
            torch.testing.assert_close(grad, grads[0][key], rtol=1e-4, atol=1e-5, msg=key)


def test_gradients_of_the_selected_neurons(reordered):
    """With `keep` below 1 the gradient is that of what was computed."""
    layer = load(reordered("llama"), keep=0.5).double().model.layers[0].mlp
    x = torch.randn(3, 32, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(layer, (x,), eps=1e-7, atol=1e-4, nondet_tol=1e-12)


def test_gradient_checkpointing(reordered):
    grads = []
    for checkpointing in (False, True):
        model, ids = load(reordered("llama")), token_ids()
        model.model.layers.requires_grad_(True)
        model.train()
        if checkpointing:
            # Later versions of transformers have renamed it.
            name = "activation_checkpointing_enable"
            enable = getattr(model, name, None) or model.gradient_checkpointing_enable
            enable({"use_reentrant": False})
        model(ids, labels=ids, use_cache=False).loss.backward()
        grads.append(model.model.layers[0].self_attn.q_proj.weight.grad)
    torch.testing.assert_close(grads[1], grads[0], rtol=1e-5, atol=1e-6)
