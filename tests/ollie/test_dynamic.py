"""One graph for many sizes: derived at the sizes of the compilation, and right at others."""

import json

import pytest
import torch
from torch import nn

import ollie_compile
from ollie_compile import backend
from ollie_compile.backend import compile_with
from ollie_compile.plan import saved
from ollie_compile.problems import dynamic, polynomials
from ollie_compile.report.report import Report
from ollie_compile.targets.matmul import match_matmul

QUICK = {"tune": "model", "margin": 0.0, "budget_s": 120, "max_depth": 0, "candidates": 1}

pytestmark = pytest.mark.usefixtures("fresh", "products_first", "uncompiled")


@pytest.fixture
def products_first(monkeypatch):
    """The programs with the fewest products are bounded lowest, others never win."""

    def bound(program, *arguments, **named):
        return 1e-12 * sum(1 for scope in program.scope.scopes() if match_matmul(scope)) or 1.0

    monkeypatch.setattr("ollie_compile.measure.bounds.bound_seconds", bound)


def compiled(net):
    """The net compiled once for all sizes, the report, and how often it was compiled."""
    report, graphs = Report(), []

    def backend(gm, example_inputs):
        graphs.append(gm)
        return compile_with(gm, example_inputs, report, options=QUICK)

    return torch.compile(net, backend=backend, dynamic=True), report, graphs


@pytest.mark.parametrize(
    "net",
    [nn.Conv2d(3, 4, 3, padding=1), nn.ConvTranspose2d(3, 2, 4, 2, 1)],
    ids=["products and additions", "sub-pixel"],
)
def test_one_graph_serves_batches_and_images_of_many_sizes(net):
    run, report, graphs = compiled(net.eval())
    with torch.no_grad():
        for shape in ((2, 3, 12, 14), (5, 3, 16, 9), (3, 3, 31, 40)):
            x = torch.randn(shape)
            got, want = run(x), net(x)
            torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)
            assert got.stride() == want.stride()
        assert len(graphs) == 1
        assert report.rewritten == 1, str(report)
        small = torch.randn(2, 3, 4, 4)  # below the sizes it was derived for: a graph of its own
        torch.testing.assert_close(run(small), net(small), rtol=1e-4, atol=1e-5)
        assert len(graphs) == 2
    assert any("6" in guard or "8" in guard for guard in report.guards), report.guards


def test_bilinear_forms_serve_all_batches(monkeypatch):
    """Their tiles round sizes of images up, but not the batch."""
    monkeypatch.setattr(
        "ollie_compile.measure.bounds.bound_seconds",
        lambda program, *_, **__: 1e-12 if program.scope.constants() else 1.0,
    )
    report = Report()
    options = {**QUICK, "max_depth": 1}
    net = nn.Conv2d(8, 8, 3, padding=1).eval()
    run = torch.compile(net, backend=lambda *graph: compile_with(*graph, report, options=options))
    for batch in (4, 7):
        x = torch.randn(batch, 8, 12, 12)
        torch._dynamo.mark_dynamic(x, 0)
        with torch.no_grad():
            torch.testing.assert_close(run(x), net(x), rtol=1e-4, atol=1e-5)
    assert [made.winner.program.kernels for _, made in report.plans] == ["cpp"], str(report)


def test_a_stride_that_may_not_divide_is_refused():
    report = ollie_compile.explain(nn.Conv2d(3, 4, 3, 2), torch.randn(2, 3, 12, 14), dynamic=True, **QUICK)
    assert report.rewritten == 0
    assert "with dynamic shapes: " in str(report)


class Heads(nn.Module):
    def __init__(self):
        super().__init__()
        self.q, self.k = nn.Linear(16, 16), nn.Linear(16, 8, bias=False)

    def forward(self, x):
        return self.q(x).relu(), self.k(x).sigmoid()


def test_products_side_by_side_at_many_lengths():
    net = Heads().eval()
    run, report, graphs = compiled(net)
    with torch.no_grad():
        for shape in ((2, 7, 16), (3, 33, 16)):
            x = torch.randn(shape)
            torch.testing.assert_close(run(x), net(x), rtol=1e-4, atol=1e-5)
    assert len(graphs) == 1
    assert report.rewritten == 1, str(report)


