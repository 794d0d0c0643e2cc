"""The exact ways to run a step, and what each costs: counted parts added up.

Every way gives the gradient of all tokens. They differ in what waits for the backward pass, and in what is
computed a second time for it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from lemo_trainer.config import Boundaries
from lemo_trainer.exact.counting import KindCost, LayerCost, StepParts, Work

WayScheme = Literal["plain", "layers", "segments"]


@dataclass(frozen=True, kw_only=True)
class Way:
    """How the layers of a model run.

    Args:
        scheme: "plain": as the model runs them. "layers" and "segments": the walks of exact mode.
        segment_tokens: of a walk; 0 runs the whole sample at a time, which under "layers" is gradient
            checkpointing.
        boundaries: where scheme "layers" keeps the inputs of the layers.
        selective: recompute elementwise results instead of saving them (plain and segments).
    """

    scheme: WayScheme
    segment_tokens: int = 0
    boundaries: Boundaries = "memory"
    selective: bool = False

    def __str__(self) -> str:
        if self.scheme == "plain":
            return "plain, selective" if self.selective else "plain"
        where = "" if self.boundaries == "memory" else f", boundaries on {self.boundaries}"
        if not self.segment_tokens:
            return f"checkpointing{where}"
        again = ", selective" if self.selective else ""
        return f"exact by {self.scheme} of {self.segment_tokens}{where}{again}"


@dataclass(frozen=True)
class Detached:
    """Not exact: `mode="detach"` with this share of the tokens."""

    keep_ratio: float

    def __str__(self) -> str:
        return f"detach with {self.keep_ratio:.0%} of the tokens"


@dataclass(frozen=True)
class WayCost:
    """What a step costs.

    Args:
        way: how it runs.
        saved: bytes of memory that wait for the backward pass.
        phases: the most bytes of activations at one time in the layers, in head and loss, and at the end.
        stored: bytes that wait outside of the device's memory (`boundaries`).
        seconds: predicted by fixed speeds; only ratios between ways mean something.
        flops: operations of matrix products.
    """

    way: Way | Detached
    saved: float
    phases: tuple[float, float, float]
    stored: float
    seconds: float
    flops: float

    @property
    def peak(self) -> float:
        """The most bytes of activations at one time."""
        return max(self.phases)


@dataclass(frozen=True)
class Speeds:
    """How fast a device is; from measurements, fixed so that a choice is the same every time.

    Args:
        flops: operations of matrix products in a second.
        bytes: bytes of results that elementwise operators write in a second.
        call: seconds of an operator's call.
        stored: bytes in a second to host memory or disk, by `boundaries`.
    """

    flops: float
    bytes: float
    call: float
    stored: dict[str, float]


CPU = Speeds(flops=9e10, bytes=2e9, call=1e-5, stored={"memory": float("inf"), "host": 1e10, "disk": 1e9})
CUDA = Speeds(flops=2e14, bytes=1e12, call=1e-5, stored={"memory": float("inf"), "host": 1e10, "disk": 1e9})


def ways_of(seq_len: int, sizes: Sequence[int], uncut: bool, on_cuda: bool) -> list[Way]:
    """All ways for samples of `seq_len` tokens.

    Args:
        sizes: `segment_tokens` of the walks; those of `seq_len` and more have one segment.
        uncut: some layers cannot run in segments, which excludes scheme "segments".
        on_cuda: the model is on a GPU, so that host memory is another place.
    """
    places: tuple[Boundaries, ...] = ("memory", "host", "disk") if on_cuda else ("memory", "disk")
    ways = [Way(scheme="plain"), Way(scheme="plain", selective=True)]
    for size in (0, *sizes):
        if size < seq_len:
            ways += [Way(scheme="layers", segment_tokens=size, boundaries=place) for place in places]
    for size in () if uncut else sizes:
        if size < seq_len:
            ways += [Way(scheme="segments", segment_tokens=size, selective=each) for each in (False, True)]
    return ways


def cost_of(way: Way, parts: StepParts, speeds: Speeds = CPU) -> WayCost:
    """What a step of `parts` costs by `way`."""
    cost = {"plain": _plain, "layers": _layers, "segments": _segments}[way.scheme]
    return _with_head(way, parts, speeds, *cost(way, parts))


def detached_cost(way: Detached, parts: StepParts, speeds: Speeds = CPU) -> WayCost:
    """About what a step costs in which a share of the tokens carries gradient, in all layers but two."""
    saved, _, _, work = _plain(Way(scheme="plain", selective=True), parts)
    transient = max(kind.selective.peak for kind in parts.kinds)
    layers = sum(kind.count for kind in parts.kinds)
    left_out = (1 - way.keep_ratio) * max(0, layers - 2) / layers
    constants = left_out * sum((kind.heads + kind.hidden) * kind.count for kind in parts.kinds)
    backward = _sum([kind.selective.backward * kind.count for kind in parts.kinds])
    saved = saved * (1 - left_out) + constants
    return _with_head(way, parts, speeds, saved, saved + transient, 0.0, work + backward * -left_out)


def _with_head(
    way: Way | Detached,
    parts: StepParts,
    speeds: Speeds,
    saved: float,
    peak: float,
    stored: float,
    work: Work,
) -> WayCost:
    head = parts.head
    work = work + head.work
    seconds = work.flops / speeds.flops + work.bytes / speeds.bytes + work.calls * speeds.call
    seconds += 2 * stored / speeds.stored[getattr(way, "boundaries", "memory")]
    return WayCost(
        way,
        head.saved + saved,
        (head.saved + peak, head.peak + saved, head.end_peak),
        stored,
        seconds,
        work.flops,
    )


_Cost = tuple[float, float, float, Work]


def _plain(way: Way, parts: StepParts) -> _Cost:
    runs = [(kind.selective if way.selective else kind.plain, kind.count) for kind in parts.kinds]
    saved = sum(run.saved * count for run, count in runs)
    output = parts.kinds[0].hidden  # freed before its layer's backward pass
    peak = max(saved - run.saved + run.peak - output for run, _ in runs)
    return saved, peak, 0.0, _sum([(run.forward + run.backward) * count for run, count in runs])


def _layers(way: Way, parts: StepParts) -> _Cost:
    """Boundaries of all layers, and the gradients of one layer's ends; then one layer's walk."""
    layers = sum(kind.count for kind in parts.kinds)
    hidden = parts.kinds[0].hidden
    elsewhere = way.boundaries != "memory"
    stored = layers * hidden if elsewhere else 0.0
    kept = 0.0 if elsewhere else layers * hidden  # beside one, which the head counts
    walks = [_walk_of(kind, way, parts) for kind in parts.kinds]
    peak = max(peak for peak, _ in walks) + kept
    return (
        kept,
        peak,
        stored,
        _sum([work * kind.count for kind, (_, work) in zip(parts.kinds, walks, strict=True)]),
    )


def _walk_of(kind: KindCost, way: Way, parts: StepParts) -> tuple[float, Work]:
    """Peak and work of one layer's walk over the sample, without what waits for other layers."""
    segment = kind.segments.get((False, way.segment_tokens))
    if segment is None:
        return kind.plain.peak + kind.hidden + kind.sums, kind.plain.forward * 2 + kind.plain.backward
    size, count = way.segment_tokens, parts.seq_len / way.segment_tokens
    gradient = kind.hidden * size / parts.seq_len  # of the segment's output: a part of the whole one
    peak = segment.last.peak - gradient + 2 * kind.hidden + kind.heads + kind.sums
    fill = segment.fill * (parts.seq_len - size)
    mean = _mean(segment.first, segment.last)
    return peak, fill + (mean.forward * 2 + mean.backward) * count


