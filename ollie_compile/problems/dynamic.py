"""Operators whose sizes change between calls: derived at the sizes of the compilation, emitted for all sizes.

A derivation serves where its expressions at other sizes have one form (`symbolic`), and where lowering
them gives the same calls, whose numbers are polynomials of the sizes with whole coefficients. What rounds a
quotient, such as a stride or a tile, has no such numbers and is refused.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, fx

from ollie_compile import compat
from ollie_compile.compat import FakeTensorMode, hint, statically_known_true
from ollie_compile.config import OllieConfig
from ollie_compile.expr import Scope
from ollie_compile.lower.lowering import Program
from ollie_compile.problems import operators, subprograms
from ollie_compile.problems.operators import Convolution, Layout, Operator, Subprogram, Tensors
from ollie_compile.problems.polynomials import Calls, fit, record
from ollie_compile.problems.symbolic import Family, Size, derive
from ollie_compile.search.proof import LIMIT

FEWEST = 2  # torch.compile makes sizes of 0 and 1 graphs of their own
SEARCH_S = 20.0  # of the searches at other sizes, for one operator
MOST_SYMBOLS = 4

aten = torch.ops.aten
_WITHOUT_SIZES = {
    aten.mm.default,
    aten.addmm.default,
    aten.bmm.default,
    aten.baddbmm.default,
    aten.convolution.default,
    aten.permute.default,
    aten.transpose.int,
    aten.t.default,
    aten.add.Tensor,
    aten.sub.Tensor,
    aten.mul.Tensor,
    aten.mul.Scalar,
    aten.div.Scalar,
    aten.neg.default,
}

_VIEWS = {aten.view.default, aten.reshape.default}

Shapes = tuple[tuple[int | None, ...], ...]


@dataclass(frozen=True, kw_only=True)
class Dynamic:
    """A convolution or subprogram some of whose sizes change between calls.

    Args:
        base: it at the sizes of the compilation.
        symbols: for each input and dimension which symbol its size is; None is a fixed size.
        hints: the symbols' values at the compilation.
        found: programs for all sizes from `lows` on, or why there is none.
    """

    base: Convolution | Subprogram
    symbols: Shapes
    hints: tuple[int, ...]
    found: dict[Program, Calls | str] = field(default_factory=dict, compare=False, repr=False)

    declared = False

    def __str__(self) -> str:
        return f"{self.base}, dynamic shapes"

    @property
    def inputs(self) -> dict[str, Layout]:
        return self.base.inputs

    @property
    def outputs(self) -> tuple[Layout, ...]:
        return self.base.outputs

    @property
    def parameters(self) -> tuple[str, ...]:
        return self.base.parameters

    @property
    def steps(self) -> int:
        return self.base.steps

    @property
    def dtype(self) -> torch.dtype:
        return self.base.dtype

    @property
    def device(self) -> torch.device:
        return self.base.device

    def expression(self) -> Scope:
        return self.base.expression()

    def reference(self, *inputs: Tensor) -> Tensors:
        return self.base.reference(*inputs)

    def finished(self, program: Program) -> Callable[..., Tensors]:
        return self.base.finished(program)

    def example_inputs(self, dtype: torch.dtype | None = None) -> tuple[Tensor, ...]:
        return self.base.example_inputs(dtype)

    @property
    def lows(self) -> tuple[int, ...]:
        """The smallest sizes at which it is derived; windows are no longer than half of them."""
        reach = 1
        if isinstance(self.base, Convolution):
            taps = zip(self.base.weight.shape[2:], self.base.dilation, strict=True)
            reach = max(dilation * (tap - 1) + 1 for tap, dilation in taps)
        spatial = {symbol for shape in self.symbols for symbol in shape[2:]}
        wanted = (2 * reach if place in spatial else FEWEST for place in range(len(self.hints)))
        return tuple(min(hint, max(FEWEST, low)) for hint, low in zip(self.hints, wanted, strict=True))

    def at(self, sizes: Sequence[int]) -> Convolution | Subprogram:
        """The operator at other sizes."""
        layouts = [
            _resized(
                layout,
                [
                    size if symbol is None else sizes[symbol]
                    for size, symbol in zip(layout.shape, shape, strict=True)
                ],
            )
            for layout, shape in zip(self.inputs.values(), self.symbols, strict=True)
        ]
        if isinstance(self.base, Subprogram):
            return subprograms.resized(self.base, layouts)
        empty = [torch.empty(layout.shape, device="meta") for layout in layouts]
        output = _resized(self.base.output, self.base.reference(*empty).shape)
        return replace(self.base, input=layouts[0], weight=layouts[1], output=output)

    @functools.cached_property
    def _degrees(self) -> tuple[int, ...]:
        """How many dimensions of one tensor are a symbol's."""
        counts = ([shape.count(place) for shape in self.symbols] for place in range(len(self.hints)))
        return tuple(max(count) for count in counts)

    def refused(self, program: Program, config: OllieConfig) -> str | None:
        """Why a program does not serve all sizes, or None."""
        made = self.emitted(program, config)
        return f"with dynamic shapes: {made}" if isinstance(made, str) else None

    def emitted(self, program: Program, config: OllieConfig) -> Calls | str:
        """A program for all sizes, or why there is none."""
        if program not in self.found:
            try:
                self.found[program] = self._emitted(program, config.max_depth * self.steps)
            except (
                ValueError
            ) as error:  # sizes without an expression of this form, or numbers that do not fit
                self.found[program] = str(error)
        return self.found[program]

    def _emitted(self, program: Program, max_depth: int) -> Calls | str:
        text, hints = str(program.scope), self._named(self.hints)
        family = next((f for f in _families(self, max_depth) if f.text_at(**hints) == text), None)
        if family is None:
            return "its derivation holds at some sizes only"

        def recorded(sizes: tuple[int, ...]) -> Calls:
            operator = self.at(sizes)
            made = replace(program, scope=family.at(**self._named(sizes)))
            return record(operator.finished(made), lambda: _shadows(operator, made))

        calls = fit(recorded, self.lows, self._degrees, (self.hints,))
        wrong = self._wrong(program, calls, self.lows) or self._wrong(program, calls, self.hints)
        return wrong or calls

    def take(self, program: Program, calls: Calls) -> None:
        """Let a program be what it was for all sizes in an earlier process.

        Raises:
            ValueError: the calls need more memory than planning allows, at the smallest sizes, above them or
                at those of the compilation; or they do not give what torch computes.
        """
        above = tuple(low + degree + 1 for low, degree in zip(self.lows, self._degrees, strict=True))
        for sizes in (self.lows, above, self.hints):
            operator = self.at(sizes)
            with FakeTensorMode():
                values = calls.values(sizes, *_shadows(operator, program))
            largest = max(value.numel() for value in values if isinstance(value, Tensor))
            if largest > (most := operators.largest_allowed(operator)):
                raise ValueError(
                    f"its tensors must have {most} elements at most at sizes {sizes}, got {largest}"
                )
        wrong = self._wrong(program, calls, self.lows) or self._wrong(program, calls, above)
        if wrong is not None:
            raise ValueError(wrong)
        self.found[program] = calls

    def _wrong(self, program: Program, calls: Calls, sizes: Sequence[int]) -> str | None:
        """How the calls differ from torch in float64 at some sizes, or None."""
        operator = self.at(sizes)
        inputs = operator.example_inputs(torch.float64)
        constants = program.constants(torch.float64, self.device).values()
        want, got = operator.reference(*inputs), calls(sizes, *inputs, *constants)
        for mine, theirs in zip(got, (want,) if isinstance(want, Tensor) else want, strict=True):
            if mine.shape != theirs.shape:
                shapes = tuple(mine.shape), tuple(theirs.shape)
                return f"at sizes {tuple(sizes)} it has shape {shapes[0]} instead of {shapes[1]}"
            error = ((mine - theirs).abs().max() / theirs.abs().max().clamp_min(1e-300)).item()
            if not error < LIMIT:
                return f"at sizes {tuple(sizes)} it differs by {error:.1e} of the largest output in float64"
        return None

    def _named(self, sizes: Sequence[int]) -> dict[str, int]:
        return {f"s{place}": size for place, size in enumerate(sizes)}

    def calls(self, program: Program) -> Calls:
        """A program that was not refused, for all sizes."""
        made = self.found[program]
        assert isinstance(made, Calls), "a refused program is no winner"
        return made

    def emit(self, program: Program) -> Callable[..., tuple[Tensor, ...]]:
        """A program that was not refused as a function of (*inputs, *constants) of any sizes."""
        made = self.calls(program)

        def run(*values: Tensor) -> tuple[Tensor, ...]:
            return made(sizes_of(self, values), *values)

        return run


