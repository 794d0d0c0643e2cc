import pytest
import torch

from ripple_loader.format import sketch as sketch_module
from ripple_loader.format.sketch import IntegerInputs
from ripple_loader.online.selection import margins, select_active, shared_by_neighbours


@pytest.mark.parametrize(("tokens", "rows", "hidden"), [(1, 1, 1), (1, 5000, 48), (7, 100, 2048)])
@pytest.mark.parametrize("scale", [1e-30, 1.0, 1e20])
def test_integer_products_are_within_the_rounding_that_margins_allow_for(tokens, rows, hidden, scale):
    torch.manual_seed(0)
    x_TH = torch.randn(tokens, hidden) * scale
    x_TH[0, 0] *= 50  # an outlier makes the steps of its token coarse
    sketch_RH = torch.randint(-127, 128, (rows, hidden), dtype=torch.int8)
    found_TR = torch.empty(tokens, rows)
    inputs = IntegerInputs.of(x_TH)
    inputs.products(sketch_RH, found_TR)
    exact_TR = (x_TH.double() @ sketch_RH.double().T).float()
    allowed_TR = margins(torch.zeros(tokens, rows), torch.zeros(rows), torch.ones(rows), inputs)
    assert ((found_TR - exact_TR).abs() <= allowed_TR).all()


def test_integer_products_of_zeros_are_zero():
    found = torch.empty(2, 3)
    IntegerInputs.of(torch.zeros(2, 8)).products(torch.ones(3, 8, dtype=torch.int8), found)
    assert not found.any()


def test_neighbours_share_their_scores_behind_the_pinned_ones():
    score = torch.tensor([[9.0, 1.0, 3.0, 5.0, 7.0]])
    assert shared_by_neighbours(score, 0.0, 1).tolist() == [[9, 1, 3, 5, 7]]
    assert shared_by_neighbours(score, 1.0, 1).tolist() == [[9, 2, 2, 6, 6]]
    assert shared_by_neighbours(score, 0.5, 2).tolist() == [[9, 1, 3.5, 4.5, 7]]
    assert shared_by_neighbours(score, 0.5, 5).tolist() == [[9, 1, 3, 5, 7]]
    assert score.tolist() == [[9, 1, 3, 5, 7]]


@pytest.mark.parametrize("value", [float("inf"), float("-inf"), float("nan")])
def test_no_neuron_is_thought_inactive_where_an_input_is_not_finite(value):
    x_TH = torch.ones(2, 8)
    x_TH[1, 3] = value
    inputs, estimate_TN = IntegerInputs.of(x_TH), torch.empty(2, 5)
    inputs.products(-torch.ones(5, 8, dtype=torch.int8), estimate_TN)
    margin_TN = margins(estimate_TN, torch.ones(5), torch.ones(5), inputs)
    assert select_active(margin_TN, certain=True).places.tolist() == [0, 1, 2, 3, 4]
    assert len(select_active(margin_TN[:1] - 1e3, certain=True).places) == 0


def test_processors_without_integer_units_get_the_same(monkeypatch):
    torch.manual_seed(0)
    inputs = IntegerInputs.of(torch.randn(3, 64))
    sketch = torch.randint(-127, 128, (50, 64), dtype=torch.int8)
    found = {}
    for has_units in (True, False):
        monkeypatch.setattr(sketch_module, "has_integer_units", lambda has_units=has_units: has_units)
        found[has_units] = torch.empty(3, 50)
        inputs.products(sketch, found[has_units])
    torch.testing.assert_close(found[True], found[False], rtol=1e-5, atol=1e-2)
