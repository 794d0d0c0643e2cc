import itertools

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from ripple_loader import ReorderConfig
from ripple_loader.offline.coactivation import Activity, coactivation
from ripple_loader.offline.linking import greedy_linking
from ripple_loader.offline.orders import expected_reads, hot_neurons, most_active
from ripple_loader.offline.placement import place
from ripple_loader.offline.two_opt import two_opt
from ripple_loader.registry import PLACEMENTS

SETS = st.tuples(st.integers(1, 40), st.integers(0, 30), st.integers(0, 1 << 30)).map(
    lambda shape: np.random.default_rng(shape[2]).random((shape[1], shape[0])) < 0.3
)


@settings(max_examples=60, deadline=None)
@given(SETS, st.sampled_from(list(PLACEMENTS)), st.integers(1, 50), st.sampled_from([0.0, 0.3, 1.0]))
@example(np.array([[False], [True]]), "linked", 1, 1.0)
@example(np.ones((3, 9), bool), "spectral", 2, 0.3)
def test_every_placement_is_a_permutation_with_the_hot_neurons_first(active, placement, partners, share):
    neurons = active.shape[1]
    config = ReorderConfig(placement=placement, partners=partners)
    hot = round(share * neurons)
    placed = place(np.packbits(active, axis=1), neurons, 0, config, hot)
    assert sorted(placed.order.tolist()) == list(range(neurons))
    if placement in ("identity", "random"):
        assert placed.hot == 0
    else:
        assert placed.hot == hot
        chosen = np.flatnonzero(most_active(active.sum(0), hot))
        assert set(placed.order[:hot].tolist()) == set(chosen.tolist())


def test_hot_neurons_are_the_most_active_of_all_mlps():
    uses = [np.array([9, 1, 8, 0]), np.array([2, 7, 3, 1])]
    assert hot_neurons(uses, 3 / 8) == [2, 1]
    assert hot_neurons(uses, 0.0) == [0, 0]
    assert hot_neurons(uses, 1.0) == [3, 4]  # what is never active is not kept
    assert most_active(uses[0], 2).tolist() == [True, False, True, False]


@settings(deadline=None)
@given(SETS, st.integers(1, 50))
def test_coactivation_counts_pairs(active, partners):
    graph = coactivation(Activity(np.packbits(active, axis=1), active.shape[1]), partners)
    counts = active.astype(int).T @ active.astype(int)
    assert (graph.first < graph.second).all()
    assert (graph.count == counts[graph.first, graph.second]).all()
    assert (np.diff(graph.count) <= 0).all()
    pairs = set(zip(graph.first.tolist(), graph.second.tolist(), strict=True))
    assert len(pairs) == len(graph.first)
    if partners >= active.shape[1] - 1:
        both = {pair for pair in itertools.combinations(range(active.shape[1]), 2) if counts[pair]}
        assert pairs == both


@settings(deadline=None)
@given(SETS)
def test_expected_reads_are_runs(active):
    neurons = active.shape[1]
    order = np.random.default_rng(0).permutation(neurons)
    runs = [sum(key for key, _ in itertools.groupby(row[order].tolist())) for row in active]
    got = expected_reads(np.packbits(active, axis=1), order)
    assert got == pytest.approx(np.mean(runs) if runs else 0)


def test_linking_puts_groups_that_fire_together_side_by_side():
    random = np.random.default_rng(0)
    groups = random.random((400, 12)) < 0.3
    active = groups.repeat(8, axis=1)[:, (shuffle := random.permutation(96))]
    sets = np.packbits(active, axis=1)
    activity = Activity(sets, 96)
    order = greedy_linking(activity, np.arange(96), 8, coactivation(activity, 8))
    linked = (shuffle // 8)[order]
    assert np.count_nonzero(np.diff(linked)) == 11  # each group in one piece
    assert expected_reads(sets, order) < 0.3 * expected_reads(sets, np.arange(96))


def test_frequency_sorts_by_how_often_a_neuron_is_active():
    active = np.array([[0, 1, 1], [0, 0, 1], [1, 0, 1], [0, 1, 0]], bool)
    placed = place(np.packbits(active, axis=1), 3, 0, ReorderConfig(placement="frequency"), 0)
    assert placed.order.tolist() == [2, 1, 0]


def test_random_orders_differ_between_layers_and_repeat_with_the_seed():
    sets = np.zeros((1, 8), np.uint8)
    config = ReorderConfig(placement="random", seed=3)
    first, again, other = (place(sets, 64, layer, config, 0).order for layer in (0, 0, 1))
    assert (first == again).all()
    assert (first != other).any()


@settings(deadline=None)
@given(SETS, st.integers(2, 8))
def test_a_sample_of_the_tokens_only_proposes_partners(active, partners):
    neurons = active.shape[1]
    graph = coactivation(
        Activity(np.packbits(active, axis=1), neurons), partners, sample=len(active) // 2 + 1
    )
    counts = active.astype(int).T @ active.astype(int)
    assert (graph.count == counts[graph.first, graph.second]).all()
    assert (np.diff(graph.count) <= 0).all()
    assert len(graph.first) <= neurons * partners


def test_a_sample_finds_nearly_the_same_order():
    random = np.random.default_rng(0)
    groups = random.random((2000, 30)) < 0.2
    active = groups.repeat(10, axis=1)[:, random.permutation(300)] & (random.random((2000, 300)) < 0.8)
    sets, everyone = np.packbits(active, axis=1), np.arange(300)
    activity = Activity(sets, 300)
    whole, sampled = (coactivation(activity, 12, sample=sample) for sample in (2000, 250))
    assert whole.count.sum() * 0.97 < sampled.count.sum()
    reads = expected_reads(sets, greedy_linking(activity, everyone, 12, sampled))
    assert reads < 0.5 * expected_reads(sets, everyone)


@settings(deadline=None)
@given(SETS, st.integers(1, 20))
def test_two_opt_never_adds_reads_to_what_it_was_given(active, partners):
    neurons = active.shape[1]
    sets = np.packbits(active, axis=1)
    activity = Activity(sets, neurons)
    before = np.random.default_rng(1).permutation(neurons)
    after = two_opt(before, activity, coactivation(activity, partners))
    assert sorted(after.tolist()) == list(range(neurons))
    assert expected_reads(sets, after) <= expected_reads(sets, before)


def test_two_opt_untangles_a_path():
    active = np.zeros((59, 60), bool)
    active[range(59), range(59)] = active[range(59), range(1, 60)] = True  # token t: neurons t and t + 1
    activity = Activity(np.packbits(active, axis=1), 60)
    tangled = np.r_[0:10, 39:9:-1, 40:60]
    untangled = two_opt(tangled, activity, coactivation(activity, 2))
    assert (np.diff(untangled) == 1).all() or (np.diff(untangled) == -1).all()


def test_the_spectral_order_unrolls_a_chain_of_groups():
    random = np.random.default_rng(0)
    centre = random.uniform(0, 200, 3000)
    position = random.permutation(200)
    active = abs(position[None] - centre[:, None]) < 10
    sets = np.packbits(active, axis=1)
    order = place(sets, 200, 0, ReorderConfig(placement="spectral", two_opt=False), 0).order
    assert expected_reads(sets, order) < 1.2


def test_hot_neurons_are_left_out_of_expected_reads():
    active = np.array([[1, 0, 1, 0, 1], [1, 1, 0, 0, 1]], bool)
    sets = np.packbits(active, axis=1)
    assert expected_reads(sets, np.arange(5)) == 2.5
    assert expected_reads(sets, np.arange(5), active.all(0)) == 1
