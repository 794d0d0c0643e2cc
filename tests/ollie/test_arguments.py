"""Arguments of the operators: no kernel runs that would read or write outside of its tensors."""

import itertools
import json
import math
import random

import pytest
import torch

from ollie_compile.kernels import arguments, cpp_bilinear, library

X = torch.randn(2, 3, 9, 5)
TRANSFORM = {
    "size": [2, 3, 2, 3, 5],
    "stride": [135, 0, 0, 10, 1],
    "offset": 0,
    "places": [1, 2],
    "steps": [45, 5],
    "values": [0.5] * 6 + [2.0] * 4,
    "columns": [2, 2],
}
ADDITION = (torch.randn(1, 2, 3, 3, 7, 5), [7, 5], [1, 1], [-1, -1], [1, 1])


def bilinear():
    """A form over windows that hang over the border of an image, and its tensors."""
    data = [[[1.0, 0.0, -1.0, 0.5], [0.0, 2.0, 1.0, 0.0], [0.0, -1.0, 1.0, 3.0]], [[1.0, 1.0, -1.0]]]
    result = [[[1.0, 2.0, 0.0], [0.0, 1.0, -1.0]], [[0.5], [-1.0]]]
    x, features = torch.randn(2, 7, 5, 4), 3
    out = [2, 5, 8, features]
    form = {
        "apart": 0,
        "tiles": [2, 3, 4],
        "stride": [140, 40, 4],
        "out_stride": [120, 48, 6],
        "offset": -20,
        "reads": [20, -1, 1, 7, 0, 2, 0, 4, 0, 1, 5, 0, 0, 1],
        "writes": [24, 0, 1, 5, 0, 2, 0, 3, 0, 1, 8, 0, 0, 2],
        "channels": [4],
        "channel_stride": [1],
        "features": features,
        "matrices": json.dumps([data, result]),
    }
    return x, cpp_bilinear.packed(torch.randn(1, 3, 4, features)), out, form


def positions(form, windows, counts, strides, start):
    """What one side of a form touches, by going through every tile, entry and channel."""
    dims = len(form["tiles"])
    each = 4 + dims
    for tile in itertools.product(*map(range, form["tiles"])):
        moved = start + sum(map(math.prod, zip(tile, strides, strict=True)))
        for taps in itertools.product(*map(range, counts)):
            held, at = True, moved
            for number, tap in enumerate(taps):
                stride, first, step, extent, *by = windows[number * each : (number + 1) * each]
                position = first + step * tap + sum(map(math.prod, zip(tile, by, strict=True)))
                held &= 0 <= position < extent
                at += stride * tap
            if held:
                yield at


def check(x, weight, size, form):
    text = form["matrices"]
    numbers = {key: tuple(v) if isinstance(v, list) else v for key, v in form.items() if key != "matrices"}
    cpp_bilinear.check(arguments.Form(**numbers, text=text), x.numel(), tuple(weight.shape), tuple(size))


def test_what_passes_stays_inside_and_what_is_derived_passes():
    x, weight, size, form = bilinear()
    check(x, weight, size, form)
    library.bilinear(x, weight, size, **form)
    library.transform(X, **TRANSFORM)
    data, result = cpp_bilinear.matrices(form["matrices"])
    draw, passed = random.Random(0), 0
    for _ in range(3000):
        changed = {key: list(v) if isinstance(v, list) else v for key, v in form.items()}
        for _ in range(draw.choice([1, 1, 2])):
            name = draw.choice(
                ["tiles", "stride", "out_stride", "offset", "reads", "writes", "channel_stride"]
            )
            if name == "offset":
                changed[name] += draw.choice([-20, -4, -1, 1, 4, 20])
            else:
                changed[name][draw.randrange(len(changed[name]))] += draw.choice([-20, -3, -1, 1, 2, 3, 24])
        try:
            check(x, weight, size, changed)
        except ValueError:
            continue
        passed += 1
        width, features = form["channels"][0], form["features"]
        read = positions(
            changed, changed["reads"], [len(m[0]) for m in data], changed["stride"], changed["offset"]
        )
        assert all(at >= 0 and at + width <= x.numel() for at in read), changed
        rows = [len(m) for m in result]
        written = positions(changed, changed["writes"], rows, changed["out_stride"], 0)
        assert all(at >= 0 and at + features <= math.prod(size) for at in written), changed
    assert passed > 100


