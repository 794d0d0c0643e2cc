"""Tensor algebra expressions: index arithmetic, scopes, and their exact interpretation."""

from ollie_compile.expr.index import Affine, Quotient, Ranges, Remainder, quotient, remainder
from ollie_compile.expr.interpret import evaluate
from ollie_compile.expr.scope import Input, Loop, Read, Scope, Tensor, canonical, ranges_of

__all__ = [
    "Affine",
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
    "quotient",
    "ranges_of",
    "remainder",
]
