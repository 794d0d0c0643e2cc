"""A graph's effects are known before it runs; one with others than its results runs for its caller only."""

import copy
import re

import pytest
import torch
import torch.nn.functional as F
from torch import fx, nn

import ollie_compile
from ollie_compile.graph.effects import effects_of

X = torch.randn(2, 8, 12, 12)
calls = []


@torch.library.custom_op("ollie_tests::counted", mutates_args=())
def counted(x: torch.Tensor) -> torch.Tensor:
    calls.append(x)
    return x.clone()


@counted.register_fake
def _(x):
    calls.append(x)
    return torch.empty_like(x)


@torch.library.custom_op("ollie_tests::changed", mutates_args=("x",))
def changed(x: torch.Tensor) -> None:
    calls.append(x)
    x.add_(1)


@torch._dynamo.allow_in_graph
def opaque(x):
    calls.append(x)
    return x * 2


def graph_of(function, *inputs):
    """Dynamo's graph of a function, and the graph's inputs."""
    found = []

    def backend(gm, example_inputs):
        found.append((gm, example_inputs))
        return gm

    torch.compiler.reset()
    with torch.no_grad():
        torch.compile(function, backend=backend)(*inputs)
    calls.clear()
    return found[0]


@pytest.mark.parametrize(
    ("function", "unsafe"),
    [
        (nn.Sequential(nn.Conv2d(8, 8, 3), nn.BatchNorm2d(8), nn.ReLU()).eval(), ""),
        (nn.Sequential(nn.Conv2d(8, 8, 3), nn.BatchNorm2d(8)).train(), ""),
        (nn.TransformerEncoderLayer(12, 2, 24, batch_first=True).eval(), ""),
        (lambda x: x.clone().add_(1), ""),
        (F.dropout, "`aten::.*` draws random numbers"),
        (lambda x: x + torch.rand_like(x), "`aten::rand.*` draws random numbers"),
        (lambda x: counted(x) + 1, "`ollie_tests::counted` may have side effects"),
        (lambda x: changed(x), "`ollie_tests::changed` may have side effects"),
        (lambda x: opaque(x) + 1, "`opaque` may have side effects"),
        (lambda x: torch.cond(x.sum() > 0, torch.sin, torch.cos, (x,)), "`cond` may have side effects"),
    ],
)
def test_effects_are_listed_without_running(function, unsafe):
    gm, inputs = graph_of(function, X[0] if isinstance(function, nn.TransformerEncoderLayer) else X)
    before = [value.clone() for value in inputs]
    effects = effects_of(gm, inputs)
    assert re.fullmatch(unsafe, effects.unsafe or ""), effects
    assert effects.communicates is None
    assert calls == []
    for value, same in zip(inputs, before, strict=True):
        assert torch.equal(value, same)


def test_shapes_that_depend_on_data_are_not_listed():
    gm = fx.symbolic_trace(lambda x: torch.nonzero(x))
    assert effects_of(gm, [X]).unsafe.startswith("its operators could not be listed")


def test_buffers_of_the_graph_itself_are_not_written():
    root, graph = nn.Module(), fx.Graph()
    root.register_buffer("count", torch.zeros(()))
    x, count = graph.placeholder("x"), graph.get_attr("count")
    graph.output(graph.call_function(torch.add, (x, graph.call_method("add_", (count, 1)))))
    gm = fx.GraphModule(root, graph)
    assert effects_of(gm, [X]).unsafe == "`aten::add_` may change a buffer"
    assert gm.count == 0


@pytest.mark.parametrize("grad", [False, True])
def test_communication_is_found(grad):
    gm = fx.symbolic_trace(lambda x: torch.ops._c10d_functional.all_reduce(x + 1, "sum", "0"))
    with torch.set_grad_enabled(grad):
        effects = effects_of(gm, [X])
    assert effects.communicates == "_c10d_functional::all_reduce"
    assert effects.unsafe == "it exchanges data with other processes (_c10d_functional::all_reduce)"


class Streaming(nn.Module):
    """A causal convolution that keeps what it has seen, and counts its calls."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv1d(8, 8, 5)
        self.register_buffer("history", torch.zeros(1, 8, 4))
        self.register_buffer("calls", torch.zeros((), dtype=torch.long))

    def forward(self, x):
        seen = torch.cat([self.history, x], -1)
        self.history.copy_(seen[..., -4:])
        self.calls.add_(1)
        return self.conv(seen).relu()


class Normed(nn.Module):
    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(
            nn.utils.parametrizations.spectral_norm(nn.Conv2d(8, 8, 3)), nn.BatchNorm2d(8), nn.ReLU()
        )

    def forward(self, x):
        return self.net(x[None].reshape(2, 8, 4, -1))


@pytest.mark.usefixtures("fresh", "uncompiled", "always_rewrite")
@pytest.mark.parametrize("freeze", [False, True])
@pytest.mark.parametrize("kind", [Streaming, Normed])
def test_state_advances_with_each_call_and_no_more(kind, freeze):
    net = kind().train()
    plain = copy.deepcopy(net)
    options = {"freeze": freeze, "budget_s": 5.0, "margin": 0.0, "candidates": 1}
    run = torch.compile(net, backend="ollie", options=options, dynamic=False)
    with torch.no_grad():
        for _ in range(3):
            x = torch.randn(1, 8, 32)
            torch.testing.assert_close(run(x), plain(x), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(net.state_dict(), plain.state_dict(), rtol=1e-4, atol=1e-5)


@pytest.mark.usefixtures("fresh", "uncompiled", "always_rewrite")
@pytest.mark.parametrize("freeze", [False, True])
def test_side_effects_happen_once_a_call(freeze):
    net = nn.Conv2d(8, 8, 3).eval()
    options = {"freeze": freeze, "budget_s": 5.0, "margin": 0.0, "candidates": 1}
    run = torch.compile(lambda x: counted(net(x).relu()), backend="ollie", options=options, dynamic=False)
    calls.clear()
    with torch.no_grad():
        for _ in range(2):
            torch.testing.assert_close(run(X), net(X).relu(), rtol=1e-4, atol=1e-5)
    assert sum(type(x) is torch.Tensor for x in calls) == 2


@pytest.mark.usefixtures("fresh", "uncompiled", "always_rewrite")
def test_operators_are_derived_alone_in_a_graph_that_must_not_run():
    net = nn.Conv2d(8, 8, 3).eval()
    options = {"tune": "measure", "budget_s": 20.0, "margin": 0.0, "candidates": 1}
    report = ollie_compile.explain(lambda x: counted(net(x)), X, **options)
    assert "the whole graph was not compared: `ollie_tests::counted` may have side effects" in report.notes
    assert len(report.plans) == 1
