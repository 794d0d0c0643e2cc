"""Published drives: the cost of reads on devices that are not at hand.

Data sheets give the most short reads and the most bytes a second at a queue depth. A device is held to both
at once (`drive.DriveModel`, p = infinity): its bandwidth grows linearly with the length of reads up to the
knee, bandwidth / iops, as measured for phone flash (arXiv 2410.19274, section 2.3).
"""

from __future__ import annotations

import math
from dataclasses import dataclass, fields
from importlib import resources
from pathlib import Path
from typing import Any

from ripple_loader.config import check_keys
from ripple_loader.storage.drive import DriveModel

_LARGEST_KNEE = 16 << 20


@dataclass(frozen=True, kw_only=True)
class Device:
    """The published speed of a drive.

    Attributes:
        name: its name for `ripple simulate --device`.
        bandwidth: bytes a second of long reads.
        iops: short reads a second with `queue_depth` in flight.
        source: the publication of the numbers.
        latency: seconds that one short read takes; no set of reads takes less.
        queue_depth: reads in flight.
        block: bytes that offsets and lengths of reads are multiples of.
        description: for people.

    Raises:
        ValueError: a value that no drive has.
    """

    name: str
    bandwidth: float
    iops: float
    source: str
    latency: float = 0.0
    queue_depth: int = 32
    block: int = 4096
    description: str = ""

    def __post_init__(self) -> None:
        depth, latency = self.queue_depth, self.latency
        self._check("bandwidth", _is_number(self.bandwidth) and self.bandwidth > 0, "a positive number")
        self._check("iops", _is_number(self.iops) and self.iops > 0, "a positive number")
        self._check("latency", _is_number(latency) and 0 <= latency < 1, "seconds, at least 0 and below 1")
        self._check("queue_depth", type(depth) is int and 0 < depth <= 1 << 16, "a whole number up to 65536")
        self._check("block", self.block in (512, 4096), "512 or 4096")
        self._check("source", isinstance(self.source, str) and bool(self.source.strip()), "a text")
        if not self.block <= self.knee <= _LARGEST_KNEE:
            raise ValueError(
                f"device {self.name}: bandwidth / iops must be between a block ({self.block} bytes) and "
                f"16 MiB, got {self.knee:.4g} bytes: give bytes a second and reads a second."
            )

    def _check(self, name: str, valid: bool, what: str) -> None:
        if not valid:
            raise ValueError(f"device {self.name}: `{name}` must be {what}, got {getattr(self, name)!r}.")

    @property
    def knee(self) -> float:
        """The length in bytes up to which a longer read costs nothing more."""
        return self.bandwidth / self.iops

    @property
    def model(self) -> DriveModel:
        """The cost of its reads."""
        return DriveModel(
            request_seconds=1 / self.iops,
            byte_seconds=1 / self.bandwidth,
            latency=self.latency,
            norm=math.inf,
            depth=self.queue_depth,
            source=self.source,
        )


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def load_devices(path: str | Path | None = None) -> dict[str, Device]:
    """The devices of a YAML file by name; by default those that come with the package.

    Raises:
        FileNotFoundError: the file does not exist.
        ValueError: it is not YAML, or a device in it is incomplete, misspelt or has an impossible value.
    """
    import yaml

    if path is None:
        text = resources.files(__package__).joinpath("devices.yaml").read_text("utf-8")
    else:
        try:
            text = Path(path).read_text("utf-8")
        except FileNotFoundError:
            raise FileNotFoundError(f"No such file: {path} (expected a YAML file of devices).") from None
        except UnicodeDecodeError:
            raise ValueError(f"{path} must be a YAML file of devices, but is not text.") from None
    try:
        devices = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ValueError(f"{path} must be YAML: {' '.join(str(error).split())}.") from None
    if (
        not isinstance(devices, dict)
        or not devices
        or not all(isinstance(one, dict) for one in devices.values())
    ):
        raise ValueError(f"{path} must map names of devices to their numbers.")
    return {str(name): _device(str(name), values) for name, values in devices.items()}


def _device(name: str, values: dict[str, Any]) -> Device:
    known = [field.name for field in fields(Device) if field.name != "name"]
    check_keys(values, known, f"device {name}")
    if missing := {"bandwidth", "iops", "source"} - values.keys():
        raise ValueError(f"device {name} must have {', '.join(sorted(missing))}.")
    return Device(name=name, **values)
