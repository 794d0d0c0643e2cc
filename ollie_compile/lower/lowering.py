"""Programs: derived expressions as calls of torch, each scope by the target that computes it."""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ollie_compile.expr import Read, Scope
from ollie_compile.targets import ATEN, computing
from ollie_compile.targets.target import AnyKernel, AnyTarget, Kernel, ProductLayout, extents
from ollie_compile.targets.views import Window


class Computed(NamedTuple):
    """A scope of a program with the target that computes it."""

    scope: Scope
    target: AnyTarget
    match: Any


@dataclass(frozen=True)
class Program:
    """An expression, the layout of its products, and the family of its kernels: one way to compute it.

    Called with a tensor for each input and constant, it gives a tensor of the scope's shape.
    """

    scope: Scope
    layout: ProductLayout
    kernels: str = ATEN

    @functools.cached_property
    def computed(self) -> tuple[Computed, ...]:
        """The scopes that are computed, each once, the last first: a target may compute several at once.

        Raises:
            ValueError: no target computes a scope.
        """
        found: dict[Scope, Computed] = {}
        queue = [self.scope]
        while queue:
            scope = queue.pop()
            if scope not in found:
                one = found[scope] = Computed(scope, *_computing(self, scope))
                queue += one.target.reads(one.match, scope)
        return tuple(found.values())

    @functools.cached_property
    def used(self) -> dict[AnyKernel, list[Any]]:
        """The kernels that compute some scope, with their matches."""
        used: dict[AnyKernel, list[Any]] = {}
        for one in self.computed:
            if isinstance(one.target, Kernel):
                used.setdefault(one.target, []).append(one.match)
        return used

    @functools.cached_property
    def standalone(self) -> bool:
        """Whether it is only timed as it is called, on images that lie channels last."""
        return any(kernel.standalone for kernel in self.used)

    def constants(self, dtype: torch.dtype, device: torch.device) -> dict[str, Tensor]:
        """The constants of the expression by name."""
        return {
            name: torch.tensor(list(map(float, constant.values)), dtype=dtype, device=device).view(
                constant.shape
            )
            for name, constant in self.scope.constants().items()
        }

    def __str__(self) -> str:
        """The layout and the kernels by name, as reports have it."""
        return ", ".join([self.layout, *sorted(kernel.title for kernel in self.used)])

    def __call__(self, inputs: Mapping[str, Tensor]) -> Tensor:
        return _Lowering(inputs, self).scope(self.scope)


def _computing(program: Program, scope: Scope) -> tuple[AnyTarget, Any]:
    found = computing(scope, program.layout, program.kernels)
    if found is None:
        raise ValueError(f"Each scope must be one that a target computes, got {scope}: derive it further.")
    return found


class _Lowering:
    """One run of a program; as `targets.Lowering`, what calls of targets may ask."""

    def __init__(self, inputs: Mapping[str, Tensor], program: Program) -> None:
        self.inputs, self.program = inputs, program
        self.values: dict[Scope, Tensor] = {}

    @property
    def layout(self) -> ProductLayout:
        return self.program.layout

    def scope(self, scope: Scope) -> Tensor:
        """The value on the scope's box, dimensions in the order of its traversal."""
        if scope not in self.values:
            target, match = _computing(self.program, scope)
            self.values[scope] = target.call(match, scope, self)
        return self.values[scope]

    def value(self, read: Read) -> Tensor:
        tensor = read.tensor
        return self.scope(tensor) if isinstance(tensor, Scope) else self.inputs[tensor.name]

    def window(self, read: Read, scope: Scope) -> Window:
        return Window.of(read.index, read.tensor.box, self.value(read), scope.ranges)

    def operand(self, read: Read, scope: Scope, groups: Sequence[tuple[str, ...]]) -> Tensor:
        loops = {loop.name: loop for loop in scope.traversal + scope.summation}
        value = self.window(read, scope).at({}, [loops[name] for group in groups for name in group])
        return value.reshape([math.prod(extents(scope, group)) for group in groups])
