"""What must not be derived, or must stay as it was, whatever a search finds."""

import pytest
import torch
from torch import nn

from ollie_compile import backend, rules
from ollie_compile.config import OllieConfig
from ollie_compile.graph.derivation_pass import DerivationPass
from ollie_compile.graph.splicing import NOT_SPLICED
from ollie_compile.report.report import Report

from .test_subprograms import _fewest_products, derive, equal  # noqa: F401  # a fixture for all tests here


class Calls(nn.Module):
    def __init__(self, function):
        super().__init__()
        self.forward = function


def integers(*shape, low=100):
    return torch.randint(low, 127, shape, dtype=torch.int8)


FACTORS = {
    "truncation": (
        lambda x, a, b: (x @ a).to(torch.int32).float() @ b,
        (torch.randn(16, 4), torch.randn(4, 24) * 9, torch.randn(24, 4)),
    ),
    "int8 that overflows": (
        lambda x, w, v, a, b: (x @ w) * (a.float() + b.float()) + x @ v,
        (torch.randn(4, 8), torch.randn(8, 8), torch.randn(8, 8), integers(8), integers(8)),
    ),
    "bool": (
        lambda x, w, v, a, b: (x @ w) * (a.float() + b.float()) + x @ v,
        (torch.randn(4, 8), torch.randn(8, 8), torch.randn(8, 8), *[torch.ones(8, dtype=torch.bool)] * 2),
    ),
    "a number beside integers": (
        lambda a, x, w, v: (a / 2) * (x @ w) + x @ v,
        (integers(8), torch.randn(4, 8), torch.randn(8, 8), torch.randn(8, 8)),
    ),
    "int8 weights side by side": (
        lambda x, a, b, c: (x @ a.float().T, x @ b.float().T, x @ c.float().T),
        (torch.randn(8, 16), integers(16, 16), integers(8, 16), integers(8, 16)),
    ),
    "a half precision cast": (
        lambda x, a, b: (x @ a).half().float() @ b,
        (torch.randn(16, 4), torch.randn(4, 24) * 9, torch.randn(24, 4)),
    ),
    "a quotient by zero": (lambda x, w, v: (x @ w + x @ v, x / 0.0), [torch.randn(8, 8) for _ in range(3)]),
}


@pytest.mark.parametrize("name", FACTORS)
def test_casts_and_what_no_expression_says_keep_their_values(name):
    function, inputs = FACTORS[name]
    report, _, got, want = derive(Calls(function), *inputs)
    assert not any("failed" in reason for _, reason in report.untouched)
    equal(got, want)


def test_groups_that_feed_each_other_are_not_both_moved():
    x, y, w, v = (torch.randn(8, 8) for _ in range(4))

    def crossed(x, y, w, v):
        a, b = x @ w, y @ v
        return a.sin(), b.sin(), x @ torch.relu(b), y @ torch.relu(a)

    report, _, got, want = derive(Calls(crossed), x, y, w, v)
    assert report.rewritten == 1
    assert any("already replaced" in reason for reason in dict(report.untouched).values())
    equal(got, want)


def test_a_known_index_does_not_stand_in_the_way_of_others():
    class Indexed(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(8, 8), nn.Linear(8, 4)

        def forward(self, x):
            return self.a(x), self.b(x), x[:, [2, 0, 3]].relu()

    report, _, got, want = derive(Indexed(), torch.randn(4, 8))
    assert report.rewritten == 1
    equal(got, want)


def test_a_program_that_gives_another_tensor_leaves_the_graph_as_it_was(monkeypatch):
    monkeypatch.setattr("ollie_compile.problems.operators.Layout.give", lambda _, result: result.double())
    report, _, got, want = derive(
        Calls(lambda x, w, v: x @ w + x @ v), *[torch.randn(8, 8) for _ in range(3)]
    )
    assert report.rewritten == 0
    assert NOT_SPLICED in dict(report.untouched).values()
    equal(got, want)


def test_heads_that_are_merged_are_no_windows():
    def merged(x, w):
        return x.transpose(1, 2).reshape(1, 16, 32) @ w

    report, _, _, _ = derive(Calls(merged), torch.randn(1, 4, 16, 8), torch.randn(32, 32))
    assert not report.plans


def test_rules_of_users_have_no_identity_for_caches(monkeypatch):
    monkeypatch.setattr(rules, "EXPLORATIVE", dict(rules.EXPLORATIVE))
    derivation = DerivationPass(OllieConfig(), Report(), backend.CONTEXT, [])
    assert derivation.uuid() is not None
    rules.register("mine", lambda scope: iter(()))
    assert derivation.uuid() is None
