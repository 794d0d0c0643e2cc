"""Predictors on disk: `lemo_predictors.safetensors`, and a .json that describes them and their model."""

from __future__ import annotations

import hashlib
import json
import logging
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor, nn

from lemo_trainer.compat import base_parameter_name, is_whole, unwrap
from lemo_trainer.files import write_whole
from lemo_trainer.informativeness.predictors import PatternPredictors

logger = logging.getLogger(__name__)

TENSORS_NAME, JSON_NAME = "lemo_predictors.safetensors", "lemo_predictors.json"
_FORMAT = 1
_SAMPLES = 64  # values of each parameter in the base model's fingerprint


def base_fingerprint(model: nn.Module) -> dict[str, str]:
    """A hash for each parameter of the base model, from `_SAMPLES` evenly spaced values in bfloat16.

    It is the same in float32 and bfloat16, with and without PEFT (adapters are not hashed), and for
    parameters that quantization does not touch. Parameters that are not whole in this process are not hashed.
    """
    hashes = {}
    for full_name, parameter in unwrap(model).named_parameters():
        name = base_parameter_name(full_name)
        if name is None or not parameter.is_floating_point() or not is_whole(parameter):
            continue
        flat = parameter.detach().flatten()
        sampled = torch.arange(_SAMPLES, device=flat.device) * len(flat) // _SAMPLES
        values = flat[sampled].to(torch.bfloat16).view(torch.int16).cpu().numpy()
        digest = hashlib.sha256(repr(tuple(parameter.shape)).encode() + values.tobytes())
        hashes[name] = digest.hexdigest()[:16]
    return hashes


def save_predictors(predictors: PatternPredictors, folder: str | Path, base: dict[str, str]) -> None:
    """Write both files into `folder`, each of them whole or not at all.

    Args:
        base: `base_fingerprint` of the model for which they were trained.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    data = save({name: value.contiguous() for name, value in predictors.nets.state_dict().items()})
    described = {
        "format": _FORMAT,
        "design": predictors.design,
        "block_size": predictors.block_size,
        "hidden_size": predictors.width,
        "recall": {str(layer): round(recall, 4) for layer, recall in sorted(predictors.recall.items())},
        "sha256": hashlib.sha256(data).hexdigest(),
        "base": base,
    }
    write_whole(folder / TENSORS_NAME, data)
    write_whole(folder / JSON_NAME, (json.dumps(described, indent=1) + "\n").encode())


def has_predictors(folder: str | Path) -> bool:
    return all((Path(folder) / name).is_file() for name in (TENSORS_NAME, JSON_NAME))


def load_predictors(folder: str | Path, model: nn.Module | None = None) -> PatternPredictors:
    """Read the predictors in `folder`, and check that they were trained for `model` unless it is None.

    Raises:
        FileNotFoundError: one of the two files is missing.
        ValueError: they are damaged, of an unknown format, or of another base model.
    """
    folder = Path(folder)
    if not has_predictors(folder):
        raise FileNotFoundError(
            f"{folder} must hold {TENSORS_NAME} and {JSON_NAME}; `lemo predict-train MODEL --data FILE` "
            "writes them."
        )
    damaged = f"The predictors in {folder} are damaged: {{}}; train them again with `lemo predict-train`."
    data = (folder / TENSORS_NAME).read_bytes()
    try:
        described = json.loads((folder / JSON_NAME).read_text("utf-8"))
        if described["format"] != _FORMAT:
            raise ValueError(
                f"{folder / JSON_NAME} must be of format {_FORMAT}, got {described['format']!r}; it was "
                "written by another version of lemo_trainer."
            )
        if hashlib.sha256(data).hexdigest() != described["sha256"]:
            raise ValueError(damaged.format(f"the checksum of {TENSORS_NAME} is not the one in {JSON_NAME}"))
        predictors = _rebuild(described, load(data))
    except (KeyError, TypeError, AttributeError, RuntimeError, SafetensorError, UnicodeError) as error:
        raise ValueError(damaged.format(f"{type(error).__name__}: {error}")) from error
    except json.JSONDecodeError as error:
        raise ValueError(damaged.format(f"{JSON_NAME} is not valid JSON")) from error
    if model is not None:
        _check_base(described["base"], model, folder)
    return predictors


def _rebuild(described: dict[str, Any], tensors: dict[str, Tensor]) -> PatternPredictors:
    predictors = PatternPredictors(
        sorted({int(name.partition(".")[0]) for name in tensors}),
        design=described["design"],
        block_size=described["block_size"],
        width=described["hidden_size"],
    )
    predictors.load_tensors(tensors)
    predictors.recall = {int(layer): float(recall) for layer, recall in described["recall"].items()}
    return predictors


def _check_base(base: dict[str, str], model: nn.Module, folder: Path) -> None:
    own = base_fingerprint(model)
    common = sorted(base.keys() & own.keys())
    differing = next((name for name in common if base[name] != own[name]), None)
    if differing or (own and not common):
        what = f"its {differing} differs" if differing else "they have no parameter in common"
        raise ValueError(
            f"The predictors in {folder} were trained for another base model: {what}. Train them for this "
            "one with `lemo predict-train`."
        )
    if not common:
        logger.warning(
            "Whether the predictors in %s belong to this model cannot be checked: its weights are not whole "
            "in this process.",
            folder,
        )
