"""The two ways to a streaming model: transformers' loader argument, and `attach` for a model in memory.

`from_pretrained(dir, quantization_config=RippleConfig(...))` is not a quantization; the quantizer slot is
where transformers lets a loader replace modules of the empty model before the weights are read.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from ripple_loader.checkpoint.hub import local_directory, local_file
from ripple_loader.checkpoint.shards import ORIGINAL, check_original
from ripple_loader.compat import is_compiled, register_quantization_config, register_quantizer
from ripple_loader.config import RippleConfig
from ripple_loader.format.bundles import pack_bundles, unpack_bundles
from ripple_loader.format.checks import Numbers, numbers_of
from ripple_loader.format.encoding import Encoding, FloatEncoding
from ripple_loader.format.layout import SIDECAR
from ripple_loader.format.sidecar import Sidecar
from ripple_loader.model.architectures import MLPSite
from ripple_loader.model.loading import StreamingQuantizer
from ripple_loader.model.probe import architecture_of
from ripple_loader.online.engine import Engine
from ripple_loader.report import RippleReport

if TYPE_CHECKING:
    from ripple_loader.model.streaming import Backend

_NEURONS_AT_ONCE = 64

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

    if is_compiled(model):
        raise ValueError(
            "a model must be attached before `torch.compile`, whose graphs keep the MLPs that they were made "
            "with: attach the model, then compile it."
        )
    sidecar = Sidecar(local_directory(directory or model.config.name_or_path, also=[SIDECAR]))
    check_original(sidecar.path.parent)
    sites = matching_sites(model, sidecar)
    _check_weights(sidecar, sites)
    engine = Engine(sidecar, config, next(model.parameters()).dtype)
    stream(model, sites, engine)
    loaded(model)
    model.ripple_report = engine.report
    return engine.report


def _check_weights(sidecar: Sidecar, sites: list[MLPSite]) -> None:
    """ValueError if the sidecar has other weights than the MLPs of a model, in either order of neurons."""
    for site in sites:
        if name := site.hooked():
            raise ValueError(
                f"{name} must have no hooks, because Ripple replaces it and they would be lost: register "
                "them afterwards, on the streamed MLP."
            )
    moved = not sidecar.header.in_original_order  # a copy's neurons have moved in its weight files
    orders = {"original", "copy"} if moved else {"original"}
    for layer, projections in enumerate(weights for site in sites for weights in site.weights()):
        if any(weight.is_meta for weight, _ in projections):
            raise ValueError(
                "the weights of a model must be in memory to attach a directory, but accelerate has "
                "offloaded some: load the directory itself, `from_pretrained(DIR, quantization_config=...)`."
            )
        orders = _matching_orders(sidecar, layer, projections, orders)
        if not orders:
            raise ValueError(
                f"{sidecar.path} must be made from this model's weights, but layer {layer} differs: "
                "give the directory that this model was reordered to, and load the model in the dtype of its "
                "checkpoint."
            )


def _matching_orders(
    sidecar: Sidecar, layer: int, projections: list[tuple[Tensor, Tensor | None]], orders: set[str]
) -> set[str]:
    """The orders of neurons in which a model's MLP has the weights and biases of the sidecar's.

    The weights are encoded as the sidecar's and compared by the checksum of each bundle, so that no bundle is
    read. Only weights that were cast, whose bytes are others, are compared with the bundles themselves.
    """
    places = torch.from_numpy(sidecar.permutation(layer)).long()
    placed = {"original": places, "copy": torch.arange(len(places))}
    weights = [weight.cpu().contiguous() for weight, _ in projections]
    possible = {order for order in orders if _same_biases(sidecar, layer, projections, placed[order])}
    numbers = _checksums(weights, sidecar.header.encoding)
    recorded = sidecar.checks(layer).bundles
    same = {order for order in possible if np.array_equal(numbers[placed[order].numpy()], recorded)}
    if same or not possible or not isinstance(sidecar.header.encoding, FloatEncoding):
        return same
    stored_NRH = unpack_bundles(sidecar.bundles(layer), sidecar.header, sidecar.header.encoding.dtype)
    return {
        order
        for order in possible
        if all(
            torch.equal(stored_NRH[:, row].to(weight.dtype), weight[placed[order]])
            for row, weight in enumerate(weights)
        )
    }


def _checksums(weights_RNH: list[Tensor], encoding: Encoding) -> Numbers:
    """The CRC-32C of each neuron's bundle, shape (N,); a few neurons at a time, which caches hold."""
    numbers = []
    for rows in zip(*(weight_NH.split(_NEURONS_AT_ONCE) for weight_NH in weights_RNH), strict=True):
        bundles = pack_bundles(list(rows), encoding)
        starts = np.arange(len(bundles)) * bundles.shape[1]
        numbers.append(numbers_of(memoryview(bundles.numpy()).cast("B"), starts, bundles.shape[1]))
    return np.concatenate(numbers)


def _same_biases(
    sidecar: Sidecar, layer: int, projections: list[tuple[Tensor, Tensor | None]], places: Tensor
) -> bool:
    vectors = sidecar.vectors(layer)
    for row, (_, bias) in enumerate(projections):
        selects = row < len(projections) - 1
        stored = torch.from_numpy(vectors.bias[row] if selects else vectors.down_bias)
        own = torch.zeros(len(stored)) if bias is None else bias.cpu()
        if not torch.equal(stored.to(own.dtype), own[places] if selects else own):
            return False
    return True


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
    sites = architecture_of(model.config, model).find(model)
    wanted = (header.model_type, header.layers, header.experts, (header.neurons, header.hidden))
    count = sum(site.experts or 1 for site in sites)
    got = (model.config.model_type, count, sites[0].experts, tuple(sites[0].down_weights()[0].shape))
    if wanted != got:
        raise ValueError(
            f"{sidecar.path} must fit the model, but is made for {wanted} (type, MLPs, experts, neurons by "
            f"hidden size) and the model has {got}: reorder this model."
        )
    if header.exact_zeros and not all(site.has_exact_zeros for site in sites):
        raise ValueError(
            f"{sidecar.path} is made for an activation that is exactly zero for inactive neurons, but the "
            f"model has {type(sites[0].activation).__name__}: load it with the configuration that was "
            "reordered."
        )
    return sites
