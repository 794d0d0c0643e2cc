"""Products are given to the library that is faster."""

import pytest
import torch
from torch import nn

import ollie_compile
from ollie_compile.measure import products, timing
from ollie_compile.measure.profile import Profile

pytestmark = pytest.mark.usefixtures("fresh")


@pytest.fixture
def prefer(monkeypatch):
    """Names the library that wins wherever it is offered; what was offered is returned."""

    def choose(wanted):
        asked = []

        def fastest(offered, kept, margin, what, profile):
            for call in offered.values():
                assert torch.is_tensor(call())
            asked.append(tuple(offered))
            return wanted if wanted in offered else kept

        monkeypatch.setattr(products, "fastest", fastest)
        return asked

    return choose


def _net(bias=True):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(24, 40, bias), nn.GELU(), nn.Linear(40, 8, bias))


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("wanted", [products.PACKED, products.ONEDNN_PACKED, products.PLAIN])
def test_frozen_products_move(prefer, wanted, bias):
    asked = prefer(wanted)
    net, x = _net(bias).eval(), torch.randn(6, 24)
    with torch.no_grad():
        options = {"freeze": True, "budget_s": 1}
        got = torch.compile(net, backend="ollie", options=options, fullgraph=True)(x)
        torch.testing.assert_close(got, net(x), rtol=1e-4, atol=1e-5)
    assert (products.PACKED, products.ONEDNN_PACKED, products.PLAIN) in asked


@pytest.mark.parametrize("bias", [True, False])
def test_other_products_move_and_the_report_says_so(prefer, bias):
    asked = prefer(products.ONEDNN)
    net, x = _net(bias).eval(), torch.randn(6, 24)
    report = ollie_compile.explain(net, x, budget_s=1, freeze=False)
    assert asked == [(products.PLAIN, products.ONEDNN)] * 2
    assert any(note.startswith("products are computed by oneDNN") for note in report.notes)
    with torch.no_grad():
        options = {"budget_s": 1, "freeze": False}
        got = torch.compile(net, backend="ollie", options=options)(x)
        torch.testing.assert_close(got, net(x), rtol=1e-4, atol=1e-5)


def test_gradients_flow_through_moved_products(prefer):
    asked = prefer(products.ONEDNN)
    net, x = _net(), torch.randn(6, 24)
    wanted = torch.autograd.grad(net(x).square().sum(), [*net.parameters()])
    compiled = torch.compile(net, backend="ollie", options={"budget_s": 1})
    got = torch.autograd.grad(compiled(x).square().sum(), [*net.parameters()])
    torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-4)
    assert len(asked) == 5  # two forward, and all gradients but the input's


@pytest.mark.parametrize(
    "options", [{"budget_s": 0}, {"tune": "model"}, {"post_grad_custom_pre_pass": lambda graph: None}]
)
def test_nothing_moves_where_nothing_is_measured_and_users_passes_stay(prefer, options):
    asked = prefer(products.ONEDNN)
    net, x = _net().eval(), torch.randn(6, 24)
    with torch.no_grad():
        got = torch.compile(net, backend="ollie", options=options)(x)
        torch.testing.assert_close(got, net(x), rtol=1e-4, atol=1e-5)
    assert bool(asked) == ("post_grad_custom_pre_pass" in options)


@pytest.mark.parametrize(
    ("x", "dynamic"),
    [(torch.randn(6, 24), True), (torch.randn(6, 24, dtype=torch.float64), False)],
    ids=["dynamic shapes", "float64"],
)
def test_other_shapes_and_dtypes_stay(prefer, x, dynamic):
    asked = prefer(products.ONEDNN)
    net = _net().eval().to(x.dtype)
    with torch.no_grad():
        got = torch.compile(net, backend="ollie", options={"budget_s": 1}, dynamic=dynamic)(x)
        torch.testing.assert_close(got, net(x), rtol=1e-4, atol=1e-5)
    assert not asked


def test_a_library_must_win_by_the_margin_and_is_measured_once(monkeypatch):
    profile = Profile()
    times = iter([[1.0, 0.97], [1.0, 0.9]])
    monkeypatch.setattr(timing, "measure", lambda calls, deadline: next(times))
    offered = {products.PLAIN: int, products.ONEDNN: int}
    for _ in range(2):
        assert products.fastest(offered, products.PLAIN, 0.05, "near", profile) == products.PLAIN
        assert products.fastest(offered, products.PLAIN, 0.05, "far", profile) == products.ONEDNN


@pytest.mark.parametrize("bias", [None, torch.randn(5)])
@pytest.mark.parametrize(
    ("a", "b"),
    [
        (torch.randn(3, 4), torch.randn(4, 5)),
        (torch.randn(4, 3).t(), torch.randn(5, 4).t()),
        (torch.randn(3, 8)[:, ::2], torch.randn(8, 10)[::2, ::2]),
        (torch.randn(1, 4).expand(3, 4), torch.randn(1, 5).expand(4, 5)),
    ],
    ids=["contiguous", "transposed", "with gaps", "expanded"],
)
def test_the_operator_is_a_product_at_any_strides(a, b, bias):
    got = torch.ops.ollie.product(a, b, bias)
    torch.testing.assert_close(got, a @ b if bias is None else a @ b + bias)
    utils = ("test_schema", "test_faketensor")
    torch.library.opcheck(torch.ops.ollie.product.default, (a, b, bias), test_utils=utils)


def test_a_product_that_cannot_be_measured_stays(monkeypatch, caplog):
    def full(*_):
        raise MemoryError("no room")

    monkeypatch.setattr(products, "fastest", full)
    net, x = _net().eval(), torch.randn(6, 24)
    with torch.no_grad():
        got = torch.compile(net, backend="ollie", options={"budget_s": 1})(x)
        torch.testing.assert_close(got, net(x), rtol=1e-4, atol=1e-5)
    assert "stays as Inductor computes it" in caplog.text
