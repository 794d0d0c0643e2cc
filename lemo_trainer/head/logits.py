"""All logits of a training step, made only if somebody reads them.

The segment-wise loss makes no logits. Metrics inside `compute_loss` (token accuracy, entropy) may still read
`outputs.logits`.

Shapes: B batch, S tokens, D hidden width, V vocabulary.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from lemo_trainer.model.architectures import CausalLM

logger = logging.getLogger(__name__)


class LogitsOnDemand:
    """Makes the logits [B, S, V] of a hidden state [B, S, D] when it is called, with the model's own head."""

    def __init__(self, parts: CausalLM, hidden_BSD: Tensor) -> None:
        self._parts, self._hidden_BSD = parts, hidden_BSD

    def __call__(self) -> Tensor:
        config = self._parts.model.config
        logits_BSV: Tensor = self._parts.head(self._hidden_BSD) * logit_scale(config)
        softcap = getattr(config, "final_logit_softcapping", None)
        return logits_BSV if softcap is None else softcap * torch.tanh(logits_BSV / softcap)

    def detached(self) -> LogitsOnDemand:
        return LogitsOnDemand(self._parts, self._hidden_BSD.detach())


def logit_scale(config: Any) -> float:
    """The factor between head and loss (Cohere's `logit_scale`, Granite's `logits_scaling`)."""
    scale: float = getattr(config, "logit_scale", 1.0) / getattr(config, "logits_scaling", 1.0)
    return scale


def with_logits_on_demand(output: Any, make: Callable[[], Tensor], told: list[bool]) -> Any:
    """`output` of a causal LM without logits; reading `output.logits` or `output["logits"]` makes them.

    Args:
        told: gets an entry when a warning told of their cost; only an empty one leads to a warning.
    """
    kind: Any = type(output)
    lazy = _lazy(kind)(**{**output, "logits": None})
    vars(lazy).update(_lemo_make=make, _lemo_told=told)
    return lazy


def logits_maker(output: Any) -> Callable[[], Tensor] | None:
    """What makes the logits of an output of `with_logits_on_demand`; None for any other."""
    make: Callable[[], Tensor] | None = vars(output).get("_lemo_make")
    return make


@functools.cache
def _lazy(kind: Any) -> Any:
    def read(self: Any) -> Tensor | None:
        made = vars(self)
        if made.get("_lemo_logits") is None and "_lemo_make" in made:
            logits = made["_lemo_logits"] = made["_lemo_make"]()
            if not made["_lemo_told"]:
                made["_lemo_told"].append(True)
                logger.warning(
                    "`outputs.logits` was read in a training pass: LeMo made all logits for it, %.3g MB in "
                    "this batch, which `loss_segment` otherwise avoids.",
                    logits.nbytes / 1e6,
                )
        logits = made.get("_lemo_logits")
        return logits

    def write(self: Any, value: Tensor | None) -> None:
        vars(self)["_lemo_logits"] = value

    def item(self: Any, key: Any) -> Any:
        return self.logits if key == "logits" else kind.__getitem__(self, key)

    namespace = {"logits": property(read, write), "__getitem__": item, "__module__": kind.__module__}
    return type(kind.__name__, (kind,), namespace)


class WithoutGradient(torch.autograd.Function):
    """Logits whose gradient was computed already; asking for another one is an error."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, loss: Tensor) -> Tensor:
        return logits.view_as(logits)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        raise ValueError(
            'mode="segments" computes its gradients while the model makes its loss, so that `outputs.logits` '
            'can serve metrics, but no loss; use mode="exact", or read them under torch.no_grad().'
        )
