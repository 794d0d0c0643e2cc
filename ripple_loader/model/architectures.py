"""Where each architecture keeps its MLP neurons: in the module tree and in the checkpoint.

A neuron is one row of the selector (`gate_proj`, or `fc1` where there is no gate), one row of `up_proj` where
there is one, and one column of `down_proj` / `fc2`. Permuting all of them together leaves the MLP's function
unchanged. In a mixture of experts each routed expert is an MLP of its own; the router and shared experts stay
with the model. An encoder-decoder has two stacks of layers, whose MLPs are numbered in the order in which
they run. Of a model of images and text, the language model's MLPs are streamed.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Literal

from torch import Tensor, nn

from ripple_loader.model.activations import has_exact_zeros

Role = Literal["selector", "up", "down"]

OTHER_SENSES = r".*(?:vision|visual|audio|speech|resampler|connector)"
"""Matches the names of modules beside the language model of a model of images or sound and text."""


@dataclass(frozen=True)
class Projection:
    """One linear map of an MLP.

    Attributes:
        linear: its name in the checkpoint and, but for experts, that of the module that holds it.
        neuron_axis: axis of the weight along which neurons lie.
        half: which half of that axis this projection is, where one weight holds two projections.
    """

    linear: str
    neuron_axis: int
    half: Literal[0, 1] | None = None

    def of(self, weight: Tensor) -> Tensor:
        """This projection's part of a weight or, for a vector, of a bias."""
        axis = self.neuron_axis if weight.dim() > 1 else 0
        return weight if self.half is None else weight.chunk(2, axis)[self.half]


@dataclass(frozen=True)
class Architecture:
    """How to find and run the MLPs of a family of models.

    Attributes:
        layers: name of the list of layers.
        mlp: name of the MLP in a layer, in which `*` stands for a number that differs between stacks; ""
            where its linears lie in the layer itself. In a mixture of experts the name of the module that
            runs the routed experts, from their stacked weights.
        selector, up, down: the projections; `up` is None for a plain two-layer MLP.
        activation: name of the activation module beside the linears.
        expert: pattern of an expert's name in the checkpoint, with its number as a group; None if dense.
        stacked: whether the checkpoint holds a layer's experts in one tensor for each linear, expert by
            expert, without an ending such as ".weight".
        stacks: names of the modules that hold the lists of layers, in the order in which they run; ("",) for
            the one list of a decoder.
    """

    layers: str
    mlp: str
    selector: Projection
    up: Projection | None
    down: Projection
    activation: str
    expert: str | None = None
    stacked: bool = False
    stacks: tuple[str, ...] = ("",)

    def forms(self) -> tuple[Architecture, ...]:
        """The forms of checkpoints: this entry's and, for experts, the stacked one of transformers 5."""
        if self.expert is None:
            return (self,)
        gate, up = (Projection("gate_up_proj", 0, half=half) for half in (0, 1))
        return self, replace(self, selector=gate, up=up, down=Projection("down_proj", 1), stacked=True)

    @property
    def projections(self) -> dict[Role, Projection]:
        roles: dict[Role, Projection] = {"selector": self.selector, "down": self.down}
        return roles if self.up is None else {**roles, "up": self.up}

    @property
    def bundle(self) -> tuple[Role, ...]:
        """The projections in the order of a bundle's rows; all but the last select."""
        return ("selector", "down") if self.up is None else ("selector", "up", "down")

    def layer_pattern(self) -> str:
        """Matches the name of a layer of the language model; its groups are the stack and the number."""
        stacks = "|".join(rf"{re.escape(stack)}\." if stack else "" for stack in self.stacks)
        return rf"^(?!{OTHER_SENSES})(?:.*\.)?({stacks}){self.layers}\.(\d+)"

    def stack_of(self, prefix: str) -> int:
        """The position of a stack among `stacks`, by the first group of `layer_pattern`."""
        return self.stacks.index(prefix.rstrip("."))

    def tensor_pattern(self) -> re.Pattern[str]:
        """Matches the checkpoint's names of MLP tensors.

        Its groups are the stack, the layer, the expert ("" if dense or stacked), the linear, and "weight" or
        "bias" ("" if stacked).
        """
        linears = "|".join(sorted({projection.linear for projection in self.projections.values()}))
        one_expert = None if self.stacked else self.expert
        inner = one_expert or f"{self._mlp_pattern}()"
        dot = r"\." if self.mlp else ""
        end = "()" if self.stacked else r"\.(weight|bias)"
        return re.compile(rf"{self.layer_pattern()}\.{inner}{dot}({linears}){end}$")

    @property
    def _mlp_pattern(self) -> str:
        return re.escape(self.mlp).replace(r"\*", r"\d+")

    def streamed_names(self) -> set[str]:
        """Patterns of the tensors that a streaming model does not load, as transformers names them."""
        return {form.tensor_pattern().pattern for form in self.forms()}

    def find(self, model: nn.Module) -> list[MLPSite]:
        """The modules of `model` to replace, stack by stack and layer by layer."""
        container = re.compile(self.layer_pattern() + (rf"\.{self._mlp_pattern}" if self.mlp else ""))
        held = "down_proj" if self.expert is not None else self.down.linear
        sites = []
        for name, module in model.named_modules():
            if (match := container.fullmatch(name)) and hasattr(module, held):
                sites.append(MLPSite(name, module, self, self.stack_of(match[1]), int(match[2])))
        return sorted(sites, key=lambda site: (site.stack, site.layer))


