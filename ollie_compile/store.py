"""Plans, decisions and measurements on disk, so that a warm start neither searches nor measures.

One JSON file an entry, named by a hash of all that decides it: what is planned, the options, the device, and
the versions of torch and of this package. Files are written beside their place and moved into it once they
are on the disk, so that a reader sees a whole entry or none, whoever else writes or is killed; an entry that
is not what its checksum says is ignored with a warning. Folders are made for their user alone.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import logging
import os
import platform
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

logger = logging.getLogger(__name__)

FOLDER, LIMIT = "OLLIE_CACHE_DIR", "OLLIE_CACHE_MIB"
DEFAULT_MIB = 64.0
FILLED = 0.75  # of the limit, to which the oldest entries are removed when it is passed
ABANDONED_S = 3600.0  # after which a file that was never moved into its place is a killed process's


def folder() -> Path | None:
    """Where entries lie: `OLLIE_CACHE_DIR`, or the user's cache; None where that variable is empty."""
    given = os.environ.get(FOLDER)
    if given is not None:
        return Path(given).expanduser() if given else None
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "ollie_compile"


def limit_bytes() -> int:
    """The size that all entries together are kept below, from `OLLIE_CACHE_MIB`.

    Raises:
        ValueError: that is not a number above 0.
    """
    given = os.environ.get(LIMIT, str(DEFAULT_MIB))
    try:
        mib = float(given)
    except ValueError:
        mib = 0.0
    if not mib > 0:
        raise ValueError(f"{LIMIT} must be a number of MiB above 0, got {given!r}.")
    return int(mib * 2**20)


def sources() -> list[Path]:
    """The sources of this package, on which every decision depends."""
    return sorted(Path(__file__).parent.rglob("*.py"))


@functools.lru_cache(maxsize=1)
def versions() -> str:
    """Torch's version, and a hash of this package's sources."""
    digest = hashlib.sha256()
    for path in sources():
        digest.update(path.read_bytes())
    return f"torch {torch.__version__}, ollie {digest.hexdigest()[:16]}"


@functools.lru_cache(maxsize=8)
def device_fingerprint(device: torch.device) -> str:
    """What a device's timings depend on: its name and features."""
    if device.type == "cuda":
        return f"{torch.cuda.get_device_name(device)}, {torch.cuda.get_device_capability(device)}"
    name = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.exists():
        lines = info.read_text().splitlines()
        kept = sorted({line for line in lines if line.startswith(("model name", "cpu family", "model\t"))})
        name = "; ".join(" ".join(line.split()) for line in kept) or name
    return f"{name}, {torch.backends.cpu.get_cpu_capability()}, {os.cpu_count()} cores"


def conditions(device: torch.device) -> str:
    """The device, its threads and the versions, which are part of every key."""
    return f"{device_fingerprint(device)}, {torch.get_num_threads()} threads, {versions()}"


def key(kind: str, *parts: object) -> str:
    """The name of the entry that `parts` decide."""
    return f"{kind}-{hashlib.sha256(repr(parts).encode()).hexdigest()}"


def read(name: str) -> dict[str, Any] | None:
    """An entry, or None where there is none or it is not whole, which is said in a warning."""
    base = folder()
    if base is None:
        return None
    path = _path(base, name)
    try:
        text = path.read_bytes()
    except FileNotFoundError:
        return None
    except OSError as error:
        logger.warning("ollie: the entry %s of the cache is ignored: %s", path, error)
        return None
    try:
        content = checked(text, name)
    except ValueError as error:
        logger.warning("ollie: the entry %s of the cache is ignored: %s", path, error)
        return None
    with contextlib.suppress(OSError):  # another process has removed it, or this one may only read
        os.utime(path)  # the oldest are removed first
    return content


def checked(text: bytes, name: str) -> dict[str, Any]:
    """The content of an entry.

    Raises:
        ValueError: it is no entry of that name, or not as it was written.
    """
    try:
        entry = json.loads(text)
        if not isinstance(entry, dict) or not isinstance(entry.get("content"), dict):
            raise ValueError("it must have a name, a checksum and a content")
        if entry.get("name") != name or entry.get("checksum") != _checksum(entry["content"]):
            raise ValueError("its name and checksum must be those of its content")
    except (json.JSONDecodeError, RecursionError, UnicodeDecodeError) as error:
        raise ValueError(f"it must be JSON: {error}") from None
    content: dict[str, Any] = entry["content"]
    return content


def write(name: str, content: dict[str, Any]) -> None:
    """Keep an entry; where that is not possible, a warning says why."""
    base = folder()
    if base is None:
        return
    path = _path(base, name)
    text = json.dumps({"name": name, "checksum": _checksum(content), "content": content})
    try:
        base.parent.mkdir(parents=True, exist_ok=True)
        for place in (base, path.parent):
            place.mkdir(mode=0o700, exist_ok=True)
        handle, temporary = tempfile.mkstemp(prefix=".", suffix=".tmp", dir=path.parent)
        try:
            with os.fdopen(handle, "w", encoding="utf-8") as file:
                file.write(text)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
        except BaseException:
            Path(temporary).unlink(missing_ok=True)
            raise
        _evict(base)
    except OSError as error:
        logger.warning("ollie: the cache %s is not written: %s", base, error)


def entries(kind: str = "") -> Iterator[tuple[str, dict[str, Any]]]:
    """All whole entries of a kind, with their names."""
    base = folder()
    for path in sorted(base.glob(f"*/{kind}*.json")) if base is not None else ():
        content = read(path.stem)
        if content is not None:
            yield path.stem, content


def clear() -> int:
    """Remove all entries; gives their number."""
    base = folder()
    removed = 0
    for path in _files(base) if base is not None else ():
        path.unlink(missing_ok=True)
        removed += path.suffix == ".json"
    return removed


def _path(base: Path, name: str) -> Path:
    return base / name.rpartition("-")[2][:2] / f"{name}.json"


def _files(base: Path) -> list[Path]:
    """The cache's own files, whole and abandoned ones."""
    return [*base.glob("??/*-*.json"), *base.glob("??/.*.tmp")]


def _checksum(content: Any) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _evict(base: Path) -> None:
    """Remove the oldest entries where all of them are above the limit, and what killed processes left."""
    found = []
    for path in _files(base):
        try:
            state = path.stat()
        except FileNotFoundError:
            continue
        if path.suffix == ".tmp":
            if time.time() - state.st_mtime > ABANDONED_S:
                path.unlink(missing_ok=True)
            continue
        found.append((state.st_mtime, state.st_size, path))
    total = sum(size for _, size, _ in found)
    limit = limit_bytes()
    if total <= limit:
        return
    for _, size, path in sorted(found):
        if total <= FILLED * limit:
            break
        path.unlink(missing_ok=True)
        total -= size
