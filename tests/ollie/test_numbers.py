"""Numbers out of range: what spreads, what overflows, and what loses digits next to large values."""

import itertools
import json

import pytest
import torch
from torch import nn
from torch._inductor.decomposition import select_decomp_table
from torch.fx.experimental.proxy_tensor import make_fx

from ollie_compile.backend import compile_with
from ollie_compile.config import OllieConfig
from ollie_compile.expr import Constant, Input, Read, Scope, parse
from ollie_compile.lower.layouts import programs
from ollie_compile.lower.lowering import Program
from ollie_compile.measure.machine import Machine
from ollie_compile.plan import exactness, planner
from ollie_compile.plan.candidates import Candidate, Plan
from ollie_compile.plan.checks import Checks
from ollie_compile.plan.context import Context
from ollie_compile.plan.magnitudes import MixedMagnitudes
from ollie_compile.plan.results import original, run
from ollie_compile.problems import subprograms
from ollie_compile.problems.gradients import Gradient
from ollie_compile.report.report import Report
from ollie_compile.rules import EXPLORATIVE, RELATING, applied, simplify
from ollie_compile.rules.bilinear import bilinear_decomposition, growth
from ollie_compile.search.hybrid import Derivation, search
from ollie_compile.search.proof import adds_the_same
from tests.ollie.strategies import operator


def subprograms_of(function, *inputs):
    """The subprograms of a function's graph."""
    traced = make_fx(function, select_decomp_table(), tracing_mode="fake")(*inputs)
    weights = frozenset(traced.graph.find_nodes(op="placeholder")[1:])
    return [operator for operator, _ in subprograms.find(traced.graph, weights)]


CPU = torch.device("cpu")
EXACT = OllieConfig(non_finite="exact")
TENSORS = {
    "X": Input("X", (6, 5)),
    "A": Input("A", (5, 4)),
    "B": Input("B", (4, 3)),
    "W": Input("W", (5, 3)),
    "Q": Input("Q", (8, 4)),
    "K": Input("K", (12, 4)),
}


def conv(taps=3, **options):
    shape = (taps,) if isinstance(taps, int) else taps
    return operator(torch.zeros(1, 3, 9, 8), torch.zeros(4, 3, *(shape * 2)[:2]), **options)


def transposed():
    return operator(torch.zeros(1, 3, 5, 6), torch.zeros(3, 2, 4, 4), stride=2, padding=1, transposed=True)


def derived(rule, scope):
    """What a rule derives from an expression, or from one below it, simplified."""
    found = [simplify(one)[0] for one in applied(scope, (EXPLORATIVE | RELATING)[rule])]
    assert found, f"{rule} derives nothing"
    return found


RULES = {
    "summation splitting": (lambda: conv(padding=1).expression(), True),
    "variable substitution": (
        lambda: parse("L[r:0..3, h:0..4] Sum[c:0..4] Q[h + r, c] * K[r, c]", TENSORS),
        True,
    ),
    "variable splitting": (lambda: transposed().expression(), True),
    "layout transformation": (lambda: conv(padding=1).expression(), True),
    "dilation splitting": (lambda: conv(padding=2, dilation=2).expression(), True),
    "stride splitting": (lambda: conv(4, stride=2).expression(), True),
    "tap splitting": (lambda: conv(6, padding=2).expression(), True),
    "band tiling": (lambda: parse("L[m:0..8, w:0..5] Sum[k:0..4] Q[m, k] * K[m + w, k]", TENSORS), True),
    "bilinear decomposition": (lambda: conv(padding=1).expression(), False),
}


@pytest.mark.parametrize("rule", RULES)
def test_which_rules_add_the_same_products(rule):
    make, same = RULES[rule]
    scope = simplify(make())[0]
    inner = next((one for one in scope.scopes() if one.is_contraction), scope)
    assert {adds_the_same(inner, one) for one in derived(rule, inner)} == {same}


