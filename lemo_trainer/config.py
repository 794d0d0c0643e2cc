"""The configuration of LeMo: which tokens are left out, in which layers and steps."""

from __future__ import annotations

import dataclasses
import difflib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

from lemo_trainer.files import read_yaml
from lemo_trainer.registry import AUTO, SELECTORS, selector_names
from lemo_trainer.sizes import parse_bytes

Mode = Literal["auto", "exact", "segments", "detach", "eliminate"]
LabelWeights = Literal["all", "kept", "share"]
Scheme = Literal["auto", "layers", "segments"]
Boundaries = Literal["memory", "host", "disk"]


NO_CONFIG = '{owner} takes a LemoConfig, such as LemoConfig(mode="detach", keep_ratio=0.5), got {got}.'
_BLOCKS = ("detach", "eliminate")
_SPARSE = ("segments", *_BLOCKS)
# The modes that read each option that some mode does not; in the others it must keep its default.
_READ_BY: dict[str, tuple[str, ...]] = {
    **dict.fromkeys(("memory", "speed"), ("auto",)),
    **dict.fromkeys(("scheme", "boundaries"), ("exact",)),
    "segment_tokens": ("auto", "exact", "segments"),
    **dict.fromkeys(("selective_checkpointing", "save_attention"), ("exact", *_SPARSE)),
    **dict.fromkeys(("keep_ratio", "selector", "warmup_steps", "ramp_steps"), _SPARSE),
    **dict.fromkeys(("block_size", "sink_blocks", "recent_blocks", "layers", "thresholds"), _BLOCKS),
    **dict.fromkeys(("protect_labels", "label_weights", "shared_blocks", "causal_scores"), _BLOCKS),
    **dict.fromkeys(("attention_score_tokens", "mlp_segment", "fused_kernels"), _BLOCKS),
    **dict.fromkeys(("predictors", "predictor_refresh", "predictor_recall"), _BLOCKS),
    "mlp_score_tokens": ("eliminate",),
}
# The mode that an option selects where none is named.
_SELECTS = {**dict.fromkeys(("keep_ratio", "thresholds", "selector"), "detach")}
_SELECTS |= dict.fromkeys(("scheme", "boundaries"), "exact")
_LEAST = {  # whole numbers, and the least that each may be
    **dict.fromkeys(("sink_blocks", "recent_blocks", "warmup_steps", "ramp_steps"), 0),
    **dict.fromkeys(("loss_segment", "mlp_segment", "predictor_refresh"), 0),
    **dict.fromkeys(("block_size", "segment_tokens", "attention_score_tokens", "mlp_score_tokens"), 1),
}
WITHOUT_CHOICE = ("auto", "exact", "segments")  # modes that need no choice of blocks by layer


