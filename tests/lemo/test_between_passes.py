"""User code may change a model between the forward and the backward pass: the gradient is that of the forward
pass, or an error says what changed."""

from __future__ import annotations

import copy
import dataclasses

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, parametrize

from lemo_trainer import LemoConfig, apply_lemo
from lemo_trainer.exact import auto

from .exact import LAYERS, SEGMENTS
from .tiny import EVERY_MODE, batch, checkpointing, every_mode, lora, loss_and_gradients, tiny_model

HALF = every_mode(0.5)
# Each of these runs layers again in the backward pass.
AGAIN = {
    "layers": LAYERS,
    "segments of exact": SEGMENTS,
    "detach": dataclasses.replace(HALF["detach"], mlp_segment=8),
    "eliminate": HALF["eliminate"],
}


@pytest.fixture(params=AGAIN)
def config(request):
    return AGAIN[request.param]


def gradients(model, loss):
    model.zero_grad()
    loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def to_another_mode(model):
    model.eval()
    for parameter in model.parameters():
        parameter.requires_grad_(True)
    model.set_attn_implementation("eager")
    torch.set_default_dtype(torch.float64)


def to_another_adapter(model):
    model.set_adapter("other")


def to_no_adapter(model):
    model.base_model.disable_adapter_layers()


def to_other_parts(model):
    layer = model.get_base_model().model.layers[1]
    layer.mlp.up_proj = nn.Linear(32, 48, bias=False)
    layer.mlp.act_fn._forward_hooks.clear()
    layer.self_attn.attention_dropout = 0.9
    model.load_state_dict({name: 2 * value for name, value in model.state_dict().items()}, assign=True)


@pytest.mark.parametrize("change", [to_another_mode, to_another_adapter, to_no_adapter, to_other_parts])
def test_layers_that_run_again_are_as_they_were(change, config):
    model, inputs = lora(tiny_model(attention_dropout=0.2), lora_dropout=0.2), batch("left")
    model.add_adapter("other", copy.deepcopy(model.peft_config["default"]))
    model.get_base_model().model.layers[1].mlp.act_fn.register_forward_hook(lambda *args: 2 * args[2])
    apply_lemo(model, config)
    own = dict(model.named_parameters())
    torch.manual_seed(3)
    wanted = gradients(model, model(**inputs).loss)
    torch.manual_seed(3)
    loss = model(**inputs).loss
    model.zero_grad()
    try:
        change(model)
        for name in wanted:  # a frozen weight gets no gradient, with LeMo and without
            own[name].requires_grad_(True)
        loss.backward()
    finally:
        torch.set_default_dtype(torch.float32)
    got = {name: p.grad for name, p in own.items() if p.grad is not None}
    torch.testing.assert_close(got, wanted)
    assert [
        name for name, p in model.named_parameters() if p is not own.get(name) and p.grad is not None
    ] == []


def test_two_adapters_with_one_backward_pass(config):
    model, inputs = lora(tiny_model()), batch("left")
    model.add_adapter("other", copy.deepcopy(model.peft_config["default"]))
    apply_lemo(model, config)

    def both(backward_at_once):
        model.zero_grad()
        losses = []
        for name in ("default", "other"):
            model.set_adapter(name)
            losses.append(model(**inputs).loss)
            if not backward_at_once:
                losses[-1].backward()
        if backward_at_once:
            for name, parameter in model.named_parameters():
                parameter.requires_grad_("lora" in name)
            sum(losses).backward()
        return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}

    torch.testing.assert_close(both(True), both(False))


@pytest.mark.parametrize("mode", [*EVERY_MODE, "segments of exact"])
def test_a_functional_call_has_the_gradients_of_its_weights(mode):
    model, inputs = tiny_model(), batch("left")
    weights = {name: (1.1 * p.detach()).requires_grad_() for name, p in model.named_parameters()}

    def step():
        loss = torch.func.functional_call(model, weights, (), inputs).loss
        return torch.autograd.grad(loss, list(weights.values()))

    wanted = step()
    apply_lemo(model, {**AGAIN, **every_mode()}[mode])
    torch.testing.assert_close(step(), wanted, rtol=1e-4, atol=1e-5)
    assert all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize("mode", ["exact", "segments", "detach"])
def test_transforms_of_functions_run_without_lemo_and_say_so(mode, caplog):
    model, inputs = tiny_model(), batch("left")
    weights = {name: p.detach() for name, p in model.named_parameters()}

    def loss(weights):
        return torch.func.functional_call(model, weights, (), inputs).loss

    wanted = torch.func.grad(loss)(weights)
    apply_lemo(model, every_mode()[mode])
    for _ in range(2):
        torch.testing.assert_close(torch.func.grad(loss)(weights), wanted)
    assert caplog.text.count("inside a transform of torch.func (grad, vmap) runs without LeMo") == 1


