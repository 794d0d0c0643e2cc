"""How much memory a step may take: what is free on the model's device now."""

from __future__ import annotations

import os
import shutil
import tempfile
from pathlib import Path

import torch
from torch import Tensor, nn

_USABLE = 0.9  # of what is free: allocators keep more than the tensors' bytes


def free_bytes(device: torch.device) -> float:
    """Bytes that this process may still allocate on `device`; infinite where the system does not say."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        reused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return free + reused
    limits = [_available_on_linux(), *_left_in_cgroups()]
    return min(limits)


def _available_on_linux() -> float:
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        pages = os.sysconf("SC_AVPHYS_PAGES") if hasattr(os, "sysconf") else 0
        return float(pages * os.sysconf("SC_PAGE_SIZE")) if pages else float("inf")
    return next(float(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:"))


def _left_in_cgroups() -> list[float]:
    """What the limits of containers leave, for versions 2 and 1; files in memory can be dropped."""
    folders = [(Path("/sys/fs/cgroup"), "memory.max", "memory.current")]
    folders += [(Path("/sys/fs/cgroup/memory"), "memory.limit_in_bytes", "memory.usage_in_bytes")]
    left = []
    for folder, limit, usage in folders:
        try:
            most, used = (folder / limit).read_text().strip(), float((folder / usage).read_text())
            counts = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
        except (OSError, ValueError):
            continue
        if most != "max":
            left.append(float(most) - used + float(counts.get("inactive_file", 0)))
    return left


def weight_bytes(model: nn.Module) -> float:
    """Bytes of the weights and of the gradients that exist."""
    parameters = list(model.parameters())
    grads = [p.grad for p in parameters]
    return float(sum(p.nbytes for p in parameters) + sum(g.nbytes for g in grads if isinstance(g, Tensor)))


def state_bytes(model: nn.Module) -> float:
    """Bytes of the weights, and of the gradients and two AdamW states of the trained ones."""
    return float(sum(p.nbytes * (4 if p.requires_grad else 1) for p in model.parameters()))


def tensors_budget(model: nn.Module) -> float:
    """What all tensors of a step may take: those that exist and most of what is free."""
    device = next(model.parameters()).device
    return weight_bytes(model) + _USABLE * free_bytes(device)


def stored_budget(boundaries: str) -> float:
    """Bytes that boundaries may take in host memory or on the disk of the temporary folder."""
    if boundaries == "disk":
        return _USABLE * shutil.disk_usage(tempfile.gettempdir()).free
    return _USABLE * free_bytes(torch.device("cpu")) if boundaries == "host" else float("inf")
