import json
import math
from dataclasses import asdict, replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ripple_loader.storage.collapse import cheapest, plan_reads
from ripple_loader.storage.drive import (
    DEFAULT,
    NORMS,
    DriveModel,
    DriveProfile,
    Measurement,
    device_of,
    fit,
    profile_path,
)
from ripple_loader.storage.meter import Meter
from ripple_loader.storage.probing import SIZES, describe, probe

from .conftest import load, token_ids

MODELS = st.builds(
    DriveModel,
    request_seconds=st.floats(1e-6, 1e-3),
    byte_seconds=st.floats(1e-10, 1e-7),
    norm=st.sampled_from(NORMS),
)


def timings(model, sizes=SIZES, depth=16, noise=0.0):
    random = np.random.default_rng(0)
    return [
        Measurement(
            size=size,
            depth=depth,
            requests=100,
            seconds=float(model.seconds(100, 100 * size)) * random.uniform(1, 1 + noise),
        )
        for size in sizes
    ]


@settings(deadline=None)
@given(MODELS, st.sampled_from([SIZES, SIZES[::2]]))
def test_a_fit_explains_a_drive_that_is_as_the_model_says(model, sizes):
    found = fit(timings(model, sizes), latency=0.0, source="")
    assert found.error < 0.05
    for size in sizes:
        assert found.seconds(10, 10 * size) == pytest.approx(model.seconds(10, 10 * size), rel=0.1)


@settings(deadline=None)
@given(MODELS, st.floats(0, 2))
def test_a_noisy_drive_still_has_two_positive_costs(model, noise):
    found = fit(timings(model, noise=noise), latency=0.0, source="")
    assert found.request_seconds > 0
    assert found.byte_seconds > 0


@settings(deadline=None)
@given(MODELS, st.integers(1, 1000), st.integers(0, 1 << 30), st.integers(0, 100))
def test_more_requests_or_bytes_never_take_less(model, requests, size, more):
    assert model.seconds(requests + more, size) >= model.seconds(requests, size)
    assert model.seconds(requests, size + more) >= model.seconds(requests, size)


@settings(deadline=None)
@given(MODELS, st.floats(0.2, 12), st.sampled_from([(1, 4 << 20), (400, 3 << 20), (400, 400 << 12)]))
def test_the_meter_follows_a_drive_that_changes_its_speed(model, slower, reads):
    meter = Meter(model)
    for _ in range(150):
        meter.observe(*reads, float(model.seconds(*reads)) * slower)
    assert meter.model.seconds(*reads) == pytest.approx(slower * model.seconds(*reads), rel=0.1)


def test_the_meter_corrects_the_cost_that_was_wrong():
    truth = DriveModel(request_seconds=1e-4, byte_seconds=1e-9)
    meter = Meter(replace(truth, request_seconds=1e-5))
    for number in range(400):
        reads = (400, 2 << 20) if number % 2 else (8, 8 << 20)
        meter.observe(*reads, float(truth.seconds(*reads)))
    assert meter.model.request_seconds == pytest.approx(1e-4, rel=0.1)
    assert meter.model.byte_seconds == pytest.approx(1e-9, rel=0.1)


@pytest.mark.parametrize(("requests", "size"), [(5.0, 1.0), (1.0, 5.0), (10.0, 10.0), (1.0, 1.0)])
def test_reads_become_nearly_the_cheapest_on_a_drive_that_is_not_as_probed(requests, size):
    probed = DriveModel(request_seconds=1.2e-5, byte_seconds=5e-10)
    truth = DriveModel(
        request_seconds=requests * probed.request_seconds, byte_seconds=size * probed.byte_seconds
    )
    meter, random, took, least = Meter(probed), np.random.default_rng(0), [], []
    for _ in range(500):
        places = np.sort(random.choice(1536, 768, replace=False))
        plan, best = (
            plan_reads(places, base=0, width=6912, block=512, collapse=cheapest(model))
            for model in (meter.next_model(), truth)
        )
        took.append(float(truth.seconds(len(plan.offsets), plan.size)))
        least.append(float(truth.seconds(len(best.offsets), best.size)))
        meter.observe(len(plan.offsets), plan.size, took[-1])
    assert sum(took[-160:]) < 1.1 * sum(least[-160:])


