"""What LeMo did to a model, and what it kept of the last training batch."""

from __future__ import annotations

import dataclasses
import functools
import logging
import statistics
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from lemo_trainer.config import LemoConfig
from lemo_trainer.loss import IGNORE_INDEX
from lemo_trainer.predictor import PatternPredictors
from lemo_trainer.probe import Wiring
from lemo_trainer.segments import choose_segments
from lemo_trainer.selection import BlockPlan

logger = logging.getLogger(__name__)


@dataclass
class LemoReport:
    """What was patched, and what the last training batch kept.

    Args:
        config: the configuration in force.
        model_type: transformers' name of the architecture.
        total_layers: decoder layers of the model.
        patched_layers: indices of those that leave tokens out.
        wiring: how its layers are wired, and which parts stay dense; None where that plays no part.
        predictors: what foretells the scores under `selector="predictor"`, with the recall of each layer.
        active: False runs dense although patched (warm-up).
        seq_len: tokens of a sample in the last training batch that met a patched layer; 0 before the first.
        thresholds: `config.layer_thresholds`, of which a search may change the values; 0 is dense, and one
            below 0 keeps everything by the code that leaves tokens out.
        relative_scores: block scores in means of their sample, layer by layer, that a search collects over
            batches by making this a dict.
        layer_kept: how many of them each patched layer kept, choice by choice.
        fused_norms: how many norms of which class LeMo's kernel computes.
        kernel_backend: what LeMo's kernels are written in where the model is, "torch" or "triton".
        logits_made: a training batch without `labels` made all its logits, in spite of `loss_segment`: its
            loss is computed outside the model (label smoothing, `compute_loss_func`).
        mode_notes: what a user should know about how the mode runs on this model.
    """

    config: LemoConfig
    model_type: str
    total_layers: int
    patched_layers: tuple[int, ...]
    wiring: Wiring | None
    predictors: PatternPredictors | None = None
    active: bool = True
    seq_len: int = 0
    thresholds: dict[int, float] = field(init=False)
    relative_scores: dict[int, list[Tensor]] | None = None
    layer_kept: dict[int, list[int]] = field(default_factory=dict)
    fused_norms: Counter[str] = field(default_factory=Counter)
    kernel_backend: str = "torch"
    logits_made: bool = False
    mode_notes: list[str] = field(default_factory=list)
    undo: list[Callable[[], None]] = field(default_factory=list, repr=False)

    def __post_init__(self) -> None:
        self._keep_ratio = self.config.resolved_keep_ratio
        self.thresholds = self.config.layer_thresholds
        self.start_batch(None)

    @property
    def kept_tokens(self) -> float:
        """How many tokens of a sample a patched layer kept in the last training batch, on average."""
        choices = [kept for layer in self.layer_kept.values() for kept in layer]
        return statistics.mean(choices) if choices else self.seq_len

    @property
    def kept_share(self) -> float:
        """Share of the tokens that a patched layer kept in the last training batch, on average."""
        return self.kept_tokens / self.seq_len if self.seq_len else 1.0

    @property
    def layer_shares(self) -> dict[int, float]:
        """The same for each patched layer that the batch met."""
        return {layer: statistics.mean(kept) / self.seq_len for layer, kept in self.layer_kept.items()}

    @property
    def kernels(self) -> str:
        """Which of LeMo's own kernels the patched layers call; the rest is the model's own code."""
        if self.config.mode in ("exact", "segments"):
            return "none"
        parts = [f"in {self.kernel_backend}: rows added in place"]
        if norms := ", ".join(f"{count} {name}" for name, count in sorted(self.fused_norms.items())):
            parts.append(f"norms ({norms})")
        if self.kernel_backend == "triton" and self.config.fused_kernels and self.config.mode == "detach":
            parts.append("attention where it is SDPA under a plain causal mask")
        return ", ".join(parts)

    @property
    def notes(self) -> list[str]:
        """What a user should know about the patched layers and about those that cannot leave tokens out."""
        return self.mode_notes + ([] if self.wiring is None else self.wiring.notes(self.patched_layers))

    def __str__(self) -> str:
        text = f"LeMo patched {len(self.patched_layers)} of {self.total_layers} layers"
        if self.config.mode in ("exact", "segments"):
            text += f": segments of {self.config.segment_tokens} tokens"
        return "; ".join([text, *self.notes])

    def warn_of_logits(self) -> None:
        if not self.logits_made:
            self.logits_made = True
            logger.warning(
                "A training batch came without `labels` (label smoothing, a loss function of your own?): all "
                "its logits are made, so that `loss_segment` saves nothing, and in one segment."
            )

    def at_step(self, step: int) -> None:
        """Follow the schedule: `step` is the number of optimizer steps done."""
        after = step - self.config.warmup_steps
        self.active = after >= 0
        ramp = min(1.0, (after + 1) / (self.config.ramp_steps + 1))
        self._keep_ratio = 1 - (1 - self.config.resolved_keep_ratio) * ramp
        if self.predictors is not None:
            self.predictors.at_step(step)

    def start_batch(self, labels_BS: Tensor | None) -> None:
        """Forget the last training batch; `labels_BS` are those of the new one."""
        self.layer_kept.clear()
        self._labelled_BS = None
        if self.config.protect_labels and labels_BS is not None:
            self._labelled_BS = labels_BS != IGNORE_INDEX
        self._label_weights: list[Tensor | float] = []

    def choose_segments(self, seq_len: int) -> list[bool]:
        """Which segments of a training batch carry gradient (`mode="segments"`)."""
        size, chosen = self.config.segment_tokens, choose_segments(seq_len, self.config, self._keep_ratio)
        self.seq_len = seq_len
        kept = sum(min(size, seq_len - place * size) for place, kept in enumerate(chosen) if kept)
        self.layer_kept.update((layer, [kept]) for layer in self.patched_layers)
        return chosen

    def plan(self, layer: int, seq_len: int) -> BlockPlan | None:
        """What patched layer number `layer` keeps of a training batch; None is everything."""
        self.seq_len = seq_len
        threshold = self.thresholds.get(layer)
        plan = BlockPlan.of(seq_len, self.config, self._keep_ratio if threshold is None else 0.0)
        plan = dataclasses.replace(
            plan,
            threshold=threshold,
            labelled=self._labelled_BS,
            on_chosen=functools.partial(self._note, layer),
        )
        if self.relative_scores is not None:
            plan = dataclasses.replace(plan, on_scored=self.relative_scores.setdefault(layer, []).append)
        if self.active and not plan.keeps_all and threshold != 0:
            return plan
        self.layer_kept[layer] = [seq_len]
        self._label_weights.append(1.0)
        return None

    def label_weights(self) -> Tensor | None:
        """What the label that each token predicts weighs in the gradient, [B, S]; None is 1 for all."""
        if self.config.label_weights == "all" or not self._label_weights:
            return None
        counted = self._label_weights[-1:] if self.config.label_weights == "kept" else self._label_weights
        weight_BS = sum(counted) / len(counted)
        return weight_BS if isinstance(weight_BS, Tensor) else None

    def _note(self, layer: int, index_BK: Tensor) -> None:
        self.layer_kept.setdefault(layer, []).append(index_BK.shape[1])
        if self.config.label_weights != "all":
            kept_BS = torch.zeros(len(index_BK), self.seq_len, device=index_BK.device)
            self._label_weights.append(kept_BS.scatter_(1, index_BK, 1.0))
