"""Kernels of eOperators: the references, Triton's under its interpreter, and on a GPU."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.library import opcheck

from ollie_compile.kernels import library
from tests.ollie import kernel_cases


@pytest.mark.parametrize("threads", [1, 2])
def test_kernels_of_cpus_equal_torch(threads):
    with kernel_cases.threads_set(threads):
        kernel_cases.check(library, "cpu")


def test_triton_kernels_equal_torch_under_the_interpreter():
    """In a process of its own: the interpreter is chosen when triton is imported."""
    root = Path(__file__).resolve().parents[2]
    done = subprocess.run(
        [sys.executable, "-m", "tests.ollie.kernel_cases"], cwd=root, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.gpu
def test_triton_kernels_equal_torch_on_a_gpu():
    from ollie_compile.kernels import triton_kernels

    kernel_cases.check(triton_kernels, "cuda")


@pytest.mark.parametrize(
    ("operator", "arguments"),
    [
        (library.selective_add, (torch.randn(2, 3, 4, 4, 5, 3), [9, 7], [2, 2], [1, 1], [-1, -1])),
        (library.banded_scores, (torch.randn(2, 7, 4), torch.randn(2, 9, 4), 3, 2, -2)),
        (library.banded_values, (torch.randn(2, 7, 3), torch.randn(2, 9, 4), 2, -2)),
        (library.fold, (torch.randn(2, 12, 6), [4, 3], [2, 2], [1, 1], [1, 1])),
    ],
    ids=["selective_add", "banded_scores", "banded_values", "fold"],
)
def test_graphs_carry_the_operators(operator, arguments):
    opcheck(operator, arguments, test_utils=("test_schema", "test_faketensor"))
    graph = torch.export.export(_Module(operator), arguments).graph
    assert any("ollie" in str(node.target) for node in graph.nodes)


class _Module(torch.nn.Module):
    def __init__(self, operator):
        super().__init__()
        self.operator = operator

    def forward(self, *arguments):
        return self.operator(*arguments)
