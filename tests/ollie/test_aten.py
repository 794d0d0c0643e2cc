"""Operators lifted from real FX graphs: equal to torch when lowered, or left with a reason."""

import numpy as np
import pytest
import torch
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn import functional as F

from ollie_compile.expr import Input, evaluate
from ollie_compile.lift.aten import UnliftableError, lift_node
from ollie_compile.lift.products import elementwise
from ollie_compile.lower.layouts import is_lowerable, programs

X, Y, V = torch.randn(2, 6, 7), torch.randn(2, 7, 5), torch.randn(6)
I1, I2, I3 = torch.randn(2, 4, 9), torch.randn(2, 4, 7, 6), torch.randn(1, 2, 4, 5, 3)
aten = torch.ops.aten
CPU = torch.device("cpu")

LIFTED = {
    "mm": (lambda a, b: a[0] @ b[0], X, Y),
    "bmm": (torch.bmm, X, Y),
    "matmul": (aten.matmul.default, X, Y),
    "addmm": (lambda a, b, c: torch.addmm(c, a[0], b[0]), X, Y, torch.randn(5)),
    "baddbmm": (lambda a, b: torch.baddbmm(b[:, :1], a, b), X, Y),
    "einsum": (lambda a, b: torch.einsum("bmk,bkn->mbn", a, b), X, Y),
    "linear": (aten.linear.default, X, torch.randn(3, 7), torch.randn(3)),
    "conv1d": (lambda x, w, b: F.conv1d(x, w, b, stride=2, padding=1), I1, torch.randn(6, 4, 3), V),
    "conv2d": (lambda x, w: F.conv2d(x, w, padding=(0, 2), dilation=2), I2, torch.randn(3, 4, 2, 3)),
    "conv3d": (lambda x, w: F.conv3d(x, w, padding=1), I3, torch.randn(2, 2, 3, 2, 1)),
    "grouped": (lambda x, w: F.conv2d(x, w, groups=2), I2, torch.randn(6, 2, 3, 3)),
    "depthwise": (lambda x, w: F.conv2d(x, w, groups=4), I2, torch.randn(4, 1, 3, 3)),
    "transposed": (
        lambda x, w: F.conv_transpose2d(x, w, None, 2, 1, output_padding=1),
        I2,
        torch.randn(4, 3, 3, 4),
    ),
    "transposed grouped": (lambda x, w: F.conv_transpose1d(x, w, groups=2), I1, torch.randn(4, 3, 3)),
    "transposed dilated": (
        lambda x, w: F.conv_transpose1d(x, w, None, 2, 1, dilation=3),
        I1,
        torch.randn(4, 3, 3),
    ),
    "avg_pool1d": (lambda x: F.avg_pool1d(x, 3, padding=1), I1),
    "avg_pool2d": (lambda x: F.avg_pool2d(x, (2, 3), (1, 2)), I2),
    "avg_pool3d": (lambda x: F.avg_pool3d(x, 2, 1), I3),
    "pad": (lambda x: F.pad(x, (1, -1, 0, 2)), I2),
    "slice": (lambda x: x[:, 1:3, ::2, -3:], I2),
    "select": (lambda x: x[:, -1, :, 2], I2),
    "view": (lambda x: x.reshape(2, 2, 2, 42).view(2, 4, -1), I2),
    "permute": (lambda x: x.permute(0, 2, 3, 1).transpose(1, 2), I2),
    "t": (lambda x: aten.t.default(x[0]), X),
    "expand": (lambda x: x[:, :1].expand(-1, 5, -1), X),
    "squeeze": (lambda x: x[:, :1].squeeze(1).unsqueeze(-1), X),
    "cat": (lambda x, y: torch.cat([x, y.transpose(1, 2)], -2), X, Y),
    "stack": (lambda x: torch.stack([x, x + x], 1), X),
    "unfold": (lambda x: x.unfold(2, 3, 2), I1),
    "as_strided": (lambda x: aten.as_strided.default(x, [2, 4, 7, 3], [36, 9, 1, 1]), I1),
    "index_select": (lambda x: x[:, torch.tensor([2, 0, 3])], I1),
    "index_select even": (lambda x: aten.index_select.default(x, 1, torch.tensor([3, 1])), I1),
    "add and mul": (lambda x, v: (x + v[:, None] + 3 + 0) * 0.5, X, V),
    "sub and div": (lambda x, v: -(x - v[:, None]) / 4, X, V),
    "product less a product": (lambda x, y, z: torch.bmm(x, y) - torch.bmm(x, z), X, Y, Y),
    "scaled rows": (lambda x, y, v: torch.bmm(x, y) * v[:, None], X, Y, V),
    "scaled channels": (lambda x, w, v: F.conv2d(x, w) * v.view(-1, 1, 1), I2, torch.randn(6, 4, 2, 2), V),
    "clone": (lambda x: x.clone().contiguous() + x, X),
}


