"""Random programs give the values that they give in eager torch."""

import runpy
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


@pytest.fixture
def off_by_a_thousandth(monkeypatch):
    """Derived programs whose results are wrong."""
    splice = derivation_pass.splice

    def wrong(graph, *arguments):
        results = splice(graph, *arguments)
        return results and [_scaled(graph, node) for node in results]

    return lambda: monkeypatch.setattr(derivation_pass, "splice", wrong)


def plain_program(seed):
    """A program of convolutions that are rewritten."""
    drawn = programs.draw(seed, {"convolution", "plain"}, small=True)
    return replace(drawn, named=NAMED, style="forced", wide=False)


@pytest.mark.filterwarnings("ignore:ollie")
@pytest.mark.parametrize("seed", [0, 1])
def test_a_wrong_number_is_found(off_by_a_thousandth, seed):
    """Derived programs whose results are off by a thousandth are not taken for rounding."""
    program = plain_program(seed)
    assert program_runs.outcome(program).wrong is None
    off_by_a_thousandth()
    assert program_runs.outcome(program).wrong is not None


def test_a_program_goes_on_after_a_graph_break_in_front_of_a_lambda():
    source = """
import torch

def run(x):
    y = torch.vmap(lambda row: row * 2)(x)
    return y if y.sum().item() > -1e30 else x

def session(compiled):
    yield 'result', compiled(run)(torch.ones(2, 3))
"""
    (label, result) = program_runs.values(source, lambda f: torch.compile(f, backend="eager"))[-1]
    assert label == "result"
    assert result.tolist() == [[2.0] * 3] * 2


def test_rounding_does_not_change_signs():
    x = torch.tensor([[8.0, 0.01], [-4.0, 6.0]], dtype=torch.bfloat16)
    with program_runs.Noise(0):
        assert (x.square().mean(0) > 0).all()
        assert (torch.rms_norm(x, (2,)) - torch.rms_norm(x.double(), (2,))).abs().max() < 0.02
        assert (x @ x - x.double() @ x.double()).abs().max() > 0.1


@pytest.mark.filterwarnings("ignore:ollie")
def test_a_failing_program_is_shrunk_to_source_that_runs_alone(off_by_a_thousandth, tmp_path, capsys):
    off_by_a_thousandth()
    small = programs.shrunk(plain_program(0), lambda smaller: program_runs.outcome(smaller).wrong is not None)
    assert len(small.block) + len(small.outer) == 1
    assert not small.steps
    path = tmp_path / "failing.py"
    path.write_text(program_runs.script(small))
    runpy.run_path(str(path), run_name="__main__")
    shown = capsys.readouterr().out.splitlines()
    off = {line.split(" [")[0]: float(line.split("[")[1].split("]")[0].split(",")[0]) for line in shown}
    assert off["ollie last result"] > 1e-4
    assert off["inductor last result"] < 1e-5


def _scaled(graph, node):
    with graph.inserting_after(node):
        scaled = graph.call_function(torch.ops.aten.mul.Tensor, (node, 1.001))
    scaled.meta = dict(node.meta)
    node.replace_all_uses_with(scaled, delete_user_cb=lambda user: user is not scaled)
    return scaled
