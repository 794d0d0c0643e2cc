"""Where weights are held without being asked for, and when a graph goes on without holding them."""

import re

import pytest
import torch
from torch import nn

from ollie_compile.backend import compile_with
from ollie_compile.graph import frozen, held
from ollie_compile.graph.freezing import Freezer
from ollie_compile.report.report import Report

X = torch.randn(1, 3, 8, 8)


@pytest.fixture(autouse=True)
def _compiled_anew():
    torch.compiler.reset()
    with torch.no_grad():
        yield


@pytest.fixture
def freezers(monkeypatch):
    """The graphs that are frozen; Inductor compiles nothing."""
    frozen_graphs = []

    def compile_graph(gm, example_inputs, config_patches, inner_compile=None):
        if inner_compile is not None:
            frozen_graphs.append(inner_compile.__self__)
        return gm.forward

    monkeypatch.setattr("torch._inductor.compile_fx.compile_fx", compile_graph)
    return frozen_graphs


def small_net():
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU()).eval()


def compiled(net, dynamic=False, **options):
    report = Report()

    def backend(gm, inputs):
        return compile_with(gm, inputs, report, options={"budget_s": 1e-9, "tune": "model"} | options)

    return torch.compile(net, backend=backend, dynamic=dynamic), report


def test_weights_are_held_without_gradients(freezers):
    run, report = compiled(small_net())
    run(X)
    assert freezers
    assert all(isinstance(each, Freezer) for each in freezers)
    assert "without freezing" not in str(report)
    freezers.clear()
    with torch.enable_grad():
        run(X)
    compiled(small_net(), freeze=False)[0](X)
    compiled(small_net(), budget_s=0)[0](X)
    compiled(small_net(), portable=True)[0](X)
    assert not freezers


class Noisy(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(8))

    def forward(self, x):
        return x * self.weight + torch.rand(8)


@pytest.mark.parametrize(
    ("net", "dynamic", "why"),
    [(small_net, True, "compared first .sizes are dynamic"), (Noisy, False, "compared first .*rand")],
)
def test_weights_are_held_where_results_can_be_compared(freezers, net, dynamic, why):
    run, report = compiled(net(), dynamic=dynamic)
    run(X)
    assert not freezers
    assert re.search(why, str(report))
    compiled(net(), dynamic=dynamic, freeze=True)[0](X)
    assert freezers


def test_weights_that_memory_would_not_hold_twice(freezers, monkeypatch):
    monkeypatch.setattr(frozen, "MOST_OF_MEMORY", 0.0)
    run, report = compiled(small_net())
    run(X)
    assert "it may hold the weights twice, and they take 0.0 GiB of the memory's" in str(report)
    with pytest.warns(UserWarning, match="it may hold the weights twice"):
        compiled(small_net(), freeze=True)[0](X)
    assert not freezers


@pytest.mark.parametrize("write", [lambda data: data.mul_(2), lambda data: data[2].zero_()])
def test_what_is_written_through_data_is_seen_if_it_is_much(write):
    net = small_net()
    run, _ = compiled(net)
    torch.testing.assert_close(run(X), net(X))
    write(net[0].weight.data)
    torch.testing.assert_close(run(X), net(X))
    net[0].weight.detach().numpy()[1] = 3
    torch.testing.assert_close(run(X), net(X))


def test_weights_that_change_in_every_call_are_read_in_every_call(caplog, monkeypatch):
    net = small_net()
    run, _ = compiled(net)
    making, made = held.FrozenGraph._made, []

    def counted(*arguments):
        made.append(making(*arguments))
        return made[-1]

    monkeypatch.setattr(held.FrozenGraph, "_made", counted)
    for _ in range(2 * held.MOST_REMADE):
        torch.testing.assert_close(run(X), net(X))
        net[0].bias.add_(1)
    assert len(made) == held.MOST_REMADE
    assert (
        "ollie: a graph is compiled without freezing too, for weights that it cannot hold" in caplog.messages
    )
    for _ in range(3):  # weights that no longer change are held again
        torch.testing.assert_close(run(X), net(X))
    assert len(made) == held.MOST_REMADE + 1
