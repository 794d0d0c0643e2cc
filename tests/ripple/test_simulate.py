import json
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner

from ripple_loader import ReorderConfig
from ripple_loader.checkpoint.source import open_source
from ripple_loader.cli import app
from ripple_loader.offline.calibration import cut_sequences
from ripple_loader.offline.placement import Placed
from ripple_loader.offline.trace import trace_source
from ripple_loader.online.cache import NeuronCache
from ripple_loader.registry import CACHE_POLICIES
from ripple_loader.storage.devices import Device, load_devices
from ripple_loader.storage.drive import DriveProfile, Measurement, device_of
from ripple_loader.studies.html_report import coactivation_map
from ripple_loader.studies.simulation import (
    CONTENDERS,
    RIPPLE,
    Contender,
    Workload,
    place_all,
    replay,
    summarise,
)

from .conftest import CALIBRATION

DEVICE = Device(name="test", bandwidth=1e9, iops=1e5, source="made up")  # a knee of 10 kB
NEURONS, WIDTH = 60, 1000


def workload(active, layers=2):
    """Made-up activity, the same in calibration and replay: booleans of shape (layers * tokens, N)."""
    sets = np.array_split(np.packbits(np.array(active, bool), axis=1), layers)
    return Workload(sets, sets, NEURONS, WIDTH, len(sets[0]))


