"""The two configurations: `ReorderConfig` for the offline stage, `RippleConfig` for the loader."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Literal, Self, get_args

from ripple_loader.compat import QuantizationConfigMixin
from ripple_loader.registry import ACTIVE_RULES, BUNDLES, CACHE_POLICIES, PLACEMENTS

IOEngine = Literal["auto", "aio", "threads"]
StrategyName = Literal["auto", "dense", "sparse"]

RECALLS = (0.8, 0.999)
"""The range of `recall` that predictors are calibrated for."""

_UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}


def parse_size(size: int | str, name: str, *, total: int | None = None) -> int:
    """Bytes meant by `size`: a number of bytes, "512MiB", "2GB" or, where `total` is given, "25%" of it.

    Raises:
        ValueError: `size` has another form, or is not positive.
    """
    if isinstance(size, int) and not isinstance(size, bool) and size > 0:
        return size
    if match := re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*(%|[KMG]?i?B)?\s*", str(size), re.IGNORECASE):
        number, unit = float(match[1]), (match[2] or "").upper()
        if unit == "%" and total is not None and 0 < number <= 100:
            return int(total * number / 100)
        if unit in _UNITS and number * _UNITS[unit] >= 1:
            return int(number * _UNITS[unit])
    ways = 'a positive number of bytes or a size such as "512MiB"'
    ways += ' or a share such as "25%" (at most 100%)' if total is not None else ""
    raise ValueError(f"`{name}` must be {ways}, got {size!r}.")


def _check_choice(value: str, name: str, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise ValueError(f"`{name}` must be one of {', '.join(choices)}, got {value!r}.")


def check_share(value: float, name: str, *, zero: bool = False) -> None:
    """Raise a ValueError unless `value` is a number from 0, or above it without `zero`, to 1."""
    if not isinstance(value, int | float) or not 0 <= value <= 1 or not (value or zero):
        least = "at least" if zero else "above"
        raise ValueError(f"`{name}` must be {least} 0 and at most 1, got {value!r}.")


def _check_count(value: int, name: str) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ValueError(f"`{name}` must be a positive whole number, got {value!r}.")


def check_keys(given: Iterable[str], valid: Iterable[str], what: str) -> None:
    """Raise a ValueError that names the first unknown key and the most similar valid ones."""
    valid = sorted(valid)
    for key in given:
        if key not in valid:
            close = difflib.get_close_matches(str(key), valid, n=3) or valid
            raise ValueError(f"{what} has no key {key!r}; did you mean {', '.join(close)}?")


def read_recipe(path: str | Path) -> dict[str, dict[str, Any]]:
    """The sections of a YAML recipe: "reorder" and "load", each optional.

    Raises:
        FileNotFoundError: `path` does not exist.
        ValueError: it is not YAML, not a mapping, or has an unknown section.
    """
    import yaml

    try:
        recipe = yaml.safe_load(Path(path).read_text("utf-8")) or {}
    except FileNotFoundError:
        raise FileNotFoundError(f"No such file: {path} (expected a YAML recipe).") from None
    except yaml.YAMLError as error:
        raise ValueError(f"{path} must be YAML: {' '.join(str(error).split())}.") from None
    if not isinstance(recipe, dict) or not all(isinstance(part, dict) for part in recipe.values()):
        raise ValueError(f"{path} must map the sections `reorder` and `load` to their options.")
    check_keys(recipe, ("load", "reorder"), str(path))
    return recipe


@dataclass(frozen=True, kw_only=True)
class ReorderConfig:
    """How `reorder` traces a model and places its neurons.

    Attributes:
        placement: order of the neurons on disk. "linked" is Ripple's greedy linking of co-activated neurons;
            "spectral" sorts by the Fiedler vector of their graph; "frequency" by how often each is active;
            "identity" keeps the model's order; "random".
        tokens: calibration tokens to trace; an eighth of them is held back to estimate reads per token.
        sequence_length: tokens of one calibration sequence.
        active: the rule for which neurons count as active where the activation has no exact zeros (SiLU,
            GELU): "top_k", the `active_share` of a layer's neurons with the largest activation; "threshold",
            those with at least that share of the token's largest activation; "energy", the fewest that hold
            that share of the sum of squares. ReLU models ignore both.
        active_share: see `active`; with "top_k" use the `keep` you will run with.
        partners: co-activation partners kept for each neuron when linking.
        two_opt: improve a linked or spectral order by 2-opt.
        hot_share: share of all neurons, the most active of any MLP, that is stored first, stays out of the
            linking, and is pinned in memory as far as the budget reaches. The best value is about the share
            that you will have memory for; with 0 no neuron is pinned.
        predictor: rank of the low-rank predictors of ReLU models (`RippleConfig.recall`), as a share of the
            hidden size; with 0 the copy has no predictors.
        bundles: how the sidecar stores weights; "same" as the checkpoint. "int8" and "int4" round them, with
            a scale for each 32 weights: shorter reads, other results.
        sketches: store the int8 sketches, which select neurons. Without them the sidecar is up to a quarter
            smaller and streams with `keep` 1; a ReLU model then selects with predictors (`recall`) only.
        sidecar_only: write the sidecar only, and stream everything else from the original weight files, which
            must stay as and where they are.
        workers: layers placed at once.
        seed: seed of the random placement.
    """

    placement: str = "linked"
    tokens: int = 8192
    sequence_length: int = 512
    active: str = "top_k"
    active_share: float = 0.5
    partners: int = 32
    two_opt: bool = True
    hot_share: float = 0.1
    predictor: float = 0.125
    bundles: str = "same"
    sketches: bool = True
    sidecar_only: bool = False
    workers: int = 2
    seed: int = 0

    def __post_init__(self) -> None:
        PLACEMENTS.check(self.placement)
        ACTIVE_RULES.check(self.active)
        BUNDLES.check(self.bundles)
        check_share(self.active_share, "active_share")
        check_share(self.hot_share, "hot_share", zero=True)
        check_share(self.predictor, "predictor", zero=True)
        for name in ("tokens", "sequence_length", "partners", "workers"):
            _check_count(getattr(self, name), name)

    @classmethod
    def from_options(cls, options: dict[str, Any]) -> Self:
        """Build from a plain mapping; ValueError for an unknown key."""
        check_keys(options, (field.name for field in fields(cls)), cls.__name__)
        return cls(**options)

    @classmethod
    def from_yaml(cls, path: str | Path) -> Self:
        """Build from the `reorder` section of a recipe, leaving out the paths that the CLI takes from it."""
        options = read_recipe(path).get("reorder", {})
        paths = ("model", "calibration", "trace", "out")
        return cls.from_options({key: value for key, value in options.items() if key not in paths})


@dataclass(kw_only=True)
class RippleConfig(QuantizationConfigMixin):
    """How a reordered checkpoint is loaded: `from_pretrained(dir, quantization_config=RippleConfig(...))`.

    Treat an instance as frozen; transformers' base class rules out `frozen=True`.

    Attributes:
        dram_budget: most memory that Ripple holds for the streamed MLPs: buffers, sketches or predictors, and
            the neuron cache. Bytes, a size ("2GiB") or a share of the streamed weights ("25%"). It does not
            cover the rest of the model (embeddings, attention, KV cache).
        keep: share of each layer's neurons computed per token, those with the largest estimated contribution.
            1.0 is exact: a ReLU model then reads only its active neurons, others read all of them.
        recall: share of a ReLU model's active neurons to find. 1.0 is exact: an int8 sketch, a quarter of the
            float32 weights that select, rules out neurons that cannot be active. Below 1, low-rank
            predictors, a sixth to a quarter of the sketch and faster, miss about 1 - `recall` of the active
            neurons, mostly the least active; they are calibrated on the calibration text.
        adjacency: with `keep` below 1, the share of a neuron's estimated contribution that is the mean of
            its pair, two neighbours on the drive: fewer, longer reads for a little quality. 0 scores each
            neuron by itself; without selection of neurons the option has no effect.
        strategy: "sparse" reads and computes the neurons that are selected, "dense" reads and computes all of
            them, in order, which is exact whatever `keep` is; "auto" chooses the one that is cheaper on this
            drive and processor.
        merge_gap: most unneeded bytes to read in order to join two reads; "auto" follows the drive's model.
        prefetch: read neurons that the next layer will probably select while the drive would be idle.
        buffer: most bytes of one read buffer; there are three, each at most an eighth of the budget.
            "auto" is an eighth of an MLP, from 2 to 16 MiB.
        queue_depth: reads in flight.
        io_engine: "aio" lets the kernel keep them in flight, "threads" has a thread for each, up to 16;
            "auto" is "aio" where the kernel and the file system have it.
        cache_policy: policy of the neuron cache. "linked" is S3-FIFO that seldom admits long runs; "s3fifo"
            and "lru" admit every neuron that is read.
        check_reads: check the checksums of what is read as it is read.
        verify: check every checksum of the sidecar before loading (reads it once).
    """

    quant_method: str = "ripple"  # the name that transformers' registry has for this loader
    dram_budget: int | str = "50%"
    keep: float = 1.0
    recall: float = 1.0
    adjacency: float = 0.0
    strategy: StrategyName = "auto"
    merge_gap: int | str = "auto"
    prefetch: bool = True
    buffer: int | str = "auto"
    queue_depth: int = 32
    io_engine: IOEngine = "auto"
    cache_policy: str = "linked"
    check_reads: bool = True
    verify: bool = False

    def __post_init__(self) -> None:
        if self.quant_method != "ripple":
            raise ValueError(f'`quant_method` must be "ripple", got {self.quant_method!r}.')
        parse_size(self.dram_budget, "dram_budget", total=1)
        if self.buffer != "auto":
            parse_size(self.buffer, "buffer")
        if self.merge_gap not in (0, "auto"):
            parse_size(self.merge_gap, "merge_gap")
        check_share(self.keep, "keep")
        if self.recall != 1 and not (
            isinstance(self.recall, float) and RECALLS[0] <= self.recall <= RECALLS[1]
        ):
            raise ValueError(
                f"`recall` must be 1 or between {RECALLS[0]} and {RECALLS[1]}, got {self.recall!r}."
            )
        if self.recall < 1 and self.keep < 1:
            raise ValueError("`recall` and `keep` must not both be below 1: each of them leaves neurons out.")
        check_share(self.adjacency, "adjacency", zero=True)
        _check_count(self.queue_depth, "queue_depth")
        _check_choice(self.strategy, "strategy", get_args(StrategyName))
        _check_choice(self.io_engine, "io_engine", get_args(IOEngine))
        CACHE_POLICIES.check(self.cache_policy)

    @classmethod
    def from_options(cls, options: dict[str, Any]) -> Self:
        """Build from a plain mapping; ValueError for an unknown key."""
        check_keys(options, (field.name for field in fields(cls)), cls.__name__)
        return cls(**options)

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], return_unused_kwargs: bool = False, **kwargs: Any) -> Any:
        """transformers' constructor from the dict form and from config.json."""
        config = cls.from_options({**config_dict, **kwargs})
        return (config, {}) if return_unused_kwargs else config

    @classmethod
    def from_yaml(cls, path: str | Path) -> Self:
        """Build from the `load` section of a recipe."""
        return cls.from_options(read_recipe(path).get("load", {}))
