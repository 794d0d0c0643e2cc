"""Leaves that stand in for trained parameters while a walk goes backward.

Gradients of several segments are added up in the leaves, outside of the parameters' own graph. The walk then
returns each sum once, so that hooks on a parameter, DDP and FSDP see one gradient, as without LeMo.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Sequence

from torch import Tensor, nn


def trained_parameters(modules: Iterable[nn.Module]) -> list[nn.Parameter]:
    """The distinct parameters of `modules` that require a gradient."""
    found = {id(p): p for module in modules for p in module.parameters() if p.requires_grad}
    return list(found.values())


class Leaves:
    """One leaf for each of `parameters`, all of the same memory as the parameter."""

    def __init__(self, parameters: Sequence[Tensor]) -> None:
        self._leaves = {id(p): p.detach().requires_grad_() for p in parameters}
        self._sums: dict[int, Tensor] = {}

    @contextlib.contextmanager
    def in_place_of_parameters(self, parts: Iterable[nn.Module]) -> Iterator[None]:
        """Inside the block, `parts` compute with the leaves; a part of a part counts by itself."""
        replaced = [
            (own, name, tensor)
            for part in parts
            for own in (part._parameters, part._buffers)  # a buffer may require a gradient too
            for name, tensor in own.items()
            if id(tensor) in self._leaves
        ]
        try:
            for own, name, tensor in replaced:
                own[name] = self._leaves[id(tensor)]
            yield
        finally:
            for own, name, tensor in replaced:
                own[name] = tensor

    def add_up(self) -> None:
        """Add the gradients of half precision to sums in float32; called after each segment."""
        for key, leaf in self._leaves.items():
            if leaf.grad is None or leaf.dtype.itemsize >= 4:
                continue
            if key in self._sums:
                self._sums[key] += leaf.grad
            else:
                self._sums[key] = leaf.grad.float()
            leaf.grad = None

    def sums(self) -> list[Tensor | None]:
        """The gradients so far, as they are kept."""
        return [*self._sums.values(), *(leaf.grad for leaf in self._leaves.values())]

    def gradients(self) -> list[Tensor | None]:
        """The sums, in the dtype of the parameters; None for a parameter that no segment used."""
        return [
            self._sums[key].to(leaf.dtype) if key in self._sums else leaf.grad
            for key, leaf in self._leaves.items()
        ]
