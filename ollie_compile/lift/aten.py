"""Lifting of aten's linear operators from the nodes of an FX graph.

The value of a node is a sum of terms: products are distributed over sums, and factors of a channel or of
a whole tensor go into a weight, so that terms with a common factor can meet in one sum.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import fx

from ollie_compile.compat import unset_fake_temporarily
from ollie_compile.expr import Affine, Input, Loop, Ranges, Read, Scope, Tensor, ranges_of
from ollie_compile.lift import convolutions, movement, products
from ollie_compile.lift.declared import DECLARED, Declaration
from ollie_compile.lift.products import elementwise, shape_of, var

MOST_ONE_HOT = 4096  # entries of the matrix that stands for an index

Terms = tuple[Tensor, ...]
aten = torch.ops.aten


class UnliftableError(Exception):
    """Why a node is no linear expression of its operands."""


def lift_node(node: fx.Node, operand: Callable[[fx.Node], Terms], scalar: Callable[[float], Tensor]) -> Terms:
    """The value of a node as terms to be added, each of its shape.

    Args:
        operand: the terms of a tensor that the node reads.
        scalar: the tensor, without dimensions, that stands for a number.

    Raises:
        UnliftableError: an operator, a dtype or an argument without an expression here.
    """
    declaration = DECLARED.get(node.target)
    lift = LIFTS.get(node.target) if declaration is None else functools.partial(_declared, declaration)
    if lift is None:
        raise UnliftableError(f"{node.target} is not lifted")
    why = unsupported(node)
    if why is not None:
        raise UnliftableError(why)
    if node.target in _NUMBERS:
        terms = lift(scalar, *fx.map_arg(node.args, operand), **node.kwargs)
    elif node.target in _OF_NODES:
        terms = lift(node, operand(node.args[0]))
    else:
        terms = lift(*fx.map_arg(node.args, operand), **node.kwargs)
    return tuple(_expanded(term, node.meta["val"].shape) for term in terms)


def unsupported(node: fx.Node, tensors: Sequence[fx.Node] = ()) -> str | None:
    """Why the tensors of a node have no expression: dynamic or empty shapes, a dtype or several.

    Args:
        tensors: the nodes that it reads; by default all its operands.
    """
    values = [operand.meta.get("val") for operand in (node, *(tensors or operands(node)))]
    for value in values:
        if not isinstance(value, torch.Tensor):
            return "its operands are not all tensors"
        if value.layout != torch.strided:
            return f"a tensor of layout {value.layout}"
        if not all(type(number) is int for number in (*value.shape, *value.stride())):
            return "dynamic shapes"
        if 0 in value.shape:
            return "a dimension of size 0"
    # Between dtypes there is a cast, which rounds, truncates or overflows: no expression says so.
    dtypes, devices = {value.dtype for value in values}, {value.device for value in values}
    if len(dtypes) != 1 or not dtypes <= set(FLOATS):
        return f"dtypes {' and '.join(sorted(map(str, dtypes)))}"
    if len(devices) != 1:
        return f"devices {' and '.join(sorted(map(str, devices)))}"
    if devices == {torch.device("meta")}:
        return "tensors without data, on the device meta"
    return None


FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def operands(node: fx.Node) -> Sequence[fx.Node]:
    """The tensors that a node computes with: its inputs without indices."""
    return node.all_input_nodes[:1] if node.target in _OF_NODES else node.all_input_nodes


def contractions(terms: Sequence[Tensor]) -> list[Scope]:
    """The products in the expressions of some terms."""
    scopes = (scope for term in terms if isinstance(term, Scope) for scope in term.scopes())
    return [scope for scope in scopes if scope.is_contraction]


def _declared(declaration: Declaration, *operands: Terms) -> Terms:
    """The expression of a user's operator over its operands."""
    tensors = dict(zip(declaration.names, map(_whole, operands), strict=True))
    shapes = {name: Input(name, shape_of(tensor)) for name, tensor in tensors.items()}
    return (with_inputs(declaration.assignment.scope(shapes), tensors),)


