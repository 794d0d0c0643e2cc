"""What a training step costs: activation bytes saved for the backward, floating-point operations, memory."""

from __future__ import annotations

import contextlib
import resource
import sys
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry, sdpa_backward_flop_count, sdpa_flop_count


class SavedBytes:
    """Storages that autograd holds for the backward pass; see `saved_activations`."""

    def __init__(self, excluded: set[int]) -> None:
        self._excluded = excluded
        self._packed: weakref.WeakSet[_Packed] = weakref.WeakSet()

    def pack(self, tensor: Tensor) -> _Packed:
        packed = _Packed(tensor)
        self._packed.add(packed)
        return packed

    @property
    def bytes(self) -> int:
        """Bytes of the distinct storages that are saved now, without parameters and buffers."""
        storages = (packed.tensor.untyped_storage() for packed in self._packed)
        sizes = {storage.data_ptr(): storage.nbytes() for storage in storages}
        return sum(size for pointer, size in sizes.items() if pointer not in self._excluded)


class _Packed:
    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor


@contextlib.contextmanager
def saved_activations(model: nn.Module) -> Iterator[SavedBytes]:
    """Follow what the forward passes inside the block save for their backward passes.

    Read `.bytes` after a forward pass and before its backward. Under gradient checkpointing that is what
    waits between the layers; what a layer's recomputation saves for a moment is not in it.
    """
    tensors = [*model.parameters(), *model.buffers()]
    saved = SavedBytes({tensor.untyped_storage().data_ptr() for tensor in tensors})
    with torch.autograd.graph.saved_tensors_hooks(saved.pack, lambda packed: packed.tensor):
        yield saved


def _pairs(query: Tensor, key: Tensor, causal: bool) -> float:
    """Share of the query-key pairs that a causal kernel computes."""
    return (1 + 1 / query.shape[2]) / 2 if causal and query.shape[2] == key.shape[2] else 1.0


def _cpu_flash(
    query: Tensor, key: Tensor, value: Tensor, dropout: float = 0.0, causal: bool = False, **_: Any
) -> int:
    shapes = query.shape, key.shape, value.shape
    return int(sdpa_flop_count(*shapes) * _pairs(query, key, causal))


def _cpu_flash_backward(
    grad: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    lse: Tensor,
    dropout: float,
    causal: bool,
    **_: Any,
) -> int:
    shapes = grad.shape, query.shape, key.shape, value.shape
    return int(sdpa_backward_flop_count(*shapes) * _pairs(query, key, causal))


# torch counts the CUDA kernels of scaled_dot_product_attention only.
_FORMULAS: dict[Any, Callable[..., int]] = {
    **flop_registry,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _cpu_flash,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: _cpu_flash_backward,
}


class FlopCounter(TorchDispatchMode):
    """Counts the matrix products inside `with FlopCounter() as counter`, recomputation and scoring included.

    Read `counter.flops`. torch's own FlopCounterMode also attributes them to modules, and for that keeps
    activations alive: 1.2 GB more at the peak of a checkpointed step. On the CPU, attention under a causal
    kernel counts the pairs up to the diagonal only.
    """

    def __init__(self) -> None:
        super().__init__()
        self.flops = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if formula := _FORMULAS.get(func.overloadpacket):
            self.flops += formula(*args, **(kwargs or {}), out_val=out)
        return out


def peak_rss_bytes() -> int:
    """Most memory that this process ever had resident."""
    if (status := Path("/proc/self/status")).exists():  # on Linux ru_maxrss starts with the parent's peak
        return int(status.read_text().partition("VmHWM:")[2].split()[0]) * 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
