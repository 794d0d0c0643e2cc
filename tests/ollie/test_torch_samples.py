"""PyTorch's own samples of its operators give what they give in eager torch."""

import pytest
import torch

from scripts import torch_tests


@pytest.mark.parametrize("name", ["conv1d", "conv_transpose1d", "linear", "bmm", "einsum", "max_pool1d"])
def test_samples(uncompiled, name):
    """The whole of `scripts/torch_tests.py` takes half an hour; these are a few of its operators."""
    counts = {"ollie, forced": torch_tests.Counts()}
    for sample, dtype, call in torch_tests.samples([name], (torch.float32, torch.complex64), 2):
        torch_tests.run(sample, dtype, call, counts)
    (count,) = counts.values()
    assert count.samples
    assert not count.wrong


def test_operators_are_rewritten(uncompiled):
    counts = {"ollie, forced": torch_tests.Counts()}
    for sample, dtype, call in torch_tests.samples(["conv1d"], (torch.float64,), 3):
        torch_tests.run(sample, dtype, call, counts)
    assert counts["ollie, forced"].rewritten


@pytest.mark.parametrize(
    ("got", "why"),
    [
        (torch.ones(2), None),
        (torch.tensor([1.0, 1.001]), "off by"),
        (torch.tensor([1.0, torch.nan]), "finite"),
        (torch.ones(2, 1), "in place of"),
        (ValueError("no"), "ValueError: no"),
    ],
)
def test_differences(got, why):
    found = torch_tests.difference(torch.ones(2), got, 1e-4)
    assert found is None if why is None else why in found
