"""Compiles the C++ file beside it for this processor, once; the user's cache folder keeps the library."""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import platform
import shutil
import subprocess
from pathlib import Path

from ripple_loader.files import cache_folder, whole_file

SOURCE = Path(__file__).with_name("bundles.cpp")
COMPILERS = ("c++", "g++", "clang++")
_COMMON = ("-O3", "-std=c++17", "-fno-exceptions", "-shared", "-fPIC", "-w")
_FORMS = [
    (*processor, *threads)
    for threads in (("-fopenmp",), ())
    for processor in (("-march=native",), ("-mcpu=native",))
]
_LONGEST_S = 300


@functools.cache
def library() -> ctypes.CDLL:
    """The compiled file; compiling takes some seconds, the first time on a machine.

    Raises:
        OSError: there is no compiler, it fails, or the library cannot be kept or loaded. The next process
            tries again.
    """
    compiler = _compiler()
    path = _folder() / f"{_key(compiler)}.so"
    if not path.is_file():
        _compile(compiler, path)
    return ctypes.CDLL(str(path))


def _compiler() -> str:
    """The C++ compiler that `CXX` names, or else the first that is installed."""
    names = [os.environ["CXX"]] if os.environ.get("CXX") else COMPILERS
    found = next(filter(None, map(shutil.which, names)), None)
    if found is None:
        raise OSError(f"no C++ compiler is installed (looked for {', '.join(names)})")
    return found


def _folder() -> Path:
    """Libraries are run: a folder that others may write into is refused."""
    folder = cache_folder("kernels")
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    status = folder.stat()
    if status.st_uid != os.getuid() or status.st_mode & 0o022:
        raise OSError(f"{folder} must belong to this user and be writable by nobody else")
    return folder


def _key(compiler: str) -> str:
    """Differs where the source, the compiler or the processor does."""
    processor = platform.processor() + platform.machine()
    description = Path("/proc/cpuinfo")
    if description.is_file():
        lines = description.read_text().splitlines()
        kinds = ("flags", "Features", "model name", "CPU part")
        processor = "\n".join(sorted({line for line in lines if line.startswith(kinds)}))
    status = Path(compiler).resolve().stat()
    parts = (
        SOURCE.read_bytes(),
        processor.encode(),
        f"{compiler} {status.st_size} {status.st_mtime_ns}".encode(),
    )
    return hashlib.sha256(b"\0".join(parts)).hexdigest()[:24]


def _compile(compiler: str, path: Path) -> None:
    with whole_file(path) as partial:
        errors = (_errors([compiler, *_COMMON, *form, str(SOURCE), "-o", str(partial)]) for form in _FORMS)
        first = next(errors)
        if first is not None and all(error is not None for error in errors):
            raise OSError(f"{compiler} failed: {first}")


def _errors(command: list[str]) -> str | None:
    """The first line of a compiler's errors; None if it succeeded."""
    try:
        run = subprocess.run(command, capture_output=True, text=True, timeout=_LONGEST_S)
    except subprocess.TimeoutExpired:
        return f"it did not end in {_LONGEST_S} s"
    return next(iter(run.stderr.splitlines()), f"exit status {run.returncode}") if run.returncode else None
