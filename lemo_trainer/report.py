"""The view of a session that users get: the patched layers, and the share of the tokens that they kept."""

from __future__ import annotations

import statistics
import weakref

from torch import nn

from lemo_trainer.config import WITHOUT_CHOICE, LemoConfig
from lemo_trainer.exact.auto import Choice
from lemo_trainer.exact.fake import CannotCountError
from lemo_trainer.exact.plain import plain_bytes
from lemo_trainer.informativeness.predictors import PatternPredictors
from lemo_trainer.layers.wiring import Wiring
from lemo_trainer.session import LemoSession, session_of
from lemo_trainer.sizes import size_text


class LemoReport:
    """The patched parts of a model, and the tokens that its last training batch kept.

    It follows the training and stays readable after `remove_lemo`. `str(report)` is one sentence.
    """

    def __init__(self, session: LemoSession, model: nn.Module) -> None:
        self._session = session
        self._model = weakref.ref(model)

    def at_step(self, step: int) -> None:
        """Follow warm-up and ramp in a training loop of your own: call it in front of each optimizer step.

        Args:
            step: the number of optimizer steps done.
        """
        self._session.at_step(step)

    @property
    def config(self) -> LemoConfig:
        """The configuration in force."""
        return self._session.config

    @property
    def model_type(self) -> str:
        """transformers' name of the architecture."""
        return self._session.model_type

    @property
    def total_layers(self) -> int:
        """Decoder layers of the model."""
        return self._session.total_layers

    @property
    def patched_layers(self) -> tuple[int, ...]:
        """Indices of the layers that leave tokens out."""
        return self._session.patched_layers

    @property
    def wiring(self) -> Wiring | None:
        """How the layers are wired, and which parts stay dense; None under `mode="segments"`."""
        return self._session.wiring

    @property
    def predictors(self) -> PatternPredictors | None:
        """The nets of `selector="predictor"`, with the recall of each layer; None for other selectors."""
        return self._session.selector.predictors

    @property
    def active(self) -> bool:
        """Whether LeMo acts at this step; False in the warm-up and after `remove_lemo`."""
        return self._session.in_force and self._session.active

    @property
    def choice(self) -> Choice | None:
        """What `mode="auto"` chose for the longest batch so far, and why; None before the first batch."""
        choice: Choice | None = self._session.choice
        return choice

    @property
    def logits_made(self) -> bool:
        """Whether a training batch computed all logits, in spite of `loss_segment`.

        It had no `labels`, because its loss is computed outside the model (label smoothing,
        `compute_loss_func`), or the head or the loss function is not the one that LeMo computes in pieces.
        """
        return bool(self._session.all_logits)

    @property
    def seq_len(self) -> int:
        """Tokens of a sample in the last training batch that met a patched layer; 0 before the first."""
        return self._session.seq_len

    @property
    def kept_tokens(self) -> float:
        """How many tokens of a sample a patched layer kept in the last training batch, on average."""
        choices = [kept for layer in self._session.layer_kept.values() for kept in layer]
        return statistics.mean(choices) if choices else self.seq_len

    @property
    def kept_share(self) -> float:
        """Share of the tokens that a patched layer kept in the last training batch, on average."""
        return self.kept_tokens / self.seq_len if self.seq_len else 1.0

    @property
    def layer_shares(self) -> dict[int, float]:
        """The same for each patched layer that the batch met."""
        kept_by_layer = self._session.layer_kept.items()
        return {layer: statistics.mean(kept) / self.seq_len for layer, kept in kept_by_layer}

    @property
    def pieces(self) -> int:
        """Blocks of a sample of that batch; segments, in the modes auto, exact and segments."""
        return self._session.pieces

    @property
    def last_batch(self) -> str:
        """One sentence about the last training batch."""
        config = self.config
        kind = "segments" if config.mode in WITHOUT_CHOICE else "blocks"
        share = "carry gradient" if config.mode != "eliminate" else "are computed"
        return (
            f"samples of {self.seq_len:,} tokens in {self.pieces} {kind} of {self._session.piece_tokens:,}; "
            f"{self.kept_share:.0%} of the tokens {share} in a patched layer"
        )

    def plain_bytes(self, batch_size: int, seq_len: int) -> int:
        """The bytes that a step without LeMo and without checkpointing would save for its backward pass.

        They are counted on fake tensors, which takes some seconds and no memory, for samples of `seq_len`
        tokens. `ActivationBytes` measures those of a step with LeMo.

        Raises:
            ValueError: the model is gone, or a step of it cannot be counted.
        """
        model = self._model()
        if model is None:
            raise ValueError("`plain_bytes` needs the model, which no longer exists: call it earlier.")
        try:
            session = session_of(model) or self._session
            return plain_bytes(model, session.passes, batch_size, seq_len)
        except CannotCountError as error:
            raise ValueError(f"A step of {type(model).__name__} cannot be counted: {error}.") from error

    @property
    def saved_bytes(self) -> str:
        """One sentence about the bytes that wait for the backward pass, or how to get them."""
        predicted = self.choice and self.choice.saved_bytes
        if predicted:
            return against_plain(*predicted, "predicted")
        return "LemoCallback(measure=True) measures the bytes that wait for the backward pass"

    @property
    def kernels(self) -> str:
        """Which of LeMo's own kernels the patched layers call; the rest is the model's own code."""
        if self.config.mode in WITHOUT_CHOICE:
            return "none"
        backend = self._session.kernel_backend
        parts = [f"in {backend}: rows added in place"]
        norms = sorted(self._session.fused_norms.items())
        if norms:
            parts.append(f"norms ({', '.join(f'{count} {name}' for name, count in norms)})")
        if backend == "triton" and self.config.fused_kernels and self.config.mode == "detach":
            parts.append("attention where it is SDPA under a plain causal mask")
        return ", ".join(parts)

    @property
    def notes(self) -> list[str]:
        """Notes on the patched layers, and on the layers that cannot leave tokens out."""
        notes = [] if self.wiring is None else self.wiring.notes(self.patched_layers)
        return self._session.mode_notes + notes

    def __str__(self) -> str:
        text = f"LeMo patched {len(self.patched_layers)} of {self.total_layers} layers"
        if self.config.mode in ("exact", "segments"):
            text += f": segments of {self.config.segment_tokens} tokens"
        if self.choice is not None:
            text += f": {self.choice}"
        elif self.config.mode == "auto":
            text += ": the first batch decides how they run"
        return "; ".join([text, *self.notes])


def against_plain(saved: float, plain: float, how: str) -> str:
    """Bytes that wait for the backward pass, beside those of plain training."""
    return f"{size_text(saved)} wait for the backward pass ({how}), {size_text(plain)} in plain training"