@pytest.mark.parametrize(
    ("net", "shape", "other"),
    [(Heads(), (2, 7, 16), (3, 33, 16)), (nn.Conv2d(3, 4, 3, padding=1), (2, 3, 12, 14), (5, 3, 16, 9))],
    ids=["products", "convolution"],
)
def test_later_compilations_search_no_more(net, shape, other, monkeypatch, tmp_path):
    monkeypatch.setenv("OLLIE_CACHE_DIR", str(tmp_path / "plans"))
    net.eval()
    for again in ("first", "in this process", "in another process"):
        torch._dynamo.reset()
        if again != "first":
            for search in ("plan.preparing.search", "problems.dynamic.derive"):
                monkeypatch.setattr(f"ollie_compile.{search}", lambda *_, **__: pytest.fail("a search began"))
        if again == "in another process":
            backend.CONTEXT.reset()
            dynamic._families.cache_clear()
        run, report, _ = compiled(net)
        with torch.no_grad():
            for size in (shape, other):
                x = torch.randn(size)
                torch.testing.assert_close(run(x), net(x), rtol=1e-4, atol=1e-5)
        assert report.rewritten == 1, str(report)
    assert saved.EARLIER in str(report)


def test_calls_as_plain_data_are_the_calls():
    def function(x):
        filled = torch.full((4, 1), 2.0, dtype=torch.float64, device="cpu")
        first, _ = x.split([2, 2])
        return filled + first.clone(memory_format=torch.contiguous_format)

    made = polynomials.record(function, lambda: [torch.empty(4)])
    plain = json.loads(json.dumps(made.plain()))
    assert polynomials.Calls.of(plain) == made
    (got,) = polynomials.Calls.of(plain)((), torch.ones(4))
    torch.testing.assert_close(got, torch.full((4, 2), 3.0, dtype=torch.float64))


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (lambda call: ["aten.add_.Tensor", *call[1:]], "must be of operators that lowering emits"),
        (lambda call: ["aten.from_file.default", ["/etc/passwd"], {}], "lowering emits, got 'aten.from_file"),
        (lambda call: [["aten.mm.default"], *call[1:]], "must be of operators that lowering emits"),
        (lambda call: [call[0], {"value": 0}, {}], "must be a list and a mapping"),
        (lambda call: [call[0], [{"value": -1}], {}], "a count must be a whole number, 0 or more, got -1"),
        (lambda call: [call[0], [{"value": True}], {}], "a count must be a whole number"),
        (lambda call: [call[0], [{"torch": "torch.load"}], {}], "an argument must be a number"),
        (lambda call: [call[0], [{"device": "meta"}], {}], "an argument must be a number"),
        (lambda call: [call[0], [{"terms": [[1, [99]]]}], {}], "an exponent must be 8 or less, got 99"),
        (
            lambda call: [call[0], [{"terms": [[1.5, [1]]]}], {}],
            "a coefficient must be a whole number, got 1.5",
        ),
        (lambda call: [call[0], [2**70], {}], "an argument must be a number"),
        (lambda call: [call[0], [float("nan")], {}], "an argument must be a number"),
    ],
)
def test_calls_that_lowering_does_not_emit_are_refused(change, match):
    made = polynomials.record(lambda x: x.view(2, 2), lambda: [torch.empty(4)])
    plain = json.loads(json.dumps(made.plain()))
    plain["calls"] = [change(plain["calls"][0])]
    with pytest.raises(ValueError, match=match):
        polynomials.Calls.of(plain)


def test_strides_that_leave_a_tensor_are_refused():
    made = polynomials.record(
        lambda x: torch.as_strided(x, (4, 1), (1, 7)), lambda: [torch.empty(4, 1)]
    )  # along a dimension of size 1 any stride will do
    (got,) = made((), torch.ones(4, 1))
    assert got.stride() == (1, 7)
    plain = made.plain()
    for arguments in ([[4, 1], [5, 1]], [[8, 1], [1, 7]], [[4, 1], [1, 7], 3]):
        plain["calls"][0][1] = [{"value": 0}, *arguments]
        with pytest.raises(ValueError, match="as_strided must keep the layout"):
            polynomials.Calls.of(plain)((), torch.ones(4, 1))


def test_polynomials_fit_products_of_sizes_and_refuse_quotients():
    def fitted(function):
        def recorded(sizes):
            return polynomials.record(lambda x: function(x, *sizes), lambda: [torch.empty(*sizes, 6)])

        return polynomials.fit(recorded, (2, 3), (1, 1), ((8, 9),))

    x = torch.randn(7, 5, 6)
    (got,) = fitted(lambda x, n, m: x.reshape(n * m, 6)[: n + 2])((7, 5), x)
    torch.testing.assert_close(got, x.reshape(35, 6)[:9])
    with pytest.raises(ValueError, match=r"no polynomial|may not divide"):
        fitted(lambda x, n, m: x.reshape(n * m, 6)[: n * m // 2])
