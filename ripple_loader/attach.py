"""Stream a model that is already in memory, where the quantization slot is taken or of no use."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ripple_loader.bundles import Sidecar
from ripple_loader.config import RippleConfig
from ripple_loader.encoding import FloatEncoding
from ripple_loader.engine import Engine
from ripple_loader.quantizer import matching_sites
from ripple_loader.report import RippleReport

_ROUNDED_AWAY = 0.3  # of a row's norm; 4-bit integers round away a tenth


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
    from ripple_loader.streaming import stream

    sidecar = Sidecar(directory or model.config.name_or_path)
    sites = matching_sites(model, sidecar)
    weights = [weight_NH for site in sites for weight_NH in site.down_weights()]
    for layer, weight_NH in enumerate(weights):
        stored_H = sidecar.bundle(layer, 0)[-1]
        places = (0, int(sidecar.permutation(layer)[0]))  # in the reordered, and in the original model
        if not any(_same(stored_H, weight_NH[place], sidecar) for place in places):
            raise ValueError(
                f"{sidecar.path} should be made from this model's weights, but layer {layer} differs: "
                "give the directory that this model was reordered to."
            )
    del weights
    engine = Engine(sidecar, config, next(model.parameters()).dtype)
    stream(model, sites, engine)
    model.ripple_report = engine.report
    return engine.report


def _same(stored_H: Tensor, weight_H: Tensor, sidecar: Sidecar) -> bool:
    """Whether a float32 row of a bundle is a weight's, up to what its encoding rounds away."""
    if isinstance(sidecar.header.encoding, FloatEncoding):
        return torch.equal(stored_H.to(weight_H), weight_H)
    return bool((stored_H.to(weight_H) - weight_H).norm() <= _ROUNDED_AWAY * weight_H.norm())
