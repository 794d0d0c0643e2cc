"""The same graph on the same machine gets the same plan, whatever else the machine does."""

import contextlib
import os
import subprocess
import sys

import pytest
import torch
from torch import nn

import ollie_compile

BUSY = "while True: pass"


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
def test_plans_are_the_same_beside_busy_processes(monkeypatch, tmp_path):
    net = nn.Sequential(nn.Conv2d(32, 32, 3, padding=1), nn.ReLU(), nn.Conv2d(32, 1, 5, padding=2)).eval()
    x = torch.randn(1, 32, 64, 64)

    def planned(name):
        """Of each operator: the steps of its derivation, and the program with its kernels."""
        monkeypatch.setenv("OLLIE_CACHE_DIR", str(tmp_path / name))
        monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / f"inductor-{name}"))
        torch.compiler.reset()
        ollie_compile.backend.CONTEXT.reset()
        report = ollie_compile.explain(net, x, freeze=True, budget_s=30, max_depth=1)
        winners = [(str(plan.operator), plan.winner) for _, plan in report.plans]
        return [
            (operator, winner and (str(winner.program), [step.rules for step in winner.derivation.steps]))
            for operator, winner in winners
        ]

    alone = planned("alone")
    with busy():
        beside = planned("beside")
    assert [operator for operator, winner in alone if winner] != []
    assert beside == alone
