"""Which scheme of exact mode a batch runs by: the one that is predicted to need less memory.

Scheme "layers" keeps the hidden states between the layers, unless they go to host memory or disk, and one
layer's keys, values and activations of a segment. Scheme "segments" keeps keys, values and their gradients of
all layers, and all layers' activations of a segment; it makes no keys and values a second time, so that it is
taken where the two need about the same.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from lemo_trainer.config import Boundaries

ABOUT_EQUAL = 1.1


@dataclass(frozen=True)
class LayerBytes:
    """Bytes of one token in one layer.

    Args:
        hidden: its hidden state.
        heads: its keys and values.
        head_gradients: their gradients.
        activations: what the layer saves for its backward pass.
    """

    hidden: float
    heads: float
    head_gradients: float
    activations: float

    def of_layers(self, layers: int, tokens: int, segment: int, boundaries: Boundaries) -> float:
        """What scheme "layers" keeps at its peak for a batch of `tokens`, `segment` of which run together."""
        between = layers if boundaries == "memory" else 1
        one = self.heads + self.head_gradients + 2 * self.hidden  # the gradients of its output and input
        return tokens * (between * self.hidden + one) + segment * self.activations

    def of_segments(self, layers: int, tokens: int, segment: int) -> float:
        """The same for scheme "segments"."""
        ends = 3 * self.hidden  # the input of the first layer, the gradients of both ends
        return (
            tokens * (layers * (self.heads + self.head_gradients) + ends)
            + segment * layers * self.activations
        )

    def scheme(
        self, layers: int, tokens: int, segment: int, boundaries: Boundaries
    ) -> Literal["layers", "segments"]:
        """The scheme with the lower peak."""
        limit = ABOUT_EQUAL * self.of_layers(layers, tokens, segment, boundaries)
        return "segments" if self.of_segments(layers, tokens, segment) <= limit else "layers"
