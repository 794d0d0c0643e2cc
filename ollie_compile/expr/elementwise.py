"""Elementwise functions that a scope may apply to its reads."""

from __future__ import annotations

import zlib
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional


@dataclass(frozen=True, slots=True)
class Elementwise:
    """A function of one or two numbers.

    Args:
        torch: how it is computed.
        keeps_zero: whether it is 0 where all its arguments are, so that padding passes through it.
        integer: its value on integers, or None where it leaves them; derivations then treat it as unknown.
    """

    torch: Callable[..., Tensor]
    arguments: int = 1
    keeps_zero: bool = False
    integer: Callable[..., np.ndarray] | None = None


ELEMENTWISE: dict[str, Elementwise] = {
    "relu": Elementwise(torch.relu, keeps_zero=True, integer=lambda x: np.maximum(x, 0)),
    "neg": Elementwise(torch.neg, keeps_zero=True, integer=np.negative),
    "abs": Elementwise(torch.abs, keeps_zero=True, integer=np.abs),
    "maximum": Elementwise(torch.maximum, 2, keeps_zero=True, integer=np.maximum),
    "minimum": Elementwise(torch.minimum, 2, keeps_zero=True, integer=np.minimum),
    "tanh": Elementwise(torch.tanh, keeps_zero=True),
    "gelu": Elementwise(functional.gelu, keeps_zero=True),
    "silu": Elementwise(functional.silu, keeps_zero=True),
    "sigmoid": Elementwise(torch.sigmoid),
    "exp": Elementwise(torch.exp),
}


def combine(function: str, values: list[np.ndarray], modulus: int | None) -> np.ndarray:
    """The function of arrays: of int64 over the integers modulo 2**64 or over a prime field, or of float64.

    Of int64, what has no value there is a fixed polynomial with random coefficients instead: equal
    expressions stay equal under any meaning of their functions.
    """
    if function in "*+":
        total = values[0]
        for value in values[1:]:
            total = total * value if function == "*" else total + value
            total = total if modulus is None else total % modulus
        return total
    known = ELEMENTWISE[function]
    if values[0].dtype == np.float64:
        return known.torch(*map(torch.from_numpy, values)).numpy()
    if modulus is None and known.integer is not None:
        return known.integer(*values)
    total = np.full_like(values[0], 0 if known.keeps_zero else 1)
    for place, value in enumerate(values, start=1):
        coefficient = zlib.crc32(f"{function}{place}".encode()) % 1000 + 1
        square = value * value if modulus is None else value * value % modulus
        total = total + square * coefficient + value * (coefficient + 1)
        total = total if modulus is None else total % modulus
    return total
