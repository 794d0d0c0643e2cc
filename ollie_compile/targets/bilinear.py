"""Bilinear forms as a target of matching: products between constant matrices, which one kernel computes."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor

from ollie_compile.expr import Affine, Constant, Ranges, Read, Scope, once
from ollie_compile.kernels import cpp_bilinear, library
from ollie_compile.targets.matmul import match_matmul
from ollie_compile.targets.target import Cost, Kernel, Lowering, ProductLayout, multiplications
from ollie_compile.targets.transforms import Transform, contiguous, match_transform, start, strides


@dataclass(frozen=True, slots=True)
class Bilinear:
    """O[loops] = Sum[columns] matrices * Sum[contracted] (matrices * data) * weight: a window, tile by tile.

    Args:
        result: the matrices of the result, the features its last loops.
        data: the matrices of the data, in the order of those.
        product: the scope between them.
        weight: its factor that is not the data.
        apart: iterators of `product` that both factors and the result have.
        tiles: loops of the result that the data has too, each with its name in `data`, those apart first.
        features: iterators of `product` that only the weight has, in the order of the result's loops.
        products: iterators of `product` that the matrices of the result sum over, in their order.
        contracted: iterators of `product` that it sums over, each with its name in `data`, in its order.
    """

    result: Transform
    data: Transform
    product: Scope
    weight: Read
    apart: tuple[str, ...]
    tiles: tuple[tuple[str, str], ...]
    features: tuple[str, ...]
    products: tuple[str, ...]
    contracted: tuple[tuple[str, str], ...]


@once
def match_bilinear(scope: Scope) -> Bilinear | None:
    """The bilinear form that one kernel computes a scope by, or None."""
    result = match_transform(scope)
    product = result.read.tensor if result is not None else None
    if result is None or not isinstance(product, Scope):
        return None
    match, outside = match_matmul(product), _identity(result.read, result.ranges)
    if match is None or outside is None:
        return None
    inner = {name: own for own, name in outside.items()}
    products = tuple(inner.get(one.column, "") for one in result.matrices)
    if not set(products) <= set(match.batch):
        return None
    apart = tuple(name for name in match.batch if name not in products)
    rows_of_result = {one.row for one in result.matrices}
    if {loop.name for loop in result.loops} - rows_of_result - inner.keys():
        return None  # a loop that the product lacks would be written once only
    if any(part.start or part.rest not in rows_of_result for part in result.joined):
        return None
    for place, (rows, columns) in enumerate(((match.rows, match.columns), (match.columns, match.rows))):
        read = product.factors[place]
        data = match_transform(read.tensor) if isinstance(read.tensor, Scope) else None
        inside = None if data is None else _identity(read, product.ranges)
        if data is None or inside is None or data.joined:
            continue
        by_row = {inside[one.row]: one for one in data.matrices}
        last = [inner.get(loop.name, "") for loop in result.loops[len(result.loops) - len(columns) :]]
        contracted = [(inside[loop.name], loop.name) for loop in data.loops]
        contracted = [(name, own) for name, own in contracted if name in match.contracted]
        contiguous = bool(contracted) and contracted[-1][1] == data.loops[-1].name
        if by_row.keys() != set(products) or set(last) != set(columns) or not contiguous:
            continue
        own = {name: loop for loop, name in inside.items()}
        if not {part.whole for part in result.joined} <= {name for name in inner if inner[name] in rows}:
            continue
        shared = [inner[loop.name] for loop in result.loops if inner.get(loop.name) in rows]
        tiles = [(outside[name], own[name]) for name in (*apart, *shared)]
        return Bilinear(
            result=result,
            data=replace(data, matrices=tuple(by_row[name] for name in products)),
            product=product,
            weight=product.factors[1 - place],
            apart=apart,
            tiles=tuple(tiles),
            features=tuple(last),
            products=products,
            contracted=tuple(contracted),
        )
    return None


def _identity(read: Read, ranges: Ranges) -> dict[str, str] | None:
    """The reader's iterator for each traversal iterator of the scope that it reads as a whole, or None."""
    assert isinstance(read.tensor, Scope)
    names = {}
    for loop, index in zip(read.tensor.traversal, read.index, strict=True):
        name = index.iterator
        if name is None or index != Affine.of(name) or ranges[name] != (loop.low, loop.high):
            return None
        names[loop.name] = name
    return names if len(set(names.values())) == len(names) else None


def windows(call: Bilinear) -> list[int | None]:
    """For each matrix of the data the dimension of its tensor outside of which the kernel reads 0.

    None if another iterator moves along that dimension too: then zeros around the tensor must be there.
    """
    known = {name for _, name in call.tiles}
    columns = [one.column for one in call.data.matrices]
    found: list[int | None] = []
    for column in columns:
        used = [set(index.iterators()) for index in call.data.read.index]
        places = [place for place, names in enumerate(used) if column in names]
        alone = len(places) == 1 and used[places[0]] <= {column} | known
        found.append(places[0] if alone else None)
    return found


