import itertools

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ollie_compile.expr import Affine, Input, Loop, Read, Scope, evaluate, parse
from ollie_compile.rules import EXPLORATIVE, RELATING, SIMPLIFYING, register, rewrites, simplify
from ollie_compile.rules.bilinear import bilinear_decomposition, correlations, decompose
from ollie_compile.rules.boundary import boundary_tightening
from ollie_compile.rules.cook_toom import LARGEST, amplification, matrices
from ollie_compile.rules.substitution import substitute
from ollie_compile.search.hybrid import search
from ollie_compile.search.proof import check_derivation
from tests.ollie.strategies import KINDS, contractions, convolutions, expressions


def v(name: str) -> Affine:
    return Affine.of(name)


@settings(max_examples=60, deadline=None)
@given(convolutions(), st.data())
def test_random_rule_sequences_keep_the_value(operator, data):
    original = scope = operator.expression()
    rules = EXPLORATIVE | RELATING | SIMPLIFYING
    for _ in range(5):
        derived = [d for rule in rules.values() for d in rewrites(scope, rule)]
        if not derived:
            break
        scope = data.draw(st.sampled_from(derived))
    assert check_derivation(original, scope, points=24) is None
    assert check_derivation(original, simplify(scope)[0], points=24) is None


def every_rule_keeps_the_value(expression: Scope) -> set[str]:
    """The names of the rules that applied."""
    applied = set()
    for name, rule in (EXPLORATIVE | RELATING | SIMPLIFYING).items():
        for derived in itertools.islice(rewrites(expression, rule), 6):
            applied.add(name)
            assert check_derivation(expression, derived, points=12) is None, f"{name}: {derived}"
    return applied


@settings(max_examples=150, deadline=None)
@given(expressions())
def test_every_rule_keeps_the_value_of_any_expression(expression):
    every_rule_keeps_the_value(expression)


def test_every_rule_applies_to_some_contraction_and_keeps_its_value():
    applied: set[str] = set()
    for kind in range(KINDS):

        @settings(max_examples=25, deadline=None, derandomize=True)
        @given(contractions((kind,)))
        def collect(expression):
            applied.update(every_rule_keeps_the_value(expression))

        collect()
    # Views are merged where a derivation has nested them.
    assert applied | {"traversal merging"} == (EXPLORATIVE | RELATING | SIMPLIFYING).keys()


@pytest.mark.slow
@settings(max_examples=10_000, deadline=None, suppress_health_check=list(HealthCheck))
@given(st.one_of(expressions(), contractions()))
def test_every_rule_keeps_the_value_of_ten_thousand_expressions(expression):
    every_rule_keeps_the_value(expression)


@settings(max_examples=30, deadline=None)
@given(convolutions())
def test_interpreter_agrees_with_torch(operator):
    generator = np.random.default_rng(0)
    values = {
        "A": generator.integers(-5, 6, operator.input.shape),
        "K": generator.integers(-5, 6, operator.weight.shape),
    }
    points = np.stack(np.meshgrid(*map(np.arange, operator.output.shape), indexing="ij"), -1)
    got = evaluate(operator.expression(), values, points.reshape(-1, points.shape[-1]))
    want = operator.reference(torch.tensor(values["A"]).double(), torch.tensor(values["K"]).double())
    assert got.reshape(operator.output.shape).tolist() == want.tolist()


def test_summation_splitting_of_conv3x3():
    scope = conv(4, 3)
    derived = [str(d) for d in EXPLORATIVE["summation splitting"](scope)]
    assert "L[h:0..4] Sum[r:0..3] {L[r:0..3, h:0..4] Sum[c:0..2] A[c, h + r - 1] * K[c, r]}[r, h]" in derived
    assert len(derived) == 2


def conv(size: int, taps: int) -> Scope:
    a, k = Input("A", (2, size)), Input("K", (2, taps))
    return Scope(
        (Loop("h", 0, size),),
        (Loop("c", 0, 2), Loop("r", 0, taps)),
        (Read(a, (v("c"), v("h") + v("r") - 1)), Read(k, (v("c"), v("r")))),
    )


def test_tightening_stops_at_the_box():
    a = Input("A", (5, 4))
    scope = Scope((Loop("t", -7, 9),), (Loop("k", -1, 9),), (Read(a, (v("t") * 2 - 1, v("k"))),))
    (tight,) = boundary_tightening(scope)
    assert str(tight) == "L[t:-7..9] {L[t:1..3] Sum[k:0..4] A[2*t - 1, k]}[t]"
    assert simplify(scope) == (tight, ("boundary tightening",))


