"""Seconds of library calls on a device, kept on disk between processes."""

from __future__ import annotations

from collections.abc import Callable

import torch

from ollie_compile import store


class Profile:
    """Measured seconds of library calls by device and threads, kept on disk between processes."""

    def __init__(self) -> None:
        self.known: dict[tuple[torch.device, int], dict[str, float]] = {}
        self.changed: set[tuple[torch.device, int]] = set()

    def seconds(self, device: torch.device, what: str, measure: Callable[[], float]) -> float:
        """The result of `measure` for the call `what`, now or earlier."""
        place = (device, torch.get_num_threads())
        if place not in self.known:
            kept = store.read(self._name(device)) or {}
            self.known[place] = {k: float(v) for k, v in kept.items() if isinstance(v, (int, float))}
        values = self.known[place]
        if what not in values:
            values[what] = measure()
            self.changed.add(place)
        return values[what]

    def save(self) -> None:
        """Add new timings to those that other processes have kept."""
        for place in self.changed:
            if place[1] == torch.get_num_threads():
                name = self._name(place[0])
                store.write(name, (store.read(name) or {}) | self.known[place])
        self.changed.clear()

    @staticmethod
    def _name(device: torch.device) -> str:
        return store.key("profile", store.conditions(device))
