"""The weights of a GGUF file as plain floats, tensor by tensor, by transformers' names and dequantizers."""

from __future__ import annotations

import importlib.util
import struct
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ripple_loader.checkpoint.quantization import Plain
from ripple_loader.compat import gguf_names
from ripple_loader.model.classes import skeleton
from ripple_loader.model.probe import architecture_of


def gguf_file(path: Path) -> Path | None:
    """The GGUF file that a model is: itself, or the only weights of its directory.

    Raises:
        ValueError: the directory holds several.
    """
    if path.suffix == ".gguf":
        return path
    if not path.is_dir() or any(path.glob("*.safetensors")) or any(path.glob("*.bin")):
        return None
    files = sorted(path.glob("*.gguf"))
    if len(files) > 1:
        raise ValueError(
            f"{path} must hold one GGUF file, but holds {', '.join(file.name for file in files)}: give the "
            "path of one of them."
        )
    return files[0] if files else None


def open_gguf(file: Path) -> tuple[Any, dict[str, Plain]]:
    """transformers' configuration of a GGUF file, and its tensors.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is damaged, or of a model that is not supported.
    """
    from transformers import AutoConfig

    if not file.is_file():
        raise FileNotFoundError(f"{file} must be a GGUF file, but does not exist.")
    if importlib.util.find_spec("gguf") is None:
        raise ValueError(f"{file} needs the package gguf: pip install gguf.")
    try:
        config = AutoConfig.from_pretrained(file.parent, gguf_file=file.name)
        architecture, model = architecture_of(config), skeleton(config)
        tensors = dict(_tensors(file, model))
    except (ValueError, IndexError, KeyError, OverflowError, NotImplementedError, struct.error) as error:
        raise ValueError(
            f"{file} must be a whole GGUF file of a model that transformers and Ripple know, but {error}."
        ) from error
    if architecture.expert is not None:
        raise ValueError(
            f"{file} must be a model without experts, but is a {config.model_type}: load it with "
            "transformers, `from_pretrained(FOLDER, gguf_file=NAME)`, and reorder what `save_pretrained` "
            "writes."
        )
    missing = model.state_dict().keys() - tensors.keys() - set(getattr(model, "all_tied_weights_keys", ()))
    if missing:
        raise ValueError(f"{file} must hold all weights of a {config.model_type}, but lacks {min(missing)}.")
    config.dtype = torch.float32
    return config, tensors


def write_tokenizer(file: Path, out: Path) -> None:
    """Write the tokenizer that a GGUF file holds, or warn if transformers cannot read it."""
    from transformers import AutoTokenizer

    try:
        AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name).save_pretrained(out)
    except Exception as error:  # of many kinds; a trace of token ids needs none
        warnings.warn(
            f"{file} has no tokenizer that transformers can read ({error}): put the tokenizer's files beside "
            "it, or give token ids instead of texts.",
            stacklevel=2,
        )


def _tensors(file: Path, model: Any) -> Iterator[tuple[str, Plain]]:
    """The tensors of a GGUF file that the model has, by its names."""
    from gguf import dequantize as values

    for name, stored, process in gguf_names(file, model):
        shape = tuple(model.get_parameter(name).shape)

        def compute(stored: Any = stored, process: Any = process, shape: Any = shape) -> Tensor:
            array = process(values(stored.data, stored.tensor_type))
            return torch.from_numpy(np.array(array, np.float32)).view(shape)

        yield name, Plain(shape, torch.float32, compute)
