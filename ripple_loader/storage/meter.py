"""A drive's model, corrected while the drive is used."""

from __future__ import annotations

import math
import threading
from dataclasses import replace

import numpy as np

from ripple_loader.storage.drive import (
    DriveModel,
    _norm,
)


class Meter:
    """A drive's model corrected by what its reads really take: factors on requests and on bytes, and a delay.

    Each set of reads moves the factors towards what explains its time, in proportion to how much each cost
    had to do with it (normalized least mean squares). So reads bound by bytes correct the cost of bytes,
    after which gaps are cut where the drive is saturated, and reads bound by requests that of requests, after
    which gaps grow. The factor of a cost that hardly shows in the reads follows the other slowly, as a slow
    drive is slow at both, so that what was given up for its cost is tried again. The delay is what reads take
    more, few or many, where the processor is busy; it decides nothing.

    Args:
        model: the probed or assumed costs.
    """

    STEP, FOLLOW = 0.2, 0.001
    TRIAL_EVERY, TRIAL_FACTOR = 16, 8.0
    BOUNDS = (0.05, 1000.0)
    DELAY, MOST_DELAYS = 1e-4, 10  # seconds that a delay is of the order of, and how many of these it may be

    def __init__(self, model: DriveModel) -> None:
        self.probed = self.model = model
        self._factors, self._delay = np.ones(2), 0.0
        self._planned = 0
        self._lock = threading.Lock()

    @property
    def factors(self) -> tuple[float, float]:
        """What the probed costs of a request and of a byte are multiplied with."""
        return float(self._factors[0]), float(self._factors[1])

    def next_model(self) -> DriveModel:
        """What to plan the next reads with; every 16th time requests seem dearer, or by turns cheaper.

        Reads that are all alike cannot tell the two costs apart; these trials are of another kind.
        """
        self._planned += 1
        turn, trial = divmod(self._planned, self.TRIAL_EVERY)
        if trial:
            return self.model
        factor = self.TRIAL_FACTOR if turn % 2 else 1 / self.TRIAL_FACTOR
        return replace(self.model, request_seconds=self.model.request_seconds * factor)

    def observe(self, requests: int, size: int, seconds: float) -> None:
        """Learn from some reads; may be called by any thread."""
        probed = self.probed
        costs = np.array([requests * probed.request_seconds, size * probed.byte_seconds])
        with self._lock:
            parts = self._factors * costs
            busy = float(_norm(parts[0], parts[1], probed.norm))
            predicted = max(busy, probed.latency) + self._delay
            error = np.clip(seconds - predicted, -predicted, predicted)  # a hiccup is not a new drive
            if busy < probed.latency and error < probed.latency:
                # So few reads say nothing about throughput, but for a drive that became slow.
                self._delay_by(self.STEP * error)
                return
            if math.isinf(probed.norm):
                share = (parts == parts.max()).astype(float)
            else:
                share = (parts / busy) ** probed.norm
            slope = share / self._factors * busy
            step = self.STEP * error / (slope @ slope + self.DELAY**2)
            self._delay_by(step * self.DELAY**2)
            factors = self._factors + step * slope
            factors += self.FOLLOW * (1 - share) * (self._factors[::-1] - self._factors)
            self._factors = factors.clip(*self.BOUNDS)
            self.model = replace(
                probed,
                request_seconds=probed.request_seconds * self._factors[0],
                byte_seconds=probed.byte_seconds * self._factors[1],
            )

    def _delay_by(self, more: float) -> None:
        self._delay = float(np.clip(self._delay + more, 0.0, self.MOST_DELAYS * self.DELAY))
