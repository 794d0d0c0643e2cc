"""Programs as recorded calls whose numbers are polynomials of sizes."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ollie_compile.compat import FakeTensorMode, TorchDispatchMode, has_effects, pytree


@dataclass(frozen=True, slots=True)
class Value:
    """A tensor: an input, or a result of a call, by its number."""

    number: int


@dataclass(frozen=True, slots=True)
class Polynomial:
    """A sum of coefficients times powers of sizes, by the exponents."""

    terms: tuple[tuple[int, tuple[int, ...]], ...]

    def at(self, sizes: Sequence[Any]) -> Any:
        """Its value, symbolic where the sizes are."""
        total: Any = 0
        for coefficient, exponents in self.terms:
            factors = [size for size, power in zip(sizes, exponents, strict=True) for _ in range(power)]
            total = total + math.prod(factors, start=coefficient)
        return total


@dataclass(frozen=True, slots=True)
class Call:
    """A call of an operator of torch: its arguments flattened, with `Value` and `Polynomial` leaves."""

    target: Any
    leaves: tuple[Any, ...]
    structure: Any


@dataclass(frozen=True, slots=True)
class Calls:
    """Calls in order; the values are numbered from the inputs on, and some of them are the results."""

    inputs: int
    calls: tuple[Call, ...]
    results: tuple[int, ...]

    def __call__(self, sizes: Sequence[Any], *inputs: Tensor) -> tuple[Tensor, ...]:
        """Run on tensors whose shapes have these sizes."""
        values: list[Any] = list(inputs)
        for call in self.calls:
            leaves = [_filled(leaf, values, sizes) for leaf in call.leaves]
            arguments, named = pytree.tree_unflatten(leaves, call.structure)
            values += pytree.tree_leaves(call.target(*arguments, **named))
        return tuple(values[number] for number in self.results)

    def plain(self) -> dict[str, Any]:
        """The calls as plain data, which `of` reads."""
        calls = [
            [str(call.target), list(map(_plain, call.leaves)), pytree.treespec_dumps(call.structure)]
            for call in self.calls
        ]
        return {"inputs": self.inputs, "calls": calls, "results": list(self.results)}

    @classmethod
    def of(cls, plain: Mapping[str, Any]) -> Calls:
        """The calls that `plain` gave.

        Raises:
            ValueError: what is called is no operator of torch without effects.
            KeyError, TypeError, AttributeError: it is something else.
        """
        calls = [
            Call(_target(name), tuple(map(_leaf_of, leaves)), pytree.treespec_loads(structure))
            for name, leaves, structure in plain["calls"]
        ]
        return cls(int(plain["inputs"]), tuple(calls), tuple(plain["results"]))

    @property
    def numbers(self) -> list[int]:
        """The whole numbers among all arguments, in order."""
        return [leaf for call in self.calls for leaf in call.leaves if _is_number(leaf)]

    @property
    def form(self) -> Any:
        """Everything but these numbers."""
        calls = [
            (call.target, [None if _is_number(leaf) else leaf for leaf in call.leaves], call.structure)
            for call in self.calls
        ]
        return self.inputs, calls, self.results


def _plain(leaf: Any) -> Any:
    """A leaf as JSON has it, and what JSON has not as an object of its own."""
    if isinstance(leaf, Value):
        return {"value": leaf.number}
    if isinstance(leaf, Polynomial):
        return {"terms": leaf.terms}
    if isinstance(leaf, torch.device):
        return {"device": str(leaf)}
    if isinstance(leaf, (torch.dtype, torch.memory_format, torch.layout)):
        return {"torch": str(leaf).removeprefix("torch.")}
    return leaf


def _leaf_of(plain: Any) -> Any:
    if not isinstance(plain, dict):
        return plain
    ((kind, value),) = plain.items()
    if kind == "value":
        return Value(value)
    if kind == "terms":
        return Polynomial(tuple((number, tuple(exponents)) for number, exponents in value))
    return torch.device(value) if kind == "device" else getattr(torch, value)


def _target(name: str) -> Any:
    library, operator, overload = name.split(".")
    if library in ("aten", "ollie", "prim"):
        found = getattr(getattr(getattr(torch.ops, library), operator), overload)
        if not has_effects(found):
            return found
    raise ValueError(f"it calls {name}")


def _is_number(leaf: Any) -> bool:
    return isinstance(leaf, int) and not isinstance(leaf, bool)


def _filled(leaf: Any, values: list[Any], sizes: Sequence[Any]) -> Any:
    if isinstance(leaf, Value):
        return values[leaf.number]
    return leaf.at(sizes) if isinstance(leaf, Polynomial) else leaf


class _Recorder(TorchDispatchMode):
    def __init__(self, inputs: Sequence[Tensor]) -> None:
        super().__init__()
        self.values: list[Tensor] = []  # held, so that no other gets the identity of one
        self.numbers: dict[int, int] = {}
        self.calls: list[Call] = []
        self.keep(inputs)

    def keep(self, tensors: Sequence[Tensor]) -> None:
        for tensor in tensors:
            self.numbers.setdefault(id(tensor), len(self.values))
            self.values.append(tensor)

    def number(self, tensor: Tensor) -> int:
        return self.numbers[id(tensor)]

    def __torch_dispatch__(
        self, target: Any, types: Any, args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        named = kwargs or {}
        result = target(*args, **named)
        leaves, structure = pytree.tree_flatten((args, named))
        leaves = [Value(self.number(leaf)) if isinstance(leaf, Tensor) else leaf for leaf in leaves]
        self.keep(pytree.tree_leaves(result))
        self.calls.append(Call(target, tuple(leaves), structure))
        return result


def record(function: Callable[..., Any], inputs: Callable[[], Sequence[Tensor]]) -> Calls:
    """What a function calls on tensors without values.

    Args:
        inputs: makes the tensors, where they get none.
    """
    with FakeTensorMode():
        made = inputs()
        recorder = _Recorder(made)
        with recorder:
            results = pytree.tree_leaves(function(*made))
        return Calls(len(made), tuple(recorder.calls), tuple(map(recorder.number, results)))


def fit(
    recorded: Callable[[tuple[int, ...]], Calls],
    lows: Sequence[int],
    degrees: Sequence[int],
    checks: Sequence[tuple[int, ...]],
) -> Calls:
    """The calls at any sizes, from those at a few.

    Args:
        recorded: the calls at given sizes.
        lows: the smallest sizes.
        degrees: the largest power of each size in a number.
        checks: more sizes, at which the fit must say what is recorded.

    Raises:
        ValueError: at some sizes the calls differ in more than numbers, or a number is no such polynomial
            with whole coefficients.
    """
    exponents = list(itertools.product(*(range(degree + 1) for degree in degrees)))
    points = [tuple(low + step for low, step in zip(lows, steps, strict=True)) for steps in exponents]
    above = tuple(low + degree + 1 for low, degree in zip(lows, degrees, strict=True))
    samples = [recorded(point) for point in points]
    first = samples[0]
    more = [(point, recorded(point)) for point in (above, *checks)]
    for point, other in [*zip(points, samples, strict=True), *more]:
        if other.form != first.form:
            raise ValueError(f"its calls at sizes {point} are others than at {points[0]}")
    polynomials = _solve(points, exponents, [sample.numbers for sample in samples])
    for point, other in more:
        wrong = next((n for p, n in zip(polynomials, other.numbers, strict=True) if p.at(point) != n), None)
        if wrong is not None:
            raise ValueError(f"the number {wrong} at sizes {point} is no polynomial of the sizes")
    left = iter(polynomials)
    calls = []
    for call in first.calls:
        leaves = (_leaf(next(left)) if _is_number(leaf) else leaf for leaf in call.leaves)
        calls.append(Call(call.target, tuple(leaves), call.structure))
    return Calls(first.inputs, tuple(calls), first.results)


def _leaf(polynomial: Polynomial) -> Any:
    """The polynomial, or its value where it has one."""
    constant = all(not any(exponents) for _, exponents in polynomial.terms)
    return polynomial.at([0] * len(polynomial.terms[0][1])) if constant and polynomial.terms else polynomial


def _solve(
    points: Sequence[tuple[int, ...]], exponents: Sequence[tuple[int, ...]], rows: Sequence[list[int]]
) -> list[Polynomial]:
    import sympy

    powers = [
        [math.prod(s**e for s, e in zip(point, of, strict=True)) for of in exponents] for point in points
    ]
    inverse = np.array(sympy.Matrix(powers).inv().tolist(), dtype=object)
    found = []
    for column in (inverse @ np.array(rows, dtype=object)).T:
        terms = [(value, of) for value, of in zip(column, exponents, strict=True) if value != 0]
        if any(not getattr(value, "is_integer", True) for value, _ in terms):
            raise ValueError("a number needs a quotient of the sizes, which may not divide")
        found.append(Polynomial(tuple((int(value), of) for value, of in terms)))
    return found
