"""Operators as users write them: `O[b, m, n] += A[b, m, k] * B[b, k, n]`."""

from __future__ import annotations

import re
from collections.abc import Mapping

from ollie_compile.expr.notation import parse
from ollie_compile.expr.scope import Constant, Input, Scope

_STATEMENT = re.compile(r"\s*\w+\s*\[([^\]]*)\]\s*(\+?=)\s*(.*)", re.DOTALL)
_LOOP = re.compile(r"([A-Za-z_]\w*)(?:\s*:\s*(-?\d+)\s*\.\.\s*(-?\d+))?")
_READ = re.compile(r"([A-Za-z_]\w*)\s*\[([^\[\]]*)\]")
_NAME = re.compile(r"[A-Za-z_]\w*")


def parse_assignment(text: str, tensors: Mapping[str, Input | Constant]) -> Scope:
    """The scope that an assignment denotes.

    Iterators on the left are traversed, all others summed, which has to be written `+=`. A range follows
    from the dimensions that an iterator indexes alone; where there is none it is written on the left, as
    in `O[h:0..4] += A[h + r] * K[r]`.

    Args:
        tensors: what the names on the right stand for.

    Raises:
        ValueError: the text is no assignment, the range of an iterator is missing or not the same in all
            places, or the right side is no body of a scope (`parse`).
    """
    statement = _STATEMENT.fullmatch(text)
    if statement is None:
        raise ValueError(f"An operator must look like `O[b, m, n] += A[b, m, k] * B[b, k, n]`, got {text!r}.")
    left, sign, body = statement.groups()
    ranges = _ranges(body, tensors)
    traversal = []
    for item in filter(None, map(str.strip, left.split(","))):
        loop = _LOOP.fullmatch(item)
        if loop is None:
            raise ValueError(f"The left side of an operator must list iterators, got {item!r}.")
        name, low, high = loop.groups()
        if low is not None:
            ranges[name] = (int(low), int(high))
        traversal.append(name)
    indices = " ".join(index for _, index in _READ.findall(body))
    summed = [name for name in dict.fromkeys(_NAME.findall(indices)) if name not in traversal]
    if bool(summed) != (sign == "+="):
        what = f"sums over {', '.join(summed)}" if summed else "sums over nothing"
        raise ValueError(f"`{sign}` must be `{'+=' if summed else '='}`, for {text!r} {what}.")
    for name in (*traversal, *summed):
        if name not in ranges:
            raise ValueError(
                f"The range of `{name}` must be given, for no dimension is read at `{name}` alone: "
                f"write `{name}:0..4` on the left."
            )
    loops = ["{}:{}..{}".format(name, *ranges[name]) for name in (*traversal, *summed)]
    sums = f"Sum[{', '.join(loops[len(traversal) :])}] " if summed else ""
    return parse(f"L[{', '.join(loops[: len(traversal)])}] {sums}{body}", tensors)


def _ranges(body: str, tensors: Mapping[str, Input | Constant]) -> dict[str, tuple[int, int]]:
    """The ranges of the iterators that index a dimension alone."""
    ranges: dict[str, tuple[int, int]] = {}
    for tensor, indices in _READ.findall(body):
        if tensor not in tensors:
            continue  # `parse` names it, with its place
        for index, (low, high) in zip(indices.split(","), tensors[tensor].box, strict=False):
            name = index.strip()
            if not _NAME.fullmatch(name):
                continue
            if ranges.setdefault(name, (low, high)) != (low, high):
                raise ValueError(
                    f"`{name}` must have one range, got {ranges[name][1]} and {high} (of {tensor})."
                )
    return ranges
