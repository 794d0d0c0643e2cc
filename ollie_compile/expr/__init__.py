"""Tensor algebra expressions: index arithmetic, scopes, and their exact interpretation."""

from ollie_compile.expr.assignment import Assignment, parse_assignment
from ollie_compile.expr.elementwise import ELEMENTWISE
from ollie_compile.expr.index import Affine, Quotient, Ranges, Remainder, quotient, remainder
from ollie_compile.expr.interpret import evaluate
from ollie_compile.expr.notation import parse
from ollie_compile.expr.scope import Constant, Input, Loop, Read, Scope, Tensor, canonical, once, ranges_of

__all__ = [
    "ELEMENTWISE",
    "Affine",
    "Assignment",
    "Constant",
    "Input",
    "Loop",
    "Quotient",
    "Ranges",
    "Read",
    "Remainder",
    "Scope",
    "Tensor",
    "canonical",
    "evaluate",
    "once",
    "parse",
    "parse_assignment",
    "quotient",
    "ranges_of",
    "remainder",
]
