"""Which implementation a kernel runs: Triton's on CUDA, torch's reference everywhere else.

Under `TRITON_INTERPRET=1` Triton's run on the CPU too, which is how they are tested without a GPU.
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
    """Whether Triton's interpreter was asked for; Triton itself reads the variable once, on import."""
    return os.environ.get("TRITON_INTERPRET") == "1"


@functools.cache
def has_triton() -> bool:
    return importlib.util.find_spec("triton") is not None


def runs_triton(x: Tensor) -> bool:
    """Whether kernels on `x` are Triton's; float64, and a machine without Triton, take the reference."""
    return (x.is_cuda or interpreted()) and x.dtype in DTYPES and has_triton()


def backend(x: Tensor) -> str:
    """What kernels on `x` are written in."""
    return "triton" if runs_triton(x) else "torch"