@dataclass(frozen=True)
class MLPSite:
    """One MLP of a model, or one layer's experts.

    Attributes:
        name: dotted name of the module.
        container: the module that holds its linears.
        architecture: the names of its parts.
        stack, layer: its stack, as a position in `architecture.stacks`, and its layer there.
    """

    name: str
    container: nn.Module
    architecture: Architecture
    stack: int
    layer: int

    @property
    def experts(self) -> int | None:
        """How many MLPs this is as a mixture of experts; None if it is a dense MLP."""
        return None if self.architecture.expert is None else len(self.container.down_proj)

    def down_weights(self) -> list[Tensor]:
        """The output weight of each MLP as (N, H) rows."""
        if self.architecture.expert is not None:
            return list(self.container.down_proj.transpose(1, 2))
        down = self.architecture.down
        return [getattr(self.container, down.linear).weight.movedim(down.neuron_axis, 0)]

    def weights(self) -> Iterator[list[tuple[Tensor, Tensor | None]]]:
        """For each MLP its projections, in a bundle's order: the weight as (N, H) rows, and the bias."""
        architecture = self.architecture.forms()[-1]
        projections = [architecture.projections[role] for role in architecture.bundle]
        if self.experts is not None:
            for expert in range(self.experts):
                stacked = [one.of(getattr(self.container, one.linear)[expert]) for one in projections]
                yield [
                    (weight.movedim(one.neuron_axis, 0), None)
                    for one, weight in zip(projections, stacked, strict=True)
                ]
            return
        linears = [(one, getattr(self.container, one.linear)) for one in projections]
        biases = [None if linear.bias is None else one.of(linear.bias) for one, linear in linears]
        weights = [one.of(linear.weight).movedim(one.neuron_axis, 0) for one, linear in linears]
        yield list(zip(weights, biases, strict=True))

    def hooked(self) -> str | None:
        """The name of the first module that is replaced and has hooks; None without any."""
        held = [(self.name, self.container)] if self.architecture.mlp else []
        held += [(one.linear, getattr(self.container, one.linear)) for one in self._projected()]
        held.append((self.architecture.activation, self.activation))
        kinds = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
        return next((name for name, one in held if any(getattr(one, kind) for kind in kinds)), None)

    def _projected(self) -> list[Projection]:
        return [] if self.experts is not None else list(self.architecture.projections.values())

    @property
    def dropout(self) -> float:
        """The share that the MLP itself drops in training."""
        inside = self.container.modules() if self.architecture.mlp else ()
        return max((module.p for module in inside if isinstance(module, nn.Dropout)), default=0.0)

    @property
    def activation(self) -> nn.Module:
        return getattr(self.container, self.architecture.activation)

    @property
    def has_exact_zeros(self) -> bool:
        """Whether the activation makes inactive neurons exactly zero, so that leaving them out is exact."""
        return has_exact_zeros(self.activation)

    def linears(self) -> list[tuple[nn.Module, list[Projection]]]:
        """The linears of a dense MLP, each with the projections that it holds."""
        held: dict[str, list[Projection]] = {}
        for role in self.architecture.bundle:
            projection = self.architecture.projections[role]
            held.setdefault(projection.linear, []).append(projection)
        return [(getattr(self.container, name), projections) for name, projections in held.items()]

    def replace(
        self, model: nn.Module, streaming: nn.Module, linears: Mapping[str, nn.Module] | None = None
    ) -> None:
        """Replace the MLP by `streaming`, which is called with the same arguments.

        Args:
            model: the model that it belongs to.
            streaming: computes the MLP.
            linears: hand their input on; they replace linears that lie in the layer itself.
        """
        if self.architecture.mlp:
            parent, _, name = self.name.rpartition(".")
            setattr(model.get_submodule(parent), name, streaming)
            return
        setattr(self.container, self.architecture.activation, streaming)
        for name, linear in (linears or {}).items():
            setattr(self.container, name, linear)


