"""What a training step costs: activation bytes saved for the backward, floating-point operations, memory."""

from __future__ import annotations

import contextlib
import resource
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

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
    """Bytes that the operations inside `with ActivationBytes() as activations` made and that still live.

    Whoever holds them: hooks on saved tensors would miss what selective checkpointing caches.

    Attributes:
        saved_bytes: most that lived when a backward pass began: what was saved for it. Under gradient
            checkpointing it is what waits between the layers; `peak_bytes` has their recomputation too.
        peak_bytes: most that lived at one time.
        phase: a name for what runs now, which the caller may change; `peaks` has the most of each phase.
    """

    def __init__(self) -> None:
        super().__init__()
        self.saved_bytes = 0
        self.phase = ""
        self.peaks: Counter[str] = Counter()
        self._backward = False
        self._made: dict[StorageWeakRef, int] = {}
        self._upper_bound = 0  # of the bytes alive: those of the last count and those made since

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        backward = in_backward()
        if backward and not self._backward:
            self.saved_bytes = max(self.saved_bytes, self.bytes)
        self._backward = backward
        out = func(*args, **(kwargs or {}))
        made = _storages(out)
        for reference in made.keys() - _storages((args, kwargs)).keys() - self._made.keys():
            self._made[reference] = made[reference]
            self._upper_bound += made[reference]
        if self._upper_bound > self.peaks[self.phase]:
            self.peaks[self.phase] = max(self.peaks[self.phase], self.bytes)
        return out

    @property
    def peak_bytes(self) -> int:
        return max(self.peaks.values(), default=0)

    @property
    def bytes(self) -> int:
        """Bytes of the distinct storages alive; those from before the block (parameters) do not count."""
        self._made = {made: size for made, size in self._made.items() if not made.expired()}
        self._upper_bound = sum(self._made.values())
        return self._upper_bound


def _storages(tree: Any) -> dict[StorageWeakRef, int]:
    storages = (leaf.untyped_storage() for leaf in tree_leaves(tree) if isinstance(leaf, Tensor))
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


# torch counts the CUDA kernels of scaled_dot_product_attention only.
_FORMULAS: dict[Any, Callable[..., int]] = {
    **flop_registry,
    SDPA_ON_CPU: _cpu_flash,
    SDPA_ON_CPU_BACKWARD: _cpu_flash_backward,
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


class StepMeter:
    """Measures one optimizer step, between two events of the Trainer.

    Attributes:
        saved_bytes: what lived at the end of the first forward pass and was made in it.
        flops: floating-point operations of the forward and backward passes.
        done: whether the step has been measured.
    """

    def __init__(self) -> None:
        self.saved_bytes = 0
        self.flops = 0
        self.done = False
        self._contexts = contextlib.ExitStack()

    def start(self, model: nn.Module) -> None:
        if self.done:
            return
        saved = self._contexts.enter_context(ActivationBytes())
        counter = self._contexts.enter_context(FlopCounter())

        def read(*_: Any) -> None:
            self.saved_bytes = max(self.saved_bytes, saved.bytes)

        def finish() -> None:
            self.flops, self.done = counter.flops, True

        self._contexts.callback(model.register_forward_hook(read).remove)
        self._contexts.callback(finish)

    def stop(self) -> None:
        self._contexts.close()