def _whole(terms: Terms) -> Tensor:
    return terms[0] if len(terms) == 1 else elementwise("+", *terms)


def _each(lift: Callable[..., Tensor]) -> Callable[..., Terms]:
    """A lift of one tensor, for the terms of a sum."""
    return lambda terms, *arguments, **named: tuple(lift(term, *arguments, **named) for term in terms)


def _product(a: Terms, b: Terms) -> Terms:
    if contractions(a) and contractions(b):
        raise UnliftableError("both factors are products")
    return (products.matmul(_whole(a), _whole(b)),)


def _product_and_sum(bias: Terms, a: Terms, b: Terms, *, beta: float = 1, alpha: float = 1) -> Terms:
    if (beta, alpha) != (1, 1):
        raise UnliftableError("a scaled sum of products")
    return (*_product(a, b), *bias)


def _linear(x: Terms, weight: Terms, bias: Terms = ()) -> Terms:
    return (products.linear(_whole(x), _whole(weight)), *bias)


def _convolution(
    x: Terms,
    weight: Terms,
    bias: Terms | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    transposed: bool,
    output_padding: Sequence[int],
    groups: int,
) -> Terms:
    if contractions((*x, *weight)):
        raise UnliftableError("a convolution of a product")
    data, kernel = _whole(x), _whole(weight)
    dims = len(shape_of(data)) - 2
    full = [list(n) * dims if len(n) == 1 else list(n) for n in (stride, padding, dilation, output_padding)]
    settings: dict[str, Any] = dict(zip(("stride", "padding", "dilation"), full, strict=False))
    if transposed:
        settings["output_padding"] = full[3]
    write = convolutions.transposed_convolution if transposed else convolutions.convolution
    lifted = write(shape_of(data), shape_of(kernel), groups=groups, **settings)
    result = with_inputs(lifted, {"A": data, "K": kernel})
    if bias is None:
        return (result,)
    return (result, *(movement.view(term, (shape_of(term)[0], *[1] * dims)) for term in bias))


def with_inputs(tensor: Tensor, tensors: Mapping[str, Tensor]) -> Tensor:
    """An expression with other tensors as its inputs, by name."""
    if isinstance(tensor, Scope):
        reads = (Read(with_inputs(read.tensor, tensors), read.index) for read in tensor.factors)
        return tensor.over(factors=tuple(reads))
    return tensors[tensor.name] if isinstance(tensor, Input) else tensor


def _add(scalar: Callable[[float], Tensor], a: Terms | float, b: Terms | float, *, alpha: float = 1) -> Terms:
    if alpha != 1:
        raise UnliftableError("a scaled sum")
    return tuple(term for value in (a, b) for term in _terms(scalar, value))


def _sub(scalar: Callable[[float], Tensor], a: Terms | float, b: Terms | float, *, alpha: float = 1) -> Terms:
    return _add(scalar, a, _neg(scalar, _terms(scalar, b)), alpha=alpha)


def _terms(scalar: Callable[[float], Tensor], value: Terms | float) -> Terms:
    if isinstance(value, tuple):
        return value
    return (scalar(value),) if value else ()


def _neg(scalar: Callable[[float], Tensor], terms: Terms) -> Terms:
    return _mul(scalar, terms, -1.0)


def _mul(scalar: Callable[[float], Tensor], a: Terms | float, b: Terms | float) -> Terms:
    if not isinstance(a, tuple) or (isinstance(b, tuple) and contractions(b)):
        a, b = b, a
    assert isinstance(a, tuple), "aten multiplies at least one tensor"
    by = (scalar(b),) if not isinstance(b, tuple) else b
    if contractions(by):
        raise UnliftableError("both factors are products")
    sizes = products.broadcast(*map(shape_of, (*a, *by)))
    return tuple(_scaled(_expanded(term, sizes), _whole(by)) for term in a)


