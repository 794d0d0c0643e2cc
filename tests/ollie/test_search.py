"""Derivations that the search must find by itself, in the printed notation."""

import torch

from ollie_compile.expr import canonical
from ollie_compile.matching import match_matmul
from ollie_compile.search import search
from tests.ollie.strategies import operator


def derived(conv, depth=0):
    return [str(d.scope) for d in search(conv.expression(), max_depth=depth, budget_s=20.0).derivations]


def test_conv1x1_is_a_product():
    assert derived(operator(torch.zeros(2, 8, 4, 4), torch.zeros(3, 8, 1, 1))) == [
        "L[n:0..2, f:0..3, h1:0..4, h2:0..4] Sum[c:0..8] A[n, c, h1, h2] * K[f, c, 0, 0]"
    ]


def test_conv3x3_becomes_a_product_and_an_offset_add():
    assert (
        "L[n:0..2, f:0..3, h1:0..4, h2:0..4] Sum[r1:0..3, r2:0..3] "
        "{L[r1:0..3, r2:0..3, n:0..2, f:0..3, t1:0..4, t2:0..4] Sum[c:0..200] "
        "A[n, c, t1, t2] * K[f, c, r1, r2]}[r1, r2, n, f, h1 + r1 - 1, h2 + r2 - 1]"
    ) in derived(operator(torch.zeros(2, 200, 4, 4), torch.zeros(3, 200, 3, 3), padding=1))


def test_conv1x7_becomes_a_product_and_an_offset_add():
    assert (
        "L[n:0..2, f:0..3, h1:0..4, h2:0..9] Sum[r2:0..7] "
        "{L[r2:0..7, n:0..2, f:0..3, h1:0..4, t1:0..9] Sum[c:0..200] "
        "A[n, c, h1, t1] * K[f, c, 0, r2]}[r2, n, f, h1, h2 + r2 - 3]"
    ) in derived(operator(torch.zeros(2, 200, 4, 9), torch.zeros(3, 200, 1, 7), padding=(0, 3)))


def test_transposed_convolution_becomes_a_product_and_a_selective_add():
    conv = operator(
        torch.zeros(2, 200, 4, 4), torch.zeros(200, 3, 4, 4), stride=2, padding=1, transposed=True
    )
    assert (
        "L[n:0..2, f:0..3, h1:0..8, h2:0..8] "
        "{L[n:0..2, f:0..3, q1:0..5, x1:0..2, q2:0..5, x2:0..2] Sum[r1:0..2, r2:0..2] "
        "{L[t3:0..4, t4:0..4, n:0..2, f:0..3, t1:0..4, t2:0..4] Sum[c:0..200] "
        "A[n, c, t1, t2] * K[c, f, t3, t4]}[2*r1 + x1, 2*r2 + x2, n, f, q1 - r1, q2 - r2]}"
        "[n, f, (h1 + 1) // 2, (h1 + 1) % 2, (h2 + 1) // 2, (h2 + 1) % 2]"
    ) in derived(conv)


def test_exploration_finds_im2col():
    found = derived(operator(torch.zeros(2, 9, 5, 5), torch.zeros(4, 9, 3, 3)), depth=1)
    assert (
        "L[n:0..2, f:0..4, h1:0..3, h2:0..3] Sum[c:0..9, r1:0..3, r2:0..3] "
        "{L[n:0..2, h1:0..3, h2:0..3, c:0..9, r1:0..3, r2:0..3] A[n, c, h1 + r1, h2 + r2]}"
        "[n, h1, h2, c, r1, r2] * K[f, c, r1, r2]"
    ) in found


def test_grouped_convolution_is_a_batched_product():
    conv = operator(torch.zeros(2, 400, 4, 4), torch.zeros(6, 200, 1, 1), groups=2)
    found = search(conv.expression(), max_depth=0, budget_s=20.0).derivations
    matches = [m for d in found for scope in d.scope.scopes() if (m := match_matmul(scope))]
    assert any(len(match.batch) == 1 for match in matches)


def test_strided_convolution_rearranges_instead_of_computing_what_nobody_reads():
    conv = operator(torch.zeros(1, 200, 9, 9), torch.zeros(4, 200, 3, 3), stride=2)
    last = search(conv.expression(), max_depth=0, budget_s=20.0).derivations[-1]
    assert last.steps[-1].rules[0] == "layout transformation"


def test_depthwise_convolution_is_one_eoperator():
    conv = operator(torch.zeros(1, 6, 8, 8), torch.zeros(6, 1, 3, 3), groups=6)
    first = search(conv.expression(), max_depth=0, budget_s=20.0).derivations[0]
    assert not any(match_matmul(scope) for scope in first.scope.scopes())


def test_fingerprints_ignore_names_and_order_but_nothing_else():
    conv = operator(torch.zeros(2, 4, 6, 6), torch.zeros(3, 4, 3, 3))
    scope = conv.expression()
    swapped = type(scope)(scope.traversal, scope.summation[::-1], scope.factors[::-1])
    assert canonical(swapped) == canonical(scope)
    other = operator(torch.zeros(2, 4, 6, 6), torch.zeros(3, 4, 3, 3), padding=(1, 0))
    assert canonical(other.expression()) != canonical(scope)


def test_guided_derivation_ends():
    """Here it once swapped two iterators back and forth, each time nesting one scope deeper."""
    conv = operator(
        torch.zeros(3, 4, 2, 6),
        torch.zeros(4, 2, 4, 3),
        stride=(1, 3),
        padding=(4, 0),
        dilation=(1, 2),
        groups=2,
    )
    found = search(conv.expression(), max_depth=1, budget_s=20.0)
    assert found.stats.complete
    assert max(len(derivation.steps) for derivation in found.derivations) < 12


def test_search_is_deterministic_and_stops_at_its_budget():
    conv = operator(torch.zeros(1, 56, 8, 8), torch.zeros(56, 1, 9, 9), stride=2, padding=4, transposed=True)
    assert derived(conv, depth=1) == derived(conv, depth=1)
    cut = search(conv.expression(), max_depth=9, budget_s=0.2)
    assert not cut.stats.complete
    assert cut.stats.seconds < 2.0
