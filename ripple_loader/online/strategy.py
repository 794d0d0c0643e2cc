"""Whether selecting neurons pays on this drive and processor, or reading all of them in order is cheaper.

Selecting costs memory (sketches or predictors, which the cache lacks then), time before any read can start,
and short reads. Both ways are priced for a layer and a token with `drive.DriveModel` and the processor's
`pace.Pace`; reads and computing overlap, so that the longer of the two counts. Decided once, when the
model is loaded: which neurons a token gets must not depend on how fast the drive was a moment ago.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from ripple_loader.config import RippleConfig
from ripple_loader.format.layout import SidecarHeader
from ripple_loader.online.budget import Allocation, allocate, needs_sketch
from ripple_loader.online.pace import Pace
from ripple_loader.storage.collapse import cheapest, plan_reads
from ripple_loader.storage.drive import DriveModel
from ripple_loader.storage.reader import LONGEST_READ

_WORTH = 0.6
"""Selecting has to promise this share of the time or less. What a model does between two MLPs hides behind
reads only where all neurons are read, and how long it takes is not known when the model is loaded."""


@dataclass(frozen=True, kw_only=True)
class Expected:
    """Seconds a layer and token: reading all neurons, and reading `share` of them."""

    dense: float
    sparse: float
    share: float

    @property
    def selects(self) -> bool:
        return self.sparse < _WORTH * self.dense

    def summary(self) -> str:
        """One line for people."""
        what = "selects neurons" if self.selects else "reads all neurons, in order"
        return (
            f"{what}: a layer should take {self.sparse * 1e3:.2f} ms with {self.share:.0%} of its neurons, "
            f"{self.dense * 1e3:.2f} ms with all"
        )


def expect(
    header: SidecarHeader,
    dense: Allocation,
    sparse: Allocation,
    model: DriveModel,
    pace: Pace,
    *,
    block: int,
    share: float,
) -> Expected:
    """Price both ways.

    Args:
        header: of the sidecar.
        dense, sparse: how the budget is divided without and with sketches.
        model: of the drive.
        pace: of the processor.
        block: what reads are multiples of.
        share: of its neurons that a layer selects for a token.
    """
    N, width = header.neurons, header.bundle_bytes
    rest = (N - np.mean(dense.cache_slots)) * width
    reading = model.seconds(np.ceil(rest / LONGEST_READ), rest) if rest else 0.0
    everything = max(float(reading), N * pace.compute)

    count = share * N
    missing = round(count * (1 - np.mean(sparse.cache_slots) / N))
    reading = 0.0
    if missing:
        # A made-up selection: no order is assumed to keep neurons together, so this is on the careful side.
        places = np.sort(np.random.default_rng(0).choice(N, missing, replace=False))
        computing = (count * (pace.compute + pace.gather), N * pace.compute)
        plan = plan_reads(
            places, base=0, width=width, block=block, collapse=cheapest(model, computing=computing)
        )
        reading = float(model.seconds(len(plan.offsets), plan.size))
    sketch = header.section_bytes()["sketch"]
    unread = 0.0 if sparse.rank else 1 - sparse.sketch_layers / header.layers
    selecting = max(pace.select, unread * float(model.seconds(np.ceil(sketch / LONGEST_READ), sketch)))
    some = max(reading, count * (pace.compute + pace.gather)) + selecting
    return Expected(dense=everything, sparse=some, share=share)


def decide(
    header: SidecarHeader,
    config: RippleConfig,
    dtype: torch.dtype,
    model: DriveModel,
    pace: Pace,
    *,
    block: int,
) -> tuple[bool, str]:
    """Whether neurons are selected, and why, for the report.

    Args:
        header: of the sidecar.
        config: the budget, and what the user decided.
        dtype: the model's.
        model: of the drive.
        pace: of the processor; used where the user left it open.
        block: what reads are multiples of.
    """
    share = config.keep if config.keep < 1 else header.profile.get("activity")
    if not needs_sketch(header, config):
        return False, "reads all neurons, in order: `keep` is 1"
    if config.strategy != "auto":
        return config.strategy == "sparse", f"{config.strategy}, as `strategy` says"
    if share is None:
        return True, "selects neurons: how many are active is not known beforehand"
    dense, sparse = (allocate(header, config, dtype, selective=selective) for selective in (False, True))
    expected = expect(header, dense, sparse, model, pace, block=block, share=float(share))
    return expected.selects, expected.summary()
