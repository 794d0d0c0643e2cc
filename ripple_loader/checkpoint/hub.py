"""Models of the Hugging Face hub: their files in its cache, fetched when they are missing."""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from ripple_loader.checkpoint.shards import weight_names

_HUB_ID = re.compile(r"[\w.-]+(/[\w.-]+)?")
_OTHERS = ("*.json", "*.jinja", "*.txt", "*.model", "*.tiktoken")


def local_directory(
    model: str | Path, *, revision: str | None = None, variant: str | None = None, also: Iterable[str] = ()
) -> Path:
    """The directory of a model: itself, or for a hub id its snapshot in Hugging Face's cache.

    The files that are missing there are fetched, unless `HF_HUB_OFFLINE` is set: safetensors weights, or
    `pytorch_model.bin` if there are none, the configuration and the tokenizer.

    Args:
        model: a directory or a hub id.
        revision: branch, tag or commit of a hub id.
        variant: of the weight files, such as "fp16".
        also: names of other files to fetch.

    Raises:
        FileNotFoundError: it is no directory and cannot be fetched.
    """
    from huggingface_hub import snapshot_download

    if Path(model).exists() or not _HUB_ID.fullmatch(str(model)):
        return Path(model)
    names = weight_names(variant)
    for kind in (names[:2], names[2:]):  # safetensors, then torch.save's
        stem, _, ending = kind[0].rpartition(".")
        patterns = [*_OTHERS, *also, kind[0], f"{stem}-*.{ending}"]
        if variant:
            patterns.append(f"{stem.removesuffix('.' + variant)}-*.{variant}.{ending}")
        folder = Path(_fetch(model, snapshot_download, revision=revision, allow_patterns=patterns))
        if any((folder / name).exists() for name in kind):
            break
    return folder


def base_directory(model: str) -> Path | None:
    """Where a model is that an adapter names as its base: a directory, or a snapshot in the cache.

    Returns:
        The directory; None for a hub id that the cache does not have.

    Raises:
        FileNotFoundError: it is a path, and nothing is there.
    """
    from huggingface_hub import try_to_load_from_cache

    if Path(model).is_dir():
        return Path(model)
    if model.startswith(".") or not _HUB_ID.fullmatch(model):
        raise FileNotFoundError(
            "the adapter must name a base model that is there, because its order of neurons is that of its "
            f"base, but {model} is gone: set `base_model_name_or_path` in its adapter_config.json to where "
            "that model is now, the original or the copy."
        )
    config = try_to_load_from_cache(model, "config.json")
    return Path(config).parent if isinstance(config, str) else None


def local_file(model: str, name: str, snapshot: Path) -> None:
    """Fetch a file of a hub id beside others of its snapshot in Hugging Face's cache.

    Raises:
        FileNotFoundError: it cannot be fetched.
    """
    from huggingface_hub import hf_hub_download

    cache = snapshot.parents[2]  # CACHE/models--NAME/snapshots/COMMIT
    _fetch(model, hf_hub_download, filename=name, revision=snapshot.name, cache_dir=cache)


def _fetch(model: str | Path, download: Any, **options: Any) -> str:
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    try:
        return str(download(str(model), **options))
    except (HfHubHTTPError, HFValidationError, OSError) as error:
        reason = str(error).strip().partition("\n")[0]
        name = options.get("filename", "the model")
        raise FileNotFoundError(
            f"{model} must be a directory or a model of the Hugging Face hub, but it is no directory and "
            f"{name} could not be fetched ({type(error).__name__}: {reason}): check the name and the network."
        ) from None
