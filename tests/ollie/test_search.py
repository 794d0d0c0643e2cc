"""The search: what it finds, what it leaves out, where it ends."""

import gc
import pickle

import pytest
import torch

from ollie_compile.expr import Input, canonical, parse
from ollie_compile.expr.scope import _SCOPES
from ollie_compile.search.expansion import products
from ollie_compile.search.hybrid import search
from ollie_compile.targets.matmul import match_matmul
from tests.ollie.strategies import operator


def derived(conv, depth=0):
    return [str(d.scope) for d in search(conv.expression(), max_depth=depth, budget_s=20.0).derivations]


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


def test_guidance_and_fingerprints_can_be_left_out():
    expression = operator(torch.zeros(1, 200, 6, 6), torch.zeros(4, 200, 3, 3), padding=1).expression()
    usual, repeated, unguided = (
        search(expression, max_depth=2, budget_s=60.0, beam=8, **flags)
        for flags in ({}, {"fingerprints": False}, {"guided": False})
    )
    texts = [{canonical(d.scope) for d in found.derivations} for found in (usual, repeated, unguided)]
    assert repeated.stats.duplicates == 0
    assert len(texts[2]) < len(texts[0])
    assert usual.stats.duplicates > 0


def test_states_with_too_many_products_are_pruned():
    conv = operator(torch.zeros(1, 2, 40, 40), torch.zeros(2, 2, 3, 3), stride=3)
    found = search(conv.expression(), max_depth=2, budget_s=60.0, beam=2)
    assert found.stats.pruned > 0
    assert all(products(d.scope) <= 4 * products(conv.expression()) for d in found.derivations)


def test_workers_find_the_same():
    expression = operator(torch.zeros(1, 200, 4, 4), torch.zeros(4, 200, 3, 3), padding=1).expression()
    alone, together = (
        search(expression, max_depth=1, budget_s=60.0, beam=4, workers=workers) for workers in (1, 2)
    )
    assert together.derivations == alone.derivations
    together.stats.seconds = alone.stats.seconds
    assert together.stats == alone.stats


def test_workers_that_cannot_be_are_refused():
    expression = operator(torch.zeros(1, 2, 4), torch.zeros(2, 2, 3)).expression()
    with pytest.raises(ValueError, match="`workers` must be 1 or more, got 0"):
        search(expression, max_depth=1, budget_s=1.0, workers=0)


def test_equal_scopes_are_one_object_that_other_processes_find_again():
    conv = operator(torch.zeros(1, 2, 4), torch.zeros(2, 2, 3))
    scope = conv.expression()
    assert conv.expression() is scope
    assert pickle.loads(pickle.dumps(scope)) is scope


def test_what_is_known_about_a_scope_goes_with_it():
    def known() -> int:
        gc.collect()
        return sum("Fleeting" in scope.inputs() for scope in list(_SCOPES.values()))

    tensors = {"Fleeting": Input("Fleeting", (2, 5)), "K": Input("K", (2, 3))}
    scope = parse("L[h:0..3] Sum[c:0..2, r:0..3] Fleeting[c, h + r] * K[c, r]", tensors)
    result = search(scope, max_depth=1, budget_s=60.0)
    assert known() > result.stats.states
    del scope, result
    assert known() == 0
