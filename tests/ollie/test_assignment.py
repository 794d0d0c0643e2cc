"""Operators in users' notation: what they denote, and what is wrong with those that do not parse."""

import pytest

from ollie_compile import lift
from ollie_compile.expr import Input, canonical, parse_assignment
from ollie_compile.search.proof import check_derivation

TENSORS = {
    "A": Input("A", (2, 4, 6)),
    "B": Input("B", (2, 6, 5)),
    "X": Input("X", (3, 8)),
    "K": Input("K", (3, 3)),
}


def test_iterators_on_the_left_are_traversed_and_the_others_summed():
    scope = parse_assignment("O[b, m, n] += A[b, m, k] * B[b, k, n]", TENSORS)
    assert str(scope) == "L[b:0..2, m:0..4, n:0..5] Sum[k:0..6] A[b, m, k] * B[b, k, n]"
    assert canonical(scope) == canonical(lift.matmul(TENSORS["A"], TENSORS["B"]))


def test_a_window_needs_the_range_of_its_place():
    scope = parse_assignment("O[h:0..8] += X[c, h + r - 1] * K[c, r]", TENSORS)
    assert str(scope) == "L[h:0..8] Sum[c:0..3, r:0..3] X[c, h + r - 1] * K[c, r]"
    assert check_derivation(scope, scope) is None


def test_functions_and_sums_without_a_summation():
    assert str(parse_assignment("O[c, h] = relu(X[c, h])", TENSORS)) == "L[c:0..3, h:0..8] relu(X[c, h])"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("A[b, m, k] * B[b, k, n]", r"must look like `O\[b, m, n\] \+= "),
        ("O[b, m + 1] += A[b, m, k]", r"left side of an operator must list iterators, got 'm \+ 1'"),
        ("O[b, m, n] = A[b, m, k] * B[b, k, n]", r"`=` must be `\+=`, for .* sums over k"),
        ("O[c, h] += X[c, h]", r"`\+=` must be `=`, for .* sums over nothing"),
        ("O[b, m, n] += A[b, m, k] * B[b, n, k]", r"`n` must have one range|`k` must have one range"),
        ("O[h] += X[c, h + r - 1] * K[c, r]", "The range of `h` must be given"),
        ("O[b, m, n] += A[b, m, k] * C[b, k, n]", "The range of `n` must be given"),
        ("O[b, m] += A[b, m, k] * C[b, k]", r"not known \(C\)"),
        ("O[b, m] += A[b, m, k] *", "no tensor"),
        ("O[b] += A[b, m]", "a read at 2 indices of a tensor of 3"),
        ("O[h:4..4] += X[c, h]", "an empty range"),
        ("O[c, h] = X[c, 9000000000000000000*h]", "must be given"),
    ],
)
def test_what_does_not_parse_is_named(text, message):
    with pytest.raises(ValueError, match=message):
        parse_assignment(text, TENSORS)
