"""One application of LeMo to a model: its schedule, the tokens that each training batch keeps, its undo.

`apply_lemo` creates a session and attaches it to the model; `LemoReport` shows it. For each batch, the
patched layers and the patched causal LM ask the session how much to keep, and report to it the tokens that
they kept.

Shapes: B batch, S tokens, K kept tokens of a sample.
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
import itertools
import logging
import statistics
from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from lemo_trainer.compat import loss_is_made_by_trl, unwrap
from lemo_trainer.config import LemoConfig
from lemo_trainer.head.checks import why_all_logits
from lemo_trainer.head.forward import forward_with_segmented_loss
from lemo_trainer.head.loss import IGNORE_INDEX
from lemo_trainer.informativeness.selection import BlockPlan
from lemo_trainer.informativeness.selectors import Selector
from lemo_trainer.layers.segments import choose_segments
from lemo_trainer.layers.wiring import Wiring
from lemo_trainer.model.architectures import CausalLM
from lemo_trainer.model.patching import Passes

logger = logging.getLogger(__name__)

_WITHOUT_LABELS = "it came without `labels` (label smoothing, a loss function of your own?)"
PATIENCE = 8  # batches after which a loop without a callback is told that LeMo does nothing


class LemoSession:
    """The state of one patched model and its training.

    Args:
        selector: ranks the blocks; its `config` is the configuration in force.
        model_type: transformers' name of the architecture.
        total_layers: decoder layers of the model.
        patched_layers: indices of those that leave tokens out.
        wiring: how the layers are wired; None for the modes "exact" and "segments", which need not know.

    Attributes:
        active: False runs dense although patched (warm-up).
        keep_ratio: share of the tokens to keep at this step of the schedule.
        thresholds: `config.layer_thresholds`. A search changes the values: 0 makes a layer dense, and a
            negative one keeps everything but runs the code that leaves tokens out.
        relative_scores: block scores in means of their sample by layer, collected over batches while a search
            makes this a dict.
        seq_len: tokens of a sample in the last training batch that met a patched layer; 0 before the first.
        pieces: blocks or segments of such a sample, the last of which may be shorter.
        piece_tokens: tokens of a block or segment.
        batches: training batches so far, without those of the warm-up.
        working_batches: those of them that were long enough to leave something out, or to be cut.
        layer_kept: tokens that each patched layer kept of the last training batch, choice by choice.
        fused_norms: how many norms of each class LeMo's kernel computes.
        kernel_backend: what LeMo's kernels are written in on the model's device, "torch" or "triton".
        passes: tells the training passes, in which the patches act, from all others.
        labels_BS: labels of the training pass that begins, [B, S].
        all_logits: why training batches computed all their logits, in spite of `loss_segment`.
        told_of_logits: not empty after a warning about `outputs.logits` that were made on demand.
        choice: what `mode="auto"` chose for the longest batch so far (`exact.auto.Choice`); None before the
            first, and in other modes.
        on_batch: called when a training batch begins.
        mode_notes: what a user should know about how the mode runs on this model.
    """

    def __init__(
        self,
        selector: Selector,
        model_type: str,
        total_layers: int,
        patched_layers: tuple[int, ...],
        wiring: Wiring | None = None,
    ) -> None:
        self.selector = selector
        self.config: LemoConfig = selector.config
        self.model_type = model_type
        self.total_layers = total_layers
        self.patched_layers = patched_layers
        self.wiring = wiring
        self._follow_schedule(0)
        self._batches_without_step: int | None = None  # since `apply_lemo`, until the first `at_step`
        self.thresholds = self.config.layer_thresholds
        self.relative_scores: dict[int, list[Tensor]] | None = None
        self.seq_len = 0
        self.pieces = self.piece_tokens = 0
        self.batches = self.working_batches = 0
        self._longest = 0
        self._warned_idle = False
        self.layer_kept: dict[int, list[int]] = {}
        self._kept: dict[int, float] = {}  # since the last `take_shares`, by layer
        self._tokens: dict[int, int] = {}
        self._samples = 0  # of the present batch; 0 when its tokens are counted
        self.fused_norms: Counter[str] = Counter()
        self.kernel_backend = "torch"
        self.all_logits: list[str] = []
        self.told_of_logits: list[bool] = []
        self.mode_notes: list[str] = []
        self.passes = Passes()
        self.choice: Any = None
        self.on_batch: Callable[[], None] = lambda: None
        self._undo: list[Callable[[], None]] = []
        self.labels_BS: Tensor | None = None
        self.start_batch()
        self._batches_without_step = 0

    def become(self, other: LemoSession) -> None:
        """Go on as `other`, which patched nothing yet; this session's own patches are off."""
        assert not self._undo
        names = ("choice", "mode_notes", "passes", "told_of_logits", "all_logits")
        vars(self).update(vars(other) | {name: getattr(self, name) for name in names})

    def on_undo(self, step: Callable[[], None]) -> None:
        """Remember how to take a patch off again."""
        self._undo.append(step)

    def undo(self) -> None:
        """Take all patches off, the last one first."""
        while self._undo:
            self._undo.pop()()

    @property
    def in_force(self) -> bool:
        """Whether the model is patched: not any more after `undo`."""
        return bool(self._undo)

    def at_step(self, step: int) -> None:
        """Follow the schedule: `step` is the number of optimizer steps done."""
        self._batches_without_step = None
        self._follow_schedule(step)
        self.selector.at_step(step)

    def _follow_schedule(self, step: int) -> None:
        after = step - self.config.warmup_steps
        self.active = after >= 0
        ramp = min(1.0, (after + 1) / (self.config.ramp_steps + 1))
        self.keep_ratio = 1 - (1 - self.config.resolved_keep_ratio) * ramp

    def start_batch(self) -> None:
        """Forget the last training batch; the new one has the labels in `labels_BS`, if the model got any."""
        self._check_schedule()
        self._count_batch()
        self.layer_kept.clear()
        self.on_batch()
        labels_BS, self.labels_BS = self.labels_BS, None
        self._samples = 1 if labels_BS is None else len(labels_BS)
        self._labelled_BS = None
        if self.config.protect_labels and labels_BS is not None:
            self._labelled_BS = labels_BS != IGNORE_INDEX
        self._label_weights: list[Tensor | float] = []

    def _check_schedule(self) -> None:
        """Warn once if nobody tells the steps of a training that begins with a warm-up or a ramp."""
        if self._batches_without_step is None or not (self.config.warmup_steps or self.config.ramp_steps):
            return
        self._batches_without_step += 1
        if self._batches_without_step == PATIENCE:
            logger.warning(
                "LeMo is still at step 0 of warmup_steps=%d and ramp_steps=%d: in a loop of your own, call "
                "report.at_step(step) in front of each optimizer step (report = apply_lemo(model, config)).",
                self.config.warmup_steps,
                self.config.ramp_steps,
            )

    def choose_segments(self, seq_len: int) -> list[bool]:
        """Which segments of a training batch carry gradient (`mode="segments"`)."""
        chosen = choose_segments(seq_len, self.selector, self.keep_ratio)
        self.note_segments(seq_len, self.config.segment_tokens, chosen)
        return chosen

    def note_segments(self, seq_len: int, size: int, chosen: list[bool] | None = None) -> None:
        """Note the tokens of a sample and of a segment, and which segments carry gradient; None is all."""
        if self.config.mode != "segments":  # exact mode has no `start_batch`, and keeps all tokens
            self._count_batch()
            self._samples = 1
        sizes = [min(size, seq_len - start) for start in range(0, seq_len, size)]
        kept = sum(itertools.compress(sizes, chosen or itertools.repeat(True)))
        self.seq_len, self.pieces, self.piece_tokens = seq_len, len(sizes), size
        self.layer_kept = {layer: [kept] for layer in self.patched_layers}
        self._note_work(len(sizes) > 1)

    def plan(self, layer: int, seq_len: int, samples: int = 1) -> BlockPlan | None:
        """How many blocks patched layer number `layer` keeps of a training batch; None keeps everything."""
        self._samples = samples
        size = self.piece_tokens = self.config.block_size
        self.seq_len, self.pieces = seq_len, -(-seq_len // size)
        threshold = self.thresholds.get(layer)
        plan = BlockPlan.of(seq_len, self.config, self.keep_ratio if threshold is None else 0.0)
        plan = dataclasses.replace(
            plan,
            threshold=threshold,
            labelled=self._labelled_BS,
            layer=layer,
            on_chosen=functools.partial(self._note, layer),
        )
        if self.relative_scores is not None:
            plan = dataclasses.replace(plan, on_scored=self.relative_scores.setdefault(layer, []).append)
        if self.active and layer == self.patched_layers[0]:
            self._note_work(not plan.keeps_all)
        if self.active and not plan.keeps_all and threshold != 0:
            return plan
        self.layer_kept[layer] = [seq_len]
        self._label_weights.append(1.0)
        return None

    def take_shares(self) -> dict[int, float]:
        """The share of all tokens that each patched layer kept since the last call of this method."""
        self._count_batch()
        shares = {layer: self._kept[layer] / tokens for layer, tokens in self._tokens.items()}
        self._kept.clear()
        self._tokens.clear()
        return shares

    def _count_batch(self) -> None:
        for layer, choices in self.layer_kept.items() if self._samples else ():
            kept = self._samples * statistics.mean(choices)
            self._kept[layer] = self._kept.get(layer, 0) + kept
            self._tokens[layer] = self._tokens.get(layer, 0) + self._samples * self.seq_len
        self._samples = 0

    def _note_work(self, works: bool) -> None:
        self.batches += 1
        self._longest = max(self._longest, self.seq_len)
        self.working_batches += works
        if self.batches == PATIENCE:
            self.warn_if_idle()

    def warn_if_idle(self) -> None:
        """Warn once if every training batch so far was too short for LeMo to have something to do."""
        if not self.batches or self.working_batches or self._warned_idle:
            return
        by_blocks = self.config.mode not in ("exact", "segments")
        if by_blocks and self.config.resolved_keep_ratio == 1 and not self.thresholds:
            return  # as it was asked for
        self._warned_idle = True
        option = "block_size" if by_blocks else "segment_tokens"
        extra = " (or `sink_blocks` and `recent_blocks`, which are always kept)" if by_blocks else ""
        logger.warning(
            "LeMo has had nothing to do in the %d training batches so far: samples of up to %d tokens are "
            "too short for %s=%d. Lower `%s`%s, or give longer samples.",
            self.batches,
            self._longest,
            option,
            getattr(self.config, option),
            option,
            extra,
        )

    def label_weights(self) -> Tensor | None:
        """How much the label that each token predicts weighs in the gradient, [B, S]; None is 1 for all."""
        if self.config.label_weights == "all" or not self._label_weights:
            return None
        counted = self._label_weights[-1:] if self.config.label_weights == "kept" else self._label_weights
        weight_BS = sum(counted) / len(counted)
        return weight_BS if isinstance(weight_BS, Tensor) else None

    def forward_with_loss(
        self, parts: CausalLM, forward: Callable[..., Any], arguments: inspect.BoundArguments
    ) -> Any:
        """A training pass of the causal LM by its own `forward`, with the segment-wise loss where that fits.

        Raises:
            ValueError: `label_weights` need the segment-wise loss, and the batch needs all logits.
        """
        config, given = self.config, arguments.arguments
        if not config.loss_segment or loss_is_made_by_trl(given):  # TRL makes its loss in pieces itself
            return forward(*arguments.args, **arguments.kwargs)
        without_labels = given.get("labels") is None
        why = _WITHOUT_LABELS if without_labels else why_all_logits(parts, arguments)
        if why and config.label_weights != "all":
            raise ValueError(
                f"`label_weights` must be 'all' in a batch that needs all its logits, got "
                f"{config.label_weights!r}: {why}."
            )
        if why:
            self._warn_of_logits(why)
            return forward(*arguments.args, **arguments.kwargs)
        return forward_with_segmented_loss(
            parts, forward, arguments, config.loss_segment, self.label_weights, self.told_of_logits
        )

    def _warn_of_logits(self, why: str) -> None:
        if why not in self.all_logits:
            self.all_logits.append(why)
            logger.warning(
                "All logits of a training batch are computed at once, so that `loss_segment` saves nothing: "
                "%s.",
                why,
            )

    def _note(self, layer: int, index_BK: Tensor) -> None:
        self.layer_kept.setdefault(layer, []).append(index_BK.shape[1])
        if self.config.label_weights != "all":
            kept_BS = torch.zeros(len(index_BK), self.seq_len, device=index_BK.device)
            self._label_weights.append(kept_BS.scatter_(1, index_BK, 1.0))


def session_of(model: nn.Module) -> LemoSession | None:
    """The session of a patched model, plain or wrapped; None for an unpatched one."""
    session: LemoSession | None = getattr(unwrap(model), "_lemo", None)
    return session
