"""Search of the thresholds of token elimination (LeMo, Algorithm 1), and of the layers that use them.

A layer keeps the blocks whose score is at least `threshold` times the mean over the sample's blocks.
Algorithm 1 starts at 1, the mean, and moves each layer's threshold along the slope of the quality on held-out
text, while the other layers stay dense:

    T <- T + eta * (quality(T + eps) - quality(T - eps)) / (2 * eps),    quality = -loss

Nothing in Algorithm 1 limits the loss, so this module adds a choice that the paper does not have:

- Without a budget, a guard adds layers one by one, those first that lose least for each token left out, as
  long as the loss with all of them together stays within `max_increase`.
- With a budget, `lemo_trainer.offline.budget` chooses the points of least total loss within it, and the loss
  with all of them together is then measured.

A layer for which no point is chosen stays dense.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
import statistics
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from tqdm import tqdm

from lemo_trainer.config import LemoConfig
from lemo_trainer.model.architectures import find_causal_lm
from lemo_trainer.offline.budget import Budget, LayerThreshold, choose
from lemo_trainer.patch import apply_lemo, remove_lemo
from lemo_trainer.registry import AUTO, SELECTORS
from lemo_trainer.report import LemoReport
from lemo_trainer.session import session_of

Batch = Mapping[str, Any]
MAX_INCREASE = 0.05  # nats a token that the guard allows by default
_KEEP_ALL = -1.0  # a threshold below every score


@dataclass(frozen=True)
class ThresholdSearch:
    """The result of `search_thresholds`; `thresholds` is what `LemoConfig` takes.

    Args:
        dense_loss: held-out loss with every layer dense.
        loss: held-out loss measured with all chosen points together.
        layers: all points that were tried, layer by layer.
        total_layers: decoder layers of the model.
        max_increase: the limit on the rise of the loss; infinite under a budget without a limit of its own.
        cost: the cost of a step with the chosen points, as the budget writes it; empty without a budget.
    """

    dense_loss: float
    loss: float
    layers: tuple[LayerThreshold, ...]
    total_layers: int
    max_increase: float
    cost: str = ""

    @property
    def thresholds(self) -> dict[int, float]:
        return {row.layer: row.threshold for row in self.layers if row.used}

    @property
    def predicted_loss(self) -> float:
        """The loss if the increases that the chosen layers cause one by one added up."""
        return self.dense_loss + sum(row.loss_increase for row in self.layers if row.used)

    @property
    def kept_shares(self) -> list[float]:
        """The share of the tokens that each layer of the model keeps, as measured with the others dense."""
        used = {row.layer: row.kept_share for row in self.layers if row.used}
        return [used.get(layer, 1.0) for layer in range(self.total_layers)]


class _HeldOutLoss:
    """Measures the mean loss over the batches under some thresholds, and the share that each layer keeps."""

    def __init__(
        self, model: nn.Module, batches: Sequence[Batch], report: LemoReport, progress: tqdm[Any]
    ) -> None:
        session = session_of(model)
        assert session is not None
        self.model, self.batches, self.progress = model, batches, progress
        self.report, self.session = report, session
        session.passes.without_gradient = True

    def __call__(self, thresholds: Mapping[int, float]) -> tuple[float, dict[int, float]]:
        """The loss and the kept shares by layer; layers without a threshold are dense."""
        layers = self.report.patched_layers
        self.session.thresholds = dict.fromkeys(layers, 0.0) | dict(thresholds)
        losses, shares = [], []
        for batch in self.batches:
            losses.append(self.model(**batch).loss.item())
            shares.append(self.report.layer_shares)
        self.progress.update()
        loss = statistics.mean(losses)
        if not math.isfinite(loss):
            raise ValueError(
                f"The held-out loss must be a finite number, got {loss} with thresholds {dict(thresholds)}: "
                "the weights or the hidden states hold NaN or inf, or a batch has no labels."
            )
        return loss, {layer: statistics.mean(each[layer] for each in shares) for layer in layers}

    def score(self) -> tuple[float, dict[int, list[float]]]:
        """The dense loss, and each layer's block scores divided by their sample's mean, highest first."""
        self.session.relative_scores = {}
        loss, _ = self(dict.fromkeys(self.report.patched_layers, _KEEP_ALL))
        scores, self.session.relative_scores = self.session.relative_scores, None
        return loss, {
            layer: torch.cat(each).sort(descending=True).values.tolist() for layer, each in scores.items()
        }


def search_thresholds(
    model: nn.Module,
    batches: Iterable[Batch],
    config: LemoConfig,
    *,
    max_increase: float | None = None,
    rounds: int = 1,
    eps: float = 0.25,
    eta: float = 1.0,
    shares: Sequence[float] = (),
    budget: Budget | None = None,
) -> ThresholdSearch:
    """Find thresholds of `mode="eliminate"` that together cost little held-out loss, or meet a budget.

    Args:
        model: the model to fine-tune; it is the same afterwards.
        batches: held-out batches with `input_ids` and `labels`.
        config: layers, block size and selector; its `keep_ratio` is not used.
        max_increase: nats a token by which the loss may rise while all chosen layers leave tokens out; a
            negative number asks that it falls. None is 0.05 without a budget, and no limit with one.
        rounds: steps of Algorithm 1; 0 keeps the mean as the threshold.
        eps: half the step of the finite difference, in mean scores.
        eta: step size of Algorithm 1.
        shares: kept shares, each of which adds a point to the curve of every layer.
        budget: limit on the cost of a step with the chosen thresholds; None lets the guard choose.

    Raises:
        ValueError: `config` has another mode, or a selector whose scores are no property of the text; there
            are no batches, or one is shorter than a block; a number is out of range; a loss or a score is NaN
            or infinite; no choice meets the budget, or the one that does raises the loss by more than
            `max_increase`.
    """
    batches = list(batches)
    check_search(config, max_increase, shares)
    _check_batches(batches, config.block_size)
    of_trial = dataclasses.replace(config, keep_ratio=0.5, warmup_steps=0, ramp_steps=0, thresholds="")
    report = apply_lemo(model, of_trial)
    layers = report.patched_layers
    if max_increase is None:
        max_increase = MAX_INCREASE if budget is None else math.inf
    points = 1 + len(shares)
    losses = 1 + len(layers) * (2 * rounds + points) + (1 if budget else len(layers) * points)
    try:
        progress = tqdm(total=losses, desc="thresholds", unit="loss")
        with torch.no_grad(), _training_without_dropout(model), progress:
            held_out = _HeldOutLoss(model, batches, report, progress)
            dense, scores = held_out.score()
            rows = []
            for layer in layers:
                tried = [_algorithm_1(held_out, layer, rounds, eps, eta)]
                tried += [_threshold_for(share, scores[layer]) for share in shares]
                rows += _points(held_out, layer, tried, dense)
            if budget is None:
                used, loss = _guard(held_out, rows, dense, max_increase)
            else:
                used, loss = _within(budget, held_out, rows, dense, max_increase)
    finally:
        remove_lemo(model)
    points_used = tuple(dataclasses.replace(row, used=row in used) for row in rows)
    cost = "" if budget is None else budget.written(budget.cost(used))
    return ThresholdSearch(dense, loss, points_used, report.total_layers, max_increase, cost)


def check_search(config: LemoConfig, max_increase: float | None, shares: Sequence[float] = ()) -> None:
    """Raise ValueError for options that no search can use; needs no model."""
    if config.mode != "eliminate":
        raise ValueError(f'Thresholds are searched for `mode="eliminate"`, got {config.mode!r}.')
    if not SELECTORS[config.resolved_selector].searchable:
        searchable = [AUTO, *(name for name, traits in SELECTORS.items() if traits.searchable)]
        raise ValueError(
            f"`selector` must be one of {', '.join(searchable)} in a search of thresholds, got "
            f"{config.selector!r}: thresholds are compared with exact scores of the text."
        )
    if max_increase is not None and not math.isfinite(max_increase):
        raise ValueError(f"`max_increase` must be a number of nats, got {max_increase}.")
    if not all(0 < share < 1 for share in shares):
        raise ValueError(f"`shares` must lie between 0 and 1, got {list(shares)}.")


def _check_batches(batches: Sequence[Batch], block_size: int) -> None:
    lengths = [batch["input_ids"].shape[1] for batch in batches]
    if not lengths or min(lengths) < block_size:
        raise ValueError(
            f"Thresholds need held-out batches of at least one block of {block_size} tokens, got batches of "
            f"{lengths} tokens."
        )


@contextlib.contextmanager
def _training_without_dropout(model: nn.Module) -> Iterator[None]:
    """Training mode only where LeMo looks for it, in the causal LM and its layers; dropout stays off."""
    parts = find_causal_lm(model)
    modes = {part: part.training for part in model.modules()}
    model.eval()
    for part in (parts.model, *parts.layers):
        part.training = True
    try:
        yield
    finally:
        for part, mode in modes.items():
            part.training = mode


def _algorithm_1(held_out: _HeldOutLoss, layer: int, rounds: int, eps: float, eta: float) -> float:
    threshold = 1.0
    for _ in range(rounds):
        (below, _), (above, _) = (held_out({layer: threshold + step}) for step in (-eps, eps))
        threshold = max(threshold + eta * (below - above) / (2 * eps), 0.0)
    return threshold


def _threshold_for(share: float, scores: Sequence[float]) -> float:
    """The threshold that keeps this share: half way between the last kept score and the first dropped one."""
    kept = min(max(round(share * len(scores)), 1), len(scores))
    below = scores[kept] if kept < len(scores) else 0.0
    return (scores[kept - 1] + below) / 2


def _points(
    held_out: _HeldOutLoss, layer: int, thresholds: Sequence[float], dense: float
) -> list[LayerThreshold]:
    """The points of a layer's curve at these thresholds, each measured with all other layers dense."""
    points = []
    for threshold in dict.fromkeys(thresholds):
        alone, kept = held_out({layer: threshold})
        points.append(LayerThreshold(layer, threshold, kept[layer], alone - dense))
    return points


