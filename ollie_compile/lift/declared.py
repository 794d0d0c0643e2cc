"""Operators of users: what is known of each, by the torch operator that it is."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from ollie_compile.expr import Assignment


@dataclass(frozen=True, slots=True)
class Declaration:
    """A user's operator.

    Args:
        notation: what it computes, as the user wrote it.
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
    """For each operator its name, notation and code, in a fixed order: what a compiled graph depends on."""
    return sorted((str(target), one.notation, one.code) for target, one in DECLARED.items())
