import json

import pytest
import torch
from torch import nn

import ollie_compile
from ollie_compile import backend, rules
from ollie_compile.config import OllieConfig
from ollie_compile.expr import Read
from ollie_compile.plan import candidates, checks, planner
from ollie_compile.targets.selective_add import match_selective_add
from tests.ollie.strategies import operator

QUICK = {"tune": "model", "margin": 0.0, "budget_s": 120}


pytestmark = pytest.mark.usefixtures("fresh")


@pytest.fixture
def always_bilinear(monkeypatch):
    """Every convolution is rewritten by a bilinear decomposition."""

    def bound(program, *arguments, **named):
        return 1e-12 if program.scope.constants() else 1.0

    monkeypatch.setattr("ollie_compile.measure.bounds.bound_seconds", bound)


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
    assert any(made.winner is not None for made in backend.CONTEXT.plans.values())


@pytest.mark.parametrize("freeze", [False, True])
def test_operators_in_a_row_are_all_replaced(always_rewrite, uncompiled, freeze):
    """The second takes what now stands for the first's result."""
    torch.manual_seed(0)
    net = nn.Sequential(*(nn.ConvTranspose2d(n, n - 1, 4, 2, 1) for n in (4, 3, 2))).eval()
    x = torch.randn(1, 4, 3, 5)
    report = ollie_compile.explain(net, x, **QUICK, freeze=freeze)
    assert report.rewritten == 3
    with torch.no_grad():
        got = torch.compile(net, backend="ollie", options={**QUICK, "freeze": freeze})(x)
        torch.testing.assert_close(got, net(x), rtol=1e-4, atol=1e-5)


def test_measured_plan_keeps_results_and_times_the_original():
    net, x = small_net().eval(), torch.randn(1, 3, 8, 8)
    report = ollie_compile.explain(net, x, candidates=1, budget_s=600)
    measured = [made for _, made in report.plans]
    assert len(measured) == 2
    assert all(made.original_s is not None for made in measured)
    assert json.loads(report.to_json())["rewritten"] == report.rewritten


def test_gradients_equal_eager(always_rewrite, uncompiled):
    net, x = small_net(), torch.randn(2, 3, 6, 6)
    torch.compile(net, backend="ollie", options=QUICK)(x).square().sum().backward()
    got = [p.grad.clone() for p in net.parameters()]
    net.zero_grad()
    net(x).square().sum().backward()
    for ours, parameter in zip(got, net.parameters(), strict=True):
        torch.testing.assert_close(ours, parameter.grad, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(
    "make",
    [
        lambda: (nn.Conv2d(3, 4, 3), torch.randn(1, 3, 8, 8).expand(4, 3, 8, 8)),
        lambda: (nn.Conv2d(3, 1, 3), torch.randn(2, 3, 8, 8).contiguous(memory_format=torch.channels_last)),
        lambda: (nn.Conv2d(3, 4, 8), torch.randn(2, 3, 8, 8).contiguous(memory_format=torch.channels_last)),
        lambda: (nn.ConvTranspose1d(3, 2, 5, stride=2), torch.randn(2, 3, 9)),
        lambda: (nn.Conv3d(2, 3, 2), torch.randn(1, 2, 4, 5, 6)),
    ],
    ids=["expanded input", "one channel, channels last", "one pixel, channels last", "transposed 1d", "3d"],
)
def test_layouts_and_dimensions_equal_eager(always_rewrite, make):
    net, x = make()
    report = ollie_compile.explain(net.eval(), x, **QUICK)
    assert report.rewritten == 1, str(report)
    with torch.no_grad():
        got, want = torch.compile(net, backend="ollie", options=QUICK, dynamic=False)(x), net(x)
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)
    assert got.stride() == want.stride()


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_bilinear_forms_equal_eager_forward_and_backward(always_bilinear, memory_format):
    net, x = nn.Conv2d(2, 3, 3, padding=1), torch.randn(1, 2, 8, 7).contiguous(memory_format=memory_format)
    report = ollie_compile.explain(net, x, **QUICK)
    assert report.rewritten == 1
    assert "bilinear decomposition" in str(report)
    assert "values may be so many times larger than the sums of |products|" in str(report)
    got, want = torch.compile(net, backend="ollie", options=QUICK, dynamic=False)(x), net(x)
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)
    assert got.stride() == want.stride()
    got_grads, want_grads = (
        torch.autograd.grad(y.square().sum(), list(net.parameters())) for y in (got, want)
    )
    torch.testing.assert_close(got_grads, want_grads, rtol=1e-3, atol=1e-4)