def arguments(
    call: Bilinear, index: tuple[Affine, ...], box: tuple[tuple[int, int], ...], stride: tuple[int, ...]
) -> dict[str, Any]:
    """The arguments of `library.bilinear` other than its tensors.

    Args:
        index, box, stride: of the tensor that the data's matrices read, as it lies in memory.
    """
    lows = {name: low for name, (low, _) in call.data.ranges.items()}
    loops = {loop.name: loop.extent for loop in call.result.loops}
    whole = {part.whole: part for part in call.result.joined}
    rest = {part.rest: part for part in call.result.joined}
    size = {
        whole[name].name if name in whole else name: whole[name].size if name in whole else extent
        for name, extent in loops.items()
        if name not in rest
    }
    along = {name: math.prod([*size.values()][place + 1 :]) for place, name in enumerate(size)}
    tiles = [name for name, _ in call.tiles]
    moved = [name for _, name in call.tiles]
    reads, writes = [], []
    for one, window in zip(call.data.matrices, windows(call), strict=True):
        reads.append(strides(index, stride, one.column))
        if window is None:
            reads += [0, 0, 1, *(0 for _ in tiles)]
            continue
        place, at = next((p, at) for p, at in enumerate(index) if one.column in at.iterators())
        first = at.const + sum(at.coefficient(name) * lows[name] for name in at.iterators())
        reads += [first - box[place][0], at.coefficient(one.column), box[place][1] - box[place][0]]
        reads += [at.coefficient(name) for name in moved]
    for one in call.result.matrices:
        part = rest.get(one.row)
        if part is None:
            writes += [along[one.row], 0, 1, loops[one.row], *(0 for _ in tiles)]
        else:
            writes += [along[part.name], 0, 1, part.size]
            writes += [loops[part.rest] if name == part.whole else 0 for name in tiles]
    product = {loop.name: loop.extent for loop in call.product.traversal + call.product.summation}
    return {
        "size": [*size.values()],
        "apart": len(call.apart),
        "tiles": [loops[name] for name in tiles],
        "stride": [strides(index, stride, name) for name in moved],
        "out_stride": [
            along[whole[name].name] * loops[whole[name].rest] if name in whole else along[name]
            for name in tiles
        ],
        "offset": start(index, stride, box, lows),
        "reads": reads,
        "writes": writes,
        "channels": [product[name] for name, _ in call.contracted],
        "channel_stride": [strides(index, stride, name) for _, name in call.contracted],
        "features": math.prod(product[name] for name in call.features),
        "matrices": json.dumps(
            [[_rows(one.constant) for one in side.matrices] for side in (call.data, call.result)]
        ),
    }


def _rows(matrix: Constant) -> list[list[float]]:
    rows, columns = matrix.shape
    return [[float(matrix.at(row, column)) for column in range(columns)] for row in range(rows)]


class CppBilinearForms(Kernel[Bilinear]):
    """The C++ kernel for a whole bilinear form, which goes through it tile by tile."""

    family, title, devices = "cpp", "bilinear forms in C++", ("cpu",)
    preferred = standalone = True

    def match(self, scope: Scope, layout: ProductLayout) -> Bilinear | None:
        return match_bilinear(scope)

    def call(self, match: Bilinear, scope: Scope, lowering: Lowering) -> Tensor:
        value, index, box = contiguous(match.data, lowering, windows(match))
        contracted = tuple(name for name, _ in match.contracted)
        groups = (match.apart, match.products, contracted, match.features)
        weight = lowering.operand(match.weight, match.product, groups)
        return library.bilinear(
            value, cpp_bilinear.packed(weight), **arguments(match, index, box, value.stride())
        )

    def cost(self, match: Bilinear, scope: Scope, layout: ProductLayout) -> Cost:
        tensors = (scope, match.data.read.tensor, match.weight.tensor)
        elements = sum(math.prod(high - low for low, high in tensor.box) for tensor in tensors)
        return Cost(multiplications(match.product), elements)

    def reads(self, match: Bilinear, scope: Scope) -> Iterable[Scope]:
        tensors = (match.data.read.tensor, match.weight.tensor)
        return [tensor for tensor in tensors if isinstance(tensor, Scope)]

    def layouts(self, offered: Sequence[ProductLayout], scope: Scope) -> Sequence[ProductLayout]:
        """One: the products go through no library."""
        return offered[:1]

    def native(self, match: Bilinear) -> frozenset[str]:
        sides = (match.data, match.result)
        return frozenset(
            [" | ".join(" * ".join(one.constant.name for one in side.matrices) for side in sides)]
        )
