"""The choice of how much each layer leaves out, so that a step meets a budget at the least loss.

Each layer stays dense or takes one point of its curve. A point is a threshold, the share of the tokens that
the layer keeps with it, and the rise of the held-out loss when this layer alone uses it. Losses are assumed
to add up, and so are costs. Choosing one point a layer at the least loss within a limit on the cost is the
multiple-choice knapsack problem, solved here by dynamic programming over the cost.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from lemo_trainer.config import LemoConfig
from lemo_trainer.informativeness.selection import BlockPlan
from lemo_trainer.offline.step_cost import Setup, predict
from lemo_trainer.sizes import size_text

GRID = 20_000  # steps of the dynamic programme between the cheapest choice and the limit
PREDICTED_SHARES = (0.25, 0.5, 0.75)


@dataclass(frozen=True)
class LayerThreshold:
    """A point of one layer's curve.

    Args:
        threshold: blocks with at least this score, in means of the sample, are kept.
        kept_share: share of the tokens that the layer keeps with it.
        loss_increase: rise of the held-out loss when this layer alone leaves tokens out, in nats a token.
        used: whether the search chose it.
    """

    layer: int
    threshold: float
    kept_share: float
    loss_increase: float
    used: bool = False


@dataclass(frozen=True)
class Budget:
    """A limit on what a training step costs.

    Args:
        limit: the largest cost that a step may have.
        dense: cost of a step in which every searched layer keeps all tokens.
        saving: maps the share of the tokens that a layer keeps to the cost that it saves.
        written: maps a cost to the text that a user reads.
    """

    limit: float
    dense: float
    saving: Callable[[float], float]
    written: Callable[[float], str]

    @classmethod
    def of_shares(cls, limit: float, total_layers: int) -> Budget:
        """A limit on the mean share of tokens that the model's layers keep, dense layers included."""
        _check_share("fit_share", limit)
        return cls(limit, 1.0, lambda share: (1 - share) / total_layers, "a mean kept share of {:.1%}".format)

    @classmethod
    def of_step(
        cls,
        setup: Setup,
        config: LemoConfig,
        *,
        checkpointing: bool,
        memory: float | None = None,
        flops_share: float | None = None,
    ) -> Budget:
        """A limit on the predicted bytes or operations of a step (`lemo_trainer.offline.step_cost`).

        A layer's operations are quadratic in its kept share and its bytes linear, so that three predictions
        determine the curve. Where the peak of memory is not in the layers for every share, the prediction for
        several shares together is too high, never too low.

        Args:
            config: layers and mode; its thresholds and `keep_ratio` are not used.
            memory: limit on `StepCost.peak_bytes`; give this or `flops_share`.
            flops_share: limit on the operations, as a share of the dense step with the same checkpointing.
        """
        if (memory is None) == (flops_share is None):
            raise ValueError(f"Give one of `memory` and `flops_share`, got {memory} and {flops_share}.")
        if flops_share is not None:
            _check_share("fit_flops", flops_share)
        name = "flops" if memory is None else "peak_bytes"

        def cost(keep_ratio: float | None) -> float:
            lemo = (
                None
                if keep_ratio is None
                else dataclasses.replace(config, thresholds="", keep_ratio=keep_ratio)
            )
            return float(getattr(predict(setup, lemo, checkpointing=checkpointing, repeats=0), name))

        plans = (BlockPlan.of(setup.seq_len, config, share) for share in PREDICTED_SHARES)
        shares = sorted({plan.kept_tokens / setup.seq_len for plan in plans if not plan.keeps_all})
        if not shares:
            raise ValueError(
                f"`seq_len` must hold blocks to leave out, got {setup.seq_len} tokens in blocks of "
                f"{config.block_size}."
            )
        dense = cost(1.0)
        layers = len(config.resolve_layers(setup.model_config.num_hidden_layers))
        savings = [(dense - cost(share)) / layers for share in shares]
        curve = np.polynomial.Polynomial.fit(shares, savings, len(shares) - 1)

        def saving(share: float) -> float:
            return float(curve(share))

        if memory is not None:
            return cls(memory, dense, saving, lambda value: f"{size_text(value)} at the peak")
        assert flops_share is not None
        plain = cost(None)
        return cls(
            flops_share * plain, dense, saving, lambda value: f"{value / plain:.1%} of the dense operations"
        )

    def cost(self, points: Sequence[LayerThreshold]) -> float:
        """The cost of a step with these points while every other layer is dense."""
        return self.dense - sum(self.saving(point.kept_share) for point in points)


def choose(curves: Mapping[int, Sequence[LayerThreshold]], budget: Budget) -> list[LayerThreshold]:
    """The points of least total loss whose cost is within the budget; a layer without a point stays dense.

    Costs are rounded up to a grid of `GRID` steps between the cheapest choice and the limit.

    Args:
        curves: the points of each layer.

    Raises:
        ValueError: no choice meets the budget; the message names the cheapest.
    """
    options: list[list[LayerThreshold | None]] = [[None, *points] for points in curves.values()]
    saved = [np.array([0.0 if p is None else budget.saving(p.kept_share) for p in each]) for each in options]
    losses = [np.array([0.0 if p is None else p.loss_increase for p in each]) for each in options]
    cheapest = budget.dense - sum(float(each.max()) for each in saved)
    room = budget.limit - cheapest
    if room < -1e-9 * cheapest:
        raise ValueError(
            f"No choice of thresholds meets a budget of {budget.written(budget.limit)}; the cheapest takes "
            f"{budget.written(cheapest)}. Search more `layers`, or keep smaller shares."
        )
    # The cost of each option above the cheapest of its layer, in steps of the grid, rounded up.
    unit = max(room, 1e-12 * cheapest) / GRID
    extra = [np.ceil((each.max() - each) / unit - 1e-9).clip(max=GRID + 1).astype(int) for each in saved]
    least = np.zeros(GRID + 1)  # total loss of the layers so far within so many steps
    picks = np.zeros((len(options), GRID + 1), dtype=int)
    for layer, (steps, loss) in enumerate(zip(extra, losses, strict=True)):
        totals = np.full((len(steps), GRID + 1), np.inf)
        for option, step in enumerate(steps):
            totals[option, step:] = least[: max(GRID + 1 - step, 0)] + loss[option]
        picks[layer], least = totals.argmin(0), totals.min(0)
    at, chosen = GRID, []
    for layer in reversed(range(len(options))):
        pick = picks[layer, at]
        at -= extra[layer][pick]
        point = options[layer][pick]
        if point is not None:
            chosen.append(point)
    return chosen[::-1]


def _check_share(name: str, value: float) -> None:
    if not 0 < value <= 1:
        raise ValueError(f"`{name}` must be above 0 and at most 1, got {value}.")
