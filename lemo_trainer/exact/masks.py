"""Attention masks of which only the rows of a segment exist at a time.

transformers makes a mask [B, 1, S, S] for padding, packed documents and sliding windows before the layers
run: a gigabyte at 32,768 tokens. While a decoder runs in exact mode, a large mask is noted instead, and its
rows are made where a segment needs them.

Shapes: B batch, S tokens of the sequence, n tokens of a segment.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from typing import Any

from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, create_mask
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS

from lemo_trainer.compat import ThreadSwitch

LARGE = 64 * 2**20  # entries of a mask that is noted instead of made
_IMPLEMENTATIONS = ("eager", "sdpa")


class LazyMask:
    """A mask by the function that makes its rows `start` to `stop` up to key `stop`, [B, 1, n, stop]."""

    def __init__(self, rows: Callable[[int, int], Tensor]) -> None:
        self.rows = rows


@contextlib.contextmanager
def lazy_masks(implementation: str, large: int | None = None) -> Iterator[None]:
    """Inside the block, masks of an attention implementation with more than `large` entries are lazy.

    Other threads get their masks as before.
    """
    if implementation not in _IMPLEMENTATIONS:
        yield
        return
    with _switch(implementation).on(LARGE if large is None else large):
        yield


@functools.cache
def _switch(implementation: str) -> ThreadSwitch:
    def install() -> Callable[[], None]:
        own = ALL_MASK_ATTENTION_FUNCTIONS[implementation]
        ALL_MASK_ATTENTION_FUNCTIONS[implementation] = functools.partial(_noted, switch, own)

        def uninstall() -> None:
            del ALL_MASK_ATTENTION_FUNCTIONS[implementation]
            if ALL_MASK_ATTENTION_FUNCTIONS[implementation] is not own:
                ALL_MASK_ATTENTION_FUNCTIONS[implementation] = own

        return uninstall

    switch = ThreadSwitch(install)
    return switch


def _noted(switch: ThreadSwitch, make: Callable[..., Any], **arguments: Any) -> Any:
    large = switch.value
    if large is None:
        return make(**arguments)
    queries, keys = arguments["q_length"], arguments["kv_length"]
    if arguments["batch_size"] * queries * keys <= large or queries != keys:
        return make(**arguments)
    # SDPA needs no mask where it is plain causal, which one query tells as well as all of them.
    one_query = {**arguments, "q_length": 1, "batch_size": 1}
    if arguments.get("allow_is_causal_skip") and make(**one_query) is None:
        return None

    def rows(start: int, stop: int) -> Tensor:
        part = {"q_length": stop - start, "q_offset": start, "kv_length": stop, "allow_is_causal_skip": False}
        mask: Tensor = make(**{**arguments, **part})
        return mask

    return LazyMask(rows)


def made(mask: Any, seq_len: int) -> Any:
    """A lazy mask as a tensor; any other as it is."""
    return mask.rows(0, seq_len) if isinstance(mask, LazyMask) else mask


def rows_of_block_mask(block_mask: BlockMask) -> LazyMask:
    """The rows of flex attention's mask, written out as bool."""
    batch, heads = block_mask.shape[:2]
    device = block_mask.kv_num_blocks.device

    def rows(start: int, stop: int) -> Tensor:
        def shifted(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
            return block_mask.mask_mod(b, h, q + start, k)

        return create_mask(shifted, batch, heads, stop - start, stop, device=device)

    return LazyMask(rows)