def _segments(way: Way, parts: StepParts) -> _Cost:
    runs = [(kind.segments[way.selective, way.segment_tokens], kind) for kind in parts.kinds]
    hidden = parts.kinds[0].hidden
    heads = sum(kind.heads * kind.count for kind in parts.kinds)
    wide = sum(_head_gradients(kind) * kind.count for run, kind in runs)
    saved = sum(run.last.saved * kind.count for run, kind in runs)
    transient = max(run.last.peak - run.last.saved - _head_gradients(kind) for run, kind in runs)
    sums = sum(kind.sums * kind.count for kind in parts.kinds)
    peak = heads + wide + saved + transient + sums + 2 * hidden
    count = parts.seq_len / way.segment_tokens
    means = [(_mean(run.first, run.last), kind.count) for run, kind in runs]
    work = _sum([(mean.forward * 2 + mean.backward) * (count * layers) for mean, layers in means])
    return heads + hidden, peak, 0.0, work


def _head_gradients(kind: KindCost) -> float:
    """Bytes of the gradients of keys and values, in float32 at least."""
    return kind.heads * max(1.0, 4 / kind.item)


def _mean(first: LayerCost, last: LayerCost) -> LayerCost:
    """The mean segment of a sample: attention's work grows evenly from the first to the last."""
    return LayerCost(
        (first.saved + last.saved) / 2,
        max(first.peak, last.peak),
        (first.forward + last.forward) * 0.5,
        (first.backward + last.backward) * 0.5,
    )


def _sum(works: Sequence[Work]) -> Work:
    total = Work()
    for work in works:
        total = total + work
    return total
