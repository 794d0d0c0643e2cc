"""A model on fake tensors: its own code runs, shapes and bytes are real, and nothing is computed.

Every parameter and buffer is exchanged for a fake one for a while, so that a step of a large model can be
counted in seconds and without its memory. Where the code asks for a value, it gets the one of the usual case:
all tokens have a label, and comparisons hold.
"""

from __future__ import annotations

import contextlib
from collections import OrderedDict
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from lemo_trainer.compat import (
    FakeTensorMode,
    TorchDispatchMode,
    is_whole,
    one_document,
    uncached_parametrizations,
    without_global_hooks,
    without_hooks_on_saved_tensors,
)

_aten = torch.ops.aten


class CannotCountError(Exception):
    """A step of this model cannot be counted on fake tensors."""


class _UsualValues(TorchDispatchMode):
    """Answers questions about values that fake tensors do not have."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is _aten.nonzero.default:
            return args[0].new_empty(args[0].numel(), args[0].dim(), dtype=torch.int64)
        if func in (_aten.equal.default, _aten.allclose.default):
            return True
        if func is _aten._local_scalar_dense.default:
            return 1
        return func(*args, **(kwargs or {}))


@contextlib.contextmanager
def faked(model: nn.Module) -> Iterator[None]:
    """Inside the block, `model` computes with fake parameters and buffers, and new tensors are fake too.

    Weights on the meta device count as weights on the CPU. Trained parameters have gradients already, as in
    all steps but the first.

    Raises:
        CannotCountError: weights are sharded or quantized, so that their shapes are not those they compute
            with; or what runs in the block fails.
    """
    for name, weight in model.named_parameters():
        if not weight.is_meta and not is_whole(weight):
            raise CannotCountError("its weights are sharded")
        if type(weight) not in (Tensor, nn.Parameter):
            raise CannotCountError(f"{name} is a {type(weight).__name__}")
    fake = FakeTensorMode(allow_non_fake_inputs=True)
    try:
        with (
            fake,
            _UsualValues(),
            one_document(),
            without_global_hooks(),
            uncached_parametrizations(),
            without_hooks_on_saved_tensors(),
            _own_state_kept(model),
        ):
            _fake_weights(model)
            yield
    except Exception as error:
        raise CannotCountError(
            f"it does not run on fake tensors ({type(error).__name__}: {error})"
        ) from error


def _fake_weights(model: nn.Module) -> None:
    fakes: dict[int, Tensor] = {}
    for part in model.modules():
        for own in (part._parameters, part._buffers):
            for name, tensor in own.items():
                if tensor is None:
                    continue
                if id(tensor) not in fakes:  # tied weights stay tied
                    fakes[id(tensor)] = _fake(tensor)
                own[name] = fakes[id(tensor)]
        for name, value in list(vars(part).items()):
            if isinstance(value, Tensor):  # as torch.nn.utils.weight_norm makes of parameters, with a graph
                vars(part)[name] = _fake(value).requires_grad_(value.requires_grad)


@contextlib.contextmanager
def _own_state_kept(model: nn.Module) -> Iterator[None]:
    """Take the hooks off every part of `model`; afterwards each part has all its attributes as before.

    Hooks belong to others, who did not ask for this run; and some rotary embeddings note the longest sample.
    """
    parts = list(model.modules())
    before = [(part, dict(vars(part)), dict(part._parameters), dict(part._buffers)) for part in parts]
    try:
        for part in parts:
            for name in [name for name in vars(part) if name.endswith("_hooks")]:
                vars(part)[name] = OrderedDict()
        yield
    finally:
        for part, attributes, parameters, buffers in before:
            vars(part).clear()
            vars(part).update(attributes)
            part._parameters.clear()
            part._parameters.update(parameters)
            part._buffers.clear()
            part._buffers.update(buffers)


def _fake(tensor: Tensor) -> Tensor:
    device = "cpu" if tensor.is_meta else tensor.device
    fake = torch.empty(tensor.shape, dtype=tensor.dtype, device=device)
    if isinstance(tensor, nn.Parameter):
        fake = nn.Parameter(fake, requires_grad=tensor.requires_grad)
        if fake.requires_grad:
            fake.grad = torch.empty_like(fake)
    return fake
