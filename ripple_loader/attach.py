"""Stream a model that is already in memory, where the quantization slot is taken or of no use."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from ripple_loader.bundles import Sidecar
from ripple_loader.config import RippleConfig
from ripple_loader.engine import Engine
from ripple_loader.quantizer import matching_sites
from ripple_loader.report import RippleReport
from ripple_loader.streaming import stream


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
    sidecar = Sidecar(directory or model.config.name_or_path)
    sites = matching_sites(model, sidecar)
    for layer, site in enumerate(sites):
        down = site.architecture.down
        weight_NH = site.linear("down").weight.movedim(down.neuron_axis, 0)
        stored_H = sidecar.bundles(layer, 0, 1)[0, -1].to(weight_NH)
        places = (0, int(sidecar.permutation(layer)[0]))  # in the reordered, and in the original model
        if not any(torch.equal(stored_H, weight_NH[place]) for place in places):
            raise ValueError(
                f"{sidecar.path} should be made from this model's weights, but layer {layer} differs: "
                "give the directory that this model was reordered to."
            )
    engine = Engine(sidecar, config, next(model.parameters()).dtype)
    stream(model, sites, engine)
    return engine.report
