"""Lifted operators against torch: exactly through the interpreter, and lowered to the same shape."""

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from ollie_compile import lift
from ollie_compile.expr import Input, evaluate
from ollie_compile.lower.layouts import is_lowerable, programs
from ollie_compile.search.proof import PRIME

CPU = torch.device("cpu")
X, Y, Z = (Input(name, shape) for name, shape in (("X", (2, 3, 6, 4)), ("Y", (2, 3, 4, 5)), ("Z", (3, 4, 5))))
W, B = Input("W", (7, 4)), Input("B", (7,))

CASES = {
    "matmul": (lift.matmul(X, Y), lambda v: v["X"] @ v["Y"]),
    "matmul broadcast": (lift.matmul(X, Z), lambda v: v["X"] @ v["Z"]),
    "mm": (lift.matmul(W, lift.permute(W, (1, 0))), lambda v: v["W"] @ v["W"].T),
    "linear": (lift.linear(X, W), lambda v: F.linear(v["X"], v["W"])),
    "linear with bias": (lift.linear(X, W, B), lambda v: F.linear(v["X"], v["W"], v["B"])),
    "add": (lift.elementwise("+", Y, Z), lambda v: v["Y"] + v["Z"]),
    "mul": (lift.elementwise("*", X, X), lambda v: v["X"] * v["X"]),
    "relu": (lift.elementwise("relu", X), lambda v: v["X"].relu()),
    "maximum": (lift.elementwise("maximum", Y, Z), lambda v: torch.maximum(v["Y"], v["Z"])),
    "permute": (lift.permute(X, (2, 0, 3, 1)), lambda v: v["X"].permute(2, 0, 3, 1)),
    "pad": (
        lift.pad(X, ((0, 0), (1, 0), (-1, 2), (0, 3))),
        lambda v: F.pad(v["X"], (0, 3, -1, 2, 1, 0)),
    ),
    "slice": (lift.narrow(X, 2, 1, 6, 2), lambda v: v["X"][:, :, 1:6:2]),
    "cat": (lift.cat([X, lift.narrow(X, 2, 0, 2)], 2), lambda v: torch.cat([v["X"], v["X"][:, :, :2]], 2)),
    "stack": (lift.stack([Z, Z], 1), lambda v: torch.stack([v["Z"], v["Z"]], 1)),
    "view": (lift.view(X, (6, 6, 4)), lambda v: v["X"].view(6, 6, 4)),
    "view that splits": (lift.view(X, (2, 3, 3, 2, 4)), lambda v: v["X"].view(2, 3, 3, 2, 4)),
    "view across": (lift.view(Z, (4, 15)), lambda v: v["Z"].view(4, 15)),
    "unfold": (lift.unfold(X, 2, 3, 2), lambda v: v["X"].unfold(2, 3, 2)),
    "index_select even": (lift.index_select(X, 2, [5, 3, 1]), lambda v: v["X"][:, :, [5, 3, 1]]),
    "index_select": (lift.index_select(X, 2, [4, 0, 1]), lambda v: v["X"][:, :, [4, 0, 1]]),
    "avg_pool": (
        lift.average_pool(X, (2, 2), stride=(2, 1), padding=(1, 0)),
        lambda v: F.avg_pool2d(v["X"], (2, 2), (2, 1), (1, 0)),
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_lifted_equals_torch(name):
    scope, reference = CASES[name]
    generator = np.random.default_rng(0)
    # Multiples of 4, so that the averages of four are whole.
    arrays = {tensor.name: 4 * generator.integers(-4, 5, tensor.shape) for tensor in scope.inputs().values()}
    values = {key: torch.tensor(array).double() for key, array in arrays.items()}
    want = reference(values)
    assert scope.shape == tuple(want.shape)
    points = np.stack(np.meshgrid(*map(np.arange, scope.shape), indexing="ij"), -1).reshape(-1, want.dim())
    got = evaluate(scope, arrays, points, PRIME if scope.constants() else None)
    got = np.where(got > PRIME // 2, got - PRIME, got) if scope.constants() else got
    assert got.reshape(scope.shape).tolist() == want.tolist()
    if name == "view across":  # such a view is no window of its input, and stays an operator of its own
        assert not is_lowerable(scope)
        return
    assert is_lowerable(scope)
    for program in programs(scope, CPU):
        lowered = program(values | program.constants(torch.float64, CPU))
        torch.testing.assert_close(lowered, want)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: lift.matmul(X, W), r"needs \[.., m, k\] and \[.., k, n\], got \[2, 3, 6, 4\] and \[7, 4\]"),
        (
            lambda: lift.elementwise("+", X, Y),
            r"Shapes must broadcast, got \[2, 3, 6, 4\] and \[2, 3, 4, 5\]",
        ),
        (lambda: lift.elementwise("erfinv", X), "`function` must be one of .*, got 'erfinv'"),
        (lambda: lift.view(X, (5, 5)), r"`shape` must hold 144 elements, got \[5, 5\]"),
    ],
)
def test_what_does_not_fit_is_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()
