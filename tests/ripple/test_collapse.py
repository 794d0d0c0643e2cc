import itertools
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ripple_loader.storage.collapse import cheapest, fixed_gap, plan_reads, waves
from ripple_loader.storage.drive import DriveModel

PLACES = st.lists(st.integers(0, 300), min_size=1, max_size=80, unique=True).map(
    lambda places: np.array(sorted(places), np.int64)
)
WIDTHS = st.integers(1, 9000)
BLOCKS = st.sampled_from([512, 4096])
GAPS = st.sampled_from([0, 1, 4096, 20_000, 1 << 20])


def check(plan, base, width, block):
    """Bundles lie whole in the buffer where the plan says; ranges are whole blocks and do not overlap."""
    assert (plan.offsets % block == 0).all()
    assert (plan.lengths % block == 0).all()
    assert (plan.lengths > 0).all()
    assert (plan.offsets[1:] >= plan.offsets[:-1] + plan.lengths[:-1]).all()
    assert (plan.targets == np.cumsum(plan.lengths) - plan.lengths).all()
    for place, spot in zip(plan.places, plan.spots, strict=True):
        request = np.searchsorted(plan.targets, spot, side="right") - 1
        assert plan.offsets[request] + spot - plan.targets[request] == base + place * width
        assert spot + width <= plan.targets[request] + plan.lengths[request]


@settings(deadline=None)
@given(PLACES, WIDTHS, BLOCKS, GAPS)
def test_reads_cover_every_neuron(places, width, block, gap):
    plan = plan_reads(places, base=8192, width=width, block=block, collapse=fixed_gap(gap))
    check(plan, 8192, width, block)
    assert (plan.places == places).all()
    gaps = plan.offsets[1:] - plan.offsets[:-1] - plan.lengths[:-1]
    assert (gaps > gap).all()


@settings(deadline=None)
@given(PLACES, WIDTHS, BLOCKS, GAPS, st.integers(0, 20))
def test_waves_fit_the_buffer_and_cover_every_neuron(places, width, block, gap, blocks):
    capacity = -(-width // block) * block + (2 + blocks) * block
    plans = list(waves(places, capacity, base=4096, width=width, block=block, collapse=fixed_gap(gap)))
    assert (np.concatenate([plan.places for plan in plans]) == places).all()
    for plan in plans:
        assert plan.size <= capacity
        check(plan, 4096, width, block)


def test_no_neurons_need_no_reads():
    assert not list(waves(np.empty(0, np.int64), 4096, base=0, width=1, block=4096, collapse=fixed_gap(0)))


FEW = st.lists(st.integers(0, 40), min_size=1, max_size=9, unique=True).map(
    lambda places: np.array(sorted(places), np.int64)
)
DRIVES = st.builds(
    DriveModel,
    request_seconds=st.floats(1e-6, 1e-3),
    byte_seconds=st.floats(1e-10, 1e-7),
    latency=st.sampled_from([0.0, 1e-4]),
    norm=st.sampled_from([1.0, 2.0, math.inf]),
)


def seconds(model, plan):
    return model.seconds(len(plan.offsets), plan.size)


@settings(deadline=None)
@given(FEW, WIDTHS, BLOCKS, DRIVES)
def test_collapse_is_the_cheapest_of_all_sets_of_gaps(places, width, block, model):
    options = {"base": 4096, "width": width, "block": block}
    chosen = plan_reads(places, collapse=cheapest(model), **options)
    check(chosen, 4096, width, block)
    every = (
        plan_reads(places, collapse=lambda *_, gaps=gaps: np.array(gaps, bool), **options)
        for gaps in itertools.product([False, True], repeat=len(places) - 1)
    )
    assert seconds(model, chosen) == pytest.approx(min(seconds(model, plan) for plan in every))


@settings(deadline=None)
@given(PLACES, WIDTHS, BLOCKS)
def test_one_read_where_requests_are_dear_and_no_gap_where_bytes_are(places, width, block):
    options = {"base": 4096, "width": width, "block": block}
    slow = cheapest(DriveModel(request_seconds=1.0, byte_seconds=1e-12))
    assert len(plan_reads(places, collapse=slow, **options).offsets) == 1
    narrow = cheapest(DriveModel(request_seconds=1e-12, byte_seconds=1.0))
    plan, without = (plan_reads(places, collapse=how, **options) for how in (narrow, fixed_gap(0)))
    assert (plan.offsets == without.offsets).all()


def test_neurons_are_read_in_order_where_gathering_them_takes_longer_than_reading():
    places, model = np.arange(0, 100, 2), DriveModel(request_seconds=1e-6, byte_seconds=1e-12)
    options = {"base": 0, "width": 4096, "block": 4096}
    assert len(plan_reads(places, collapse=cheapest(model, computing=(0.1, 1e-6)), **options).offsets) == 1
    model = DriveModel(request_seconds=1e-6, byte_seconds=1e-6)
    assert len(plan_reads(places, collapse=cheapest(model, computing=(0.1, 0.2)), **options).offsets) == 50