def _div(scalar: Callable[[float], Tensor], a: Terms, b: Terms | float, **named: Any) -> Terms:
    if isinstance(b, tuple) or named or not isinstance(a, tuple):
        raise UnliftableError("a quotient of tensors")
    return _mul(scalar, a, 1 / b)


def _scaled(term: Tensor, by: Tensor) -> Tensor:
    """term * by, with the factor in a weight where the term is a product."""
    if not contractions((term,)):
        return elementwise("*", term, by)
    assert isinstance(term, Scope)
    if term.is_view and math.prod(shape_of(by)) == 1:
        (read,) = term.factors
        return term.with_factor(0, Read(_scaled(read.tensor, by), read.index))
    if not term.is_contraction:
        raise UnliftableError("a factor of a rearranged product")
    tail = term.traversal[len(term.traversal) - len(shape_of(by)) :]
    index = tuple(var(loop) if size > 1 else Affine() for loop, size in zip(tail, shape_of(by), strict=True))
    wanted = {name for place in index for name in place.iterators()}
    for position in (1, 0):
        read = term.factors[position]
        names = [place.iterator or "" for place in read.index]
        plain = all(place == Affine.of(name) for place, name in zip(read.index, names, strict=True))
        if not plain or not wanted <= set(names) or contractions((read.tensor,)):
            continue
        loops = tuple(Loop(name, *term.ranges[name]) for name in names)
        weight = Scope(loops, (), (read, Read(by, index)))
        return term.with_factor(position, Read(weight, tuple(map(var, loops))))
    raise UnliftableError("a factor that belongs to no weight")


def _expanded(term: Tensor, sizes: Sequence[int]) -> Tensor:
    """The tensor broadcast to a shape."""
    old = shape_of(term)
    if old == tuple(sizes):
        return term
    loops = tuple(Loop(f"i{place}", 0, size) for place, size in enumerate(sizes))
    tail = loops[len(loops) - len(old) :]
    index = tuple(var(loop) if size > 1 else Affine() for loop, size in zip(tail, old, strict=True))
    return Scope(loops, (), (Read(term, index),))


def _expand(terms: Terms, sizes: Sequence[int], **_: Any) -> Terms:
    lead = len(sizes) - len(shape_of(terms[0]))
    old = [1] * lead + list(shape_of(terms[0]))
    full = [was if size == -1 else size for size, was in zip(sizes, old, strict=True)]
    return tuple(_expanded(term, full) for term in terms)


