"""Parsing what `str(scope)` prints: one notation for tests, reports and users.

scope   L[h:0..4, w:0..4] Sum[r:0..3] body
body    read * read * ...  |  read + read + ...  |  function(read, ...)
read    A[index, ...]  |  {scope}[index, ...]
index   sums of integers, iterators, n*index, index // n and index % n, in parentheses where needed
"""

from __future__ import annotations

import re
from collections.abc import Mapping

from ollie_compile.expr.elementwise import ELEMENTWISE
from ollie_compile.expr.index import Affine, Ranges, quotient, remainder
from ollie_compile.expr.scope import Constant, Input, Loop, Read, Scope, Tensor

_TOKEN = re.compile(r"\s*(//|\.\.|\d+|[A-Za-z_][\w']*|[\[\]{}()*+:,%-])")
_WIDEST = 2**62


def parse(text: str, tensors: Mapping[str, Input | Constant]) -> Scope:
    """The scope that `text` denotes; parse(str(scope), ...) == scope.

    Args:
        tensors: the tensor of each name in the text.

    Raises:
        ValueError: the text is no scope, names an unknown tensor, function or iterator, reads a tensor at
            the wrong number of indices, has an empty range, or an index that exceeds 62 bits.
    """
    parser = _Parser(text, tensors)
    scope = parser.scope()
    parser.done()
    return scope


class _Parser:
    def __init__(self, text: str, tensors: Mapping[str, Input | Constant]) -> None:
        self.text, self.tensors = text, tensors
        self.tokens: list[tuple[str, int]] = []
        place, end = 0, len(text.rstrip())
        while place < end:
            match = _TOKEN.match(text, place)
            if match is None:
                raise self.error("an unknown character", place)
            self.tokens.append((match[1], match.start(1)))
            place = match.end()
        self.tokens.append(("", end))
        self.at = 0

    def error(self, problem: str, place: int | None = None) -> ValueError:
        place = self.tokens[self.at][1] if place is None else place
        shown = self.text[place : place + 20] or "the end"
        return ValueError(
            f"An expression must look like `L[i:0..4] Sum[k:0..2] A[i, k] * B[k]`; "
            f"there is {problem} at column {place + 1}: {shown!r}."
        )

    @property
    def next(self) -> str:
        return self.tokens[self.at][0]

    def take(self, *wanted: str) -> str:
        token = self.next
        if token not in wanted:
            raise self.error(f"no {' or '.join(map(repr, wanted))}")
        self.at += 1
        return token

    def accept(self, *wanted: str) -> bool:
        found = self.next in wanted
        self.at += found
        return found

    def done(self) -> None:
        if self.next:
            raise self.error("more than one scope")

    def name(self, what: str) -> str:
        if not re.match(r"[A-Za-z_]", self.next):
            raise self.error(f"no {what}")
        self.at += 1
        return self.tokens[self.at - 1][0]

    def number(self) -> int:
        sign = -1 if self.accept("-") else 1
        if not self.next.isdigit():
            raise self.error("no number")
        self.at += 1
        return sign * int(self.tokens[self.at - 1][0])

    def scope(self) -> Scope:
        self.take("L")
        traversal = self.loops()
        summation = self.loops() if self.accept("Sum") else ()
        names = [loop.name for loop in traversal + summation]
        if len(set(names)) < len(names):
            raise self.error(f"an iterator that is declared twice among {', '.join(names)}")
        ranges = {loop.name: (loop.low, loop.high) for loop in traversal + summation}
        if self.next in ELEMENTWISE:
            function = self.name("function")
            factors = self.arguments(ranges)
            if len(factors) != ELEMENTWISE[function].arguments:
                raise self.error(f"a wrong number of arguments for {function} before this")
            return Scope(traversal, summation, tuple(factors), function)
        factors = [self.read(ranges)]
        function = self.next if self.next in ("*", "+") else "*"
        while self.accept(function):
            factors.append(self.read(ranges))
        return Scope(traversal, summation, tuple(factors), function)

    def arguments(self, ranges: Ranges) -> list[Read]:
        self.take("(")
        factors = [self.read(ranges)]
        while self.accept(","):
            factors.append(self.read(ranges))
        self.take(")")
        return factors

    def loops(self) -> tuple[Loop, ...]:
        self.take("[")
        found: list[Loop] = []
        while not self.accept("]"):
            if found:
                self.take(",")
            name = self.name("iterator")
            self.take(":")
            low = self.number()
            self.take("..")
            high = self.number()
            if high <= low:
                raise self.error(f"an empty range {low}..{high} of {name} before this")
            found.append(Loop(name, low, high))
        return tuple(found)

    def read(self, ranges: Ranges) -> Read:
        tensor: Tensor
        if self.accept("{"):
            tensor = self.scope()
            self.take("}")
        else:
            place = self.tokens[self.at][1]
            name = self.name("tensor")
            if name not in self.tensors:
                raise self.error(f"a tensor or function that is not known ({name})", place)
            tensor = self.tensors[name]
        self.take("[")
        index: list[Affine] = []
        while not self.accept("]"):
            if index:
                self.take(",")
            index.append(self.index(ranges))
        if len(index) != len(tensor.box):
            raise self.error(f"a read at {len(index)} indices of a tensor of {len(tensor.box)} before this")
        if any(abs(bound) > _WIDEST for i in index for bound in i.bounds(ranges)):
            raise self.error("an index that exceeds 62 bits before this")
        return Read(tensor, tuple(index))

    def index(self, ranges: Ranges) -> Affine:
        total = self.product(ranges) * -1 if self.accept("-") else self.product(ranges)
        while self.next in ("+", "-"):
            sign = 1 if self.take("+", "-") == "+" else -1
            total = total + self.product(ranges) * sign
        return total

    def product(self, ranges: Ranges) -> Affine:
        value = self.operand(ranges)
        while self.next in ("*", "//", "%"):
            operator = self.take("*", "//", "%")
            right = self.operand(ranges)
            if operator == "*" and not value.terms:
                value, right = right, value
            if right.terms or (operator != "*" and right.const < 1):
                raise self.error(f"no positive number beside {operator} before this")
            if operator == "*":
                value = value * right.const
            else:
                divide = quotient if operator == "//" else remainder
                value = divide(value, right.const, ranges) if right.const > 1 else value
        return value

    def operand(self, ranges: Ranges) -> Affine:
        if self.accept("("):
            value = self.index(ranges)
            self.take(")")
            return value
        if self.next.isdigit():
            return Affine.of(self.number())
        place = self.tokens[self.at][1]
        name = self.name("index")
        if name not in ranges:
            raise self.error(f"an iterator without a range ({name})", place)
        return Affine.of(name)
