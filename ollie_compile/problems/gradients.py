"""Gradients of convolutions: the two results of `aten.convolution_backward` as operators of their own.

The gradient of the input is a transposed convolution (of a transposed one, a plain one), that of the weight
a convolution over the batch. Each may be derived, and is timed against torch's own kernel for it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, fx

from ollie_compile import lift
from ollie_compile.config import OllieConfig
from ollie_compile.expr import Scope
from ollie_compile.lift.aten import unsupported
from ollie_compile.lower.lowering import Program
from ollie_compile.problems.operators import Convolution, Layout, examples

aten = torch.ops.aten
INPUT, WEIGHT, BIAS = range(3)  # the results of convolution_backward


@dataclass(frozen=True, kw_only=True, slots=True)
class Gradient:
    """The gradient of a convolution's input or weight.

    Args:
        forward: the convolution.
        of: the input of the convolution that this is the gradient of.
        gradient: layout of the gradient of the convolution's result.
        result: layout of the gradient itself.
    """

    forward: Convolution
    of: Literal["input", "weight"]
    gradient: Layout
    result: Layout

    steps = 1
    declared = False

    def __str__(self) -> str:
        return f"gradient of the {self.of} of {self.forward}"

    @property
    def inputs(self) -> dict[str, Layout]:
        if self.of == "input":
            return {"A": self.gradient, "K": self.forward.weight}
        # A is read in windows: in a transposed convolution that is the gradient.
        windows, other = self.forward.input, self.gradient
        if self.forward.transposed:
            windows, other = other, windows
        return {"A": windows, "G": other}

    @property
    def outputs(self) -> tuple[Layout, ...]:
        return (self.result,)

    @property
    def parameters(self) -> tuple[str, ...]:
        return ("K",) if self.of == "input" else ()

    @property
    def dtype(self) -> torch.dtype:
        return self.forward.dtype

    @property
    def device(self) -> torch.device:
        return self.forward.device

    def expression(self) -> Scope:
        forward = self.forward
        sizes = {"stride": forward.stride, "padding": forward.padding, "dilation": forward.dilation}
        layouts = list(self.inputs.values())
        if self.of == "weight":
            return lift.weight_gradient(layouts[0].shape, layouts[1].shape, forward.weight.shape[2:], **sizes)
        shapes = layouts[0].shape, layouts[1].shape
        if forward.transposed:
            return lift.convolution(*shapes, groups=forward.groups, **sizes)
        whole = zip(forward.input.shape[2:], self.gradient.shape[2:], forward.weight.shape[2:], strict=True)
        steps = zip(forward.stride, forward.padding, forward.dilation, strict=True)
        rest = [
            size - ((out - 1) * s - 2 * p + d * (tap - 1) + 1)
            for (size, out, tap), (s, p, d) in zip(whole, steps, strict=True)
        ]
        return lift.transposed_convolution(*shapes, output_padding=rest, groups=forward.groups, **sizes)

    def reference(self, *inputs: Tensor) -> Tensor:
        """The gradient by torch's own operator."""
        forward, (first, second) = self.forward, inputs
        if self.of == "input":
            gradient, weight = first, second
            x = torch.empty_strided(
                forward.input.shape, forward.input.stride, dtype=first.dtype, device=first.device
            )
        else:
            x, gradient = (second, first) if forward.transposed else (first, second)
            weight = torch.empty_strided(
                forward.weight.shape, forward.weight.stride, dtype=first.dtype, device=first.device
            )
        results = aten.convolution_backward.default(
            gradient,
            x,
            weight,
            None,
            forward.stride,
            forward.padding,
            forward.dilation,
            forward.transposed,
            forward.output_padding,
            forward.groups,
            [self.of == "input", self.of == "weight", False],
        )
        return results[INPUT if self.of == "input" else WEIGHT]

    def finished(self, program: Program) -> Callable[..., Tensor]:
        """`program` as a function of (*inputs, *constants) whose result has the reference's strides."""
        names = (*self.inputs, *program.scope.constants())

        def run(*values: Tensor) -> Tensor:
            return self.result.give(program(dict(zip(names, values, strict=True))))

        return run

    def example_inputs(self, dtype: torch.dtype | None = None) -> tuple[Tensor, ...]:
        return examples(self, dtype)

    def refused(self, program: Program, config: OllieConfig) -> str | None:
        return None


def find(graph: fx.Graph) -> list[tuple[fx.Node, tuple[fx.Node, ...], Gradient | str]]:
    """The gradients that a joint graph computes: the node of each, what it reads, and its operator or why
    it is left as it is."""
    found = []
    for node in graph.find_nodes(op="call_function", target=aten.convolution_backward.default):
        for user in list(node.users):
            place = user.args[1]
            if place in (INPUT, WEIGHT):
                found.append((user, *_gradient(node, user, place == INPUT)))
    return found


def _gradient(node: fx.Node, result: fx.Node, of_input: bool) -> tuple[tuple[fx.Node, ...], Gradient | str]:
    gradient, x, weight, _, stride, padding, dilation, transposed, rest, groups, _ = node.args
    inputs = (gradient, weight) if of_input else ((gradient, x) if transposed else (x, gradient))
    why = unsupported(result, (gradient, x, weight))
    if why is None and not of_input and groups > 1:
        why = "the gradient of a weight of several groups"
    if why is not None:
        return inputs, why
    values: Sequence[Tensor] = [operand.meta["val"] for operand in (x, weight, gradient, result)]
    dims = values[0].dim() - 2
    full = (stride, padding, dilation, rest)
    sizes = [tuple(numbers) * (dims if len(numbers) == 1 else 1) for numbers in full]
    layouts = [Layout.of(value) for value in values]
    forward = Convolution(
        input=layouts[0],
        weight=layouts[1],
        output=layouts[2],
        stride=sizes[0],
        padding=sizes[1],
        dilation=sizes[2],
        transposed=transposed,
        output_padding=sizes[3],
        groups=groups,
        dtype=values[0].dtype,
        device=values[0].device,
    )
    return inputs, Gradient(
        forward=forward, of="input" if of_input else "weight", gradient=layouts[2], result=layouts[3]
    )


def release(graph: fx.Graph) -> None:
    """Let every `convolution_backward` compute only the gradients that are still used."""
    for node in graph.find_nodes(op="call_function", target=aten.convolution_backward.default):
        used = {user.args[1] for user in node.users}
        asked = node.args[-1]
        mask = [place in used and wanted for place, wanted in enumerate(asked)]
        if mask == list(asked):
            continue
        if used == {BIAS}:
            (user,) = node.users
            gradient = node.args[0]
            with graph.inserting_before(user):
                over = [0, *range(2, gradient.meta["val"].dim())]
                total = graph.call_function(aten.sum.dim_IntList, (gradient, over))
            total.meta = dict(user.meta)
            user.replace_all_uses_with(total, propagate_meta=False)
            graph.erase_node(user)
        if not node.users:
            graph.erase_node(node)
            continue
        node.args = (*node.args[:-1], mask)
        values = zip(node.meta["val"], mask, strict=True)
        node.meta["val"] = tuple(value if kept else None for value, kept in values)
