"""Offline step 1: record the active neurons of each token of a text.

A neuron's activation is the factor of its column of `down_proj`. The model runs with its MLPs
streamed from the checkpoint, one at a time, so that it need not fit in memory. Each sequence's active sets
are a file of their own, so that an interrupted trace resumes and several processes share one.

Dimension key: T tokens, N neurons, H hidden.
"""

from __future__ import annotations

import functools
import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file
from torch import Tensor
from tqdm import tqdm

from ripple_loader.checkpoint.shards import fingerprint
from ripple_loader.checkpoint.source import SourceModel
from ripple_loader.config import ReorderConfig
from ripple_loader.files import whole_file
from ripple_loader.model.classes import text_inputs
from ripple_loader.offline.active_sets import BitSets
from ripple_loader.offline.tracer import INPUTS_EVERY, Tracer, load_traced

_DESCRIPTION = "trace.json"


class Trace:
    """A finished trace on disk.

    Args:
        directory: written by `trace_source` or `ripple trace`.

    Attributes:
        description: fingerprint of the traced weights, rule, tokens, sequences.

    Raises:
        FileNotFoundError: the directory has no trace.
        ValueError: the trace is not finished.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        path = directory / _DESCRIPTION
        if not path.is_file():
            raise FileNotFoundError(f"{directory} must hold a trace, but has no {_DESCRIPTION}.")
        self.description = _read_description(path)
        count = self.description["sequences"]
        self._files = sorted(filter(_is_whole, directory.glob("sequence-*.safetensors")))[:count]
        if missing := count - len(self._files):
            raise ValueError(
                f"{directory} must hold {count} sequences, but {missing} are missing: run the trace again."
            )

    @property
    def exact_zeros(self) -> bool:
        """Whether inactive neurons are exactly zero."""
        return self.description["exact_zeros"]

    def sets(self, layer: int) -> BitSets:
        """The active sets of one MLP, for the tokens that reached it."""
        return np.concatenate(self._tensors(str(layer)))

    def check_inputs(self) -> None:
        """ValueError if the trace has no inputs of the MLPs, as those of an earlier version."""
        if not self.description.get("inputs_every"):
            raise ValueError(
                f"{self.directory} must hold inputs of the MLPs, which predictors are fitted to: trace the "
                "model again, or reorder with `predictor` 0."
            )

    def inputs(self, layer: int) -> Tensor:
        """Inputs of one MLP, float32, shape (M, H): of every fourth token of a model with exact zeros."""
        return torch.from_numpy(np.concatenate(self._tensors(f"{layer}.inputs")))

    def _tensors(self, name: str) -> list[npt.NDArray[Any]]:
        """A tensor of each sequence."""
        return [stored.get_tensor(name) for stored in self._opened]

    @functools.cached_property
    def _opened(self) -> list[Any]:
        """The files, opened once: each lists all MLPs, of which a mixture of experts has thousands."""
        return [safe_open(file, "np") for file in self._files]


def trace_description(source: SourceModel, sequences: list[Tensor], config: ReorderConfig) -> dict[str, Any]:
    """Everything that a trace depends on, as `trace.json` holds it."""
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
        **({"inputs_every": INPUTS_EVERY} if source.exact_zeros else {}),
    }


@torch.no_grad()
def trace_source(source: SourceModel, sequences: list[Tensor], config: ReorderConfig, out: Path) -> Trace:
    """Run sequences through a model and record its active sets; resumes a trace that `out` holds in part.

    Under `accelerate launch` the processes share the sequences. Memory is that of the model without its MLPs,
    one MLP, and one sequence's activations and active sets.

    Args:
        source: the model.
        sequences: token ids, each of shape (1, length).
        config: which neurons count as active.
        out: the trace's directory, made if it is missing.

    Raises:
        ValueError: `out` holds another trace.
    """
    from accelerate import PartialState

    _describe(out, trace_description(source, sequences, config))
    state = PartialState(cpu=not torch.cuda.is_available())
    mine = range(state.process_index, len(sequences), state.num_processes)
    missing = [number for number in mine if not _is_whole(_sequence_file(out, number))]
    bar = tqdm(
        total=sum(sequences[number].shape[1] for number in mine),
        initial=sum(sequences[number].shape[1] for number in set(mine) - set(missing)),
        unit="token",
        desc="trace",
        disable=not (missing and state.is_main_process),
    )
    with bar:
        if missing:
            tracer = Tracer(source, config)
            model = load_traced(tracer, state.device)
        for number in missing:
            inputs = text_inputs(model.config, sequences[number].to(state.device))
            model(**inputs, use_cache=False)
            with whole_file(_sequence_file(out, number)) as partial:
                save_file(tracer.take(), partial)
            bar.update(sequences[number].shape[1])
    state.wait_for_everyone()
    return Trace(out)


def _describe(out: Path, description: dict[str, Any]) -> None:
    """Write `trace.json` into a directory that is new or holds the same trace."""
    out.mkdir(parents=True, exist_ok=True)
    path = out / _DESCRIPTION
    if path.exists():
        existing = _read_description(path)
        differing = [key for key in description if existing.get(key) != description[key]]
        if differing:
            raise ValueError(
                f"{out} must hold a trace of this model, text and rule, but differs in "
                f"{', '.join(differing)}: remove it or choose another directory."
            )
    with whole_file(path) as partial:
        partial.write_text(json.dumps(description, indent=1))


def _sequence_file(directory: Path, number: int) -> Path:
    return directory / f"sequence-{number:06}.safetensors"


def _read_description(path: Path) -> dict[str, Any]:
    try:
        description: dict[str, Any] = json.loads(path.read_text("utf-8"))
        if description.keys() >= {"tokens", "exact_zeros"} and type(description["sequences"]) is int:
            return description
    except (ValueError, KeyError, AttributeError, RecursionError):
        pass
    raise ValueError(f"{path} must describe a trace, but is damaged: remove {path.parent} and trace again.")


def _is_whole(path: Path) -> bool:
    try:
        with safe_open(path, "np"):
            return True
    except (SafetensorError, OSError):
        return False
