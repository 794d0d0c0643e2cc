"""Scopes: L[traversal] Sum[summation] function of reads (OLLIE, section 3).

A tensor is a total function of integer indices that is 0 outside its box. This one convention gives
padding its meaning and makes every change of a scope's range a question about zeros.
"""

from __future__ import annotations

import functools
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import cached_property
from typing import Any, NamedTuple, TypeVar

from ollie_compile.expr.index import Affine, Quotient, Remainder


class Loop(NamedTuple):
    """An iterator with its half-open range [low, high)."""

    name: str
    low: int
    high: int

    @property
    def extent(self) -> int:
        return self.high - self.low

    def __str__(self) -> str:
        return f"{self.name}:{self.low}..{self.high}"


@dataclass(frozen=True, slots=True)
class Input:
    """A tensor given from outside; its box starts at 0 in every dimension."""

    name: str
    shape: tuple[int, ...]

    @property
    def box(self) -> tuple[tuple[int, int], ...]:
        return tuple((0, size) for size in self.shape)

    def __str__(self) -> str:
        return self.name


@dataclass(frozen=True)
class Constant:
    """A tensor of known values in row-major order, such as the matrices of a bilinear decomposition."""

    name: str
    shape: tuple[int, ...]
    values: tuple[Fraction, ...]

    @classmethod
    def matrix(cls, name: str, rows: Sequence[Sequence[Fraction]]) -> Constant:
        return cls(name, (len(rows), len(rows[0])), tuple(value for row in rows for value in row))

    @property
    def box(self) -> tuple[tuple[int, int], ...]:
        return tuple((0, size) for size in self.shape)

    def at(self, *index: int) -> Fraction:
        """The value at an index inside the box."""
        place = 0
        for position, size in zip(index, self.shape, strict=True):
            place = place * size + position
        return self.values[place]

    @cached_property
    def _hash(self) -> int:
        return hash((self.name, self.shape))

    def __hash__(self) -> int:
        return self._hash

    def __str__(self) -> str:
        return self.name


class Read(NamedTuple):
    """A tensor read at an index, one expression for each dimension."""

    tensor: Tensor
    index: tuple[Affine, ...]  # type: ignore[assignment]

    def __str__(self) -> str:
        name = f"{{{self.tensor}}}" if isinstance(self.tensor, Scope) else str(self.tensor)
        return f"{name}[{', '.join(map(str, self.index))}]"


class Scope:
    """L[traversal] Sum[summation] factors[0] * factors[1] * ...

    Its box is the ranges of the traversal iterators. Iterators are local: an inner scope sees none of
    the outer ones, it is a tensor that is read. `function` combines the factors: "*" multiplies them,
    "+" adds them, and a name of `ELEMENTWISE` applies that function.

    Scopes are immutable and hash-consed: equal scopes are one object, which remembers what was found out
    about it (`once`).
    """

    __slots__ = (
        "__weakref__",
        "box",
        "factors",
        "function",
        "is_contraction",
        "is_view",
        "memo",
        "ranges",
        "summation",
        "traversal",
    )
    traversal: tuple[Loop, ...]
    summation: tuple[Loop, ...]
    factors: tuple[Read, ...]
    function: str
    box: tuple[tuple[int, int], ...]
    ranges: dict[str, tuple[int, int]]
    is_view: bool
    is_contraction: bool
    memo: dict[Callable[[Scope], Any], Any]

    def __new__(
        cls,
        traversal: tuple[Loop, ...],
        summation: tuple[Loop, ...],
        factors: tuple[Read, ...],
        function: str = "*",
    ) -> Scope:
        # By their identity, for a key that held scopes would keep them, and through them itself, alive.
        read = (id(r.tensor) if isinstance(r.tensor, Scope) else r.tensor for r in factors)
        key = (traversal, summation, function, *read, *(r.index for r in factors))
        known = _SCOPES.get(key)
        if known is not None:
            return known
        scope = super().__new__(cls)
        scope.traversal, scope.summation = traversal, summation
        scope.factors, scope.function = factors, function
        scope.box = tuple((loop.low, loop.high) for loop in traversal)
        scope.ranges = ranges_of(traversal + summation)
        # Whether this only rearranges one tensor.
        scope.is_view = not summation and len(factors) == 1 and function == "*"
        # Whether products are summed, which a library operator should do.
        scope.is_contraction = bool(summation) and function == "*" and scope.terms() > 1
        scope.memo = {}
        _SCOPES[key] = scope
        return scope

    def __reduce__(self) -> tuple[type[Scope], tuple[Any, ...]]:
        return Scope, (self.traversal, self.summation, self.factors, self.function)

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(loop.extent for loop in self.traversal)

    def terms(self) -> int:
        """How many factors are not constants."""
        return sum(not isinstance(read.tensor, Constant) for read in self.factors)

    def indices(self) -> Iterator[Affine]:
        """The index expressions of all reads."""
        return (index for read in self.factors for index in read.index)

    def used(self) -> set[str]:
        """Names of the iterators that occur in some read."""
        return {name for index in self.indices() for name in index.iterators()}

    def divisions(self) -> list[Quotient | Remainder]:
        found = [d for index in self.indices() for d in index.divisions()]
        return list(dict.fromkeys(found))

    def fresh(self, prefix: str) -> str:
        """A name with this prefix that no iterator of the scope has."""
        return next(name for i in range(1, 1000) if (name := f"{prefix}{i}") not in self.ranges)

    def map_index(self, function: Callable[[Affine], Affine]) -> tuple[Read, ...]:
        """The factors with `function` applied to every index expression."""
        return tuple(Read(read.tensor, tuple(map(function, read.index))) for read in self.factors)

    def with_factor(self, position: int, read: Read) -> Scope:
        return self.over(factors=(*self.factors[:position], read, *self.factors[position + 1 :]))

    def over(
        self,
        *,
        traversal: tuple[Loop, ...] | None = None,
        summation: tuple[Loop, ...] | None = None,
        factors: tuple[Read, ...] | None = None,
    ) -> Scope:
        """This scope with other loops or factors."""
        return Scope(
            self.traversal if traversal is None else traversal,
            self.summation if summation is None else summation,
            self.factors if factors is None else factors,
            self.function,
        )

    def below(self) -> Iterator[Scope]:
        """The scopes that this one reads."""
        return (read.tensor for read in self.factors if isinstance(read.tensor, Scope))

    def scopes(self) -> Iterator[Scope]:
        """This scope and all below it, each once, the innermost first."""
        return iter(_scopes(self))

    def inputs(self) -> dict[str, Input]:
        """The tensors from outside that this scope depends on, by name."""
        return {tensor.name: tensor for tensor in self._leaves() if isinstance(tensor, Input)}

    def constants(self) -> dict[str, Constant]:
        """The constants that this scope depends on, by name."""
        return {tensor.name: tensor for tensor in self._leaves() if isinstance(tensor, Constant)}

    def _leaves(self) -> Iterator[Tensor]:
        return (read.tensor for scope in self.scopes() for read in scope.factors)

    def __str__(self) -> str:
        loops = f"L[{', '.join(map(str, self.traversal))}] "
        if self.summation:
            loops += f"Sum[{', '.join(map(str, self.summation))}] "
        if self.function in "*+":
            return loops + f" {self.function} ".join(map(str, self.factors))
        return loops + f"{self.function}({', '.join(map(str, self.factors))})"

    def __repr__(self) -> str:
        return f"<Scope {self}>"


