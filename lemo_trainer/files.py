"""Reading and writing of files, with errors that say what a file must hold."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any


def write_whole(path: Path, data: bytes) -> None:
    """Replace a file atomically: a process killed meanwhile leaves the old file or the new one."""
    unfinished = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    unfinished.write_bytes(data)
    unfinished.replace(path)


def check_model(name: str) -> None:
    """Raise FileNotFoundError if `name` can only be a path, and no folder is there."""
    if (name.startswith((".", "/", "~")) or name.count("/") > 1) and not Path(name).is_dir():
        raise FileNotFoundError(
            f"No such model folder: {name} (`python scripts/assets.py` fetches the test model)."
        )


def read_yaml(path: str | Path) -> dict[str, Any]:
    """Read a YAML file that holds one mapping. Raises FileNotFoundError or ValueError."""
    import yaml

    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"No such file: {path} (expected a YAML file).")
    try:
        values = yaml.safe_load(path.read_text("utf-8"))
    except yaml.YAMLError as error:
        raise ValueError(f"{path} is not valid YAML: {' '.join(str(error).split())}.") from error
    if not isinstance(values, dict):
        raise ValueError(f"{path} must hold a mapping of options, got {type(values).__name__}.")
    return values
