"""What each exact way to run a step costs, from a configuration alone, and the longest sample that fits."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from tqdm import tqdm

from lemo_trainer.compat import attention_implementation
from lemo_trainer.config import LemoConfig
from lemo_trainer.exact.auto import fits, price, sizes_of
from lemo_trainer.exact.budget import state_bytes
from lemo_trainer.exact.counting import count_step
from lemo_trainer.exact.fake import CannotCountError
from lemo_trainer.exact.mode import ExactMode
from lemo_trainer.exact.patch import loss_forward
from lemo_trainer.exact.ways import WayCost
from lemo_trainer.model.architectures import find_causal_lm
from lemo_trainer.offline.step_cost import Setup, build

STEP = 256  # the longest sample is rounded down to this many tokens


@dataclass(frozen=True)
class WayPlan:
    """One way to run a step of a setup.

    Args:
        cost: of a step; its peak does not count the state.
        peak: the most bytes of tensors: weights, gradients, optimizer states and activations.
        relative_time: predicted time against the fastest way.
        fits: whether the step fits the memory.
        longest: tokens of the longest sample that fits; None where none was asked for.
    """

    cost: WayCost
    peak: float
    relative_time: float
    fits: bool
    longest: int | None


def plan_ways(setup: Setup, config: LemoConfig, memory: float, *, longest: bool = False) -> list[WayPlan]:
    """Every exact way to run a step of `setup`, the fastest first.

    Nothing is computed and no weights exist: the model runs on fake tensors.

    Args:
        memory: bytes that all tensors may take.
        longest: also find the longest sample that fits, which counts two shorter steps too.

    Raises:
        ValueError: the model cannot be counted.
    """
    model = build(setup, setup.model_config.num_hidden_layers, "meta")
    state = state_bytes(model)
    tried = _lengths(setup.seq_len, 2 * max(sizes_of(config))) if longest else []
    progress = tqdm(sorted({setup.seq_len, *tried}), desc="lengths", unit="length")
    tables = {length: _table(model, replace(setup, seq_len=length), config) for length in progress}
    table = tables[setup.seq_len]
    written_out = attention_implementation(model.config) == "eager"
    lengths: dict[str, int] = {}
    for way in {str(cost.way) for length in tried for cost in tables[length]}:
        costs = [next(cost for cost in tables[length] if str(cost.way) == way) for length in tried]
        lengths[way] = _longest(tried, [cost.phases for cost in costs], memory - state, written_out)
    return [
        WayPlan(
            cost,
            cost.peak + state,
            cost.seconds / table[0].seconds,
            fits(cost, state, memory),
            lengths.get(str(cost.way)),
        )
        for cost in table
    ]


def _table(model: Any, setup: Setup, config: LemoConfig) -> list[WayCost]:
    parts = find_causal_lm(model)
    mode = ExactMode.of(parts, config)
    sizes = sizes_of(config)
    cut = tuple(size for size in sizes if size < setup.seq_len)
    forward = loss_forward(parts, parts.model.forward, config.loss_segment)
    try:
        counted = count_step(parts, forward, setup.batch_size, setup.seq_len, cut, set(mode.trial.uncut))
    except CannotCountError as error:
        raise ValueError(f"A step of {type(parts.model).__name__} cannot be predicted: {error}.") from error
    return price(counted, sizes, bool(mode.only_layers), setup.device == "cuda")


def _lengths(seq_len: int, shortest: int) -> list[int]:
    """Three lengths to count, the shortest of which every way can cut into segments.

    The time to count a length grows with it, since its loss is made of a few tokens at a time.
    """
    return [shortest, 2 * shortest, max(seq_len, 4 * shortest)]


def _longest(lengths: list[int], phases: list[tuple[float, ...]], memory: float, written_out: bool) -> int:
    """The most tokens, a multiple of STEP, with which every phase of the step stays within `memory`.

    Args:
        lengths: three that were counted.
        phases: the peaks of each length's phases.
        memory: bytes.
        written_out: whether attention maps exist as a whole, which grow with the square of the length.
    """
    curves = [_curve(lengths, list(peaks), written_out) for peaks in zip(*phases, strict=True)]

    def curve(length: int) -> float:
        return max(each(length) for each in curves)

    low, high = 0, STEP
    while curve(high) <= memory and high < 2**30:
        low, high = high, 2 * high
    while high - low > STEP:
        middle = (low + high) // 2 // STEP * STEP
        low, high = (middle, high) if curve(middle) <= memory else (low, middle)
    return low


def _curve(lengths: list[int], peaks: list[float], bends: bool) -> Callable[[int], float]:
    """A phase's peak by the length, through three counted points."""
    (x0, x1, x2), (y0, y1, y2) = lengths, peaks
    slope, later = (y1 - y0) / (x1 - x0), (y2 - y1) / (x2 - x1)
    bend = max(0.0, (later - slope) / (x2 - x0)) if bends else 0.0

    def curve(length: int) -> float:
        if length <= x1:
            return y0 + slope * (length - x0)
        return y1 + (length - x1) * (later + bend * (length - x2))

    return curve