@dataclass(frozen=True, kw_only=True)
class LemoConfig:
    """Which tokens take part in a training step.

    Args:
        mode: "auto": every token takes part, with the gradient of the unpatched model, in the fastest way
            that fits the memory; only if none fits, or for more `speed`, in "detach" with as large a share as
            possible. "exact": the same gradient, in the way that `scheme` and `boundaries` say. The others
            say what a layer does with an uninformative block. "detach": it computes the block, so that the
            forward pass stays exact, but without gradient and without saving anything; other tokens attend to
            its keys and values as constants. "eliminate": the block skips attention and MLP and passes
            through the residual stream unchanged (the paper's token elimination), which saves more compute
            without checkpointing and degrades small models. "segments": a sample goes forward and backward
            one segment of `segment_tokens` after the other, each attending to the keys and values of earlier
            segments as constants; `keep_ratio` is the share of the segments that carry gradient. Without a
            mode, `keep_ratio`, `thresholds` and `selector` select "detach", `scheme` and `boundaries` select
            "exact", and else it is "auto". An option that the mode does not read is refused.
        memory: what the tensors of a step may take at most under `mode="auto"`: weights, gradients, optimizer
            states and activations, as "12GiB". Empty is what is free when the first batch comes.
        speed: how many times faster than the fastest exact way that fits a step must be under `mode="auto"`.
            Above 1, tokens lose their gradient for it.
        selector: how blocks are ranked: a registered selector (`lemo_trainer.informativeness.selectors`), or
            "auto", which is "random" for segments and else "informativeness".
        shared_blocks: whether the first patched layer chooses for all of them (`mode="detach"` only), which
            keeps more quality than a choice by layer and costs less. None is true under detach without
            `thresholds` and layerdrop, and false otherwise.
        keep_ratio: share of the tokens that a patched layer keeps, above 0 and at most 1, rounded to whole
            blocks; the report shows the exact share. 1 runs the model's own code. None is 1 for segments and
            0.5 otherwise.
        block_size: consecutive tokens that are kept or left out together.
        layers: the patched layers: "auto" (see `resolve_layers`), "all", or indices like "10-28" or
            "3,5,10-28", counted from 0, both ends included; a list of indices works too.
        sink_blocks: first blocks of each sample that are always kept.
        recent_blocks: last whole blocks of each sample that are always kept.
        protect_labels: whether blocks with labels rank before all others but the sink and recent blocks. In
            chats that keeps the answers first, then the most informative blocks of the prompts. Detach and
            eliminate only.
        thresholds: layers and the score above which each keeps a block, as "15:0.8,16-20:1.2" or a mapping;
            a score of 1 is the mean over the sample's blocks. They take the place of `layers` and
            `keep_ratio`; `lemo search-thresholds` finds them.
        causal_scores: whether a block's attention score counts only the queries of that block, and not those
            of later blocks, which inference does not know yet.
        attention_score_tokens: number of evenly spaced queries of each block that score the keys;
            `block_size` takes all of them, as the paper does.
        predictors: folder with the files of `lemo predict-train` (`selector="predictor"` only); empty is the
            model's own folder.
        predictor_refresh: optimizer steps between two in which all layers score exactly and their predictors
            learn from it; 0 never refreshes.
        predictor_recall: least share of the exactly chosen blocks that a predictor must find; below it, its
            layer goes back to exact scores.
        mlp_score_tokens: number of evenly spaced tokens of each block on which the MLP's informativeness is
            measured, to estimate the block's mean. `block_size` measures all tokens, for two thirds of the
            cost of the MLP's forward.
        segment_tokens: consecutive tokens that go forward and backward together (exact and segments).
        scheme: how `mode="exact"` walks backward. "layers": one layer after the other, each run again one
            segment at a time; the input of every layer is kept. "segments": one segment after the other, each
            run again through all layers; keys and values of every layer are kept. "auto": the one that is
            predicted to need less memory.
        boundaries: where scheme "layers" keeps the inputs of the layers until the backward pass: "memory"
            (the model's device), "host" (the CPU's memory) or "disk" (unnamed files in the temporary folder,
            TMPDIR, written and read once each).
        warmup_steps: number of optimizer steps at the start that run dense.
        ramp_steps: optimizer steps after the warm-up in which the kept share falls from 1 to `keep_ratio`.
        label_weights: weight in the gradient of the label that a token predicts (the value of the loss counts
            all labels alike). "all": 1. "kept": 1 if the last patched layer kept the token, else 0, for which
            the head is not differentiated. "share": the share of the choices that kept it. Detach and
            eliminate only.
        loss_segment: labelled tokens that go through the language-model head at a time in training; 0 keeps
            the model's own loss and its logits.
        mlp_segment: chosen tokens of a sample that go through a layer's MLP at a time. The backward pass
            recomputes their intermediate activations, the widest of a layer, instead of saving them: exact,
            for a second forward of the MLP. 0 takes all at once. Detach and eliminate only.
        save_attention: under gradient checkpointing, whether every layer saves the output of its attention
            instead of recomputing it. Exact; it pays at long samples and takes about the bytes of a hidden
            state for each token and layer with gradient. Needs SDPA.
        selective_checkpointing: without gradient checkpointing, whether a layer saves only its matrix
            products and recomputes norms, activation functions and the like in the backward pass, also in
            layers that leave nothing out. Exact; saves about a third of the bytes for a few per cent of time.
        fused_kernels: whether LeMo's own kernels compute the parts of a model that they are known to compute
            exactly (norms; on CUDA the attention under detach); the report names them.
    """

    mode: Mode | None = None
    memory: str = ""
    speed: float = 1.0
    selector: str = AUTO
    shared_blocks: bool | None = None
    keep_ratio: float | None = None
    block_size: int = 64
    layers: str | tuple[int, ...] = "auto"
    sink_blocks: int = 1
    recent_blocks: int = 1
    protect_labels: bool = False
    thresholds: str = ""
    causal_scores: bool = False
    attention_score_tokens: int = 32
    predictors: str = ""
    predictor_refresh: int = 0
    predictor_recall: float = 0.0
    mlp_score_tokens: int = 8
    segment_tokens: int = 512
    scheme: Scheme = "auto"
    boundaries: Boundaries = "memory"
    warmup_steps: int = 0
    ramp_steps: int = 0
    label_weights: LabelWeights = "all"
    loss_segment: int = 256
    mlp_segment: int = 0
    save_attention: bool = False
    selective_checkpointing: bool = True
    fused_kernels: bool = True

    def __new__(cls, *args: Any, **values: Any) -> LemoConfig:
        if args:
            raise TypeError(
                f'LemoConfig takes options by name, such as LemoConfig(mode="segments"), got {args[0]!r}.'
            )
        try:
            check_keys(values, [field.name for field in dataclasses.fields(cls)], "LemoConfig")
        except ValueError as error:
            raise TypeError(str(error)) from None
        return super().__new__(cls)

    def __post_init__(self) -> None:
        selected_by = self._select_mode()
        self._check_choices()
        self._check_numbers()
        self._check_selector()
        if self.label_weights != "all" and not self.loss_segment:
            raise ValueError(
                f"`label_weights` must be 'all' with loss_segment=0, got {self.label_weights!r}: the weights "
                "are applied by the segment-wise loss."
            )
        self._check_mode_reads(selected_by)
        self._check_auto_and_exact()
        self._check_layers()

    def _check_choices(self) -> None:
        choices = {
            "mode": get_args(Mode),
            "selector": selector_names(),
            "label_weights": get_args(LabelWeights),
            "scheme": get_args(Scheme),
            "boundaries": get_args(Boundaries),
        }
        for name, known in choices.items():
            if getattr(self, name) not in known:
                raise ValueError(f"`{name}` must be one of {', '.join(known)}, got {getattr(self, name)!r}.")
        switches = ("protect_labels", "causal_scores", "save_attention", "selective_checkpointing")
        for name in (*switches, "fused_kernels"):
            if not isinstance(getattr(self, name), bool):
                raise ValueError(f"`{name}` must be true or false, got {getattr(self, name)!r}.")
        shared = self.shared_blocks
        if not isinstance(shared, bool | None) or (shared and self.mode != "detach"):
            raise ValueError(
                f'`shared_blocks` must be true, false or none, and not true unless `mode` is "detach", '
                f"got {shared!r} with {self.mode!r}."
            )

    def _check_numbers(self) -> None:
        if not _is_number(self.resolved_keep_ratio) or not 0 < self.resolved_keep_ratio <= 1:
            raise ValueError(f"`keep_ratio` must be above 0 and at most 1, got {self.keep_ratio!r}.")
        for name, least in _LEAST.items():
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < least:
                raise ValueError(f"`{name}` must be a whole number of at least {least}, got {value!r}.")
        if not _is_number(self.predictor_recall) or not 0 <= self.predictor_recall <= 1:
            raise ValueError(f"`predictor_recall` must be from 0 to 1, got {self.predictor_recall!r}.")

    def _check_layers(self) -> None:
        """Check `thresholds` and `layers`, and write both in one form."""
        object.__setattr__(self, "thresholds", _write_thresholds(_parse_thresholds(self.thresholds)))
        for name in ("shared_blocks", "ramp_steps"):
            if self.thresholds and getattr(self, name):
                raise ValueError(
                    f"`{name}` must be left out with `thresholds`, which say how much each layer keeps, "
                    f"got {getattr(self, name)!r}."
                )
        if isinstance(self.layers, list):
            object.__setattr__(self, "layers", tuple(self.layers))
        if self.layers != "auto" and self.layers != "all":
            _parse_layers(self.layers)

    def _check_selector(self) -> None:
        if self.mode not in ("auto", "exact", *SELECTORS[self.resolved_selector].modes):
            raise ValueError(
                f'`selector` must be one of {", ".join(selector_names(self.mode))} with mode="{self.mode}", '
                f"got {self.selector!r}."
            )
        defaults = {field.name: field.default for field in dataclasses.fields(self)}
        for owner, traits in SELECTORS.items():
            for name in traits.options if owner != self.selector else ():
                if getattr(self, name) != defaults[name]:
                    raise ValueError(
                        f'`{name}` must be left out unless `selector` is "{owner}", got '
                        f"{getattr(self, name)!r} with {self.selector!r}."
                    )

    def _given(self) -> dict[str, Any]:
        """The options that are not at their defaults."""
        values = ((field, getattr(self, field.name)) for field in dataclasses.fields(self))
        return {field.name: value for field, value in values if value != field.default}

    def _select_mode(self) -> str:
        """Set `mode` where it is None; returns what chose it, as a part of a sentence."""
        if self.mode is not None:
            return ""
        given = self._given()
        for option, mode in _SELECTS.items():
            if option in given:
                object.__setattr__(self, "mode", mode)
                return f" (which `{option}` selects)"
        object.__setattr__(self, "mode", "auto")
        return " (the default)"

    def _check_mode_reads(self, selected_by: str) -> None:
        for name, value in self._given().items():
            readers = _READ_BY.get(name, (self.mode,))
            if self.mode not in readers:
                raise ValueError(
                    f'`{name}` must be left out with mode="{self.mode}"{selected_by}, which does not read it '
                    f"({_and(readers)} do{'es' * (len(readers) == 1)}), got {value!r}."
                )

    def _check_auto_and_exact(self) -> None:
        if not _is_number(self.speed) or not 1 <= self.speed < math.inf:
            raise ValueError(f"`speed` must be a number of at least 1, got {self.speed!r}.")
        if self.memory:
            parse_bytes("memory", self.memory)
        if self.scheme == "segments" and self.boundaries != "memory":
            raise ValueError(
                '`boundaries` must be "memory" with scheme="segments", which keeps keys and values in their '
                f"place, got {self.boundaries!r}."
            )

    @property
    def resolved_keep_ratio(self) -> float:
        """`keep_ratio`, or the default that None means."""
        if self.keep_ratio is not None:
            return self.keep_ratio
        return 1.0 if self.mode in WITHOUT_CHOICE else 0.5

    @property
    def resolved_shared_blocks(self) -> bool:
        """`shared_blocks`, or the default that None means."""
        if self.shared_blocks is not None:
            return self.shared_blocks
        return self.mode == "detach" and not self.thresholds

    @property
    def resolved_selector(self) -> str:
        """`selector`, or the selector that "auto" means."""
        if self.selector != AUTO:
            return self.selector
        return "random" if self.mode in WITHOUT_CHOICE else "informativeness"

    @property
    def layer_thresholds(self) -> dict[int, float]:
        """The threshold of each layer that has one."""
        return _parse_thresholds(self.thresholds)

    def resolve_layers(self, total: int) -> tuple[int, ...]:
        """Sorted indices of the patched layers of a model with `total` layers.

        "auto" does not patch the last layer, which feeds the head, nor the early layers, which change every
        token much: the first one under "detach", the first half under "eliminate".

        Raises:
            ValueError: an index is not below `total`.
        """
        if self.thresholds:
            return self._within(total, "thresholds", tuple(sorted(self.layer_thresholds)))
        if self.layers == "all":
            return tuple(range(total))
        if self.layers == "auto":
            return tuple(range(1 if self.mode == "detach" else total // 2, total - 1))
        return self._within(total, "layers", _parse_layers(self.layers))

    def _within(self, total: int, name: str, indices: tuple[int, ...]) -> tuple[int, ...]:
        if indices[-1] >= total:
            raise ValueError(
                f"`{name}` must name layers from 0 to {total - 1} in this model, got {getattr(self, name)!r}."
            )
        return indices

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> LemoConfig:
        """Make a config from plain values. Raises ValueError for an unknown key, naming the closest ones."""
        check_keys(values, [field.name for field in dataclasses.fields(cls)], "LemoConfig")
        return cls(**values)

    @classmethod
    def from_yaml(cls, path: str | Path) -> LemoConfig:
        """Read a YAML mapping of this class's fields."""
        return cls.from_dict(read_yaml(path))

    def to_json(self) -> str:
        """The JSON text of `lemo_config.json`; `from_yaml` reads it too."""
        return json.dumps(dataclasses.asdict(self), indent=2) + "\n"


def check_keys(values: Mapping[str, Any], known: list[str], owner: str) -> None:
    """Raise ValueError for the first key of `values` that is not in `known`."""
    for key in values:
        if key not in known:
            close = difflib.get_close_matches(str(key), known, n=3, cutoff=0.4) or sorted(known)
            raise ValueError(f"{owner} has no option {key!r}; the closest are {', '.join(close)}.")


def _and(names: Sequence[str | None]) -> str:
    *first, last = map(str, names)
    return f"{', '.join(first)} and {last}" if first else last


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _parse_layers(layers: str | tuple[int, ...]) -> tuple[int, ...]:
    indices: set[int] = set()
    try:
        for part in layers.split(",") if isinstance(layers, str) else layers:
            first, _, last = str(part).strip().partition("-")
            run = range(int(first), int(last or first) + 1)
            if not run:
                raise ValueError
            indices.update(run)
    except (TypeError, ValueError):
        indices = set()
    if not indices:
        raise ValueError(f'`layers` must be "auto", "all" or indices like "3,10-28", got {layers!r}.')
    return tuple(sorted(indices))


def _parse_thresholds(thresholds: str | Mapping[int, float]) -> dict[int, float]:
    values: dict[int, float] = {}
    try:
        if isinstance(thresholds, Mapping):
            values = {int(layer): float(value) for layer, value in thresholds.items()}
        else:
            for part in thresholds.split(",") if thresholds else ():
                layers, _, value = part.partition(":")
                values |= dict.fromkeys(_parse_layers(layers), float(value))
    except (TypeError, ValueError):
        values = {-1: math.nan}
    if not all(layer >= 0 and 0 <= value < math.inf for layer, value in values.items()):
        raise ValueError(f'`thresholds` must be like "15:0.8,16-20:1.2", got {thresholds!r}.')
    return values


def _write_thresholds(values: Mapping[int, float]) -> str:
    return ",".join(f"{layer}:{value:g}" for layer, value in sorted(values.items()))
