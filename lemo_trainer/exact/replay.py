"""What a forward pass must find again when it runs a second time: random generators and autocast."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from torch import Tensor
from torch.utils.checkpoint import get_device_states, set_device_states


class RandomState:
    """The random generators as they are now, on the CPU and on the devices of `tensor`."""

    def __init__(self, tensor: Tensor) -> None:
        self._device_type = tensor.device.type
        self._cpu = torch.get_rng_state()
        self._devices, self._states = get_device_states(tensor)

    def holds(self, tensor: Tensor) -> bool:
        """Whether the generators are still as they were: nothing was drawn."""
        now = RandomState(tensor)
        return torch.equal(self._cpu, now._cpu) and all(map(torch.equal, self._states, now._states))

    @contextlib.contextmanager
    def restored(self) -> Iterator[None]:
        """The generators as they were, inside the block."""
        with torch.random.fork_rng(self._devices, device_type=self._device_type):
            torch.set_rng_state(self._cpu)
            if self._devices:
                set_device_states(self._devices, self._states, device_type=self._device_type)
            yield


def present_autocast(device: torch.device) -> torch.autocast:
    """Autocast as it is now, for a later re-run. It caches no casts, which would outlive their graph."""
    return torch.autocast(
        device.type,
        dtype=torch.get_autocast_dtype(device.type),
        enabled=torch.is_autocast_enabled(device.type),
        cache_enabled=False,
    )