@functools.lru_cache(maxsize=256)
def _families(operator: Dynamic, max_depth: int) -> list[Family]:
    lows = operator.lows
    most = [max(hint, low + 4) for hint, low in zip(operator.hints, lows, strict=True)]
    sizes = {f"s{place}": Size(low, high) for place, (low, high) in enumerate(zip(lows, most, strict=True))}

    def make(**named: int) -> Scope:
        return operator.at([named[name] for name in sizes]).expression()

    return derive(make, sizes, max_depth=max_depth, budget_s=SEARCH_S)


def _shadows(operator: Convolution | Subprogram, program: Program) -> list[Tensor]:
    """The inputs and constants of a program without values; to be called under a FakeTensorMode."""
    inputs = [
        torch.empty_strided(layout.shape, layout.stride, dtype=operator.dtype, device=operator.device)
        for layout in operator.inputs.values()
    ]
    constants = program.scope.constants().values()
    return inputs + [torch.empty(c.shape, dtype=operator.dtype, device=operator.device) for c in constants]


def _resized(layout: Layout, shape: Sequence[int]) -> Layout:
    """Another shape, its dimensions in the same order in memory.

    Raises:
        ValueError: the layout has gaps or overlaps, which say nothing about other shapes.
    """
    if not layout.dense:
        raise ValueError(f"an input of strides {layout.stride} has no order of its dimensions")
    stride, step = [0] * len(shape), 1
    # Dimensions of size 1 have any stride; the last come first, as in contiguous tensors.
    for place in sorted(range(len(shape)), key=lambda at: (layout.stride[at], layout.shape[at], -at)):
        stride[place] = step
        step *= shape[place]
    return Layout(tuple(shape), tuple(stride))


