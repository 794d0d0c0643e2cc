"""The distribution of uses over neurons in a trace, as a sidecar's header keeps it.

Dimension key: N neurons of an MLP, G groups of them.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

_GROUPS = 16

Counts = npt.NDArray[Any]
"""For how many tokens of a trace each neuron of an MLP is active, shape (N,)."""


def grouped_uses(uses_N: Counts) -> list[float]:
    """The uses of the most active sixteenth of an MLP's neurons, of the next, and so on: G numbers."""
    groups = np.array_split(-np.sort(-uses_N), min(_GROUPS, len(uses_N)))
    return [float(group.sum()) for group in groups]


def spread_uses(grouped_G: list[float], neurons: int) -> Counts:
    """The inverse of `grouped_uses`: each neuron of a group has the group's mean uses, most active first."""
    sizes = [len(group) for group in np.array_split(np.empty(neurons), len(grouped_G))]
    return np.repeat(np.divide(grouped_G, sizes), sizes)


def cache_shares(uses: list[Counts], slots: int) -> list[int]:
    """Divide cache slots over MLPs: each slot goes to the MLP of the next most used neuron.

    Args:
        uses: by MLP.
        slots: for all MLPs together; slots beyond the number of neurons stay free.
    """
    sizes = np.array([len(one) for one in uses])
    if slots >= sizes.sum():
        return sizes.tolist()
    pooled = np.concatenate(uses)
    chosen = np.argsort(-pooled, kind="stable")[:slots]
    return np.bincount(np.repeat(np.arange(len(uses)), sizes)[chosen], minlength=len(uses)).tolist()
