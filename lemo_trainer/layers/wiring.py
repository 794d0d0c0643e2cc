"""How the layers of a model are wired: by the table of known architectures, or by a probe."""

from __future__ import annotations

from dataclasses import dataclass

from lemo_trainer.layers.probe import children, probe_layers
from lemo_trainer.model.architectures import ARCHITECTURES, REFUSED, Architecture, CausalLM


@dataclass(frozen=True)
class Wiring:
    """How a model's layers are wired.

    Args:
        architecture: the wiring of all layers that can leave tokens out.
        probed: whether a probe watched a layer to find it, because `ARCHITECTURES` does not list the model.
        dense_layers: for each layer that cannot leave tokens out, its index and the reason.
        dense_mlps: indices of the layers whose MLP works on all tokens because it is a mixture of experts.
    """

    architecture: Architecture
    probed: bool
    dense_layers: dict[int, str]
    dense_mlps: tuple[int, ...]

    def notes(self, patched_layers: tuple[int, ...]) -> list[str]:
        """Sentences about a probe and about the parts that stay dense, given the patched layers."""
        notes = ["their wiring was found by a probe"] if self.probed else []
        for reason in dict.fromkeys(self.dense_layers.values()):
            indices = ", ".join(str(index) for index, why in self.dense_layers.items() if why == reason)
            notes.append(f"layers {indices} stay dense ({reason})")
        if experts := [str(index) for index in self.dense_mlps if index in patched_layers]:
            notes.append(f"the MLP of layers {', '.join(experts)} works on all tokens (mixture of experts)")
        return notes


def find_wiring(parts: CausalLM) -> Wiring:
    """The wiring of the layers of `parts`, from the table of known architectures or from a probe.

    Raises:
        ValueError: a layer of a known architecture lacks a part, or no layer passed the probe.
    """
    model_type = parts.model.config.model_type
    if model_type in REFUSED:
        raise ValueError(f"LeMo cannot leave tokens of a {model_type} model out: {REFUSED[model_type]}.")
    known = ARCHITECTURES.get(model_type)
    dense_layers: dict[int, str] = {}
    if known is None:
        architecture, dense_layers = probe_layers(parts)
    else:
        architecture = known
        for layer in parts.layers:
            if missing := architecture.missing_from(layer):
                raise ValueError(
                    f"LeMo looked for {', '.join(missing)} in {type(layer).__name__} and found "
                    f"{children(layer)}; this version of transformers wires {model_type} differently."
                )
    dense_mlps = [
        index
        for index, layer in enumerate(parts.layers)
        if index not in dense_layers and architecture.has_dense_mlp(layer)
    ]
    return Wiring(architecture, known is None, dense_layers, tuple(dense_mlps))
