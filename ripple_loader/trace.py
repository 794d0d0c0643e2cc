"""Offline step 1: which neurons are active for which token, on real text.

A neuron's activation is what its column of `down_proj` is multiplied with. Where the activation function has
exact zeros (ReLU) a neuron is active when it is not zero; elsewhere when it is among the token's largest.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn
from tqdm import tqdm

from ripple_loader.architectures import Architecture

BitSets = npt.NDArray[np.uint8]
"""Active sets of one layer: shape (tokens, ceil(N / 8)), as `numpy.packbits` packs them."""


def calibration_sequences(
    calibration: Iterable[Any], tokenizer: Callable[[], Any], tokens: int, sequence_length: int
) -> Iterator[Tensor]:
    """Cut a calibration set into sequences of token ids, int64 of shape (1, <= sequence_length).

    Args:
        calibration: texts, rows of a dataset with a "text" or "input_ids" column, or tensors of token ids.
        tokenizer: makes the tokenizer, once there is a text.
        tokens: stop after so many.
        sequence_length: most tokens of a sequence; documents are joined to fill it.

    Raises:
        TypeError: it is one text, or an item is none of these.
        ValueError: there is not a single sequence.
    """
    if isinstance(calibration, str):
        raise TypeError("`calibration` should be a list of texts, got one str: put it in a list.")
    pending, left = torch.empty(0, dtype=torch.int64), tokens
    for item in calibration:
        pending = torch.cat([pending, _token_ids(item, tokenizer)])
        while len(pending) >= sequence_length and left > 0:
            taken = min(sequence_length, left)
            yield pending[None, :taken]
            pending, left = pending[sequence_length:], left - taken
        if left <= 0:
            return
    if len(pending):
        yield pending[None, :left]
    elif left == tokens:
        raise ValueError("`calibration` should hold at least one token, got an empty set.")


def _token_ids(item: Any, tokenizer: Callable[[], Any]) -> Tensor:
    if isinstance(item, dict):
        item = item.get("input_ids", item.get("text", item))
    if isinstance(item, str):
        item = tokenizer()(item).input_ids
    if isinstance(item, Tensor) or (isinstance(item, list) and item and isinstance(item[0], int)):
        return torch.as_tensor(item, dtype=torch.int64).flatten()
    raise TypeError(
        "`calibration` should hold texts, rows with a `text` or `input_ids` column, or tensors of token ids, "
        f"got {type(item).__name__}."
    )


def active_mask(activation_TN: Tensor, *, exact_zeros: bool, active_share: float) -> Tensor:
    """Which neurons count as active, bool of shape (T, N)."""
    if exact_zeros:
        return activation_TN != 0
    count = max(1, round(active_share * activation_TN.shape[-1]))
    mask_TN = torch.zeros_like(activation_TN, dtype=torch.bool)
    return mask_TN.scatter_(-1, activation_TN.abs().topk(count, dim=-1).indices, True)


@torch.no_grad()
def trace(
    model: nn.Module,
    architecture: Architecture,
    sequences: Iterable[Tensor],
    *,
    active_share: float,
    tokens: int,
) -> list[BitSets]:
    """Run `model` over the sequences and record every layer's active sets.

    Args:
        model: a causal LM with its MLPs in memory.
        architecture: where its MLPs are.
        sequences: token ids, each of shape (1, length).
        active_share: share of neurons that counts as active where there are no exact zeros.
        tokens: how many tokens the sequences hold at most, for the progress bar.

    Returns:
        One array a layer; together tokens x layers x N / 8 bytes.
    """
    sites = architecture.find(model)
    found: list[list[BitSets]] = [[] for _ in sites]

    def record(layer: int, exact_zeros: bool, activation: Tensor) -> None:
        flat_TN = activation.flatten(0, -2)
        mask_TN = active_mask(flat_TN, exact_zeros=exact_zeros, active_share=active_share)
        found[layer].append(np.packbits(mask_TN.cpu().numpy(), axis=1))

    handles = [
        site.linear("down").register_forward_pre_hook(
            lambda _, args, layer=layer, exact=site.has_exact_zeros: record(layer, exact, args[0])
        )
        for layer, site in enumerate(sites)
    ]
    try:
        with tqdm(total=tokens, unit="token", desc="trace") as bar:
            for ids in sequences:
                model(ids.to(next(model.parameters()).device), use_cache=False)
                bar.update(ids.shape[1])
    finally:
        for handle in handles:
            handle.remove()
    return [np.concatenate(parts) for parts in found]


def unpack(sets: BitSets, neurons: int) -> npt.NDArray[np.uint8]:
    """Active sets as zeros and ones of shape (tokens, N)."""
    return np.unpackbits(sets, axis=1, count=neurons)
