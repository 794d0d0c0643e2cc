"""Operators of an aten graph that can be lifted, and how their results must look."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, fx

from ollie_compile import lift
from ollie_compile.expr import Scope
from ollie_compile.lower import Program


@dataclass(frozen=True, slots=True)
class Layout:
    """Shape and strides of a tensor, in elements."""

    shape: tuple[int, ...]
    stride: tuple[int, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class Convolution:
    """A convolution without its bias, in one to three spatial dimensions, possibly transposed.

    Two equal instances have the same best program on one machine, so this is the key of a plan.
    """

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

    def __str__(self) -> str:
        kind = "conv_transpose" if self.transposed else "conv"
        shape = "x".join(map(str, self.input.shape))
        taps = "x".join(map(str, self.weight.shape[2:]))
        channels = self.weight.shape[1 if self.transposed else 0]
        text = f"{kind}{len(self.stride)}d {shape} -> {channels} channels, {taps}"
        for name, numbers in (
            ("stride", self.stride),
            ("padding", self.padding),
            ("dilation", self.dilation),
        ):
            text += f", {name} {'x'.join(map(str, numbers)) if len(set(numbers)) > 1 else numbers[0]}"
        return text + (f", {self.groups} groups" if self.groups > 1 else "")

    def expression(self) -> Scope:
        """The convolution over inputs "A" (activations) and "K" (weights)."""
        sizes = {"stride": self.stride, "padding": self.padding}
        if self.transposed:
            return lift.transposed_convolution(
                self.input.shape, self.weight.shape, output_padding=self.output_padding, **sizes
            )
        return lift.convolution(
            self.input.shape, self.weight.shape, dilation=self.dilation, groups=self.groups, **sizes
        )

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
        channels_last = self.output.stride[1] == 1 and self.output.shape[1] > 1
        layout = {4: torch.channels_last, 5: torch.channels_last_3d}.get(len(self.output.shape))
        layout = layout if channels_last and layout is not None else torch.contiguous_format

        names = tuple(program.scope.constants())

        def run(x: Tensor, weight: Tensor, *constants: Tensor) -> Tensor:
            values = {"A": x, "K": weight, **dict(zip(names, constants, strict=True))}
            result = program(values).contiguous(memory_format=layout)
            # Strides of dimensions of size 1 are free, and torch chooses them differently.
            same = result.stride() == self.output.stride
            return result if same else result.as_strided(self.output.shape, self.output.stride)

        return run

    def example_inputs(self, dtype: torch.dtype | None = None) -> tuple[Tensor, Tensor]:
        """Seeded random (x, weight) with the operator's shapes and strides."""
        generator = torch.Generator().manual_seed(0)

        def random(layout: Layout) -> Tensor:
            span = 1 + sum((n - 1) * step for n, step in zip(layout.shape, layout.stride, strict=True))
            base = torch.randn(span, generator=generator, dtype=dtype or self.dtype)
            return base.to(self.device).as_strided(layout.shape, layout.stride)

        return random(self.input), random(self.weight)


def recognize(node: fx.Node) -> Convolution | str:
    """The operator that a graph node computes, or the reason why it is left as it is."""
    x, weight, _, stride, padding, dilation, transposed, output_padding, groups = node.args
    values = [operand.meta["val"] for operand in (x, weight)] + [node.meta["val"]]
    dims = values[0].dim() - 2
    stride, padding, dilation, output_padding = (
        list(numbers) * dims if len(numbers) == 1 else list(numbers)
        for numbers in (stride, padding, dilation, output_padding)
    )
    numbers = (
        *(n for value in values for n in (*value.shape, *value.stride())),
        *stride,
        *padding,
        *dilation,
        *output_padding,
        groups,
    )
    if not all(type(number) is int for number in numbers):
        return "dynamic shapes"
    if any(0 in value.shape for value in values):
        return "a dimension of size 0"
    if values[0].dtype not in (torch.float32, torch.float64) or values[0].dtype != values[1].dtype:
        return f"dtypes {values[0].dtype} and {values[1].dtype}"
    if transposed and (groups > 1 or max(dilation) > 1):
        return "transposed with groups or dilation"
    if values[0].dim() not in (3, 4, 5):
        return f"{values[0].dim()} dimensions"
    x_layout, weight_layout, output_layout = (Layout(tuple(v.shape), tuple(v.stride())) for v in values)
    return Convolution(
        input=x_layout,
        weight=weight_layout,
        output=output_layout,
        stride=tuple(stride),
        padding=tuple(padding),
        dilation=tuple(dilation),
        transposed=transposed,
        output_padding=tuple(output_padding),
        groups=groups,
        dtype=values[0].dtype,
        device=values[0].device,
    )
