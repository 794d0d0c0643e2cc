"""Thresholds of token elimination (LeMo, Algorithm 1), and the guard that decides which layers use them.

A layer keeps the blocks whose score is at least `threshold` times the mean over the sample's blocks. From 1,
the mean, Algorithm 1 moves each layer's threshold along the slope of the quality on held-out text,

    T <- T + eta * (quality(T + eps) - quality(T - eps)) / (2 * eps),    quality = -loss,

the other layers being dense. The slope alone knows no limit, so a guard follows, which the paper has not:
layers are taken in, those that lose least for what they leave out first, while the loss with all of them
stays within a budget. A layer for which there is no room stays dense.
"""

from __future__ import annotations

import dataclasses
import math
import statistics
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from tqdm import tqdm

from lemo_trainer.architectures import find_causal_lm
from lemo_trainer.config import LemoConfig
from lemo_trainer.patch import apply_lemo, remove_lemo

Batch = Mapping[str, Any]


@dataclass(frozen=True)
class LayerThreshold:
    """What the search found for one layer.

    Args:
        threshold: where Algorithm 1 left it.
        kept_share: share of the tokens that the layer keeps with it.
        loss_increase: by how much the held-out loss rises when this layer alone leaves tokens out.
        used: whether the guard had room for it.
    """

    layer: int
    threshold: float
    kept_share: float
    loss_increase: float
    used: bool


@dataclass(frozen=True)
class ThresholdSearch:
    """The result of `search_thresholds`; `thresholds` is what `LemoConfig` takes."""

    dense_loss: float
    loss: float
    layers: tuple[LayerThreshold, ...]

    @property
    def thresholds(self) -> dict[int, float]:
        return {row.layer: row.threshold for row in self.layers if row.used}


def search_thresholds(
    model: nn.Module,
    batches: Iterable[Batch],
    config: LemoConfig,
    *,
    max_increase: float = 0.05,
    rounds: int = 1,
    eps: float = 0.25,
    eta: float = 1.0,
) -> ThresholdSearch:
    """Find the thresholds of `mode="eliminate"` that cost at most `max_increase` of held-out loss together.

    Args:
        model: the model to fine-tune; it is left as it was.
        batches: held-out batches with `input_ids` and `labels`.
        config: layers, block size and selector; its `keep_ratio` plays no part.
        max_increase: nats a token by which the loss may rise with all layers that leave tokens out; below 0
            it must fall.
        rounds: steps of Algorithm 1; 0 stays at the mean.
        eps: half the distance of its finite difference, in means.
        eta: its step.

    Raises:
        ValueError: `config` has another mode, or a selector without scores of the text; there are no batches,
            or one is shorter than a block; `max_increase` is not a number.
    """
    batches = list(batches)
    check_search(config, max_increase)
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
    losses = len(layers) * (2 * rounds + 2) + 1
    try:
        with torch.no_grad(), tqdm(total=losses, desc="thresholds", unit="loss") as progress:

            def loss(thresholds: dict[int, float]) -> tuple[float, dict[int, float]]:
                """Mean loss over the batches, and the share of the tokens that each layer kept."""
                report.thresholds = dict.fromkeys(layers, 0.0) | thresholds
                progress.update()
                values, kept = [], []
                for batch in batches:
                    values.append(model(**batch).loss.item())
                    kept.append(report.layer_shares)
                shares = {layer: statistics.mean(each[layer] for each in kept) for layer in layers}
                return statistics.mean(values), shares

            dense, _ = loss({})
            rows = []
            for layer in layers:
                threshold = 1.0
                for _ in range(rounds):
                    (below, _), (above, _) = (loss({layer: threshold + step}) for step in (-eps, eps))
                    threshold = max(threshold + eta * (below - above) / (2 * eps), 0.0)
                alone, shares = loss({layer: threshold})
                rows.append(LayerThreshold(layer, threshold, shares[layer], alone - dense, False))
            used: dict[int, float] = {}
            now = dense
            for row in sorted(rows, key=_price):
                with_it, _ = loss(used | {row.layer: row.threshold})
                if row.kept_share < 1 and with_it - dense <= max_increase:
                    used[row.layer], now = row.threshold, with_it
            return ThresholdSearch(
                dense, now, tuple(dataclasses.replace(row, used=row.layer in used) for row in rows)
            )
    finally:
        remove_lemo(model)
        for part, mode in modes.items():
            part.training = mode


def check_search(config: LemoConfig, max_increase: float) -> None:
    """Raise ValueError for what no search can use, before a model is loaded."""
    if config.mode != "eliminate":
        raise ValueError(f'Thresholds are searched for `mode="eliminate"`, got {config.mode!r}.')
    if config.resolved_selector not in ("informativeness", "norm"):
        raise ValueError(
            f"`selector` must be auto, informativeness or norm in a search of thresholds, got "
            f"{config.selector!r}: its scores do not tell one text from another."
        )
    if not math.isfinite(max_increase):
        raise ValueError(f"`max_increase` must be a number of nats, got {max_increase}.")


def _train_without_dropout(model: nn.Module) -> None:
    """Training mode where LeMo looks for it, in the causal LM and its layers, and nowhere else."""
    parts = find_causal_lm(model)
    model.eval()
    for part in (parts.model, *parts.layers):
        part.training = True


def _price(row: LayerThreshold) -> float:
    """Loss for each share of the tokens that the layer leaves out."""
    return row.loss_increase / max(1 - row.kept_share, 1e-9)
