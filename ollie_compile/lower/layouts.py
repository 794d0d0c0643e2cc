"""The different ways to write a derived expression: layouts of its products, kernels of its eOperators."""

from __future__ import annotations

import math
from dataclasses import replace

import torch

from ollie_compile.expr import Scope
from ollie_compile.lower.lowering import Kernels, Layout, Program, is_batched
from ollie_compile.targets import transforms
from ollie_compile.targets.bilinear import match_bilinear
from ollie_compile.targets.convolutions import match_convolution
from ollie_compile.targets.eoperators import match_banded, match_selective_add
from ollie_compile.targets.matmul import match_matmul
from ollie_compile.targets.transforms import is_transform
from ollie_compile.targets.views import is_view

MAX_TAPS = 128  # summed terms of one eOperator; more would make kernels that take minutes to compile


def is_lowerable(scope: Scope) -> bool:
    """Whether every scope is a matrix product, a convolution, a banded product or an eOperator of at most
    `MAX_TAPS` taps."""
    return all(
        match_matmul(inner) is not None
        or match_convolution(inner) is not None
        or _is_eoperator(inner)
        or match_banded(inner) is not None
        for inner in scope.scopes()
    )


def programs(scope: Scope, device: torch.device, *, portable: bool = False) -> list[Program]:
    """The different ways to write a lowerable expression; on a CPU none that needs a Triton kernel.

    Args:
        portable: whether to use torch's own operators alone.
    """
    scopes = list(scope.scopes())
    products = [match_matmul(inner) is not None for inner in scopes]
    written = [product or _is_eoperator(inner) for product, inner in zip(products, scopes, strict=True)]
    convolved = [match_convolution(inner) for inner in scopes]
    triton = device.type == "cuda" and not portable
    banded = [triton and match_banded(inner) is not None for inner in scopes]
    layouts: list[Layout] = []
    if all(map(any, zip(written, banded, strict=True))):
        layouts += ["rows", "columns"] if any(products) else ["rows"]
        layouts += ["batched"] if any(map(is_batched, scopes)) else []
    if any(convolved) and all(map(any, zip(written, banded, convolved, strict=True))):
        layouts += ["convolution"]
        layouts += ["channels last"] if any(len(found.spatial) > 1 for found in convolved if found) else []
    plain = all(map(any, zip(written, convolved, strict=True)))
    kernels: Kernels = "aten" if plain else "triton"
    if device.type == "cpu" and any(map(is_transform, scopes)) and not portable:
        kernels = "cpp"
        if any(map(match_bilinear, scopes)):
            layouts = layouts[:1]  # what is left of products goes through no library
    return [Program(scope, layout, kernels) for layout in layouts]


def with_kernels(program: Program, device: torch.device) -> list[Program]:
    """`program` with its selective additions and banded products by the other kernels for them."""
    if program.kernels != "aten":
        return []
    scopes = list(program.scope.scopes())
    additions = [found for inner in scopes if (found := match_selective_add(inner))]
    kernels: list[Kernels] = ["fold"] if any(found.folds for found in additions) else []
    if device.type == "cuda" and (additions or any(map(match_banded, scopes))):
        kernels.append("triton")
    written = [replace(program, kernels=name) for name in kernels]
    if device.type == "cpu" and additions:
        # The kernel runs along positions, which lie side by side where products are written so.
        layouts = [_ALONG_POSITIONS.get(program.layout, program.layout)]
        if layouts == ["columns"] and any(map(is_batched, scopes)):
            layouts.append("batched")
        written += [replace(program, layout=layout, kernels="cpp") for layout in layouts]
    return written


_ALONG_POSITIONS: dict[Layout, Layout] = {"rows": "columns", "channels last": "convolution"}


def _is_eoperator(scope: Scope) -> bool:
    if is_transform(scope):
        return is_view(transforms.data(scope))
    taps = math.prod(loop.extent for loop in scope.summation)
    return taps <= MAX_TAPS and all(is_view(read) for read in scope.factors)
