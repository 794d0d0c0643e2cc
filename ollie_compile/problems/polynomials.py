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

from ollie_compile.compat import FakeTensorMode, TorchDispatchMode, pytree
from ollie_compile.lower.emitted import EMITTED, relaid


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
        values = self.values(sizes, *inputs)
        return tuple(values[number] for number in self.results)

    def values(self, sizes: Sequence[Any], *inputs: Tensor) -> list[Any]:
        """The inputs, and what each call gives, when run on tensors whose shapes have these sizes."""
        values: list[Any] = list(inputs)
        for call in self.calls:
            leaves = [_filled(leaf, values, sizes) for leaf in call.leaves]
            arguments, named = pytree.tree_unflatten(leaves, call.structure)
            target = relaid if call.target is torch.ops.aten.as_strided.default else call.target
            values += pytree.tree_leaves(target(*arguments, **named))
        return values

    def plain(self) -> dict[str, Any]:
        """The calls as plain data, which `of` reads: for each the operator's name and its arguments."""
        calls = []
        for call in self.calls:
            arguments, named = pytree.tree_unflatten(call.leaves, call.structure)
            calls.append([str(call.target), _plain(arguments), _plain(named)])
        return {"inputs": self.inputs, "calls": calls, "results": list(self.results)}

    @classmethod
    def of(cls, plain: Mapping[str, Any]) -> Calls:
        """The calls that `plain` gave.

        Raises:
            ValueError: the data is something else, or calls an operator that lowering does not emit.
        """
        calls, count = [], _count(plain["inputs"])
        for name, arguments, named in plain["calls"]:
            if not isinstance(name, str) or name not in EMITTED:
                raise ValueError(f"its calls must be of operators that lowering emits, got {name!r:.40}")
            if not isinstance(arguments, list) or not isinstance(named, dict):
                raise ValueError(f"the arguments of {name} must be a list and a mapping")
            leaves, structure = pytree.tree_flatten((tuple(map(_of, arguments)), _named(named)))
            calls.append(Call(EMITTED[name], tuple(leaves), structure))
        return cls(count, tuple(calls), tuple(map(_count, plain["results"])))

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


def _plain(argument: Any) -> Any:
    """An argument as JSON has it, and what JSON has not as a mapping of its kind to its value."""
    if isinstance(argument, (list, tuple)):
        return list(map(_plain, argument))
    if isinstance(argument, dict):
        return {name: _plain(value) for name, value in argument.items()}
    if isinstance(argument, Value):
        return {"value": argument.number}
    if isinstance(argument, Polynomial):
        return {"terms": argument.terms}
    if isinstance(argument, torch.device):
        return {"device": str(argument)}
    if isinstance(argument, (torch.dtype, torch.memory_format, torch.layout)):
        return {"torch": str(argument)}
    return argument


def _of(plain: Any) -> Any:
    """The argument that `_plain` gave.

    Raises:
        ValueError: it gives nothing of this form.
    """
    if isinstance(plain, list):
        return list(map(_of, plain))
    if isinstance(plain, dict) and len(plain) == 1:
        ((kind, value),) = plain.items()
        if kind == "value":
            return Value(_count(value))
        if kind == "terms" and isinstance(value, list):
            return Polynomial(tuple(map(_term, value)))
        if kind == "device" and value in ("cpu", "cuda", "cuda:0"):
            return torch.device(value)
        if kind == "torch" and isinstance(value, str) and value in _OF_TORCH:
            return _OF_TORCH[value]
    elif plain is None or isinstance(plain, str) or _is_small(plain):
        return plain
    raise ValueError(f"an argument must be a number, a text, a tensor or a list of these, got {plain!r:.40}")


def _is_small(plain: Any) -> bool:
    """Whether it is a number, or true or false; a NaN is not."""
    return isinstance(plain, (int, float)) and abs(plain) <= _LARGEST


def _named(plain: Mapping[str, Any]) -> dict[str, Any]:
    return {name: _of(value) for name, value in plain.items()}


def _term(plain: Any) -> tuple[int, tuple[int, ...]]:
    coefficient, exponents = plain
    if not _is_number(coefficient) or abs(coefficient) > _LARGEST:
        raise ValueError(f"a coefficient must be a whole number, got {coefficient!r:.40}")
    powers = tuple(map(_count, exponents))
    if any(power > _HIGHEST for power in powers):
        raise ValueError(f"an exponent must be {_HIGHEST} or less, got {max(powers)}")
    return coefficient, powers


def _count(plain: Any) -> int:
    if not _is_number(plain) or not 0 <= plain <= _LARGEST:
        raise ValueError(f"a count must be a whole number, 0 or more, got {plain!r:.40}")
    return int(plain)


_LARGEST, _HIGHEST = 2**40, 8  # of a number, and of an exponent
_OF_TORCH = {
    str(one): one
    for one in (
        *(torch.float16, torch.bfloat16, torch.float32, torch.float64),
        *(torch.contiguous_format, torch.preserve_format, torch.channels_last, torch.channels_last_3d),
        torch.strided,
    )
}


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
        if not any(isinstance(leaf, Tensor) for leaf in pytree.tree_leaves(result)):
            return result  # a question about a tensor, such as its device
        if EMITTED.get(str(target)) is not target:
            raise ValueError(f"{target} is no operator that lowering emits")
        leaves, structure = pytree.tree_flatten((tuple(map(_listed, args)), named))
        leaves = [Value(self.number(leaf)) if isinstance(leaf, Tensor) else leaf for leaf in leaves]
        self.keep(pytree.tree_leaves(result))
        self.calls.append(Call(target, tuple(leaves), structure))
        return result


def _listed(argument: Any) -> Any:
    """The argument with lists in the place of tuples, which JSON does not tell from them."""
    return list(map(_listed, argument)) if isinstance(argument, (list, tuple)) else argument


def record(function: Callable[..., Any], inputs: Callable[[], Sequence[Tensor]]) -> Calls:
    """What a lowered program calls on tensors without values.

    Args:
        inputs: makes the tensors, where they get none.

    Raises:
        ValueError: it calls an operator that is missing in `EMITTED`.
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
