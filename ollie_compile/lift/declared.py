"""Operators that users have declared, by the torch operator of each."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from ollie_compile.expr import Assignment


@dataclass(frozen=True, slots=True)
class Declaration:
    """A user's operator.

    Args:
        notation: its index notation, as the user wrote it.
        assignment: the notation parsed.
        names: the notation's tensors in the order of the operator's parameters.
        code: of the function, which tells two of one name apart.
    """

    notation: str
    assignment: Assignment
    names: Sequence[str]
    code: bytes


DECLARED: dict[Any, Declaration] = {}


def declarations() -> list[tuple[str, str, bytes]]:
    """Name, notation and code of each operator, in a fixed order: compiled graphs depend on them."""
    return sorted((str(target), one.notation, one.code) for target, one in DECLARED.items())