def test_a_tolerance_below_its_rounding_rejects_a_bilinear_form(always_bilinear):
    net, x = nn.Conv2d(2, 3, 3).eval(), torch.randn(1, 2, 8, 8)
    report = ollie_compile.explain(net, x, **QUICK, tolerance=1e-12)
    assert report.rewritten == 0
    assert "is above the tolerance" in str(report)


def test_lists_of_one_stand_for_all_dimensions(always_rewrite):
    weight, x = torch.randn(4, 3, 3, 3), torch.randn(1, 3, 8, 8)
    function = lambda x: torch.conv2d(x, weight, stride=[2], padding=[1])  # noqa: E731
    with torch.no_grad():
        got = torch.compile(function, backend="ollie", options=QUICK)(x)
    torch.testing.assert_close(got, function(x), rtol=1e-4, atol=1e-5)


def test_activation_checkpointing_keeps_its_savings(always_rewrite, uncompiled):
    from torch.utils.checkpoint import checkpoint

    net = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.GELU(), nn.Conv2d(8, 8, 3, padding=1), nn.GELU())

    def saved(backend: str) -> int:
        torch.compiler.reset()
        x = torch.randn(1, 3, 8, 8, requires_grad=True)
        total = 0

        def pack(tensor: torch.Tensor) -> torch.Tensor:
            nonlocal total
            total += tensor.numel()
            return tensor

        options = QUICK if backend == "ollie" else None
        step = torch.compile(
            lambda x: checkpoint(net, x, use_reentrant=False), backend=backend, options=options
        )
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            step(x).sum().backward()
        return total

    assert saved("ollie") == saved("inductor")


def test_explain_works_however_often(always_rewrite):
    net, x = nn.Conv2d(3, 4, 1).eval(), torch.randn(1, 3, 4, 4)
    assert [ollie_compile.explain(net, x, **QUICK).rewritten for _ in range(10)] == [1] * 10
    assert ollie_compile.explain(net, torch.randn(2, 3, 5, 5), **QUICK).rewritten == 1


def test_a_fault_in_planning_leaves_the_model_working(monkeypatch):
    monkeypatch.setattr("ollie_compile.plan.preparing.search", lambda *_, **__: 1 / 0)
    net, x = small_net().eval(), torch.randn(1, 3, 8, 8)
    report = ollie_compile.explain(net, x, **QUICK)
    assert [reason for _, reason in report.untouched] == ["planning failed: division by zero"] * 2


def test_a_plan_cut_by_its_budget_is_made_anew(always_rewrite):
    conv = operator(torch.zeros(1, 3, 8, 8), torch.zeros(4, 3, 3, 3))
    config = OllieConfig(**QUICK)
    assert planner.plan(conv, config, 0.0, backend.CONTEXT).reason == candidates.OUT_OF_TIME
    assert planner.plan(conv, config, 20.0, backend.CONTEXT).winner is not None


def test_freeze_with_gradients_is_refused_aloud(always_rewrite):
    net, x = small_net(), torch.randn(1, 3, 8, 8)
    with pytest.warns(UserWarning, match="`freeze`: it needs torch.no_grad"):
        torch.compile(net, backend="ollie", options={**QUICK, "freeze": True})(x)


def test_freeze_equals_eager(always_rewrite):
    net, x = small_net().eval(), torch.randn(1, 3, 8, 8)
    with torch.no_grad():
        got = torch.compile(net, backend="ollie", options={**QUICK, "freeze": True})(x)
        torch.testing.assert_close(got, net(x), rtol=1e-4, atol=1e-5)


