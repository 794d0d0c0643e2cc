"""The choice between the versions of a kernel: Triton on CUDA, torch's reference everywhere else.

Under `TRITON_INTERPRET=1` the Triton versions run on the CPU too, so that they can be tested without a GPU.
"""

from __future__ import annotations

import functools
import importlib.util
import os

import torch
from torch import Tensor

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@functools.cache
def interpreted() -> bool:
    """Whether Triton's interpreter is switched on; Triton reads the variable once, when it is imported."""
    return os.environ.get("TRITON_INTERPRET") == "1"


@functools.cache
def has_triton() -> bool:
    return importlib.util.find_spec("triton") is not None


def runs_triton(x: Tensor) -> bool:
    """Whether Triton's kernels run on `x`; the reference runs on float64 and on machines without Triton."""
    return (x.is_cuda or interpreted()) and x.dtype in DTYPES and has_triton()


def backend(x: Tensor) -> str:
    """The version of the kernels that runs on `x`: "triton" or "torch"."""
    return "triton" if runs_triton(x) else "torch"
