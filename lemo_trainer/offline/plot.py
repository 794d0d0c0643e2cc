"""A picture of the result of a search of thresholds. Needs matplotlib, of the `bench` extra."""

from __future__ import annotations

import importlib.util
from pathlib import Path

from lemo_trainer.offline.thresholds import ThresholdSearch


def check_plot() -> None:
    """Raise ValueError if matplotlib is missing."""
    if importlib.util.find_spec("matplotlib") is None:
        raise ValueError("A plot needs matplotlib; install it with `pip install lemo-ripple-ollie[bench]`.")


def plot_kept_shares(found: ThresholdSearch, path: str | Path) -> None:
    """Draw the kept share by layer, and the points that were tried and not chosen, into a file."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator, PercentFormatter

    searched = {row.layer for row in found.layers}
    figure = Figure(figsize=(max(6.0, 0.28 * found.total_layers + 1), 3.6), layout="constrained")
    axes = figure.add_subplot()
    for label, color, layers in (
        ("searched", "tab:blue", searched),
        ("not searched", "lightgray", set(range(found.total_layers)) - searched),
    ):
        if layers:
            axes.bar(sorted(layers), [found.kept_shares[i] for i in sorted(layers)], color=color, label=label)
    others = [row for row in found.layers if not row.used]
    axes.plot(
        [row.layer for row in others],
        [row.kept_share for row in others],
        "_",
        color="black",
        label="tried, not chosen",
    )
    axes.set(xlabel="layer", ylabel="kept share of the tokens", ylim=(0, 1.03))
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.yaxis.set_major_formatter(PercentFormatter(1.0))
    axes.set_title(
        f"held-out loss {found.dense_loss:.3f} dense, {found.loss:.3f} with the thresholds", fontsize="medium"
    )
    figure.legend(loc="outside lower center", ncols=3, frameon=False)
    figure.savefig(path, dpi=150)
