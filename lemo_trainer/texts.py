"""Texts on disk, and the samples of one length that are cut from them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any


def read_texts(path: str | Path) -> list[Any]:
    """The documents of a .jsonl file, or a plain text file as one document.

    Returns:
        The "text" of each line (a string), or its chat "messages" (a list).
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(
            f"No such text file: {path} (`python scripts/assets.py` fetches the test text)."
        )
    content = path.read_text("utf-8")
    if path.suffix != ".jsonl":
        return [content]
    try:
        lines = [json.loads(line) for line in content.splitlines()]
        return [line["messages"] if "messages" in line else line["text"] for line in lines]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f'Each line of {path} must be a JSON object with a "text" or "messages".') from error


def pack(documents: list[Any], tokenizer: Any, seq_len: int) -> list[dict[str, list[int]]]:
    """Join the documents, each followed by EOS, and cut them into samples of `seq_len` tokens.

    Tokens after the last whole sample are dropped.
    """
    tokens: list[int] = []
    for document in documents:
        if isinstance(document, str):
            tokens += tokenizer(document)["input_ids"]
        else:
            tokens += tokenizer.apply_chat_template(document, return_dict=True)["input_ids"]
        tokens.append(tokenizer.eos_token_id)
    starts = range(0, len(tokens) - seq_len + 1, seq_len)
    if not starts:
        raise ValueError(f"The text must hold at least `seq_len` {seq_len} tokens, got {len(tokens)}.")
    return [dict.fromkeys(("input_ids", "labels"), tokens[i : i + seq_len]) for i in starts]
