"""The linears of a streamed MLP as wrappers such as PEFT see them: names and sizes without weights.

Import this file only when a model is loaded, because transformers' `Conv1D` brings in Dynamo.
"""

from __future__ import annotations

import warnings
import weakref
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from transformers.pytorch_utils import Conv1D

from ripple_loader.model.architectures import Projection
from ripple_loader.model.lowrank import dense


class WeightStore(Protocol):
    """Hands out the weights of streamed MLPs for saving, in the order of the directory's weight files."""

    def stored(self, layer: int) -> dict[tuple[str, str], Tensor]:
        """The weights of an MLP by linear and "weight" or "bias"; they are mapped, not in memory."""

    def permutation(self, layer: int) -> Tensor:
        """The model's own index of the neuron at each place, int64, shape (N,)."""

    def file_order(self, layer: int) -> Tensor:
        """The model's own index of the neuron at each place in the weight files, int64, shape (N,)."""

    def is_own(self, base: str) -> bool:
        """Whether an adapter's base holds the weight files that are streamed, in their order of neurons."""


class StreamedWeight(Tensor):
    """Has the shape, dtype and device of a weight that is on disk; computing with it is refused."""

    reason: str

    @staticmethod
    def __new__(cls, reason: str, shape: torch.Size, like: Tensor) -> StreamedWeight:
        weight: StreamedWeight = Tensor._make_wrapper_subclass(
            cls, shape, dtype=like.dtype, device=like.device
        )
        weight.reason = reason
        return weight

    def __init__(self, *_: Any) -> None:
        pass

    def __repr__(self, **_: Any) -> str:
        return f"StreamedWeight({tuple(self.shape)}, dtype={self.dtype})"

    @classmethod
    def __torch_dispatch__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        reasons = [one.reason for one in args if isinstance(one, StreamedWeight)]
        raise ValueError(reasons[0] if reasons else "the weights of a streamed MLP are not in memory.")


