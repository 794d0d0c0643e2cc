"""The arguments of a decoder layer's call, and layers that record theirs instead of computing."""

from __future__ import annotations

import contextlib
import functools
import inspect
from collections.abc import Callable, Iterator
from typing import Any

from torch import Tensor, nn

POSITIONS = ("position_ids", "position_embeddings")
CACHES = ("past_key_values", "layer_past", "use_cache")


_signature = functools.cache(inspect.signature)


def bind(module: Any, forward: Callable[..., Any], args: Any, kwargs: Any) -> inspect.BoundArguments:
    """The arguments of a call of a module's `forward` by name.

    A wrapper (*args, **kwargs) around it has no names: then they are those of the module's class.
    """
    signature = inspect.signature(forward)
    if all(p.kind in (p.VAR_POSITIONAL, p.VAR_KEYWORD) for p in signature.parameters.values()):
        signature = inspect.signature(type(module).forward.__get__(module))
    return signature.bind(*args, **kwargs)


def kept_apart(kwargs: dict[str, Any]) -> dict[str, Any]:
    """Arguments of a decoder's call, with copies of the masks and positions [B, S].

    Layers that run again in the backward pass read them then, when a caller may have written the next batch
    over them. Without LeMo, the model has read them by then.
    """
    copied = {
        name: value.clone()
        for name in ("attention_mask", "position_ids")
        if isinstance(value := kwargs.get(name), Tensor) and not value.is_floating_point() and value.ndim <= 3
    }
    return {**kwargs, **copied}


def ask_for_dict(arguments: inspect.BoundArguments) -> bool:
    """Let the bound call of a causal LM return a dict; tells whether its caller wants a tuple instead."""
    given = arguments.arguments
    if "return_dict" not in arguments.signature.parameters:
        given = given.setdefault("kwargs", {})
    return given.pop("return_dict", None) is False


def layer_arguments(
    forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[Tensor, dict[str, Any]]:
    """The hidden states that a call passes to a layer class's `forward`, and the other arguments by name."""
    signature = _signature(forward)
    arguments = dict(signature.bind(None, *args, **kwargs).arguments)
    _, first, *_, last = signature.parameters.values()
    if last.kind is last.VAR_KEYWORD:
        arguments.update(arguments.pop(last.name, {}))
    del arguments["self"]
    return arguments.pop(first.name), arguments


def split_arguments(arguments: dict[str, Any]) -> tuple[Any, dict[str, Any], dict[str, Any]]:
    """The attention mask, the arguments with one entry a token, and the others but caches and None."""
    mask = arguments.get("attention_mask")
    positions = {name: value for name, value in arguments.items() if name in POSITIONS}
    others = {"attention_mask", *POSITIONS, *CACHES}
    rest = {name: value for name, value in arguments.items() if name not in others and value is not None}
    return mask, positions, rest


@contextlib.contextmanager
def idle_layers(layers: nn.ModuleList) -> Iterator[list[tuple[Tensor, dict[str, Any]]]]:
    """Let layers return their input and append the arguments of each call to the list that this yields."""
    calls: list[tuple[Tensor, dict[str, Any]]] = []
    own = {layer: vars(layer).get("forward") for layer in layers}  # a layer may be at several depths

    def idle(layer: Any) -> Any:
        def forward(*args: Any, **kwargs: Any) -> Tensor:
            calls.append(layer_arguments(type(layer).forward, args, kwargs))
            return calls[-1][0]

        return forward

    for layer in own:
        vars(layer)["forward"] = idle(layer)
    try:
        yield calls
    finally:
        for layer, forward in own.items():
            del vars(layer)["forward"]
            if forward is not None:
                vars(layer)["forward"] = forward


def dry_options(model: Any) -> dict[str, bool]:
    """Options of a forward with idle layers, which fill no cache and ask no router."""
    options = {"use_cache": False}
    if hasattr(model.config, "output_router_logits"):
        options["output_router_logits"] = False
    return options
