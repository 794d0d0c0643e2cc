import errno
import os
import shutil
import tempfile
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch

from ripple_loader.access import plan_reads
from ripple_loader.reader import AlignedBuffer, Prefetch, Reader
from ripple_loader.report import RippleReport

from .conftest import load, relative_error, token_ids


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "file"
    path.write_bytes(np.random.default_rng(0).bytes(1 << 20))
    return path


def report():
    return RippleReport(directory="", layers=1, neurons=1, budget=0)


def read(path, places=tuple(range(0, 200, 3)), threads=4):
    """Read some 1000-byte bundles and compare them with the file."""
    reader, buffer = Reader(path, threads, report()), AlignedBuffer(1 << 20)
    plan = plan_reads(np.array(places), base=4096, width=1000, block=reader.block, merge_gap=0)
    with Prefetch(reader, [plan], (buffer, buffer)) as reads:
        ((plan, buffer),) = list(reads)
    data = path.read_bytes()
    for place, spot in zip(plan.places, plan.spots, strict=True):
        start = 4096 + place * 1000
        assert bytes(buffer.memory[spot : spot + 1000]) == data[start : start + 1000]
    return reader


def test_reads_what_the_file_holds_and_counts(file):
    reader = read(file)
    assert reader.direct
    assert reader.report.requests > 0
    assert reader.report.bytes_read >= 67 * 1000
    assert reader.report.bytes_read % 512 == 0


def test_the_buffer_is_seen_as_any_dtype():
    buffer = AlignedBuffer(8192)
    buffer.memory[:4] = np.float32(1.5).tobytes()
    assert buffer.bytes.view(torch.float32)[0] == 1.5
    assert buffer.bytes.data_ptr() % 4096 == 0


@pytest.mark.parametrize("most", [1, 700, 4096, 5000])
def test_short_reads_are_continued_without_o_direct(most, file, monkeypatch):
    real = os.preadv
    monkeypatch.delattr(os, "O_DIRECT")
    monkeypatch.setattr(os, "preadv", lambda fd, views, at: real(fd, [views[0][:most]], at))
    with pytest.warns(UserWarning, match="no O_DIRECT"):
        read(file, places=(0, 1, 7))


def test_short_reads_are_continued_from_a_block_with_o_direct(file, monkeypatch):
    real = os.preadv

    def short(descriptor, views, offset):
        assert offset % 512 == 0
        got = real(descriptor, views, offset)
        return max(512, got - 700) if len(views[0]) > 512 else got

    monkeypatch.setattr(os, "preadv", short)
    read(file)


def test_a_drive_with_large_sectors_is_read_in_its_blocks(file, monkeypatch):
    real = os.preadv

    def refuse_sectors(descriptor, views, offset):
        if offset % 4096 or len(views[0]) % 4096:
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
        return real(descriptor, views, offset)

    monkeypatch.setattr(os, "preadv", refuse_sectors)
    reader = read(file)
    assert reader.direct
    assert reader.block == 4096


def test_an_error_of_the_drive_names_file_and_offset(file, monkeypatch):
    real = os.preadv

    def fail(descriptor, views, offset):
        if offset > 4096:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return real(descriptor, views, offset)

    monkeypatch.setattr(os, "preadv", fail)
    with pytest.raises(OSError, match=rf"{file} cannot be read at byte \d+ \(Input/output error\)"):
        read(file)


def test_a_file_that_ends_early_names_file_and_offset(file):
    os.truncate(file, 100_000)
    with pytest.raises(OSError, match=rf"{file} ends at byte 100000"):
        read(file)


@pytest.mark.parametrize("number", [errno.EINVAL, errno.EOPNOTSUPP])
def test_a_file_system_without_o_direct_is_read_through_the_page_cache(number, file, monkeypatch):
    real = os.open

    def refuse(path, flags, *more):
        if flags & os.O_DIRECT:
            raise OSError(number, os.strerror(number))
        return real(path, flags, *more)

    monkeypatch.setattr(os, "open", refuse)
    with pytest.warns(UserWarning, match="refuses O_DIRECT") as warned:
        reader = read(file)
    assert len(warned) == 1
    assert not reader.direct
    assert "page cache" in reader.report.fallbacks[0]


def test_a_whole_model_runs_without_o_direct(reordered, monkeypatch):
    reference = load(reordered("llama"))(token_ids()).logits
    monkeypatch.delattr(os, "O_DIRECT")
    with pytest.warns(UserWarning, match="no O_DIRECT"):
        model = load(reordered("llama"))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert relative_error(model(token_ids()).logits, reference) < 1e-6
    assert len(model.ripple_report.fallbacks) == 1


def test_a_directory_in_memory(reordered):
    """tmpfs takes O_DIRECT on newer kernels only; either has to work and be reported."""
    with tempfile.TemporaryDirectory(dir="/dev/shm") as scratch, warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        copy = Path(shutil.copytree(reordered("llama"), Path(scratch) / "copy"))
        model = load(copy, dram_budget="50KiB")
        said = [warning for warning in seen if "O_DIRECT" in str(warning.message)]
        assert len(said) == len(model.ripple_report.fallbacks) == (not model_reader(model).direct)
        ids = token_ids()
        assert relative_error(model(ids).logits, load(reordered("llama"))(ids).logits) < 1e-6


def model_reader(model):
    return model.model.layers[0].mlp.backend._reader


def test_a_model_survives_an_error_of_the_drive(reordered, monkeypatch):
    model, ids = load(reordered("llama"), dram_budget="50KiB"), token_ids()
    reference = model(ids).logits
    with monkeypatch.context() as patch:
        patch.setattr(os, "preadv", lambda *_: 0)
        with pytest.raises(OSError, match=r"neurons\.ripple ends at byte"):
            model(ids)
    assert relative_error(model(ids).logits, reference) < 1e-6
