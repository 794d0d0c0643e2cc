"""Weights of a few bits packed into int32 words, as GPTQ and AWQ store them, dequantized.

Shapes: I inputs, O outputs, G groups of inputs that share a scale, W words.
"""

from __future__ import annotations

import torch
from torch import Tensor

_WORD = 32
_AWQ_ORDER = (0, 4, 1, 5, 2, 6, 3, 7)  # the position in its word of each of eight outputs


def unpack(words_WR: Tensor, bits: int) -> Tensor:
    """The numbers packed along the first axis, each beginning at the lowest bit that is free.

    Args:
        words_WR: int32; where `bits` does not divide 32, numbers lie across words.
        bits: of a number, at most 8.

    Returns:
        uint8, shape (W x 32 / bits, R).
    """
    span = 1 if _WORD % bits == 0 else bits  # words after which the pattern repeats
    low = words_WR.long().view(-1, span, words_WR.shape[1]) & 0xFFFFFFFF
    pairs = low | low.roll(-1, dims=1) << _WORD
    starts = range(0, span * _WORD, bits)
    numbers = [(pairs[:, at // _WORD] >> at % _WORD & 2**bits - 1).to(torch.uint8) for at in starts]
    return torch.stack(numbers, 1).flatten(0, 1)


def gptq_values(
    qweight: Tensor, qzeros: Tensor, scales_GO: Tensor, group_I: Tensor, bits: int, v1: bool
) -> Tensor:
    """A weight as GPTQ stores it, float32, shape (O, I).

    Args:
        qweight: packed along the inputs, shape (I x bits / 32, O).
        qzeros: zero points packed along the outputs, shape (G, O x bits / 32).
        scales_GO: of the groups.
        group_I: the group of each input.
        bits: of a number.
        v1: whether the zero points are stored less one.

    Raises:
        ValueError: a group or zero point that the format does not have.
    """
    numbers_IO = unpack(qweight, bits)
    zeros_GO = unpack(qzeros.T.contiguous(), bits).T.float()
    if v1:
        if (zeros_GO == 2**bits - 1).any():
            raise ValueError(
                f"a zero point of {2**bits} does not fit into {bits} bits, and programs read it differently"
            )
        zeros_GO = zeros_GO + 1
    if int(group_I.min()) < 0 or int(group_I.max()) >= len(scales_GO):
        raise ValueError(f"its groups must be 0 to {len(scales_GO) - 1}, got {group_I.aminmax()}")
    group_I = group_I.long()
    return ((numbers_IO - zeros_GO[group_I]) * scales_GO.float()[group_I]).T


def awq_values(qweight: Tensor, qzeros: Tensor, scales_GO: Tensor) -> Tensor:
    """A weight as AWQ's form `gemm` stores it in 4 bits, float32, shape (O, I).

    Args:
        qweight: packed along the outputs, eight in a word in AWQ's order, shape (I, O / 8).
        qzeros: zero points packed likewise, shape (G, O / 8).
        scales_GO: of the groups.
    """
    numbers_OI, zeros_OG = _awq_numbers(qweight), _awq_numbers(qzeros).float()
    inputs, groups = len(qweight), len(scales_GO)
    group_I = torch.arange(inputs) // (inputs // groups)
    return (numbers_OI - zeros_OG[:, group_I]) * scales_GO.float().T[:, group_I]


def _awq_numbers(words_RW: Tensor) -> Tensor:
    packed = unpack(words_RW.T.contiguous(), bits=4)
    return packed.view(-1, len(_AWQ_ORDER), packed.shape[1])[:, list(_AWQ_ORDER)].flatten(0, 1)
