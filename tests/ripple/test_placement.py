import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ripple_loader import ReorderConfig
from ripple_loader.coactivation import coactivation
from ripple_loader.placement import expected_reads, greedy_linking, place

SETS = st.tuples(st.integers(1, 40), st.integers(0, 30), st.integers(0, 1 << 30)).map(
    lambda shape: np.random.default_rng(shape[2]).random((shape[1], shape[0])) < 0.3
)


@settings(max_examples=60)
@given(SETS, st.sampled_from(["identity", "random", "frequency", "linked"]), st.integers(1, 50))
def test_every_placement_is_a_permutation(active, placement, partners):
    neurons = active.shape[1]
    config = ReorderConfig(placement=placement, partners=partners)
    order = place(np.packbits(active, axis=1), neurons, 0, config)
    assert sorted(order.tolist()) == list(range(neurons))


@given(SETS, st.integers(1, 50))
def test_coactivation_counts_pairs(active, partners):
    graph = coactivation(np.packbits(active, axis=1), active.shape[1], partners)
    counts = active.astype(int).T @ active.astype(int)
    assert (graph.first < graph.second).all()
    assert (graph.count == counts[graph.first, graph.second]).all()
    assert (np.diff(graph.count) <= 0).all()
    pairs = set(zip(graph.first.tolist(), graph.second.tolist(), strict=True))
    assert len(pairs) == len(graph.first)
    if partners >= active.shape[1] - 1:
        both = {pair for pair in itertools.combinations(range(active.shape[1]), 2) if counts[pair]}
        assert pairs == both


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
    order = greedy_linking(sets, 96, 8)
    linked = (shuffle // 8)[order]
    assert np.count_nonzero(np.diff(linked)) == 11  # each group in one piece
    assert expected_reads(sets, order) < 0.3 * expected_reads(sets, np.arange(96))


def test_frequency_sorts_by_how_often_a_neuron_is_active():
    active = np.array([[0, 1, 1], [0, 0, 1], [1, 0, 1], [0, 1, 0]], bool)
    order = place(np.packbits(active, axis=1), 3, 0, ReorderConfig(placement="frequency"))
    assert order.tolist() == [2, 1, 0]


def test_random_orders_differ_between_layers_and_repeat_with_the_seed():
    sets = np.zeros((1, 8), np.uint8)
    config = ReorderConfig(placement="random", seed=3)
    first, again, other = (place(sets, 64, layer, config) for layer in (0, 0, 1))
    assert (first == again).all()
    assert (first != other).any()
