"""Random programs give the values that they give in eager torch."""

from dataclasses import replace

import pytest
import torch

from ollie_compile.graph import derivation_pass
from tests.ollie import program_runs, programs

BATCH, ALL = 50, 2000
REWRITTEN = 0.6  # share of the programs with time to plan in which OLLIE must replace an operator

NAMED = {"options": programs.OPTIONS["forced"], "dynamic": False}


@pytest.mark.filterwarnings("ignore:ollie")  # compiled without freezing, where gradients are computed
@pytest.mark.parametrize(
    ("first", "small"),
    [(0, True), *(pytest.param(n, False, marks=pytest.mark.slow) for n in range(0, ALL, BATCH))],
)
def test_programs(first, small):
    rewritten = []
    for seed in range(first, first + BATCH):
        program = programs.draw(seed, small=small)
        outcome = program_runs.outcome(program)
        if outcome.wrong is not None:
            small = programs.shrunk(program, lambda smaller: program_runs.outcome(smaller).wrong is not None)
            pytest.fail(f"seed {seed}: {outcome.wrong}\n{program_runs.script(small)}")
        if program.named["options"]["budget_s"] == programs.AMPLE_S:
            rewritten.append(outcome.rewritten > 0)
    assert sum(rewritten) >= REWRITTEN * len(rewritten)


@pytest.mark.filterwarnings("ignore:ollie")
@pytest.mark.parametrize("seed", [0, 1])
def test_a_wrong_number_is_found(monkeypatch, seed):
    """Derived programs whose results are off by a thousandth are not taken for rounding."""
    splice = derivation_pass.splice

    def wrong(graph, *arguments):
        results = splice(graph, *arguments)
        return results and [_scaled(graph, node) for node in results]

    program = replace(programs.draw(seed, {"convolution", "plain"}), named=NAMED, style="forced")
    assert program_runs.outcome(program).wrong is None
    monkeypatch.setattr(derivation_pass, "splice", wrong)
    assert program_runs.outcome(program).wrong is not None


def _scaled(graph, node):
    with graph.inserting_after(node):
        scaled = graph.call_function(torch.ops.aten.mul.Tensor, (node, 1.001))
    scaled.meta = dict(node.meta)
    node.replace_all_uses_with(scaled, delete_user_cb=lambda user: user is not scaled)
    return scaled
