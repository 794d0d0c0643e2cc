"""All logits of a training step, made only if somebody reads them.

The segment-wise loss makes no logits. Metrics inside `compute_loss` (token accuracy, entropy) may still read
`outputs.logits`, by any name or index of the output.

Shapes: B batch, S tokens, D hidden width, V vocabulary.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from lemo_trainer.sizes import size_text

logger = logging.getLogger(__name__)


class LogitsOnDemand:
    """Stands for the logits [B, S, V] of a training pass in its output; a call makes them.

    It has the `dtype` and `float()` of a tensor, by which accelerate casts outputs.

    Args:
        make: makes the logits of `inputs`.
        inputs: tensors [B, S, D].
        dtype: of the logits.
        told: gets an entry when a warning told of their cost; only an empty one leads to a warning.
    """

    def __init__(
        self, make: Callable[..., Tensor], *inputs: Tensor, dtype: torch.dtype, told: list[bool]
    ) -> None:
        self.dtype = dtype
        self._make, self._inputs, self._told = make, inputs, told
        self._with_graph = torch.is_grad_enabled()
        self._made: Tensor | None = None

    def __call__(self) -> Tensor:
        if self._made is None:
            with torch.set_grad_enabled(self._with_graph):  # the reader may be a metric under no_grad
                self._made = self._make(*self._inputs).to(self.dtype)
            self._tell(self._made)
        return self._made

    def float(self) -> LogitsOnDemand:
        return LogitsOnDemand(self, dtype=torch.float32, told=self._told)

    def detached(self) -> LogitsOnDemand:
        """The same without graph, and without the warning."""
        inputs = (each.detach() for each in self._inputs)
        return LogitsOnDemand(self._make, *inputs, dtype=self.dtype, told=[True])

    def _tell(self, logits: Tensor) -> None:
        if not self._told:
            self._told.append(True)
            logger.warning(
                "A training pass was asked for its logits (`outputs.logits`, return_dict=False): LeMo made "
                "all logits for it, %s in this batch, which `loss_segment` otherwise avoids.",
                size_text(logits.nbytes),
            )

    def __getattr__(self, name: str) -> Any:
        raise AttributeError(
            f"Logits of a training pass under LeMo have no {name!r} before they are made: read "
            "`outputs.logits`, or call what `outputs.values()` and `outputs.items()` hold in their place."
        )


class LogitsOfHead:
    """Makes the logits [B, S, V] of a hidden state, as the model's head would have in the forward pass.

    Args:
        model: the causal LM.
        head: its output head.
        autocast: the dtype of the autocast of the forward pass; None without autocast.
    """

    def __init__(self, model: Any, head: Any, autocast: torch.dtype | None) -> None:
        self._config, self._head, self._autocast = model.config, head, autocast
        self._sample = _sample(head.weight)

    def __call__(self, hidden_BSD: Tensor) -> Tensor:
        if not torch.equal(_sample(self._head.weight), self._sample):
            raise RuntimeError(
                "The logits of a training pass under LeMo must be read before the output head changes (by an "
                "optimizer step?): they are made when `outputs.logits` is read."
            )
        softcap = getattr(self._config, "final_logit_softcapping", None)
        device, dtype = hidden_BSD.device.type, self._autocast
        with torch.autocast(device, dtype=dtype, enabled=dtype is not None, cache_enabled=False):
            logits_BSV: Tensor = self._head(hidden_BSD) * logit_scale(self._config)
            return logits_BSV if softcap is None else softcap * torch.tanh(logits_BSV / softcap)


def _sample(weight_VD: Tensor) -> Tensor:
    """Some numbers of a weight, which tell whether it changed: fused optimizers count no version of it."""
    rows, columns = (-(-size // 16) for size in weight_VD.shape)
    return weight_VD.detach()[::rows, ::columns].clone()


def logit_scale(config: Any) -> float:
    """The factor between head and loss (Cohere's `logit_scale`, Granite's `logits_scaling`)."""
    scale: float = getattr(config, "logit_scale", 1.0) / getattr(config, "logits_scaling", 1.0)
    return scale


def with_logits_on_demand(output: Any, logits: LogitsOnDemand) -> Any:
    """`output` of a causal LM, in which reading the logits by name, index or slice makes them.

    `values()`, `items()` and pytrees hold `logits` itself, so that what only passes an output on (DDP, FSDP,
    accelerate) makes none.
    """
    output["logits"] = logits
    if not isinstance(vars(type(output)).get("logits"), property):
        kind: Any = type(output)
        output.__class__ = _lazy(kind)
    return output


def logits_on_demand(output: Any) -> LogitsOnDemand | None:
    """What stands for the logits of an output of `with_logits_on_demand`; None in any other output."""
    logits = vars(output).get("logits")
    return logits if isinstance(logits, LogitsOnDemand) else None


@functools.cache
def _lazy(kind: Any) -> Any:
    def read(self: Any) -> Tensor | None:
        logits = vars(self).get("logits")
        return logits() if isinstance(logits, LogitsOnDemand) else logits

    def write(self: Any, value: Any) -> None:
        vars(self)["logits"] = value

    def item(self: Any, key: Any) -> Any:
        if isinstance(key, str):
            return self.logits if key == "logits" and key in self else kind.__getitem__(self, key)
        names = list(self.keys())[key]
        return self[names] if isinstance(names, str) else tuple(self[name] for name in names)

    def get(self: Any, key: str, default: Any = None) -> Any:
        return self.logits if key == "logits" and key in self else kind.get(self, key, default)

    def reduce(self: Any) -> Any:
        return kind(**{name: self[name] for name in self}).__reduce__()

    return type(
        kind.__name__,
        (kind,),
        {
            "logits": property(read, write),
            "__getitem__": item,
            "get": get,
            "__reduce__": reduce,
            "__module__": kind.__module__,
        },
    )


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
