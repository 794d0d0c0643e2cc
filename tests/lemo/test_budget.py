from __future__ import annotations

import dataclasses
import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lemo_trainer import LemoConfig
from lemo_trainer.offline.budget import GRID, Budget, LayerThreshold, choose
from lemo_trainer.offline.step_cost import Setup, predict

from .tiny import tiny_model

points = st.tuples(st.floats(0.05, 0.95), st.floats(-0.1, 1.0))
layers = st.lists(st.lists(points, max_size=3), min_size=1, max_size=4)


def loss_of(choice):
    return sum(point.loss_increase for point in choice)


def best(curves, budget):
    """The least loss within the budget, by trying everything."""
    options = [[(), *((point,) for point in each)] for each in curves.values()]
    choices = (tuple(itertools.chain(*each)) for each in itertools.product(*options))
    return min(loss_of(choice) for choice in choices if budget.cost(choice) <= budget.limit + 1e-12)


@settings(deadline=None, max_examples=40)
@given(layers, st.floats(0.0, 1.0))
def test_a_choice_meets_the_budget_and_none_that_does_loses_less(drawn, tightness):
    curves = {
        layer: [LayerThreshold(layer, 1.0, share, increase) for share, increase in each]
        for layer, each in enumerate(drawn)
    }
    least = (min((point.kept_share for point in each), default=1.0) for each in curves.values())
    cheapest = sum(least) / len(drawn)
    budget = Budget.of_shares(cheapest + tightness * (1 - cheapest), len(drawn))
    choice = choose(curves, budget)
    assert len({point.layer for point in choice}) == len(choice)
    assert budget.cost(choice) <= budget.limit + 1e-9
    room = budget.limit - cheapest
    tighter = dataclasses.replace(budget, limit=budget.limit - len(drawn) * room / GRID)
    assert loss_of(choice) <= best(curves, tighter) + 1e-9


def test_a_budget_that_cannot_be_met_names_the_nearest():
    curves = {0: [LayerThreshold(0, 1.0, 0.5, 0.1)], 1: [LayerThreshold(1, 1.0, 0.25, 0.1)]}
    with pytest.raises(ValueError, match=r"a mean kept share of 30\.0%; the cheapest takes .* of 37\.5%"):
        choose(curves, Budget.of_shares(0.3, 2))


@pytest.mark.parametrize("limit", [{"flops_share": 0.8}, {"memory": 1e6}])
def test_a_step_costs_what_is_predicted_for_it(limit):
    config = LemoConfig(mode="eliminate", selector="norm", layers="all", block_size=4, sink_blocks=0)
    setup = Setup(model_config=tiny_model(layers=4).config, seq_len=64)
    budget = Budget.of_step(setup, config, checkpointing=False, **limit)
    share = 0.4375  # none of those that were predicted
    rows = [LayerThreshold(layer, 1.0, share, 0.0) for layer in range(4)]
    step = predict(setup, dataclasses.replace(config, keep_ratio=share), checkpointing=False, repeats=0)
    wanted = step.flops if "flops_share" in limit else step.peak_bytes
    assert budget.cost(rows) == pytest.approx(wanted, rel=0.02)


@pytest.mark.parametrize(
    ("options", "limits", "message"),
    [
        ({}, {"flops_share": 1.5}, "`fit_flops` must be above 0 and at most 1, got 1.5"),
        ({}, {}, "Give one of `memory` and `flops_share`"),
        ({"block_size": 64}, {"flops_share": 0.5}, "`seq_len` must hold blocks to leave out"),
    ],
)
def test_a_budget_that_says_nothing_is_refused(options, limits, message):
    config = LemoConfig(mode="eliminate", **options)
    setup = Setup(model_config=tiny_model().config, seq_len=64)
    with pytest.raises(ValueError, match=message):
        Budget.of_step(setup, config, checkpointing=False, **limits)
