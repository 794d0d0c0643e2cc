"""Find out how an unknown decoder layer is wired: watch it compute a few tokens, then prove the description.

The layer's own forward runs on random hidden states while hooks note which part reads the output of which
other part. That gives the names of an `Architecture`; factors and dropouts that the layer applies without a
module are found by trying. The description is accepted when it repeats the layer's output in training mode,
dropout included, and LeMo's detached layer, whose forward pass is exact, repeats it too. Only one layer of
each kind is run. Afterwards gradients, hooks, modes and the state of the random generator are as before.
"""

from __future__ import annotations

import contextlib
import itertools
import operator
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from lemo_trainer.compat import CHECKPOINTING, is_whole
from lemo_trainer.config import LemoConfig
from lemo_trainer.informativeness.selection import BlockPlan
from lemo_trainer.informativeness.selectors import selector_for
from lemo_trainer.layers.detachment import DetachingLayer
from lemo_trainer.model.architectures import ARCHITECTURES, Architecture, CausalLM
from lemo_trainer.model.calls import CACHES, dry_options, idle_layers, split_arguments
from lemo_trainer.model.capture import dispatches, mlp_intermediate, without_dropout

PROBED_TOKENS = 8  # of each of two samples


class _Unfit(Exception):  # noqa: N818 - a result of the probe, not an error
    """Why a layer cannot leave tokens out."""


def probe_layers(parts: CausalLM) -> tuple[Architecture, dict[int, str]]:
    """The wiring of the layers that can leave tokens out, and for each other layer the reason why not.

    Raises:
        ValueError: weights are not whole, or no layer fits.
    """
    name = f"{type(parts.model).__name__} (config.model_type {parts.model.config.model_type!r})"
    calls = _layer_calls(parts, name)
    wirings: dict[str, Architecture | str] = {}  # by the printed structure of a layer
    for layer, (stream_BSD, arguments) in zip(parts.layers, calls, strict=True):
        if repr(layer) not in wirings:
            wirings[repr(layer)] = _architecture_or_reason(layer, stream_BSD, arguments)
    fitting = [each for each in wirings.values() if isinstance(each, Architecture)]
    if not fitting:
        raise ValueError(
            f"LeMo looked in {name} for decoder layers that add an attention, called through transformers' "
            "AttentionInterface, and an MLP to the residual stream, and found "
            f"{'; '.join(map(str, wirings.values()))}."
        )
    architecture = next((each for each in fitting if each.down_proj), fitting[0])
    dense_layers = {}
    for index, layer in enumerate(parts.layers):
        wiring = wirings[repr(layer)]
        if isinstance(wiring, str):
            dense_layers[index] = wiring
        elif architecture.missing_from(layer) or architecture != replace(
            wiring, down_proj=wiring.down_proj or architecture.down_proj
        ):
            dense_layers[index] = f"{type(layer).__name__}, wired unlike the first ones"
    return architecture, dense_layers


def _layer_calls(parts: CausalLM, name: str) -> list[tuple[Tensor, dict[str, Any]]]:
    """The hidden states and arguments with which the model calls each of its layers on a few tokens."""
    if not all(map(is_whole, parts.layers.parameters())):
        raise ValueError(
            f"LeMo knows the wiring of {', '.join(sorted(ARCHITECTURES))}; to find that of {name} it must "
            "watch a layer, which needs whole weights: a device other than meta, and a model that is not "
            "sharded yet."
        )
    device = parts.model.get_input_embeddings().weight.device
    tokens = torch.arange(1, PROBED_TOKENS + 1, device=device).expand(2, -1)
    try:
        with torch.no_grad(), without_dropout(parts.model), idle_layers(parts.layers) as calls:
            parts.model(input_ids=tokens, **dry_options(parts.model))
        assert len(calls) == len(parts.layers), f"{len(calls)} of {len(parts.layers)} layers were called"
    except Exception as error:
        raise ValueError(
            f"LeMo needs layers that turn hidden states into hidden states; {name} fails when they hand "
            f"their input on unchanged: {error}"
        ) from error
    return calls


@torch.no_grad()
def _architecture_or_reason(layer: Any, stream_BSD: Tensor, arguments: dict[str, Any]) -> Architecture | str:
    try:
        return _find_architecture(layer, stream_BSD, arguments)
    except _Unfit as unfit:
        return str(unfit)


def _find_architecture(layer: Any, stream_BSD: Tensor, arguments: dict[str, Any]) -> Architecture:
    """The wiring of `layer`, whose own forward is called with `stream_BSD` and `arguments`."""
    arguments = {name: value for name, value in arguments.items() if name not in CACHES}
    generator = torch.Generator().manual_seed(0)
    # Small numbers: norms rescale them, and the residual does not drown the branches.
    x_BSD = (0.01 * torch.randn(stream_BSD.shape, generator=generator)).to(stream_BSD)
    attention = next(
        (
            name
            for name, part in layer.named_children()
            if hasattr(part, "config") and dispatches(part, layer, x_BSD, **arguments)
        ),
        None,
    )
    if attention is None:
        raise _Unfit(
            f"{type(layer).__name__}, none of whose parts {children(layer)} calls AttentionInterface"
        )
    observed = _architecture_from_calls(layer, attention, x_BSD, arguments)
    numbers = [None, *(name for name, value in vars(layer).items() if isinstance(value, float))]
    for scale, dropout, output in itertools.product(numbers, numbers, (observed.output, None)):
        candidate = replace(
            observed,
            output=output,
            residual_scale=scale,
            after_attention=observed.after_attention or dropout,
            after_mlp=observed.after_mlp or dropout,
        )
        with contextlib.suppress(Exception):  # a candidate that cannot run is wrong
            if is_wiring_of(candidate, layer, x_BSD, arguments):
                return candidate
    raise _Unfit(
        f"{type(layer).__name__}, whose output is not the sum of its input, {attention} and "
        f"{' + '.join(observed.mlp)} (its parts are {children(layer)})"
    )


