"""Modes, options and contexts of torch.compile: honoured, or refused clearly."""

import threading

import pytest
import torch
from torch import nn

import ollie_compile
from ollie_compile import backend
from ollie_compile.backend import compile_with
from ollie_compile.config import OllieConfig
from ollie_compile.graph.freezing import Freezer
from ollie_compile.plan import planner
from ollie_compile.problems.operators import Convolution
from ollie_compile.report.report import Report
from tests.ollie.strategies import operator

QUICK = {"tune": "model", "margin": 0.0, "budget_s": 120, "max_depth": 0, "candidates": 1}

pytestmark = pytest.mark.usefixtures("fresh")


@pytest.fixture
def asked(monkeypatch):
    """What Inductor is asked for; it compiles nothing."""
    patches = {}

    def compile_graph(gm, example_inputs, config_patches, inner_compile=None):
        patches.update(config_patches, inner_compile=inner_compile)
        return gm.forward

    monkeypatch.setattr("torch._inductor.compile_fx.compile_fx", compile_graph)
    return patches


MODES = {
    "default": {},
    "reduce-overhead": {"triton.cudagraphs": True},
    "max-autotune-no-cudagraphs": {"max_autotune": True, "coordinate_descent_tuning": True},
    "max-autotune": {"max_autotune": True, "coordinate_descent_tuning": True, "triton.cudagraphs": True},
}


@pytest.mark.parametrize("mode", MODES)
def test_modes_are_inductors(asked, mode):
    torch.compile(nn.Linear(2, 2), backend="ollie", mode=mode, fullgraph=True)(torch.zeros(1, 2))
    passes = {"joint_custom_pre_pass", "post_grad_custom_pre_pass"}
    assert set(asked) == {*passes, "freezing", "inner_compile", *MODES[mode]}
    assert MODES[mode].items() <= asked.items()


def test_inductors_options_stand_beside_the_own(asked):
    options = {"budget_s": 1, "max-autotune": True, "triton.cudagraphs": False}
    torch.compile(nn.Linear(2, 2), backend="ollie", options=options)(torch.zeros(1, 2))
    assert asked["max_autotune"] is True
    assert asked["triton.cudagraphs"] is False
    assert asked["joint_custom_pre_pass"].config == ollie_compile.OllieConfig(budget_s=1, freeze=False)


def test_a_budget_that_is_not_given_goes_by_the_graph_and_the_mode(asked):
    for mode in ("default", "max-autotune"):
        torch.compile(nn.Linear(2, 2), backend="ollie", mode=mode)(torch.zeros(1, 2))
        budget = asked["joint_custom_pre_pass"].config.budget_s
        assert budget == (60 if mode == "max-autotune" else pytest.approx(1.02))
    assert OllieConfig(freeze=True).budgeted(operators=10, inductor_s=2.0).budget_s == pytest.approx(5.2)
    assert OllieConfig(freeze=True).budgeted(operators=10, inductor_s=9.0).budget_s == 9.0


@pytest.mark.parametrize("how", ["freeze", "freezing", "globally"])
def test_freezing_by_any_of_its_names(asked, how):
    from torch._inductor import config

    options = {} if how == "globally" else {how: True}
    with torch.no_grad(), config.patch(freezing=how == "globally"):
        torch.compile(nn.Linear(2, 2), backend="ollie", options=options)(torch.zeros(1, 2))
    assert isinstance(asked["inner_compile"].__self__, Freezer)
    assert asked["joint_custom_pre_pass"].config.freeze


@pytest.mark.parametrize(
    ("named", "match"),
    [
        ({"mode": "fastest"}, "`mode` must be one of default, .*max-autotune, got 'fastest'"),
        ({"options": {"max_autotun": True}}, "has an option `max_autotun`: did you mean `max_autotune`"),
        ({"options": {"max_autotune": 1}}, "Inductor's `max_autotune` must be of type bool, got 1"),
        ({"options": {"budget_s": -1}}, "`budget_s` must be 0 or more seconds, got -1"),
        ({"options": ["freeze"]}, "`options` must be a dict such as .*, got \\['freeze'\\]"),
    ],
)
def test_unknown_modes_and_options_are_refused_in_one_sentence(named, match):
    with pytest.raises(ValueError, match=f"^.*{match}"):
        torch.compile(nn.Linear(2, 2), backend="ollie", **named)(torch.zeros(1, 2))


def test_fullgraph_refuses_a_graph_break(asked):
    def broken(x):
        torch._dynamo.graph_break()
        return x + 1

    with pytest.raises(torch._dynamo.exc.Unsupported):
        torch.compile(broken, backend="ollie", fullgraph=True)(torch.zeros(1))


CONTEXTS = {
    "no_grad": torch.no_grad,
    "inference_mode": torch.inference_mode,
    "gradients": torch.enable_grad,
    "autocast": lambda: torch.autocast("cpu", dtype=torch.bfloat16),
}


