"""Runs a model whose MLPs are read from its checkpoint, one at a time, and notes which neurons are active.

Dimension key: T tokens, N neurons, H hidden.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ripple_loader.checkpoint.source import SourceModel
from ripple_loader.compat import QuantizationConfigMixin, register_quantization_config, register_quantizer
from ripple_loader.config import ReorderConfig
from ripple_loader.model.architectures import MLPSite
from ripple_loader.model.loading import StreamingQuantizer
from ripple_loader.model.lowrank import LowRank
from ripple_loader.offline.active_sets import active_mask

if TYPE_CHECKING:
    from ripple_loader.model.streaming import Backend

INPUTS_EVERY = 4  # tokens; the inputs of every fourth are kept for predictors


class Tracer:
    """A backend that reads each MLP from the checkpoint, computes it, and records its active neurons."""

    def __init__(self, source: SourceModel, config: ReorderConfig) -> None:
        self.source, self.config = source, config
        self._recorded: dict[str, npt.NDArray[Any]] = {}

    def __deepcopy__(self, memo: Any) -> Tracer:
        return self  # transformers copies the config that holds the tracer

    def begin(self, tokens: int, layers: int) -> None:
        pass

    def gradients(self, *_: Any) -> list[Tensor]:
        raise RuntimeError("a model that is traced must only run forward, but backward was called.")

    def stored(self, layer: int) -> dict[tuple[str, str], Tensor]:
        """Nothing: a model that is traced is never saved."""
        return {}

    def stored_as(self, first: int, count: int) -> dict[str, Tensor]:
        """Nothing, as `stored`."""
        return {}

    def is_own(self, base: str) -> bool:
        """No: a model that is traced has no adapters."""
        return False

    def permutation(self, layer: int) -> Tensor:
        """The checkpoint's own order."""
        return torch.arange(self.source.neurons)

    file_order = permutation

    def compute(
        self,
        layer: int,
        x_TH: Tensor,
        activation: nn.Module,
        following: int | None,
        low_rank: tuple[LowRank, ...] = (),
    ) -> Tensor:
        *selecting, down = self.source.architecture.bundle
        factors = [F.linear(x_TH, *self._part(layer, role, x_TH)) for role in selecting]
        a_TN = activation(factors[0])
        for factor_TN in factors[1:]:
            a_TN = a_TN * factor_TN
        mask_TN = active_mask(
            a_TN, self.config.active, self.config.active_share, exact_zeros=self.source.exact_zeros
        )
        self._recorded[str(layer)] = np.packbits(mask_TN.cpu().numpy(), axis=1)
        if self.source.exact_zeros:
            # safetensors ignores strides.
            self._recorded[f"{layer}.inputs"] = np.ascontiguousarray(
                x_TH[::INPUTS_EVERY].float().cpu().numpy()
            )
        down_NH, bias_H = self._part(layer, down, x_TH)
        return F.linear(a_TN, down_NH.T, bias_H)

    def _part(self, layer: int, role: Any, like: Tensor) -> tuple[Tensor, Tensor | None]:
        weight, bias = (self.source.part(layer, role, kind) for kind in ("weight", "bias"))
        assert weight is not None
        return weight.to(like), None if bias is None else bias.to(like)

    def take(self) -> dict[str, npt.NDArray[Any]]:
        """The active sets and inputs since the last call, by MLP; empty for an MLP that no token reached."""
        recorded, self._recorded = self._recorded, {}
        for layer in range(self.source.layers):
            recorded.setdefault(str(layer), np.empty((0, -(-self.source.neurons // 8)), np.uint8))
            if self.source.exact_zeros:
                recorded.setdefault(f"{layer}.inputs", np.empty((0, self.source.hidden), np.float32))
        return recorded


@register_quantization_config("ripple_trace")
@dataclass(kw_only=True)
class _TraceConfig(QuantizationConfigMixin):
    """Loads a model with its MLPs computed by a tracer."""

    tracer: Tracer
    quant_method: str = "ripple_trace"


@register_quantizer("ripple_trace")
class _TraceQuantizer(StreamingQuantizer):
    def streamed(self, model: Any, files: list[Path]) -> tuple[list[MLPSite], Backend]:
        tracer = self.quantization_config.tracer
        return tracer.source.architecture.find(model), tracer


def load_traced(tracer: Tracer, device: torch.device) -> Any:
    """The tracer's model; memory is that of the model without its MLPs, and of one MLP when it runs."""
    return tracer.source.loader.from_pretrained(
        tracer.source.directory,
        variant=tracer.source.variant,
        dtype="auto",
        device_map={"": device},
        quantization_config=_TraceConfig(tracer=tracer),
    )
