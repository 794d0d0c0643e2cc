"""Models that nobody tuned for: results and gradients of the zoo equal eager's."""

import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "scripts" / "bench"))
from ollie_zoo_models import LANGUAGE, VISION_AND_AUDIO, ZOO

OPTIONS = {"budget_s": 10.0}

pytestmark = [
    pytest.mark.usefixtures("fresh"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning"),
]


def equal_eager(name):
    torch.manual_seed(0)
    net, inputs = ZOO[name]()
    net.eval()
    run = torch.compile(net, backend="ollie", options=OPTIONS, dynamic=False)
    results, gradients = [], []
    for call in (run, net):
        torch.manual_seed(0)
        net.zero_grad()
        result = call(**inputs)
        result.float().square().mean().backward()
        results.append(result.detach())
        gradients.append([p.grad for p in net.parameters() if p.grad is not None])
    close(*results)
    for got, want in zip(*gradients, strict=True):
        close(got, want)


def close(got, want):
    """Equal up to rounding, relative to the largest value."""
    largest = want.abs().max().clamp_min(1e-6)
    torch.testing.assert_close(got / largest, want / largest, rtol=0, atol=1e-3)


def test_forty_models():
    assert (len(VISION_AND_AUDIO), len(LANGUAGE)) == (20, 20)


@pytest.mark.slow
@pytest.mark.parametrize("name", ZOO)
def test_the_zoo_equals_eager(name):
    equal_eager(name)
