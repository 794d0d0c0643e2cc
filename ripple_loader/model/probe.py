"""Find the MLPs of an architecture that the table does not list: by structure, and then by numbers.

A module is an MLP if it holds two or three linears and an activation, and computes
down(act(gate(x)) * up(x)) or down(act(gate(x))) with small random weights in their place, for one assignment
of its linears to these roles. A norm between, a scale or another order of operations makes other numbers.
"""

from __future__ import annotations

import copy
import itertools
import json
import re
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from ripple_loader.model.architectures import ARCHITECTURES, OTHER_SENSES, Architecture, Projection
from ripple_loader.model.classes import is_encoder_decoder, is_wrapper, skeleton

WANTED = (
    "a module in each layer that computes down(act(gate(x)) * up(x)) or down(act(gate(x))) with linears and "
    "an activation of its own, and no experts beside it"
)
HIDDEN, NEURONS, ROWS = 6, 10, 8  # of the small linears, and of the data that they are compared on
TOLERANCE = 1e-9  # in float64

_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
_probed: dict[str, Architecture] = {}


def architecture_of(config: Any, model: nn.Module | None = None) -> Architecture:
    """Where a model keeps its MLP neurons: its entry in the table, or what the probe finds.

    Args:
        config: transformers' configuration of the model.
        model: to probe; by default the one that transformers has for texts.

    Raises:
        ValueError: the table has no entry and the probe finds no MLPs to stream; or transformers has no
            language model of this type.
    """
    for kind in (config.model_type, config.get_text_config().model_type):
        if kind in ARCHITECTURES:
            return ARCHITECTURES[kind]
    key = json.dumps(config.to_dict(), sort_keys=True, default=str)
    if key not in _probed:
        _probed[key] = probe(skeleton(config) if model is None else model)
    return _probed[key]


def probe(model: nn.Module) -> Architecture:
    """Where the MLPs of a model are.

    Args:
        model: with or without memory for its weights, which are not read.

    Raises:
        ValueError: a layer has no MLP, or several, or layers differ; the message says what was looked for.
    """
    kind = model.config.model_type
    stacks = _stacks(model.get_decoder() if is_wrapper(model.config) else model)
    if not stacks:
        raise ValueError(
            f"Ripple must find {WANTED}, but found none in a {kind}: it cannot stream this architecture. A "
            "mixture of experts needs an entry in ripple_loader.model.architectures.ARCHITECTURES."
        )
    wanted = 2 if is_encoder_decoder(model.config) else 1
    if len(stacks) != wanted:
        raise ValueError(
            f"Ripple must find {wanted} stack{'s' * (wanted > 1)} of layers, but a {kind} has MLPs in "
            f"{', '.join(stacks)}: it cannot stream this architecture."
        )
    found = {name: _mlp_of(name, layers, kind) for name, layers in stacks.items()}
    return next(iter(found.values())) if wanted == 1 else _joined(found, kind)


def _stacks(model: nn.Module) -> dict[str, nn.ModuleList]:
    """The lists of a language model's layers whose first layer has MLPs, by name."""
    return {
        name: layers
        for name, layers in model.named_modules()
        if isinstance(layers, nn.ModuleList)
        and not re.match(OTHER_SENSES, name)
        and any(_mlps(name, layers[:1]))
    }


def _mlp_of(name: str, layers: nn.ModuleList, kind: str) -> Architecture:
    """The one MLP that each layer of a stack has."""
    found = [list(_mlps(name, [layer])) for layer in layers]
    for number, mlps in enumerate(found):
        if len(mlps) != 1 or mlps != found[0]:
            raise ValueError(
                f"Ripple must find {WANTED}, the same in all layers, but layer {number} of a {kind} has "
                f"{', '.join(map(_said, mlps)) or 'none'} and layer 0 has {', '.join(map(_said, found[0]))}: "
                "it cannot stream this architecture."
            )
    return found[0][0]


def _joined(found: dict[str, Architecture], kind: str) -> Architecture:
    """The stacks of an encoder-decoder as one architecture."""
    first, second = found.values()
    parts = zip(first.mlp.split("."), second.mlp.split("."), strict=False)
    mlp = ".".join("*" if a != b and a.isdigit() and b.isdigit() else a for a, b in parts)
    stacks = tuple(name.split(".")[-2] if "." in name else "" for name in found)
    joined = replace(first, mlp=mlp, stacks=stacks)
    if joined != replace(second, mlp=mlp, stacks=stacks) or first.mlp.count(".") != second.mlp.count("."):
        raise ValueError(
            f"Ripple must find the same MLPs in both stacks of layers, but a {kind} has "
            f"{' and '.join(f'{_said(one)} in {name}' for name, one in found.items())}: it cannot stream "
            "this architecture."
        )
    return joined


def _said(found: Architecture) -> str:
    linears = dict.fromkeys(found.projections[role].linear for role in found.bundle)
    return f"{found.mlp} ({', '.join(linears)})"


