"""What a graph does besides computing its results, known before any of it runs.

A whole graph may be called to be timed and compared only if it does nothing else: it draws no random numbers,
exchanges nothing with other processes, and calls operators of torch and of this package alone. The operators
are listed by a run on fake tensors, as AOTAutograd traces them.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from types import FunctionType
from typing import Any

import torch
from torch import Tensor, fx
from torch._ops import HigherOrderOperator, OpOverload, OpOverloadPacket
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from ollie_compile.measure.isolation import outside_compilation

PURE = frozenset({"aten", "prim", "prims", "mkl", "mkldnn", "ollie", "ollie_user"})
WITH_SIDE_EFFECTS = frozenset({"aten::from_file", "aten::record_stream", "aten::_print"})
COMMUNICATION = frozenset(
    {"c10d", "c10d_functional", "_c10d_functional", "_c10d_functional_autograd", "_dtensor", "symm_mem"}
)


@dataclass(frozen=True, slots=True)
class Effects:
    """The effects of one graph.

    Attributes:
        communicates: what exchanges data with other processes, if anything does.
        unsafe: why the graph must never run to be timed or compared; None if it may.
    """

    communicates: str | None = None
    unsafe: str | None = None


def effects_of(gm: fx.GraphModule, inputs: Sequence[Any]) -> Effects:
    """The effects of a graph of Dynamo, which runs on fake tensors only.

    Args:
        inputs: the graph's inputs; tensors may be fake.
    """
    if any(isinstance(value, Tensor) and value.device.type == "meta" for value in inputs):
        return Effects(unsafe="tensors on the device meta have no data")
    called = [target for module in _graphs(gm) for target in _targets(module)]
    communicates = _first(map(_communicates, [*called, *inputs]))
    unsafe = _first(map(_why_unsafe, called))
    if communicates is None and unsafe is None:
        try:
            dispatched = _dispatched(gm, inputs)
        except Exception as error:  # such as shapes that depend on data
            return Effects(unsafe=f"its operators could not be listed: {str(error).partition(chr(10))[0]}")
        communicates = _first(map(_communicates, dispatched))
        unsafe = _first(map(_why_unsafe, dispatched))
        if unsafe is None and any(True for _ in gm.buffers()):
            unsafe = _first(f"`{_name(one)}` may change a buffer" for one in dispatched if _writes(one))
    if communicates is not None:
        unsafe = f"it exchanges data with other processes ({communicates})"
    return Effects(communicates, unsafe)


def _first(found: Any) -> str | None:
    return next((one for one in found if one is not None), None)


def _graphs(gm: fx.GraphModule) -> Iterator[fx.GraphModule]:
    """The graph and those that its higher-order operators call."""
    return (module for module in gm.modules() if isinstance(module, fx.GraphModule))


def _targets(gm: fx.GraphModule) -> Iterator[Any]:
    for node in gm.graph.nodes:
        if node.op == "call_module":
            yield gm.get_submodule(str(node.target))
        elif node.op == "call_function":
            yield node.target


def _name(target: Any) -> str | None:
    """The name of an operator of torch's dispatcher."""
    if isinstance(target, OpOverload):
        return target.name().partition(".")[0]
    return target._qualified_op_name if isinstance(target, OpOverloadPacket) else None


def _communicates(target: Any) -> str | None:
    if isinstance(target, Tensor):  # a tensor that is spread over processes brings them to its operators
        distributed = type(target).__module__.startswith("torch.distributed")
        return type(target).__name__ if distributed else None
    name = _name(target)
    return name if name is not None and name.partition("::")[0] in COMMUNICATION else None


def _why_unsafe(target: Any) -> str | None:
    if (name := _name(target)) is not None:
        if name.partition("::")[0] not in PURE or name in WITH_SIDE_EFFECTS:
            return f"`{name}` may have side effects"
        random = isinstance(target, OpOverload) and torch.Tag.nondeterministic_seeded in target.tags
        return f"`{name}` draws random numbers" if random else None
    if isinstance(target, HigherOrderOperator):
        return f"`{target.name()}` may have side effects"
    ours = type(target).__module__ if isinstance(target, torch.nn.Module) else target.__module__
    plain = not isinstance(target, FunctionType | torch.nn.Module) or ours.partition(".")[0] == "torch"
    return None if plain else f"`{getattr(target, '__name__', type(target).__name__)}` may have side effects"


def _writes(target: OpOverload) -> bool:
    return target._schema.is_mutable or "batch_norm" in target.name()


class _Listing(TorchDispatchMode):
    """Lists the operators that are dispatched, each once."""

    supports_higher_order_operators = True

    def __init__(self) -> None:
        super().__init__()
        self.seen: dict[Any, None] = {}

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        self.seen[func] = None
        return func(*args, **(kwargs or {}))


def _dispatched(gm: fx.GraphModule, inputs: Sequence[Any]) -> list[Any]:
    listing = _Listing()
    with outside_compilation(autocast=True), torch.random.fork_rng(devices=[]), FakeTensorMode() as mode:
        values = tuple(_fake(mode, value) for value in inputs)
        held = {name: _fake(mode, one) for name, one in (*gm.named_parameters(), *gm.named_buffers())}
        with listing:
            torch.func.functional_call(gm, held, values)
    return list(listing.seen)


def _fake(mode: FakeTensorMode, value: Any) -> Any:
    """A fake tensor of another mode has its sizes at hand, which may be symbols."""
    if isinstance(value, FakeTensor):
        sizes, strides = (list(map(_hint, numbers)) for numbers in (value.shape, value.stride()))
        return torch.empty_strided(sizes, strides, dtype=value.dtype, device=value.device)
    return mode.from_tensor(value, static_shapes=True) if isinstance(value, Tensor) else _hint(value)


def _hint(value: Any) -> Any:
    """The number that stood for a symbol when the graph was traced; asking for it sets no guard."""
    return value.node.hint if isinstance(value, torch.SymInt | torch.SymFloat) else value
