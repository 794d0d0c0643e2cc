"""The cost of reads: a small model of a drive, fitted to a probe and kept for each device.

With some requests in flight, R requests of B bytes in all take

    seconds = max(latency, || (R * request_seconds, B * byte_seconds) ||_p),    p = 1, 2 or infinity

p = 1 adds both costs, as a drive does whose requests are handled one after the other; p = infinity takes the
larger, as one does that is bound by requests or else by bytes. The probe says which describes the drive best.

Dimension key: M measurements.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, Self

import numpy as np
import numpy.typing as npt

from ripple_loader.files import cache_folder, whole_file

Array = npt.NDArray[Any]
NORMS = (1.0, 2.0, math.inf)
PROFILE_VERSION = 1
DOUBTFUL = 0.3
"""A fit with a larger relative error (root mean square) is told of."""


@dataclass(frozen=True, kw_only=True)
class Measurement:
    """Reads that were timed: `requests` of `size` bytes each, `depth` of them in flight."""

    size: int
    depth: int
    requests: int
    seconds: float

    def __post_init__(self) -> None:
        for part in fields(self):
            value = getattr(self, part.name)
            if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < 1e15:
                raise ValueError(f"`{part.name}` must be a positive number, got {value!r}")


@dataclass(frozen=True, kw_only=True)
class DriveModel:
    """Seconds that reads take on a drive at one depth.

    Attributes:
        request_seconds, byte_seconds: the cost of a request and of a byte.
        latency: the least time of any set of reads.
        norm: p in the formula above.
        depth: the number of requests in flight that it describes.
        error: root mean square of (predicted / measured - 1) over what it was fitted to.
        source: the origin of the numbers, for the report.
    """

    request_seconds: float
    byte_seconds: float
    latency: float = 0.0
    norm: float = 1.0
    depth: int = 1
    error: float = 0.0
    source: str = ""

    def seconds(self, requests: Any, size: Any) -> Any:
        """Seconds for `requests` reads of `size` bytes in all; numbers, or arrays of a shape."""
        parts = (requests * self.request_seconds, size * self.byte_seconds)
        return np.maximum(self.latency, _norm(*parts, self.norm))

    @property
    def doubtful(self) -> bool:
        """Whether the fit is so bad that something else must have used the drive."""
        return self.error > DOUBTFUL

    def summary(self) -> str:
        """One line for people."""
        doubt = f", whose fit is off by {self.error:.0%}" if self.doubtful else ""
        return (
            f"{1e-6 / self.byte_seconds:,.0f} MB/s and {1 / self.request_seconds:,.0f} requests/s with "
            f"{self.depth} in flight ({self.source}{doubt})"
        )


def _norm(first: Any, second: Any, norm: float) -> Any:
    if norm == 1:
        return first + second
    return np.maximum(first, second) if math.isinf(norm) else (first**norm + second**norm) ** (1 / norm)


DEFAULT = DriveModel(
    request_seconds=1e-5,
    byte_seconds=1e-9,
    latency=1e-4,
    depth=32,
    source="a common NVMe drive's, not measured",
)


def fit(
    measurements: Sequence[Measurement], latency: float, source: str, norms: Sequence[float] = NORMS
) -> DriveModel:
    """The model of least relative error for measurements at one depth, of at least two sizes.

    For a finite p, (t / n)^p = request^p + size^p byte^p is linear in both unknowns: least squares.
    """
    size_M = np.array([m.size for m in measurements], float)
    each_M = np.array([m.seconds / m.requests for m in measurements])
    candidates = []
    for norm in norms:
        if math.isinf(norm):
            request, byte = each_M.min(), (each_M / size_M).min()
        else:
            # By Gram-Schmidt: LAPACK would take 32 MiB of address space, more than the budget has for it.
            first_M, second_M = each_M**-norm, (size_M / each_M) ** norm
            along = (first_M * second_M).sum() / (first_M**2).sum()
            rest_M = second_M - along * first_M
            of_byte = rest_M.sum() / max((rest_M**2).sum(), np.finfo(float).tiny)
            of_request = (first_M * (1 - of_byte * second_M)).sum() / (first_M**2).sum()
            request, byte = (max(power, 0.0) ** (1 / norm) for power in (of_request, of_byte))
        # If the drive is too noisy to separate both costs, each is at least a hundredth of the least time.
        request, byte = max(request, 0.01 * each_M.min()), max(byte, 0.01 * (each_M / size_M).min())
        error = np.sqrt(np.mean((_norm(request, size_M * byte, norm) / each_M - 1) ** 2))
        candidates.append(
            DriveModel(
                request_seconds=float(request),
                byte_seconds=float(byte),
                latency=latency,
                norm=norm,
                depth=measurements[0].depth,
                error=float(error),
                source=source,
            )
        )
    return min(candidates, key=lambda model: model.error)


@dataclass(frozen=True, kw_only=True)
class DriveProfile:
    """A probe of a drive.

    Attributes:
        device: the probed drive, see `device_of`.
        date: when, ISO 8601.
        direct: whether reads bypassed the page cache.
        measurements: timed reads of several sizes and depths.
        version: of this format.
    """

    device: str
    date: str
    direct: bool
    measurements: list[Measurement] = field(default_factory=list)
    version: int = PROFILE_VERSION

    def __post_init__(self) -> None:
        if self.version != PROFILE_VERSION:
            raise ValueError(f"version {self.version!r} is not {PROFILE_VERSION}")
        if not self.depths:
            raise ValueError("it holds no depth at which reads of two sizes were timed")

    @property
    def depths(self) -> list[int]:
        """The depths that can be fitted, ascending."""
        sizes: dict[int, set[int]] = {}
        for m in self.measurements:
            sizes.setdefault(m.depth, set()).add(m.size)
        return sorted(depth for depth, timed in sizes.items() if len(timed) > 1)

    def at(self, depth: int) -> DriveModel:
        """The model for `depth` requests in flight, fitted to the closest depth that was probed."""
        nearest = min(self.depths, key=lambda probed: abs(math.log(probed / depth)))
        least = min(self.measurements, key=lambda m: (m.depth, m.size))
        chosen = [m for m in self.measurements if m.depth == nearest]
        return fit(chosen, least.seconds / least.requests * least.depth, f"probed {self.date[:10]}")

    @classmethod
    def load(cls, path: Path) -> Self:
        """Read a profile that `save` wrote; ValueError if the file holds anything else."""
        try:
            stored = json.loads(path.read_text("utf-8"))
            stored["measurements"] = [Measurement(**one) for one in stored["measurements"]]
            return cls(**stored)
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            raise ValueError(f"{path} is not a probe of a drive ({error})") from None

    def save(self) -> Path:
        """Keep it for the device, atomically, in the user's cache folder."""
        path = profile_path(self.device)
        path.parent.mkdir(parents=True, exist_ok=True)
        with whole_file(path) as partial:
            partial.write_text(json.dumps(asdict(self), indent=1), "utf-8")
        return path


def device_of(path: Path) -> str:
    """A name for the drive under a path: the kernel's name and its device number."""
    number = os.stat(path).st_dev
    numbers = f"{os.major(number)}:{os.minor(number)}"
    try:
        name = Path(f"/sys/dev/block/{numbers}").resolve(strict=True).name
    except OSError:  # not a block device: a network or memory file system, or an overlay
        mount = next(parent for parent in (path, *path.resolve().parents) if os.path.ismount(parent))
        name = str(mount).strip("/").replace("/", "-") or "root"
    return f"{name} {numbers}"


def profile_path(device: str) -> Path:
    """The file that a device's probe is saved in."""
    return cache_folder("drives") / f"{device.replace(' ', '-').replace(':', '-')}.json"
