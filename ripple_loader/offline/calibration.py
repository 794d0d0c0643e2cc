"""The calibration set as sequences of token ids."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor

from ripple_loader.checkpoint.source import SourceModel, load_tokenizer
from ripple_loader.config import ReorderConfig


def calibration_sequences(
    calibration: Iterable[Any], tokenizer: Callable[[], Any], tokens: int, sequence_length: int
) -> Iterator[Tensor]:
    """Cut a calibration set into sequences of token ids, int64 of shape (1, <= sequence_length).

    Args:
        calibration: texts, rows of a dataset with a "text" or "input_ids" column, or tensors of token ids.
        tokenizer: makes the tokenizer; called only for texts.
        tokens: the number of tokens to stop after.
        sequence_length: most tokens of a sequence; documents are joined to fill it.

    Raises:
        TypeError: it is a single text, or an item has another type.
        ValueError: it is empty.
    """
    if isinstance(calibration, str):
        raise TypeError("`calibration` must be a list of texts, got one str: put it in a list.")
    pending, remaining = torch.empty(0, dtype=torch.int64, device="cpu"), tokens
    for item in calibration:
        pending = torch.cat([pending, _token_ids(item, tokenizer)])
        while len(pending) >= sequence_length and remaining > 0:
            length = min(sequence_length, remaining)
            yield pending[None, :length]
            pending, remaining = pending[sequence_length:], remaining - length
        if remaining <= 0:
            return
    if len(pending):
        yield pending[None, :remaining]
    elif remaining == tokens:
        raise ValueError("`calibration` must hold at least one token, got an empty set.")


def _token_ids(item: Any, tokenizer: Callable[[], Any]) -> Tensor:
    if isinstance(item, dict):
        item = item.get("input_ids", item.get("text", item))
    if isinstance(item, str):
        item = tokenizer()(item).input_ids
    if isinstance(item, Tensor) or (isinstance(item, list) and item and isinstance(item[0], int)):
        return torch.as_tensor(item, dtype=torch.int64, device="cpu").flatten()
    raise TypeError(
        "`calibration` must hold texts, rows with a `text` or `input_ids` column, or tensors of token ids, "
        f"got {type(item).__name__}."
    )


def cut_sequences(source: SourceModel, calibration: Iterable[Any], config: ReorderConfig) -> list[Tensor]:
    """The calibration set as token ids, by the model's own tokenizer."""
    tokenizer = functools.cache(lambda: load_tokenizer(source.directory))
    return list(calibration_sequences(calibration, tokenizer, config.tokens, config.sequence_length))