def test_so_are_those_that_auto_runs_selectively(monkeypatch):
    monkeypatch.setattr(auto, "fits", lambda cost, *_: str(cost.way) == "plain, selective")
    test_layers_that_run_again_are_as_they_were(to_another_mode, LemoConfig(loss_segment=16))


def add_to_a_frozen_weight(model):
    with torch.no_grad():
        model.get_base_model().model.layers[1].mlp.up_proj.base_layer.weight.add_(1)


def exchange_data(model):
    weight = model.get_base_model().model.layers[1].mlp.up_proj.base_layer.weight
    weight.data = 2 * weight.data


def merge(model):
    model.merge_adapter()


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (add_to_a_frozen_weight, r"its `mlp.up_proj.base_layer.weight` was changed in place since"),
        (exchange_data, r"its `mlp.up_proj.base_layer.weight` was given other data"),
        (nn.Module.double, "was given other data"),
        (merge, "Adapters were merged into"),
    ],
)
def test_weights_that_changed_are_refused(change, sentence, config):
    model = lora(tiny_model())
    apply_lemo(model, config)
    loss = model(**batch("left")).loss
    change(model)
    with pytest.raises(RuntimeError, match=sentence):
        loss.backward()


def test_inputs_may_be_written_over_or_are_refused(config):
    model, inputs = tiny_model(), batch("left")
    inputs["position_ids"] = (inputs["attention_mask"].cumsum(1) - 1).clamp(min=0)
    apply_lemo(model, config)
    wanted = gradients(model, model(**inputs).loss)
    loss = model(**inputs).loss
    inputs["attention_mask"].zero_()
    inputs["position_ids"].zero_()
    torch.testing.assert_close(gradients(model, loss), wanted)
    inputs = batch("plain")
    inputs["attention_mask"] = torch.ones(45, 45, dtype=torch.bool).tril().expand(2, 1, -1, -1).contiguous()
    loss = model(**inputs).loss
    inputs["attention_mask"].fill_(True)
    with pytest.raises(RuntimeError, match="its argument `attention_mask` was changed in place"):
        loss.backward()


class Halved(nn.Module):
    def forward(self, weight):
        return weight / 2


@pytest.mark.parametrize("mode", [*EVERY_MODE, "segments of exact"])
def test_parametrized_weights_and_their_cache(mode):
    def model():
        made = tiny_model()
        parametrize.register_parametrization(made.model.layers[1].mlp.up_proj, "weight", Halved())
        return made

    wanted = loss_and_gradients(model(), batch("left"))
    patched = model()
    apply_lemo(patched, {**AGAIN, **every_mode()}[mode])
    with parametrize.cached():
        loss = patched(**batch("left")).loss
    torch.testing.assert_close(gradients(patched, loss), wanted[1], rtol=1e-4, atol=1e-5)
    loss = patched(**batch("left")).loss
    with parametrize.cached():
        torch.testing.assert_close(gradients(patched, loss), wanted[1], rtol=1e-4, atol=1e-5)


def test_a_layer_that_changes_its_own_buffers_is_refused(config):
    model = tiny_model()
    parametrizations.spectral_norm(model.model.layers[1].mlp.up_proj)
    apply_lemo(model, config)
    with pytest.raises(RuntimeError, match="_u` changes whenever its layer runs"):
        model(**batch("left"))


def test_attributes_that_hold_graphs_are_not_kept_from_step_to_step():
    import gc
    import weakref

    model, inputs, kept = tiny_model(), batch("left"), []
    apply_lemo(model, LAYERS)

    def remember(module, args, output):
        module.latest, module.results = output, [output]
        kept.append(weakref.ref(output))

    model.model.layers[1].register_forward_hook(remember)
    for _ in range(4):
        model(**inputs).loss.backward()
    gc.collect()
    assert sum(reference() is not None for reference in kept) == 1


@pytest.mark.parametrize("reentrant", [False, True])
def test_so_are_layers_under_the_models_own_checkpointing(reentrant):
    model, inputs = lora(tiny_model(attention_dropout=0.2)), batch("left")
    model.enable_input_require_grads()
    checkpointing(model.get_base_model(), reentrant=reentrant)
    apply_lemo(model, HALF["detach"])
    torch.manual_seed(3)
    wanted = gradients(model, model(**inputs).loss)
    torch.manual_seed(3)
    loss = model(**inputs).loss
    to_another_mode(model)
    torch.set_default_dtype(torch.float32)
    got = gradients(model, loss)
    torch.testing.assert_close({name: got[name] for name in wanted}, wanted)