def test_a_busy_processor_is_not_a_slow_drive():
    meter, random = Meter(DEFAULT), np.random.default_rng(0)
    for _ in range(3000):
        reads = int(random.integers(1, 60)), 1 << int(random.integers(12, 23))
        meter.observe(*reads, float(DEFAULT.seconds(*reads)) + random.exponential(5e-4))
    assert max(meter.factors) < 1.9
    assert min(meter.factors) > 0.6


def test_a_hiccup_is_not_a_new_drive():
    meter = Meter(DEFAULT)
    meter.observe(100, 1 << 20, 1e6)
    assert max(meter.factors) < 2


@pytest.fixture
def profile():
    model = DriveModel(request_seconds=1e-5, byte_seconds=1e-9)
    found = [m for depth in (1, 32) for m in timings(model, depth=depth)]
    return DriveProfile(device="disk 1:2", date="2026-01-01T00:00:00", direct=True, measurements=found)


def test_a_profile_survives_saving(profile):
    assert DriveProfile.load(profile.save()) == profile
    assert profile.at(20).depth == 32
    assert profile.at(2).latency == pytest.approx(1e-5 + 4096e-9)


def replaced(profile, **change):
    return json.dumps(asdict(profile) | change)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{",
        "[]",
        "null",
        "[" * 100_000,
        lambda p: replaced(p, version=99),
        lambda p: replaced(p, measurements=[]),
        lambda p: replaced(p, measurements=[asdict(p.measurements[0]) | {"seconds": -1}]),
        lambda p: replaced(p, measurements=[asdict(p.measurements[0]) | {"size": "x"}]),
        lambda p: replaced(p, measurements=[asdict(m) | {"seconds": math.nan} for m in p.measurements]),
        lambda p: replaced(p, colour="red"),
    ],
)
def test_a_profile_of_nonsense_is_refused_and_ignored_at_load(text, profile, reordered, monkeypatch):
    path = profile_path(device_of(reordered("llama")))
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text if isinstance(text, str) else text(profile))
    try:
        with pytest.raises(ValueError, match="is not a probe of a drive"):
            DriveProfile.load(path)
        with pytest.warns(UserWarning, match="it is ignored"):
            model = load(reordered("llama"))
        assert str(path) in model.ripple_report.fallbacks[0]
        assert "not measured" in model.ripple_report.drive
    finally:
        path.unlink()


@torch.no_grad()
def test_a_probe_is_kept_and_used_at_load(reordered, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("ripple_loader.storage.probing._WRITTEN", 4 << 20)
    found = probe(tmp_path, seconds=0.05)
    assert list(tmp_path.iterdir()) == []
    assert found.depths == [1, 4, 16, 32, 64]
    describe(found)
    assert "fit error" in capsys.readouterr().out
    path = replace(found, device=device_of(reordered("llama"))).save()
    try:
        report = load(reordered("llama")).ripple_report
        assert f"probed {found.date[:10]}" in report.drive
        assert not report.fallbacks
    finally:
        path.unlink()


def test_what_cannot_be_probed(tmp_path):
    with pytest.raises(FileNotFoundError, match="does not exist"):
        probe(tmp_path / "no" / "where")
    with pytest.raises(ValueError, match="`seconds`"):
        probe(tmp_path, seconds=0)


@torch.no_grad()
def test_a_strategy_that_is_cheaper_is_taken_and_said(saved, reordered):
    """A model so small is read whole before a selection is made."""
    model = load(reordered("llama"), dram_budget="60KiB", keep=0.5, strategy="auto")
    assert "reads all neurons" in model.ripple_report.strategy
    assert model.ripple_report.resident["sketch"] == 0
    exact = load(reordered("llama"), dram_budget="60KiB")
    assert torch.equal(model(token_ids()).logits, exact(token_ids()).logits)


def test_a_bad_fit_is_told_of(capsys):
    """Reads that took longer with more in flight fit no model."""
    times = {(4096, 4): 1.0, (8192, 4): 0.01, (4096, 32): 0.01, (8192, 32): 0.02}
    measurements = [
        Measurement(size=size, depth=depth, requests=10, seconds=seconds)
        for (size, depth), seconds in times.items()
    ]
    profile = DriveProfile(device="d", date="2026-01-01", direct=True, measurements=measurements)
    assert profile.at(4).doubtful
    assert not profile.at(32).doubtful
    assert "whose fit is off by" in profile.at(4).summary()
    assert "fit" not in profile.at(32).summary()
    describe(profile)
    assert "the fit is off by more than 30% with 4 in flight" in capsys.readouterr().err
