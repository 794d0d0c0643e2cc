"""Weights that are deleted or moved after compiling, and tensors of other kinds: results are eager's."""

import copy

import pytest
import torch
from torch import nn
from torch.testing._internal.two_tensor import TwoTensor

from ollie_compile.backend import compile_with
from ollie_compile.report.report import Report
from tests.ollie.strategies import FORCED

OPTIONS = {**FORCED, "freeze": True}
X = torch.randn(1, 3, 4, 4)

pytestmark = [
    pytest.mark.usefixtures("fresh", "always_rewrite", "uncompiled"),
    pytest.mark.filterwarnings("error:ollie"),  # compiled without freezing
    pytest.mark.filterwarnings("ignore:.torch.jit.script:DeprecationWarning"),  # torch's own, for jvp
]


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 4, 2), nn.ReLU()).eval()


def compiled(function, **options):
    report = Report()

    def backend(*graph):
        return compile_with(*graph, report, options=OPTIONS | options)

    return torch.compile(function, backend=backend, dynamic=False), report


def agree(got, want):
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_weights_that_leave_their_device_and_come_back():
    net = network()
    run, report = compiled(net)
    want = net(X)
    agree(run(X), want)
    assert report.rewritten == 1
    net.to("meta")
    assert run(X.to("meta")).is_meta
    net.to_empty(device="cpu").load_state_dict(network().state_dict())
    agree(run(X), want)


@torch.no_grad()
def test_weights_that_are_removed_replaced_or_freed():
    net = network()
    run, _ = compiled(net)
    run(X)
    net[0].bias = None
    agree(run(X), net(X))
    del net[0].weight
    with pytest.raises(AttributeError, match="no attribute 'weight'"):
        run(X)
    net[0].weight = nn.Parameter(torch.randn(4, 3, 2, 2))
    agree(run(X), net(X))
    net[0].weight.untyped_storage().resize_(0)
    with pytest.raises(RuntimeError, match="data is not allocated"):
        run(X)


@torch.no_grad()
def test_tensors_without_data_are_not_derived(caplog):
    run, report = compiled(network().to("meta"))
    assert run(X.to("meta")).is_meta
    assert report.rewritten == 0
    assert {why for _, why in report.untouched} == {"tensors without data, on the device meta"}
    assert not [record for record in caplog.records if record.name.startswith("ollie_compile")]


class Pairs(nn.Module):
    """Two products of one tensor by weights that are pairs of tensors."""

    def __init__(self):
        super().__init__()
        for name in ("left", "right"):
            self.register_parameter(name, nn.Parameter(TwoTensor(torch.randn(4, 4), torch.randn(4, 4))))

    def forward(self, x):
        return x @ self.left + x @ self.right


@torch.no_grad()
def test_weights_of_a_subclass_are_read_in_every_call():
    net, x = Pairs(), torch.randn(2, 4)
    run, _ = compiled(net)
    for _ in range(2):
        got, want = run(x), net(x)
        assert type(got) is TwoTensor
        agree(got.a, want.a)
        agree(got.b, want.b)
        net.left.b.mul_(3)


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore:torch.*quantiz:UserWarning")
@torch.no_grad()
def test_quantized_weights():
    kind = torch.ao.quantization
    net = kind.quantize_dynamic(
        nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2)), {nn.Linear}, dtype=torch.qint8
    )
    weight = torch.quantize_per_tensor(torch.randn(2, 2), 0.1, 0, torch.qint8)

    def function(net, x, weight):
        y, plain = net(x), weight.dequantize()
        return y @ plain + y @ plain.T

    run, x = compiled(function)[0], torch.randn(3, 4)
    for one in (net, copy.deepcopy(net)):
        agree(run(one, x, weight), function(one, x, weight))


def test_transforms_of_functions_around_a_frozen_graph():
    net, batch = network(), torch.randn(3, 1, 3, 4, 4)
    run, _ = compiled(net)
    with torch.no_grad():
        run(X)
        agree(torch.vmap(run)(batch), torch.vmap(net)(batch))
        agree(torch.func.jvp(run, (X,), (X,)), torch.func.jvp(net, (X,), (X,)))
    agree(torch.func.grad(lambda x: run(x).sum())(X), torch.func.grad(lambda x: net(x).sum())(X))


@torch.no_grad()
@pytest.mark.parametrize(
    "function",
    [
        lambda net, x: torch.func.grad(lambda y: net(y).square().sum())(x),
        lambda net, x: torch.vmap(net)(x[None].expand(3, *x.shape)),
        lambda net, x: torch.func.jvp(net, (x,), (x,)),
        lambda net, x: torch.func.functional_call(net, {"0.bias": x.flatten()[:4]}, (x,)),
    ],
    ids=["grad", "vmap", "jvp", "functional_call"],
)
def test_transforms_of_functions_in_a_frozen_graph(function):
    nets = [network(), network()]
    nets[1][0].weight.mul_(2)
    run, _ = compiled(function)
    for net in nets:
        agree(run(net, X), function(net, X))
