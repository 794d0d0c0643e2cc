"""What a forward pass must find again when it runs a second time: random generators, autocast, hooks."""

from __future__ import annotations

import contextlib
import copy
from collections import OrderedDict
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import get_device_states, set_device_states

_HOOKS = ["_forward_pre_hooks", "_forward_pre_hooks_with_kwargs", "_forward_hooks"]
_HOOKS += ["_forward_hooks_with_kwargs", "_forward_hooks_always_called"]


class RandomState:
    """The random generators as they are now, on the CPU and on the devices of `tensor`."""

    def __init__(self, tensor: Tensor) -> None:
        self._device_type = tensor.device.type
        self._cpu = torch.get_rng_state()
        self._devices, self._states = get_device_states(tensor)

    def holds(self, tensor: Tensor) -> bool:
        """Whether the generators are still as they were: nothing was drawn."""
        now = RandomState(tensor)
        return torch.equal(self._cpu, now._cpu) and all(map(torch.equal, self._states, now._states))

    @contextlib.contextmanager
    def restored(self) -> Iterator[None]:
        """The generators as they were, inside the block."""
        with torch.random.fork_rng(self._devices, device_type=self._device_type):
            torch.set_rng_state(self._cpu)
            if self._devices:
                set_device_states(self._devices, self._states, device_type=self._device_type)
            yield


class ForwardHooks:
    """The hooks on the parts of `modules` as they are now.

    PEFT hooks its layers for the time of a forward pass, to hand them arguments. Those hooks are gone when
    the backward pass runs the layers again.
    """

    def __init__(self, modules: Iterable[nn.Module]) -> None:
        self._parts = [part for module in modules for child in module.children() for part in child.modules()]
        self._hooks = [self._of(part) for part in self._parts]

    @staticmethod
    def _of(part: nn.Module) -> dict[str, Any]:
        return {name: copy.copy(hooks) for name in _HOOKS if (hooks := vars(part)[name])}

    @contextlib.contextmanager
    def restored(self) -> Iterator[None]:
        """The hooks as they were, inside the block."""
        changed = [
            (part, before, now)
            for part, before in zip(self._parts, self._hooks, strict=True)
            if before != (now := {name: vars(part)[name] for name in _HOOKS if vars(part)[name]})
        ]
        for part, before, _ in changed:
            vars(part).update({name: before.get(name, OrderedDict()) for name in _HOOKS})
        try:
            yield
        finally:
            for part, _, now in changed:
                vars(part).update({name: now.get(name, OrderedDict()) for name in _HOOKS})

    def arguments(self) -> set[str]:
        """The names of the arguments that they hand over (those of `functools.partial`)."""
        hooks = [hook for kinds in self._hooks for kind in kinds.values() for hook in kind.values()]
        return {name for hook in hooks for name in getattr(hook, "keywords", ())}


def present_autocast(device: torch.device) -> torch.autocast:
    """Autocast as it is now, for a later re-run. It caches no casts, which would outlive their graph."""
    return torch.autocast(
        device.type,
        dtype=torch.get_autocast_dtype(device.type),
        enabled=torch.is_autocast_enabled(device.type),
        cache_enabled=False,
    )
