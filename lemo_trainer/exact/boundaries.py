"""Where the inputs of layers wait for the backward pass: in memory, in host memory, or on disk.

Autograd hands over what a walk saves and asks for it again; it lets go of it as soon as the backward pass has
passed, or keeps it under `retain_graph`. On disk, each boundary is an unnamed file: it has no entry in a
folder, so that the system frees it with the process, also after kill -9, and nobody else can remove it.
"""

from __future__ import annotations

import contextlib
import errno
import shutil
import tempfile
from typing import Any

import torch
from torch import Tensor

from lemo_trainer.config import Boundaries


class FileBoundary:
    """A tensor in an unnamed file in the system's temporary folder (TMPDIR).

    Raises:
        OSError: the disk is full.
    """

    def __init__(self, tensor: Tensor) -> None:
        self._shape, self._dtype, self._device = tensor.shape, tensor.dtype, tensor.device
        data = tensor.detach().to("cpu").contiguous()
        try:
            self._file = tempfile.TemporaryFile(buffering=0)  # noqa: SIM115 - closed with the boundary
            _write(self._file, data)
        except OSError as error:
            if error.errno in (errno.ENOSPC, errno.EDQUOT):
                raise _full(data.nbytes) from error
            raise

    def read(self) -> Tensor:
        """The tensor, on its own device.

        Raises:
            OSError: the file is shorter than the tensor.
        """
        data = torch.empty(self._shape, dtype=self._dtype)
        self._file.seek(0)
        view = memoryview(_bytes(data))
        got = 0
        while got < len(view) and (count := self._file.readinto(view[got:])):
            got += count
        if got < data.nbytes:
            raise OSError(
                f"A boundary on disk must have {data.nbytes} bytes, got {got}: its file in "
                f"{tempfile.gettempdir()} was cut short. This step is lost; the model is as before it. Set "
                "TMPDIR to another disk, or boundaries='memory'."
            )
        return data.to(self._device)


def _bytes(tensor: Tensor) -> Any:
    return tensor.view(-1).view(torch.uint8).numpy()


def _write(file: Any, data: Tensor) -> None:
    view = memoryview(_bytes(data))
    done = 0
    while done < len(view):
        done += file.write(view[done:])


def _full(needed: int) -> OSError:
    folder = tempfile.gettempdir()
    return OSError(
        errno.ENOSPC,
        f"The boundaries of this step need {needed:,} bytes more on the disk of {folder}, which has "
        f"{shutil.disk_usage(folder).free:,} free; set TMPDIR to a larger disk, or boundaries='memory'",
    )


class _Host:
    def __init__(self, tensor: Tensor) -> None:
        self._device = tensor.device
        self._data = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=tensor.is_cuda)
        self._data.copy_(tensor)

    def read(self) -> Tensor:
        return self._data.to(self._device, non_blocking=True)


def saved_in(where: Boundaries, x: Tensor, layers: int) -> contextlib.AbstractContextManager[Any]:
    """Inside the block, what autograd saves goes to memory, host or disk.

    Args:
        x: the boundary of this layer.
        layers: that have yet to save one of its size, this one included.

    Raises:
        OSError: they do not fit on the disk.
    """
    if where == "memory" or (where == "host" and x.device.type == "cpu"):
        return contextlib.nullcontext()
    if where == "host":
        return torch.autograd.graph.saved_tensors_hooks(_Host, _Host.read)
    needed = layers * x.nbytes
    if shutil.disk_usage(tempfile.gettempdir()).free < needed:
        raise _full(needed)
    return torch.autograd.graph.saved_tensors_hooks(FileBoundary, FileBoundary.read)
