"""Symbolic sizes: expressions are derived at a few sizes and instantiated at any other of a declared range.

Derivations of one kind differ between sizes in their numbers only. These numbers are fitted as affine
functions of the sizes, and have to be those that the search finds at sizes that the fit has not seen.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from fractions import Fraction

from ollie_compile.expr import Constant, Input, Scope, parse
from ollie_compile.search.hybrid import search
from ollie_compile.search.proof import check_derivation

_NUMBER = re.compile(r"(?<![\w.])\d+|(?<=\.\.)\d+")


@dataclass(frozen=True, slots=True)
class Size:
    """A symbolic size: the multiples of `step` in [low, high].

    Raises:
        ValueError: fewer than three such sizes, which a fit and its check need.
    """

    low: int
    high: int
    step: int = 1

    def __post_init__(self) -> None:
        if self.low < 1 or self.step < 1 or self.low % self.step or self.high < self.low + 2 * self.step:
            raise ValueError(
                "A symbolic size needs 1 <= low, a multiple of step, and at least three values up to high, "
                f"got low {self.low}, high {self.high} and step {self.step}."
            )

    def __contains__(self, size: int) -> bool:
        return self.low <= size <= self.high and size % self.step == 0


@dataclass(frozen=True, slots=True)
class Family:
    """A derived expression at all sizes.

    Args:
        make: the original expression at given sizes.
        sizes: the declared ranges.
        skeleton: the derived expression with a `#` for every number.
        numbers: for each of them its value at size 0 and its slope in every symbol.
        constants: those that the expression reads.
        rules: the first rule of each derivation step.
    """

    make: Callable[..., Scope]
    sizes: Mapping[str, Size]
    skeleton: str
    numbers: tuple[tuple[Fraction, ...], ...]
    constants: Mapping[str, Constant]
    rules: tuple[str, ...]

    def at(self, **sizes: int) -> Scope:
        """The derived expression at these sizes, checked exactly against the original.

        Raises:
            ValueError: a size outside its declared range, a missing or unknown symbol, or sizes at which
                the derivation does not hold.
        """
        if sizes.keys() != self.sizes.keys():
            raise ValueError(f"Sizes must be given for {', '.join(self.sizes)}, got {', '.join(sizes)}.")
        for name, value in sizes.items():
            if value not in self.sizes[name]:
                known = self.sizes[name]
                raise ValueError(
                    f"`{name}` must be a multiple of {known.step} in [{known.low}, {known.high}], "
                    f"got {value}."
                )
        original = self.make(**sizes)
        scope = self._instance(original, sizes)
        wrong = None if scope is None else check_derivation(original, scope)
        if scope is None or wrong is not None:
            raise ValueError(f"The derivation does not hold at {sizes}: derive the expression there instead.")
        return scope

    def text_at(self, **sizes: int) -> str:
        """The text of the derived expression at these sizes, whether it holds there or not."""
        numbers = iter(self.numbers_at(sizes))
        return re.sub("#", lambda _: str(next(numbers)), self.skeleton)

    def _instance(self, original: Scope, sizes: Mapping[str, int]) -> Scope | None:
        values = self.numbers_at(sizes)
        if any(value.denominator != 1 or value < 0 for value in values):
            return None
        tensors: dict[str, Input | Constant] = {**original.inputs(), **self.constants}
        try:
            scope = parse(self.text_at(**sizes), tensors)
        except ValueError:  # an empty range, say: there is no such expression at these sizes
            return None
        return scope if scope.box == original.box else None

    def numbers_at(self, sizes: Mapping[str, int]) -> list[Fraction]:
        """The numbers of the expression in the order of its text."""
        return [
            first + sum(slope * sizes[name] for slope, name in zip(slopes, self.sizes, strict=True))
            for first, *slopes in self.numbers
        ]


def derive(
    make: Callable[..., Scope], sizes: Mapping[str, Size], *, max_depth: int, budget_s: float
) -> list[Family]:
    """Derive an expression with symbolic sizes.

    The search runs at the smallest sizes and, for each symbol, at its next value, which makes the fit;
    then at the largest and the next but smallest sizes, where it has to find what was fitted.

    Args:
        make: the expression at given sizes, as keyword arguments named like `sizes`.
        sizes: the declared range of each symbol.
        max_depth: of each search.
        budget_s: of all searches together, in seconds.

    Raises:
        ValueError: no symbols are given.
    """
    if not sizes:
        raise ValueError("`sizes` must name at least one symbolic size, got none: use `search` instead.")
    base = {name: size.low for name, size in sizes.items()}
    largest = {name: size.high - size.high % size.step for name, size in sizes.items()}
    instances = [base, *({**base, name: size.low + size.step} for name, size in sizes.items())]
    instances += [largest, {name: size.low + 2 * size.step for name, size in sizes.items()}]
    found = [
        _by_skeleton(make(**instance), max_depth=max_depth, budget_s=budget_s / len(instances))
        for instance in instances
    ]
    families = []
    for key, (first, constants, rules) in found[0].items():
        if not all(key in other for other in found):
            continue
        numbers = []
        for place, value in enumerate(first):
            moved = [other[key][0][place] for other in found[1 : len(sizes) + 1]]
            slopes = [
                Fraction(other - value, size.step) for other, size in zip(moved, sizes.values(), strict=True)
            ]
            at_zero = value - sum(slope * base[name] for slope, name in zip(slopes, sizes, strict=True))
            numbers.append((Fraction(at_zero), *slopes))
        family = Family(make, dict(sizes), key[0], tuple(numbers), constants, rules)
        if all(family.numbers_at(i) == other[key][0] for i, other in zip(instances, found, strict=True)):
            families.append(family)
    return families


Found = dict[tuple[str, int], tuple[list[int], dict[str, Constant], tuple[str, ...]]]


def _by_skeleton(expression: Scope, *, max_depth: int, budget_s: float) -> Found:
    """The derivations of a search, by skeleton and by how many of the same skeleton came before."""
    found: Found = {}
    seen: dict[str, int] = {}
    for derivation in search(expression, max_depth=max_depth, budget_s=budget_s).derivations:
        text = str(derivation.scope)
        skeleton = _NUMBER.sub("#", text)
        seen[skeleton] = seen.get(skeleton, 0) + 1
        rules = tuple(step.rules[0] for step in derivation.steps)
        numbers = [int(number) for number in _NUMBER.findall(text)]
        found[skeleton, seen[skeleton]] = numbers, derivation.scope.constants(), rules
    return found
