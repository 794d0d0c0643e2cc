"""The notation: what is printed parses back, and what does not parse is named."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ollie_compile.expr import Affine, Input, evaluate, parse
from ollie_compile.rules import EXPLORATIVE, RELATING, SIMPLIFYING, rewrites
from tests.ollie.strategies import convolutions

A, B = Input("A", (4, 6)), Input("B", (6, 5))
TENSORS = {"A": A, "B": B}


@settings(max_examples=60, deadline=None)
@given(convolutions(), st.data())
def test_derived_expressions_print_and_parse_to_themselves(operator, data):
    scope = operator.expression()
    for _ in range(4):
        derived = [
            d for rule in (EXPLORATIVE | RELATING | SIMPLIFYING).values() for d in rewrites(scope, rule)
        ]
        scope = data.draw(st.sampled_from(derived)) if derived else scope
    tensors = scope.inputs() | scope.constants()
    parsed = parse(str(scope), tensors)
    # Rules may narrow ranges after an index was simplified, and parsing simplifies it again.
    again = parse(str(parsed), tensors)
    assert again == parsed
    assert str(again) == str(parsed)


@pytest.mark.parametrize(
    "text",
    [
        "L[m:0..4, n:0..5] Sum[k:0..6] A[m, k] * B[k, n]",
        "L[m:-1..4] A[m, 0] + A[m - 1, 2]",
        "L[m:0..4] relu({L[i:0..9] A[i // 3, i % 3]}[2*m + 1])",
        "L[m:0..4, n:0..5] maximum(A[m, n], B[n, ((m + 1) // 2) + 1])",
        "L[] Sum[i:0..4] A[i, -i + 3]",
    ],
)
def test_texts_are_printed_as_they_are_written(text):
    assert str(parse(text, TENSORS)) == text


def test_functions_and_sums_are_interpreted():
    values = {"A": np.arange(24).reshape(4, 6) - 12, "B": np.ones((6, 5), dtype=np.int64)}
    points = np.array([[0, 0], [3, 4], [3, 5]])
    relu = parse("L[m:0..4, n:0..6] relu(A[m, n])", TENSORS)
    assert evaluate(relu, values, points).tolist() == [0, 10, 11]
    total = parse("L[m:0..4, n:0..6] A[m, n] + B[m, n]", TENSORS)
    assert evaluate(total, values, points).tolist() == [-11, 11, 11]


def test_indices_are_simplified_by_their_ranges():
    scope = parse("L[m:0..4] A[m // 4, (6*m + 5) % 6]", TENSORS)
    assert scope.factors[0].index == (Affine.of(0), Affine.of(5))


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("", "no 'L' at column 1: 'the end'"),
        ("L[m:0..4] A[m, 0", "no ','"),
        ("L[m:0..4] C[m]", r"not known \(C\)"),
        ("L[m:0..4] A[m]", "a read at 1 indices of a tensor of 2"),
        ("L[m:0..4] A[m, k]", r"without a range \(k\)"),
        ("L[m:0..0] A[m, 0]", r"an empty range 0\.\.0 of m"),
        ("L[m:0..4, m:0..2] A[m, 0]", "declared twice"),
        ("L[m:0..4] A[m, m*m]", "no positive number beside"),
        ("L[m:0..4] A[m // 0, 0]", "no positive number beside"),
        ("L[m:0..4] relu(A[m, 0], A[m, 1])", "wrong number of arguments for relu"),
        ("L[m:0..4] A[m, 9000000000000000000*m]", "exceeds 62 bits"),
        ("L[m:0..4] A[m, 0] $", "an unknown character"),
        ("L[m:0..4] A[m, 0] A[m, 1]", "more than one scope"),
    ],
)
def test_what_does_not_parse_is_named(text, problem):
    with pytest.raises(ValueError, match=problem):
        parse(text, TENSORS)
