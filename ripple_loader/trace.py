"""Offline step 1: which neurons are active for which token, on real text.

A neuron's activation is what its column of `down_proj` is multiplied with. The model runs with its MLPs
streamed from the checkpoint, one at a time, so that it need not fit in memory. Each sequence's active sets
are a file of their own: an interrupted trace goes on where it stopped, and several processes share one.

Dimension key: T tokens, N neurons, H hidden.
"""

from __future__ import annotations

import functools
import hashlib
import json
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import torch
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm import tqdm
from transformers.quantizers.auto import register_quantization_config, register_quantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from ripple_loader.architectures import MLPSite
from ripple_loader.atomic import whole_file
from ripple_loader.checkpoint import fingerprint
from ripple_loader.config import ActiveRule, ReorderConfig
from ripple_loader.quantizer import StreamingQuantizer
from ripple_loader.source import SourceModel

if TYPE_CHECKING:
    from ripple_loader.streaming import Backend

_COUNTED_AT_ONCE = 1024
_SAMPLED_EVERY = 4  # tokens, of which inputs are kept for predictors
BitSets = npt.NDArray[np.uint8]
"""Active sets of one MLP: shape (tokens, ceil(N / 8)), as `numpy.packbits` packs them."""

_DESCRIPTION = "trace.json"


def calibration_sequences(
    calibration: Iterable[Any], tokenizer: Callable[[], Any], tokens: int, sequence_length: int
) -> Iterator[Tensor]:
    """Cut a calibration set into sequences of token ids, int64 of shape (1, <= sequence_length).

    Args:
        calibration: texts, rows of a dataset with a "text" or "input_ids" column, or tensors of token ids.
        tokenizer: makes the tokenizer, once there is a text.
        tokens: stop after so many.
        sequence_length: most tokens of a sequence; documents are joined to fill it.

    Raises:
        TypeError: it is one text, or an item is none of these.
        ValueError: there is not a single sequence.
    """
    if isinstance(calibration, str):
        raise TypeError("`calibration` should be a list of texts, got one str: put it in a list.")
    pending, left = torch.empty(0, dtype=torch.int64, device="cpu"), tokens
    for item in calibration:
        pending = torch.cat([pending, _token_ids(item, tokenizer)])
        while len(pending) >= sequence_length and left > 0:
            taken = min(sequence_length, left)
            yield pending[None, :taken]
            pending, left = pending[sequence_length:], left - taken
        if left <= 0:
            return
    if len(pending):
        yield pending[None, :left]
    elif left == tokens:
        raise ValueError("`calibration` should hold at least one token, got an empty set.")


def _token_ids(item: Any, tokenizer: Callable[[], Any]) -> Tensor:
    if isinstance(item, dict):
        item = item.get("input_ids", item.get("text", item))
    if isinstance(item, str):
        item = tokenizer()(item).input_ids
    if isinstance(item, Tensor) or (isinstance(item, list) and item and isinstance(item[0], int)):
        return torch.as_tensor(item, dtype=torch.int64, device="cpu").flatten()
    raise TypeError(
        "`calibration` should hold texts, rows with a `text` or `input_ids` column, or tensors of token ids, "
        f"got {type(item).__name__}."
    )


def active_mask(activation_TN: Tensor, rule: ActiveRule, share: float, *, exact_zeros: bool) -> Tensor:
    """Which neurons count as active, bool of shape (T, N).

    With exact zeros all that are not zero; elsewhere by `rule`, see `ReorderConfig.active`.
    """
    if exact_zeros:
        return activation_TN != 0
    size_TN = activation_TN.float().abs()
    if rule == "threshold":
        return size_TN >= share * size_TN.amax(-1, keepdim=True)
    mask_TN = torch.zeros_like(size_TN, dtype=torch.bool)
    if rule == "top_k":
        count = max(1, round(share * size_TN.shape[-1]))
        return mask_TN.scatter_(-1, size_TN.topk(count, dim=-1).indices, True)
    energy_TN, order_TN = size_TN.square().sort(dim=-1, descending=True)
    before_TN = energy_TN.cumsum(-1) - energy_TN
    return mask_TN.scatter_(-1, order_TN, before_TN < share * energy_TN.sum(-1, keepdim=True))


