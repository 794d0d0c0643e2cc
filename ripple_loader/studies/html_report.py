"""`ripple report`: one self-contained page of plots about a model's trace, its order, its cache and a drive.

Needs matplotlib and jinja2, which come with the `bench` extra.

Dimension key: T tokens, N neurons, C cells of a heat map.
"""

from __future__ import annotations

import base64
import io
import itertools
from collections.abc import Callable
from dataclasses import replace
from importlib import resources
from typing import Any

import numpy as np
import numpy.typing as npt

from ripple_loader.offline.active_sets import BitSets, unpack
from ripple_loader.offline.placement import Placed
from ripple_loader.registry import CACHE_POLICIES
from ripple_loader.storage.devices import Device
from ripple_loader.storage.drive import DriveProfile
from ripple_loader.studies.simulation import (
    CONTENDERS,
    RIPPLE,
    Replay,
    Workload,
    place_contenders,
    replay,
    replay_contenders,
    summarise,
)

Array = npt.NDArray[Any]
CELLS = 192
CACHE_SHARES = (0.02, 0.05, 0.1, 0.2, 0.3, 0.5)
_COLOURS = ("#4477aa", "#ee6677", "#228833", "#ccbb44", "#66ccee", "#aa3377")
_KIB = 2**10


def check_requirements() -> None:
    """ValueError if the libraries that draw the page are missing."""
    try:
        import jinja2  # noqa: F401
        import matplotlib  # noqa: F401
    except ImportError as error:
        raise ValueError(
            f"`ripple report` needs matplotlib and jinja2, but {error.name} is missing: "
            "pip install 'lemo-ripple-ollie[bench]'."
        ) from None


def make_report(
    title: str,
    workload: Workload,
    device: Device,
    *,
    cache_share: float,
    layer: int,
    probe: DriveProfile | None = None,
) -> str:
    """The page, as HTML.

    Args:
        title: name of the traced model.
        workload: its activity.
        device: the drive that reads are collapsed and priced for.
        cache_share: memory for neurons, as a share of all of them.
        layer: the MLP that the heat maps show.
        probe: of a drive at hand, to show how its costs were fitted.

    Raises:
        ValueError: a library is missing, or there is no such layer.
    """
    check_requirements()
    import jinja2

    if not 0 <= layer < len(workload.replayed):
        raise ValueError(f"`layer` must be from 0 to {len(workload.replayed) - 1}, got {layer}.")
    placed = place_contenders(workload)
    replays = replay_contenders(workload, placed, device, cache_share=cache_share)
    rows = {name: summarise(one, workload.tokens, device.model) for name, one in replays.items()}
    plots = [
        ("Co-activation before and after", _draw(_heat_maps, workload, placed["linked"][layer], layer)),
        ("Length of reads", _draw(_read_lengths, replays)),
        ("Reads and bytes a token and layer", _draw(_reads_and_bytes, replays)),
        ("Cache curve", _draw(_cache_curve, workload, placed["linked"], device)),
    ]
    if probe is not None:
        plots.append(("What reads cost on the probed drive", _draw(_cost_fit, probe)))
    template = resources.files(__package__).joinpath("report.html.j2").read_text("utf-8")
    page = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined).from_string(template)
    return page.render(
        title=title,
        device=device,
        cache_share=cache_share,
        workload=workload,
        rows=rows,
        columns=list(next(iter(rows.values()))),
        plots=plots,
        probe=probe,
    )


def coactivation_map(sets: BitSets, order: Array, cells: int = CELLS) -> Array:
    """How often neurons are active together, averaged over squares of neighbours: float64, shape (C, C).

    Each cell is the mean count of its pairs relative to that of independent neurons with these frequencies,
    so that 1 means no correlation; cells without activity are 0.

    Args:
        sets: active sets.
        order: the neuron at each place, shape (N,).
        cells: most cells along a side.
    """
    groups = np.array_split(np.arange(len(order)), min(cells, len(order)))
    starts = np.array([group[0] for group in groups])
    active_TC = np.add.reduceat(unpack(sets, len(order))[:, order].astype(np.float64), starts, axis=1)
    together = active_TC.T @ active_TC / len(sets)
    expected = np.outer(active_TC.mean(0), active_TC.mean(0))
    return np.divide(together, expected, out=np.zeros_like(together), where=expected > 0)


def _draw(plot: Callable[..., None], *arguments: Any) -> str:
    """A figure as a data URI."""
    from matplotlib.figure import Figure

    figure, buffer = Figure(figsize=(9.0, 3.8), layout="constrained"), io.BytesIO()
    plot(figure, *arguments)
    figure.savefig(buffer, format="png", dpi=110)
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()


def _axes(figure: Any, count: int) -> list[Any]:
    axes = figure.subplots(1, count, squeeze=False)[0]
    for one in axes:
        one.spines[["top", "right"]].set_visible(False)
    return list(axes)


