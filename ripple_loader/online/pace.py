"""The speed of this processor: measured when a model is loaded, in some milliseconds.

Dimension key: U neurons in a batch, H hidden, K rank of a predictor.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from ripple_loader.format.bundles import unpack_bundles
from ripple_loader.format.layout import SidecarHeader
from ripple_loader.format.sketch import IntegerInputs
from ripple_loader.kernels.bundles import StoredProducts
from ripple_loader.online.budget import Allocation
from ripple_loader.storage.blocks import AlignedBuffer


@dataclass(frozen=True, kw_only=True)
class Pace:
    """Seconds that the processor needs for one token.

    Attributes:
        compute: to compute with a neuron that lies in order among others.
        gather: to copy a scattered neuron first.
        select: to select the neurons of a layer.
    """

    compute: float = 0.0
    gather: float = 0.0
    select: float = 0.0


def measure_pace(
    header: SidecarHeader,
    allocation: Allocation,
    dtype: torch.dtype,
    buffers: list[AlignedBuffer],
    products: StoredProducts | None,
) -> Pace:
    """Measure how long computing with neurons, gathering them, and selecting them takes for one token.

    Args:
        header: of the sidecar, for its sizes and encoding; nothing is read.
        allocation: how many neurons are computed with at once.
        dtype: the model's.
        buffers: memory to do it in.
        products: with neurons as they are stored; None if they are decoded first.
    """
    rows = allocation.rows
    width, H = header.bundle_bytes, header.hidden
    x_1H, index = torch.ones(1, H, dtype=dtype), torch.arange(rows)
    stored = buffers[0].bytes[: rows * width].view(rows, width)
    gathered = buffers[1].bytes[: rows * width].view(rows, width)
    width_K = allocation.rank or H
    sketched = allocation.buffer // width_K
    integers = buffers[2].bytes[: width_K * sketched].view(torch.int8).view(sketched, width_K)
    estimates = torch.empty(1, sketched, dtype=torch.float32)

    offsets, like = np.arange(rows) * width, {"dtype": torch.float32, "device": "cpu"}
    a_1U, y_1H = torch.ones(1, rows, **like), torch.zeros(1, H, **like)  # inactive neurons would be left out

    def compute() -> Tensor:
        if products is not None:
            products.project(stored.view(-1), offsets, x_1H.float())
            products.accumulate(stored.view(-1), offsets, a_1U, y_1H)
            return y_1H
        *selecting, down_UH = unpack_bundles(stored, header, dtype).unbind(1)
        return sum((F.linear(x_1H, weight_UH) for weight_UH in selecting), torch.zeros(())) @ down_UH

    def gather() -> None:
        torch.index_select(stored, 0, index, out=gathered)

    basis_KH = torch.zeros(allocation.rank, H, dtype=torch.float32, device="cpu")

    def select() -> None:
        x = x_1H.float() @ basis_KH.T if allocation.rank else x_1H.float()
        IntegerInputs.of(x).products(integers, estimates)

    return Pace(
        compute=_seconds(compute) / rows,
        gather=0.0 if products else _seconds(gather) / rows,
        select=_seconds(select) / sketched * (1 if allocation.rank else header.rows - 1) * header.neurons,
    )


def _seconds(work: Callable[[], object]) -> float:
    """The least time of a few runs."""
    times = []
    for _ in range(4):
        start = time.perf_counter()
        work()
        times.append(time.perf_counter() - start)
    return min(times)
