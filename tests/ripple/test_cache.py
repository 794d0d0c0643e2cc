import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ripple_loader.format.profile import cache_shares
from ripple_loader.online.cache import make_cache
from ripple_loader.registry import CACHE_POLICIES

POLICIES = list(CACHE_POLICIES)
STEPS = st.lists(
    st.lists(st.integers(0, 39), unique=True, max_size=40).map(lambda p: np.array(sorted(p), np.int64)),
    max_size=30,
)


@pytest.mark.parametrize("policy", POLICIES)
@settings(deadline=None)
@given(steps=STEPS, capacity=st.integers(1, 40), pinned=st.integers(0, 40))
def test_slots_always_hold_the_neuron_they_are_said_to_hold(policy, steps, capacity, pinned):
    assert_slots_hold_their_neurons(policy, steps, capacity, min(pinned, capacity))


def assert_slots_hold_their_neurons(policy, steps, capacity, pinned):
    cache, contents = make_cache(policy, 40, capacity, pinned), np.full(capacity, -1)
    contents[:pinned] = np.arange(pinned)
    for places in steps:
        slots = cache.lookup(places)
        hit = slots >= 0
        assert (contents[slots[hit]] == places[hit]).all()
        missed = places[~hit]
        admission = cache.offer(missed)
        assert len(set(admission.slots.tolist())) == len(admission.slots) == len(admission.index)
        contents[admission.slots] = missed[admission.index]
        resident = np.flatnonzero(cache.lookup(np.arange(40)) >= 0)
        assert len(resident) <= capacity
        assert set(range(pinned)) <= set(resident.tolist())
        assert set(missed[admission.index].tolist()) <= set(resident.tolist())


@pytest.mark.parametrize("policy", ["linked", "s3fifo", "lru"])
def test_neurons_used_all_the_time_stay(policy):
    random, cache, hot = np.random.default_rng(0), make_cache(policy, 1000, 100), np.arange(0, 80, 2)
    hits = 0
    for step in range(60):
        cold = 100 + random.choice(900, 40, replace=False)
        places = np.unique(np.concatenate([hot, cold]))
        slots = cache.lookup(places)
        hits += int((slots[: len(hot)] >= 0).sum()) if step >= 10 else 0
        cache.offer(places[slots < 0])
    assert hits > 0.9 * 50 * len(hot)


def test_a_linked_cache_keeps_its_neurons_through_a_scan_of_everything():
    cache = make_cache("linked", 1000, 100)
    hits = 0
    for _ in range(20):
        slots = cache.lookup(np.arange(1000))
        hits += int((slots >= 0).sum())
        cache.offer(np.flatnonzero(slots < 0))
    assert hits == 19 * 100


def test_a_linked_cache_admits_single_neurons_and_short_runs_before_long_ones():
    cache = make_cache("linked", 1000, 200)
    cache.offer(np.arange(200))
    single, run = np.arange(300, 340, 2), np.arange(400, 418)
    admitted = np.zeros(1000, int)
    for _ in range(100):
        places = np.concatenate([single, run])
        places = places[cache.lookup(places) < 0]
        admitted[places[cache.offer(places).index]] += 1
        cache.offer(np.random.default_rng(0).permutation(np.arange(500, 1000, 2)))  # others push them out
    assert admitted[single].min() > 0
    assert admitted[run].max() == admitted[run].min() < admitted[single].mean() / 3


@pytest.mark.parametrize("policy", POLICIES)
def test_the_index_takes_no_more_than_it_is_charged_for(policy):
    assert_index_is_charged(policy)


def assert_index_is_charged(policy):
    cache = make_cache(policy, 1000, 1000)
    arrays = [value for value in vars(cache).values() if isinstance(value, np.ndarray)]
    assert sum(array.nbytes for array in arrays) <= 1000 * cache.index_bytes


@given(
    uses=st.lists(st.lists(st.integers(0, 9), min_size=5, max_size=5).map(np.array), min_size=1, max_size=4),
    slots=st.integers(0, 25),
)
def test_shares_hold_the_most_used_neurons_and_never_exceed_the_slots(uses, slots):
    shares = cache_shares(uses, slots)
    assert sum(shares) == min(slots, 5 * len(uses))
    kept = sum(int(np.sort(one)[::-1][:share].sum()) for one, share in zip(uses, shares, strict=True))
    assert kept == np.sort(np.concatenate(uses))[::-1][:slots].sum()


@pytest.mark.parametrize("policy", POLICIES)
def test_a_cache_without_slots_admits_nothing(policy):
    cache = make_cache(policy, 10, 0)
    assert (cache.lookup(np.arange(10)) == -1).all()
    assert len(cache.offer(np.arange(10)).index) == 0
