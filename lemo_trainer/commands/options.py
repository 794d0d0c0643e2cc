"""Values of command-line options that need more than a type."""

from __future__ import annotations


def check_least(option: str, value: int, least: int) -> None:
    """Raise ValueError if a whole number is too small."""
    if value < least:
        raise ValueError(f"`{option}` must be at least {least}, got {value}.")


def parse_shares(text: str) -> tuple[float, ...]:
    """ "0.75,0.5" as numbers."""
    try:
        return tuple(float(part) for part in text.split(","))
    except ValueError:
        raise ValueError(f'`kept_shares` must be numbers like "0.75,0.5,0.25", got {text!r}.') from None


def parse_bytes(text: str) -> float:
    """ "12GiB" as a number of bytes."""
    units = {"": 1, "MB": 10**6, "GB": 10**9, "MIB": 2**20, "GIB": 2**30}
    number = text.rstrip("BGIMbgim ")
    unit = text[len(number) :].strip().upper()
    try:
        return float(number) * units[unit]
    except (KeyError, ValueError):
        raise ValueError(
            f'`fit_memory` must be like "12GiB", "800 MB" or a number of bytes, got {text!r}.'
        ) from None
