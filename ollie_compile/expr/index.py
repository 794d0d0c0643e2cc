"""Index expressions: affine in iterators, floor quotients and remainders, simplified by ranges.

Every expression is kept in one normal form, so that equal expressions compare equal: terms are sorted,
coefficients are non-zero, and a quotient or remainder holds only what its divisor does not divide.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import NamedTuple

Ranges = Mapping[str, tuple[int, int]]
"""Half-open range [low, high) of each iterator."""


@dataclass(frozen=True, slots=True)
class Quotient:
    """floor(of / by), by > 1."""

    of: Affine
    by: int

    def __str__(self) -> str:
        return f"{_operand(self.of)} // {self.by}"


@dataclass(frozen=True, slots=True)
class Remainder:
    """of mod by, in [0, by)."""

    of: Affine
    by: int

    def __str__(self) -> str:
        return f"{_operand(self.of)} % {self.by}"


Atom = str | Quotient | Remainder


class Affine(NamedTuple):
    """const + sum of coefficient * atom; an atom is an iterator's name, a Quotient or a Remainder."""

    terms: tuple[tuple[Atom, int], ...] = ()
    const: int = 0

    @classmethod
    def of(cls, value: Atom | int) -> Affine:
        return cls(const=value) if isinstance(value, int) else cls(((value, 1),))

    @classmethod
    def total(cls, terms: Iterator[tuple[Atom, int]], const: int) -> Affine:
        """The normal form of a sum of terms."""
        coefficients: dict[Atom, int] = {}
        for atom, coefficient in terms:
            coefficients[atom] = coefficients.get(atom, 0) + coefficient
        kept = [term for term in coefficients.items() if term[1]]
        if len(kept) > 1:
            kept.sort(key=_term_order)
        return cls(tuple(kept), const)

    def __add__(self, other: Affine | int) -> Affine:  # type: ignore[override]
        if isinstance(other, int):
            return Affine(self.terms, self.const + other)
        if not (self.terms and other.terms):
            return Affine(self.terms or other.terms, self.const + other.const)
        return Affine.total(iter(self.terms + other.terms), self.const + other.const)

    def __mul__(self, factor: int) -> Affine:  # type: ignore[override]
        if not factor:
            return Affine()
        return Affine(tuple((a, c * factor) for a, c in self.terms), self.const * factor)

    def __sub__(self, other: Affine | int) -> Affine:
        return self + other * -1

    def coefficient(self, atom: Atom) -> int:
        return next((c for a, c in self.terms if a == atom), 0)

    @property
    def iterator(self) -> str | None:
        """The iterator's name where this is `coefficient * iterator + const`, else None."""
        atom = self.terms[0][0] if len(self.terms) == 1 else None
        return atom if isinstance(atom, str) else None

    @property
    def compound(self) -> bool:
        """Whether this is more than `coefficient * iterator + const`."""
        return bool(self.terms) and self.iterator is None

    def iterators(self) -> Iterator[str]:
        for atom, _ in self.terms:
            if isinstance(atom, str):
                yield atom
            else:
                yield from atom.of.iterators()

    def divisions(self) -> Iterator[Quotient | Remainder]:
        """The quotients and remainders at the top level of this expression."""
        for atom, _ in self.terms:
            if not isinstance(atom, str):
                yield atom

    def bounds(self, ranges: Ranges) -> tuple[int, int]:
        """Smallest and largest value (inclusive), by interval arithmetic."""
        low = high = self.const
        for atom, coefficient in self.terms:
            if isinstance(atom, str):
                first, last = ranges[atom][0], ranges[atom][1] - 1
            elif isinstance(atom, Quotient):
                first, last = (bound // atom.by for bound in atom.of.bounds(ranges))
            else:
                first, last = 0, atom.by - 1
            low += coefficient * (first if coefficient > 0 else last)
            high += coefficient * (last if coefficient > 0 else first)
        return low, high

    def substitute(self, values: Mapping[str, Affine], ranges: Ranges) -> Affine:
        """Replace iterators by expressions; `ranges` are those of the iterators in `values`' expressions."""
        const = self.const
        terms: list[tuple[Atom, int]] = []
        for atom, coefficient in self.terms:
            if isinstance(atom, str):
                if atom not in values:
                    terms.append((atom, coefficient))
                    continue
                term = values[atom]
            else:
                simplify = quotient if isinstance(atom, Quotient) else remainder
                term = simplify(atom.of.substitute(values, ranges), atom.by, ranges)
            const += term.const * coefficient
            terms += [(inner, c * coefficient) for inner, c in term.terms]
        return Affine.total(iter(terms), const)

    def __str__(self) -> str:
        text = ""
        alone = len(self.terms) == 1 and self.terms[0][1] == 1 and not self.const
        for atom, coefficient in self.terms:
            name = str(atom) if alone or isinstance(atom, str) else f"({atom})"
            name = name if abs(coefficient) == 1 else f"{abs(coefficient)}*{name}"
            text += f" - {name}" if coefficient < 0 else f" + {name}"
        if self.const or not text:
            text += f" - {-self.const}" if self.const < 0 else f" + {self.const}"
        return text[3:] if text.startswith(" + ") else "-" + text[3:]


def _term_order(term: tuple[Atom, int]) -> str:
    return str(term[0])


def _operand(of: Affine) -> str:
    return str(of) if of == Affine.of(of.iterator or 0) else f"({of})"


def quotient(of: Affine, by: int, ranges: Ranges) -> Affine:
    """floor(of / by) in normal form: multiples of `by` leave the quotient, which goes where it is 0."""
    whole, rest = _divide(of, by)
    low, high = rest.bounds(ranges)
    if low // by == high // by:
        return whole + low // by
    shared = _shared_factor(rest, by, ranges)
    if shared is not None:
        factor, large, _ = shared
        return whole + quotient(large, by // factor, ranges)
    return whole + Affine.of(Quotient(rest, by))


def remainder(of: Affine, by: int, ranges: Ranges) -> Affine:
    """of mod by in normal form."""
    _, rest = _divide(of, by)
    low, high = rest.bounds(ranges)
    if low // by == high // by:
        return rest - low // by * by
    shared = _shared_factor(rest, by, ranges)
    if shared is not None:
        factor, large, small = shared
        return remainder(large, by // factor, ranges) * factor + small
    return Affine.of(Remainder(rest, by))


def _shared_factor(of: Affine, by: int, ranges: Ranges) -> tuple[int, Affine, Affine] | None:
    """(g, large, small) with of = g * large + small, g > 1 a divisor of `by` and small in [0, g)."""
    for factor in sorted({math.gcd(c, by) for _, c in of.terms} - {1}, reverse=True):
        large = Affine(tuple((a, c // factor) for a, c in of.terms if c % factor == 0), of.const // factor)
        small = Affine(tuple((a, c) for a, c in of.terms if c % factor), of.const % factor)
        low, high = small.bounds(ranges)
        if low >= 0 and high < factor < by:
            return factor, large, small
    return None


def _divide(of: Affine, by: int) -> tuple[Affine, Affine]:
    """(whole, rest) with of = by * whole + rest; every coefficient of rest lies in (0, by)."""
    whole = Affine.total(((a, c // by) for a, c in of.terms), of.const // by)
    rest = Affine.total(((a, c % by) for a, c in of.terms), of.const % by)
    return whole, rest
