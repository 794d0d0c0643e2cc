"""Operators that users declare: called, compiled, left, and refused."""

import logging

import pytest
import torch
from torch import nn
from torch._functorch._aot_autograd.descriptors import PlainAOTOutput, TangentAOTInput
from torch.fx.experimental.proxy_tensor import make_fx

import ollie_compile
from ollie_compile import backend
from ollie_compile.graph.derivation_pass import DerivationPass
from tests.ollie.test_subprograms import QUICK, derive, equal

A, B = torch.randn(2, 4, 6), torch.randn(2, 6, 5)
X, K = torch.randn(3, 8), torch.randn(3, 3)


@ollie_compile.operator("O[b, m, n] += A[b, m, k] * B[b, k, n]")
def product(a, b):
    return torch.einsum("bmk,bkn->nbm", a, b).permute(1, 2, 0)  # not contiguous


@ollie_compile.operator("O[b, n, m] += A[b, m, k] * B[b, k, n]")
def by_name(B, A):
    return (A @ B).mT


@ollie_compile.operator("O[h:1..8] += X[c, h + r - 1] * K[c, r]")
def window(x, k):
    return torch.conv1d(x[None], k[None], padding=1)[0, 0, 1:]


@ollie_compile.operator("O[j, i] = tanh(X[i, j])")
def turned(x):
    return x.T.tanh()


@ollie_compile.operator("O[b, m, n] += A[b, m, k] * B[b, k, n]")
def doubled(a, b):
    return 2 * (a @ b)


class Calls(nn.Module):
    def __init__(self, operator):
        super().__init__()
        self.operator = operator

    def forward(self, *tensors):
        return self.operator(*(tensor.relu() for tensor in tensors)).exp()


@pytest.fixture(autouse=True)
def _cheap(tmp_path, monkeypatch):
    """Every candidate beats the original, the shortest first, and no cache answers."""
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    torch.compiler.reset()
    monkeypatch.setattr(
        "ollie_compile.measure.bounds.bound_seconds",
        lambda program, *_, **__: 1e-12 * sum(1 for _ in program.scope.scopes()),
    )
    monkeypatch.setattr(backend.CONTEXT, "plans", {})


def test_eager_calls_run_the_function():
    torch.testing.assert_close(product(A, B), A @ B)
    torch.testing.assert_close(by_name(B, A), (A @ B).mT)
    assert product(A, B).is_contiguous()
    torch.library.opcheck(product, (A, B), test_utils=("test_schema", "test_faketensor"))


@pytest.mark.parametrize(
    ("operator", "tensors"),
    [(product, (A, B)), (by_name, (B, A)), (window, (X, K)), (turned, (X,))],
    ids=["product", "by name", "window", "function"],
)
def test_compiled_equals_eager(operator, tensors):
    report, graph, got, want = derive(Calls(operator), *tensors)
    assert report.rewritten == 1, str(report)
    assert "ollie_user" in str(report)
    assert "ollie_user" not in str(graph)
    equal(got, want)


def test_torch_compile_finds_them():
    compiled = torch.compile(lambda a, b: product(a, b), backend="ollie", options=QUICK, dynamic=False)
    with torch.no_grad():
        torch.testing.assert_close(compiled(A, B), A @ B)
    (made,) = backend.CONTEXT.plans.values()
    assert made.winner is not None


def test_a_wrong_notation_is_named_and_left(caplog):
    with caplog.at_level(logging.ERROR):
        report, graph, got, want = derive(Calls(doubled), A, B)
    assert report.rewritten == 0
    ((_, made),) = report.plans
    assert made.reason.startswith("its notation is not what its function computes: it differs by 5.0e-01")
    assert made.reason in caplog.text
    assert "ollie_user.doubled" in str(graph)
    equal(got, want)


def test_the_same_notation_of_another_function_is_another_operator():
    class Both(nn.Module):
        def forward(self, a, b):
            return product(a, b), doubled(a, b)

    report, _, got, want = derive(Both(), A, B)
    assert report.rewritten == 1
    equal(got, want)


def test_what_loses_is_left(monkeypatch):
    monkeypatch.setattr("ollie_compile.measure.bounds.bound_seconds", lambda *_: 1.0)
    report, graph, got, want = derive(Calls(product), A, B)
    assert report.rewritten == 0
    assert "ollie_user.product" in str(graph)
    equal(got, want)


