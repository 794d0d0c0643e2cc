"""What is planned: a convolution, or a subprogram of several operators, with the layouts of its tensors."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Protocol, TypeAlias

import torch
from torch import Tensor, fx

from ollie_compile import lift
from ollie_compile.config import OllieConfig
from ollie_compile.expr import Scope
from ollie_compile.lift.aten import unsupported
from ollie_compile.lower.lowering import Program

Tensors: TypeAlias = Tensor | tuple[Tensor, ...]


@dataclass(frozen=True, slots=True)
class Layout:
    """Shape and strides of a tensor, in elements."""

    shape: tuple[int, ...]
    stride: tuple[int, ...]

    @classmethod
    def of(cls, value: Tensor) -> Layout:
        return cls(tuple(value.shape), tuple(value.stride()))

    @property
    def dense(self) -> bool:
        """Whether every element has a place of its own and no place is free."""
        reach = 1 + sum((size - 1) * step for size, step in zip(self.shape, self.stride, strict=True))
        return reach == torch.Size(self.shape).numel()

    def channels_last(self) -> Layout:
        """The same shape [batch, channels, height, width] with the channels of a place side by side."""
        return Layout.of(torch.empty(self.shape, device="meta", memory_format=torch.channels_last))

    def random(self, dtype: torch.dtype, device: torch.device, generator: torch.Generator) -> Tensor:
        """Normally distributed numbers in this layout."""
        reach = 1 + sum((size - 1) * step for size, step in zip(self.shape, self.stride, strict=True))
        base = torch.randn(reach, generator=generator, dtype=dtype, device=generator.device)
        return base.to(device).as_strided(self.shape, self.stride)

    def give(self, value: Tensor) -> Tensor:
        """A tensor in this layout, copied where it has another; one of another shape stays as it is."""
        if value.shape != self.shape:
            return value
        order = sorted(range(value.dim()), key=lambda place: -self.stride[place])
        value = value.permute(order).contiguous().permute([order.index(place) for place in range(len(order))])
        # Strides of dimensions of size 1 are free, and torch chooses them differently.
        same = value.stride() == self.stride
        return value if same else value.as_strided(self.shape, self.stride)


class Operator(Protocol):
    """Equal operators have the same best program on one machine: they are the keys of plans.

    Attributes:
        inputs: layout of each input of the expression, by its name there.
        outputs: layouts of the results.
        parameters: the inputs that do not change between calls when the model is frozen.
        steps: explorative steps that one step of `max_depth` allows, by the number of products.
        declared: whether the expression is a user's, not one that was lifted.
    """

    @property
    def inputs(self) -> dict[str, Layout]: ...
    @property
    def outputs(self) -> tuple[Layout, ...]: ...
    @property
    def parameters(self) -> tuple[str, ...]: ...
    @property
    def steps(self) -> int: ...
    @property
    def declared(self) -> bool: ...
    @property
    def dtype(self) -> torch.dtype: ...
    @property
    def device(self) -> torch.device: ...

    def expression(self) -> Scope:
        """What it computes; of several results, all in one tensor."""

    def reference(self, *inputs: Tensor) -> Tensors:
        """What torch computes."""

    def finished(self, program: Program) -> Callable[..., Tensors]:
        """`program` as a function of (*inputs, *constants) with results in the reference's layouts."""

    def example_inputs(self, dtype: torch.dtype | None = None) -> tuple[Tensor, ...]:
        """Seeded random inputs with the operator's shapes and strides."""

    def refused(self, program: Program, config: OllieConfig) -> str | None:
        """Why a program that is right does not serve, or None."""


MAX_GROWTH = 16  # of the largest intermediate over the operator's own tensors; more may not fit in memory


def largest_allowed(operator: Operator) -> int:
    """Elements that the largest tensor of a program of this operator may have."""
    layouts = (*operator.inputs.values(), *operator.outputs)
    return MAX_GROWTH * sum(math.prod(layout.shape) for layout in layouts)


def examples(operator: Operator, dtype: torch.dtype | None) -> tuple[Tensor, ...]:
    """Seeded random inputs with an operator's shapes and strides."""
    generator = torch.Generator("cpu").manual_seed(0)
    kind = dtype or operator.dtype
    return tuple(layout.random(kind, operator.device, generator) for layout in operator.inputs.values())