def is_dynamic(value: Any) -> bool:
    """Whether a tensor has symbolic sizes or strides."""
    return isinstance(value, Tensor) and any(
        not isinstance(number, int) for number in (*value.shape, *value.stride())
    )


def recognize(node: fx.Node) -> Operator | str:
    """As `operators.recognize`, with dynamic shapes too."""
    if not any(is_dynamic(operand.meta.get("val")) for operand in (node, *node.all_input_nodes)):
        return operators.recognize(node)
    graph = fx.Graph()
    with FakeTensorMode():
        places = {source: _copied(graph.placeholder(source.name), source) for source in node.all_input_nodes}
        found = operators.recognize(_copied(graph.node_copy(node, places.__getitem__), node, places))
    return found if isinstance(found, str) else _wrapped(found, node.all_input_nodes[:2])


def find(graph: fx.Graph, fixed: frozenset[fx.Node]) -> list[tuple[Operator, subprograms.Site]]:
    """As `subprograms.find`, with dynamic shapes too."""
    if not any(is_dynamic(node.meta.get("val")) for node in graph.nodes):
        return list(subprograms.find(graph, fixed))
    with FakeTensorMode():
        copy, copies = _static_copy(graph)
        found = subprograms.find(copy, frozenset(copies[node] for node in fixed))
    originals: dict[fx.Node, fx.Node] = {}
    for node, copied in copies.items():
        originals.setdefault(copied, node)
    operators_found: list[tuple[Operator, subprograms.Site]] = []
    for operator, site in found:
        parts = (site.nodes, site.roots, site.inputs)
        nodes, roots, inputs = (tuple(map(originals.__getitem__, part)) for part in parts)
        original = subprograms.Site(nodes, roots, inputs)
        if not any(is_dynamic(node.meta.get("val")) for node in (*nodes, *inputs)):
            operators_found.append((operator, original))
        elif all(node.target in _WITHOUT_SIZES for node in nodes):
            wrapped = _wrapped(operator, inputs)
            if not isinstance(wrapped, str):
                operators_found.append((wrapped, original))
    return operators_found


