"""Thresholds of token elimination (LeMo, Algorithm 1), and which layers use them.

A layer keeps the blocks whose score is at least `threshold` times the mean over the sample's blocks. From 1,
the mean, Algorithm 1 moves each layer's threshold along the slope of the quality on held-out text,

    T <- T + eta * (quality(T + eps) - quality(T - eps)) / (2 * eps),    quality = -loss,

the other layers being dense. The slope alone knows no limit, so a choice follows, which the paper has not.
Without a budget, a guard: layers are taken in, those that lose least for what they leave out first, while the
loss with all of them stays within `max_increase`. With one, the points that meet it at the least loss
(`lemo_trainer.offline.budget`), and then the loss with all of them is measured. A layer without a point stays
dense.
"""

from __future__ import annotations

import dataclasses
import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
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
from lemo_trainer.session import LemoSession, session_of

Batch = Mapping[str, Any]
MAX_INCREASE = 0.05  # of the guard, where nothing else is said
_KEEP_ALL = -1.0  # a threshold that every score is above


@dataclass(frozen=True)
class ThresholdSearch:
    """The result of `search_thresholds`; `thresholds` is what `LemoConfig` takes.

    Args:
        dense_loss: held-out loss with every layer dense.
        loss: the same with the chosen points, measured.
        layers: all points that were tried, layer by layer.
        total_layers: decoder layers of the model.
        max_increase: the limit on the rise of the loss; infinite where a budget takes its place.
        cost: what a step costs with the chosen points, as the budget writes it; empty without one.
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
        """The loss if each chosen layer raised it by as much as it does alone."""
        return self.dense_loss + sum(row.loss_increase for row in self.layers if row.used)

    @property
    def kept_shares(self) -> list[float]:
        """The share of the tokens that each layer of the model keeps, by itself."""
        used = {row.layer: row.kept_share for row in self.layers if row.used}
        return [used.get(layer, 1.0) for layer in range(self.total_layers)]


class _HeldOutLoss:
    """The mean loss over the batches with some thresholds, and the share of the tokens each layer kept."""

    def __init__(
        self, model: nn.Module, batches: Sequence[Batch], report: LemoReport, progress: tqdm[Any]
    ) -> None:
        self.model, self.batches, self.report, self.progress = model, batches, report, progress
        session = session_of(model)
        assert session is not None
        self.session: LemoSession = session

    def __call__(self, thresholds: Mapping[int, float]) -> tuple[float, dict[int, float]]:
        layers = self.report.patched_layers
        self.session.thresholds = dict.fromkeys(layers, 0.0) | dict(thresholds)
        values, kept = [], []
        for batch in self.batches:
            values.append(self.model(**batch).loss.item())
            kept.append(self.report.layer_shares)
        self.progress.update()
        loss = statistics.mean(values)
        if not math.isfinite(loss):
            raise ValueError(
                f"The held-out loss must be a finite number, got {loss} with thresholds {dict(thresholds)}: "
                "the weights or the hidden states hold NaN or inf, or a batch has no labels."
            )
        return loss, {layer: statistics.mean(each[layer] for each in kept) for layer in layers}

    def score(self) -> tuple[float, dict[int, list[float]]]:
        """The dense loss, and the block scores of each layer in means of their sample, highest first."""
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
    """Find the thresholds of `mode="eliminate"` that cost little held-out loss together, or meet a budget.

    Args:
        model: the model to fine-tune; it is left as it was.
        batches: held-out batches with `input_ids` and `labels`.
        config: layers, block size and selector; its `keep_ratio` plays no part.
        max_increase: nats a token by which the loss may rise with all layers that leave tokens out; below 0
            it must fall. None is 0.05 without a budget, and no limit with one.
        rounds: steps of Algorithm 1; 0 stays at the mean.
        eps: half the distance of its finite difference, in means.
        eta: its step.
        shares: kept shares, each another point of every layer's curve.
        budget: what a step with the chosen thresholds may cost; None lets the guard choose.

    Raises:
        ValueError: `config` has another mode, or a selector without scores of the text; there are no batches,
            or one is shorter than a block; a number is out of range; a loss or a score is NaN or infinite; no
            choice meets the budget, or the one that does raises the loss by more than `max_increase`.
    """
    batches = list(batches)
    check_search(config, max_increase, shares)
    if not batches or any(batch["input_ids"].shape[1] < config.block_size for batch in batches):
        lengths = [batch["input_ids"].shape[1] for batch in batches]
        raise ValueError(
            f"Thresholds need held-out batches of at least one block of {config.block_size} tokens, got "
            f"batches of {lengths} tokens."
        )
    report = apply_lemo(model, dataclasses.replace(config, keep_ratio=0.5, warmup_steps=0, thresholds=""))
    layers = report.patched_layers
    modes = {part: part.training for part in model.modules()}
    _train_without_dropout(model)
    limit = (MAX_INCREASE if budget is None else math.inf) if max_increase is None else max_increase
    points = 1 + len(shares)
    losses = 1 + len(layers) * (2 * rounds + points) + (1 if budget else len(layers) * points)
    try:
        with torch.no_grad(), tqdm(total=losses, desc="thresholds", unit="loss") as progress:
            held_out = _HeldOutLoss(model, batches, report, progress)
            dense, scores = held_out.score()
            rows = []
            for layer in layers:
                tried = [_algorithm_1(held_out, layer, rounds, eps, eta)]
                tried += [_threshold_for(share, scores[layer]) for share in shares]
                for threshold in dict.fromkeys(tried):
                    alone, kept = held_out({layer: threshold})
                    rows.append(LayerThreshold(layer, threshold, kept[layer], alone - dense))
            if budget is None:
                used, loss = _guard(held_out, rows, dense, limit)
            else:
                used = _within(budget, rows, layers)
                loss, _ = held_out({row.layer: row.threshold for row in used})
                if loss - dense > limit:
                    raise ValueError(
                        f"`max_increase` must be at least {loss - dense:.4f} nats, which the thresholds for "
                        f"{budget.written(budget.limit)} cost, got {max_increase}."
                    )
            return ThresholdSearch(
                dense,
                loss,
                tuple(dataclasses.replace(row, used=row in used) for row in rows),
                report.total_layers,
                limit,
                "" if budget is None else budget.written(budget.cost(used)),
            )
    finally:
        remove_lemo(model)
        for part, mode in modes.items():
            part.training = mode


def check_search(config: LemoConfig, max_increase: float | None, shares: Sequence[float] = ()) -> None:
    """Raise ValueError for what no search can use, before a model is loaded."""
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


def _train_without_dropout(model: nn.Module) -> None:
    """Training mode where LeMo looks for it, in the causal LM and its layers, and nowhere else."""
    parts = find_causal_lm(model)
    model.eval()
    for part in (parts.model, *parts.layers):
        part.training = True


def _algorithm_1(held_out: _HeldOutLoss, layer: int, rounds: int, eps: float, eta: float) -> float:
    threshold = 1.0
    for _ in range(rounds):
        (below, _), (above, _) = (held_out({layer: threshold + step}) for step in (-eps, eps))
        threshold = max(threshold + eta * (below - above) / (2 * eps), 0.0)
    return threshold


def _threshold_for(share: float, scores: Sequence[float]) -> float:
    """Half way between the scores of the last block that is kept and the first that is not."""
    kept = min(max(round(share * len(scores)), 1), len(scores))
    below = scores[kept] if kept < len(scores) else 0.0
    return (scores[kept - 1] + below) / 2


def _guard(
    held_out: _HeldOutLoss, rows: Sequence[LayerThreshold], dense: float, max_increase: float
) -> tuple[list[LayerThreshold], float]:
    """One point a layer, by loss for each token left out, while the loss of all stays within the limit."""
    used: dict[int, LayerThreshold] = {}
    now = dense
    for row in sorted(rows, key=lambda row: row.loss_increase / max(1 - row.kept_share, 1e-9)):
        if row.layer in used or row.kept_share == 1:
            continue
        with_it = {layer: each.threshold for layer, each in used.items()} | {row.layer: row.threshold}
        loss, _ = held_out(with_it)
        if loss - dense <= max_increase:
            used[row.layer], now = row, loss
    return list(used.values()), now


def _within(budget: Budget, rows: Sequence[LayerThreshold], layers: Sequence[int]) -> list[LayerThreshold]:
    sparse = [row for row in rows if row.kept_share < 1]
    return choose({layer: [row for row in sparse if row.layer == layer] for layer in layers}, budget)
