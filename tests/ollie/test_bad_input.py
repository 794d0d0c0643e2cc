"""What breaks naive backends: results equal eager's, and what was not derived is said with its reason."""

import pytest
import torch
from torch import nn

import ollie_compile
from ollie_compile.backend import compile_with
from ollie_compile.plan import candidates
from ollie_compile.report.report import Report

QUICK = {"tune": "model", "margin": 0.0, "budget_s": 120, "max_depth": 0, "candidates": 1}

pytestmark = pytest.mark.usefixtures("fresh", "always_rewrite", "uncompiled")

K, X = torch.randn(4, 3, 3, 3), torch.randn(1, 3, 6, 6)


@torch.library.custom_op("ollie_test::doubled", mutates_args=())
def doubled(x: torch.Tensor) -> torch.Tensor:
    return x * 2


doubled.register_fake(torch.empty_like)


def broken(x):
    x = torch.conv2d(x, K)
    torch._dynamo.graph_break()
    return torch.conv2d(x.relu(), K.transpose(0, 1))


def mutating(x):
    x.add_(1)
    y = torch.conv2d(x, K)
    x.mul_(2)
    return y.relu_()


def views(x):
    y = torch.conv2d(x, K)
    return y, y[:, 1:2], y.transpose(1, 3), x.view(-1)


def random(x):
    return nn.functional.dropout(torch.conv2d(x, K), 0.5) + torch.rand(4, 1, 1)


def custom(x):
    return torch.conv2d(doubled(torch.conv2d(x, K)), K.transpose(0, 1))


def conditional(x):
    return torch.conv2d(x, K) if x.sum() > 0 else torch.conv2d(-x, K)


CASES = {
    "many graphs": (broken, 2),
    "mutation in place": (mutating, 1),
    "views as outputs": (views, 1),
    "random": (random, 1),
    "custom operators": (custom, 2),
    "data-dependent branches": (conditional, 1),
}


def compiled(function, **options):
    """The compiled function and the report that it fills."""
    report = Report()

    def backend(gm, example_inputs):
        return compile_with(gm, example_inputs, report, options={**QUICK, **options})

    return torch.compile(function, backend=backend, dynamic=False), report


@pytest.mark.parametrize("name", CASES)
def test_awkward_functions_equal_eager(name):
    function, rewritten = CASES[name]
    run, report = compiled(function, fallback_random=True)
    results, inputs = [], []
    with torch.no_grad():
        for call in (run, function):
            torch.manual_seed(0)
            x = X.clone()
            result = call(x)
            results.append(result if isinstance(result, tuple) else (result,))
            inputs.append(x)
    for got, want in zip(*results, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)
        assert got.stride() == want.stride()
    torch.testing.assert_close(*inputs)
    for tensors, x in zip(results, inputs, strict=True):
        if function is views:
            whole, part, turned, flat = (t.untyped_storage().data_ptr() for t in tensors)
            assert whole == part == turned
            assert flat == x.untyped_storage().data_ptr()
    assert report.rewritten == rewritten, str(report)


def test_hooks_run_forward_and_backward():
    def hooked():
        torch.manual_seed(0)
        net, seen = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU()), []
        net[0].register_forward_hook(lambda module, inputs, result: result * 3)
        net[0].weight.register_hook(lambda gradient: seen.append(gradient.norm().item()))
        return net, seen

    (net, seen), (plain, want) = hooked(), hooked()
    run, report = compiled(net)
    run(X).square().sum().backward()
    plain(X).square().sum().backward()
    assert report.rewritten == 2  # the forward and the gradient of its weight
    assert seen == pytest.approx(want, rel=1e-4)
    for got, parameter in zip(net.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(got.grad, parameter.grad, rtol=1e-4, atol=1e-4)


@pytest.mark.filterwarnings("ignore:ollie. `freeze`:UserWarning")
@pytest.mark.parametrize("crashes", [False, True])
def test_float64_convolutions_with_freezing(monkeypatch, crashes):
    if crashes:
        monkeypatch.setattr("ollie_compile.compat.freezing.freeze", lambda *_: 1 / 0)
    net, x = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU()).double().eval(), X.double()
    run, report = compiled(net, freeze=True)
    with torch.no_grad():
        torch.testing.assert_close(run(x), net(x))
    assert report.rewritten == 1
    assert any("without freezing: Inductor failed" in note for note in report.notes) == crashes


