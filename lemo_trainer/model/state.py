"""What the next run of a module reads besides its arguments, kept for a run that repeats an earlier one.

A layer that runs again in the backward pass must compute what it computed in the forward pass. In between, a
training loop may call `eval()`, switch adapters, freeze weights, remove hooks, or leave a
`torch.func.functional_call`, which exchanges weights for its own time only.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import operator
import types
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from lemo_trainer.compat import storage_of, uncached_parametrizations, version_of

_NAMES = [name for name in vars(nn.Module()) if name.startswith(("_modules", "_forward", "_backward"))]
_OF_TORCH = operator.itemgetter(*_NAMES)  # a module's parts and hooks
_EMPTY: tuple[dict[Any, Any], ...] = tuple({} for _ in _NAMES)
_NOT_OWN = {*vars(nn.Module())} - {"training", "_is_full_backward_hook"}
_VALUES = {bool, int, float, str, type(None), torch.dtype, functools.partial}
_VALUES |= {types.FunctionType, types.BuiltinFunctionType, types.MethodType}
_CONTAINERS = {dict, OrderedDict, list, set}
_MERGED = "merged_adapters"  # PEFT's layers list here the adapters that their weights contain already


class ModuleState:
    """Every part of `modules` as it is now: attributes, hooks, weights with their `requires_grad`, config.

    Attributes that are tensors, or objects that may hold some, are not kept: they would keep the graphs of
    earlier steps alive.

    Args:
        modules: what will run again.
        arguments: what will be handed to it, by name; it must not change in place.

    Attributes:
        parts: the modules and all modules in them, each once.
        trained: the distinct parameters, and buffers, that require a gradient.
    """

    def __init__(self, modules: Iterable[nn.Module], arguments: dict[str, Any] | None = None) -> None:
        self._modules = list(modules)
        self._arguments = dict(_named_tensors(arguments or {}))
        self.parts = _parts_of(self._modules)
        self._containers = [_containers_of(part) for part in self.parts]
        self._attributes = [_attributes_of(part) for part in self.parts]
        self._tensors = list(_tensors_of(self.parts))
        configs = {id(config): config for own in self._attributes if (config := own.get("config"))}
        self._configs = [(config, dict(vars(config))) for config in configs.values()]
        self._dtype = torch.get_default_dtype()
        distinct = {id(each): each for _, _, tensors in self._tensors for each in tensors.values()}
        self._distinct = [tensor for tensor in distinct.values() if tensor is not None]
        self._requires_grad = [tensor.requires_grad for tensor in self._distinct]
        self.trained = list(itertools.compress(self._distinct, self._requires_grad))
        self._watched = [*self._distinct, *self._arguments.values()]
        self._versions: list[int | None] = [version_of(tensor) for tensor in self._watched]
        self._storages: list[int] | None = None

    def after_first_run(self) -> None:
        """Note where the tensors lie, now that the first run is over.

        Raises:
            RuntimeError: the run itself changed a buffer, so that a second one would compute something else.
        """
        buffers = {id(each) for _, name, own in self._tensors if name == "_buffers" for each in own.values()}
        for index, (tensor, version) in enumerate(zip(self._watched, self._versions, strict=True)):
            if version_of(tensor) == version:
                continue
            if id(tensor) in buffers:
                raise RuntimeError(
                    f"LeMo runs a layer again in the backward pass, and {self._name_of(tensor)} changes "
                    "whenever its layer runs (spectral norm? running statistics?): train without LeMo."
                )
            self._versions[index] = None  # PEFT sets weights of experts to themselves
        self._storages = [storage_of(tensor) for tensor in self._watched]

    def repeated(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """`function`, of which every call but the first meets the modules as they are now."""
        calls = itertools.count()

        def run(*args: Any) -> Any:
            with self.restored() if next(calls) else uncached_parametrizations():
                return function(*args)

        return run

    @contextlib.contextmanager
    def restored(self) -> Iterator[None]:
        """The modules as they were, inside the block.

        Raises:
            RuntimeError: a tensor was changed since, so that the modules cannot be as they were.
        """
        self._check_tensors()
        with uncached_parametrizations(), contextlib.ExitStack() as stack:
            kept = zip(self.parts, self._containers, self._attributes, strict=True)
            for part, containers, attributes in kept:
                if (held := _containers_of(part)) != containers:
                    now, wanted = (dict(zip(_NAMES, own, strict=True)) for own in (held, containers))
                    _exchange(part, now, wanted, stack)
                if (own := _attributes_of(part)) != attributes:
                    _check_merged(part, attributes, own)
                    _exchange(part, own, attributes, stack)
            for part, name, tensors in self._tensors:
                held_now = vars(part)[name].values()
                if len(held_now) != len(tensors) or not all(map(operator.is_, held_now, tensors.values())):
                    _exchange(part, {name: None}, {name: tensors}, stack)
            self._restore_flags(stack)
            yield

    def _restore_flags(self, stack: contextlib.ExitStack) -> None:
        for tensor, wanted in zip(self._distinct, self._requires_grad, strict=True):
            if tensor.requires_grad != wanted:
                stack.callback(tensor.requires_grad_, not wanted)
                tensor.requires_grad_(wanted)
        for config, values in self._configs:
            if (own := vars(config)) != values:
                stack.callback(_become, own, dict(own))
                _become(own, values)
        if (dtype := torch.get_default_dtype()) != self._dtype:
            stack.callback(torch.set_default_dtype, dtype)
            torch.set_default_dtype(self._dtype)

    def _check_tensors(self) -> None:
        storages = self._storages or [storage_of(tensor) for tensor in self._watched]
        for tensor, version, storage in zip(self._watched, self._versions, storages, strict=True):
            written = version is not None and version_of(tensor) != version
            if not written and storage_of(tensor) == storage:
                continue
            how = "changed in place" if written else "given other data (`.data`, `.to`)"
            raise RuntimeError(
                f"LeMo runs a layer again in the backward pass, and {self._name_of(tensor)} was {how} since "
                "the forward pass: call backward() before the optimizer's step, and before weights or inputs "
                "are written or moved."
            )

    def _name_of(self, tensor: Tensor) -> str:
        for name, other in self._arguments.items():
            if other is tensor:
                return f"its argument `{name}`"
        for module in self._modules:
            for name, other in (*module.named_parameters(), *module.named_buffers()):
                if other is tensor:
                    return f"its `{name}`"
        return f"its weight of shape {tuple(tensor.shape)}"


def repeating(
    run: Callable[..., Any], layer: nn.Module, arguments: dict[str, Any] | None = None
) -> Callable[..., Any]:
    """`run`, a kind of checkpointing of parts of `layer`, whose recomputation meets the layer as it is now.

    Args:
        arguments: what the parts get; see `ModuleState`.
    """
    state = ModuleState([layer], arguments)

    def run_once(function: Callable[..., Any], *args: Any) -> Any:
        output = run(state.repeated(function), *args)
        state.after_first_run()
        return output

    return run_once


def _parts_of(modules: list[nn.Module]) -> list[nn.Module]:
    parts: dict[int, nn.Module] = {}
    waiting: list[nn.Module | None] = list(modules)
    while waiting:
        part = waiting.pop()
        if part is not None and id(part) not in parts:
            parts[id(part)] = part
            waiting.extend(part._modules.values())
    return list(parts.values())


def _containers_of(part: nn.Module) -> tuple[dict[Any, Any], ...]:
    """Copies of the containers of a part's parts and hooks, in the order of `_NAMES`."""
    containers = _OF_TORCH(vars(part))
    return tuple([own.copy() if own else {} for own in containers]) if any(containers) else _EMPTY