class Trace:
    """A finished trace on disk.

    Args:
        directory: what `trace_source` or `ripple trace` made.

    Attributes:
        description: what was traced: fingerprint of the weights, rule, tokens, sequences.

    Raises:
        FileNotFoundError: there is no trace.
        ValueError: it is not finished.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        path = directory / _DESCRIPTION
        if not path.is_file():
            raise FileNotFoundError(f"{directory} should hold a trace, but has no {_DESCRIPTION}.")
        self.description = _read_description(path)
        count = self.description["sequences"]
        self._files = sorted(filter(_is_whole, directory.glob("sequence-*.safetensors")))[:count]
        if missing := count - len(self._files):
            raise ValueError(
                f"{directory} should hold {count} sequences, but {missing} are missing: run the trace again."
            )

    @property
    def exact_zeros(self) -> bool:
        """Whether inactive neurons are exactly zero."""
        return self.description["exact_zeros"]

    def sets(self, layer: int) -> BitSets:
        """The active sets of one MLP, for the tokens that reached it."""
        return np.concatenate(self._tensors(str(layer)))

    def check_inputs(self) -> None:
        """ValueError where a trace with exact zeros is of an earlier version, which kept no inputs."""
        if not self.description.get("inputs_every"):
            raise ValueError(
                f"{self.directory} should hold inputs of the MLPs, which predictors are fitted to: trace the "
                "model again, or reorder with `predictor` 0."
            )

    def inputs(self, layer: int) -> Tensor:
        """Inputs of one MLP, float32, shape (M, H): of every fourth token, where zeros are exact."""
        return torch.from_numpy(np.concatenate(self._tensors(f"{layer}.inputs")))

    def _tensors(self, name: str) -> list[npt.NDArray[Any]]:
        """A tensor of each sequence."""
        parts = []
        for file in self._files:
            with safe_open(file, "np") as stored:
                parts.append(stored.get_tensor(name))
        return parts


def trace_description(source: SourceModel, sequences: list[Tensor], config: ReorderConfig) -> dict[str, Any]:
    """What a trace depends on, as it is written beside it."""
    digest = hashlib.sha256()
    for ids in sequences:
        digest.update(ids.numpy().tobytes())
    return {
        "model": fingerprint([shard.path for shard in source.shards]),
        "mlps": source.layers,
        "neurons": source.neurons,
        "exact_zeros": source.exact_zeros,
        "active": config.active,
        "active_share": config.active_share,
        "sequences": len(sequences),
        "tokens": sum(ids.shape[1] for ids in sequences),
        "token_ids": digest.hexdigest(),
        **({"inputs_every": _SAMPLED_EVERY} if source.exact_zeros else {}),
    }


def cut_sequences(source: SourceModel, calibration: Iterable[Any], config: ReorderConfig) -> list[Tensor]:
    """The calibration set as token ids, made with the model's own tokenizer."""
    from transformers import AutoTokenizer

    tokenizer = functools.cache(lambda: AutoTokenizer.from_pretrained(source.directory))
    return list(calibration_sequences(calibration, tokenizer, config.tokens, config.sequence_length))


@torch.no_grad()
def trace_source(source: SourceModel, sequences: list[Tensor], config: ReorderConfig, out: Path) -> Trace:
    """Run sequences through a model and record its active sets; goes on with what `out` holds already.

    Under `accelerate launch` the processes share the sequences. Memory is that of the model without its MLPs,
    one MLP, and one sequence's activations and active sets.

    Args:
        source: the model.
        sequences: token ids, each of shape (1, length).
        config: what counts as active.
        out: the trace's directory, made if it is missing.

    Raises:
        ValueError: `out` holds another trace.
    """
    from accelerate import PartialState

    description = trace_description(source, sequences, config)
    out.mkdir(parents=True, exist_ok=True)
    path = out / _DESCRIPTION
    if path.exists():
        found = _read_description(path)
        differing = [key for key in description if found.get(key) != description[key]]
        if differing:
            raise ValueError(
                f"{out} should hold a trace of this model, text and rule, but differs in "
                f"{', '.join(differing)}: remove it or choose another directory."
            )
    with whole_file(path) as partial:
        partial.write_text(json.dumps(description, indent=1))
    state = PartialState(cpu=not torch.cuda.is_available())
    mine = range(state.process_index, len(sequences), state.num_processes)
    missing = [number for number in mine if not _is_whole(_sequence_file(out, number))]
    if missing:
        tracer = Tracer(source, config)
        model = load_traced(tracer, state.device)
        with tqdm(
            total=sum(sequences[number].shape[1] for number in mine),
            initial=sum(sequences[number].shape[1] for number in set(mine) - set(missing)),
            unit="token",
            desc="trace",
            disable=not state.is_main_process,
        ) as bar:
            for number in missing:
                model(sequences[number].to(state.device), use_cache=False)
                with whole_file(_sequence_file(out, number)) as partial:
                    save_file(tracer.take(), partial)
                bar.update(sequences[number].shape[1])
    state.wait_for_everyone()
    return Trace(out)


