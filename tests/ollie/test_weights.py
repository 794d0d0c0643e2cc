"""Weights that are not finite: operators that read them are left as they are, and results are eager's."""

import pytest
import torch
from torch import nn

from ollie_compile.backend import compile_with
from ollie_compile.graph import comparing, weights
from ollie_compile.report.report import Report

OPTIONS = {"tune": "model", "margin": 0.0, "budget_s": 120, "max_depth": 0, "candidates": 1, "portable": True}

pytestmark = pytest.mark.usefixtures("fresh", "always_rewrite", "uncompiled")


class Convolutions(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.last = nn.Conv2d(3, 4, 1), nn.Conv2d(4, 2, 2)
        with torch.no_grad():
            self.last.weight[1, 0, 0, 0] = float("inf")

    def forward(self, x):
        return self.last(self.first(x).relu() + 0.1)


class LowRank(nn.Module):
    """A low-rank product with an infinity in a row that most inputs do not reach."""

    def __init__(self):
        super().__init__()
        self.first, self.last = (nn.Parameter(torch.randn(*shape)) for shape in ((9, 4), (4, 9)))
        with torch.no_grad():
            self.first[3, 1] = -float("inf")

    def forward(self, x):
        return (x * 1.0).relu() @ self.first @ self.last


class Masked(nn.Module):
    """Scores with a mask of -inf that is a buffer, scaled once."""

    def __init__(self):
        super().__init__()
        self.left, self.right = (nn.Parameter(torch.randn(9, 9)) for _ in range(2))
        self.register_buffer("mask", torch.full((9, 9), -float("inf")).triu(1))

    def forward(self, x):
        return ((x @ self.left) @ self.right + self.mask * 0.5).softmax(-1)


def compiled(net, **options):
    report = Report()

    def backend(gm, inputs):
        return compile_with(gm, inputs, report, options=OPTIONS | options)

    return torch.compile(net, backend=backend, dynamic=False), report


@pytest.mark.parametrize("freeze", [False, True])
@pytest.mark.parametrize(
    ("make", "shape", "rewritten"),
    [(Convolutions, (1, 3, 4, 4), 1), (LowRank, (5, 9), 0), (Masked, (9, 9), 0)],
)
def test_operators_that_read_them_are_left(make, shape, rewritten, freeze):
    torch.manual_seed(0)
    net, x = make().eval(), torch.randn(shape)
    run, report = compiled(net, freeze=freeze)
    with torch.no_grad():
        torch.testing.assert_close(run(x), net(x), rtol=1e-4, atol=1e-5, equal_nan=True)
    assert report.rewritten == rewritten, str(report)
    assert "weights that hold values which are not finite: 1" in report.notes
    assert "without freezing" not in str(report)
    if rewritten:
        assert weights.REASON in str(report)


def test_gradients_of_such_weights_are_left():
    torch.manual_seed(0)
    net, x = Convolutions(), torch.randn(1, 3, 4, 4)
    run, report = compiled(net)
    run(x)[:, :1].sum().backward()
    got = [parameter.grad.clone() for parameter in net.parameters()]
    net.zero_grad()
    net(x)[:, :1].sum().backward()
    for mine, parameter in zip(got, net.parameters(), strict=True):
        torch.testing.assert_close(mine, parameter.grad, rtol=1e-4, atol=1e-4, equal_nan=True)
    assert report.rewritten
    assert [name for name, why in report.untouched if why == weights.REASON] != []


def test_inputs_that_are_not_finite_are_no_weights():
    net = nn.Conv2d(3, 4, 1).eval()
    run, report = compiled(net)
    with torch.no_grad():
        run(torch.full((1, 3, 6, 6), float("nan")))
    assert report.rewritten == 1


def test_sums_that_overflow_are_of_finite_weights():
    values = [torch.full((4,), 3e38), torch.tensor([1.0, float("nan")]), torch.arange(3), torch.ones(0)]
    assert weights.not_finite(values) == (1,)
    assert weights.not_finite([torch.ones(2, device="meta"), None, 3]) == ()


@pytest.mark.parametrize(
    ("nans", "scale", "right"), [(float("nan"), 1, True), (float("nan"), 2, False), (0.0, 1, False)]
)
def test_frozen_graphs_are_compared_beside_values_that_are_not_finite(nans, scale, right):
    """Half of the results are NaN; the others are compared."""
    graph = torch.fx.symbolic_trace(lambda x: torch.cat([x * float("nan"), x]))

    def check():
        comparing.check(graph, lambda x: torch.cat([x * nans, x * scale]), [torch.randn(50)], frozenset())

    if right:
        check()
    else:
        with pytest.raises(RuntimeError, match="50% of its results differ"):
            check()
