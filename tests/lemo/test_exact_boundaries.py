from __future__ import annotations

import collections
import dataclasses
import errno
import os
import shutil
import subprocess
import sys
import tempfile
import weakref
from tempfile import TemporaryFile

import pytest
import torch

from lemo_trainer import apply_lemo
from lemo_trainer.exact.boundaries import FileBoundary
from lemo_trainer.measure import ActivationBytes

from .exact import LAYERS, relative_error
from .tiny import batch, lora, loss_and_gradients, tiny_model

ON_DISK = dataclasses.replace(LAYERS, boundaries="disk")


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    return tmp_path


@pytest.mark.parametrize("boundaries", ["disk", "host"])
def test_the_step_is_the_same_wherever_its_boundaries_lie(boundaries, folder):
    model, inputs = tiny_model(), batch("left")
    apply_lemo(model, LAYERS)
    wanted = loss_and_gradients(model, inputs)
    other = tiny_model()
    apply_lemo(other, dataclasses.replace(LAYERS, boundaries=boundaries))
    assert relative_error(loss_and_gradients(other, inputs), wanted) == 0


def test_files_have_no_name_and_go_as_soon_as_the_backward_pass_has_read_them(folder, monkeypatch):
    files = []

    def noting(**options):
        file = TemporaryFile(**options)  # noqa: SIM115 - closed with the boundary
        files.append(weakref.ref(file))
        return file

    monkeypatch.setattr(tempfile, "TemporaryFile", noting)
    model, inputs = tiny_model(), batch("left")
    apply_lemo(model, ON_DISK)
    loss = model(**inputs).loss
    assert len(files) == 3
    assert not list(folder.iterdir())
    loss.backward(retain_graph=True)
    assert all(file() for file in files)
    loss.backward()
    assert not any(file() for file in files)


def test_saved_bytes_hold_no_boundaries():
    inputs, saved = batch("plain", seq_len=128), {}
    for config in (LAYERS, ON_DISK):
        model = lora(tiny_model(layers=6))
        apply_lemo(model, config)
        with ActivationBytes() as activations:
            model(**inputs).loss.backward()
        saved[config.boundaries] = activations.saved_bytes
    assert saved["memory"] - saved["disk"] == 6 * 2 * 128 * 32 * 4


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_a_tensor_comes_back_as_it_was(dtype, folder):
    tensor = torch.randn(2, 5, 8).to(dtype).transpose(0, 1)
    read = FileBoundary(tensor).read()
    assert torch.equal(read, tensor)
    assert read.dtype == dtype


def test_a_truncated_file_is_an_error(folder):
    boundary = FileBoundary(torch.randn(4, 8))
    os.ftruncate(boundary._file.fileno(), 100)
    with pytest.raises(OSError, match=r"must have 128 bytes, got 100.*TMPDIR"):
        boundary.read()


def test_a_full_disk_is_an_error_before_the_first_layer(folder, monkeypatch):
    usage = collections.namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(2**20, 2**20, 20_000))
    model, inputs = tiny_model(), batch("left")
    apply_lemo(model, ON_DISK)
    with pytest.raises(OSError, match=r"need 34,560 bytes more on the disk of .* 20,000 free; set TMPDIR"):
        model(**inputs)


def test_a_disk_that_fills_up_is_an_error(folder, monkeypatch):
    class Full:
        def __init__(self, **options):
            pass

        def write(self, data):
            raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(tempfile, "TemporaryFile", Full)
    model, inputs = tiny_model(), batch("left")
    apply_lemo(model, ON_DISK)
    with pytest.raises(OSError, match="set TMPDIR to a larger disk"):
        model(**inputs)


KILLED = """
import os, signal, sys, torch
from lemo_trainer.exact.boundaries import FileBoundary
boundary = FileBoundary(torch.zeros(1000))
os.kill(os.getpid(), signal.SIGKILL)
"""


def test_a_killed_process_leaves_no_file(tmp_path):
    done = subprocess.run([sys.executable, "-c", KILLED], env={**os.environ, "TMPDIR": str(tmp_path)})
    assert done.returncode == -9
    assert not list(tmp_path.iterdir())
