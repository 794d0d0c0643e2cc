"""Norms of a model that LeMo's kernel computes, recognised one by one when LeMo is applied."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from lemo_trainer.compat import has_forward_hooks, has_forward_pre_hooks, is_whole
from lemo_trainer.kernels import torch_norm
from lemo_trainer.kernels.norm import norm_rows
from lemo_trainer.model.architectures import Architecture


class RecognisedNorm:
    """A norm module of a model that `norm_rows` computes to the bit."""

    def __init__(self, module: nn.Module, eps: float, centred: bool) -> None:
        self.module, self.eps, self.centred = module, eps, centred

    @property
    def name(self) -> str:
        return type(self.module).__name__

    def fits(self, x: Tensor) -> bool:
        """Whether the kernel may compute `x`: its forward is not hooked or replaced, and dtypes agree."""
        module = self.module
        hooked = has_forward_hooks(module) or has_forward_pre_hooks(module)
        touched = hooked or "forward" in vars(module)
        weight: Any = module.weight
        plain = is_whole(weight) and weight.shape == x.shape[-1:] and weight.dtype == x.dtype
        return plain and not touched and not torch.is_autocast_enabled(x.device.type)

    def __call__(self, x_BSD: Tensor, rows: Tensor | None) -> Tensor:
        bias: Any = getattr(self.module, "bias", None)
        weight: Any = self.module.weight
        return norm_rows(x_BSD, rows, weight, bias, eps=self.eps, centred=self.centred)


def recognised_norms(architecture: Architecture, layer: nn.Module) -> dict[str, RecognisedNorm]:
    """The norms of a decoder layer that `norm_rows` computes, by name."""
    names = (
        architecture.before_attention,
        architecture.after_attention,
        architecture.before_mlp,
        architecture.after_mlp,
    )
    parts = {name: getattr(layer, name) for name in names if name}
    found = {name: recognise(part) for name, part in parts.items() if isinstance(part, nn.Module)}
    return {name: norm for name, norm in found.items() if norm is not None}


def recognise(module: nn.Module) -> RecognisedNorm | None:
    """`module` as a norm that `norm_rows` computes to the bit, tried on random numbers; None otherwise.

    Accepted are torch's LayerNorm, and classes of any library named RMSNorm with a weight and an epsilon.
    Rejected are Gemma's norm, which adds 1 to the weight, and in half precision norms that round at another
    step.
    """
    centred = type(module) is nn.LayerNorm
    weights = dict(module.named_parameters())
    eps = getattr(module, "variance_epsilon", getattr(module, "eps", None))
    known = centred or type(module).__name__.endswith("RMSNorm")
    if not known or not isinstance(eps, float) or list(weights) not in (["weight"], ["weight", "bias"]):
        return None
    if not all(map(is_whole, weights.values())) or weights["weight"].ndim != 1:
        return None
    norm = RecognisedNorm(module, eps, centred)
    generator = torch.Generator().manual_seed(0)
    x_MD = torch.randn(4, len(weights["weight"]), generator=generator).to(weights["weight"])
    if not norm.fits(x_MD):
        return None
    drawn = {name: torch.randn(len(w), generator=generator).to(w) for name, w in weights.items()}
    with torch.no_grad():
        wanted = torch.func.functional_call(module, drawn, (x_MD,))
        got, _, _ = torch_norm.forward(x_MD, None, drawn["weight"], drawn.get("bias"), eps, centred)
    return norm if torch.equal(got, wanted) else None
