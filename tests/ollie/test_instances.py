"""Frozen weights belong to the tensors that a call brings: to other instances, and to changed weights."""

import copy
import gc
import multiprocessing
import threading
import weakref

import pytest
import torch
import torch.nn.functional as F
from torch import fx, nn

import ollie_compile
from ollie_compile.backend import compile_with, ollie
from ollie_compile.graph import held
from ollie_compile.report.report import Report

FREEZE = {"freeze": True, "budget_s": 0}
X = torch.randn(1, 3, 8, 8)

pytestmark = pytest.mark.filterwarnings("error:ollie")  # compiled without freezing


@pytest.fixture(autouse=True)
def _compiled_anew():
    torch.compiler.reset()
    with torch.no_grad():
        yield


class Net(nn.Module):
    """Weights that oneDNN packs, MKL packs, Inductor writes into its code, and sums are written into."""

    def __init__(self):
        super().__init__()
        self.conv, self.head = nn.Conv2d(3, 16, 3, padding=1), nn.Linear(16, 4)
        self.shift = nn.Parameter(torch.randn(1, 16, 8, 8).contiguous(memory_format=torch.channels_last))
        self.register_buffer("scale", torch.randn(4))

    def forward(self, x):
        y = self.conv(x) + self.shift
        return self.head(y.mean((2, 3))) * self.scale, self.scale * 2


class Broken(Net):
    def forward(self, x):
        y = self.conv(x)
        torch._dynamo.graph_break()
        return self.conv(y[:, :3]), self.shift * 2


def compiled(function, **options):
    return torch.compile(function, backend="ollie", options=FREEZE | options)


def agree(got, want):
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)


def test_one_function_called_with_several_modules():
    nets = [Net().eval() for _ in range(3)]
    run = compiled(lambda net, x: net(x))
    for net in (*nets, *nets):
        agree(run(net, X), net(X))


@pytest.mark.parametrize("kind", [Net, Broken])
def test_modules_of_a_class_compiled_one_by_one(kind):
    nets = [kind().eval() for _ in range(2)]
    nets.append(copy.deepcopy(nets[0]))
    for parameter in nets[-1].parameters():
        parameter.mul_(1.5)
    for net in nets:
        agree(compiled(net)(X), net(X))


def test_a_class_whose_forward_is_compiled():
    class Block(Net):
        pass

    nets = [Block().eval() for _ in range(2)]
    wanted = [net(X) for net in nets]
    Block.forward = compiled(Block.forward)
    for net, want in zip(nets, wanted, strict=True):
        agree(net(X), want)


def test_parameters_as_arguments():
    run = compiled(lambda x, weight: F.conv2d(x, weight, padding=1))
    for _ in range(2):
        weight = nn.Parameter(torch.randn(16, 3, 3, 3))
        agree(run(X, weight), F.conv2d(X, weight, padding=1))


def _optimize(net):
    optimizer = torch.optim.AdamW(net.parameters(), lr=0.1)
    with torch.enable_grad():
        net(X)[0].square().sum().backward()
    optimizer.step()
    net.zero_grad()


def _load(net, **named):
    net.load_state_dict({name: torch.randn_like(value) for name, value in net.state_dict().items()}, **named)


def _merge(net):
    net.head.weight += torch.randn(4, 2) @ torch.randn(2, 16)


def _replace_data(net):
    net.conv.weight.data = net.conv.weight.data * 2


def _reuse_memory(net):
    """The data of the last call is freed, and other data may come to lie at the same place."""
    for _ in range(4):
        net.shift.data = net.shift.data + 1


def _swap(net):
    net.kept = [parameter.clone() for parameter in net.parameters()]
    for parameter in net.parameters():
        parameter.copy_(torch.randn_like(parameter))


def _swap_back(net):
    for parameter, kept in zip(net.parameters(), net.kept, strict=True):
        parameter.copy_(kept)


def _replace_parameter(net):
    net.conv.weight = nn.Parameter(torch.randn(16, 3, 3, 3))


