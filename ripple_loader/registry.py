"""The choices of the configurations' options by name; other code can add to them.

A choice registers itself where it is defined; importing `ripple_loader` imports all of its own.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any, TypeVar

T = TypeVar("T")


class Registry(Mapping[str, T]):
    """Choices by name, in alphabetical order.

    Args:
        option: the option of a configuration that names one of them.
    """

    def __init__(self, option: str) -> None:
        self.option = option
        self._choices: dict[str, T] = {}

    def register(self, name: str) -> Callable[[T], T]:
        """Decorator that adds a class or function under a name.

        Raises:
            ValueError: another choice has the name.
        """

        def add(choice: T) -> T:
            if name in self._choices:
                raise ValueError(f"`{self.option}` has a choice {name!r} already: choose another name.")
            self._choices[name] = choice
            return choice

        return add

    def check(self, name: str) -> None:
        """Raise a ValueError that lists the choices when `name` is not one of them."""
        if name not in self._choices:
            raise ValueError(f"`{self.option}` must be one of {self.names()}, got {name!r}.")

    def names(self) -> str:
        """All names, for people."""
        return ", ".join(self)

    def __getitem__(self, name: str) -> T:
        return self._choices[name]

    def __iter__(self) -> Iterator[str]:
        return iter(sorted(self._choices))

    def __len__(self) -> int:
        return len(self._choices)


CACHE_POLICIES: Registry[Any] = Registry("cache_policy")
"""Subclasses of `online.cache.NeuronCache`."""

ACTIVE_RULES: Registry[Callable[[Any, float], Any]] = Registry("active")
"""Functions from |activation| (T, N) and `active_share` to a mask of the active neurons, bool (T, N)."""

BUNDLES: Registry[str | None] = Registry("bundles")
"""Names of encodings in a sidecar, keys of `format.encoding.ENCODINGS`; None means the checkpoint's own."""

PLACEMENTS: Registry[Callable[[Any], Any]] = Registry("placement")
"""Functions from an `offline.placement.LayerActivity` to its `Placed` order."""