def _attributes_of(part: nn.Module) -> dict[str, Any]:
    """Its attributes that hold no tensors; containers are copies."""
    own = vars(part)
    kept: dict[str, Any] = {}
    for name in _own_names(tuple(own)):
        value = own[name]
        kind = type(value)
        if kind in _VALUES or name == "config":
            kept[name] = value
        elif kind in _CONTAINERS and (not value or _holds_values(value)):
            kept[name] = value.copy()
    return kept


@functools.lru_cache(4096)
def _own_names(names: tuple[str, ...]) -> list[str]:
    """The attributes among `names` that are not torch's containers."""
    return [name for name in names if name not in _NOT_OWN]


def _holds_values(container: Any) -> bool:
    first = next(iter(container.values() if isinstance(container, dict) else container))
    return type(first) in _VALUES


def _tensors_of(parts: list[nn.Module]) -> Iterator[tuple[nn.Module, str, dict[str, Tensor | None]]]:
    """Each part that has parameters or buffers, the name of their container, and a copy of it."""
    for part in parts:
        own = vars(part)
        if own["_parameters"]:
            yield part, "_parameters", own["_parameters"].copy()
        if own["_buffers"]:
            yield part, "_buffers", own["_buffers"].copy()


def _named_tensors(arguments: dict[str, Any]) -> Iterator[tuple[str, Tensor]]:
    for name, value in arguments.items():
        if isinstance(value, Tensor):
            yield name, value
        elif isinstance(value, tuple | list):
            yield from _named_tensors({f"{name}[{index}]": each for index, each in enumerate(value)})
        elif isinstance(value, dict):
            yield from _named_tensors({f"{name}[{key!r}]": each for key, each in value.items()})


def _check_merged(part: nn.Module, before: dict[str, Any], now: dict[str, Any]) -> None:
    if before.get(_MERGED) != now.get(_MERGED):
        raise RuntimeError(
            f"Adapters were merged into a {type(part).__name__} or out of it between the forward and the "
            "backward pass, which changes its weights: call backward() before."
        )


def _exchange(
    part: nn.Module, now: dict[str, Any], wanted: dict[str, Any], stack: contextlib.ExitStack
) -> None:
    """Give a part the attributes `wanted` in place of `now`, until `stack` is left."""
    own = vars(part)
    missing = object()
    changed = [name for name in {**now, **wanted} if now.get(name, missing) != wanted.get(name, missing)]
    before = {name: own[name] for name in changed if name in own}
    stack.callback(_put, own, changed, before)
    new = {name: wanted[name] for name in changed if name in wanted}
    _put(own, changed, {n: each.copy() if type(each) in _CONTAINERS else each for n, each in new.items()})


def _put(own: dict[str, Any], names: list[str], values: dict[str, Any]) -> None:
    for name in names:
        own.pop(name, None)
    own.update(values)


def _become(own: dict[str, Any], values: dict[str, Any]) -> None:
    own.clear()
    own.update(values)