class Streamed(nn.Module):
    """A linear whose weights stay on disk; the MLP that it belongs to computes its product.

    Args:
        store: hands out its weights for saving.
        layer: which MLP it belongs to.
        projections: the parts of the MLP that it holds: two where gate and up are one linear.
        original: the linear that it replaces.
        inside: whether it is a module of its MLP; if not, the layer itself calls it.
        is_down: whether neurons are its inputs.

    Attributes:
        model: the whole model, once it is loaded; a copy does not know it.
    """

    in_features: int
    out_features: int
    model: weakref.ref[nn.Module] | None = None

    def __init__(
        self,
        store: WeightStore,
        layer: int,
        projections: list[Projection],
        original: nn.Module,
        *,
        inside: bool,
        is_down: bool,
    ) -> None:
        nn.Module.__init__(self)
        self.is_down = is_down
        self.store, self.layer, self.projections, self.inside = store, layer, projections, inside
        weight = original.weight
        self.shape = weight.shape
        axis = projections[0].neuron_axis
        self.neuron_axis, self.bias, self.loaded = axis, None, False
        # Follows the model to other devices and dtypes, which adapters are made for.
        self.register_buffer("_like", torch.empty(0, dtype=weight.dtype, device=weight.device), False)
        self._is_hf_initialized = True  # transformers would initialise a linear

    @property
    def name(self) -> str:
        return self.projections[0].linear

    @property
    def weight(self) -> StreamedWeight:
        """The shape, dtype and device of the weight that is on disk."""
        reason = (
            f"the weights of {self.name} of MLP {self.layer} are streamed by Ripple and must not be computed "
            "with or changed: load the model without `quantization_config` for that."
        )
        return StreamedWeight(reason, self.shape, self._like)

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"model": None}

    def is_of_copy(self, adapter: str) -> bool:
        """Whether an adapter was made for the streamed directory, so that it has the order of its neurons."""
        model = self.model() if self.model is not None else None
        config = getattr(model, "peft_config", {}).get(adapter)
        base = getattr(config, "base_model_name_or_path", None)
        return base is not None and self.store.is_own(base)

    def in_original_order(self, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
        """An adapter's product whose neurons are in the order of the weight files, in the original's."""
        places = self.store.permutation(self.layer).to(a.device).argsort()
        if self.is_down:
            return a[:, places], b
        return a, b.unflatten(0, (-1, len(places)))[:, places].flatten(0, 1)

    def register_forward_hook(self, *arguments: Any, **options: Any) -> RemovableHandle:
        """As of any module, with a warning: the product is computed elsewhere."""
        self._warn_of_hooks()
        return super().register_forward_hook(*arguments, **options)

    def register_forward_pre_hook(self, *arguments: Any, **options: Any) -> RemovableHandle:
        """As of any module, with a warning: the product is computed elsewhere."""
        self._warn_of_hooks()
        return super().register_forward_pre_hook(*arguments, **options)

    def _warn_of_hooks(self) -> None:
        warnings.warn(
            f"hooks of {self.name} do not see its product, because Ripple computes its MLP neuron by neuron: "
            "hook the MLP instead.",
            stacklevel=3,
        )

    def merge(self, name: str, a: Tensor, b: Tensor) -> None:
        """Keep an adapter's product in this linear: a (r, inputs), b (outputs, r) with its scale."""
        for part, tensor in (("a", a), ("b", b)):
            self.register_buffer(f"_merged_{part}_{name}", tensor.detach().clone(), persistent=False)

    def unmerge(self, name: str) -> None:
        """Forget a merged adapter."""
        del self._buffers[f"_merged_a_{name}"], self._buffers[f"_merged_b_{name}"]

    def merged_pairs(self) -> list[tuple[Tensor, Tensor]]:
        """The products that were merged: a and b of each."""
        names = [name.removeprefix("_merged_a_") for name in self._buffers if name.startswith("_merged_a_")]
        return [(getattr(self, f"_merged_a_{name}"), getattr(self, f"_merged_b_{name}")) for name in names]

    def forward(self, x: Tensor) -> Tensor:
        """Hands the input on where the layer itself calls the MLP's linears one after the other."""
        if self.inside:
            raise ValueError(f"{self.name} must be called through its MLP, which Ripple streams.")
        return x

    def extra_repr(self) -> str:
        return f"shape={tuple(self.shape)}, dtype={self._like.dtype}"

    def _tensors(self) -> dict[str, Tensor]:
        """The weight and the bias in the model's dtype, with what was merged."""
        stored = self.store.stored(self.layer)
        tensors = {
            kind: stored[self.name, kind] for kind in ("weight", "bias") if (self.name, kind) in stored
        }
        for a, b in self.merged_pairs():
            tensors["weight"] = (tensors["weight"] + self._in_file_order(dense(a, b))).to(
                tensors["weight"].dtype
            )
        return {kind: tensor.to(self._like.dtype) for kind, tensor in tensors.items()}

    def _in_file_order(self, weight: Tensor) -> Tensor:
        """A weight (outputs, inputs) in the model's order of neurons, as the weight file has it."""
        weight = weight.T if isinstance(self, Conv1D) else weight
        places = self.store.file_order(self.layer)
        if len(self.projections) > 1:
            places = torch.cat([places, places + len(places)])
        return weight.index_select(self.neuron_axis, places)

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        if self.loaded:
            destination.update({prefix + kind: tensor for kind, tensor in self._tensors().items()})

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *arguments: Any) -> None:
        *_, errors = arguments
        given = {
            kind: state_dict[prefix + kind] for kind in ("weight", "bias") if prefix + kind in state_dict
        }
        refuse_others(given, self._tensors() if given else {}, prefix, errors)


class StreamedLinear(Streamed, nn.Linear):
    """A streamed `nn.Linear`."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        Streamed.__init__(self, *arguments, **options)
        self.out_features, self.in_features = self.shape


class StreamedConv1D(Streamed, Conv1D):
    """A streamed `Conv1D`, whose weight is (inputs, outputs)."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        Streamed.__init__(self, *arguments, **options)
        self.nx, self.nf = self.shape

    def __repr__(self) -> str:
        return nn.Module.__repr__(self)


def refuse_others(given: dict[str, Tensor], own: dict[str, Tensor], prefix: str, errors: list[str]) -> None:
    """Note an error for every given tensor that is not the streamed one of the same name."""
    for name, tensor in given.items():
        if name not in own or not torch.equal(own[name].to(tensor), tensor):
            errors.append(
                f"{prefix}{name} must be the weight that Ripple streams, but differs: reorder a model with "
                "the new weights and load that."
            )


def streamed_linear(original: nn.Module, *arguments: Any, **options: Any) -> Streamed:
    """The streamed linear that replaces `original`."""
    kind = StreamedConv1D if isinstance(original, Conv1D) else StreamedLinear
    return kind(*arguments, original, **options)
