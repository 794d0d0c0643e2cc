"""The models that the command line takes: recipes, functions that build a module, Hugging Face models."""

from __future__ import annotations

import importlib
import runpy
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

TOKENS, SAMPLES = 32, 16000  # of the inputs of language and audio models, where no shape is given


def load(model: str, input_shape: str | None, seed: int = 0) -> tuple[nn.Module, Tensor, dict[str, Any]]:
    """A model with random inputs for it, and the options of its recipe.

    Args:
        model: a recipe (.yaml), FILE.py:FUNCTION or MODULE:FUNCTION, or a Hugging Face folder or hub id.
        input_shape: like 1x3x224x224; None takes the recipe's, or the one of the model's config.

    Raises:
        ValueError: there is no such model, or it does not run on inputs of this shape.
    """
    options: dict[str, Any] = {}
    torch.manual_seed(seed)
    if model.endswith((".yaml", ".yml")):
        values = _recipe(Path(model))
        options = values.get("options") or {}
        model, input_shape = str(values["model"]), input_shape or values["input_shape"]
    if ":" in model:
        if input_shape is None:
            raise ValueError(
                f"`input_shape` must be given for {model}: for example --input-shape 1x3x224x224."
            )
        build, x = _function(model), torch.randn(_shape(input_shape))
    else:
        build, x = _pretrained(model, input_shape)
    try:
        net = build().eval()
        with torch.no_grad():
            net(x)
    except Exception as error:
        reason = str(error).partition("\n")[0]
        raise ValueError(
            f"`model` must be a function without arguments that returns a module for an input of shape "
            f"{list(x.shape)}; it failed: {reason}"
        ) from error
    return net, x, options


class Named(nn.Module):
    """A model that takes its main input by name, and gives the first of its results."""

    def __init__(self, model: nn.Module, name: str) -> None:
        super().__init__()
        self.model, self.name = model, name

    def forward(self, x: Tensor) -> Tensor:
        return self.model(**{self.name: x}, return_dict=False)[0]


def _pretrained(model: str, input_shape: str | None) -> tuple[Any, Tensor]:
    from transformers import AutoConfig, AutoModel

    try:
        config = AutoConfig.from_pretrained(model)
        net = AutoModel.from_pretrained(model)
    except (OSError, ValueError) as error:
        raise ValueError(
            f"{model!r} is not a recipe, a function, or a Hugging Face model: give a recipe (.yaml), "
            f"FILE.py:FUNCTION, MODULE:FUNCTION, or a "
            f"Hugging Face folder or hub id ({str(error).partition(chr(10))[0]})."
        ) from error
    name = net.main_input_name
    if name == "input_ids":
        x = torch.randint(0, config.get_text_config().vocab_size, _shape(input_shape or [1, TOKENS]))
    elif name == "pixel_values":
        side = getattr(config, "image_size", 224)
        sides = [side, side] if isinstance(side, int) else list(side)
        x = torch.randn(_shape(input_shape or [1, getattr(config, "num_channels", 3), *sides]))
    else:
        x = torch.randn(_shape(input_shape or [1, SAMPLES]))
    return lambda: Named(net, name), x


def _recipe(path: Path) -> dict[str, Any]:
    import yaml

    if not path.is_file():
        raise ValueError(
            f"The recipe {path} does not exist: give a YAML file, for example those in configs/."
        )
    try:
        values = yaml.safe_load(path.read_text("utf-8"))
    except yaml.YAMLError as error:
        raise ValueError(f"The recipe {path} is not valid YAML: {' '.join(str(error).split())}.") from error
    known = ("model", "input_shape", "options")
    if not isinstance(values, dict) or not {"model", "input_shape"} <= values.keys() <= set(known):
        keys = ", ".join(map(str, values)) if isinstance(values, dict) else type(values).__name__
        raise ValueError(f"The recipe {path} must hold `model`, `input_shape` and `options`, got {keys}.")
    if not isinstance(values.get("options") or {}, dict):
        raise ValueError(f"`options` in {path} must be a mapping, got {values['options']!r}.")
    return values


def _function(spec: str) -> Any:
    """The function named by FILE.py:FUNCTION or MODULE:FUNCTION."""
    source, _, name = spec.rpartition(":")
    if source.endswith(".py"):
        if not Path(source).is_file():
            raise ValueError(f"The model file {source} does not exist: give FILE.py:FUNCTION.")
        names = runpy.run_path(source)
    else:
        try:
            names = vars(importlib.import_module(source))
        except (ImportError, ValueError):
            raise ValueError(
                f"The model {spec!r} names no module: give FILE.py:FUNCTION or MODULE:FUNCTION."
            ) from None
    if not callable(names.get(name)):
        raise ValueError(f"{source} has no function `{name}`: `model` must name one that returns a module.")
    return names[name]


def _shape(value: Any) -> list[int]:
    """Sizes given as a list or as 1x3x224x224."""
    parts = value.split("x") if isinstance(value, str) else value
    try:
        sizes = [int(size) for size in parts]
    except (TypeError, ValueError):
        sizes = []
    if not sizes or min(sizes) < 1:
        raise ValueError(f"`input_shape` must look like 1x3x224x224, got {value!r}.")
    return sizes