@dataclass(frozen=True, kw_only=True, slots=True)
class Convolution:
    """A convolution without its bias, in one to three spatial dimensions, possibly transposed."""

    input: Layout
    weight: Layout
    output: Layout
    stride: tuple[int, ...]
    padding: tuple[int, ...]
    dilation: tuple[int, ...]
    transposed: bool
    output_padding: tuple[int, ...]
    groups: int
    dtype: torch.dtype
    device: torch.device

    steps = 1
    declared = False
    parameters = ("K",)

    def __str__(self) -> str:
        kind = "conv_transpose" if self.transposed else "conv"
        shape = "x".join(map(str, self.input.shape))
        taps = "x".join(map(str, self.weight.shape[2:]))
        text = f"{kind}{len(self.stride)}d {shape} -> {self.output.shape[1]} channels, {taps}"
        for name, numbers in (
            ("stride", self.stride),
            ("padding", self.padding),
            ("dilation", self.dilation),
        ):
            text += f", {name} {'x'.join(map(str, numbers)) if len(set(numbers)) > 1 else numbers[0]}"
        text += f", {self.groups} groups" if self.groups > 1 else ""
        return text if self.dtype == torch.float32 else f"{text}, {str(self.dtype).removeprefix('torch.')}"

    @property
    def inputs(self) -> dict[str, Layout]:
        return {"A": self.input, "K": self.weight}

    @property
    def outputs(self) -> tuple[Layout, ...]:
        return (self.output,)

    def expression(self) -> Scope:
        """The convolution over inputs "A" (activations) and "K" (weights)."""
        sizes = {"stride": self.stride, "padding": self.padding, "dilation": self.dilation}
        shapes = self.input.shape, self.weight.shape
        if self.transposed:
            return lift.transposed_convolution(
                *shapes, output_padding=self.output_padding, groups=self.groups, **sizes
            )
        return lift.convolution(*shapes, groups=self.groups, **sizes)

    def reference(self, x: Tensor, weight: Tensor) -> Tensor:
        """What torch computes: [batch, out channels, *spatial]."""
        return torch.ops.aten.convolution.default(
            x,
            weight,
            None,
            self.stride,
            self.padding,
            self.dilation,
            self.transposed,
            self.output_padding,
            self.groups,
        )

    def finished(self, program: Program) -> Callable[..., Tensor]:
        """`program` as a function of (x, weight, *constants) whose result has the reference's strides."""
        names = tuple(program.scope.constants())

        def run(x: Tensor, weight: Tensor, *constants: Tensor) -> Tensor:
            return self.output.give(
                program({"A": x, "K": weight, **dict(zip(names, constants, strict=True))})
            )

        return run

    def example_inputs(self, dtype: torch.dtype | None = None) -> tuple[Tensor, ...]:
        return examples(self, dtype)

    def refused(self, program: Program, config: OllieConfig) -> str | None:
        return None


@dataclass(frozen=True, kw_only=True, slots=True)
class Subprogram:
    """Several linear operators with one expression: a sum of products, or products side by side.

    Args:
        kind: what it is, for people.
        scope: the expression; several results lie side by side along its dimension `side`.
        layouts: names and layouts of what comes from outside.
        numbers: names and values of the numbers in the expression.
        graph: torch's operators, from the tensors outside to the results.
    """

    kind: str
    scope: Scope
    side: int
    layouts: tuple[tuple[str, Layout], ...]
    outputs: tuple[Layout, ...]
    parameters: tuple[str, ...]
    numbers: tuple[tuple[str, float], ...]
    dtype: torch.dtype
    device: torch.device
    steps: int
    declared: bool
    graph: fx.GraphModule = field(compare=False, repr=False)

    def __str__(self) -> str:
        shapes = ", ".join("x".join(map(str, layout.shape)) for _, layout in self.layouts)
        results = ", ".join("x".join(map(str, layout.shape)) for layout in self.outputs)
        return f"{self.kind} of {shapes} -> {results}"

    @property
    def inputs(self) -> dict[str, Layout]:
        return dict(self.layouts)

    def expression(self) -> Scope:
        return self.scope

    def reference(self, *inputs: Tensor) -> Tensors:
        return self.graph(*inputs)

    def finished(self, program: Program) -> Callable[..., Tensors]:
        names = tuple(self.inputs) + tuple(program.scope.constants())

        def run(*values: Tensor) -> Tensors:
            tensors = dict(zip(names, values, strict=True))
            for name, number in self.numbers:
                tensors[name] = torch.full((), number, dtype=values[0].dtype, device=self.device)
            result = program(tensors)
            if len(self.outputs) == 1:
                return self.outputs[0].give(result)
            sizes = [layout.shape[self.side] for layout in self.outputs]
            parts = result.split(sizes, self.side)
            return tuple(layout.give(part) for layout, part in zip(self.outputs, parts, strict=True))

        return run

    def example_inputs(self, dtype: torch.dtype | None = None) -> tuple[Tensor, ...]:
        return examples(self, dtype)

    def refused(self, program: Program, config: OllieConfig) -> str | None:
        return None


def recognize(node: fx.Node) -> Convolution | str:
    """The convolution that a graph node computes, or the reason why it is left as it is."""
    x, weight, _, stride, padding, dilation, transposed, output_padding, groups = node.args
    values: Sequence[Tensor] = [operand.meta["val"] for operand in (x, weight, node)]
    dims = values[0].dim() - 2
    stride, padding, dilation, output_padding = (
        list(numbers) * dims if len(numbers) == 1 else list(numbers)
        for numbers in (stride, padding, dilation, output_padding)
    )
    why = unsupported(node)
    if why is not None:
        return why
    if not all(type(number) is int for number in (*stride, *padding, *dilation, *output_padding, groups)):
        return "dynamic shapes"
    if dims not in (1, 2, 3):
        return f"{values[0].dim()} dimensions"
    return Convolution(
        input=Layout.of(values[0]),
        weight=Layout.of(values[1]),
        output=Layout.of(values[2]),
        stride=tuple(stride),
        padding=tuple(padding),
        dilation=tuple(dilation),
        transposed=transposed,
        output_padding=tuple(output_padding),
        groups=groups,
        dtype=values[0].dtype,
        device=values[0].device,
    )
