"""Subprograms of several products, found in graphs and derived, without Inductor."""

import logging
from dataclasses import replace

import pytest
import torch
from torch import nn
from torch._inductor.decomposition import select_decomp_table
from torch.fx.experimental.proxy_tensor import make_fx

from ollie_compile import OllieConfig, Report, backend
from ollie_compile.expr import Read
from ollie_compile.graph.derivation_pass import DerivationPass

QUICK = {"tune": "model", "margin": 0.0, "budget_s": 120, "candidates": 1}


@pytest.fixture(autouse=True)
def _fewest_products(monkeypatch):
    """The candidate with the fewest products is bounded lowest."""

    def bound(program, *arguments, **named):
        return 1e-12 * sum(1 for scope in program.scope.scopes() if scope.is_contraction)

    monkeypatch.setattr("ollie_compile.measure.bounds.bound_seconds", bound)
    monkeypatch.setattr(backend.CONTEXT, "plans", {})


def derive(module, *inputs, mode="fake", **options):
    """The report of the pass over a module's graph, that graph, and its results beside the module's."""
    module = module.eval().requires_grad_(False)
    state = {**dict(module.named_parameters()), **dict(module.named_buffers())}

    def call(values, *inputs):
        return torch.func.functional_call(module, dict(zip(state, values, strict=True)), inputs)

    values = list(state.values())
    traced = make_fx(call, tracing_mode=mode, decomposition_table=select_decomp_table())(values, *inputs)
    traced.graph.eliminate_dead_code()  # as AOTAutograd does
    report = Report()
    DerivationPass(OllieConfig(**QUICK | options), report, backend.CONTEXT, [])(traced.graph)
    traced.graph.lint()
    traced.recompile()
    return report, traced.graph, traced(values, *inputs), module(*inputs)


def count(graph, *targets):
    return sum(node.target in targets for node in graph.nodes)


def equal(got, want, dtype=torch.float32):
    loose = {torch.float16: 2e-3, torch.bfloat16: 2e-2}.get(dtype, 1e-4)
    got, want = ((y,) if isinstance(y, torch.Tensor) else y for y in (got, want))
    for mine, theirs in zip(got, want, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=loose, atol=loose)
        assert mine.stride() == theirs.stride()


