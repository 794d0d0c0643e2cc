"""The protocol of targets: their match, their call, their cost, and their name in plans and reports."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Generic, Literal, Protocol, TypeVar

import torch
from torch import Tensor

from ollie_compile.expr import Read, Scope
from ollie_compile.targets.views import Window

ProductLayout = Literal["rows", "columns", "batched", "convolution", "channels last"]
"""How contractions are written: products as rows A @ B; as columns B^T @ A^T; batched like columns, with one
product for each value of the first row iterator, which keeps the images of a batch apart. The last two call
the library's convolution wherever it matches, on contiguous or channels-last data, and write products as
rows."""

CONVOLVED = ("convolution", "channels last")
ATEN = "aten"  # the family of programs without kernels of this package

Match = TypeVar("Match")


class Lowering(Protocol):
    """The values that a target's call may ask of the program that is being lowered."""

    @property
    def layout(self) -> ProductLayout: ...

    def value(self, read: Read) -> Tensor:
        """The tensor that is read, on its whole box."""

    def window(self, read: Read, scope: Scope) -> Window:
        """A read of a scope, to be taken over its iterators."""

    def operand(self, read: Read, scope: Scope, groups: Sequence[tuple[str, ...]]) -> Tensor:
        """A read of a scope, with one dimension for each group of iterators."""


@dataclass(frozen=True, slots=True)
class Timed:
    """Library calls; the time of the fastest is the cost of a scope.

    Args:
        name: the same for equal calls.
        calls: makes them for a dtype and a device.
    """

    name: str
    calls: Callable[[torch.dtype, torch.device], Sequence[Callable[[], object]]]


@dataclass(frozen=True, slots=True)
class Cost:
    """The cost of computing one scope, without the scopes that it reads (OLLIE, section 5.3).

    Args:
        multiplications: done at the device's best speed, unless library calls are timed.
        elements: those that are loaded and stored.
        timed: library calls to be timed instead.
    """

    multiplications: int = 0
    elements: int = 0
    timed: Timed | None = None


class Target(ABC, Generic[Match]):
    """A way to compute a scope: a library's operator, plain aten, or a kernel of this package."""

    @abstractmethod
    def match(self, scope: Scope, layout: ProductLayout) -> Match | None:
        """The description of a scope that `call` needs; None if the target cannot compute it so."""

    @abstractmethod
    def call(self, match: Match, scope: Scope, lowering: Lowering) -> Tensor:
        """The value on the scope's box, dimensions in the order of its traversal."""

    def cost(self, match: Match, scope: Scope, layout: ProductLayout) -> Cost:
        """By default each summed term is loaded once, and each value stored once."""
        size, taps = math.prod(scope.shape), math.prod(loop.extent for loop in scope.summation)
        return Cost(elements=size * (taps * len(scope.factors) + 1))

    def reads(self, match: Match, scope: Scope) -> Iterable[Scope]:
        """The scopes whose values the call takes; those below them that it computes itself are left out."""
        return scope.below()


class Kernel(Target[Match]):
    """A target of this package, or of a user who registers one: programs name it by its family.

    Attributes:
        family: the value of `Program.kernels` that lets a program use it, also in plan files; a program may
            use all kernels of one family.
        title: its name in reports.
        devices: types of the devices that it runs on; empty for all.
        preferred: whether programs use it wherever it matches; otherwise they are tried with and without.
        sole: whether derivations may end in scopes that only this kernel computes.
        standalone: whether it runs channels last and leaves little for a compiler, so that a program with it
            is only timed as it is called.
    """

    family: ClassVar[str]
    title: ClassVar[str]
    devices: ClassVar[tuple[str, ...]] = ()
    preferred: ClassVar[bool] = False
    sole: ClassVar[bool] = False
    standalone: ClassVar[bool] = False

    def runs_on(self, device: torch.device) -> bool:
        return not self.devices or device.type in self.devices

    def layouts(self, offered: Sequence[ProductLayout], scope: Scope) -> Sequence[ProductLayout]:
        """The layouts that a program with this kernel is worth trying in.

        Args:
            offered: those of the program without it.
            scope: the whole expression.
        """
        return offered

    def native(self, match: Match) -> frozenset[str]:
        """Names of the native code that is built before the first call; empty without native code."""
        return frozenset()


AnyTarget = Target[Any]
AnyKernel = Kernel[Any]


def extents(scope: Scope, names: Iterable[str]) -> list[int]:
    """How many values each iterator takes."""
    return [scope.ranges[name][1] - scope.ranges[name][0] for name in names]


def multiplications(scope: Scope) -> int:
    """The products of a contraction."""
    return math.prod(loop.extent for loop in scope.traversal + scope.summation)