def _replace_module(net):
    net.head = nn.Linear(16, 4)


def _tie(net):
    net.other = copy.deepcopy(net)
    net.conv.weight = net.other.conv.weight


def test_changed_weights_are_seen():
    net = Net().eval()
    run = compiled(net)
    agree(run(X), net(X))
    for change in (
        _optimize,
        _load,
        lambda net: _load(net, assign=True),
        _merge,
        _replace_data,
        _reuse_memory,
        _swap,
        _swap_back,
        _replace_parameter,
        _replace_module,
        _tie,
        lambda net: net.bfloat16().float(),
    ):
        change(net)
        for _ in range(2):
            agree(run(X), net(X))


def test_weights_of_another_dtype():
    net = Net().eval()
    run = compiled(net)
    for dtype in (torch.float32, torch.float64, torch.float32):
        net.to(dtype)
        agree(run(X.to(dtype)), net(X.to(dtype)))


@pytest.mark.parametrize("dynamic", [False, True])
def test_weights_in_float64(dynamic):
    """oneDNN computes no convolution in float64, so no weight may be packed for it."""
    net = nn.Sequential(nn.Conv2d(4, 4, 3), nn.ReLU(), nn.ConvTranspose2d(4, 4, 3)).double().eval()
    run = torch.compile(net, backend="ollie", options={"freeze": True, "budget_s": 0}, dynamic=dynamic)
    for batch in (2, 3):
        x = torch.randn(batch, 4, 8, 8, dtype=torch.float64)
        agree(run(x), net(x))


def test_weights_under_autocast():
    """A graph is compared with eager's result under autocast, and later weights are cast as the first."""
    nets = [nn.Sequential(nn.Conv2d(3, 16, 3), nn.ReLU(), nn.Conv2d(16, 4, 3)).eval() for _ in range(2)]
    tied = copy.deepcopy(nets[0])
    tied[2].bias = nn.Parameter(tied[0].bias[:4])
    run = compiled(lambda net, x: net(x))
    with torch.autocast("cpu", torch.bfloat16):
        for net in (*nets, tied):
            got, want = run(net, X), net(X)
            assert got.dtype == want.dtype
            torch.testing.assert_close(got, want, rtol=0.02, atol=0.02)


def test_a_parameter_that_is_deleted_is_missed():
    net = Net().eval()
    run = compiled(net)
    run(X)
    del net.shift
    with pytest.raises(Exception, match="shift"):
        run(X)


def test_weights_of_derived_programs(always_rewrite):
    report = Report()
    options = {"freeze": True, "tune": "model", "margin": 0.0, "budget_s": 120, "candidates": 1}

    def backend(*graph):
        return compile_with(*graph, report, options=options)

    nets = [nn.Conv2d(16, 16, 3, padding=1).eval() for _ in range(2)]
    x, run = torch.randn(1, 16, 12, 12), torch.compile(lambda net, x: net(x), backend=backend, dynamic=False)
    for net in nets:
        agree(run(net, x), net(x))
    assert report.rewritten == 1
    nets[0].weight.mul_(2)
    agree(run(nets[0], x), nets[0](x))


def test_weights_shared_by_two_frozen_graphs():
    net = Net().eval()
    runs = [compiled(net), compiled(lambda x: net.conv(x) * 2)]
    for _ in range(2):
        agree(runs[0](X), net(X))
        agree(runs[1](X), net.conv(X) * 2)
        net.conv.weight.add_(1)


def test_constants_are_made_once_for_weights_that_stay(monkeypatch):
    made = []
    original = held.transformed
    monkeypatch.setattr(held, "transformed", lambda *given: made.append(given) or original(*given))
    nets, run = [Net().eval() for _ in range(2)], compiled(lambda net, x: net(x))
    for net in nets * 3:
        run(net, X)
    assert len(made) == 1  # the first one's came with the compilation
    nets[0].head.bias.add_(1)
    for net in nets * 3:
        agree(run(net, X), net(X))
    assert len(made) == 2


