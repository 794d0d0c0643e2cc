import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from ripple_loader.access import plan_reads, waves

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
    plan = plan_reads(places, base=8192, width=width, block=block, merge_gap=gap)
    check(plan, 8192, width, block)
    assert (plan.places == places).all()
    gaps = plan.offsets[1:] - plan.offsets[:-1] - plan.lengths[:-1]
    assert (gaps > gap).all()


@settings(deadline=None)
@given(PLACES, WIDTHS, BLOCKS, GAPS, st.integers(0, 20))
def test_waves_fit_the_buffer_and_cover_every_neuron(places, width, block, gap, blocks):
    capacity = -(-width // block) * block + (2 + blocks) * block
    plans = list(waves(places, capacity, base=4096, width=width, block=block, merge_gap=gap))
    assert (np.concatenate([plan.places for plan in plans]) == places).all()
    for plan in plans:
        assert plan.size <= capacity
        check(plan, 4096, width, block)


def test_no_neurons_need_no_reads():
    assert not list(waves(np.empty(0, np.int64), 4096, base=0, width=1, block=4096, merge_gap=0))
