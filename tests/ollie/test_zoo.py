"""Models that nobody tuned for: results and gradients of the zoo equal eager's."""

import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "scripts" / "bench"))
from models.zoo import LANGUAGE, VISION_AND_AUDIO, ZOO, build, loss

OPTIONS = {"budget_s": 10.0}

pytestmark = [
    pytest.mark.usefixtures("fresh"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning"),
]


def equal_eager(name):
    net, inputs = build(name)
    run = torch.compile(net, backend="ollie", options=OPTIONS, dynamic=False)
    results, gradients = [], []
    for call in (run, net):
        torch.manual_seed(0)
        net.zero_grad()
        result = call(**inputs)
        loss(result).backward()
        results.append(result.detach())
        # Where eager computes no gradient, a compiled graph may give zeros.
        gradients.append([torch.zeros_like(p) if p.grad is None else p.grad for p in net.parameters()])
    close(*results, least=1e-6)
    # A gradient that is 0 but for rounding, such as that of a key's bias, is what float32 leaves of sums that
    # cancel: differences of 1e-7 of them say nothing.
    largest = max(want.abs().max().item() for want in gradients[1])
    assert largest > 1e-3, "there is nothing to compare"
    for got, want in zip(*gradients, strict=True):
        close(got, want, least=1e-4 * largest)


def close(got, want, least):
    """Equal up to rounding, relative to the largest value, or to `least` where that is larger."""
    largest = want.abs().max().clamp_min(least)
    torch.testing.assert_close(got / largest, want / largest, rtol=0, atol=1e-3)


def test_forty_models():
    assert (len(VISION_AND_AUDIO), len(LANGUAGE)) == (20, 20)


@pytest.mark.slow
@pytest.mark.parametrize("name", ZOO)
def test_the_zoo_equals_eager(name):
    equal_eager(name)
