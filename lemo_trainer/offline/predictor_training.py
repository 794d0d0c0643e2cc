"""Training of the pattern predictors: the base model runs dense and frozen, each layer's nets learn its map.

A step is one forward pass over a batch up to the last layer with a predictor. Each layer's exact map (LeMo,
section 3; from all queries) is computed from its attention's input, and its nets take one step of AdamW
towards it. Hidden units that stay zero are pruned on the way (the paper's elastic size).
"""

from __future__ import annotations

import io
import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from lemo_trainer.config import LemoConfig
from lemo_trainer.files import write_whole
from lemo_trainer.informativeness.predictor_files import base_fingerprint, save_predictors
from lemo_trainer.informativeness.predictors import RANKS, Design, PatternPredictors, recall_at_kept
from lemo_trainer.informativeness.scores import map_scores
from lemo_trainer.informativeness.selection import BlockPlan
from lemo_trainer.offline.observation import Observer

STATE_NAME = "lemo_predict_train.pt"


@dataclass(frozen=True, kw_only=True)
class PredictorTraining:
    """How predictors are trained.

    Args:
        design: "paper" or "max", see `lemo_trainer.informativeness.predictors`.
        ranks: r1, r2 and r3 of each net.
        steps: optimizer steps.
        batch_size: samples of a step, in each process.
        lr: largest learning rate; it rises over a tenth of the steps and falls to zero along a cosine.
        prune_steps: steps between two prunings of the hidden units that stayed zero; 0 never prunes.
        save_steps: steps between two states from which an interrupted run resumes.
        seed: seed of the nets and of the order of the samples.
    """

    design: Design = "max"
    ranks: tuple[int, int, int] = RANKS
    steps: int = 300
    batch_size: int = 1
    lr: float = 3e-3
    prune_steps: int = 100
    save_steps: int = 50
    seed: int = 0

    def __post_init__(self) -> None:
        if self.design not in ("paper", "max"):
            raise ValueError(f"`design` must be paper or max, got {self.design!r}.")
        least = {"steps": 1, "batch_size": 1, "prune_steps": 0, "save_steps": 1}
        for name, value in least.items():
            if getattr(self, name) < value:
                raise ValueError(f"`{name}` must be at least {value}, got {getattr(self, name)}.")
        if min(self.ranks) < 1:
            raise ValueError(f"`ranks` must be at least 1, got {self.ranks}.")
        if not self.lr > 0:
            raise ValueError(f"`lr` must be above 0, got {self.lr}.")


def measure_recall(
    predictors: PatternPredictors, observer: Observer, batches: Sequence[Mapping[str, Any]]
) -> dict[int, float]:
    """Recall by layer: of the `keep_ratio` highest-scoring blocks, the share predicted to be among them."""
    recalls: dict[int, list[float]] = {layer: [] for layer in predictors.layers}
    for batch in batches:
        for seen in observer(batch):
            kept = BlockPlan.of(seen.hidden.shape[1], observer.config).kept_blocks
            predicted_BNN = predictors.pooled_map(seen.index, seen.hidden, seen.mask)
            predicted_BN, exact_BN = (
                map_scores(each, causal_scores=observer.config.causal_scores)
                for each in (predicted_BNN, seen.exact_map)
            )
            recalls[seen.index].append(recall_at_kept(predicted_BN, exact_BN, kept))
    return {layer: statistics.mean(values) for layer, values in recalls.items()}


def train_predictors(
    model: nn.Module,
    samples: Sequence[Mapping[str, Any]],
    held_out: Sequence[Mapping[str, Any]],
    config: LemoConfig,
    training: PredictorTraining,
    folder: str | Path,
) -> PatternPredictors:
    """Train a predictor for each layer that `config` patches, measure its recall and save all in `folder`.

    Runs in as many processes as accelerate started, each on samples of its own. An interrupted run resumes
    from its last saved state when it is started again with the same arguments.

    Args:
        model: the base model; it is not changed.
        samples: samples of one length, each a mapping of the model's arguments to tensors without a batch
            dimension.
        held_out: batches of the model's arguments, for the recall.

    Raises:
        ValueError: there are no samples, or they are shorter than two blocks; hidden states are not finite;
            `folder` holds a run with other arguments.
    """
    from accelerate import Accelerator

    accelerator = Accelerator()
    length = min((len(sample["input_ids"]) for sample in samples), default=0)
    if length < 2 * config.block_size or not held_out:
        raise ValueError(
            f"Predictors need samples of at least two blocks of {config.block_size} tokens and held-out "
            f"text, got {len(samples)} samples of {length} tokens and {len(held_out)} held-out batches."
        )
    folder = Path(folder)
    observer = Observer(model.to(accelerator.device), config)
    run = _Run(observer, training, folder, base_fingerprint(model), accelerator)
    order = torch.randperm(len(samples), generator=torch.Generator().manual_seed(training.seed))
    bar = tqdm(
        total=training.steps,
        initial=run.step,
        desc="predict-train",
        unit="step",
        disable=not accelerator.is_main_process,
    )
    with bar:
        while run.step < training.steps:
            first = run.step * accelerator.num_processes + accelerator.process_index
            batch = order[(first * training.batch_size + torch.arange(training.batch_size)) % len(order)]
            recall = run.take_step(_stack([samples[i] for i in batch.tolist()], accelerator.device))
            bar.update()
            bar.set_postfix(recall=f"{recall:.3f}")
    run.predictors.recall = measure_recall(
        run.predictors, observer, [_to(batch, accelerator.device) for batch in held_out]
    )
    if accelerator.is_main_process:
        save_predictors(run.predictors, folder, run.base)
        (folder / STATE_NAME).unlink(missing_ok=True)
    accelerator.wait_for_everyone()
    return run.predictors