@pytest.mark.parametrize(
    ("name", "value", "match"),
    [
        ("offset", -1, r"it must read the positions 0 to 269 of its tensor, got -1 to"),
        ("offset", 10**6, r"it must read the positions 0 to 269"),
        ("stride", [135, 0, 0, 10], "`stride` must have a number for each dimension"),
        ("stride", [135, 0, 0, 10, 2], "the last, which must have a stride of 1"),
        ("stride", [2**62, 0, 0, 10, 1], "it must read the positions"),
        ("size", [2, 3, 2, 3, -5], "sizes must be 0 or more"),
        ("places", [1, 1], "must be different dimensions"),
        ("places", [1, 4], "must be different dimensions"),
        ("steps", [45, -50], "it must read the positions"),
        ("values", [1.0], "must be the finite entries"),
        ("values", [math.inf] * 10, "must be the finite entries"),
        ("columns", [2, 40], "must be the finite entries of matrices of 1 to 32"),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_transforms_outside_of_their_tensor_are_refused(name, value, match, dtype):
    with pytest.raises(ValueError, match=match):
        torch.ops.ollie.transform(X.to(dtype), **TRANSFORM | {name: value})


@pytest.mark.parametrize(
    ("name", "value", "match"),
    [
        ("offset", 10**6, "it must read the positions 0 to 279"),
        ("features", 64, "`weight` must be packed"),
        ("channels", [5], "`weight` must be packed"),
        ("channels", [0], "sizes must be 1 or more"),
        ("channel_stride", [2], "the last of which is 1"),
        ("tiles", [3, 3, 4], "it must read the positions"),
        ("out_stride", [240, 48, 6], "it must write the positions 0 to 239"),
        ("apart", 4, "3 tiles and 1 channels must have as many strides"),
        ("reads", [1, 2], "numbers of `reads` and `writes` each"),
        ("matrices", "[[[[1]]]]", "`matrices` must be those of the data and of the result as JSON"),
        ("matrices", "[" * 5000, "`matrices` must be those of the data and of the result as JSON"),
        ("matrices", "[[[[1, 2]]], [[[1, 2]]]]", "with a column for each row"),
        ("matrices", "[[[[Infinity]]], [[[1]]]]", "of finite values"),
    ],
)
def test_bilinear_forms_outside_of_their_tensors_are_refused(name, value, match):
    x, weight, size, form = bilinear()
    with pytest.raises(ValueError, match=match):
        torch.ops.ollie.bilinear(x, weight, size, **form | {name: value})


def test_weights_of_another_dtype_are_refused():
    x, weight, size, form = bilinear()
    with pytest.raises(ValueError, match=r"`weight` must be torch.float32 on cpu, got torch.float64"):
        torch.ops.ollie.bilinear(x, weight.double(), size, **form)


@pytest.mark.parametrize(
    ("place", "value", "match"),
    [
        (0, torch.randn(3, 3), "`x` must have 6 dimensions, got 2"),
        (1, [7], "`size` must be two numbers, 0 or more, got \\[7\\]"),
        (1, [7, -5], "`size` must be two numbers, 0 or more"),
        (2, [0, 1], "`stride` must be two numbers, 1 or more"),
        (3, [2**62, 0], "`offset` must be two numbers"),
        (4, [1, -(2**62)], "`step` must be two numbers"),
    ],
)
def test_selective_additions_of_other_numbers_are_refused(place, value, match):
    given = list(ADDITION)
    given[place] = value
    with pytest.raises(ValueError, match=match):
        torch.ops.ollie.selective_add(*given)


@pytest.mark.parametrize(
    ("call", "match"),
    [
        (lambda: library.banded_scores(torch.randn(2, 7, 4), torch.randn(1, 9, 4), 3, 2, -2), "alike"),
        (lambda: library.banded_scores(torch.randn(2, 7, 4), torch.randn(2, 9, 5), 3, 2, -2), "alike"),
        (lambda: library.banded_values(torch.randn(2, 7, 4), torch.randn(2, 9, 5), 0, -2), "`dilation`"),
        (lambda: torch.ops.ollie.product(torch.randn(2, 3), torch.randn(4, 5)), r"\[\[2, 3\], \[4, 5\]\]"),
        (lambda: torch.ops.ollie.product(torch.randn(2, 3), torch.randn(3, 5), torch.randn(2, 5)), "bias"),
    ],
)
def test_products_of_shapes_that_do_not_fit_are_refused(call, match):
    with pytest.raises(ValueError, match=match):
        call()
