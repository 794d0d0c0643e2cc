import json

import pytest
import torch
from torch import nn

import ollie_compile
from ollie_compile import plan
from ollie_compile.config import OllieConfig

QUICK = {"tune": "model", "margin": 0.0, "budget_s": 20}


@pytest.fixture(autouse=True)
def _fresh(tmp_path, monkeypatch):
    """No graph of an earlier run answers from Inductor's caches: the pass must run."""
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    torch.compiler.reset()
    yield
    torch.compiler.reset()


@pytest.fixture
def always_rewrite(monkeypatch):
    """Bounds so low that every convolution is rewritten, whatever this machine measures."""
    monkeypatch.setattr("ollie_compile.cost.bound_seconds", lambda *arguments, **named: 1e-12)


def small_net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1),
        nn.ReLU(),
        nn.ConvTranspose2d(8, 2, 4, stride=2, padding=1),
    )


def test_found_by_name_and_equal_to_eager(always_rewrite):
    net, x = small_net().eval(), torch.randn(2, 3, 9, 7)
    with torch.no_grad():
        got = torch.compile(net, backend="ollie", options=QUICK)(x)
        torch.testing.assert_close(got, net(x), rtol=1e-4, atol=1e-5)
        assert got.stride() == net(x).stride()
    assert any(made.winner is not None for made in plan._plans.values())


def test_measured_plan_keeps_results_and_times_the_original():
    net, x = small_net().eval(), torch.randn(1, 3, 8, 8)
    report = ollie_compile.explain(net, x, candidates=1, budget_s=60)
    measured = [made for _, made in report.plans]
    assert len(measured) == 2
    assert all(made.original_s is not None for made in measured)
    assert json.loads(report.to_json())["rewritten"] == report.rewritten


def test_gradients_equal_eager(always_rewrite):
    net, x = small_net(), torch.randn(2, 3, 6, 6)
    torch.compile(net, backend="ollie", options=QUICK)(x).square().sum().backward()
    got = [p.grad.clone() for p in net.parameters()]
    net.zero_grad()
    net(x).square().sum().backward()
    for ours, parameter in zip(got, net.parameters(), strict=True):
        torch.testing.assert_close(ours, parameter.grad, rtol=1e-3, atol=1e-4)


def test_freeze_equals_eager(always_rewrite):
    net, x = small_net().eval(), torch.randn(1, 3, 8, 8)
    with torch.no_grad():
        got = torch.compile(net, backend="ollie", options={**QUICK, "freeze": True})(x)
        torch.testing.assert_close(got, net(x), rtol=1e-4, atol=1e-5)


def test_dynamic_shapes_and_half_precision_are_left_with_a_reason():
    net = nn.Conv2d(3, 4, 3).eval()
    report = ollie_compile.explain(net.bfloat16(), torch.randn(1, 3, 8, 8).bfloat16(), **QUICK)
    assert report.rewritten == 0
    assert "bfloat16" in report.untouched[0][1]
    assert "0 of 1 convolutions rewritten" in str(report)
    compiled = torch.compile(net.float(), backend="ollie", options=QUICK, dynamic=True)
    with torch.no_grad():
        for size in (8, 9, 11):
            x = torch.randn(2, 3, size, size)
            torch.testing.assert_close(compiled(x), net(x), rtol=1e-4, atol=1e-5)


def test_no_budget_keeps_every_original():
    report = ollie_compile.explain(small_net().eval(), torch.randn(1, 3, 8, 8), budget_s=0)
    assert report.rewritten == 0
    assert {made.reason for _, made in report.plans} == {"no time left in the budget"}


def test_a_wrong_candidate_is_dropped_and_named(monkeypatch, always_rewrite):
    monkeypatch.setattr("ollie_compile.plan.check_derivation", lambda *_: "differs over the integers")
    net, x = small_net().eval(), torch.randn(1, 3, 8, 8)
    report = ollie_compile.explain(net, x, **QUICK)
    assert report.rewritten == 0
    assert "wrong: differs over the integers" in str(report)


def test_a_model_without_convolutions_is_inductors(always_rewrite):
    net, x = nn.Linear(4, 4).eval(), torch.randn(2, 4)
    report = ollie_compile.explain(net, x, **QUICK)
    assert not report.plans
    assert not report.untouched


def test_users_pass_and_inductor_options_are_kept(always_rewrite):
    from torch._inductor.custom_graph_pass import CustomGraphPass

    seen = []

    class Spy(CustomGraphPass):
        def __call__(self, graph):
            seen.append(len(graph.nodes))

        def uuid(self):
            return "spy"

    net, x = nn.Conv2d(3, 4, 1).eval(), torch.randn(1, 3, 8, 8)
    options = {**QUICK, "inductor": {"joint_custom_pre_pass": Spy()}}
    with torch.no_grad(), torch._functorch.config.patch(enable_autograd_cache=False):
        torch.compile(net, backend="ollie", options=options)(x)
    assert seen


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"max_dept": 3}, "did you mean `max_depth`"),
        ({"max_depth": -1}, "`max_depth` must be a whole number, 0 or more, got -1"),
        ({"tune": "guess"}, '"measure" or "model"'),
        ({"margin": 1.5}, r"`margin` must be in \[0, 1\), got 1.5"),
    ],
)
def test_bad_options_are_named(options, match):
    with pytest.raises(ValueError, match=match):
        OllieConfig.from_dict(options)