PRODUCT = "{{L[m:0..6, n:0..3] Sum[k:0..5] X[m, k] * {}[k, n]}}[m, n]"
RELATED = {
    "reassociation": "L[m:0..6, n:0..3] Sum[r:0..4] {L[m:0..6, r:0..4] Sum[k:0..5] X[m, k] * A[k, r]}[m, r]"
    " * B[r, n]",
    "shared factor": f"L[m:0..6, n:0..3] {PRODUCT.format('W')} + {PRODUCT.format('A')}",
    "distribution": "L[m:0..6, n:0..3] Sum[k:0..5] X[m, k] * {L[k:0..5, n:0..3] W[k, n] + A[k, n]}[k, n]",
}


@pytest.mark.parametrize("rule", RELATED)
def test_orders_of_products_are_not_the_same(rule):
    """inf * (A + B) is infinite where inf * A + inf * B may be a NaN, and A * B may overflow ahead."""
    scope = parse(RELATED[rule], TENSORS)
    assert {adds_the_same(scope, one) for one in derived(rule, scope)} == {False}


def test_weights_side_by_side_add_nothing():
    """Q and K of one X: each value of the joined weight is one of them and a 0."""
    x, a, b = torch.zeros(6, 5), torch.zeros(5, 4), torch.zeros(5, 3)
    (found,) = subprograms_of(lambda x, a, b: (x @ a, x @ b), x, a, b)
    joined = [
        d
        for d in search(found.expression(), max_depth=2, budget_s=60).derivations
        if "shared factor" in str(d.steps)
    ]
    assert joined
    assert all(adds_the_same(found.expression(), one.scope) for one in joined)
    written = [p for d in joined for p in programs(d.scope, CPU)]
    assert [exactness.fault(found, program) for program in written] == [None] * len(written)


CASES = {
    "3x3": (lambda: conv(padding=1), {"bilinear decomposition", "tap splitting"}),
    "5x5 as padded 3x3": (lambda: conv(5, padding=2), {"bilinear decomposition", "tap splitting", "skewing"}),
    "dilated": (lambda: conv(padding=2, dilation=2), {"bilinear decomposition", "tap splitting"}),
    "strided, padded taps": (lambda: conv(3, stride=2, padding=1), {"stride splitting"}),
    "transposed": (transposed, {"bilinear decomposition"}),
    "groups": (
        lambda: operator(torch.zeros(2, 4, 7, 7), torch.zeros(6, 2, 3, 3), padding=1, groups=2),
        set(),
    ),
    "gradient of the input": (lambda: gradient("input"), {"bilinear decomposition"}),
    "gradient of the weight": (lambda: gradient("weight"), set()),
}


def gradient(of):
    forward = conv(padding=1)
    result = forward.input if of == "input" else forward.weight
    return Gradient(forward=forward, of=of, gradient=forward.output, result=result)


def _rules_of(derivation):
    return {rule for step in derivation.steps for rule in step.rules}


