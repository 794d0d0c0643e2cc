"""Constant matrices in one kernel: what is matched, and that the C++ kernels compute it."""

import json
import math

import pytest
import torch
from torch.library import opcheck
from torch.nn import functional

from ollie_compile.expr import Constant, Input, parse
from ollie_compile.kernels import cpp_bilinear, library
from ollie_compile.lower.layouts import programs
from ollie_compile.lower.lowering import Program
from ollie_compile.plan.checks import check_program, rounding_error
from ollie_compile.rules import simplify
from ollie_compile.rules.bilinear import bilinear_decomposition
from ollie_compile.rules.cook_toom import matrices
from ollie_compile.search.hybrid import search
from ollie_compile.targets.bilinear import match_bilinear
from ollie_compile.targets.transforms import match_transform
from tests.ollie.kernel_cases import threads_set
from tests.ollie.strategies import operator

CASES = {
    "2d": ((2, 8, 14, 14), (12, 8, 3, 3), {"padding": 1}, 2),
    "odd sizes": ((1, 5, 13, 9), (17, 5, 3, 3), {"padding": 1}, 2),
    "no padding": ((2, 3, 9, 8), (4, 3, 3, 3), {}, 2),
    "1d": ((2, 3, 20), (5, 3, 3), {"padding": 1}, 1),
    "one row": ((2, 3, 8, 17), (5, 3, 1, 5), {"padding": (0, 2)}, 1),
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("place", [0, 1], ids=["F2", "F4"])
def test_a_bilinear_form_is_its_convolution_in_a_few_kernels(case, place):
    shape, taps, options, nested = CASES[case]
    conv = operator(torch.zeros(shape), torch.zeros(taps), **options)
    derived = list(bilinear_decomposition(conv.expression()))[place]
    scope = simplify(derived)[0]
    (call,) = (call for inner in scope.scopes() if (call := match_bilinear(inner)))
    assert len(call.result.matrices) == len(call.data.matrices) == nested
    (written,) = (p for p in programs(scope, torch.device("cpu")) if p.layout == "rows")
    assert written.kernels == "cpp"
    assert check_program(conv, written) is None
    assert rounding_error(conv, written) < 1e-5
    assert rounding_error(conv, Program(scope, "rows")) < 1e-5


@pytest.mark.parametrize(
    "options",
    [
        {"stride": 2, "padding": 1, "transposed": True},  # taps in reverse, four rests of the places
        {"padding": 2, "dilation": 2},
    ],
    ids=["transposed", "dilated"],
)
def test_bilinear_forms_that_are_found_are_their_convolutions(options):
    conv = operator(torch.zeros(1, 4, 7, 6), torch.zeros(4, 4, 4, 4), **options)
    found = search(conv.expression(), max_depth=1, budget_s=60.0).derivations
    written = [Program(d.scope, "rows", "cpp") for d in found if d.scope.constants()]
    assert written
    for program in written:
        assert any(map(match_bilinear, program.scope.scopes()))
        assert check_program(conv, program) is None
        assert rounding_error(conv, program) < 1e-5


@pytest.mark.parametrize(
    ("shape", "taps", "options"),
    [
        ((1, 8, 9, 9), (6, 4, 3, 3), {"padding": 1, "groups": 2}),
        ((2, 4, 5, 6), (4, 3, 4, 4), {"stride": 2, "padding": 1, "transposed": True}),
        ((1, 3, 7), (3, 2, 4), {"stride": 2, "padding": 1, "transposed": True}),
    ],
    ids=["groups", "phases", "phases of one dimension"],
)
def test_weights_apart_are_one_kernel_too(shape, taps, options):
    """Groups of channels, and the phases of a stride of 2, whose windows begin half a step apart."""
    conv = operator(torch.zeros(shape), torch.zeros(taps), **options)
    found = search(conv.expression(), max_depth=1, budget_s=60.0).derivations
    calls = [
        (derivation.scope, call)
        for derivation in found
        for inner in derivation.scope.scopes()
        if (call := match_bilinear(inner)) and call.apart
    ]
    assert calls
    for scope, _ in calls:
        assert check_program(conv, Program(scope, "rows", "cpp")) is None
        assert rounding_error(conv, Program(scope, "rows", "cpp")) < 1e-5


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize(
    ("tiles", "channels", "features"),
    [((1, 1), (3,), 5), ((7, 5), (16,), 64), ((20, 9), (2, 17), 81)],
    ids=["one tile", "whole vectors", "several blocks, what is left of vectors and panels"],
)
def test_the_kernel_of_a_bilinear_form_is_its_sums(tiles, channels, features, threads):
    torch.manual_seed(0)
    data = [[[1.0, 0.0, -1.0, 0.5], [0.0, 2.0, 1.0, 0.0], [0.0, -1.0, 1.0, 3.0]], [[1.0, 1.0, -1.0]]]
    result = [[[1.0, 2.0, 0.0], [0.0, 1.0, -1.0]], [[0.5], [-1.0]]]
    height, width = 2 * tiles[0] + 1, tiles[1] + 1
    x = torch.randn(3, height, width, *channels)
    weight = torch.randn(1, 3, math.prod(channels), features)
    packed = cpp_bilinear.packed(weight)
    # Windows of 4 by steps of 2 that begin one place outside, of 3 by steps of 1; the last row is cut off.
    out = (3, 2 * tiles[0] - 1, 2 * tiles[1], features)
    arguments = {
        "size": list(out),
        "apart": 0,
        "tiles": [3, *tiles],
        "stride": [x.stride(0), 2 * x.stride(1), x.stride(2)],
        "out_stride": [math.prod(out[1:]), 2 * out[2] * features, 2 * features],
        "offset": -x.stride(1),
        "reads": [x.stride(1), -1, 1, height, 0, 2, 0, x.stride(2), 0, 1, width, 0, 0, 1],
        "writes": [out[2] * features, 0, 1, out[1], 0, 2, 0, features, 0, 1, out[2], 0, 0, 2],
        "channels": list(channels),
        "channel_stride": list(x.stride()[3:]),
        "features": features,
        "matrices": json.dumps([data, result]),
    }
    around = functional.pad(x.double().flatten(3), (0, 0, 0, 1, 1, 0))
    window = around.unfold(1, 4, 2).unfold(2, 3, 1)  # [n, p, q, c, j1, j2]
    a, b, c, d = (torch.tensor(matrix).double() for matrix in (*data, *result))
    moved = torch.einsum("aj,bk,npqcjk->abnpqc", a, b, window).flatten(0, 1)
    products = torch.einsum("inpqc,icf->inpqf", moved, weight[0].double()).unflatten(0, (3, 1))
    want = torch.einsum("ka,lb,abnpqf->npkqlf", c, d, products).flatten(1, 2).flatten(2, 3)[:, : out[1]]
    with threads_set(threads):
        got = library.bilinear(x, packed, **arguments)
    torch.testing.assert_close(got.double(), want, rtol=0, atol=1e-5 * want.abs().max().item())
    exact = library.bilinear(x.double(), packed.double(), **arguments)
    torch.testing.assert_close(exact, want)
    opcheck(library.bilinear, (x, packed), arguments, test_utils=("test_schema", "test_faketensor"))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_kernel_is_the_sum_it_stands_for(dtype):
    first, second = torch.randn(3, 2, dtype=torch.float64), torch.randn(2, 4, dtype=torch.float64)
    x = torch.randn(2, 3, 9, 37, dtype=dtype)  # [n, j1, 2 * q + j2, c]
    size, stride = [2, 3, 2, 3, 37], [x.stride(0), 0, 0, 2 * 37, 1]  # [n, i1, i2, q, c]
    values = [*first.flatten().tolist(), *second.flatten().tolist()]
    steps = [2 * x.stride(1), x.stride(2)]  # the first matrix takes every second plane
    arguments = (x, size, stride, 0, [1, 2], steps, values, [2, 4])
    got = library.transform(*arguments)
    window = x.double()[:, ::2].unfold(2, 4, 2)  # [n, j1, q, c, j2]
    want = torch.einsum("aj,bk,njqck->nabqc", first, second, window)
    torch.testing.assert_close(got.double(), want, rtol=0, atol=1e-5 if dtype == torch.float32 else 1e-12)
    opcheck(library.transform, arguments, test_utils=("test_schema", "test_faketensor"))


def test_a_matrix_is_not_joined_with_one_below_whose_values_go_on_outside():
    """The inner scope is tighter than what it reads: outside it is 0, and the matrix below is not."""
    matrix = Constant.matrix("At2x3", [[1, 1, 1, 0], [0, 1, -1, 1]])
    tensors = {"X": Input("X", (4, 12, 3)), "At2x3": matrix}
    for extent, count in ((12, 2), (8, 1)):
        inner = f"L[i:0..2, t:0..{extent}, c:0..3] Sum[j:0..4] At2x3[i, j] * X[j, t, c]"
        scope = f"L[k:0..2, i:0..2, q:0..4, c:0..3] Sum[j:0..4] At2x3[k, j] * {{{inner}}}[i, 2*q + j, c]"
        call = match_transform(parse(scope, tensors))
        assert call is not None
        assert len(call.matrices) == count


@pytest.mark.parametrize(
    ("loops", "place", "whole"),
    [
        ("q1:0..5, x1:0..2, h2:0..10, f:0..5", "h2", True),
        ("q1:0..5, x1:0..2, h2:1..10, f:0..5", "h2", False),
        ("q1:0..5, x1:0..2, h2:0..9, f:0..5", "(h2 + 1)", False),
        ("b:0..2, q1:0..5, x1:0..2, h2:0..10, f:0..5", "h2", False),
    ],
    ids=["whole", "from the second row", "shifted", "a loop that nothing reads"],
)
def test_parts_of_a_bilinear_form_are_not_taken_for_the_whole(loops, place, whole):
    at, g, bt = matrices(2, 3)
    tensors = {"A": Input("A", (3, 12, 12)), "K": Input("K", (5, 3, 3, 3))}
    tensors |= {constant.name: constant for constant in (at, g, bt)}
    data = "L[i1:0..4, q1:0..5, t1:0..12, c:0..3] Sum[j1:0..4] Bt2x3[i1, j1] * A[c, j1 + 2*q1, t1]"
    data = (
        "L[i2:0..4, i1:0..4, q1:0..5, q2:0..5, c:0..3] Sum[j1:0..4] "
        f"Bt2x3[i2, j1] * {{{data}}}[i1, q1, j1 + 2*q2, c]"
    )
    weight = "L[i1:0..4, c:0..3, r2:0..3, f:0..5] Sum[r1:0..3] G2x3[i1, r1] * K[f, c, r1, r2]"
    weight = f"L[i2:0..4, c:0..3, i1:0..4, f:0..5] Sum[r2:0..3] G2x3[i2, r2] * {{{weight}}}[i1, c, r2, f]"
    product = (
        f"L[i2:0..4, i1:0..4, q1:0..5, q2:0..5, f:0..5] Sum[c:0..3] {{{data}}}[i2, i1, q1, q2, c] * "
        f"{{{weight}}}[i2, c, i1, f]"
    )
    rows = (
        "L[i1:0..4, q1:0..5, q2:0..5, x1:0..2, f:0..5] Sum[i2:0..4] "
        f"At2x3[x1, i2] * {{{product}}}[i2, i1, q1, q2, f]"
    )
    text = f"L[{loops}] Sum[i1:0..4] At2x3[x1, i1] * {{{rows}}}[i1, q1, {place} // 2, {place} % 2, f]"
    scope = parse(text, tensors)
    assert (match_bilinear(scope) is not None) == whole
    inputs = {"A": torch.randn(3, 12, 12), "K": torch.randn(5, 3, 3, 3)}
    got, want = (
        program(inputs | program.constants(torch.float32, torch.device("cpu")))
        for program in (Program(scope, "rows", "cpp"), Program(scope, "rows"))
    )
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)
