"""The same graph on the same machine gets the same plan, whatever else the machine does."""

import contextlib
import os
import subprocess
import sys

import pytest
import torch
from torch import nn

import ollie_compile
from ollie_compile import backend
from ollie_compile.measure.machine import Machine

BUSY = "while True: pass"


class LowRank(nn.Module):
    """A sum of products, whose programs are about as fast as torch's calls: the original is kept."""

    def __init__(self):
        super().__init__()
        shapes = (256, 256), (256, 8), (8, 256)
        self.full, self.down, self.up = (nn.Parameter(torch.randn(shape)) for shape in shapes)

    def forward(self, x):
        return (x @ self.full + (x @ self.down) @ self.up * 0.5).relu()


CASES = {  # with budgets that suffice: what a budget cuts short depends on the speed of the processor
    "a convolution": (lambda: nn.Conv2d(32, 1, 5, padding=2), (1, 32, 48, 48), True),
    "a low-rank sum": (LowRank, (1, 256), False),
}
OPTIONS = {"freeze": True, "budget_s": 60, "max_depth": 0, "candidates": 1}


@contextlib.contextmanager
def busy():
    """A busy process for each core of this one, and one more."""
    loops = [subprocess.Popen([sys.executable, "-c", BUSY]) for _ in range(len(os.sched_getaffinity(0)) + 1)]
    try:
        yield
    finally:
        for loop in loops:
            loop.kill()
            loop.wait()


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_plans_are_the_same_beside_busy_processes(name, monkeypatch, tmp_path):
    make, shape, rewritten = CASES[name]
    torch.manual_seed(0)
    net, x = make().eval(), torch.randn(shape)

    def planned(folder):
        """Of each operator: the steps of its derivation, and the program with its kernels."""
        monkeypatch.setenv("OLLIE_CACHE_DIR", str(tmp_path / folder / "plans"))
        monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / folder / "inductor"))
        monkeypatch.setattr(backend.CONTEXT, "machine", Machine())
        torch.compiler.reset()
        backend.CONTEXT.reset()
        report = ollie_compile.explain(net, x, **OPTIONS)
        winners = [(str(plan.operator), plan.winner) for _, plan in report.plans]
        return [
            (operator, winner and (str(winner.program), [step.rules for step in winner.derivation.steps]))
            for operator, winner in winners
        ]

    alone = planned("alone")
    with busy():
        beside = planned("beside")
    assert any(winner for _, winner in alone) == rewritten
    assert beside == alone
