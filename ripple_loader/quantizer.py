"""transformers' plug-in point: `from_pretrained(dir, quantization_config=RippleConfig(...))`.

It is not a quantization; the quantizer slot is where transformers lets a loader replace modules of the empty
model before the weights are read.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import nn
from transformers.quantizers.auto import register_quantization_config, register_quantizer
from transformers.quantizers.base import HfQuantizer

from ripple_loader.architectures import MLPSite, architecture_of
from ripple_loader.bundles import Sidecar
from ripple_loader.config import RippleConfig
from ripple_loader.engine import Engine
from ripple_loader.streaming import stream

register_quantization_config("ripple")(RippleConfig)


@register_quantizer("ripple")
class RippleQuantizer(HfQuantizer):
    """Leaves the MLP weights on disk and puts streaming modules in the MLPs' place."""

    quantization_config: RippleConfig

    def _process_model_before_weight_loading(
        self, model: Any, checkpoint_files: list[str] | None = None, **kwargs: Any
    ) -> None:
        if not checkpoint_files:
            raise ValueError(
                "Ripple should load from a reordered directory, got a model without checkpoint files: "
                "use `from_pretrained(directory, quantization_config=...)`."
            )
        files = [Path(file) for file in checkpoint_files]
        sidecar = Sidecar(files[0].parent)
        sidecar.check_weights(files)
        sites = matching_sites(model, sidecar)
        stream(model, sites, Engine(sidecar, self.quantization_config, model.dtype))
        pattern = sites[0].architecture.tensor_pattern().pattern
        model._keys_to_ignore_on_load_unexpected = {
            *(model._keys_to_ignore_on_load_unexpected or ()),
            pattern,
        }

    def is_serializable(self) -> bool:
        return False

    @property
    def is_trainable(self) -> bool:
        return False


def matching_sites(model: nn.Module, sidecar: Sidecar) -> list[MLPSite]:
    """The MLPs of `model`, checked against the sidecar.

    Raises:
        ValueError: the sidecar was made for another kind or size of model.
    """
    header = sidecar.header
    sites = architecture_of(model.config.model_type).find(model)
    first = sites[0].linear("down").weight
    wanted = (header.model_type, header.layers, {header.neurons, header.hidden})
    got = (model.config.model_type, len(sites), set(first.shape))
    if wanted != got:
        raise ValueError(
            f"{sidecar.path} should fit the model, but is made for {wanted} (type, layers, neurons and "
            f"hidden size) and the model has {got}: reorder this model."
        )
    return sites