def test_tightening_leaves_an_empty_range_alone():
    read = Read(Input("A", (5, 2)), (v("t"), v("k")))
    scope = Scope((Loop("t", 6, 9),), (Loop("k", 0, 2),), (read,))
    assert list(boundary_tightening(scope)) == []


@pytest.mark.parametrize(
    ("expression", "name"),
    [(v("h") * 2 + v("r"), "h"), (v("h") + v("k"), "h"), (v("r"), "h")],
    ids=["not divisible", "summation iterator", "absent"],
)
def test_substitution_refuses_what_has_no_integral_inverse(expression, name):
    a = Input("A", (9, 9))
    scope = Scope(
        (Loop("h", 0, 3), Loop("r", 0, 3)),
        (Loop("k", 0, 2),),
        (Read(a, (v("h") * 2 + v("r"), v("h") + v("k"))),),
    )
    assert substitute(scope, expression, name) is None


def test_users_register_rules():
    def swapped_factors(scope):
        if scope.function == "*" and len(scope.factors) == 2:
            yield scope.over(factors=scope.factors[::-1])

    register("swapped factors", swapped_factors)
    try:
        found = search(conv(6, 3), max_depth=1, budget_s=10.0)
    finally:
        del EXPLORATIVE["swapped factors"]
    assert found.stats.duplicates > 0  # fingerprints ignore the order of factors


def test_cook_toom_matrices_are_exact_and_bounded():
    for tile in range(1, 7):
        for taps in range(2, 9 - tile):
            at, g, bt = matrices(tile, taps)  # asserts the identity
            assert (at.shape, g.shape, bt.shape[0]) == (
                (tile, tile + taps - 1),
                (tile + taps - 1, taps),
                tile + taps - 1,
            )
            assert amplification(tile, taps) >= 1
    with pytest.raises(ValueError, match=r"must be in \[2, 8\], got 6 \+ 4 - 1"):
        matrices(6, 4)


@settings(max_examples=25, deadline=None)
@given(convolutions(), st.integers(2, 4))
def test_bilinear_forms_of_any_convolution_are_exact(operator, tile):
    """Negative steps, odd sizes, any dimension: decomposed wherever the side conditions hold."""
    for at in correlations(operator.expression()):
        if tile + at.tap.extent - 1 <= LARGEST:
            derived = decompose(operator.expression(), at, tile)
            assert check_derivation(operator.expression(), derived, points=24) is None


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("L[h:0..8] Sum[r:0..3] A[0, h + r] * K[0, r]", "nothing else is summed"),
        ("L[h:0..4] Sum[c:0..2, r:0..3] A[c, 2*h + r] * K[c, r]", "a stride"),
        ("L[h:0..4] Sum[c:0..2, r:0..3] A[c, h + 2*r] * K[c, r]", "dilation"),
        ("L[h:0..2] Sum[c:0..2, r:0..3] A[c, h + r] * K[h, r]", "the weight depends on the place"),
        ("L[h:0..8] Sum[c:0..2, r:0..3] A[c, h + r] + K[c, r]", "a sum"),
    ],
)
def test_what_is_no_correlation_is_not_decomposed(text, why):
    scope = parse(text, {"A": Input("A", (2, 10)), "K": Input("K", (2, 3))})
    assert correlations(scope) == [], why


def test_a_wrong_rule_is_caught():
    original = conv(6, 3)
    moved = Scope(original.traversal, original.summation, original.factors[::-1])
    assert check_derivation(original, moved) is None
    index = (v("c"), v("h") + v("r"))
    wrong = Scope(
        original.traversal,
        original.summation,
        (Read(original.factors[0].tensor, index), original.factors[1]),
    )
    assert "differs over the integers" in (check_derivation(original, wrong) or "")


@pytest.mark.parametrize("function", ["relu", "abs", "tanh", "exp"])
def test_fractions_beside_functions_are_checked(function):
    tensors = {"A": Input("A", (2, 10)), "K": Input("K", (2, 3))}

    def applied(text, derive=lambda scope: [scope]):
        inner = parse(text, tensors)
        return [Scope(inner.traversal, (), (Read(d, (v("h"),)),), function) for d in derive(inner)]

    (original,) = applied("L[h:0..8] Sum[c:0..2, r:0..3] A[c, h + r - 1] * K[c, r]")
    right = applied("L[h:0..8] Sum[c:0..2, r:0..3] A[c, h + r - 1] * K[c, r]", bilinear_decomposition)
    wrong = applied("L[h:0..8] Sum[c:0..2, r:0..3] A[c, h + r] * K[c, r]", bilinear_decomposition)
    assert all(scope.constants() for scope in right + wrong)
    assert [check_derivation(original, scope) for scope in right] == [None] * len(right)
    assert all("in float64" in (check_derivation(original, scope) or "") for scope in wrong)
