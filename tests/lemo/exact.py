"""What the tests of exact mode share."""

from __future__ import annotations

import dataclasses

from lemo_trainer import LemoConfig

LAYERS = LemoConfig(mode="exact", scheme="layers", segment_tokens=16, loss_segment=16)
SEGMENTS = dataclasses.replace(LAYERS, scheme="segments")
SCHEMES = {"layers": LAYERS, "segments": SEGMENTS}


def relative_error(got, wanted):
    """The largest over all gradients; `got` and `wanted` are losses with gradients by name.

    Gradients that are 0 but for rounding (of biases that softmax does not see) count by the largest one.
    """
    assert got[1].keys() == wanted[1].keys()
    largest = max(grad.norm() for grad in wanted[1].values())
    errors = [
        (got[1][name] - grad).norm() / max(grad.norm(), 1e-2 * largest) for name, grad in wanted[1].items()
    ]
    return max([abs(got[0] / wanted[0] - 1), *errors])
