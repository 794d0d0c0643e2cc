"""What is timed as it will be called once a graph is frozen."""

import pytest
import torch
from torch import nn

from ollie_compile import compat
from ollie_compile.backend import compile_with
from ollie_compile.graph.derivation_pass import DerivationPass
from ollie_compile.lower.lowering import Program
from ollie_compile.measure import bounds
from ollie_compile.measure.machine import Machine
from ollie_compile.report.report import Report
from tests.ollie.strategies import operator

pytestmark = pytest.mark.skipif(not compat.has_onednn(), reason="weights are packed by oneDNN")


@pytest.mark.parametrize(
    ("shape", "taps", "options"),
    [
        ((1, 16, 9, 9), (16, 16, 3, 3), {"padding": 1}),
        ((1, 16, 9, 9), (16, 8, 3, 3), {"padding": 1, "groups": 2}),
        ((1, 16, 5, 5), (16, 8, 4, 4), {"stride": 2, "padding": 1, "transposed": True}),
        ((1, 4, 5, 5, 5), (4, 4, 3, 3, 3), {}),
    ],
    ids=["images", "groups", "transposed", "volumes"],
)
def test_originals_read_packed_weights(shape, taps, options):
    conv = operator(torch.zeros(shape), torch.zeros(taps), **options)
    inputs = conv.example_inputs()
    plain = Machine().called(conv.reference, inputs, constant=())
    packed = Machine().called(conv.reference, inputs, constant=[1])
    assert not any("mkldnn" in str(node.target) for node in plain.graph.graph.nodes)
    assert any("mkldnn" in str(node.target) for node in packed.graph.graph.nodes)
    torch.testing.assert_close(packed(), conv.reference(*inputs), rtol=1e-4, atol=1e-5)


def test_what_onednn_does_not_pack_is_called_as_it_is():
    conv = operator(torch.zeros(1, 4, 9), torch.zeros(4, 4, 3))
    call = Machine().called(conv.reference, conv.example_inputs(), constant=[1])
    assert not any("mkldnn" in str(node.target) for node in call.graph.graph.nodes)
    torch.testing.assert_close(call(), conv.reference(*conv.example_inputs()), rtol=1e-4, atol=1e-5)


def test_views_that_follow_one_another_are_one():
    def function(x):
        return (x.permute(1, 0)[1:].unsqueeze(0).expand(2, 3, 4) + 1).transpose(1, 2)

    x = torch.randn(4, 4)
    call = Machine().called(function, (x,), constant=())
    assert call.operators == 1
    assert sum(node.op == "call_function" for node in call.graph.graph.nodes) == 3
    torch.testing.assert_close(call(), function(x))
    parts = Machine().called(
        lambda x: torch.add(*x.split(2)), (x,), constant=()
    )  # no view gives several tensors
    torch.testing.assert_close(parts(), x[:2] + x[2:])


def test_what_cannot_win_by_its_products_is_not_measured(monkeypatch):
    conv = operator(torch.zeros(1, 8, 16, 16), torch.zeros(8, 8, 3, 3), padding=1)
    program = Program(conv.expression(), "convolution")
    monkeypatch.setattr(bounds, "library_seconds", lambda *_: 5.0)
    assert Machine().bound_seconds(program, torch.float32, torch.device("cpu")) >= 5.0
    assert Machine().bound_seconds(program, torch.float32, torch.device("cpu"), limit=0.0) < 1.0


def test_numbers_do_not_keep_weights_from_being_merged_ahead(monkeypatch):
    """What depends on a tensor that is filled is not evaluated by freezing: here the merged weights."""
    graphs = []

    def keep(self, graph, run=DerivationPass.__call__):
        run(self, graph)
        graphs.append(graph.find_nodes(op="call_function", target=torch.ops.aten.full.default))

    monkeypatch.setattr(DerivationPass, "__call__", keep)

    class Sum(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = (nn.Conv2d(8, 8, 3, padding=1, bias=False) for _ in range(2))

        def forward(self, x):
            return self.first(x) + 0.5 * self.second(x)

    net, x, report = Sum().eval(), torch.randn(1, 8, 9, 9), Report()
    options = {"freeze": True, "budget_s": 20.0, "tune": "model", "margin": 0.0}
    monkeypatch.setattr("ollie_compile.measure.bounds.bound_seconds", lambda program, *_, **__: 1e-12)
    with torch.no_grad():
        run = torch.compile(net, backend=lambda *gm: compile_with(*gm, report, options=options))
        torch.testing.assert_close(run(x), net(x), rtol=1e-4, atol=1e-5)
    assert report.rewritten == 1, str(report)
    assert graphs == [[]]
