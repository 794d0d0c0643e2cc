"""Gradients of convolutions derived on their own: equal to torch's, alone and in training."""

import pytest
import torch
from torch import nn

from ollie_compile.backend import compile_with
from ollie_compile.lower.layouts import programs
from ollie_compile.plan.checks import check_notation, check_program
from ollie_compile.problems import gradients
from ollie_compile.problems.gradients import Gradient
from ollie_compile.report.report import Report
from ollie_compile.search.hybrid import search
from tests.ollie.strategies import operator

QUICK = {"tune": "model", "margin": 0.0, "budget_s": 120, "max_depth": 0, "candidates": 1}
CPU = torch.device("cpu")

CASES = {
    "plain": ((2, 3, 6, 7), (4, 3, 3, 3), {"padding": 1}),
    "stride with a rest": ((1, 2, 8, 7), (3, 2, 3, 2), {"stride": 2, "padding": 1}),
    "dilation": ((2, 2, 9), (3, 2, 3), {"dilation": 2}),
    "transposed": ((2, 3, 4, 5), (3, 2, 4, 4), {"stride": 2, "padding": 1, "transposed": True}),
}


def gradient(of, shape, weight, settings):
    forward = operator(torch.zeros(shape), torch.zeros(weight), **settings)
    return Gradient(
        forward=forward,
        of=of,
        gradient=forward.output,
        result=forward.input if of == "input" else forward.weight,
    )


@pytest.mark.parametrize("of", ["input", "weight"])
@pytest.mark.parametrize("name", CASES)
def test_expressions_and_programs_are_torchs_gradients(name, of):
    made = gradient(of, *CASES[name])
    assert check_notation(made) is None
    found = search(made.expression(), max_depth=0, budget_s=20).derivations
    written = [program for derivation in found for program in programs(derivation.scope, CPU)]
    assert written
    for program in written[:4]:
        assert check_program(made, program) is None


def test_the_input_gradient_of_groups():
    made = gradient("input", (2, 4, 6), (6, 2, 3), {"groups": 2, "padding": 1})
    assert check_notation(made) is None


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.a = nn.Conv2d(3, 4, 3, padding=1)
        self.b = nn.ConvTranspose2d(4, 2, 4, 2, 1, bias=False)

    def forward(self, x):
        return self.b(self.a(x).relu())


@pytest.mark.usefixtures("fresh", "always_rewrite", "uncompiled")
def test_derived_backwards_equal_eager():
    net, report = Net(), Report()
    x = torch.randn(2, 3, 6, 5, requires_grad=True)
    wanted = [*net.parameters(), x]
    run = torch.compile(net, backend=lambda *graph: compile_with(*graph, report, options=QUICK))
    got, want = (torch.autograd.grad(call(x).square().sum(), wanted) for call in (run, net))
    for mine, theirs in zip(got, want, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-4)
        assert mine.stride() == theirs.stride()
    derived = [made.operator for _, made in report.plans if made.winner is not None]
    kinds = sorted(made.of for made in derived if isinstance(made, Gradient))
    assert kinds == ["input", "input", "weight", "weight"], str(report)


@pytest.mark.usefixtures("fresh", "always_rewrite", "uncompiled")
def test_only_what_is_not_derived_is_left_to_convolution_backward(monkeypatch):
    monkeypatch.setattr(
        gradients.Gradient,
        "refused",
        lambda made, *_: "not now" if made.of == "weight" else None,
    )
    net, report = nn.Conv2d(3, 4, 3), Report()
    x = torch.randn(2, 3, 6, 5, requires_grad=True)
    run = torch.compile(net, backend=lambda *graph: compile_with(*graph, report, options=QUICK))
    got, want = (torch.autograd.grad(call(x).sum(), [x, *net.parameters()]) for call in (run, net))
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)
    assert "not now" in str(report)
    assert report.rewritten == 2  # the forward and the gradient of the input
