import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from ripple_loader.access import plan_reads, waves
from ripple_loader.sidecar import BLOCK

PLACES = st.lists(st.integers(0, 300), min_size=1, max_size=80, unique=True).map(
    lambda places: np.array(sorted(places), np.int64)
)
SHAPES = st.tuples(st.integers(1, 9000), st.integers(0, 500))
GAPS = st.sampled_from([0, 1, 4096, 20_000, 1 << 20])


def check(plan, base, stride, width):
    """Bundles lie whole in the buffer where the plan says; ranges are whole blocks and do not overlap."""
    assert (plan.offsets % BLOCK == 0).all()
    assert (plan.lengths % BLOCK == 0).all()
    assert (plan.lengths > 0).all()
    assert (plan.offsets[1:] >= plan.offsets[:-1] + plan.lengths[:-1]).all()
    assert (plan.targets == np.cumsum(plan.lengths) - plan.lengths).all()
    for place, spot in zip(plan.places, plan.spots, strict=True):
        request = np.searchsorted(plan.targets, spot, side="right") - 1
        assert plan.offsets[request] + spot - plan.targets[request] == base + place * stride
        assert spot + width <= plan.targets[request] + plan.lengths[request]


@given(PLACES, SHAPES, GAPS)
def test_reads_cover_every_neuron(places, shape, gap):
    width, padding = shape
    plan = plan_reads(places, base=2 * BLOCK, stride=width + padding, width=width, merge_gap=gap)
    check(plan, 2 * BLOCK, width + padding, width)
    assert (plan.places == places).all()
    gaps = plan.offsets[1:] - plan.offsets[:-1] - plan.lengths[:-1]
    assert (gaps > gap).all()


@given(PLACES, SHAPES, GAPS, st.integers(0, 20))
def test_waves_fit_the_buffer_and_cover_every_neuron(places, shape, gap, blocks):
    width, padding = shape
    capacity = -(-width // BLOCK) * BLOCK + (2 + blocks) * BLOCK
    plans = list(waves(places, capacity, base=BLOCK, stride=width + padding, width=width, merge_gap=gap))
    assert (np.concatenate([plan.places for plan in plans]) == places).all()
    for plan in plans:
        assert plan.size <= capacity
        check(plan, BLOCK, width + padding, width)


def test_no_neurons_need_no_reads():
    assert not list(waves(np.empty(0, np.int64), BLOCK, base=0, stride=1, width=1, merge_gap=0))