@pytest.mark.filterwarnings(
    "ignore:`torch._prims_common.check`:FutureWarning"
)  # Inductor's own, of diagonals
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_rounds_no_more_than_twice_the_original(always_rewrite, dtype):
    net, x = nn.Conv2d(16, 4, 3, padding=1).to(dtype).eval(), torch.randn(1, 16, 7, 9, dtype=dtype)
    with torch.no_grad():
        got, want = torch.compile(net, backend="ollie", options=QUICK, dynamic=False)(x), net(x)
    torch.testing.assert_close(got, want, rtol=2e-2, atol=2e-2)
    assert got.dtype == dtype
    (made,) = backend.CONTEXT.plans.values()
    limit = max(2e-5, 2 * checks.rounding_error(made.operator, None))
    rounded = [candidate for candidate in made.candidates if candidate.error is not None]
    assert rounded
    # Where the processor's products round more than its convolutions, no candidate is left.
    assert made.winner in rounded or all(c.error > limit for c in rounded)
    assert all((c.error > limit) == ("tolerance" in (c.rejected or "")) for c in rounded)


@pytest.mark.parametrize(
    ("net", "shape"),
    [
        (nn.ConvTranspose2d(6, 4, 3, stride=2, padding=1, output_padding=1, groups=2), (1, 6, 5, 4)),
        (nn.ConvTranspose1d(4, 3, 3, stride=2, dilation=3), (16, 4, 7)),
        (nn.Conv2d(6, 6, 3, groups=6, padding=1), (16, 6, 5, 7)),
    ],
    ids=["transposed, groups", "transposed, dilation", "depthwise"],
)
def test_groups_and_dilation_equal_eager(always_rewrite, net, shape):
    x = torch.randn(shape)
    with torch.no_grad():
        got = torch.compile(net.eval(), backend="ollie", options=QUICK, dynamic=False)(x)
        (made,) = backend.CONTEXT.plans.values()
        assert made.winner is not None
        torch.testing.assert_close(got, net(x), rtol=1e-4, atol=1e-5)


def test_additions_by_fold_are_candidates(monkeypatch):
    def bound(program, *_, **__):
        return 1e-12 if any(map(match_selective_add, program.scope.scopes())) else 1.0

    monkeypatch.setattr("ollie_compile.measure.bounds.bound_seconds", bound)
    net, x = nn.ConvTranspose2d(16, 2, 4, stride=2, padding=1).eval(), torch.randn(1, 16, 5, 6)
    conv = operator(x, net.weight.detach(), stride=2, padding=1, transposed=True)
    options = {**QUICK, "candidates": 1, "freeze": False}
    made = planner.plan(conv, OllieConfig(**options), 100.0, backend.CONTEXT)
    fold = next(candidate for candidate in made.candidates if candidate.program.kernels == "fold")
    assert checks.check_program(conv, fold.program) is None
    assert checks.rounding_error(conv, fold.program) < 2e-5
    made.winner = fold
    with torch.no_grad():
        got = torch.compile(net, backend="ollie", options=options, dynamic=False)(x)
        torch.testing.assert_close(got, net(x), rtol=1e-4, atol=1e-5)
    assert list(backend.CONTEXT.plans.values()) == [made]


def test_training_of_several_products_is_left_and_right(always_rewrite):
    net = nn.ModuleList([nn.Linear(8, 8), nn.Linear(8, 4)])
    x = torch.randn(3, 8)
    step = torch.compile(
        lambda x: net[0](x).relu().sum() + net[1](x).sigmoid().sum(), backend="ollie", options=QUICK
    )
    step(x).backward()
    got = [parameter.grad.clone() for parameter in net.parameters()]
    net.zero_grad()
    (net[0](x).relu().sum() + net[1](x).sigmoid().sum()).backward()
    torch.testing.assert_close(got, [parameter.grad for parameter in net.parameters()])


