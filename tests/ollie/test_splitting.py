"""Splitting, merging, distribution and skewing: what they derive, and that their inverses undo it."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ollie_compile.expr import Affine, Input, canonical, parse
from ollie_compile.rules import simplify
from ollie_compile.rules.linear import shared_factor
from ollie_compile.rules.splitting import (
    distribution,
    expression_merging,
    expression_splitting,
    split_expression,
)
from ollie_compile.rules.substitution import skew, skewing
from ollie_compile.search.proof import check_derivation
from tests.ollie.strategies import expressions

TENSORS = {
    name: Input(name, shape) for name, shape in (("X", (4, 8)), ("W", (8, 8)), ("V", (8, 5)), ("U", (8, 13)))
}
CONCATENATED = "L[m:0..4, n:0..13] Sum[k:0..8] X[m, k] * {L[k:0..8, n:0..13] W[k, n] + V[k, n - 8]}[k, n]"


@settings(max_examples=100, deadline=None)
@given(expressions(), st.data())
def test_any_split_keeps_the_value_and_merges_back(expression, data):
    loops = [loop for loop in expression.traversal if loop.extent > 1]
    if not loops:
        return
    loop = data.draw(st.sampled_from(loops))
    split = split_expression(expression, loop.name, data.draw(st.integers(loop.low + 1, loop.high - 1)))
    assert check_derivation(expression, split, points=16) is None
    (merged, *_) = expression_merging(split)
    assert check_derivation(expression, merged, points=16) is None


def test_products_of_a_concatenation_come_apart_and_join_again():
    scope = parse(CONCATENATED, TENSORS)
    (split,) = expression_splitting(scope)
    assert str(split) == (
        "L[m:0..4, n:0..13] "
        "{L[m:0..4, n:0..8] Sum[k:0..8] X[m, k] * {L[k:0..8, n:0..8] W[k, n]}[k, n]}[m, n] + "
        "{L[m:0..4, n:8..13] Sum[k:0..8] X[m, k] * {L[k:0..8, n:8..13] V[k, n - 8]}[k, n]}[m, n]"
    )
    assert check_derivation(scope, split) is None
    assert any(check_derivation(scope, joined) is None for joined in shared_factor(split))


def test_splitting_without_sums_is_undone_exactly():
    scope = parse("L[m:0..4, n:0..13] Sum[k:0..8] X[m, k] * U[k, n]", TENSORS)
    assert list(expression_splitting(scope)) == []
    merged = next(expression_merging(split_expression(scope, "n", 5)))
    assert simplify(merged)[0] is scope


@pytest.mark.parametrize(
    "text",
    [
        "L[n:0..4] {L[n:0..2] X[n, 0]}[n] + {L[n:2..4] X[n, 1]}[n]",
        "L[n:0..4] {L[n:0..2] X[n, 0]}[n] + {L[n:3..4] X[n, 0]}[n]",
        "L[n:0..4] {L[n:0..2] X[n, 0]}[n] + {L[n:2..4] X[n, 0]}[n + 1]",
    ],
    ids=["different", "apart", "read elsewhere"],
)
def test_what_is_not_two_parts_of_one_expression_is_not_merged(text):
    assert list(expression_merging(parse(text, TENSORS))) == []


def test_a_sum_is_distributed_over_and_factored_out_again():
    scope = parse(
        "L[m:0..4, n:0..5] Sum[k:0..8] X[m, k] * {L[k:0..8, n:0..5] W[k, n] + V[k, n]}[k, n]", TENSORS
    )
    (derived,) = distribution(scope)
    assert str(derived) == (
        "L[m:0..4, n:0..5] {L[m:0..4, n:0..5] Sum[k:0..8] X[m, k] * W[k, n]}[m, n] + "
        "{L[m:0..4, n:0..5] Sum[k:0..8] X[m, k] * V[k, n]}[m, n]"
    )
    assert check_derivation(scope, derived) is None
    assert any(check_derivation(scope, joined) is None for joined in shared_factor(derived))


def test_a_sum_that_is_read_beyond_its_end_is_not_distributed_over():
    """There the sum is 0, and its terms are not."""
    scope = parse(
        "L[m:0..4, n:0..5] Sum[k:0..8] X[m, k] * {L[k:0..8, n:0..3] W[k, n] + V[k, n]}[k, n]", TENSORS
    )
    assert list(distribution(scope)) == []


def conv(taps: str):
    tensors = {"A": Input("A", (2, 4)), "K": Input("K", (2, 3))}
    return parse(f"L[h:0..4] Sum[c:0..2, r:{taps}] A[c, h + r - 1] * K[c, r]", tensors)


def test_skewing_makes_bands_of_weights_and_is_undone_by_its_inverse():
    scope = conv("0..3")
    (skewed,) = skewing(scope)
    assert str(skewed) == "L[h:0..4] Sum[c:0..2, t1:-1..5] A[c, t1] * K[c, -h + t1 + 1]"
    assert check_derivation(scope, skewed) is None
    inverse = skew(skewed, Affine.of("t1") - Affine.of("h") + 1, "t1")
    assert inverse is not None
    assert canonical(simplify(inverse)[0]) == canonical(scope)


@pytest.mark.parametrize(
    ("taps", "expression", "name"),
    [
        ("0..2", Affine.of("h") + Affine.of("r"), "r"),
        ("0..3", Affine.of("h") + Affine.of("r") * 2, "r"),
        ("0..3", Affine.of("h") + Affine.of("r"), "h"),
    ],
    ids=["a weight that is left out is not 0", "not unimodular", "traversed"],
)
def test_skewing_refuses_what_changes_the_sum(taps, expression, name):
    assert skew(conv(taps), expression, name) is None


@settings(max_examples=150, deadline=None)
@given(expressions(), st.data())
def test_any_skew_keeps_the_value(expression, data):
    if not expression.summation:
        return
    name = data.draw(st.sampled_from([loop.name for loop in expression.summation]))
    others = sorted(expression.ranges.keys() - {name})
    index = Affine.of(name) * data.draw(st.sampled_from([1, -1])) + data.draw(st.integers(-2, 2))
    for other in data.draw(st.lists(st.sampled_from(others), max_size=2, unique=True)) if others else ():
        index += Affine.of(other) * data.draw(st.integers(-2, 2))
    skewed = skew(expression, index, name)
    assert skewed is None or check_derivation(expression, skewed, points=16) is None
