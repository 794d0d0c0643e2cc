"""A toy rule and a toy kernel, added through the public points: the files and lines that a new one needs."""

from dataclasses import replace

import pytest
import torch

import ollie_compile
from ollie_compile import rules, targets
from ollie_compile.config import OllieConfig
from ollie_compile.expr import Affine, Input, parse
from ollie_compile.lower.layouts import is_lowerable, programs
from ollie_compile.measure.machine import Machine
from ollie_compile.plan import entries, saved
from ollie_compile.plan.candidates import Candidate, Plan
from ollie_compile.plan.checks import check_program
from ollie_compile.problems.operators import Layout, Subprogram
from ollie_compile.search.hybrid import Derivation, search
from ollie_compile.search.proof import check_derivation
from ollie_compile.targets import Kernel
from ollie_compile.targets.views import whole_iterators

CPU = torch.device("cpu")


def reversed_sum(scope):
    """Sum[k] f(k) -> Sum[k] f(last - k), for the first summation iterator."""
    for loop in scope.summation[:1]:
        reversed_index = {loop.name: Affine.of(loop.name) * -1 + (loop.low + loop.high - 1)}
        yield scope.over(
            factors=scope.map_index(
                lambda index: index.substitute(reversed_index, scope.ranges)  # noqa: B023
            )
        )


class RowSums(Kernel):
    """O[i] = Sum[k] A[i, k] by torch's own sum, of any number of terms."""

    family, title, sole = "toy", "row sums by torch", True

    def match(self, scope, layout):
        if len(scope.factors) != 1 or len(scope.traversal) != 1 or len(scope.summation) != 1:
            return None
        (read,) = scope.factors
        names = whole_iterators(scope, read, range(len(read.index)))
        return read if names == [scope.traversal[0].name, scope.summation[0].name] else None

    def call(self, match, scope, lowering):
        return lowering.value(match).sum(-1)


@pytest.fixture
def toy_rule():
    before = dict(rules.EXPLORATIVE)
    rules.register("reversed sum", reversed_sum)
    yield
    rules.EXPLORATIVE.clear()
    rules.EXPLORATIVE.update(before)


@pytest.fixture
def toy_kernel():
    before = list(targets.KERNELS)
    targets.register(RowSums())
    yield
    targets.KERNELS[:] = before


def window():
    return parse("L[h:0..6] Sum[k:0..3] A[h + k] * K[k]", {"A": Input("A", (8,)), "K": Input("K", (3,))})


def sums(terms=200):
    return parse(f"L[i:0..4] Sum[k:0..{terms}] A[i, k]", {"A": Input("A", (4, terms))})


def operator():
    """The sums as a subprogram: more terms than plain aten writes out."""
    graph = torch.fx.symbolic_trace(lambda a: a.sum(-1))
    return Subprogram(
        kind="sums",
        scope=sums(),
        side=0,
        layouts=(("A", Layout((4, 200), (200, 1))),),
        outputs=(Layout((4,), (1,)),),
        parameters=(),
        numbers=(),
        dtype=torch.float32,
        device=CPU,
        steps=1,
        declared=False,
        graph=graph,
    )


def test_a_rule_is_explored_and_proved(toy_rule):
    found = search(window(), max_depth=1, budget_s=60.0).derivations
    steps = [step for derivation in found for step in derivation.steps if "reversed sum" in step.rules]
    assert steps
    assert all(check_derivation(window(), step.scope) is None for step in steps)
    with pytest.raises(ValueError, match="must have a name of its own, got 'reversed sum'"):
        rules.register("reversed sum", reversed_sum)


def test_a_kernel_computes_what_nothing_else_does(toy_kernel):
    targets.KERNELS.pop()
    assert not is_lowerable(sums())
    targets.register(RowSums())
    assert is_lowerable(sums())
    (program,) = programs(sums(), CPU)
    assert str(program) == "rows, row sums by torch"
    assert check_program(operator(), program) is None
    assert Machine().bound_seconds(program, torch.float32, CPU) > 0
    assert programs(sums(), CPU, portable=True) == []
    with pytest.raises(ValueError, match="must have a title of its own"):
        targets.register(RowSums())


def test_a_kernel_is_written_down_and_read_back(toy_kernel):
    (program,) = programs(sums(), CPU)
    plan = Plan(operator(), 1.0, winner=Candidate(program, Derivation(program.scope)))
    written = entries.plain(plan)
    assert written["winner"]["kernels"] == "toy"
    assert entries.plan(written, operator()).winner.program == program
    assert saved.entry_name(operator(), OllieConfig()) is None  # a user's code may be another next time
    targets.KERNELS.pop()
    with pytest.raises(ValueError, match="`kernels` must be a family of kernels, got 'toy'"):
        entries.plan(written, operator())


@pytest.mark.usefixtures("fresh", "always_rewrite", "toy_kernel")
def test_a_kernel_wins_in_a_graph():
    @ollie_compile.operator("O[i] += A[i, k]")
    def toy_row_sums(a):
        return a.sum(1)

    x = torch.randn(4, 200)
    options = {"tune": "model", "margin": 0.0, "budget_s": 120}
    report = ollie_compile.explain(lambda x: toy_row_sums(x).relu(), x, **options)
    assert report.rewritten == 1, str(report)
    assert "products as rows, row sums by torch" in str(report)
    with torch.no_grad():
        got = torch.compile(lambda x: toy_row_sums(x).relu(), backend="ollie", options=options)(x)
    torch.testing.assert_close(got, x.sum(1).relu())


def test_a_kernel_that_is_wrong_is_found_out(toy_kernel):
    class Wrong(RowSums):
        title = "row sums of twice as much"

        def call(self, match, scope, lowering):
            return 2 * super().call(match, scope, lowering)

    targets.KERNELS[-1] = Wrong()
    (program,) = programs(sums(), CPU)
    assert "differs by" in check_program(operator(), replace(program))