def test_frozen_parallel_products_equal_eager(monkeypatch):
    """Weights are joined ahead of the calls, which Inductor's freezing folds."""

    class Parallel(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(64, 48), nn.Linear(64, 32, bias=False)

        def forward(self, x):
            return self.a(x).relu(), self.b(x).sigmoid()

    monkeypatch.setattr(
        "ollie_compile.measure.bounds.bound_seconds",
        lambda program, *_, **__: 1e-12 * sum(1 for scope in program.scope.scopes() if scope.is_contraction),
    )
    net, x = Parallel().eval(), torch.randn(2, 64)
    options = {"budget_s": 300, "candidates": 1, "freeze": True}
    report = ollie_compile.explain(net, x, **options)
    ((names, made),) = report.plans
    assert names == ["addmm, mm"]
    assert set(made.operator.parameters) == {"X0", "X1", "X3"}
    assert made.candidates[0].measured_s is not None
    with torch.no_grad():
        got = torch.compile(net, backend="ollie", options={**QUICK, "freeze": True}, dynamic=False)(x)
    torch.testing.assert_close(got, net(x), rtol=1e-4, atol=1e-5)


def test_no_budget_keeps_every_original():
    report = ollie_compile.explain(small_net().eval(), torch.randn(1, 3, 8, 8), budget_s=0)
    assert report.rewritten == 0
    assert {made.reason for _, made in report.plans} == {"no time left in the budget"}


def test_a_wrong_candidate_is_dropped_and_named(monkeypatch, always_rewrite, caplog):
    monkeypatch.setattr("ollie_compile.plan.checks.check_derivation", lambda *_: "differs over the integers")
    net, x = small_net().eval(), torch.randn(1, 3, 8, 8)
    report = ollie_compile.explain(net, x, **QUICK)
    assert report.rewritten == 0
    assert "wrong: differs over the integers" in str(report)
    caplog.clear()


def test_a_users_wrong_rule_is_dropped_and_named(monkeypatch, always_rewrite, caplog):
    def shifted(scope):
        if scope.is_contraction:
            moved = tuple(index + 1 for index in scope.factors[0].index)
            yield scope.with_factor(0, Read(scope.factors[0].tensor, moved))

    monkeypatch.setattr("ollie_compile.rules.EXPLORATIVE", {})
    monkeypatch.setattr("ollie_compile.search.expansion.EXPLORATIVE", rules.EXPLORATIVE)
    rules.register("shifted by one", shifted)
    report = ollie_compile.explain(small_net().eval(), torch.randn(1, 3, 8, 8), candidates=64, **QUICK)
    assert "first after the rules shifted by one" in str(report)
    assert all(
        "shifted by one" not in step.rules
        for _, made in report.plans
        for step in (made.winner.derivation.steps if made.winner else ())
    )
    caplog.clear()
    with pytest.raises(ValueError, match="must have a name of its own, got 'shifted by one'"):
        rules.register("shifted by one", shifted)


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
    options = {**QUICK, "joint_custom_pre_pass": Spy()}
    with torch.no_grad(), torch._functorch.config.patch(enable_autograd_cache=False):
        torch.compile(net, backend="ollie", options=options)(x)
    assert seen


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"max_dept": 3}, "did you mean `max_depth`"),
        ({"max_depth": -1}, "`max_depth` must be a whole number, 0 or more, got -1"),
        ({"tune": "guess"}, '"measure" or "model"'),
        ({"verify": "no"}, "`verify` must be true or false, got 'no'"),
        ({"budget_s": "5"}, "`budget_s` must be 0 or more seconds, got '5'"),
        ({"margin": 1.5}, r"`margin` must be in \[0, 1\), got 1.5"),
    ],
)
def test_bad_options_are_named(options, match):
    with pytest.raises(ValueError, match=match):
        OllieConfig.from_dict(options)
    with pytest.raises(ValueError, match=match):
        ollie_compile.explain(nn.Conv2d(1, 1, 1), torch.zeros(1, 1, 2, 2), **options)
