import errno
import os
import shutil
import signal
import tempfile
import time
import warnings
from concurrent.futures import wait
from pathlib import Path

import numpy as np
import pytest
import torch

from ripple_loader.model.loading import read_alone
from ripple_loader.report import RippleReport
from ripple_loader.storage.aio import AsyncReads
from ripple_loader.storage.blocks import AlignedBuffer
from ripple_loader.storage.collapse import fixed_gap, plan_reads
from ripple_loader.storage.pipeline import Pipeline
from ripple_loader.storage.reader import Reader

from .conftest import load, relative_error, token_ids


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "file"
    path.write_bytes(np.random.default_rng(0).bytes(1 << 20))
    return path


def report():
    return RippleReport(directory="", layers=1, neurons=1, budget=0)


def read(path, places=tuple(range(0, 200, 3)), depth=4, engine="threads"):
    """Read some 1000-byte bundles and compare them with the file."""
    reader, buffer = Reader(path, depth, report(), engine), AlignedBuffer(1 << 20)
    plan = plan_reads(np.array(places), base=4096, width=1000, block=reader.block, collapse=fixed_gap(0))
    pipeline = Pipeline(reader, [buffer])
    ((plan, buffer),) = list(pipeline.take(pipeline.add([plan])))
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


def test_the_meter_is_told_of_all_reads_and_of_no_second_twice(file):
    class Told:
        def observe(self, requests, size, seconds):
            told.append((requests, size, seconds))

    told: list[tuple[int, int, float]] = []
    reader = Reader(file, 4, report(), "threads")
    reader.meter = Told()
    start = time.perf_counter()
    for first in range(0, 40, 4):  # plans of two reads each, two at a time, by four threads
        overlapping = [
            (plan_reads(np.array([place, place + 20]), base=0, width=512, block=512, collapse=fixed_gap(0)))
            for place in (first, first + 2)
        ]
        reads = [read for plan in overlapping for read in reader.submit(plan, AlignedBuffer(4096))]
        wait(reads)
    assert sum(seconds for _, _, seconds in told) <= time.perf_counter() - start
    assert sum(requests for requests, _, _ in told) == reader.report.requests
    assert sum(size for _, size, _ in told) == reader.report.bytes_read


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


def test_weights_of_a_mapped_file_are_read_alone_and_stay_what_they_are(file):
    mapped = torch.from_file(str(file), size=1 << 18, dtype=torch.int32)
    part, expected = mapped[1000:200_000], np.fromfile(file, np.int32)[1000:200_000]
    read_alone(part)
    assert np.array_equal(part.numpy(), expected)
    advice = [line for line in Path("/proc/self/smaps").read_text().splitlines() if "VmFlags" in line]
    assert any(" rr" in line for line in advice)  # read at random
    read_alone(torch.empty(0))
    read_alone(torch.ones(3))


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
    return model.model.layers[0].mlp.backend._fetcher._reader


def test_a_model_survives_an_error_of_the_drive(reordered, monkeypatch):
    model, ids = load(reordered("llama"), dram_budget="50KiB", io_engine="threads"), token_ids()
    reference = model(ids).logits
    with monkeypatch.context() as patch:
        patch.setattr(os, "preadv", lambda *_: 0)
        with pytest.raises(OSError, match=r"neurons\.ripple ends at byte"):
            model(ids)
    assert relative_error(model(ids).logits, reference) < 1e-6


def test_asynchronous_reads_bring_what_threads_bring(file):
    for depth in (1, 3, 200):
        reader = read(file, depth=depth, engine="aio")
        assert reader.engine == "aio"
        assert not reader.report.fallbacks


def test_an_asynchronous_read_that_fails_or_is_short_is_done_again(file, monkeypatch):
    real = AsyncReads.read

    def spoil(self, offsets, lengths, addresses):
        results = real(self, offsets, lengths, addresses)
        results[::3], results[1::3] = -errno.EIO, 512
        return results

    monkeypatch.setattr(AsyncReads, "read", spoil)
    read(file, engine="aio")
    os.truncate(file, 100_000)
    with pytest.raises(OSError, match=rf"{file} ends at byte 100000"):
        read(file, engine="aio")


def test_asynchronous_reads_report_each_request(file):
    reader, buffer = Reader(file, 4, report()), AlignedBuffer(1 << 16)
    queue = AsyncReads(reader._descriptor, 2)
    offsets = np.array([0, 1, 4096, 1 << 20, 8192])
    results = queue.read(offsets, np.full(5, 512), buffer.bytes.data_ptr() + 4096 * np.arange(5))
    assert results.tolist() == [512, -errno.EINVAL, 512, 0, 512]
    assert bytes(buffer.memory[8192:8704]) == file.read_bytes()[4096:4608]
    queue.close()


def test_signals_do_not_disturb_asynchronous_reads(file):
    before = signal.signal(signal.SIGALRM, lambda *_: None)
    signal.setitimer(signal.ITIMER_REAL, 2e-4, 2e-4)
    try:
        for _ in range(20):
            read(file, engine="aio")
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


@pytest.mark.parametrize("number", [errno.ENOSYS, errno.EPERM, errno.EAGAIN])
def test_threads_read_where_the_kernel_refuses_asynchronous_reads(number, file, monkeypatch):
    opened = []

    def refuse(self, descriptor, depth):
        if opened:
            raise OSError(number, os.strerror(number))
        opened.append(real(self, descriptor, depth))

    real = AsyncReads.__init__
    monkeypatch.setattr(AsyncReads, "__init__", refuse)
    with pytest.warns(UserWarning, match="the kernel refuses asynchronous reads"):
        reader = read(file, engine="auto")
    assert reader.engine == "threads"
    assert "by threads" in reader.report.fallbacks[0]


def test_a_pipeline_keeps_its_order_and_forgets_what_is_dropped(file):
    reader, data = Reader(file, 4, report()), file.read_bytes()
    buffers = [AlignedBuffer(1 << 16) for _ in range(3)]
    pipeline = Pipeline(reader, buffers)
    plans = [
        plan_reads(np.arange(at, at + 60), base=0, width=1000, block=512, collapse=fixed_gap(0))
        for at in range(0, 900, 60)
    ]
    first, second = pipeline.add(plans[:7]), pipeline.add(plans[7:])
    seen = []
    for plan, buffer in pipeline.take(first):
        seen.append(plan)
        spot, start = plan.spots[0], plan.places[0] * 1000
        assert bytes(buffer.memory[spot : spot + 60_000]) == data[start : start + 60_000]
        if len(seen) == 5:
            break
    assert seen == plans[:5]
    pipeline.drop(first)
    pipeline.keep_started(second)
    assert [plan for plan, _ in pipeline.take(second)] == plans[7 : 7 + 3]
    pipeline.drop(second)
    assert len(pipeline._free) == 3
    assert not pipeline._tickets