def _stack(samples: list[Mapping[str, Any]], device: torch.device) -> dict[str, Tensor]:
    names = [name for name in samples[0] if name != "labels"]
    return {name: torch.stack([torch.as_tensor(s[name]) for s in samples]).to(device) for name in names}


def _to(batch: Mapping[str, Any], device: torch.device) -> dict[str, Any]:
    return {name: value.to(device) for name, value in batch.items() if name != "labels"}


class _Run:
    """A training run: its state, which is saved and restored, and its steps."""

    def __init__(
        self,
        observer: Observer,
        training: PredictorTraining,
        folder: Path,
        base: dict[str, str],
        accelerator: Any,
    ) -> None:
        self.observer, self.training, self.folder = observer, training, folder
        self.base, self.accelerator = base, accelerator
        self.step = 0
        config = observer.config
        self.signature = repr((training, config.block_size, observer.layers, sorted(base.items())))
        torch.manual_seed(training.seed)
        self.predictors = PatternPredictors(
            observer.layers,
            design=training.design,
            block_size=config.block_size,
            width=observer.parts.model.config.hidden_size,
            ranks=training.ranks,
        )
        state = self._saved_state()
        if state is not None:
            self.predictors.load_tensors(state["tensors"])
            self.step = state["step"]
        self.predictors.to(accelerator.device).train()
        self._make_optimizer()
        if state is not None:
            self.optimizer.load_state_dict(state["optimizer"])
            for net, seen in zip(self._nets(), state["seen"], strict=True):
                net.seen = seen

    def take_step(self, batch: dict[str, Tensor]) -> float:
        """Take one step of every layer's predictor; returns the mean recall of the batch."""
        training = self.training
        warm = max(training.steps // 10, 1)
        turn = (self.step - warm) / max(training.steps - warm, 1) * math.pi
        factor = (self.step + 1) / warm if self.step < warm else 0.5 * (1 + math.cos(turn))
        for group in self.optimizer.param_groups:
            group["lr"] = training.lr * factor
        recalls = []
        for seen in self.observer(batch):
            if not seen.exact_map.isfinite().all():
                raise ValueError(f"Layer {seen.index}: the hidden states of a sample must be finite.")
            loss, predicted_BNN = self.predictors.of(seen.index).loss(seen.hidden, seen.mask, seen.exact_map)
            loss.backward()
            kept = BlockPlan.of(seen.hidden.shape[1], self.observer.config).kept_blocks
            recalls.append(recall_at_kept(map_scores(predicted_BNN), map_scores(seen.exact_map), kept))
        for parameter in self.predictors.parameters():
            parameter.grad = self.accelerator.reduce(parameter.grad, "mean")
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.step += 1
        if training.prune_steps and self.step % training.prune_steps == 0 and self.step < training.steps:
            self._prune()
        if self.step % training.save_steps == 0 and self.accelerator.is_main_process:
            self._save()
        return statistics.mean(recalls)

    def _nets(self) -> list[Any]:
        return [net for i in self.predictors.layers for net in self.predictors.of(i).children()]

    def _prune(self) -> None:
        """Prune the hidden units that were zero in every process."""
        for net in self._nets():
            largest = (self.accelerator.gather(unit[None]).amax(0) for unit in net.seen)
            net.prune(tuple(largest))
        self._make_optimizer()

    def _make_optimizer(self) -> None:
        self.optimizer = torch.optim.AdamW(self.predictors.parameters(), lr=self.training.lr)

    def _save(self) -> None:
        state = {
            "signature": self.signature,
            "step": self.step,
            "tensors": self.predictors.nets.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "seen": [net.seen for net in self._nets()],
        }
        self.folder.mkdir(parents=True, exist_ok=True)
        data = io.BytesIO()
        torch.save(state, data)
        write_whole(self.folder / STATE_NAME, data.getvalue())

    def _saved_state(self) -> dict[str, Any] | None:
        path = self.folder / STATE_NAME
        if not path.is_file():
            return None
        try:
            state: dict[str, Any] = torch.load(path, map_location=self.accelerator.device, weights_only=True)
            same = state["signature"] == self.signature
        except Exception as error:
            raise ValueError(f"{path} is damaged ({error}); remove it to start again.") from error
        if not same:
            raise ValueError(
                f"{self.folder} holds an unfinished run with other arguments; finish it with those, or "
                f"remove {path.name} to start again."
            )
        return state
