"""Decides between selecting neurons and reading all of them in order, whichever is cheaper here.

Selecting costs memory (for sketches or predictors instead of the cache), time before any read can start,
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
"""Selecting must promise this share of the time or less: only reads of all neurons continue while the rest of
the model computes, and how long that takes is not known when the model is loaded."""


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
        choice = "selects neurons" if self.selects else "reads all neurons, in order"
        return (
            f"{choice}: a layer should take {self.sparse * 1e3:.2f} ms with {self.share:.0%} of its neurons, "
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
        block: offsets and lengths of reads are multiples of it.
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
        # A random selection: it assumes no benefit from the order, so that the price is rather too high.
        places = np.sort(np.random.default_rng(0).choice(N, missing, replace=False))
        computing = (count * (pace.compute + pace.gather), N * pace.compute)
        plan = plan_reads(
            places, base=0, width=width, block=block, collapse=cheapest(model, computing=computing)
        )
        reading = float(model.seconds(len(plan.offsets), plan.size))
    sketch = header.section_bytes().get("sketch", 0)
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
    """Decide whether neurons are selected; returns the reason as well, for the report.

    Args:
        header: of the sidecar.
        config: the budget, and the user's choice of `strategy`.
        dtype: the model's.
        model: of the drive.
        pace: of the processor; used if `strategy` is "auto".
        block: offsets and lengths of reads are multiples of it.
    """
    share = config.keep if config.keep < 1 else header.profile.get("activity")
    if not needs_sketch(header, config):
        reason = "the sidecar has no sketches" if header.exact_zeros else "`keep` is 1"
        return False, f"reads all neurons, in order: {reason}"
    if config.strategy != "auto":
        return config.strategy == "sparse", f"{config.strategy}, as `strategy` says"
    if share is None:
        return True, "selects neurons: the sidecar does not say how many are active"
    dense, sparse = (allocate(header, config, dtype, selective=selective) for selective in (False, True))
    expected = expect(header, dense, sparse, model, pace, block=block, share=float(share))
    return expected.selects, expected.summary()
