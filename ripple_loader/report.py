"""What a streaming model holds and has read."""

from __future__ import annotations

from dataclasses import dataclass, field, fields


@dataclass
class RippleReport:
    """`model.ripple_report`: counters since loading or `reset`.

    Attributes:
        directory: where the neurons are streamed from.
        layers, neurons: layers with streamed MLPs, neurons in each MLP (or expert).
        budget: the DRAM budget in bytes.
        resident: bytes held by kind: buffers, vectors, sketch, index, cache.
        cache_slots: neurons that fit into the cache of each MLP.
        pinned: hot neurons that stay in the cache, over all MLPs.
        fallbacks: what was done otherwise than asked, and why.
        tokens: tokens computed.
        active: neurons computed, summed over layers and forward calls.
        hits, misses: of these, found in the cache or read.
        evictions: neurons dropped from the cache.
        requests, bytes_read: reads issued to the file, bytes they asked for.
    """

    directory: str
    layers: int
    neurons: int
    budget: int
    resident: dict[str, int] = field(default_factory=dict)
    cache_slots: list[int] = field(default_factory=list)
    pinned: int = 0
    fallbacks: list[str] = field(default_factory=list)
    tokens: int = 0
    active: int = 0
    hits: int = 0
    misses: int = 0
    evictions: int = 0
    requests: int = 0
    bytes_read: int = 0

    @property
    def resident_bytes(self) -> int:
        """Everything held, at most `budget`."""
        return sum(self.resident.values())

    def reset(self) -> None:
        """Set the counters to zero."""
        for counter in fields(self)[8:]:
            setattr(self, counter.name, 0)

    def summary(self) -> str:
        """One line for people."""
        per = max(1, self.tokens * self.layers)
        return (
            f"{self.resident_bytes / 2**20:.1f} of {self.budget / 2**20:.1f} MiB held; per token and layer "
            f"{self.active / per:.0f} neurons, {self.requests / per:.1f} reads, "
            f"{self.bytes_read / per / 2**10:.0f} KiB; {self.hits / max(1, self.active):.1%} cache hits"
        )