class InPlace(nn.Module):
    """Two additions in a row that Inductor's freezing of torch 2.13 makes in place, with a reader between."""

    def __init__(self):
        super().__init__()
        self.first, self.last = (nn.Conv2d(8, 8, 3, padding=1) for _ in range(2))
        self.inner = nn.ModuleList(nn.Conv2d(8, 8, 3, padding=1) for _ in range(2))
        self.outer = nn.ModuleList(nn.Conv2d(16, 8, 3, padding=1) for _ in range(2))

    def forward(self, x):
        first = y = self.first(x)
        for inner, outer in zip(self.inner, self.outer, strict=True):
            y = 0.2 * outer(torch.cat([y, torch.relu(inner(y))], 1)) + y
        y = 0.2 * y + first
        return torch.cat([y, self.last(y)], 1)


@pytest.mark.parametrize("budget_s", [0.0, 5.0])
def test_what_freezing_computes_wrongly_is_compiled_without_it(budget_s):
    torch.manual_seed(0)
    net, x = InPlace().eval(), torch.randn(1, 8, 16, 16)
    run = torch.compile(net, backend="ollie", options={"freeze": True, "budget_s": budget_s})
    with torch.no_grad():
        torch.testing.assert_close(run(x), net(x), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(
    "function",
    [lambda x: x + torch.rand(6, 6), lambda x: torch.linalg.cholesky(x)],
    ids=["random", "no function of random values"],
)
def test_what_cannot_be_compared_is_frozen_all_the_same(function, recwarn):
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(3, 4, 3)

        def forward(self, x, square):
            return self.conv(x), function(square)

    report, options = Report(), {**QUICK, "freeze": True}
    run = torch.compile(Net().eval(), backend=lambda *graph: compile_with(*graph, report, options=options))
    with torch.no_grad():
        run(X, torch.eye(6))
    assert "without freezing" not in str(report)


@pytest.mark.parametrize(
    "x",
    [torch.randn(6, 48)[:, :24], torch.randn(6, 48)[:, ::2], torch.randn(1, 24).expand(6, 24)],
    ids=["a slice", "every second", "expanded"],
)
def test_inputs_with_gaps_or_overlaps_are_frozen(x):
    class Named(nn.Linear):
        def forward(self, x):
            return nn.functional.linear(input=x, weight=self.weight)

    net, report = Named(24, 8, bias=False).eval(), Report()
    options = {"freeze": True, "budget_s": 30.0}
    run = torch.compile(net, backend=lambda *graph: compile_with(*graph, report, options=options))
    with torch.no_grad():
        torch.testing.assert_close(run(x), net(x), rtol=1e-4, atol=1e-5)
    assert "without freezing" not in str(report)
    assert "not compared" not in str(report)


def test_a_frozen_graph_that_differs_is_said(monkeypatch):
    from ollie_compile.graph import comparing

    monkeypatch.setattr(comparing, "LIMIT", -1.0)
    net, x, report = nn.Sequential(nn.Conv2d(3, 4, 3)).eval(), X, Report()
    options = {**QUICK, "freeze": True}
    run = torch.compile(net, backend=lambda *graph: compile_with(*graph, report, options=options))
    with torch.no_grad(), pytest.warns(UserWarning, match="without freezing"):
        torch.testing.assert_close(run(x), net(x), rtol=1e-4, atol=1e-5)
    assert "differ from eager's" in str(report)


def test_out_of_memory_while_measuring_keeps_the_original(monkeypatch):
    def full(*_, **__):
        raise torch.OutOfMemoryError("no memory is left")

    monkeypatch.setattr("ollie_compile.measure.timing.measure", full)
    monkeypatch.setattr("ollie_compile.measure.calls.compiled", lambda *_, **__: lambda: None)
    run, report = compiled(lambda x: torch.conv2d(x, K), tune="measure")
    with torch.no_grad():
        torch.testing.assert_close(run(X), torch.conv2d(X, K))
    assert report.rewritten == 0
    assert "no memory is left" in str(report)


def test_a_budget_of_0_searches_nothing(monkeypatch):
    monkeypatch.setattr("ollie_compile.plan.preparing.search", lambda *_, **__: pytest.fail("a search began"))
    report = ollie_compile.explain(nn.Conv2d(3, 4, 3), X, budget_s=0)
    assert [made.reason for _, made in report.plans] == [candidates.OUT_OF_TIME]
