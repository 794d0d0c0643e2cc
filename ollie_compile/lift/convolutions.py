"""Lifting of convolutions and banded products."""

from __future__ import annotations

from collections.abc import Sequence

from ollie_compile.expr import Affine, Input, Loop, Read, Scope, Tensor, quotient, ranges_of, remainder


def convolution(
    input_shape: Sequence[int],
    weight_shape: Sequence[int],
    *,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int = 1,
) -> Scope:
    """O[n, f, h..] = Sum[c, r..] A[n, f // F * C + c, h * stride + r * dilation - padding ..] K[f, c, r..].

    Args:
        input_shape: [batch, channels, *spatial], one to three spatial dimensions.
        weight_shape: [out channels, channels / groups, *taps].

    Returns:
        the expression over inputs "A" and "K"; C and F are the channels and outputs of one group.
    """
    a, k = Input("A", tuple(input_shape)), Input("K", tuple(weight_shape))
    n, c = Loop("n", 0, a.shape[0]), Loop("c", 0, k.shape[1])
    f = Loop("f", 0, k.shape[0])
    spatial, taps, positions = [], [], []
    for place, (size, tap, s, p, d) in enumerate(
        zip(a.shape[2:], k.shape[2:], stride, padding, dilation, strict=True), start=1
    ):
        out = Loop(f"h{place}", 0, (size + 2 * p - d * (tap - 1) - 1) // s + 1)
        window = Loop(f"r{place}", 0, tap)
        spatial.append(out)
        taps.append(window)
        positions.append(_var(out) * s + _var(window) * d - p)
    ranges = {f.name: (f.low, f.high)}
    channel = quotient(_var(f), f.extent // groups, ranges) * c.extent + _var(c)
    return Scope(
        (n, f, *spatial),
        (c, *taps),
        (
            Read(a, (_var(n), channel, *positions)),
            Read(k, (_var(f), _var(c), *map(_var, taps))),
        ),
    )


def transposed_convolution(
    input_shape: Sequence[int],
    weight_shape: Sequence[int],
    *,
    stride: Sequence[int],
    padding: Sequence[int],
    output_padding: Sequence[int],
    dilation: Sequence[int] | None = None,
    groups: int = 1,
) -> Scope:
    """The sub-pixel form: with y' = y + padding and the taps of one phase r,
    O[n, f, y..] = Sum[c, r..] A[n, c, y' // stride - r ..] K[c, f, stride * r + y' % stride ..].

    Args:
        input_shape: [batch, channels, *spatial], one to three spatial dimensions.
        weight_shape: [channels, out channels / groups, *taps].
        dilation: None is 1. A dilated weight is read as one with zeros between its taps.

    Returns:
        the expression over inputs "A" and "K"; phases without a tap read outside K, which gives 0.
    """
    a, k = Input("A", tuple(input_shape)), Input("K", tuple(weight_shape))
    weight, sizes = _dilated(k, dilation or [1] * len(stride))
    n, f = Loop("n", 0, a.shape[0]), Loop("f", 0, k.shape[1] * groups)
    c = Loop("c", 0, k.shape[0] // groups)
    group = quotient(_var(f), k.shape[1], {f.name: (f.low, f.high)}) if groups > 1 else Affine()
    output = remainder(_var(f), k.shape[1], {f.name: (f.low, f.high)}) if groups > 1 else _var(f)
    channel = group * c.extent + _var(c)
    spatial, taps, positions, weights = [], [], [], []
    for place, (size, tap, s, p, extra) in enumerate(
        zip(a.shape[2:], sizes, stride, padding, output_padding, strict=True), start=1
    ):
        out = Loop(f"h{place}", 0, (size - 1) * s - 2 * p + tap + extra)
        window = Loop(f"r{place}", 0, -(-tap // s))
        spatial.append(out)
        taps.append(window)
        shifted = _var(out) + p
        ranges = {out.name: (out.low, out.high)}
        positions.append(quotient(shifted, s, ranges) - _var(window))
        weights.append(_var(window) * s + remainder(shifted, s, ranges))
    return Scope(
        (n, f, *spatial),
        (c, *taps),
        (
            Read(a, (_var(n), channel, *positions)),
            Read(weight, (channel, output, *weights)),
        ),
    )


def weight_gradient(
    input_shape: Sequence[int],
    gradient_shape: Sequence[int],
    taps: Sequence[int],
    *,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
) -> Scope:
    """The gradient of a convolution's weight, a convolution over the batch:
    O[f, c, r..] = Sum[n, h..] A[n, c, h * stride + r * dilation - padding ..] G[n, f, h..].

    Args:
        input_shape: [batch, channels, *spatial].
        gradient_shape: of the result's gradient, [batch, out channels, *spatial].
        taps: sizes of the window.

    Returns:
        the expression over inputs "A" and "G".
    """
    a, g = Input("A", tuple(input_shape)), Input("G", tuple(gradient_shape))
    f, c, n = Loop("f", 0, g.shape[1]), Loop("c", 0, a.shape[1]), Loop("n", 0, a.shape[0])
    places = range(1, len(taps) + 1)
    windows = [Loop(f"r{place}", 0, tap) for place, tap in zip(places, taps, strict=True)]
    outs = [Loop(f"h{place}", 0, size) for place, size in zip(places, g.shape[2:], strict=True)]
    positions = [
        _var(out) * s + _var(window) * d - p
        for out, window, s, p, d in zip(outs, windows, stride, padding, dilation, strict=True)
    ]
    return Scope(
        (f, c, *windows),
        (n, *outs),
        (Read(a, (_var(n), _var(c), *positions)), Read(g, (_var(n), _var(f), *map(_var, outs)))),
    )


def _dilated(k: Input, dilation: Sequence[int]) -> tuple[Tensor, list[int]]:
    """A weight with zeros between its taps, and its taps with those.

    Tap t is K at t // d where t % d is 0: elsewhere it reads outside a dimension of size 1.
    """
    sizes = [d * (tap - 1) + 1 for tap, d in zip(k.shape[2:], dilation, strict=True)]
    if max(dilation) == 1:
        return k, sizes
    lead = [Loop("c", 0, k.shape[0]), Loop("f", 0, k.shape[1])]
    whole = [Loop(f"t{place}", 0, tap) for place, tap in enumerate(k.shape[2:], start=1)]
    rest = [Loop(f"x{place}", 0, 1) for place in range(1, len(sizes) + 1)]
    loops = (*lead, *(loop for pair in zip(whole, rest, strict=True) for loop in pair))
    spread = Scope(loops, (), (Read(k, tuple(map(_var, (*lead, *whole)))),))
    stuffed = [Loop(f"t{place}", 0, size) for place, size in enumerate(sizes, start=1)]
    ranges = ranges_of((*lead, *stuffed))
    index = [
        part
        for loop, d in zip(stuffed, dilation, strict=True)
        for part in (
            (quotient(_var(loop), d, ranges), remainder(_var(loop), d, ranges))
            if d > 1
            else (_var(loop), Affine())
        )
    ]
    return Scope((*lead, *stuffed), (), (Read(spread, (*map(_var, lead), *index)),)), sizes


def banded_scores(batch: int, length: int, features: int, *, width: int, dilation: int = 1) -> Scope:
    """G2BMM: O[b, m, w] = Sum[k] A[b, m, k] * B[b, m + dilation * (w - width), k].

    Returns:
        [batch, length, 2 * width + 1] over inputs "A" and "B" of shape [batch, length, features].
    """
    a, b = (Input(name, (batch, length, features)) for name in "AB")
    n, m, k = Loop("b", 0, batch), Loop("m", 0, length), Loop("k", 0, features)
    w = Loop("w", 0, 2 * width + 1)
    key = _var(m) + (_var(w) - width) * dilation
    return Scope((n, m, w), (k,), (Read(a, (_var(n), _var(m), _var(k))), Read(b, (_var(n), key, _var(k)))))


def banded_values(batch: int, length: int, features: int, *, width: int, dilation: int = 1) -> Scope:
    """GBMM: O[b, m, k] = Sum[w] A[b, m, w] * B[b, m + dilation * (w - width), k].

    Returns:
        [batch, length, features] over "A" [batch, length, 2 * width + 1] and "B" [batch, length, features].
    """
    a, b = Input("A", (batch, length, 2 * width + 1)), Input("B", (batch, length, features))
    n, m, k = Loop("b", 0, batch), Loop("m", 0, length), Loop("k", 0, features)
    w = Loop("w", 0, 2 * width + 1)
    key = _var(m) + (_var(w) - width) * dilation
    return Scope((n, m, k), (w,), (Read(a, (_var(n), _var(m), _var(w))), Read(b, (_var(n), key, _var(k)))))


def _var(loop: Loop) -> Affine:
    return Affine.of(loop.name)