class Attention(nn.Module):
    """Parallel products of unequal widths, with and without biases."""

    def __init__(self, width=24):
        super().__init__()
        self.q, self.k = nn.Linear(width, width), nn.Linear(width, width // 2, bias=False)
        self.v = nn.Linear(width, width // 3)

    def forward(self, x):
        return self.q(x).relu(), self.k(x).sigmoid(), self.v(x).exp()


class LoRA(nn.Module):
    def __init__(self, width=24):
        super().__init__()
        self.w = nn.Linear(width, width)
        self.a, self.b = nn.Linear(width, 2, bias=False), nn.Linear(2, width, bias=False)

    def forward(self, x):
        return (self.w(x) + self.b(self.a(x)) * 0.3).relu()


class RepVGG(nn.Module):
    """3x3, 1x1 and identity, each with a batch norm."""

    def __init__(self, channels=8):
        super().__init__()
        self.wide = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.narrow = nn.Conv2d(channels, channels, 1, bias=False)
        self.norms = nn.ModuleList([nn.BatchNorm2d(channels) for _ in range(3)])
        for norm in self.norms:
            for tensor in (norm.running_mean, norm.running_var, norm.weight, norm.bias):
                nn.init.uniform_(tensor, 0.5, 2.0)

    def forward(self, x):
        branches = zip(self.norms, (self.wide(x), self.narrow(x), x), strict=True)
        return sum(norm(branch) for norm, branch in branches).relu()


class Branches(nn.Module):
    """Parallel convolutions of unequal kernels."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Conv2d(8, 3, 1), nn.Conv2d(8, 5, 3, padding=1)

    def forward(self, x):
        return self.a(x).relu(), self.b(x).sigmoid()


class Band(nn.Module):
    """Each row meets the keys around it, as in sliding-window attention."""

    def forward(self, a, b):
        window = nn.functional.pad(b, (0, 0, 2, 2)).unfold(1, 5, 1)
        return torch.einsum("bmk,bmkw->bmw", a, window)


class Complex(nn.Module):
    """Two products of one complex tensor."""

    def forward(self, x):
        wave = torch.complex(x, x).view(-1, 24)
        return torch.view_as_real(wave @ wave[:1].T), torch.view_as_real(wave @ wave[:2].T)


class Integers(nn.Module):
    """Products of one tensor side by side, and a sum of products."""

    def forward(self, x):
        return x @ x.T, x @ x[:1].T, x @ x[1:].T + x @ x[:1].T


class Codes(nn.Module):
    """Products of weights that are held in eight bits, and with integers beside numbers."""

    def __init__(self):
        super().__init__()
        self.register_buffer("codes", torch.randint(-9, 9, (24, 24), dtype=torch.int8))

    def forward(self, x):
        wide = torch._int_mm((x * 8).to(torch.int8), self.codes)
        summed = x @ self.codes.float() + x @ self.codes.T.float()
        return wide, summed, x @ (x + self.codes) + x @ (x * (self.codes > 0))


mm, addmm, bmm, conv = (getattr(torch.ops.aten, n).default for n in ("mm", "addmm", "bmm", "convolution"))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("batch", [1, 16])
def test_parallel_products_become_one(batch, dtype):
    report, graph, got, want = derive(Attention().to(dtype), torch.randn(batch, 3, 24, dtype=dtype))
    assert report.rewritten == 1, str(report)
    assert count(graph, mm, addmm) == 1
    equal(got, want, dtype)


def test_lora_folds_into_the_weight():
    x = torch.randn(5, 24, 7).transpose(1, 2)  # not contiguous
    report, graph, got, want = derive(LoRA(), x)
    assert "reassociation" in str(report)
    assert count(graph, mm, addmm) <= 2  # A @ B, and everything with x
    assert not any(24 not in node.meta["val"].shape for node in graph.nodes if node.target is mm)
    equal(got, want)


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_repvgg_branches_merge_with_their_norms(memory_format):
    x = torch.randn(2, 8, 5, 6).to(memory_format=memory_format)
    report, _, got, want = derive(RepVGG().to(memory_format=memory_format), x)
    assert report.rewritten >= 1
    assert "shared factor" in str(report)
    equal(got, want)


def test_parallel_convolutions_of_unequal_kernels_are_planned_together():
    report, _, got, want = derive(Branches(), torch.randn(1, 8, 5, 5))
    assert report.plans[0][0] == ["convolution, convolution_1"]
    equal(got, want)


def test_products_of_windows_are_banded():
    report, graph, got, want = derive(Band(), torch.randn(2, 6, 4), torch.randn(2, 6, 4))
    ((_, plan),) = report.plans
    assert "X0[i0, i1 + i3 - 2, k]" in str(plan.winner.program.scope)
    assert count(graph, bmm) == 0
    equal(got, want)


def test_what_wins_nothing_is_left_and_counted(monkeypatch):
    monkeypatch.setattr("ollie_compile.measure.bounds.bound_seconds", lambda *_, **__: 1.0)
    report, graph, got, want = derive(Branches(), torch.randn(1, 8, 5, 5))
    assert report.rewritten == 0
    assert [nodes for nodes, _ in report.plans] == [
        ["convolution, convolution_1"],
        ["convolution"],
        ["convolution_1"],
    ]
    assert count(graph, conv) == 2
    assert report.others == {"aten.relu.default": 1, "aten.sigmoid.default": 1}
    assert "left to Inductor: aten.relu.default 1, aten.sigmoid.default 1" in str(report)
    equal(got, want)


def test_single_products_are_counted():
    report, graph, got, want = derive(nn.Linear(4, 3), torch.randn(2, 4))
    assert not report.plans
    assert report.others["aten.addmm.default"] == count(graph, addmm) == 1
    equal(got, want)


@pytest.mark.parametrize(
    ("module", "x"),
    [
        (Attention(), torch.randn(0, 3, 24)),
        (Branches(), torch.randn(0, 8, 5, 5)),
        (Complex(), torch.randn(2, 3, 24)),
        (Integers(), torch.randint(-9, 9, (2, 24))),
    ],
    ids=["empty", "empty images", "complex", "integers"],
)
def test_what_cannot_be_derived_stays(module, x):
    report, _, got, want = derive(module, x)
    assert report.rewritten == 0
    assert not report.plans
    equal(got, want)


def test_integers_stay_outside():
    report, graph, got, want = derive(Codes(), torch.randn(24, 24))
    assert [nodes for nodes, _ in report.plans] == [["add"], ["add_2"]]
    assert count(graph, torch.ops.aten._int_mm.default) == 1
    equal(got, want)


@pytest.mark.filterwarnings("ignore:torch.quantize_per_tensor:UserWarning")  # torch will remove these
def test_quantized_tensors_stay():
    graph = torch.fx.Graph()
    x, weight = graph.placeholder("x"), graph.placeholder("weight")
    for node, shape in ((x, (1, 2, 8, 8)), (weight, (3, 2, 3, 3))):
        node.meta["val"] = torch.quantize_per_tensor(torch.randn(shape), 0.1, 0, torch.qint8)
    conv = graph.call_function(
        torch.ops.aten.convolution.default, (x, weight, None, [1], [0], [1], False, [0], 1)
    )
    conv.meta["val"] = torch.randn(1, 3, 6, 6)
    graph.output(conv)
    report = Report()
    DerivationPass(OllieConfig(**QUICK), report, backend.CONTEXT, [])(graph)
    assert report.untouched == [("convolution_default", "dtypes torch.float32 and torch.qint8")]


def test_data_dependent_shapes_stay():
    class Chosen(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = Attention()

        def forward(self, x):
            return self.inner(x[x[:, 0, 0] > 0])

    report, _, got, want = derive(Chosen(), torch.randn(7, 3, 24), mode="symbolic")
    assert not report.plans
    assert not any("failed" in reason for _, reason in report.untouched)
    equal(got, want)


def test_a_value_that_others_need_stays_outside():
    class Shared(LoRA):
        def forward(self, x):
            low = self.a(x)
            return self.w(x) + self.b(low), low.relu()

    _, _, got, want = derive(Shared(), torch.randn(2, 3, 24))
    equal(got, want)


def test_a_subprogram_reads_another_and_weights_that_come_late():
    class Stack(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = Attention(), Attention()

        def forward(self, x):
            q, k = self.first.q(x), self.first.k(x)
            late = self.first.v.weight.exp()  # computed after the first of the products that it joins
            return q.relu(), k, x @ late.T, self.second.q(q), self.second.k(q)

    report, _, got, want = derive(Stack(), torch.randn(4, 24))
    assert report.rewritten == 2, str(report)
    equal(got, want)


def test_long_chains_are_cut():
    class Chain(nn.Module):
        def forward(self, x):
            for _ in range(150):
                x = x * 0.5 + 1
            return x

    _, _, got, want = derive(Chain(), torch.randn(3))
    equal(got, want)


def test_a_fault_in_finding_leaves_the_graph(monkeypatch):
    monkeypatch.setattr("ollie_compile.problems.subprograms._trees", lambda graph: 1 / 0)
    report, _, got, want = derive(LoRA(), torch.randn(2, 3, 24))
    assert report.untouched == [("subprograms", "finding them failed: division by zero")]
    equal(got, want)


def test_a_wrong_candidate_comes_with_a_reproducer(monkeypatch, caplog, capsys):
    from ollie_compile.plan import preparing

    def search(expression, **limits):
        found = plan_search(expression, **limits)
        derivation = found.derivations[0]
        read = derivation.scope.factors[0]
        moved = derivation.scope.with_factor(0, Read(read.tensor, (read.index[0] + 1, *read.index[1:])))
        found.derivations = [replace(derivation, scope=moved)]
        return found

    plan_search = preparing.search
    monkeypatch.setattr(preparing, "search", search)
    with caplog.at_level(logging.ERROR):
        report, _, got, want = derive(Attention(), torch.randn(2, 3, 24))
    assert report.rewritten == 0
    equal(got, want)
    wrong = [c for _, made in report.plans for c in made.candidates if c.reproducer]
    assert wrong, str(report)
    assert wrong[0].reproducer in caplog.text
    exec(compile(wrong[0].reproducer, "reproducer", "exec"), {})
    assert "differs over the integers" in capsys.readouterr().out
    caplog.clear()
