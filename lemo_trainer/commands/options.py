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