def _static_copy(graph: fx.Graph) -> tuple[fx.Graph, dict[fx.Node, fx.Node]]:
    """A graph at the sizes of the compilation, and the copy of each node.

    Equal views have one copy, so that products which read them read one tensor.
    """
    copy = fx.Graph(graph.owning_module)
    copies: dict[fx.Node, fx.Node] = {}
    views: dict[Any, fx.Node] = {}
    for node in graph.nodes:
        copied = _copied(copy.node_copy(node, copies.__getitem__), node, copies)
        copies[node] = copied
        if node.target in _VIEWS:
            copies[node] = views.setdefault((node.target, repr(copied.args)), copied)
            if copies[node] is not copied:
                copy.erase_node(copied)
    return copy, copies


def _copied(copy: fx.Node, node: fx.Node, copies: dict[fx.Node, fx.Node] | None = None) -> fx.Node:
    """Give the copy of a node the sizes of the compilation, in its value and its arguments."""
    known = copies or {}

    def static(argument: fx.Node) -> Any:
        value = argument.meta.get("val")
        return value if isinstance(value, int) else argument

    if known:
        copy.args, copy.kwargs = fx.map_arg((copy.args, copy.kwargs), static)
    value = node.meta.get("val")
    copy.meta["val"] = hint(value)
    if is_dynamic(value):
        sizes = [[hint(number) for number in numbers] for numbers in (value.shape, value.stride())]
        if all(isinstance(number, int) for numbers in sizes for number in numbers):
            copy.meta["val"] = torch.empty_strided(*sizes, dtype=value.dtype, device=value.device)
    return copy


def _wrapped(
    operator: Convolution | Subprogram, inputs: Sequence[fx.Node]
) -> Convolution | Subprogram | Dynamic | str:
    """The operator with the symbols of its inputs' sizes."""
    expressions: list[Any] = []
    hints: list[int] = []
    symbols = []
    for node in inputs:
        shape: list[int | None] = []
        for size in node.meta["val"].shape:
            expression = compat.expression_of(size)
            if expression is None:
                shape.append(None)
                continue
            if expression not in expressions:
                expressions.append(expression)
                hints.append(hint(size))
            shape.append(expressions.index(expression))
        symbols.append(tuple(shape))
    if not hints:
        return operator
    if len(hints) > MOST_SYMBOLS or min(hints) < FEWEST:
        return f"dynamic shapes of {len(hints)} sizes, the smallest {min(hints)}"
    if isinstance(operator, Convolution) and any(symbol is not None for symbol in symbols[1]):
        return "dynamic shapes of its weight"
    return Dynamic(base=operator, symbols=tuple(symbols), hints=tuple(hints))


def guard(operator: Dynamic, inputs: Sequence[Tensor]) -> None:
    """Make the graph hold for sizes from `lows` on only, where they may be smaller.

    Raises:
        ValueError: a condition that is not known where, as in an exported program, none can be added.
    """
    for size, low in zip(sizes_of(operator, inputs), operator.lows, strict=True):
        if statically_known_true(size >= low):
            continue
        if compat.is_exporting():
            raise ValueError(f"it holds from size {low} on, which the exported program does not promise")
        if not bool(size >= low):  # puts the condition among the graph's guards
            raise ValueError(f"it holds from size {low} on, the size is {size}")


def sizes_of(operator: Dynamic, inputs: Sequence[Tensor]) -> list[Any]:
    """The symbols' values in the shapes of some inputs."""
    found: dict[int, Any] = {}
    for value, shape in zip(inputs, operator.symbols, strict=False):
        for size, symbol in zip(value.shape, shape, strict=True):
            if symbol is not None:
                found.setdefault(symbol, size)
    return [found[place] for place in range(len(operator.hints))]