def _view(terms: Terms, sizes: Sequence[int]) -> Terms:
    count = math.prod(shape_of(terms[0]))
    known = math.prod(size for size in sizes if size != -1)
    return tuple(_reshaped(term, [count // known if s == -1 else s for s in sizes]) for term in terms)


def _reshaped(x: Tensor, sizes: Sequence[int]) -> Tensor:
    """A view, of the tensor below where `x` is a view itself."""
    while isinstance(x, Scope) and x.is_view:
        below = x.factors[0].tensor
        if math.prod(shape_of(below)) != math.prod(x.shape) or x != movement.view(below, x.shape):
            break
        x = below
    if shape_of(x) == tuple(sizes):
        return x
    viewed = movement.view(x, sizes)
    index = viewed.factors[0].index
    if not isinstance(x, Scope) or not x.is_contraction or any(True for i in index for _ in i.divisions()):
        return viewed
    # Traversed by the parts, a product of windows that were merged into a batch shows them again.
    values = {loop.name: place for loop, place in zip(x.traversal, index, strict=True)}
    loops = viewed.traversal + x.summation
    assert len({loop.name for loop in loops}) == len(loops), "views and products name iterators differently"
    ranges = ranges_of(loops)
    factors = tuple(_below(read, ranges) for read in x.map_index(lambda i: i.substitute(values, ranges)))
    split = x.over(traversal=viewed.traversal, factors=factors)
    return split if reads_windows(split) else viewed


def _below(read: Read, ranges: Ranges) -> Read:
    """The read below rearranged tensors, as long as it stays inside their boxes."""
    while isinstance(read.tensor, Scope) and read.tensor.is_view:
        view = read.tensor
        bounds = [index.bounds(ranges) for index in read.index]
        if any(
            first < low or last >= high for (first, last), (low, high) in zip(bounds, view.box, strict=True)
        ):
            break
        values = {loop.name: index for loop, index in zip(view.traversal, read.index, strict=True)}
        read = Read(
            view.factors[0].tensor, tuple(i.substitute(values, ranges) for i in view.factors[0].index)
        )
    return read


def reads_windows(scope: Scope) -> bool:
    """Whether a product reads some values of a tensor more than once along one dimension."""
    for product in contractions((scope,)):
        for index in (index for read in product.factors for index in read.index):
            if len(index.terms) < 2 or any(True for _ in index.divisions()):
                continue
            first, last = index.bounds(product.ranges)
            extents = (high - low for low, high in (product.ranges[name] for name in index.iterators()))
            if math.prod(extents) > last + 1 - first:
                return True
    return False


def _transpose(x: Tensor, first: int, second: int) -> Tensor:
    order = list(range(len(shape_of(x))))
    order[first], order[second] = order[second], order[first]
    return movement.permute(x, order)


def _squeeze(x: Tensor, dims: int | Sequence[int]) -> Tensor:
    sizes = shape_of(x)
    gone = {dim % len(sizes) for dim in ([dims] if isinstance(dims, int) else dims)}
    return movement.view(x, [size for at, size in enumerate(sizes) if at not in gone or size > 1])


def _unsqueeze(x: Tensor, dim: int) -> Tensor:
    return movement.unsqueeze(x, dim % (len(shape_of(x)) + 1))


def _slice(
    x: Tensor, dim: int = 0, start: int | None = None, stop: int | None = None, step: int = 1
) -> Tensor:
    size = shape_of(x)[dim]
    first, last, _ = slice(start, stop, step).indices(size)
    return movement.narrow(x, dim % len(shape_of(x)), first, last, step)


def _select(x: Tensor, dim: int, index: int) -> Tensor:
    dim %= len(shape_of(x))
    index %= shape_of(x)[dim]
    return movement.view(
        movement.narrow(x, dim, index, index + 1), [s for at, s in enumerate(shape_of(x)) if at != dim]
    )


def _pad(x: Tensor, pads: Sequence[int], value: float = 0) -> Tensor:
    if value != 0:
        raise UnliftableError("padding that is not 0")
    pairs = list(zip(pads[::2], pads[1::2], strict=True))[::-1]
    return movement.pad(x, [*[(0, 0)] * (len(shape_of(x)) - len(pairs)), *pairs])


def _cat(tensors: Sequence[Terms], dim: int = 0) -> Terms:
    wholes = [_whole(terms) for terms in tensors]
    return (movement.cat(wholes, dim % len(shape_of(wholes[0]))),)


def _stack(tensors: Sequence[Terms], dim: int = 0) -> Terms:
    wholes = [_whole(terms) for terms in tensors]
    return (movement.stack(wholes, dim % (len(shape_of(wholes[0])) + 1)),)


def _unfold(x: Tensor, dim: int, size: int, step: int) -> Tensor:
    return movement.unfold(x, dim % len(shape_of(x)), size, step)


def _average_pool(
    x: Tensor,
    kernel: Sequence[int],
    stride: Sequence[int] = (),
    padding: Sequence[int] = (0,),
    ceil_mode: bool = False,
    count_include_pad: bool = True,
    divisor_override: int | None = None,
) -> Tensor:
    dims = len(shape_of(x)) - 2
    if ceil_mode or divisor_override is not None or (any(padding) and not count_include_pad):
        raise UnliftableError("a pooling that counts otherwise")
    full = [list(n) * dims if len(n) == 1 else list(n) for n in (kernel, stride or kernel, padding)]
    if any(len(numbers) != dims for numbers in full):
        raise UnliftableError("a pooling without a batch")
    return products.average_pool(x, full[0], stride=full[1], padding=full[2])


def _as_strided(node: fx.Node, terms: Terms) -> Terms:
    _, sizes, stride, *offset = node.args
    source = node.args[0].meta["val"]
    if not source.is_contiguous() or source.storage_offset():
        raise UnliftableError("strides of a tensor that is not contiguous")
    return tuple(movement.strided(x, sizes, stride, offset[0] if offset else 0) for x in terms)


def _index(node: fx.Node, terms: Terms) -> Terms:
    indices = list(node.args[1]) if node.target is aten.index.Tensor else []
    dims = [dim for dim, index in enumerate(indices) if index is not None]
    dim = int(node.args[1]) if not indices else dims[0]
    chosen = constant_of(indices[dim] if indices else node.args[2])
    if chosen is None or chosen.dim() != 1 or chosen.dtype == torch.bool or len(dims) > 1:
        raise UnliftableError("an index that is not known")
    size = shape_of(terms[0])[dim]
    with unset_fake_temporarily():
        places = [place % size for place in chosen.tolist()]
    even = len({second - first for first, second in itertools.pairwise(places)}) <= 1
    if not even and len(places) * size > MOST_ONE_HOT:
        raise UnliftableError("an index of too many places")
    return tuple(movement.index_select(term, dim % len(shape_of(term)), places) for term in terms)


def constant_of(node: Any) -> torch.Tensor | None:
    """The tensor that a graph holds as a constant, or None."""
    while isinstance(node, fx.Node) and node.target is aten.lift_fresh_copy.default:
        node = node.args[0]
    if not isinstance(node, fx.Node) or node.op != "get_attr":
        return None
    value = getattr(node.graph.owning_module, str(node.target), None)
    return value if isinstance(value, torch.Tensor) else None


def _same(terms: Terms, *_: Any, **__: Any) -> Terms:
    return terms


_NUMBERS: dict[Any, Callable[..., Terms]] = {
    aten.add.Tensor: _add,
    aten.sub.Tensor: _sub,
    aten.neg.default: _neg,
    aten.mul.Tensor: _mul,
    aten.mul.Scalar: _mul,
    aten.div.Tensor: _div,
    aten.div.Scalar: _div,
}
_OF_NODES: dict[Any, Callable[..., Terms]] = {
    aten.as_strided.default: _as_strided,
    aten.index.Tensor: _index,
    aten.index_select.default: _index,
}
LIFTS: dict[Any, Callable[..., Terms]] = {
    **_NUMBERS,
    **_OF_NODES,
    aten.mm.default: _product,
    aten.bmm.default: _product,
    aten.matmul.default: _product,
    aten.addmm.default: _product_and_sum,
    aten.baddbmm.default: _product_and_sum,
    aten.linear.default: _linear,
    aten.convolution.default: _convolution,
    aten.avg_pool1d.default: _each(_average_pool),
    aten.avg_pool2d.default: _each(_average_pool),
    aten.avg_pool3d.default: _each(_average_pool),
    aten.constant_pad_nd.default: _each(_pad),
    aten.slice.Tensor: _each(_slice),
    aten.select.int: _each(_select),
    aten.view.default: _view,
    aten.reshape.default: _view,
    aten._unsafe_view.default: _view,
    aten.permute.default: _each(movement.permute),
    aten.transpose.int: _each(_transpose),
    aten.t.default: _each(lambda x: _transpose(x, 0, -1)),
    aten.expand.default: _expand,
    aten.unsqueeze.default: _each(_unsqueeze),
    aten.squeeze.dim: _each(_squeeze),
    aten.squeeze.dims: _each(_squeeze),
    aten.cat.default: _cat,
    aten.stack.default: _stack,
    aten.unfold.default: _each(_unfold),
    aten.clone.default: _same,
    aten.alias.default: _same,
    torch.ops.prims.convert_element_type.default: _same,
}
