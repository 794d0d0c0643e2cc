"""Operators as users write them: `O[b, m, n] += A[b, m, k] * B[b, k, n]`."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from ollie_compile.expr.notation import parse
from ollie_compile.expr.scope import Constant, Input, Scope

_STATEMENT = re.compile(r"\s*\w+\s*\[([^\]]*)\]\s*(\+?=)\s*(.*)", re.DOTALL)
_LOOP = re.compile(r"([A-Za-z_]\w*)(?:\s*:\s*(-?\d+)\s*\.\.\s*(-?\d+))?")
_READ = re.compile(r"([A-Za-z_]\w*)\s*\[([^\[\]]*)\]")
_NAME = re.compile(r"[A-Za-z_]\w*")


@dataclass(frozen=True, slots=True)
class Assignment:
    """An operator in index notation, for tensors of any sizes.

    Args:
        declared: iterators on the left, with the range that is written there.
        summed: the other iterators.
        reads: names of tensors with the indices that they are read at.
    """

    text: str
    declared: tuple[tuple[str, tuple[int, int] | None], ...]
    summed: tuple[str, ...]
    reads: tuple[tuple[str, tuple[str, ...]], ...]
    body: str

    @classmethod
    def of(cls, text: str) -> Assignment:
        """The assignment that a text is.

        Raises:
            ValueError: it is not an assignment; `scope` reads the right side.
        """
        statement = _STATEMENT.fullmatch(text)
        if statement is None:
            raise ValueError(
                f"An operator must look like `O[b, m, n] += A[b, m, k] * B[b, k, n]`, got {text!r}."
            )
        left, sign, body = statement.groups()
        declared = []
        for item in _items(left):
            loop = _LOOP.fullmatch(item)
            if loop is None:
                raise ValueError(f"The left side of an operator must list iterators, got {item!r}.")
            name, low, high = loop.groups()
            declared.append((name, None if low is None else (int(low), int(high))))
        reads = tuple((name, _items(indices)) for name, indices in _READ.findall(body))
        used = dict.fromkeys(name for _, index in reads for item in index for name in _NAME.findall(item))
        summed = tuple(name for name in used if name not in dict(declared))
        if bool(summed) != (sign == "+="):
            what = f"sums over {', '.join(summed)}" if summed else "sums over nothing"
            raise ValueError(f"`{sign}` must be `{'+=' if summed else '='}`, for {text!r} {what}.")
        return cls(text, tuple(declared), summed, reads, body)

    @property
    def tensors(self) -> dict[str, int]:
        """How many indices each tensor is first read at, in the order in which they appear."""
        ranks: dict[str, int] = {}
        for name, index in self.reads:
            ranks.setdefault(name, len(index))
        return ranks

    def shape(self, shapes: Mapping[str, Sequence[int]]) -> tuple[int, ...]:
        """Shape of the result for tensors of these shapes, whose sizes may be symbolic.

        Raises:
            ValueError: a shape of another rank, or a range that is missing or not the same in all places.
        """
        for name, rank in self.tensors.items():
            if len(shapes[name]) != rank:
                raise ValueError(
                    f"`{name}` must have {rank} dimensions, as in {self.text!r}, "
                    f"got shape {tuple(shapes[name])}."
                )
        ranges = self._ranges(shapes)
        return tuple(ranges[name][1] - ranges[name][0] for name, _ in self.declared)

    def scope(self, tensors: Mapping[str, Input | Constant]) -> Scope:
        """The expression for these tensors.

        Raises:
            ValueError: as `shape`, or the right side is no body of a scope (`parse`).
        """
        ranges = self._ranges({name: tensor.shape for name, tensor in tensors.items()})
        traversal = ", ".join("{}:{}..{}".format(name, *ranges[name]) for name, _ in self.declared)
        loops = ", ".join("{}:{}..{}".format(name, *ranges[name]) for name in self.summed)
        return parse(f"L[{traversal}] {f'Sum[{loops}] ' if loops else ''}{self.body}", tensors)

    def _ranges(self, shapes: Mapping[str, Sequence[int]]) -> dict[str, tuple[int, int]]:
        """The range of every iterator: as declared, or that of the dimensions it indexes alone."""
        ranges: dict[str, tuple[int, int]] = {}
        for tensor, indices in self.reads:
            for name, size in zip(indices, shapes.get(tensor, ()), strict=False):  # `parse` names others
                if not _NAME.fullmatch(name):
                    continue
                if ranges.setdefault(name, (0, size)) != (0, size):
                    raise ValueError(
                        f"`{name}` must have one range, got {ranges[name][1]} and {size} (of {tensor})."
                    )
        ranges |= {name: limits for name, limits in self.declared if limits is not None}
        for name in (*dict(self.declared), *self.summed):
            if name not in ranges:
                raise ValueError(
                    f"The range of `{name}` must be given, for no dimension is read at `{name}` alone: "
                    f"write `{name}:0..4` on the left."
                )
        return ranges


def parse_assignment(text: str, tensors: Mapping[str, Input | Constant]) -> Scope:
    """The scope that an assignment denotes.

    Iterators on the left are traversed, all others summed, which has to be written `+=`. A range follows
    from the dimensions that an iterator indexes alone; where there is none it is written on the left, as
    in `O[h:0..4] += A[h + r] * K[r]`.

    Args:
        tensors: the tensor of each name on the right.

    Raises:
        ValueError: the text is no assignment, the range of an iterator is missing or not the same in all
            places, or the right side is no body of a scope (`parse`).
    """
    return Assignment.of(text).scope(tensors)


def _items(text: str) -> tuple[str, ...]:
    return tuple(filter(None, map(str.strip, text.split(","))))