class Tracer:
    """A backend that reads each MLP from the checkpoint, computes all of it and notes what was active."""

    def __init__(self, source: SourceModel, config: ReorderConfig) -> None:
        self.source, self.config = source, config
        self._found: dict[str, npt.NDArray[Any]] = {}

    def __deepcopy__(self, memo: Any) -> Tracer:
        return self  # transformers copies the config that brings the tracer to the model

    def begin(self, tokens: int) -> None:
        pass

    def compute(self, layer: int, x_TH: Tensor, activation: nn.Module, following: int | None) -> Tensor:
        *selecting, down = self.source.architecture.bundle
        factors = [F.linear(x_TH, *self._part(layer, role, x_TH)) for role in selecting]
        a_TN = activation(factors[0])
        for factor_TN in factors[1:]:
            a_TN = a_TN * factor_TN
        mask_TN = active_mask(
            a_TN, self.config.active, self.config.active_share, exact_zeros=self.source.exact_zeros
        )
        self._found[str(layer)] = np.packbits(mask_TN.cpu().numpy(), axis=1)
        if self.source.exact_zeros:
            # safetensors writes what lies in memory, whatever the strides.
            self._found[f"{layer}.inputs"] = np.ascontiguousarray(
                x_TH[::_SAMPLED_EVERY].float().cpu().numpy()
            )
        down_NH, bias_H = self._part(layer, down, x_TH)
        return F.linear(a_TN, down_NH.T, bias_H)

    def _part(self, layer: int, role: Any, like: Tensor) -> tuple[Tensor, Tensor | None]:
        weight, bias = (self.source.part(layer, role, kind) for kind in ("weight", "bias"))
        assert weight is not None
        return weight.to(like), None if bias is None else bias.to(like)

    def take(self) -> dict[str, npt.NDArray[Any]]:
        """The active sets since the last call by number of the MLP, and inputs; empty where no token came."""
        found, self._found = self._found, {}
        for layer in range(self.source.layers):
            found.setdefault(str(layer), np.empty((0, -(-self.source.neurons // 8)), np.uint8))
            if self.source.exact_zeros:
                found.setdefault(f"{layer}.inputs", np.empty((0, self.source.hidden), np.float32))
        return found


@register_quantization_config("ripple_trace")
@dataclass(kw_only=True)
class _TraceConfig(QuantizationConfigMixin):
    """Loads a model with its MLPs computed by a tracer."""

    tracer: Tracer
    quant_method: str = "ripple_trace"


@register_quantizer("ripple_trace")
class _TraceQuantizer(StreamingQuantizer):
    def streamed(self, model: Any, files: list[Path]) -> tuple[list[MLPSite], Backend]:
        tracer = self.quantization_config.tracer
        return tracer.source.architecture.find(model), tracer


def load_traced(tracer: Tracer, device: torch.device) -> Any:
    """The tracer's model; memory is that of the model without its MLPs, and of one MLP when it runs."""
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(
        tracer.source.directory,
        dtype="auto",
        device_map={"": device},
        quantization_config=_TraceConfig(tracer=tracer),
    )


def _sequence_file(directory: Path, number: int) -> Path:
    return directory / f"sequence-{number:06}.safetensors"


def _read_description(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text("utf-8"))
        if found.keys() >= {"tokens", "exact_zeros"} and type(found["sequences"]) is int:
            return found
    except (ValueError, KeyError, AttributeError, RecursionError):
        pass
    raise ValueError(f"{path} should describe a trace, but is damaged: remove {path.parent} and trace again.")


def _is_whole(path: Path) -> bool:
    try:
        with safe_open(path, "np"):
            return True
    except (SafetensorError, OSError):
        return False


def unpack(sets: BitSets, neurons: int) -> npt.NDArray[np.uint8]:
    """Active sets as zeros and ones of shape (tokens, N)."""
    return np.unpackbits(sets, axis=1, count=neurons)


def count_uses(sets: BitSets, neurons: int) -> npt.NDArray[np.int64]:
    """For how many tokens each neuron is active, shape (N,)."""
    counts = np.zeros(neurons, np.int64)
    for start in range(0, len(sets), _COUNTED_AT_ONCE):
        counts += unpack(sets[start : start + _COUNTED_AT_ONCE], neurons).sum(0, dtype=np.int64)
    return counts
