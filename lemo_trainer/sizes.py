"""Numbers of bytes, read and written."""

from __future__ import annotations

import math

_UNITS = {"": 1, "MB": 10**6, "GB": 10**9, "MIB": 2**20, "GIB": 2**30}


def parse_bytes(name: str, text: str) -> float:
    """ "12GiB" as a number of bytes; `name` is that of the option, for the error."""
    try:
        number = text.rstrip("BGIMbgim ")
        size = float(number) * _UNITS[text[len(number) :].strip().upper()]
        if 0 < size < math.inf:
            return size
    except (AttributeError, KeyError, ValueError):
        pass
    raise ValueError(f'`{name}` must be like "12GiB", "800 MB" or a positive number of bytes, got {text!r}.')


def size_text(size: float) -> str:
    """A number of bytes in the unit that fits it, with four digits: "1.250 GB", "37.12 MB", "512 bytes"."""
    for unit, bytes_ in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if size / bytes_ >= 0.99995:
            return f"{size / bytes_:#.4g}".rstrip(".") + f" {unit}"
    return f"{size:.0f} bytes"
