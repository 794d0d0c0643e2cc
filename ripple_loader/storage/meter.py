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
    """Corrects a drive's model by the times of its reads: factors on requests and on bytes, and a delay.

    Each set of reads moves the factors towards values that explain its time, each in proportion to its part
    in the cost (normalized least mean squares). Reads bound by bytes thus correct the cost of bytes; if it
    rises, fewer gaps are read. Reads bound by requests correct the cost of requests; if it rises, more gaps
    are read. A cost that hardly shows in the reads follows the other slowly, because a slow drive is slow at
    both, and so that a way of reading that became too dear is tried again. The delay is a time that every set
    of reads takes in addition while the processor is busy; no decision depends on it.

    Args:
        model: the probed or assumed costs.
    """

    STEP, FOLLOW = 0.2, 0.001
    TRIAL_EVERY, TRIAL_FACTOR = 16, 8.0
    BOUNDS = (0.05, 1000.0)
    DELAY, MOST_DELAYS = 1e-4, 10  # seconds; the delay is at most 10 times this unit

    def __init__(self, model: DriveModel) -> None:
        self.probed = self.model = model
        self._factors, self._delay = np.ones(2), 0.0
        self._planned = 0
        self._lock = threading.Lock()

    @property
    def factors(self) -> tuple[float, float]:
        """The present cost of a request and of a byte, relative to the probed ones."""
        return float(self._factors[0]), float(self._factors[1])

    def next_model(self) -> DriveModel:
        """The model to plan the next reads with; every 16th has dearer requests, or in turn cheaper ones.

        Reads that are all alike cannot separate the two costs; these trials bring reads of another kind.
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
            error = np.clip(
                seconds - predicted, -predicted, predicted
            )  # limits the weight of a single outlier
            if busy < probed.latency and error < probed.latency:
                # Reads within the latency say nothing about throughput, unless they take much longer.
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
