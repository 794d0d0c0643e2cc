"""transformers' plug-in point: `from_pretrained(dir, quantization_config=RippleConfig(...))`.

It is not a quantization; the quantizer slot is where transformers lets a loader replace modules of the empty
model before the weights are read.
"""

from __future__ import annotations

import ctypes
import mmap
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn
from transformers.quantizers.auto import register_quantization_config, register_quantizer
from transformers.quantizers.base import HfQuantizer

from ripple_loader.architectures import MLPSite, architecture_of
from ripple_loader.bundles import Sidecar
from ripple_loader.config import RippleConfig
from ripple_loader.engine import Engine

if TYPE_CHECKING:
    from ripple_loader.streaming import Backend

register_quantization_config("ripple")(RippleConfig)


def read_alone(tensor: Tensor) -> None:
    """Have the kernel read a tensor that lies in a mapped file now, and never what lies around it there.

    Weights that stay in memory are views of the mapped checkpoint, whose neighbours are the MLPs. Where
    memory is short, read-ahead of those, megabytes at each fault, would push the weights out again.
    """
    start = tensor.data_ptr() // mmap.PAGESIZE * mmap.PAGESIZE
    size = tensor.data_ptr() + tensor.nbytes - start
    try:
        madvise = ctypes.CDLL(None).madvise
        for advice in (mmap.MADV_RANDOM, mmap.MADV_WILLNEED):
            madvise(ctypes.c_void_p(start), ctypes.c_size_t(size), advice)
    except (AttributeError, TypeError):  # a system without it
        return


class StreamingQuantizer(HfQuantizer):
    """Leaves the MLP weights on disk and puts streaming modules in the MLPs' place."""

    def streamed(self, model: Any, files: list[Path]) -> tuple[list[MLPSite], Backend]:
        """The MLPs to replace and what computes them, for the checkpoint files of `model`."""
        raise NotImplementedError

    def _process_model_before_weight_loading(
        self, model: Any, checkpoint_files: list[str] | None = None, **kwargs: Any
    ) -> None:
        if not checkpoint_files:
            raise ValueError(
                "Ripple should load from a reordered directory, got a model without checkpoint files: "
                "use `from_pretrained(directory, quantization_config=...)`."
            )
        from ripple_loader.streaming import stream

        sites, backend = self.streamed(model, [Path(file) for file in checkpoint_files])
        stream(model, sites, backend)
        model._keys_to_ignore_on_load_unexpected = {
            *(model._keys_to_ignore_on_load_unexpected or ()),
            *sites[0].architecture.streamed_names(),
        }

    def _process_model_after_weight_loading(self, model: Any, **kwargs: Any) -> None:
        for parameter in model.parameters():
            if parameter.device.type == "cpu":
                read_alone(parameter)

    def is_serializable(self) -> bool:
        return False

    @property
    def is_trainable(self) -> bool:
        return False


@register_quantizer("ripple")
class RippleQuantizer(StreamingQuantizer):
    """Streams the neurons of a reordered directory."""

    quantization_config: RippleConfig

    def streamed(self, model: Any, files: list[Path]) -> tuple[list[MLPSite], Backend]:
        sidecar = Sidecar(files[0].parent)
        sidecar.check_weights(files)
        sites = matching_sites(model, sidecar)
        engine = Engine(sidecar, self.quantization_config, model.dtype)
        model.ripple_report = engine.report
        return sites, engine


def matching_sites(model: nn.Module, sidecar: Sidecar) -> list[MLPSite]:
    """The MLPs of `model`, checked against the sidecar.

    Raises:
        ValueError: the sidecar was made for another kind or size of model.
    """
    header = sidecar.header
    sites = architecture_of(model.config.model_type).find(model)
    wanted = (header.model_type, header.layers, header.experts, (header.neurons, header.hidden))
    count = sum(site.experts or 1 for site in sites)
    got = (model.config.model_type, count, sites[0].experts, tuple(sites[0].down_weights()[0].shape))
    if wanted != got:
        raise ValueError(
            f"{sidecar.path} should fit the model, but is made for {wanted} (type, MLPs, experts, neurons by "
            f"hidden size) and the model has {got}: reorder this model."
        )
    return sites
