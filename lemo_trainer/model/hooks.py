"""Forward hooks on a model's parts: those of one forward pass, and those that see a whole sample."""

from __future__ import annotations

import contextlib
import copy
import functools
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from torch import Tensor, nn

from lemo_trainer.compat import backward_hooks, global_hooks, hooks_on
from lemo_trainer.model.architectures import CausalLM

_HOOKS = ["_forward_pre_hooks", "_forward_pre_hooks_with_kwargs", "_forward_hooks"]
_HOOKS += ["_forward_hooks_with_kwargs", "_forward_hooks_always_called"]
_CALLED = ("_forward_pre_hooks", "_forward_hooks")  # the other dicts hold flags
_ALORA = "alora_offsets"  # the argument with which PEFT's aLoRA counts tokens from a sample's end
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

    def of_rows(self, index_BK: Tensor, seq_len: int) -> ForwardHooks:
        """The same hooks for the tokens at ascending positions `index_BK` of samples of `seq_len` tokens.

        PEFT's aLoRA acts on the last tokens of a sample: its count becomes that of the rows among them.
        """
        other = copy.copy(self)
        other._hooks = [
            {
                kind: OrderedDict((key, _of_rows(hook, index_BK, seq_len)) for key, hook in hooks.items())
                if kind in _CALLED
                else hooks
                for kind, hooks in kinds.items()
            }
            for kinds in self._hooks
        ]
        return other

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


@contextlib.contextmanager
def without_hooks(model: nn.Module) -> Iterator[None]:
    """Inside the block, no part of `model` has forward hooks; they belong to others."""
    kept = [(part, {name: vars(part)[name] for name in _HOOKS}) for part in model.modules()]
    for part, hooks in kept:
        vars(part).update({name: OrderedDict() for name in hooks})
    try:
        yield
    finally:
        for part, hooks in kept:
            vars(part).update(hooks)


def _of_rows(hook: Any, index_BK: Tensor, seq_len: int) -> Any:
    offsets = getattr(hook, "keywords", {}).get(_ALORA)
    if offsets is None:
        return hook
    of_rows = [
        None if offset is None else int((index_K >= seq_len - offset).sum()) or None
        for offset, index_K in zip(offsets, index_BK, strict=True)
    ]
    return functools.partial(hook.func, *hook.args, **{**hook.keywords, _ALORA: of_rows})


Rows = Callable[[Tensor | None], contextlib.AbstractContextManager[None]]


def hooks_on_rows(layer: nn.Module, seq_len: int) -> Rows:
    """Maps positions [B, K] to a block in which the hooks of `layer` act on these tokens; None is all.

    The block restores hooks of this forward pass too, for a recomputation in the backward pass.
    """
    if not counts_from_the_end(layer):
        return lambda index_BK: contextlib.nullcontext()
    hooks = ForwardHooks([layer])

    def on_rows(index_BK: Tensor | None) -> contextlib.AbstractContextManager[None]:
        return (hooks if index_BK is None else hooks.of_rows(index_BK, seq_len)).restored()

    return on_rows


def counts_from_the_end(layer: nn.Module) -> bool:
    """Whether PEFT's aLoRA is on for the running forward pass: it counts tokens from a sample's end."""
    hooks = [hook for part in layer.modules() for hook in part._forward_pre_hooks.values()]
    return any(_ALORA in getattr(hook, "keywords", ()) for hook in hooks)


def hooks_on_gradients(layer: nn.Module, *, inside: bool = False) -> list[str]:
    """The names of the backward hooks on all modules, and on `layer` and its parts.

    Args:
        inside: leave out those on the layer itself.
    """
    hooks = [(hook, "all modules") for hook in global_hooks(backward_only=True)]
    for name, part in layer.named_modules():
        if name or not inside:
            hooks += [(hook, f"`{name}` of a layer" if name else "a layer") for hook in backward_hooks(part)]
    return [f"the backward hook {name_of(hook)} on {where}" for hook, where in hooks]


def name_of(hook: Any) -> str:
    """What a user knows a hook by."""
    return str(getattr(hook, "__qualname__", hook))


def hooks_outside_layers(parts: CausalLM) -> list[str]:
    """The names of the hooks on the embeddings, the last norm and the decoder, which see a whole sample.

    Hooks that only ask for gradients do not count.
    """
    decoder = parts.decoder
    others = [part for part in decoder.children() if part is not parts.layers and list(part.parameters())]
    names = [name_of(hook) for part in [decoder, *others] for hook in hooks_on(part)]
    return [name for name in names if not any(part in name for part in _OF_GRADIENTS)]