@pytest.mark.parametrize("context", CONTEXTS)
def test_contexts_equal_eager(always_rewrite, uncompiled, context):
    torch.manual_seed(0)  # in bfloat16 a value near 0 may be rounded to either side of a ReLU
    net, x = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU()), torch.randn(1, 3, 8, 8)
    report = Report()
    with CONTEXTS[context]():
        options = {**QUICK, "tolerance": 2e-2 if context == "autocast" else 2e-5}
        compiled = torch.compile(net, backend=lambda *graph: compile_with(*graph, report, options=options))
        got, want = compiled(x), net(x)
        loose = 2e-2 if context == "autocast" else 1e-4
        torch.testing.assert_close(got, want, rtol=loose, atol=loose)
        if context in ("gradients", "autocast"):
            gradients = [torch.autograd.grad(y.float().sum(), list(net.parameters())) for y in (got, want)]
            for mine, theirs in zip(*gradients, strict=True):
                largest = theirs.abs().max()
                torch.testing.assert_close(mine / largest, theirs / largest, rtol=0, atol=2 * loose)
    made = next(made for _, made in report.plans if isinstance(made.operator, Convolution))
    assert made.winner is not None, str(report)
    assert made.operator.dtype == (torch.bfloat16 if context == "autocast" else torch.float32)


def test_reset_forgets_plans(always_rewrite, uncompiled):
    net, x = nn.Conv2d(3, 4, 3), torch.randn(1, 3, 8, 8)
    with torch.no_grad():
        torch.compile(net, backend="ollie", options=QUICK)(x)
    assert backend.CONTEXT.plans
    torch._dynamo.reset()
    assert not backend.CONTEXT.plans


def test_threads_compile_and_run_side_by_side(always_rewrite, uncompiled):
    nets = [nn.Conv2d(3, 4, 3), nn.ConvTranspose2d(3, 2, 4, 2, 1)]
    x = torch.randn(1, 3, 8, 8)
    got: dict[int, torch.Tensor] = {}

    def work(place):
        with torch.no_grad():
            compiled = torch.compile(nets[place], backend="ollie", options=QUICK)
            for _ in range(3):
                got[place] = compiled(x)

    threads = [threading.Thread(target=work, args=(place,)) for place in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for place, net in enumerate(nets):
        torch.testing.assert_close(got[place], net(x), rtol=1e-4, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("freeze", [False, True])
def test_exported_by_aotinductor(always_rewrite, tmp_path, freeze):
    net, x = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU()).eval(), torch.randn(1, 3, 8, 8)
    report = Report()
    with torch.no_grad():
        path = torch._inductor.aoti_compile_and_package(
            torch.export.export(net, (x,)),
            package_path=str(tmp_path / "net.pt2"),
            inductor_configs=ollie_compile.inductor_configs(report=report, freeze=freeze, **QUICK),
        )
        got = torch._inductor.aoti_load_package(path)(x)
    assert report.rewritten == 1
    torch.testing.assert_close(got, net(x), rtol=1e-4, atol=1e-5)


def test_portable_programs_are_of_torchs_own_operators(always_rewrite):
    """What is exported runs without this package."""
    configs = ollie_compile.inductor_configs(budget_s=5)
    assert configs["joint_custom_pre_pass"].config.portable
    conv = operator(torch.zeros(1, 8, 12, 12), torch.zeros(8, 8, 3, 3), padding=1)
    for portable in (True, False):
        made = planner.plan(conv, OllieConfig(**QUICK, portable=portable), 10.0, backend.CONTEXT)
        assert ({candidate.program.kernels for candidate in made.candidates} == {"aten"}) == portable


def test_exports_take_modes_and_options():
    configs = ollie_compile.inductor_configs(mode="max-autotune", budget_s=3, epilogue_fusion=False)
    assert configs["max_autotune"]
    assert configs["triton.cudagraphs"]
    assert configs["epilogue_fusion"] is False
    assert configs["joint_custom_pre_pass"].config.budget_s == 3
    with pytest.raises(ValueError, match="did you mean `budget_s`"):
        ollie_compile.inductor_configs(budgets=3)


def _train(rank: int, port: int, into: str) -> None:
    import torch.distributed as dist

    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.ConvTranspose2d(4, 2, 4, 2, 1))
    wrapped = nn.parallel.DistributedDataParallel(net)
    compiled = torch.compile(wrapped, backend="ollie", options=QUICK)
    x = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(rank))
    compiled(x).square().sum().backward()
    if rank == 0:
        torch.save([parameter.grad for parameter in net.parameters()], into)
    dist.destroy_process_group()


@pytest.mark.slow
def test_two_processes_of_ddp_average_gradients(tmp_path):
    import socket

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    into = str(tmp_path / "gradients.pt")
    torch.multiprocessing.spawn(_train, args=(port, into), nprocs=2)
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.ConvTranspose2d(4, 2, 4, 2, 1))
    xs = [torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(rank)) for rank in range(2)]
    (sum(net(x).square().sum() for x in xs) / 2).backward()
    for got, parameter in zip(torch.load(into), net.parameters(), strict=True):
        torch.testing.assert_close(got, parameter.grad, rtol=1e-3, atol=1e-4)


@pytest.mark.gpu
@pytest.mark.parametrize("mode", ["reduce-overhead", "max-autotune"])
def test_cuda_graphs_equal_eager(mode):
    net, x = nn.Sequential(nn.Conv2d(16, 4, 3), nn.ReLU()).cuda().eval(), torch.randn(1, 16, 8, 8).cuda()
    compiled = torch.compile(net, backend="ollie", mode=mode)
    with torch.no_grad():
        for _ in range(4):
            torch.testing.assert_close(compiled(x), net(x), rtol=1e-3, atol=1e-3)
