"""Load a model whose MLPs are replaced by streaming modules, through transformers' slot for quantizers."""

from __future__ import annotations

import ctypes
import mmap
from abc import abstractmethod
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor

from ripple_loader.compat import LoadingHooks, expect_missing
from ripple_loader.model.architectures import MLPSite

if TYPE_CHECKING:
    from ripple_loader.model.streaming import Backend


def read_alone(tensor: Tensor) -> None:
    """Have the kernel read a tensor of a mapped file now, without reading ahead around it.

    Weights that stay in memory are views of the mapped checkpoint, whose neighbours are the MLPs. Where
    memory is short, the kernel's read-ahead of the MLPs, megabytes at each fault, would evict the weights.
    """
    start = tensor.data_ptr() // mmap.PAGESIZE * mmap.PAGESIZE
    size = tensor.data_ptr() + tensor.nbytes - start
    try:
        madvise = ctypes.CDLL(None).madvise
        for advice in (mmap.MADV_RANDOM, mmap.MADV_WILLNEED):
            madvise(ctypes.c_void_p(start), ctypes.c_size_t(size), advice)
    except (AttributeError, TypeError):  # this system has no madvise
        return


class StreamingQuantizer(LoadingHooks):
    """Leaves the MLP weights on disk and replaces the MLPs by streaming modules."""

    @abstractmethod
    def streamed(self, model: Any, files: list[Path]) -> tuple[list[MLPSite], Backend]:
        """The MLPs of `model` to replace, and the backend that computes them, for its checkpoint files."""

    def before_weights(self, model: Any, files: list[Path]) -> None:
        if not files:
            raise ValueError(
                "Ripple must load from a reordered directory, but the model has no checkpoint files: "
                "use `from_pretrained(directory, quantization_config=...)`."
            )
        from ripple_loader.model.streaming import stream

        sites, backend = self.streamed(model, files)
        stream(model, sites, backend)
        expect_missing(model, sites[0].architecture.streamed_names())

    def after_weights(self, model: Any) -> None:
        from ripple_loader.model.streaming import loaded

        loaded(model)
        for parameter in model.parameters():
            if parameter.device.type == "cpu":
                read_alone(parameter)
