"""Iterator mapping tables: which operator an expression is, and what only looks like one."""

import pytest

from ollie_compile import lift
from ollie_compile.expr import Input, parse
from ollie_compile.search.hybrid import search
from ollie_compile.targets.banded import match_banded
from ollie_compile.targets.convolutions import match_convolution
from ollie_compile.targets.matmul import OUTPUT, Matmul, mapping_table, match_matmul

TENSORS = {
    name: Input(name, shape)
    for name, shape in (
        ("A", (2, 4, 6)),
        ("B", (2, 6, 5)),
        ("M", (4, 6)),
        ("Mt", (6, 4)),
        ("N", (6, 5)),
        ("Nt", (5, 6)),
    )
}


def test_the_table_has_a_row_for_every_iterator():
    scope = parse("L[b:0..2, m:0..4, n:0..5] Sum[k:0..6] A[b, m, k] * B[b, k, n]", TENSORS)
    assert mapping_table(scope) == {
        "b": {0, 1, OUTPUT},
        "m": {0, OUTPUT},
        "n": {1, OUTPUT},
        "k": {0, 1},
    }
    assert match_matmul(scope) == Matmul(("b",), ("m",), ("n",), ("k",))


@pytest.mark.parametrize("left", ["M[m, k]", "Mt[k, m]"])
@pytest.mark.parametrize("right", ["N[k, n]", "Nt[n, k]"])
@pytest.mark.parametrize("out", ["m:0..4, n:0..5", "n:0..5, m:0..4"])
@pytest.mark.parametrize("swapped", [False, True])
def test_products_match_in_all_transposes(left, right, out, swapped):
    factors = f"{right} * {left}" if swapped else f"{left} * {right}"
    match = match_matmul(parse(f"L[{out}] Sum[k:0..6] {factors}", TENSORS))
    rows, columns = ("n", "m") if swapped else ("m", "n")
    assert match == Matmul((), (rows,), (columns,), ("k",))


@pytest.mark.parametrize(
    "text",
    [
        "L[m:0..4, n:0..5] Sum[k:0..6] M[m, k] + N[k, n]",
        "L[m:0..4] Sum[k:0..6] M[m, k]",
        "L[m:0..4] Sum[k:0..6, n:0..5] M[m, k] * N[k, n]",
        "L[m:0..4, n:0..5, x:0..2] Sum[k:0..6] M[m, k] * N[k, n]",
        "L[m:0..4, n:0..5] Sum[k:0..3] M[m, 2*k + m] * N[k, n]",
        "L[m:0..4, n:0..5] Sum[k:0..6] M[m, k // 2] * N[k, n]",
        "L[m:0..4, n:0..5] Sum[k:0..6] M[k, k] * N[k, n]",
        "L[m:0..4, n:0..5] Sum[k:0..6] M[m, k] * N[k, n] * N[k, n]",
    ],
    ids=["a sum", "one factor", "summed once", "idle", "compound", "division", "diagonal", "three factors"],
)
def test_what_is_no_product_does_not_match(text):
    assert match_matmul(parse(text, TENSORS)) is None


@pytest.mark.parametrize("dims", [1, 2, 3])
@pytest.mark.parametrize(("stride", "dilation", "groups"), [(1, 1, 1), (2, 1, 1), (1, 2, 1), (3, 2, 2)])
def test_convolutions_match_with_stride_dilation_and_groups(dims, stride, dilation, groups):
    scope = lift.convolution(
        (2, 4, *[9] * dims),
        (6, 4 // groups, *[3] * dims),
        stride=[stride] * dims,
        padding=[1] * dims,
        dilation=[dilation] * dims,
        groups=groups,
    )
    found = search(scope, max_depth=0, budget_s=60.0).derivations
    matches = [m for d in found for inner in d.scope.scopes() if (m := match_convolution(inner))]
    settings = {(s.stride, s.dilation) for match in matches for s in match.spatial if s.tap is not None}
    assert (stride, dilation) in settings
    assert any(match.groups for match in matches) == (groups > 1)


@pytest.mark.parametrize("lifted", [lift.banded_scores, lift.banded_values])
def test_banded_products_match_and_are_derived_dense(lifted):
    scope = lifted(2, 24, 5, width=3, dilation=4)
    match = match_banded(scope)
    assert match is not None
    assert match.dilation == 4
    assert match.scores == (lifted is lift.banded_scores)
    found = search(scope, max_depth=0, budget_s=60.0).derivations
    contractions = [inner for d in found for inner in d.scope.scopes() if inner.is_contraction]
    steps = [
        sorted(abs(c) for _, c in index.terms)
        for inner in contractions
        for read in inner.factors
        for index in read.index
        if index.compound
    ]
    assert [1, 1] in steps  # a band whose places lie side by side


@pytest.mark.parametrize(
    "text",
    [
        "L[b:0..2, m:0..4, w:0..3] Sum[k:0..6] A[b, m, k] * A[b, 2*m + w, k]",
        "L[b:0..2, m:0..4, w:0..3] Sum[k:0..6] A[b, m, k] * A[b, m, w + k]",
        "L[b:0..2, m:0..4, w:0..3] Sum[k:0..6] A[b, m, k] + A[b, m + w, k]",
    ],
    ids=["rows of the key are strided", "the window is summed", "a sum"],
)
def test_what_is_no_banded_product_does_not_match(text):
    assert match_banded(parse(text, TENSORS)) is None