_SCOPES: weakref.WeakValueDictionary[Any, Scope] = weakref.WeakValueDictionary()

Known = TypeVar("Known")


def once(function: Callable[[Scope], Known]) -> Callable[[Scope], Known]:
    """Remember the value of a function of one scope, for as long as the scope lives."""

    @functools.wraps(function)
    def remembered(scope: Scope) -> Known:
        memo = scope.memo
        if remembered not in memo:
            memo[remembered] = function(scope)
        value: Known = memo[remembered]
        return value

    return remembered


@once
def _scopes(scope: Scope) -> tuple[Scope, ...]:
    found = dict.fromkeys(inner for below in scope.below() for inner in _scopes(below))
    return (*found, scope)


Tensor = Input | Constant | Scope


def ranges_of(loops: tuple[Loop, ...]) -> dict[str, tuple[int, int]]:
    return {loop.name: (loop.low, loop.high) for loop in loops}


@once
def canonical(scope: Scope) -> str:
    """The fingerprint of a scope: equal for scopes that differ in iterators' names and in the order of
    summations, factors and inner traversals only. It is a full description, so it never collides."""
    return _canonical(scope, tuple(range(len(scope.traversal))))


def _canonical(scope: Scope, order: tuple[int, ...]) -> str:
    """`order`: the traversal loops in the order in which they are named and listed."""
    known = _descriptions(scope)
    if order not in known:
        known[order] = _described(scope, order)
    return known[order]


@once
def _descriptions(scope: Scope) -> dict[tuple[int, ...], str]:
    """The fingerprints of a scope for orders of its traversal, as far as they are known."""
    return {}


def _described(scope: Scope, order: tuple[int, ...]) -> str:
    names = {scope.traversal[at].name: f"i{place}" for place, at in enumerate(order)}
    sums = scope.summation
    if len(sums) > 1:
        sums = tuple(sorted(sums, key=lambda loop: (_role(scope, loop.name, names), loop.low, loop.high)))
    names |= {loop.name: f"k{place}" for place, loop in enumerate(sums)}
    factors = []
    for read in scope.factors:
        index = [_renamed(i, names) for i in read.index]
        if isinstance(read.tensor, Scope):
            inner = tuple(sorted(range(len(index)), key=index.__getitem__))
            factors.append(f"{{{_canonical(read.tensor, inner)}}}{[index[at] for at in inner]}")
        else:
            factors.append(f"{read.tensor.name}{read.tensor.shape}{index}")
    loops = [f"{scope.traversal[at].low}..{scope.traversal[at].high}" for at in order]
    bounds = [f"{loop.low}..{loop.high}" for loop in sums]
    if scope.function in "*+":
        factors.sort()
    return f"{loops}{bounds}{scope.function}{factors}"


def _renamed(index: Affine, names: Mapping[str, str]) -> str:
    """An index with other names for its iterators, in a form that does not depend on the old names."""
    terms = []
    for atom, coefficient in index.terms:
        if isinstance(atom, str):
            terms.append(f"{coefficient}{names[atom]}")
        else:
            sign = "/" if isinstance(atom, Quotient) else "%"
            terms.append(f"{coefficient}({_renamed(atom.of, names)}{sign}{atom.by})")
    terms.sort()
    return f"{'+'.join(terms)}+{index.const}"


def _role(scope: Scope, name: str, names: Mapping[str, str]) -> str:
    """The occurrences of a summed iterator, written without the names of the summation iterators."""
    marks = {**names, **{loop.name: "?" for loop in scope.summation}, name: "*"}
    occurrences = []
    for read in scope.factors:
        for place, index in enumerate(read.index):
            if name in index.iterators():
                where = "{}" if isinstance(read.tensor, Scope) else f"{read.tensor.name}.{place}"
                occurrences.append(f"{where}:{_renamed(index, marks)}")
    return "|".join(sorted(occurrences))
