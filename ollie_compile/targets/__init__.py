"""Targets: the ways to compute a scope (OLLIE, section 4.3).

A target is a library's operator, plain aten, or a kernel of this package. Each module holds one: its
match, its call and its cost. A kernel of this package is an entry of `KERNELS`; `register` adds one of the
user's own, whose plans are not kept on disk.
"""

from typing import Any

from ollie_compile.expr import Scope
from ollie_compile.targets.banded import TritonBands
from ollie_compile.targets.bilinear import CppBilinearForms
from ollie_compile.targets.convolutions import Convolutions
from ollie_compile.targets.eoperators import EOperators
from ollie_compile.targets.matmul import Products
from ollie_compile.targets.selective_add import CppAdditions, FoldAdditions, TritonAdditions
from ollie_compile.targets.target import ATEN, AnyKernel, AnyTarget, Cost, Kernel, Lowering, ProductLayout
from ollie_compile.targets.transforms import CppMatrices, SlicedMatrices

__all__ = [
    "ATEN",
    "KERNELS",
    "Cost",
    "Kernel",
    "Lowering",
    "ProductLayout",
    "computing",
    "families",
    "register",
]

LIBRARIES: tuple[AnyTarget, ...] = (Products(), Convolutions())
PLAIN: tuple[AnyTarget, ...] = (SlicedMatrices(), EOperators())
KERNELS: list[AnyKernel] = [
    FoldAdditions(),
    TritonBands(),
    TritonAdditions(),
    CppAdditions(),
    CppBilinearForms(),
    CppMatrices(),
]
"""In the order in which they are asked, and their families offered."""

_OWN = tuple(KERNELS)


def register(kernel: AnyKernel) -> None:
    """Offer a kernel to every program; it is checked and timed like those of this package.

    Raises:
        ValueError: a kernel of this title exists, or the family is that of plain aten.
    """
    if kernel.family == ATEN or kernel.title in {known.title for known in KERNELS}:
        raise ValueError(
            f"A kernel must have a title of its own and a family other than {ATEN!r}, got {kernel.title!r} "
            f"of {kernel.family!r}: choose others."
        )
    KERNELS.append(kernel)


def of_users() -> set[str]:
    """Titles of the registered kernels."""
    return {kernel.title for kernel in KERNELS if kernel not in _OWN}


def families() -> list[str]:
    """The values that `Program.kernels` may have."""
    return list(dict.fromkeys([ATEN, *(kernel.family for kernel in KERNELS)]))


def computing(scope: Scope, layout: ProductLayout, family: str) -> tuple[AnyTarget, Any] | None:
    """The target that computes a scope in a program, with its match; None if no target does.

    Args:
        family: of the kernels that the program may use.
    """
    kernels = [kernel for kernel in KERNELS if kernel.family == family]
    for target in (*LIBRARIES, *kernels, *PLAIN):
        match = target.match(scope, layout)
        if match is not None:
            return target, match
    return None
