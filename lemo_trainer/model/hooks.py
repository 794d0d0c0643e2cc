"""Forward hooks on a model's parts: those of one forward pass, and those that see a whole sample."""

from __future__ import annotations

import contextlib
import copy
from collections import OrderedDict
from collections.abc import Iterable, Iterator
from typing import Any

from torch import nn

_HOOKS = ["_forward_pre_hooks", "_forward_pre_hooks_with_kwargs", "_forward_hooks"]
_HOOKS += ["_forward_hooks_with_kwargs", "_forward_hooks_always_called"]
_OF_GRADIENTS = ("make_inputs_require_grad", "require_grads")  # enable_input_require_grads, of any library


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


def counts_from_the_end(layer: nn.Module) -> bool:
    """Whether PEFT's aLoRA is on for the running forward pass: it counts tokens from a sample's end."""
    return "alora_offsets" in ForwardHooks([layer]).arguments()


def hooks_on_embeddings(model: Any) -> list[str]:
    """The names of the hooks on the embeddings of a sample, without those that only ask for gradients."""
    embeddings = model.get_input_embeddings()
    hooks = [*embeddings._forward_pre_hooks.values(), *embeddings._forward_hooks.values()]
    names = [getattr(hook, "__qualname__", repr(hook)) for hook in hooks]
    return [name for name in names if not any(part in name for part in _OF_GRADIENTS)]
