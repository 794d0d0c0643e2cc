"""The two ways to a streaming model: transformers' loader argument, and `attach` for a model in memory.

`from_pretrained(dir, quantization_config=RippleConfig(...))` is not a quantization; the quantizer slot is
where transformers lets a loader replace modules of the empty model before the weights are read.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ripple_loader.checkpoint.hub import local_directory, local_file
from ripple_loader.checkpoint.shards import ORIGINAL, check_original
from ripple_loader.compat import register_quantization_config, register_quantizer
from ripple_loader.config import RippleConfig
from ripple_loader.format.encoding import FloatEncoding
from ripple_loader.format.layout import SIDECAR
from ripple_loader.format.sidecar import Sidecar
from ripple_loader.model.architectures import MLPSite
from ripple_loader.model.loading import StreamingQuantizer
from ripple_loader.model.probe import architecture_of
from ripple_loader.online.engine import Engine
from ripple_loader.report import RippleReport

if TYPE_CHECKING:
    from ripple_loader.model.streaming import Backend

_ROUNDING_TOLERANCE = 0.3  # of a row's norm; 4-bit integers lose a tenth

register_quantization_config("ripple")(RippleConfig)


@register_quantizer("ripple")
class RippleQuantizer(StreamingQuantizer):
    """Streams the neurons of a reordered directory."""

    quantization_config: RippleConfig

    def before_files(self, directory: str) -> None:
        check_original(Path(directory))

    def streamed(self, model: Any, files: list[Path]) -> tuple[list[MLPSite], Backend]:
        sidecar = Sidecar(_sidecar_directory(model.config.name_or_path, files[0].parent))
        sidecar.check_weights(files)
        sites = matching_sites(model, sidecar)
        engine = Engine(sidecar, self.quantization_config, model.dtype)
        model.ripple_report = engine.report
        return sites, engine


def _sidecar_directory(name: str, folder: Path) -> Path:
    """The directory of the sidecar of a model by its directory or hub id, and the folder of its weights."""
    if folder.name == ORIGINAL and (folder.parent / SIDECAR).is_file():
        return folder.parent
    if not (folder / SIDECAR).is_file() and folder.parent.name == "snapshots" and not Path(name).is_dir():
        local_file(name, SIDECAR, folder)
    return folder


def attach(model: Any, config: RippleConfig, directory: str | Path | None = None) -> RippleReport:
    """Replace the MLPs of `model` by streaming ones; their weights are freed.

    Args:
        model: a causal LM, from the original or from the reordered directory.
        config: the DRAM budget and the rest.
        directory: the reordered directory; by default the one that the model was loaded from.

    Returns:
        The report, also at `model.ripple_report`.

    Raises:
        FileNotFoundError: the directory has no sidecar.
        ValueError: the sidecar was made from other weights, or the budget is too small.
    """
    from ripple_loader.model.streaming import loaded, stream

    sidecar = Sidecar(local_directory(directory or model.config.name_or_path, also=[SIDECAR]))
    check_original(sidecar.path.parent)
    sites = matching_sites(model, sidecar)
    weights = [weight_NH for site in sites for weight_NH in site.down_weights()]
    for layer, weight_NH in enumerate(weights):
        stored_H = sidecar.bundle(layer, 0)[-1]
        indices = (0, int(sidecar.permutation(layer)[0]))  # in the reordered, and in the original model
        if not any(_same(stored_H, weight_NH[index], sidecar) for index in indices):
            raise ValueError(
                f"{sidecar.path} must be made from this model's weights, but layer {layer} differs: "
                "give the directory that this model was reordered to."
            )
    del weights
    engine = Engine(sidecar, config, next(model.parameters()).dtype)
    stream(model, sites, engine)
    loaded(model)
    model.ripple_report = engine.report
    return engine.report


def _same(stored_H: Tensor, weight_H: Tensor, sidecar: Sidecar) -> bool:
    """Whether a float32 row of a bundle equals a row of a weight, within the error of its encoding."""
    if isinstance(sidecar.header.encoding, FloatEncoding):
        return torch.equal(stored_H.to(weight_H), weight_H)
    return bool((stored_H.to(weight_H) - weight_H).norm() <= _ROUNDING_TOLERANCE * weight_H.norm())


def matching_sites(model: nn.Module, sidecar: Sidecar) -> list[MLPSite]:
    """The MLPs of `model`, checked against the sidecar.

    Raises:
        ValueError: the sidecar was made for another kind or size of model.
    """
    from ripple_loader.model.streaming import is_streamed

    header = sidecar.header
    if is_streamed(model):
        raise ValueError("a model must be attached once, but its MLPs are streamed already: load it anew.")
    adapted = [name for name, module in model.named_modules() if hasattr(module, "base_layer")]
    if adapted:
        raise ValueError(
            f"a model must be streamed before its adapters are added, but {adapted[0]} is adapted already: "
            "attach the base model, then load the adapter."
        )
    sites = architecture_of(model.config).find(model)
    wanted = (header.model_type, header.layers, header.experts, (header.neurons, header.hidden))
    count = sum(site.experts or 1 for site in sites)
    got = (model.config.model_type, count, sites[0].experts, tuple(sites[0].down_weights()[0].shape))
    if wanted != got:
        raise ValueError(
            f"{sidecar.path} must fit the model, but is made for {wanted} (type, MLPs, experts, neurons by "
            f"hidden size) and the model has {got}: reorder this model."
        )
    return sites