@pytest.mark.parametrize(
    ("tensors", "mode", "reason"),
    [
        ((A, B), "symbolic", "dynamic shapes"),
        ((A.long(), B.long()), "fake", "dtypes torch.int64"),
        ((A, B.double()), "fake", "dtypes torch.float32 and torch.float64"),
        ((A[:0], B[:0]), "fake", "a dimension of size 0"),
    ],
)
def test_what_cannot_be_derived_is_left_and_counted(tensors, mode, reason):
    class Plain(nn.Module):
        def forward(self, a, b):
            return mixed(a, b)

    report, graph, got, want = derive(Plain(), *tensors, mode=mode)
    assert report.untouched == [("mixed", reason)]
    assert "ollie_user.mixed" in str(graph)
    equal(got, want)


@ollie_compile.operator("O[b, m, n] += A[b, m, k] * B[b, k, n]")
def mixed(a, b):
    dtype = torch.promote_types(a.dtype, b.dtype)
    return a.to(dtype) @ b.to(dtype)


def test_gradients_are_the_users():
    @ollie_compile.operator("O[i] = A[i] * B[i]")
    def times(a, b):
        return a * b

    x = torch.randn(4, requires_grad=True)
    with pytest.raises(RuntimeError, match="no autograd formula was registered"):
        times(x, x).sum().backward()
    times.register_autograd(
        lambda ctx, grad: tuple(grad * saved for saved in ctx.saved_tensors[::-1]),
        setup_context=lambda ctx, inputs, output: ctx.save_for_backward(*inputs),
    )
    (got,) = torch.autograd.grad(times(x, x.exp()).sum(), x)
    torch.testing.assert_close(got, (1 + x.detach()) * x.detach().exp())


def test_training_graphs_keep_them():
    traced = make_fx(lambda a, b, gradient: (product(a, b), gradient.exp()))(A, B, A)
    *_, gradient = traced.graph.find_nodes(op="placeholder")
    gradient.meta["desc"] = TangentAOTInput(PlainAOTOutput(0))  # as AOTAutograd describes it
    report = ollie_compile.Report()
    DerivationPass(ollie_compile.OllieConfig(**QUICK), report, backend.CONTEXT, [])(traced.graph)
    assert report.untouched == [("product", "gradients are computed")]
    assert report.others == {"aten.exp.default": 1}


@pytest.mark.parametrize(
    ("notation", "function", "message"),
    [
        ("A[i] * B[i]", lambda a, b: a * b, "must look like"),
        ("O[i] = A[i] *", lambda a: a, "no tensor"),
        ("O[i] = sine(A[i])", lambda a: a, r"not known \(sine\)"),
        ("O[i] += A[i, k] * A[k]", lambda a: a, "a read at 1 indices of a tensor of 2"),
        ("O[h] += A[h + r] * K[r]", lambda a, k: a, "The range of `h` must be given"),
        ("O[] += A[i] * B[i]", lambda a, b: a, "must have an iterator on the left"),
        ("O[i] = A[i]", lambda a: a, "must be a function with a name, got '<lambda>'"),
    ],
)
def test_what_is_no_operator_is_named(notation, function, message):
    with pytest.raises(ValueError, match=message):
        ollie_compile.operator(notation)(function)


def test_parameters_are_the_tensors():
    declare = ollie_compile.operator("O[i] = A[i] * B[i]")
    for parameters in ("a", "a, b, c", "B, X", "a, b=None", "*a", "a, *, b"):
        made = {}
        exec(f"def few({parameters}): return a", made)
        with pytest.raises(
            ValueError, match="parameters of `few` must be the tensors of its notation, A, B, got"
        ):
            declare(made["few"])


def test_a_name_is_taken_once():
    def product(a, b):
        return a @ b

    with pytest.raises(ValueError, match="a name of its own, got `product` again"):
        ollie_compile.operator("O[m, n] += A[m, k] * B[k, n]")(product)


@ollie_compile.operator("O[m, n] += A[m, k] * B[k, n]")
def transposed(a, b):
    return (a @ b).T


def test_calls_with_wrong_shapes_are_named():
    with pytest.raises(ValueError, match=r"`A` must have 3 dimensions, as in .*, got shape \(4, 6\)"):
        product(A[0], B)
    with pytest.raises(ValueError, match=r"`k` must have one range, got 6 and 5 \(of B\)"):
        product(A, B.mT)
    with pytest.raises(ValueError, match=r"`transposed` must return torch.float32 of shape \(4, 5\), by its"):
        transposed(A[0], B[0])
