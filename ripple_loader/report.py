"""The numbers of a streaming model: the memory it holds, and its reads."""

from __future__ import annotations

import warnings
from dataclasses import dataclass, field, fields


@dataclass
class RippleReport:
    """`model.ripple_report`: counters since loading or `reset`.

    Attributes:
        directory: where the neurons are streamed from.
        layers, neurons: layers with streamed MLPs, neurons in each MLP (or expert).
        budget: the DRAM budget in bytes.
        resident: bytes held by kind: buffers, vectors, predictors, checksums, sketch, index, cache.
        cache_slots: neurons that fit into the cache of each MLP.
        pinned: hot neurons that stay in the cache, over all MLPs.
        fallbacks: everything done differently from the configuration, with the reason.
        drive: the cost model that reads are planned with, and its source.
        strategy: whether neurons are selected or all read, and why.
        calls: forward calls of the model; those of an encoder and a decoder count one by one.
        layer_calls: layers with streamed MLPs that these calls went through.
        tokens: tokens computed, of prompts as well.
        active: neurons computed, summed over layers and forward calls.
        hits, misses: computed neurons that were in the cache, or were read.
        evictions: neurons dropped from the cache.
        requests, bytes_read: reads issued to the file, bytes they asked for.
        whole: layers for which every read was one unbroken range of neurons.
        asked: active neurons of layers that were predicted from the layer before.
        foreseen: of these, neurons that were predicted.
        read_ahead, read_in_vain: neurons read before their layer asked for them, neurons read and not wanted.
    """

    directory: str
    layers: int
    neurons: int
    budget: int
    resident: dict[str, int] = field(default_factory=dict)
    cache_slots: list[int] = field(default_factory=list)
    pinned: int = 0
    fallbacks: list[str] = field(default_factory=list)
    drive: str = ""
    strategy: str = ""
    calls: int = 0
    layer_calls: int = 0
    tokens: int = 0
    active: int = 0
    hits: int = 0
    misses: int = 0
    evictions: int = 0
    requests: int = 0
    bytes_read: int = 0
    whole: int = 0
    foreseen: int = 0
    asked: int = 0
    read_ahead: int = 0
    read_in_vain: int = 0

    @property
    def resident_bytes(self) -> int:
        """All bytes held, at most `budget`."""
        return sum(self.resident.values())

    @property
    def recall(self) -> float:
        """Share of the active neurons that was predicted from the layer before; 0 without predictions."""
        return self.foreseen / max(1, self.asked)

    def fall_back(self, what: str, *, stacklevel: int = 2) -> None:
        """Record and warn of something done differently from the configuration, `stacklevel` frames up."""
        if what in self.fallbacks:
            return
        self.fallbacks.append(what)
        warnings.warn(what, stacklevel=stacklevel + 1)

    def reset(self) -> None:
        """Set the counters to zero."""
        names = [one.name for one in fields(self)]
        for counter in names[names.index("calls") :]:
            setattr(self, counter, 0)

    def summary(self) -> str:
        """One line for people."""
        per = max(1, self.layer_calls)
        return (
            f"{self.resident_bytes / 2**20:.1f} of {self.budget / 2**20:.1f} MiB held; {self.tokens} tokens "
            f"in {self.calls} forward calls; per call and layer "
            f"{self.active / per:.0f} neurons, {self.requests / per:.1f} reads, "
            f"{self.bytes_read / per / 2**10:.0f} KiB; {self.hits / max(1, self.active):.1%} cache hits"
        )