def _guard(
    held_out: _HeldOutLoss, rows: Sequence[LayerThreshold], dense: float, max_increase: float
) -> tuple[list[LayerThreshold], float]:
    """Add points by their loss for each token left out, lowest first, while the loss stays in the limit."""
    used: dict[int, LayerThreshold] = {}
    used_loss = dense
    for row in sorted(rows, key=lambda row: row.loss_increase / max(1 - row.kept_share, 1e-9)):
        if row.layer in used or row.kept_share == 1:
            continue
        thresholds = {layer: each.threshold for layer, each in used.items()} | {row.layer: row.threshold}
        loss, _ = held_out(thresholds)
        if loss - dense <= max_increase:
            used[row.layer], used_loss = row, loss
    return list(used.values()), used_loss


def _within(
    budget: Budget,
    held_out: _HeldOutLoss,
    rows: Sequence[LayerThreshold],
    dense: float,
    max_increase: float,
) -> tuple[list[LayerThreshold], float]:
    """The points of least total loss within a budget, and the loss that is measured with all of them."""
    curves: dict[int, list[LayerThreshold]] = {row.layer: [] for row in rows}
    for row in rows:
        if row.kept_share < 1:
            curves[row.layer].append(row)
    used = choose(curves, budget)
    loss, _ = held_out({row.layer: row.threshold for row in used})
    if loss - dense > max_increase:
        raise ValueError(
            f"`max_increase` must be at least {loss - dense:.4f} nats, which the thresholds for "
            f"{budget.written(budget.limit)} cost, got {max_increase}."
        )
    return used, loss