def _mlps(stack: str, layers: Any) -> Iterator[Architecture]:
    """The MLPs among the modules of a stack's layers without experts, not the layers themselves."""
    for layer in layers:
        if any(map(_holds_experts, layer.modules())):
            continue
        for name, module in layer.named_modules():
            roles = _roles(module) if name else None
            if roles is not None:
                yield Architecture(stack.rpartition(".")[2], name, *roles)


def _holds_experts(module: nn.Module) -> bool:
    """Whether a module holds stacked weights, as transformers keeps those of routed experts."""
    return not isinstance(module, _CONVOLUTIONS) and any(
        weight.dim() > 2 for weight in module.parameters(recurse=False)
    )


def _roles(module: nn.Module) -> tuple[Projection, Projection | None, Projection, str] | None:
    """Selector, up, down and the name of the activation of a module that is an MLP; None for others."""
    children = dict(module.named_children())
    linears = {key: child for key, child in children.items() if isinstance(child, (nn.Linear, Conv1D))}
    activations = [
        key
        for key, child in children.items()
        if key not in linears and next(child.parameters(), None) is None
    ]
    if len(linears) not in (2, 3) or next(module.parameters(recurse=False), None) is not None:
        return None
    with torch.device("cpu"):  # from_pretrained may have set another
        for small in _small(module, linears):
            for activation, roles in itertools.product(activations, _assignments(linears)):
                if _computes(small, small.get_submodule(activation), *roles):
                    return *roles, activation
    return None


def _assignments(linears: dict[str, nn.Module]) -> Iterator[tuple[Projection, Projection | None, Projection]]:
    """Each way in which the linears may be selector, up and down."""

    def outputs(key: str) -> Projection:
        return Projection(key, 1 if isinstance(linears[key], Conv1D) else 0)

    def inputs(key: str) -> Projection:
        return Projection(key, 0 if isinstance(linears[key], Conv1D) else 1)

    for keys in itertools.permutations(linears):
        if len(keys) == 3:
            yield outputs(keys[0]), outputs(keys[1]), inputs(keys[2])
            continue
        yield outputs(keys[0]), None, inputs(keys[1])
        halves = [Projection(keys[0], outputs(keys[0]).neuron_axis, half=half) for half in (0, 1)]
        yield halves[0], halves[1], inputs(keys[1])
        yield halves[1], halves[0], inputs(keys[1])


def _sizes(linear: nn.Module) -> tuple[int, int]:
    """Inputs and outputs of a linear."""
    return tuple(linear.weight.shape) if isinstance(linear, Conv1D) else tuple(linear.weight.shape)[::-1]


def _small(module: nn.Module, linears: dict[str, nn.Module]) -> Iterator[nn.Module]:
    """Copies of a module with small random linears, for each of its sizes that may be the hidden one."""
    sizes = {key: _sizes(linear) for key, linear in linears.items()}
    for hidden in sorted({size for pair in sizes.values() for size in pair}):
        neurons = {inputs for inputs, outputs in sizes.values() if outputs == hidden < inputs}
        if len(neurons) != 1:
            continue
        (width,) = neurons
        small = {2 * width: 2 * NEURONS, width: NEURONS, hidden: HIDDEN}
        if not all(size in small for pair in sizes.values() for size in pair):
            continue
        made = copy.deepcopy(module).eval()
        generator = torch.Generator().manual_seed(0)
        for key, linear in linears.items():
            inputs, outputs = (small[size] for size in sizes[key])
            setattr(made, key, _random_linear(linear, inputs, outputs, generator))
        yield made


def _random_linear(like: nn.Module, inputs: int, outputs: int, generator: torch.Generator) -> nn.Module:
    made = Conv1D(outputs, inputs) if isinstance(like, Conv1D) else nn.Linear(inputs, outputs)
    if like.bias is None:
        made.bias = None
    for parameter in made.double().parameters():
        nn.init.normal_(parameter, generator=generator)
    return made


@torch.no_grad()
def _computes(
    small: nn.Module,
    activation: Callable[[Tensor], Tensor],
    selector: Projection,
    up: Projection | None,
    down: Projection,
) -> bool:
    """Whether a module computes an MLP with its linears in these roles, for small data and for large.

    Large data shows where a module clamps.
    """
    x = torch.randn(ROWS, HIDDEN, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    x *= torch.logspace(-2, 3, ROWS, dtype=torch.float64)[:, None]
    try:
        got = small(x)

        def projected(part: Projection) -> Tensor:
            value = small.get_submodule(part.linear)(x)
            return value if part.half is None else value.chunk(2, -1)[part.half]

        product = activation(projected(selector))
        if up is not None:
            product = product * projected(up)
        want = small.get_submodule(down.linear)(product)
    except Exception:  # whatever a module that is no MLP does with such an input
        return False
    same = isinstance(got, Tensor) and got.shape == want.shape and got.device == want.device
    return same and bool(((got - want).norm(dim=1) <= TOLERANCE * want.norm(dim=1)).all())
