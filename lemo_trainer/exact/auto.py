"""`mode="auto"`: the fastest exact way that fits the memory, chosen before a step from its batch's length."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from lemo_trainer.config import LemoConfig
from lemo_trainer.exact.budget import state_bytes, stored_budget, tensors_budget
from lemo_trainer.exact.counting import StepParts, count_step
from lemo_trainer.exact.fake import CannotCountError
from lemo_trainer.exact.ways import CPU, CUDA, Detached, Way, WayCost, cost_of, detached_cost, ways_of
from lemo_trainer.model.architectures import CausalLM
from lemo_trainer.sizes import parse_bytes, size_text

logger = logging.getLogger(__name__)

SHARES = tuple(round(1 - 0.05 * step, 2) for step in range(1, 19))  # kept by "detach": 0.95 to 0.1
# Cosine of detach's gradient with the dense one by its kept share (docs/lemo.md): SmolLM2, 1,024 tokens.
_COSINES = {0.75: 0.93, 0.5: 0.86}


@dataclass(frozen=True)
class Choice:
    """What `mode="auto"` chose. `str(choice)` is one line.

    Args:
        way: the chosen one.
        batch_size, seq_len: of the longest batch so far, for which it was chosen.
        table: every exact way with its cost, the fastest first; empty where nothing could be predicted. The
            peaks in it count activations only.
        state: bytes of weights, gradients and optimizer states, beside every peak.
        memory: bytes that all of it may take.
        reason: why this way.
        cost: of a step by this way; None where nothing could be predicted.
    """

    way: Way | Detached
    batch_size: int
    seq_len: int
    table: tuple[WayCost, ...]
    state: float
    memory: float
    reason: str
    cost: WayCost | None = None

    @property
    def saved_bytes(self) -> tuple[float, float] | None:
        """Bytes that wait for the backward pass, by this way and in plain training; None without a table."""
        plain = next((cost.saved for cost in self.table if cost.way == Way(scheme="plain")), None)
        return None if plain is None or self.cost is None else (self.cost.saved, plain)

    def fits(self, cost: WayCost) -> bool:
        """Whether a step of this cost stays within the memory."""
        return fits(cost, self.state, self.memory)

    def __str__(self) -> str:
        text = f"{self.way} for batches up to {self.batch_size} x {self.seq_len} tokens: {self.reason}"
        others = [cost for cost in self.table if cost.way != self.way]
        if others:
            fastest = self.table[0].seconds
            text += "; others: " + ", ".join(
                f"{cost.way} {size_text(cost.peak + self.state)}, {cost.seconds / fastest:.2f} of the "
                f"time{'' if self.fits(cost) else ' (does not fit)'}"
                for cost in others
            )
        return text


def fits(cost: WayCost, state: float, memory: float) -> bool:
    """Whether tensors and boundaries of a step have room."""
    place = getattr(cost.way, "boundaries", "memory")
    return cost.peak + state <= memory and cost.stored <= stored_budget(place)


def sizes_of(config: LemoConfig) -> tuple[int, ...]:
    """The segments to try: of `segment_tokens`, and four times as long, which costs less time."""
    return 4 * config.segment_tokens, config.segment_tokens


def price(parts: StepParts, sizes: Sequence[int], uncut: bool, on_cuda: bool) -> list[WayCost]:
    """Every exact way, the fastest first."""
    speeds = CUDA if on_cuda else CPU
    costs = [cost_of(way, parts, speeds) for way in ways_of(parts.seq_len, sizes, uncut, on_cuda)]
    return sorted(costs, key=lambda cost: (cost.seconds, cost.peak))


class AutoChoice:
    """Chooses for one model, anew whenever a batch is longer than all before.

    Args:
        parts: the model.
        config: the configuration in force.
        uncut: layers that cannot run in segments.
        only_layers: whether scheme "segments" is impossible.
    """

    def __init__(self, parts: CausalLM, config: LemoConfig, uncut: set[int], only_layers: bool) -> None:
        self._parts, self._config = parts, config
        self._uncut, self._only_layers = uncut, only_layers
        self._memory = parse_bytes("memory", config.memory) if config.memory else 0.0
        self.choice: Choice | None = None

    @property
    def way(self) -> Way:
        """The exact way that was chosen for the present batch."""
        assert self.choice is not None
        assert isinstance(self.choice.way, Way)
        return self.choice.way

    def of_batch(self, head_forward: Callable[..., Any], batch_size: int, seq_len: int) -> Choice:
        """The way for a batch of this size, the same on all ranks.

        Raises:
            ValueError: nothing fits `memory`.
        """
        batch_size, seq_len = (int(most) for most in self._agreed([batch_size, seq_len]))
        choice = self.choice
        if choice is not None:
            batch_size, seq_len = max(batch_size, choice.batch_size), max(seq_len, choice.seq_len)
            if (batch_size, seq_len) == (choice.batch_size, choice.seq_len):
                return choice
        if not self._memory:
            (least,) = self._agreed([-tensors_budget(self._parts.model)])
            self._memory = -least
        self.choice = self._choose(head_forward, batch_size, seq_len)
        if choice is None or self.choice.way != choice.way:
            logger.warning("LeMo chose %s.", self.choice)
        return self.choice

    def _agreed(self, values: list[float]) -> list[float]:
        """The largest of each value over all ranks."""
        if not dist.is_available() or not dist.is_initialized() or dist.get_world_size() == 1:
            return values
        device = next(self._parts.model.parameters()).device if dist.get_backend() == "nccl" else "cpu"
        most = torch.tensor(values, dtype=torch.float64, device=device)
        dist.all_reduce(most, dist.ReduceOp.MAX)
        return list(most.tolist())

    def _choose(self, head_forward: Callable[..., Any], batch_size: int, seq_len: int) -> Choice:
        model, config = self._parts.model, self._config
        device = next(model.parameters()).device
        sizes = sizes_of(config)
        cut = tuple(size for size in sizes if size < seq_len)
        state = state_bytes(model)

        def chosen(cost: WayCost, table: list[WayCost], reason: str) -> Choice:
            return Choice(cost.way, batch_size, seq_len, tuple(table), state, self._memory, reason, cost)

        try:
            parts = count_step(self._parts, head_forward, batch_size, seq_len, cut, self._uncut)
        except CannotCountError as error:
            if config.memory and state > self._memory:
                raise ValueError(
                    f"`memory` must hold weights, gradients and optimizer states, {size_text(state)}, got "
                    f"{config.memory!r}; train fewer weights (LoRA), or raise `memory`."
                ) from error
            way = Way(scheme="layers", segment_tokens=config.segment_tokens)
            reason = f"the costs of this model cannot be predicted, because {error}"
            return Choice(way, batch_size, seq_len, (), state, self._memory, reason)
        table = price(parts, sizes, self._only_layers, device.type == "cuda")
        fitting = [cost for cost in table if fits(cost, state, self._memory)]
        needed = size_text(self._memory)
        if fitting and config.speed == 1:
            total = size_text(fitting[0].peak + state)
            return chosen(fitting[0], table, f"{total}, the fastest exact way that fits {needed}")
        limit = fitting[0].seconds / config.speed if fitting else float("inf")
        speeds = CUDA if device.type == "cuda" else CPU
        for share in SHARES:
            cost = detached_cost(Detached(share), parts, speeds)
            if cost.seconds <= limit and fits(cost, state, self._memory):
                return chosen(cost, table, _of_detached(share, bool(fitting), config.speed, needed))
        if fitting:
            raise ValueError(
                f"`speed` must be one that keeping a tenth of the tokens reaches, got {config.speed}; "
                "lower it."
            )
        return self._smallest(chosen, table, state, batch_size, seq_len)

    def _smallest(
        self, chosen: Any, table: list[WayCost], state: float, batch_size: int, seq_len: int
    ) -> Choice:
        """The way with the lowest peak, where nothing fits what is free; an error under a given `memory`."""
        smallest = min(table, key=lambda cost: cost.peak)
        text = (
            f"{batch_size} x {seq_len} tokens need {size_text(smallest.peak + state)} at least "
            f"({smallest.way}), more than the {size_text(self._memory)}"
        )
        if self._config.memory:
            raise ValueError(
                f"`memory` must hold a step: {text} given, {self._config.memory!r}. Take shorter samples, a "
                "smaller batch or `segment_tokens`, or raise `memory`."
            )
        return chosen(smallest, table, f"{text} that seem free; the way that needs least")


def _of_detached(share: float, exact_fits: bool, speed: float, memory: str) -> str:
    why = f"for `speed` {speed:g}" if exact_fits else f"no exact way fits {memory}"
    known = [f"{cosine} at {kept:.0%}" for kept, cosine in _COSINES.items()]
    return (
        f"{why}; {1 - share:.0%} of the tokens lose their gradient (cosine with the dense gradient, measured "
        f"on SmolLM2: {', '.join(known)})"
    )


def batch_shape(arguments: dict[str, Any]) -> tuple[int, int]:
    """Samples and tokens of the batch that a model's forward gets.

    Raises:
        ValueError: there are neither ids nor embeddings.
    """
    for name in ("input_ids", "inputs_embeds"):
        value = arguments.get(name)
        if isinstance(value, Tensor):
            return value.shape[0], value.shape[1]
    raise ValueError('mode="auto" needs `input_ids` or `inputs_embeds` in a training forward, got neither.')