def test_no_more_sets_of_weights_are_kept_than_are_used(monkeypatch):
    monkeypatch.setattr(held, "MOST_SETS", 2)
    nets, run = [nn.Linear(16, 4).eval() for _ in range(4)], compiled(lambda net, x: net(x))
    x = torch.randn(2, 16)
    before = set(held._frozen)
    for net in nets * 2:
        agree(run(net, x), net(x))
    (graph,) = set(held._frozen) - before
    assert len(graph._sets) == 2


def test_a_module_that_is_gone_takes_its_constants_along():
    nets, run = [Net().eval() for _ in range(2)], compiled(lambda net, x: net(x))
    before = set(held._frozen)
    for net in nets:
        run(net, X)
    (graph,) = set(held._frozen) - before
    constants = [weakref.ref(value) for kept in graph._sets.values() for value in kept.inputs]
    assert len(constants) == 2 * len(next(iter(graph._sets.values())).inputs)
    del net, nets[0]
    gc.collect()
    assert len(graph._sets) == 1
    assert sum(value() is None for value in constants) == len(constants) // 2
    agree(run(nets[0], X), nets[0](X))


def test_results_are_the_callers_own():
    net = Net().eval()
    run = compiled(net)
    for _ in range(2):
        results = run(X)
        agree(results, net(X))
        for result in results:
            result.zero_()


def test_results_share_memory_as_eagers_do():
    class Views(Net):
        def forward(self, x):
            doubled = self.shift * 2
            return self.conv(x), self.shift, self.head.weight.type_as(x).t(), doubled, doubled[:, 1:, ::2]

    net = Views().eval()
    _, shift, turned, doubled, part = compiled(net)(X)
    assert shift is net.shift
    assert turned.data_ptr() == net.head.weight.data_ptr()
    doubled.fill_(3.0)
    assert part.eq(3.0).all()
    turned.zero_()
    agree(compiled(net)(X), net(X))


def test_weights_are_never_written_into():
    """Inductor's own freezing adds a convolution to a constant of its size in place."""
    net = Net().eval()
    before, run = copy.deepcopy(net.state_dict()), compiled(net)
    for _ in range(3):
        run(X)
    for name, value in net.state_dict().items():
        assert torch.equal(value, before[name])


def test_each_convolution_keeps_its_own_scale():
    """Inductor's own freezing has one name for the numbers that several convolutions are scaled by."""

    class Scaled(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.last = nn.Conv2d(3, 16, 3), nn.Conv2d(3, 16, 3)

        def forward(self, x):
            return self.first(x) * 0.5, self.last(x) * 3.0

    net, report = Scaled().eval(), Report()
    run = torch.compile(net, backend=lambda *graph: compile_with(*graph, report, options=FREEZE))
    agree(run(X), net(X))
    assert "without freezing" not in str(report)


def test_what_the_graph_changes_is_not_held():
    class Counting(Net):
        def forward(self, x):
            self.scale.add_(1)
            return super().forward(x)

    nets, report = [Counting().eval() for _ in range(2)], Report()
    nets[1].load_state_dict(nets[0].state_dict())
    run = torch.compile(nets[0], backend=lambda *graph: compile_with(*graph, report, options=FREEZE))
    for _ in range(3):
        agree(run(X), nets[1](X))
    agree(nets[0].state_dict(), nets[1].state_dict())
    assert "1 which the graph changes" in str(report)


def test_weights_of_inference_mode_are_not_held():
    with torch.inference_mode():
        net = Net().eval()
    report = Report()
    run = torch.compile(net, backend=lambda *graph: compile_with(*graph, report, options=FREEZE))
    with torch.inference_mode():
        agree(run(X), net(X))
        net.conv.weight.add_(1)
        agree(run(X), net(X))
    assert "made in inference mode, which counts no changes" in str(report)


def test_inference_mode_and_no_grad_in_turn():
    net = Net().eval()
    run = compiled(net)
    for context in (torch.inference_mode, torch.no_grad) * 2:
        with context():
            agree(run(X), net(X))
        net.head.weight.add_(1)


def test_a_value_written_through_data_needs_to_be_told():
    net, other = Net().eval(), Net().eval()
    runs = [compiled(net), compiled(other)]
    for run in runs:
        run(X)
    net.conv.weight.data[0, 0, 1, 0].add_(1)
    ollie_compile.refreeze(net)
    agree(runs[0](X), net(X))
    other.conv.weight.data[0, 0, 1, 0].add_(1)
    ollie_compile.refreeze(runs[1])
    agree(runs[1](X), other(X))
    net.conv.weight.data[0, 0, 1, 0].add_(1)
    ollie_compile.refreeze()
    agree(runs[0](X), net(X))


def test_constants_of_unknown_origin_serve_the_first_weights_only(monkeypatch):
    monkeypatch.setattr("ollie_compile.compat.freezing.module_constants", lambda compiled: None)
    nets, run = [Net().eval() for _ in range(2)], compiled(lambda net, x: net(x))
    for net in nets * 2:
        agree(run(net, X), net(X))
    nets[0].conv.weight.add_(1)
    agree(run(nets[0], X), nets[0](X))


def test_products_that_inductor_packs_for_itself():
    nets = [nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 4)).eval() for _ in range(2)]
    x, run = torch.randn(1, 16), compiled(lambda net, x: net(x), max_autotune_gemm=True)
    for net in nets * 2:
        agree(run(net, x), net(x))