@dataclass
class _Call:
    """A call of one of the layer's parts, with the addresses of the tensors that it reads and returns."""

    name: str
    source: int
    result: int


def _architecture_from_calls(
    layer: nn.Module, attention: str, x_BSD: Tensor, arguments: dict[str, Any]
) -> Architecture:
    """An `Architecture` from the calls of the layer's parts: each reads the output of another."""
    inner: list[str] = []  # parts with matrices, in the order of their calls
    calls: list[_Call] = []

    def note(name: str, direct: bool) -> Any:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
            source = args[0] if args else kwargs.get("hidden_states")
            result = output[0] if isinstance(output, tuple) else output
            if direct and isinstance(source, Tensor) and isinstance(result, Tensor):
                calls.append(_Call(name, source.data_ptr(), result.data_ptr()))
                alive.extend((source, result))  # so that no address is used twice
            if _has_matrices(module):
                inner.append(name)

        return hook

    alive: list[Tensor] = []
    with contextlib.ExitStack() as hooks, without_dropout(layer):
        for name, part in layer.named_modules():
            if name and name.count(".") < 2:
                handle = part.register_forward_hook(note(name, "." not in name), with_kwargs=True)
                hooks.callback(handle.remove)
        layer(x_BSD, **arguments)

    projections = [name for name in inner if name.startswith(f"{attention}.")]
    matrices = [i for i, call in enumerate(calls) if call.name in inner and call.name != attention]
    if not projections or not matrices:
        raise _Unfit(f"{type(layer).__name__} with {children(layer)}, but no MLP beside {attention}")
    mlp = calls[matrices[0] : matrices[-1] + 1]
    own = next(call for call in calls if call.name == attention)
    steps = [call for call in calls if call is not own and call not in mlp]

    writes = {call.result: call.name for call in reversed(steps)}
    reads = {call.source: call.name for call in reversed(steps)}
    source = next((call.source for call in steps if call.result == mlp[0].source), mlp[0].source)
    last = mlp[-1].name
    ends = [name for name in inner if name.startswith(f"{last}.")] or [last]
    experts = hasattr(layer.get_submodule(mlp[0].name), "experts")
    return Architecture(
        attention=attention,
        output=projections[-1].removeprefix(f"{attention}."),
        mlp=tuple(call.name for call in mlp),
        down_proj=None if experts else ends[-1],
        before_attention=writes.get(own.source),
        after_attention=reads.get(own.result),
        before_mlp=writes.get(mlp[0].source),
        after_mlp=reads.get(mlp[-1].result),
        parallel=source == x_BSD.data_ptr(),
    )


def is_wiring_of(architecture: Architecture, layer: Any, x_BSD: Tensor, arguments: dict[str, Any]) -> bool:
    """Whether `architecture` repeats what `layer` computes for `x_BSD` and its other arguments."""
    mask, positions, options = split_arguments(arguments)

    def own() -> Tensor:
        output: Tensor = layer(x_BSD, **arguments)
        return output

    def composed() -> Tensor:
        update = architecture.attention_branch(layer, x_BSD, attention_mask=mask, **positions, **options)
        source = x_BSD if architecture.is_parallel(layer) else x_BSD + update
        return x_BSD + update + architecture.mlp_branch(layer, source)

    def detached() -> Tensor:
        config = LemoConfig(selector="recency", keep_ratio=0.5, block_size=1)
        plan = BlockPlan.of(PROBED_TOKENS, config)
        return DetachingLayer(architecture, selector_for(config), layer)(
            layer, x_BSD, mask, positions, plan, operator.call, **options
        )

    with _in_training(layer):
        if not _same(_from_present_seed(own, x_BSD.device), _from_present_seed(composed, x_BSD.device)):
            return False
    with without_dropout(layer):
        if not architecture.has_dense_mlp(layer):
            rows = mlp_intermediate(architecture, layer, x_BSD).shape[:-1]
            if rows != x_BSD.shape[:-1]:
                return False
        return _same(own(), detached())


@contextlib.contextmanager
def _in_training(layer: nn.Module) -> Iterator[None]:
    """Every part of `layer` in training mode, without gradient checkpointing; restores both afterwards."""
    idle = [part for part in layer.modules() if not part.training]
    checkpointing = vars(layer).pop(CHECKPOINTING, None)
    layer.train()
    try:
        yield
    finally:
        for part in idle:
            part.training = False
        if checkpointing is not None:
            vars(layer)[CHECKPOINTING] = checkpointing


def _from_present_seed(function: Callable[[], Tensor], device: torch.device) -> Tensor:
    """The result of `function`, after which the random generators are in the same state as before."""
    with torch.random.fork_rng(devices=[] if device.type == "cpu" else [device]):
        return function()


def _same(got: Tensor, wanted: Tensor) -> bool:
    """Equal up to the order of sums."""
    tolerance = 1e-5 if wanted.dtype in (torch.float32, torch.float64) else 2e-2
    return torch.allclose(got, wanted, rtol=tolerance, atol=tolerance * float(wanted.abs().max()))


def _has_matrices(module: nn.Module) -> bool:
    return any(parameter.ndim > 1 for parameter in module.parameters())


def children(layer: nn.Module) -> str:
    return ", ".join(f"{name} ({type(part).__name__})" for name, part in layer.named_children())
