"""Encodings of a bundle's rows: floats, or 8- or 4-bit integers with a scale for each group of weights.

Dimension key: N neurons, H hidden, G groups of a row, B bytes of a row, R rows of a bundle.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from ripple_loader.registry import BUNDLES

GROUP = 32


class Encoding(ABC):
    """Turns rows of weights into bytes, and bytes into rows."""

    @abstractmethod
    def row_bytes(self, hidden: int) -> int:
        """Bytes of a row of `hidden` weights."""

    def stores(self, dtype: torch.dtype) -> bool:
        """Whether rows of `dtype` are a view of the bytes."""
        return False

    @abstractmethod
    def encode(self, weight_NH: Tensor) -> Tensor:
        """Bytes of some rows: uint8, shape (N, B)."""

    @abstractmethod
    def decode(self, bytes_NB: Tensor, out_NH: Tensor) -> None:
        """Write decoded rows into `out_NH`, of any float dtype; both tensors may be views."""


@dataclass(frozen=True)
class FloatEncoding(Encoding):
    """Weights as they are, in `dtype`."""

    dtype: torch.dtype

    def row_bytes(self, hidden: int) -> int:
        return hidden * self.dtype.itemsize

    def stores(self, dtype: torch.dtype) -> bool:
        return dtype == self.dtype

    def encode(self, weight_NH: Tensor) -> Tensor:
        return weight_NH.to(self.dtype).contiguous().view(torch.uint8)

    def decode(self, bytes_NB: Tensor, out_NH: Tensor) -> None:
        out_NH.copy_(bytes_NB.view(self.dtype))


@dataclass(frozen=True)
class IntegerEncoding(Encoding):
    """Weights rounded to `bits` bits, with a float16 scale for each group of 32 weights of a row.

    The largest weight of a group, with its sign, becomes the most negative integer, so that the range is used
    to its end. A row is [integers | scales]; 4-bit weights lie two to a byte, even ones in the low half.
    """

    bits: int

    def row_bytes(self, hidden: int) -> int:
        return -(-hidden * self.bits // 8) + 2 * -(-hidden // GROUP)

    def encode(self, weight_NH: Tensor) -> Tensor:
        N, H = weight_NH.shape
        half = 1 << (self.bits - 1)
        groups_NGg = F.pad(weight_NH.float(), (0, -H % GROUP)).view(N, -1, GROUP)
        largest_NG1 = groups_NGg.gather(2, groups_NGg.abs().argmax(2, keepdim=True))
        limit = torch.finfo(torch.float16).max
        scale_NG1 = (largest_NG1 / -half).clamp(-limit, limit).half()
        inverse_NG1 = torch.where(scale_NG1 == 0, 0.0, 1 / scale_NG1.float())
        integers_NH = (groups_NGg * inverse_NG1).round().clamp(-half, half - 1).view(N, -1)[:, :H]
        if self.bits == 4:
            shifted_NH = F.pad(integers_NH + half, (0, H % 2)).to(torch.uint8)
            stored = shifted_NH[:, ::2] | (shifted_NH[:, 1::2] << 4)
        else:
            stored = integers_NH.to(torch.int8).view(torch.uint8)
        return torch.cat([stored, scale_NG1.view(N, -1).view(torch.uint8)], dim=1)

    def decode(self, bytes_NB: Tensor, out_NH: Tensor) -> None:
        N, H = out_NH.shape
        stored, scales = bytes_NB.split([-(-H * self.bits // 8), 2 * -(-H // GROUP)], dim=1)
        scale_NG = scales.clone(memory_format=torch.contiguous_format).view(torch.float16).to(out_NH.dtype)
        if self.bits == 4:
            halves = torch.stack([stored & 15, stored >> 4], dim=2).view(N, -1)[:, :H]
            integers_NH = halves.view(torch.int8) - (1 << (self.bits - 1))
        else:
            integers_NH = stored.view(torch.int8)
        whole = H // GROUP * GROUP
        groups, into = (part[:, :whole].unflatten(1, (-1, GROUP)) for part in (integers_NH, out_NH))
        torch.mul(groups, scale_NG[:, : whole // GROUP, None], out=into)
        if whole < H:
            torch.mul(integers_NH[:, whole:], scale_NG[:, -1:], out=out_NH[:, whole:])


ENCODINGS: dict[str, Encoding] = {}
"""Encodings by the names that sidecars have for them: safetensors' for floats."""


def register_encoding(option: str, stored: str, encoding: Encoding) -> None:
    """Let `ReorderConfig.bundles` choose an encoding, and sidecars name it.

    Args:
        option: its name in the configuration.
        stored: its name in a sidecar's header; only registered names can be opened.
        encoding: encodes and decodes the rows.

    Raises:
        ValueError: another encoding has one of the names.
    """
    if stored in ENCODINGS:
        raise ValueError(f"sidecars have an encoding {stored!r} already: choose another name.")
    BUNDLES.register(option)(stored)
    ENCODINGS[stored] = encoding


BUNDLES.register("same")(None)
register_encoding("float32", "F32", FloatEncoding(torch.float32))
register_encoding("float16", "F16", FloatEncoding(torch.float16))
register_encoding("bfloat16", "BF16", FloatEncoding(torch.bfloat16))
register_encoding("int8", "I8", IntegerEncoding(8))
register_encoding("int4", "I4", IntegerEncoding(4))


def rounding_error(encoding: Encoding, weight_NH: Tensor) -> float:
    """The norm of an encoding's rounding error relative to the norm of the weights."""
    back_NH = torch.empty(weight_NH.shape, dtype=torch.float32)
    encoding.decode(encoding.encode(weight_NH), back_NH)
    norm = weight_NH.float().norm()
    return ((back_NH - weight_NH.float()).norm() / norm).item() if norm else 0.0
