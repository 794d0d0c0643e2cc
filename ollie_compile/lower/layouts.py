"""The different ways to write a derived expression: layouts of its products, families of its kernels."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch

from ollie_compile.expr import Scope
from ollie_compile.lower.lowering import Program
from ollie_compile.targets import ATEN, KERNELS, computing
from ollie_compile.targets.convolutions import match_convolution
from ollie_compile.targets.matmul import is_batched, match_matmul
from ollie_compile.targets.target import AnyKernel, ProductLayout


def is_lowerable(scope: Scope) -> bool:
    """Whether every scope is computed by a library, by plain aten, or by a kernel that is the sole way."""
    return all(_is_plain(inner) or any(_sole(inner, KERNELS)) for inner in scope.scopes())


def _is_plain(scope: Scope) -> bool:
    """Whether a library or plain aten computes a scope, in some layout."""
    return computing(scope, "convolution", ATEN) is not None


def _sole(scope: Scope, kernels: Sequence[AnyKernel]) -> list[AnyKernel]:
    """The kernels that compute a scope which nothing else may compute."""
    return [kernel for kernel in kernels if kernel.sole and kernel.match(scope, "rows") is not None]


def programs(scope: Scope, device: torch.device, *, portable: bool = False) -> list[Program]:
    """The different ways to write a lowerable expression on a device; empty if that needs other kernels.

    Args:
        portable: whether to use torch's own operators alone.
    """
    scopes = list(scope.scopes())
    kernels = [] if portable else [kernel for kernel in KERNELS if kernel.runs_on(device)]
    preferred = [kernel for kernel in kernels if kernel.preferred and _matches(kernel, scopes)]
    needed = [kernel for inner in scopes if not _is_plain(inner) for kernel in _sole(inner, kernels)]
    family = next((kernel.family for kernel in (*preferred, *needed)), ATEN)
    layouts: Sequence[ProductLayout] = [
        layout
        for layout in _layouts(scopes)
        if all(computing(inner, layout, family) is not None for inner in scopes)
    ]
    for kernel in preferred:
        if kernel.family == family:
            layouts = kernel.layouts(layouts, scope)
    return [Program(scope, layout, family) for layout in layouts]


def _layouts(scopes: Sequence[Scope]) -> list[ProductLayout]:
    """The layouts that write some of the scopes differently."""
    layouts: list[ProductLayout] = ["rows"]
    if any(match_matmul(scope) is not None for scope in scopes):
        layouts.append("columns")
    if any(map(is_batched, scopes)):
        layouts.append("batched")
    convolutions = [match for scope in scopes if (match := match_convolution(scope)) is not None]
    if convolutions:
        layouts.append("convolution")
    if any(len(match.spatial) > 1 for match in convolutions):
        layouts.append("channels last")
    return layouts


def _matches(kernel: AnyKernel, scopes: Sequence[Scope]) -> bool:
    return any(kernel.match(scope, "rows") is not None for scope in scopes)


def with_kernels(program: Program, device: torch.device) -> list[Program]:
    """A program of plain aten, written with each family of kernels that compute some of its scopes."""
    if program.kernels != ATEN:
        return []
    scopes = list(program.scope.scopes())
    first: dict[str, AnyKernel] = {}
    for kernel in KERNELS:
        if kernel.runs_on(device) and not kernel.preferred and _matches(kernel, scopes):
            first.setdefault(kernel.family, kernel)
    return [
        replace(program, layout=layout, kernels=family)
        for family, kernel in first.items()
        for layout in kernel.layouts([program.layout], program.scope)
    ]
