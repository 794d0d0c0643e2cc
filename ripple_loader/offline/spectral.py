"""Order neurons by the Fiedler vector of their co-activation graph."""

from __future__ import annotations

import numpy as np
import torch

from ripple_loader.offline.coactivation import CoActivation, Indices

_LEAST_FOR_LOBPCG, _LOBPCG_ROUNDS = 6, 60


def spectral_order(graph: CoActivation, members: Indices) -> Indices:
    """Sort neurons by the second eigenvector of the normalised co-activation graph (the Fiedler vector).

    Neurons without partners come last, in the model's own order.
    """
    first, second = np.searchsorted(members, graph.first), np.searchsorted(members, graph.second)
    ends, count = np.concatenate([[first, second], [second, first]], axis=1), np.tile(graph.count, 2)
    degree = np.bincount(ends[0], weights=count, minlength=len(members))
    linked = np.flatnonzero(degree)
    if len(linked) < _LEAST_FOR_LOBPCG:
        return members
    number = np.searchsorted(linked, ends)
    scale = 1 / np.sqrt(degree[linked])
    weights = torch.from_numpy(count * scale[number[0]] * scale[number[1]])
    size = (len(linked), len(linked))
    normalised = torch.sparse_coo_tensor(
        torch.from_numpy(number), weights, size, device="cpu", check_invariants=True
    )
    start = np.stack([1 / scale, np.random.default_rng(0).standard_normal(len(linked))], axis=1)
    _, vectors = torch.lobpcg(normalised.coalesce(), X=torch.from_numpy(start), niter=_LOBPCG_ROUNDS)
    fiedler = vectors[:, 1].numpy() * scale
    alone = np.flatnonzero(degree == 0)
    return members[np.concatenate([linked[np.argsort(fiedler, kind="stable")], alone])]
