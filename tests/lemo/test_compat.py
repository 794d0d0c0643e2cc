"""Each private or version-dependent part that `lemo_trainer.compat` relies on, in the installed versions.

A failure here names what an upgrade of torch, transformers or PEFT changed.
"""

from __future__ import annotations

import inspect
import logging

import pytest
import torch
from torch import nn
from transformers import TrainerCallback, TrainingArguments
from transformers.trainer_callback import CallbackHandler, TrainerControl, TrainerState

from lemo_trainer import compat

from .tiny import lora, loss_and_gradients, tiny_model


def test_operations_are_seen_with_their_storages_and_flops():
    seen = []

    class Watch(compat.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            seen.append(func.overloadpacket)
            storages.extend(compat.StorageWeakRef(x.untyped_storage()) for x in compat.tree_leaves([out]))
            return out

    storages = []
    with Watch():
        product = torch.ones(2, 3) @ torch.ones(3, 4)
    assert torch.ops.aten.mm in seen
    assert not storages[-1].expired()
    del product
    assert storages[-1].expired()
    assert compat.flop_registry[torch.ops.aten.mm](torch.ones(2, 3), torch.ones(3, 4), out_val=None) == 48
    shapes = ((1, 2, 8, 4),) * 3
    assert compat.sdpa_backward_flop_count((1, 2, 8, 4), *shapes) > compat.sdpa_flop_count(*shapes)


def test_a_backward_pass_is_noticed():
    noticed = []
    x = torch.ones(2, requires_grad=True)
    x.register_hook(lambda grad: noticed.append(compat.in_backward()))
    assert not compat.in_backward()
    x.sum().backward()
    assert noticed == [True]


def test_sdpa_runs_one_of_the_known_kernels_forward_and_backward():
    ran = set()

    class Watch(compat.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            ran.add(func)
            return func(*args, **(kwargs or {}))

    x = torch.randn(1, 2, 8, 4, requires_grad=True)
    with Watch():
        nn.functional.scaled_dot_product_attention(x, x, x, is_causal=True).sum().backward()
    assert ran & compat.SDPA_KERNELS == {compat.SDPA_ON_CPU.default}
    assert compat.SDPA_ON_CPU_BACKWARD.default in ran


def test_a_missing_operator_is_an_error_at_import():
    with pytest.raises(ImportError, match=r"aten::_no_such_attention; install a torch that pyproject\.toml"):
        compat._operator("_no_such_attention")


@pytest.mark.parametrize(
    ("known", "register", "register_global"),
    [
        (compat.has_forward_hooks, "register_forward_hook", "register_module_forward_hook"),
        (compat.has_forward_pre_hooks, "register_forward_pre_hook", "register_module_forward_pre_hook"),
    ],
)
def test_hooks_are_seen(known, register, register_global):
    module = nn.Linear(2, 2)
    assert not known(module)
    for add in (getattr(module, register), getattr(nn.modules.module, register_global)):
        hook = add(lambda *_: None)
        assert known(module)
        hook.remove()
        assert not known(module)


def test_wrappers_are_taken_off():
    model = tiny_model()
    wrapper = nn.Module()
    wrapper.module = model
    for wrapped in (lora(tiny_model()), torch.compile(model), wrapper):
        assert type(compat.unwrap(wrapped)) is type(model)


def test_whole_weights_are_told_from_meta_and_sharded_ones():
    assert compat.is_whole(torch.ones(2))
    assert not compat.is_whole(torch.ones(2, device="meta"))
    from torch.distributed.tensor import DTensor

    assert callable(DTensor.full_tensor)


def test_peft_names_parameters_by_their_base():
    base = {name for name, _ in tiny_model().named_parameters()}
    adapted = [
        name for name, _ in compat.unwrap(lora(tiny_model(), modules_to_save=["lm_head"])).named_parameters()
    ]
    names = [compat.base_parameter_name(name) for name in adapted]
    assert set(names) - {None} == base
    assert names.count(None) == len(adapted) - len(base)


def test_modules_dispatch_to_the_implementation_that_is_set():
    model = tiny_model(layers=1)
    attention = model.model.layers[0].self_attn
    assert compat.attention_implementation(attention.config) == "sdpa"
    assert compat.attention_function(attention, "sdpa").__name__ == "sdpa_attention_forward"
    eager = compat.attention_function(attention, "eager")
    assert eager is inspect.getmodule(type(attention)).eager_attention_forward
    compat.set_attention_implementation(attention.config, "eager")
    assert model(input_ids=torch.ones(1, 4, dtype=torch.long), output_attentions=True).attentions


def test_an_attention_without_an_eager_form_is_an_error():
    with pytest.raises(ImportError, match=r"needs `eager_attention_forward` in torch\.nn"):
        compat.attention_function(nn.Linear(1, 1), "sdpa")


def test_options_that_sdpa_does_not_know_are_no_arguments_of_it():
    known = inspect.signature(
        compat.attention_function(tiny_model(layers=1).model.layers[0].self_attn, "sdpa")
    )
    assert {"softcap", "s_aux"} <= set(compat.NOT_IN_SDPA)
    assert not {"softcap", "s_aux"} & set(known.parameters)


def test_a_loss_function_is_exchanged_and_comes_back():
    model, tokens = tiny_model(layers=1), torch.ones(1, 4, dtype=torch.long)
    assert compat.uses_causal_lm_loss(model)
    with compat.loss_function(model, lambda *args, **kwargs: torch.tensor(7.0)):
        assert not compat.uses_causal_lm_loss(model)
        assert model(input_ids=tokens, labels=tokens).loss == 7.0
    assert compat.uses_causal_lm_loss(model)
    assert "_loss_function" not in vars(model)


def test_checkpointing_is_an_attribute_and_a_function_of_each_layer(monkeypatch):
    model = tiny_model(layers=1)
    layer = model.model.layers[0]
    assert not getattr(layer, compat.CHECKPOINTING)
    compat.enable_checkpointing(model)
    assert vars(layer)[compat.CHECKPOINTING] is True
    own, calls = compat.checkpointing_function(layer), []
    layer._gradient_checkpointing_func = lambda *args, **kwargs: calls.append(1) or own(*args, **kwargs)
    tokens = torch.ones(1, 4, dtype=torch.long)
    loss_and_gradients(model, {"input_ids": tokens, "labels": tokens})
    assert calls == [1]


def test_training_arguments_take_checkpointing_by_its_present_name(tmp_path):
    args = TrainingArguments(str(tmp_path), **{compat.checkpointing_argument(): True}, report_to="none")
    assert getattr(args, compat.checkpointing_argument()) is True


def test_trl_asks_for_its_fused_head_by_a_keyword():
    from trl.trainer import utils

    assert "fused_lm_head" in inspect.getsource(utils)
    assert compat.loss_is_made_by_trl({"kwargs": {"fused_lm_head": True}})
    assert not compat.loss_is_made_by_trl({"labels": None})


def test_a_cache_is_made_of_layers_that_are_initialised_by_the_first_keys():
    cache = compat.Cache(layer_class_to_replicate=compat.DynamicLayer)
    keys = torch.ones(1, 2, 3, 4)
    cache.update(keys, keys, 0)
    (layer,) = cache.layers
    assert isinstance(layer, compat.DynamicLayer)
    assert layer.is_initialized
    assert torch.equal(layer.keys, keys)
    fresh = compat.DynamicLayer()
    assert not fresh.is_initialized
    fresh.lazy_initialization(keys, keys)
    assert fresh.keys.numel() == 0


class Looking(TrainerCallback):
    def on_log(self, args, state, control, **kwargs):
        self.handler = compat.calling_handler(self)


def test_the_handler_that_calls_an_event_is_found(caplog):
    callback = Looking()
    handler = CallbackHandler([callback], None, None, None, None)
    handler.on_log(None, TrainerState(), TrainerControl(), {})
    assert callback.handler is handler
    with caplog.at_level(logging.WARNING):
        callback.on_log(None, TrainerState(), TrainerControl())
    assert callback.handler is None
    assert "not the reporting callbacks" in caplog.text