def lifted(function, *inputs):
    """The expression of a traced function over inputs named as its placeholders, and those names."""
    graph = make_fx(function, tracing_mode="fake")(*inputs).graph
    values = {}
    for node in graph.nodes:
        if node.op == "placeholder":
            values[node] = (Input(node.name, tuple(node.meta["val"].shape)),)
        elif node.op == "call_function" and node.target is not aten.lift_fresh_copy.default:
            values[node] = lift_node(node, values.__getitem__, lambda n: Input(f"number_{n}", ()))
        elif node.op == "output":
            terms = values[node.args[0]]
            names = [placeholder.name for placeholder in graph.find_nodes(op="placeholder")]
            return terms[0] if len(terms) == 1 else elementwise("+", *terms), names
    raise AssertionError("a graph has an output")


@pytest.mark.parametrize("name", LIFTED)
def test_lifted_from_a_graph_equals_torch(name):
    function, *shapes = LIFTED[name]
    inputs = [torch.randint(-8, 9, value.shape).double() for value in shapes]
    scope, names = lifted(function, *inputs)
    values = dict(zip(names, inputs, strict=True))
    values |= {n: torch.tensor(float(n[7:])).double() for n in scope.inputs() if n.startswith("number_")}
    want = function(*inputs)
    if is_lowerable(scope):
        program = programs(scope, CPU)[0]
        got = program(values | program.constants(torch.float64, CPU))
    else:  # a transposed convolution becomes operators by derivation
        points = np.stack(np.meshgrid(*map(np.arange, scope.shape), indexing="ij"), -1)
        arrays = {key: value.long().numpy() for key, value in values.items()}
        got = torch.tensor(evaluate(scope, arrays, points.reshape(-1, want.dim()), None)).view(want.shape)
    torch.testing.assert_close(got.double(), want)


@pytest.mark.parametrize(
    ("function", "inputs", "reason"),
    [
        (lambda x: x.relu(), (X,), "aten.relu.default is not lifted"),
        (lambda x: torch.add(x, x, alpha=2), (X,), "a scaled sum"),
        (lambda x, y: x / y, (X, X), "a quotient of tensors"),
        (lambda x: x.to(torch.complex64) * 2, (X,), "is not lifted"),
        (lambda x: x * 2, (X.to(torch.complex64),), "dtypes torch.complex64"),
        (lambda x: x * 2, (X.long(),), "dtypes "),
        (lambda x: x * 2, (torch.zeros(2, 0),), "a dimension of size 0"),
        (lambda x, i: x[:, i], (X, torch.tensor([1, 2])), "an index that is not known"),
        (lambda x: F.pad(x, (1, 1), value=1.0), (X,), "padding that is not 0"),
        (lambda x: F.avg_pool1d(x, 2, ceil_mode=True), (I1,), "a pooling that counts otherwise"),
        (
            lambda x, y: torch.bmm(torch.bmm(x, y), torch.bmm(x, y)),
            (X, X.transpose(1, 2).contiguous()),
            "both factors are products",
        ),
        (lambda x: aten.as_strided.default(x, [3], [1]), (X.transpose(1, 2),), "not contiguous"),
    ],
)
def test_what_has_no_expression_is_left_with_a_reason(function, inputs, reason):
    with pytest.raises(UnliftableError, match=reason):
        lifted(function, *inputs)
