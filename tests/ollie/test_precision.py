"""Half precision through float32: asked for, reported, and no less exact."""

import pytest
import torch
from torch import nn

import ollie_compile


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_products_of_half_precision_are_computed_in_float32(fresh, uncompiled, dtype):
    net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 16, 5)).to(dtype).eval()
    x = torch.randn(2, 3, 6, 6, dtype=dtype)
    with torch.no_grad():
        exact = net.double()(x.double())
        got = torch.compile(net.to(dtype), backend="ollie", options={"half_in_float32": True, "budget_s": 0})(
            x
        )
        assert got.dtype == dtype
        error = (got.double() - exact).abs().max()
        assert error <= torch.finfo(dtype).eps * exact.abs().max()
    report = ollie_compile.explain(net, x, half_in_float32=True, budget_s=0)
    assert any("2 products of half precision are computed in float32" in note for note in report.notes)
    report = ollie_compile.explain(net, x, budget_s=0)
    assert not report.notes


def test_float32_has_nothing_to_change(fresh, uncompiled):
    report = ollie_compile.explain(nn.Linear(3, 4), torch.randn(2, 3), half_in_float32=True, budget_s=0)
    assert not report.notes