def _heat_maps(figure: Any, workload: Workload, placed: Placed, layer: int) -> None:
    sets = workload.replayed[layer]
    maps = {
        "the model's order": coactivation_map(sets, np.arange(workload.neurons)),
        "linked order": coactivation_map(sets, placed.order),
    }
    brightest = max(2.0, *(float(np.quantile(one, 0.99)) for one in maps.values()))
    axes = _axes(figure, 2)
    for one, (name, values) in zip(axes, maps.items(), strict=True):
        image = one.imshow(values, vmin=0, vmax=brightest, cmap="magma", interpolation="nearest")
        one.set_title(f"MLP {layer}, {name}", fontsize=10)
        one.set(xticks=[], yticks=[])
    figure.colorbar(image, ax=axes, label="times as often as by chance", shrink=0.9)


def _read_lengths(figure: Any, replays: dict[str, Replay]) -> None:
    (axes,) = _axes(figure, 1)
    shown = {name: replayed for name, replayed in replays.items() if not CONTENDERS[name].dense}
    longest = max((float(replayed.lengths.max(initial=4096)) for replayed in shown.values()), default=4096.0)
    bins = np.geomspace(512, 2 * longest, 28) / _KIB
    for colour, (name, replayed) in zip(_COLOURS, shown.items(), strict=False):
        weights = np.full(len(replayed.lengths), 1 / max(1, len(replayed.token)))
        axes.hist(
            replayed.lengths / _KIB, bins, weights=weights, histtype="step", color=colour, label=name, lw=1.5
        )
    axes.set_xscale("log", base=2)
    axes.set(xlabel="KiB a read", ylabel="reads a token and layer")
    axes.legend(frameon=False, fontsize=9)


def _reads_and_bytes(figure: Any, replays: dict[str, Replay]) -> None:
    steps = {name: max(1, len(replayed.token)) for name, replayed in replays.items()}
    shown = {
        "reads": {name: len(replayed.lengths) / steps[name] for name, replayed in replays.items()},
        "KiB": {
            name: float(replayed.lengths.sum()) / steps[name] / _KIB for name, replayed in replays.items()
        },
    }
    for axes, (what, values) in zip(_axes(figure, 2), shown.items(), strict=True):
        names = list(values)[::-1]
        bars = axes.barh(names, [values[name] for name in names], color=_COLOURS[0], height=0.65)
        axes.bar_label(bars, fmt="%.4g", padding=3, fontsize=9)
        axes.set_title(f"{what} a token and layer", fontsize=10, loc="left")
        axes.margins(x=0.18)


def _cache_curve(figure: Any, workload: Workload, placed: list[Placed], device: Device) -> None:
    hits_axes, time_axes = _axes(figure, 2)
    for colour, policy in zip(itertools.cycle(_COLOURS), CACHE_POLICIES, strict=False):
        contender = replace(RIPPLE, cache_policy=policy)
        replayed = [
            replay(
                workload,
                contender,
                placed,
                device.model,
                cache_bytes=int(share * workload.weight_bytes),
                block=device.block,
            )
            for share in CACHE_SHARES
        ]
        percent = [100 * share for share in CACHE_SHARES]
        hits = [100 * one.hits / max(1, one.active) for one in replayed]
        time = [summarise(one, workload.tokens, device.model)["ms_per_token"] for one in replayed]
        hits_axes.plot(percent, hits, "o-", color=colour, label=policy)
        time_axes.plot(percent, time, "o-", color=colour, label=policy)
    hits_axes.set(xlabel="cache, % of the MLPs", ylabel="hits, % of the active neurons", ylim=(0, None))
    time_axes.set(
        xlabel="cache, % of the MLPs", ylabel=f"ms of reading a token, {device.name}", ylim=(0, None)
    )
    hits_axes.legend(frameon=False, fontsize=9)


def _cost_fit(figure: Any, probe: DriveProfile) -> None:
    (axes,) = _axes(figure, 1)
    for number, depth in enumerate(probe.depths):
        colour = _COLOURS[number % len(_COLOURS)]
        timed = sorted((m for m in probe.measurements if m.depth == depth), key=lambda m: m.size)
        size = np.array([m.size for m in timed])
        measured = np.array([m.size * m.requests / m.seconds for m in timed])
        requests = np.array([m.requests for m in timed])
        fitted = requests * size / probe.at(depth).seconds(requests, requests * size)
        axes.plot(size / _KIB, measured / 1e6, "o", color=colour, label=f"{depth} in flight")
        axes.plot(size / _KIB, fitted / 1e6, "-", color=colour, lw=1)
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.set(xlabel="KiB a read", ylabel="MB/s (dots: measured, lines: fitted)")
    axes.legend(frameon=False, fontsize=9)