@pytest.mark.parametrize("case", CASES)
def test_exact_programs_are_eager_where_values_are_not_finite(case):
    make, excluded = CASES[case]
    wanted = make()
    found = search(wanted.expression(), max_depth=1, budget_s=120).derivations
    by_rules = {tuple(step.rules[0] for step in one.steps): one for one in reversed(found)}
    exact, others = [], []
    for derivation in by_rules.values():
        for program in programs(derivation.scope, CPU)[:1]:
            why = exactness.fault(wanted, program)
            (exact if why is None else others).append((derivation, program))
    assert exact, "nothing is left"
    assert not any("bilinear decomposition" in _rules_of(d) for d, _ in exact)
    assert excluded <= {rule for d, _ in others for rule in _rules_of(d)}, case
    # One NaN at a time, at a border and inside: in eager torch and here it reaches the same results.
    data = [place for place, name in enumerate(wanted.inputs) if name not in wanted.parameters]
    for (_, program), place in itertools.product(exact[:6], data):
        for where in (0, -1, wanted.example_inputs()[place].numel() // 2):
            inputs = list(wanted.example_inputs())
            inputs[place] = inputs[place].contiguous()
            inputs[place].view(-1)[where] = float("nan")
            (got,), (want,) = run(wanted, program, inputs), original(wanted, inputs)
            assert torch.equal(got.isnan(), want.isnan())


@pytest.mark.parametrize(
    ("function", "weights", "match"),
    [
        (
            lambda x, w, a: x @ w + (x @ a[:, :2]) @ a[:2] * 0.5,
            ((5, 5), (5, 5)),
            "moves aten.mul.Tensor into",
        ),
        (lambda x, w, a: (x @ w + x @ a) / 3, ((5, 4), (5, 4)), "moves aten.div.Tensor into"),
        (lambda x, w, a: x @ w - x @ a, ((5, 4), (5, 4)), "moves aten"),
    ],
    ids=["LoRA", "a scaled sum", "a difference"],
)
def test_what_lifting_computes_otherwise_is_not_derived(function, weights, match):
    (found,) = subprograms_of(function, torch.zeros(6, 5), *map(torch.zeros, weights))
    assert match in exactness.lifted_otherwise(found)
    report = Report()
    plan = planner.plan(found, EXACT, 60.0, Context())
    report.planned("x", plan)
    assert plan.winner is None
    assert "original kept: values that are not finite would differ" in str(report)


def test_sums_of_products_without_scales_are_derived_exactly():
    (found,) = subprograms_of(
        lambda x, w, a: x @ w + x @ a, torch.zeros(6, 5), torch.zeros(5, 4), torch.zeros(5, 4)
    )
    assert exactness.lifted_otherwise(found) is None
    products = {True: [], False: []}  # by whether the weights are added up ahead
    for derivation in search(found.expression(), max_depth=2, budget_s=60).derivations:
        merged = sum(scope.is_contraction for scope in derivation.scope.scopes()) == 1
        products[merged].append(exactness.fault(found, programs(derivation.scope, CPU)[0]))
    assert set(products[True]) == {exactness.OTHER_TERMS}
    assert None in products[False]


@pytest.mark.usefixtures("fresh", "always_rewrite", "uncompiled")
def test_large_inputs_overflow_only_where_they_do_in_eager_torch():
    net, x = nn.Conv2d(16, 16, 3, padding=1).eval(), torch.randn(1, 16, 20, 20) * 1e37
    options = {"tune": "model", "margin": 0.0, "budget_s": 120, "candidates": 3, "non_finite": "exact"}
    report = Report()
    run = torch.compile(net, backend=lambda *graph: compile_with(*graph, report, options=options))
    with torch.no_grad():
        want = net(x)
        torch.testing.assert_close(run(x), want, rtol=0, atol=1e-5 * want.abs().max().item())
        assert want.isfinite().all()
        x[0, 3, 7, 11], x[0, 1, 19, 0] = float("inf"), float("nan")
        got, want = run(x), net(x)
    assert (~want.isfinite()).sum() == 16 * (9 + 4)
    for test in (torch.isnan, torch.isposinf, torch.isneginf):
        assert torch.equal(test(got), test(want))
    assert report.rewritten == 1, str(report)
    assert "bilinear decomposition" not in str(report.plans[0][1].winner.derivation.steps)


def form(tile, wanted):
    """A bilinear form with tiles of 2 or 4."""
    scope = list(bilinear_decomposition(wanted.expression()))[tile == 4]
    return Program(simplify(scope)[0], "rows", "cpp")


def test_bilinear_forms_spread_and_overflow_by_default():
    wanted = operator(torch.zeros(1, 8, 12, 12), torch.zeros(8, 8, 3, 3), padding=1)
    x, weight = wanted.example_inputs()
    program = form(4, wanted)
    x[0, 0, 4, 4] = float("nan")
    results = original(wanted, (x, weight)) + run(wanted, program, (x, weight))
    counts = [(~result.isfinite()).sum().item() for result in results]
    assert counts == [72, 200]
    assert exactness.fault(wanted, program) == exactness.OTHER_TERMS


def test_growth_bounds_what_the_matrices_do():
    wanted = operator(torch.zeros(1, 8, 12, 12), torch.zeros(8, 8, 3, 3), padding=1)
    assert growth(wanted.expression()) == 1.0
    for tile in (2, 4):
        program = form(tile, wanted)
        bound = growth(program.scope)
        sizes = {
            c.name: Constant(c.name, c.shape, tuple(map(abs, c.values)))
            for c in program.scope.constants().values()
        }
        absolute = _with_constants(program.scope, sizes)
        ones = {name: torch.ones(layout.shape, dtype=torch.float64) for name, layout in wanted.inputs.items()}
        largest = (
            Program(absolute, "rows")(ones | Program(absolute, "rows").constants(torch.float64, CPU))
            .max()
            .item()
        )
        assert largest / (8 * 9) == pytest.approx(bound)
    assert bound == pytest.approx(59.6, abs=0.1)
    tensors = {"X": Input("X", (4, 2)), "M": Constant.matrix("M", [[3, -4], [1, 1]])}
    assert growth(parse("L[i:0..4, k:0..2] Sum[j:0..2] M[k, j] * X[i, j]", tensors)) == 7.0


def _with_constants(scope, constants):
    reads = []
    for read in scope.factors:
        inner = read.tensor
        new = (
            _with_constants(inner, constants)
            if isinstance(inner, Scope)
            else constants.get(inner.name, inner)
        )
        reads.append(Read(new, read.index))
    return scope.over(factors=tuple(reads))


@pytest.mark.parametrize(("channels", "passes"), [(1, False), (16, True)])
def test_candidates_are_judged_next_to_large_values(channels, passes):
    """With one channel, results whose own products are all small stand beside large ones: their digits go."""
    wanted = operator(torch.zeros(1, channels, 28, 28), torch.zeros(4, channels, 3, 3), padding=1)
    plain, program = Program(wanted.expression(), "convolution"), form(4, wanted)
    mixed = MixedMagnitudes(wanted)
    assert mixed.error(None) < 1e-6
    assert mixed.error(plain) < 1e-6
    assert (mixed.error(program) <= 2e-5) == passes
    candidate = Candidate(program, Derivation(program.scope))
    checks = Checks(wanted, OllieConfig(), Machine(), float("inf"))
    assert checks.passes(candidate) == passes
    assert candidate.error < 2e-5  # on noise of one magnitude nothing is seen
    if not passes:
        assert candidate.rejected.startswith("next to values 1e+04 times larger its error is ")
        assert candidate.rejected.endswith("of a result's own sum of |products|, above the tolerance 2.0e-05")


def test_the_report_states_growth_and_errors():
    wanted = operator(torch.zeros(1, 16, 12, 12), torch.zeros(8, 16, 3, 3), padding=1)
    program = form(4, wanted)
    winner = Candidate(program, Derivation(program.scope), bound_s=1e-6)
    assert Checks(wanted, OllieConfig(), Machine(), float("inf")).passes(winner)
    report = Report()
    report.planned("conv", Plan(wanted, 1.0, winner=winner, candidates=[winner], reason="measured fastest"))
    text = "growth bound 59.6: values may be so many times larger than the sums of |products|"
    assert text in str(report)
    assert "of a result's own sum on magnitudes 1, 1e4 and 1e-4 side by side" in str(report)
    assert text in report.to_html()
    entry = json.loads(report.to_json())["operators"][0]["winner"]
    assert entry["growth"] == pytest.approx(59.6, abs=0.1)
    assert 0 < entry["mixed_error"] < 2e-5


def test_half_precision_is_judged_by_the_original():
    for dtype in (torch.float16, torch.bfloat16):
        x, weight = torch.zeros(1, 8, 12, 12, dtype=dtype), torch.zeros(4, 8, 3, 3, dtype=dtype)
        wanted = operator(x, weight, padding=1)
        mixed = MixedMagnitudes(wanted)
        assert all(value.isfinite().all() for value in mixed.inputs)
        assert 0 < mixed.error(None) < 4 * torch.finfo(dtype).eps
        checks = Checks(wanted, OllieConfig(), Machine(), float("inf"))
        assert checks.mixed_limit == 2 * mixed.error(None)