_GATED = Architecture(
    layers="layers",
    mlp="mlp",
    selector=Projection("gate_proj", 0),
    up=Projection("up_proj", 0),
    down=Projection("down_proj", 1),
    activation="act_fn",
)
_FUSED = replace(
    _GATED,
    selector=Projection("gate_up_proj", 0, half=0),
    up=Projection("gate_up_proj", 0, half=1),
    activation="activation_fn",
)
_PLAIN = Architecture(
    layers="layers",
    mlp="mlp",
    selector=Projection("fc1", 0),
    up=None,
    down=Projection("fc2", 1),
    activation="activation_fn",
)
_IN_LAYER = replace(_PLAIN, mlp="")
_UP_DOWN = replace(
    _PLAIN, selector=Projection("up_proj", 0), down=Projection("down_proj", 1), activation="act_fn"
)
_GPT_NEOX = replace(
    _PLAIN,
    selector=Projection("dense_h_to_4h", 0),
    down=Projection("dense_4h_to_h", 1),
    activation="act",
)
_STARCODER2 = replace(_PLAIN, selector=Projection("c_fc", 0), down=Projection("c_proj", 1), activation="act")
# transformers 5 stacks experts when it loads them; most checkpoints keep each one's linears.
_EXPERTS = replace(_GATED, mlp="mlp.experts", expert=r"mlp\.experts\.(\d+)")
_MIXTRAL = replace(
    _EXPERTS,
    selector=Projection("w1", 0),
    up=Projection("w3", 0),
    down=Projection("w2", 1),
    expert=r"(?:mlp|block_sparse_moe)\.experts\.(\d+)",
)
# GPT-2's Conv1D keeps its weight as (inputs, outputs).
_GPT2 = replace(_STARCODER2, layers="h", selector=Projection("c_fc", 1), down=Projection("c_proj", 0))
# Encoder-decoders whose layers hold the linears themselves; others, such as T5, are found by the probe.
_BART = replace(_IN_LAYER, stacks=("encoder", "decoder"))

ARCHITECTURES: dict[str, Architecture] = {
    "arcee": _UP_DOWN,
    "bart": _BART,
    "bigbird_pegasus": _BART,
    "biogpt": _IN_LAYER,
    "blenderbot": _BART,
    "blenderbot-small": _BART,
    "falcon": replace(_GPT_NEOX, layers="h"),
    "gemma": _GATED,
    "gemma2": _GATED,
    "gemma3": _GATED,
    "gemma3_text": _GATED,
    "gpt2": _GPT2,
    "gpt_neox": _GPT_NEOX,
    "granite": _GATED,
    "led": _BART,
    "llama": _GATED,
    "m2m_100": _BART,
    "marian": _BART,
    "mbart": _BART,
    "mistral": _GATED,
    "mixtral": _MIXTRAL,
    "nemotron": _UP_DOWN,
    "olmo2": _GATED,
    "mvp": _BART,
    "olmoe": _EXPERTS,
    "opt": _IN_LAYER,
    "pegasus": _BART,
    "pegasus_x": _BART,
    "phi": _PLAIN,
    "phi3": _FUSED,
    "plbart": _BART,
    "qwen2": _GATED,
    "qwen2_moe": _EXPERTS,
    "qwen3": _GATED,
    "qwen3_moe": _EXPERTS,
    "stablelm": _GATED,
    "starcoder2": _STARCODER2,
    "trocr": _IN_LAYER,
    "xglm": _IN_LAYER,
}