def test_weights_that_lay_in_one_memory_and_no_longer_do():
    net = nn.Sequential(nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 16)).eval()
    net[2].weight.data = net[0].weight.data
    x, run = torch.randn(2, 16), compiled(net)
    agree(run(x), net(x))
    net[2].weight.data = torch.randn(16, 16)
    agree(run(x), net(x))


def test_parameters_that_are_the_graphs_own():
    net = Net().eval()
    run = ollie(fx.symbolic_trace(net), [X], options=FREEZE)
    agree(run(X), net(X))
    net.conv.weight.add_(1)
    agree(run(X), net(X))


def test_threads_in_their_first_call_at_once():
    nets, run = [Net().eval() for _ in range(4)], compiled(lambda net, x: net(x))
    wanted, got, start = [net(X) for net in nets], [None] * len(nets), threading.Barrier(len(nets))

    def call(place):
        start.wait()
        with torch.no_grad():
            for _ in range(20):
                got[place] = run(nets[place], X)

    threads = [threading.Thread(target=call, args=(place,)) for place in range(len(nets))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
    agree(got, wanted)


def _in_child(run, net):
    torch.set_num_threads(1)
    with torch.no_grad():
        net.conv.weight.add_(1)
        agree(run(X), net(X))


def test_a_process_that_forks_after_compiling():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # OpenMP does not survive a fork
    try:
        net = Net().eval()
        run = compiled(net)
        run(X)
        child = multiprocessing.get_context("fork").Process(target=_in_child, args=(run, net))
        child.start()
        child.join(60)
    finally:
        torch.set_num_threads(threads)
    assert child.exitcode == 0
    agree(run(X), net(X))


@pytest.mark.parametrize(
    "draw", [lambda y: y + torch.randn_like(y), lambda y: F.dropout(y, 0.5), lambda y: y + torch.rand_like(y)]
)
def test_random_numbers_of_frozen_graphs_are_eagers_if_asked_for(draw):
    """They are drawn in the order of memory, and packed convolutions have another than traced ones."""
    net = nn.Sequential(nn.Conv2d(4, 2, (1, 5), padding=(0, 2)), nn.GELU(), nn.Conv2d(2, 4, 3)).eval()
    x = torch.randn(2, 4, 5, 6)
    results = []
    for function in (lambda x: draw(net(x)), compiled(lambda x: draw(net(x)), fallback_random=True)):
        torch.manual_seed(0)
        results.append(function(x))
    agree(*results)