ACTIVITY = st.lists(st.lists(st.booleans(), min_size=NEURONS, max_size=NEURONS), min_size=2, max_size=8).map(
    lambda rows: workload(rows[: len(rows) // 2 * 2])
)


def identity(work):
    return [Placed(np.arange(work.neurons))] * len(work.replayed)


@settings(deadline=None)
@given(work=ACTIVITY, collapse=st.booleans(), block=st.sampled_from([512, 4096]))
def test_without_a_cache_the_reads_cover_exactly_the_active_neurons_and_gaps(work, collapse, block):
    contender = Contender(placement="identity", collapse=collapse, shares=False)
    found = replay(work, contender, identity(work), DEVICE.model, cache_bytes=0, block=block)
    wanted = np.concatenate(work.replayed)
    step, place = np.nonzero(np.unpackbits(wanted, axis=1, count=NEURONS))
    starts = step // work.tokens * work.layer_bytes + place * WIDTH
    assert found.active == len(place)
    assert found.hits == found.evictions == 0
    assert not (found.offsets % block).any()
    assert not (found.lengths % block).any()
    for number in np.unique(step):
        mine = found.step == number
        first, last = found.offsets[mine], found.offsets[mine] + found.lengths[mine]
        of = starts[step == number]
        read = np.searchsorted(first, of, side="right") - 1
        assert (last[read] >= of + WIDTH).all()
        assert (first[1:] > last[:-1]).all()


@settings(deadline=None)
@given(work=ACTIVITY)
def test_collapsing_never_costs_time(work):
    without = Contender(placement="identity", collapse=False, shares=False)
    with_ = Contender(placement="identity", shares=False)
    slow, fast = (
        replay(work, one, identity(work), DEVICE.model, cache_bytes=0).seconds(DEVICE.model)
        for one in (without, with_)
    )
    assert (fast <= slow + 1e-12).all()


@settings(deadline=None)
@given(work=ACTIVITY, slots=st.integers(0, 130), name=st.sampled_from(sorted(CONTENDERS)))
def test_no_strategy_finds_more_neurons_than_it_has_memory_for(work, slots, name):
    contender = CONTENDERS[name]
    placed = place_all(work, contender.placement, ReorderConfig(partners=4))
    found = replay(work, contender, placed, DEVICE.model, cache_bytes=slots * WIDTH)
    assert found.hits <= min(found.active, work.tokens * slots)
    if not slots:
        assert not found.hits
    if slots >= 2 * NEURONS and contender.dense:
        assert not len(found.lengths)


def test_dense_streaming_takes_the_bandwidth():
    work = workload(np.ones((6, NEURONS)))
    found = replay(work, CONTENDERS["dense"], identity(work), DEVICE.model, cache_bytes=20 * WIDTH)
    row = summarise(found, work.tokens, DEVICE.model)
    whole_blocks = -(-NEURONS * WIDTH // 4096) * 4096 - 10 * WIDTH // 4096 * 4096
    assert math.isclose(row["ms_per_token"], 2 * whole_blocks / 1e9 * 1e3)
    assert math.isclose(row["MB_per_s"], 1000)


def test_the_cache_is_counted_in_hits_and_evictions():
    rows = np.zeros((40, NEURONS), bool)
    rows[:, [1, 5, 9]] = True
    rows[np.arange(40), 20 + np.arange(40) % 30] = True
    work = workload(rows, layers=1)
    found = replay(work, RIPPLE, identity(work), DEVICE.model, cache_bytes=6 * WIDTH)
    assert found.hits >= 0.7 * 3 * 40
    assert found.evictions > 0


def test_the_devices_that_come_along_are_published_and_plausible():
    devices = load_devices()
    assert {"ufs-3.1", "ufs-4.0", "sata", "nvme"} <= devices.keys()
    assert all(device.source and device.queue_depth == 32 for device in devices.values())
    assert math.isclose(devices["ufs-4.0"].knee, 24 << 10, rel_tol=0.01)
    model = devices["ufs-4.0"].model
    assert math.isclose(float(model.seconds(1000, 1000 * 4096)), 1000 / devices["ufs-4.0"].iops)


GOOD = {"bandwidth": 1e9, "iops": 1e5, "source": "made up"}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: [1", "must be YAML"),
        ("just words", "must map names of devices"),
        ("drive: 7", "must map names of devices"),
        (json.dumps({"drive": {"bandwidth": 1e9}}), "must have iops, source"),
        (json.dumps({"drive": GOOD | {"bandwith": 1}}), "no key 'bandwith'; did you mean bandwidth"),
        (json.dumps({"drive": GOOD | {"iops": -3}}), "`iops` must be a positive number, got -3"),
        (
            json.dumps({"drive": GOOD | {"bandwidth": "fast"}}),
            "`bandwidth` must be a positive number, got 'fast'",
        ),
        (json.dumps({"drive": GOOD | {"bandwidth": 700}}), "between a block"),
        (json.dumps({"drive": GOOD | {"latency": 50}}), "`latency` must be seconds"),
        (json.dumps({"drive": GOOD | {"queue_depth": 0}}), "`queue_depth` must be a whole number"),
        (json.dumps({"drive": GOOD | {"block": 100}}), "`block` must be 512 or 4096"),
        (json.dumps({"drive": GOOD | {"source": ""}}), "`source` must be a text"),
        ("drive: {bandwidth: .nan, iops: 1, source: x}", "`bandwidth` must be a positive number, got nan"),
    ],
)
def test_a_nonsense_file_of_devices_is_refused(text, message, tmp_path):
    path = tmp_path / "devices.yaml"
    path.write_text(text)
    with pytest.raises(ValueError, match=message.replace("(", r"\(")):
        load_devices(path)


def test_a_map_shows_what_is_active_together():
    active = np.zeros((50, 8), bool)
    active[::2, ::2] = True
    active[1::2, 1::2] = True
    sets = np.packbits(active, axis=1)
    before = coactivation_map(sets, np.arange(8), cells=2)
    after = coactivation_map(sets, np.array([0, 2, 4, 6, 1, 3, 5, 7]), cells=2)
    assert np.allclose(before, 1)
    assert np.allclose(after, [[2, 0], [0, 2]])


@pytest.fixture(scope="module")
def traced(saved, tmp_path_factory):
    """A tiny OPT model and a trace of it."""
    source, config = open_source(saved("opt")), ReorderConfig(tokens=256, sequence_length=64)
    trace = tmp_path_factory.mktemp("traced") / "trace"
    trace_source(source, cut_sequences(source, CALIBRATION, config), config, trace)
    return str(source.directory), str(trace)


def test_simulate_and_report_on_the_command_line(traced, tmp_path, monkeypatch):
    model, trace = traced
    numbers, page = tmp_path / "numbers.json", tmp_path / "page.html"
    options = [model, "--trace", trace, "--tokens", "64"]
    run = CliRunner().invoke(app, ["simulate", *options, "--json", str(numbers)])
    assert run.exit_code == 0, run.output
    found = json.loads(numbers.read_text())
    assert found["bundle_bytes"] == 2 * 32 * 4
    assert set(found["strategies"]) == set(load_devices())
    for rows in found["strategies"].values():
        assert set(rows) == set(CONTENDERS)
        assert rows["Ripple"]["ms_per_token"] <= rows["LLM in a Flash"]["ms_per_token"]

    timed = [
        Measurement(size=size, depth=8, requests=100, seconds=100 * max(1e-5, size / 1e9))
        for size in (4096, 65536)
    ]
    device = device_of(tmp_path)
    probed = DriveProfile(device=device, date="2026-01-01", direct=True, measurements=timed)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    for plots, profile in ((4, None), (5, probed)):
        if profile is not None:
            profile.save()
        run = CliRunner().invoke(app, ["report", *options, "--out", str(page), "--layer", "1"])
        assert run.exit_code == 0, run.output
        assert page.read_text().count("data:image/png;base64,") == plots
    html = page.read_text()
    assert "http" not in html.replace("https://arxiv.org", "")
    assert all(name in html for name in CONTENDERS)


@pytest.mark.parametrize(
    ("command", "options", "message"),
    [
        ("simulate", ["--device", "floppy"], "`device` must be one of"),
        ("simulate", ["--tokens", "100000"], "`tokens` must be positive and leave some"),
        ("simulate", ["--cache", "7"], "`cache` must be at least 0 and at most 1, got 7"),
        ("simulate", ["--cache", "some"], "`cache` must be a share such as"),
        ("simulate", ["--cache", "101%"], "`cache` must be at least 0 and at most 1, got 1.01"),
        ("simulate", ["--cache-policy", "lfu"], "`cache_policy` must be one of"),
        ("simulate", ["--bundles", "int3"], "`bundles` must be one of"),
        ("simulate", ["--devices", "nowhere.yaml"], "No such file: nowhere.yaml"),
        ("report", ["--layer", "9"], "`layer` must be from 0 to 1"),
    ],
)
def test_bad_options_are_named(command, options, message, traced):
    model, trace = traced
    run = CliRunner().invoke(app, [command, model, "--trace", trace, "--tokens", "64", *options])
    assert run.exit_code == 2
    assert message in run.output


def test_a_missing_library_is_named(traced, monkeypatch, tmp_path):
    import sys

    monkeypatch.setitem(sys.modules, "jinja2", None)
    model, trace = traced
    run = CliRunner().invoke(app, ["report", model, "--trace", trace, "--out", str(tmp_path / "x.html")])
    assert run.exit_code == 2
    assert "jinja2 is missing: pip install" in run.output


def test_the_cache_in_percent(traced, tmp_path):
    model, trace = traced
    written = []
    for number, cache in enumerate(("0.25", "25%")):
        out = tmp_path / f"{number}.json"
        options = ["--device", "ufs-4.0", "--tokens", "64", "--json", str(out), "--cache", cache]
        run = CliRunner().invoke(app, ["simulate", model, "--trace", trace, *options])
        assert run.exit_code == 0, run.output
        written.append(out.read_text())
    assert written[0] == written[1]


def test_any_registered_cache_policy_is_replayed(traced, tmp_path, monkeypatch):
    monkeypatch.setattr(CACHE_POLICIES, "_choices", dict(CACHE_POLICIES._choices))

    @CACHE_POLICIES.register("first")
    class FirstCache(NeuronCache):
        """The first neurons make room."""

        def victims(self, count):
            return self.evictable()[:count]

    (model, trace), out = traced, tmp_path / "numbers.json"
    given = [part for policy in ("first", *CACHE_POLICIES) for part in ("--cache-policy", policy)]
    options = ["--device", "ufs-4.0", "--tokens", "64", "--json", str(out), *given]
    run = CliRunner().invoke(app, ["simulate", model, "--trace", trace, *options])
    assert run.exit_code == 0, run.output
    rows = json.loads(out.read_text())["strategies"]["ufs-4.0"]
    assert set(rows) == {*CONTENDERS, *(f"Ripple, {policy} cache" for policy in CACHE_POLICIES)}
    assert rows["Ripple, linked cache"] == rows["Ripple"]
    assert rows["Ripple, first cache"]["hits"] > 0
