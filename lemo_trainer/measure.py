"""Measures a training step: bytes of activations, floating-point operations, peak memory."""

from __future__ import annotations

import contextlib
import math
import resource
import sys
from collections import Counter
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor, nn

from lemo_trainer.compat import (
    SDPA_ON_CPU,
    SDPA_ON_CPU_BACKWARD,
    StorageWeakRef,
    TorchDispatchMode,
    flop_registry,
    in_backward,
    sdpa_backward_flop_count,
    sdpa_flop_count,
    tree_leaves,
)


class ActivationBytes(TorchDispatchMode):
    """Bytes of the tensors allocated inside `with ActivationBytes() as activations` and not yet freed.

    It counts living storages. Hooks on saved tensors would miss those that selective checkpointing caches.

    Attributes:
        saved_bytes: the most bytes alive when a backward pass began, that is, saved for it; gradients of
            parameters from an earlier segment of the same sample do not count (`are_gradients`). Under
            gradient checkpointing these are the layers' inputs; `peak_bytes` includes their recomputation.
        backward_passes: how many began.
        peak_bytes: the most bytes alive at one time.
        phase: a name for the current part of the step, which the caller may set.
        peaks: the most bytes alive at one time in each phase.
    """

    def __init__(self) -> None:
        super().__init__()
        self.saved_bytes = 0
        self.backward_passes = 0
        self.phase = ""
        self.peaks: Counter[str] = Counter()
        self._backward = False
        self._gradients: set[StorageWeakRef] = set()
        self._allocated: dict[StorageWeakRef, int] = {}
        self._upper_bound = 0  # of the bytes alive: the last count plus all allocated since

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        backward = in_backward()
        if backward and not self._backward:
            self.backward_passes += 1
            self.saved_bytes = max(self.saved_bytes, self.bytes - self._bytes_of_gradients())
        self._backward = backward
        out = func(*args, **(kwargs or {}))
        outputs = _storages(out)
        for storage in outputs.keys() - _storages((args, kwargs)).keys() - self._allocated.keys():
            self._allocated[storage] = outputs[storage]
            self._upper_bound += outputs[storage]
        if self._upper_bound > self.peaks[self.phase]:
            self.peaks[self.phase] = max(self.peaks[self.phase], self.bytes)
        return out

    def __enter__(self) -> Self:
        _counting.append(self)
        entered: Self = super().__enter__()
        return entered

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        _counting.remove(self)

    def _bytes_of_gradients(self) -> int:
        return sum(self._allocated.get(ref, 0) for ref in self._gradients)

    def forget(self) -> None:
        """Leave out of later counts what is alive now."""
        self._allocated.clear()

    @property
    def peak_bytes(self) -> int:
        return max(self.peaks.values(), default=0)

    @property
    def bytes(self) -> int:
        """Bytes of the distinct storages alive, without those from before the block (parameters)."""
        self._allocated = {ref: size for ref, size in self._allocated.items() if not ref.expired()}
        self._upper_bound = sum(self._allocated.values())
        return self._upper_bound


_counting: list[ActivationBytes] = []


def are_gradients(tensors: Iterable[Tensor | None]) -> None:
    """Tell those who count activations that these are gradients of parameters."""
    for activations in _counting:
        activations._gradients.update(*(_storages(tensor) for tensor in tensors))


def _storages(tree: Any) -> dict[StorageWeakRef, int]:
    tensors = (leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor))
    storages = (leaf.untyped_storage() for leaf in tensors if leaf.layout == torch.strided)
    return {StorageWeakRef(storage): storage.nbytes() for storage in storages}


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


# torch has formulas only for the CUDA kernels of scaled_dot_product_attention.
_FORMULAS: dict[Any, Callable[..., int]] = {
    **flop_registry,
    SDPA_ON_CPU: _cpu_flash,
    SDPA_ON_CPU_BACKWARD: _cpu_flash_backward,
}


class FlopCounter(TorchDispatchMode):
    """Counts the operations of matrix products inside `with FlopCounter() as counter`, in `counter.flops`.

    Recomputation and scoring are included. torch's own FlopCounterMode also attributes operations to modules
    and keeps activations alive for that, 1.2 GB at the peak of a checkpointed step. On the CPU, only the
    pairs up to the diagonal are counted for attention under a causal kernel.
    """

    def __init__(self) -> None:
        super().__init__()
        self.flops = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if formula := _FORMULAS.get(func.overloadpacket):
            self.flops += formula(*args, **(kwargs or {}), out_val=out)
        return out


class WorkCounter(FlopCounter):
    """Counts, beside `flops`, the `calls` of operators and the `bytes` of their results."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes = 0
        self.calls = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = super().__torch_dispatch__(func, types, args, kwargs)
        if func.namespace != "aten":  # questions of fake tensors about themselves
            return out
        self.calls += 1
        if not func.is_view:
            self.bytes += sum(leaf.nbytes for leaf in tree_leaves(out) if isinstance(leaf, Tensor))
        return out


def peak_rss_bytes() -> int:
    """The most memory that this process ever had resident."""
    if (status := Path("/proc/self/status")).exists():  # on Linux, ru_maxrss starts at the parent's peak
        return int(status.read_text().partition("VmHWM:")[2].split()[0]) * 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


class StepMeter:
    """Measures one optimizer step, between two events of the Trainer.

    Attributes:
        saved_bytes: the most bytes that waited for a backward pass in one micro-batch
            (`ActivationBytes.saved_bytes`).
        shape: samples and tokens of the largest micro-batch.
        flops: floating-point operations of the forward and backward passes.
        done: whether the step has been measured.
    """

    def __init__(self) -> None:
        self.saved_bytes = 0
        self.shape = (0, 0)
        self.flops = 0
        self.done = False
        self._contexts = contextlib.ExitStack()

    def start(self, model: nn.Module) -> None:
        if self.done:
            return
        saved = self._contexts.enter_context(ActivationBytes())
        counter = self._contexts.enter_context(FlopCounter())
        before = 0

        def begin(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            nonlocal before
            given = [kwargs.get("input_ids"), kwargs.get("inputs_embeds"), *args]
            shapes = [(each.shape[0], each.shape[1]) for each in given if isinstance(each, Tensor)]
            self.shape = max([self.shape, *shapes[:1]], key=math.prod)
            if saved.backward_passes > before:  # gradients of the last micro-batch are not activations
                before = saved.backward_passes
                saved.forget()

        def finish() -> None:
            self.saved_bytes, self.flops, self.done = saved.saved_bytes, counter.flops, True

        self._contexts.callback(model.register_forward_pre_hook(begin, with_kwargs=True).remove)
        self._contexts.callback(finish)

    def stop(self) -> None:
        self._contexts.close()
