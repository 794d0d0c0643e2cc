"""Options of the backend: `torch.compile(model, backend="ollie", options={...})`."""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from types import NoneType
from typing import Any, Self, get_origin

# Seconds that Inductor takes at least for a graph and for each of its operators, on one core without caches.
GRAPH_S, GRAPH_OPERATOR_S = 1.0, 0.02
FROZEN_S = 5.0  # the least budget of a graph whose weights are held: derived programs pay most there
AUTOTUNE_S = 60.0  # the budget of the modes of max-autotune


@dataclass(frozen=True, kw_only=True, slots=True)
class OllieConfig:
    """How far to derive, what to measure and what to check.

    Args:
        max_depth: explorative derivation steps; repairs of guided derivations do not count, and n products
            that are derived together may take n times as many.
        budget_s: seconds that one compiled graph may take beyond Inductor's own: of search, measurement, and
            of compiling derived programs; 0 derives nothing. None is as long as Inductor takes for the graph,
            at least 5 s where weights are held as constants, and a minute in the modes of max-autotune.
        workers: processes that derive the candidates of one operator side by side; they pay where a search
            takes seconds, and more than 1 needs a system that forks processes.
        tune: "measure" compiles the best candidates and times them against the original on this device;
            "model" trusts the cost bound, which is quick and can lose.
        verify: check every candidate that could be used, over the integers, over a prime field and in
            float64; one that fails is dropped and named in the report.
        candidates: how many programs of one operator are compiled and timed.
        tolerance: largest error that a candidate may have in the operator's own dtype, relative to the
            largest value of the result; bilinear decompositions round more than direct sums. In half
            precision twice the error of the original is allowed where that is more.
        non_finite: "exact" derives only programs that add up the products of the original and compute no
            others, so that a NaN or an infinity reaches the results that it reaches in eager torch, and
            nothing overflows that does not overflow there; it leaves out bilinear forms, merged weights and
            padded taps. With "spread" a bilinear form may spread such values over a tile, and values within
            it may be as many times larger as the report says. On inputs whose values have magnitudes 1, 1e4
            and 1e-4 side by side, no result may then err by more than `tolerance` of its own sum of
            |products|.
        margin: share by which a candidate must beat the original to replace it.
        freeze: hold weights as constants, so that their transforms cost nothing at run time; only under
            `torch.no_grad()`. Calls with other or changed weights transform these anew; what is written
            through `weight.data` in place may go unseen (`refreeze`). None holds them where the result can
            be compared with eager's first: on a CPU, for tensors of known sizes, in graphs without side
            effects, and with a budget to compile for.
        half_in_float32: compute products of float16 and bfloat16 on a CPU in float32, which is many times
            faster on CPUs without units for them and rounds less, but not as eager does.
        portable: use torch's own operators alone, as a program must that is exported and runs without Python
            (`inductor_configs` sets it); kernels of this package are left out.
    """

    max_depth: int = 1
    budget_s: float | None = None
    workers: int = 1
    tune: str = "measure"
    verify: bool = True
    candidates: int = 4
    tolerance: float = 2e-5
    non_finite: str = "spread"
    margin: float = 0.05
    freeze: bool | None = None
    half_in_float32: bool = False
    portable: bool = False

    def __post_init__(self) -> None:
        for name, kinds, valid, must in (
            ("max_depth", (int,), lambda value: value >= 0, "a whole number, 0 or more"),
            (
                "budget_s",
                (int, float, NoneType),
                lambda value: value is None or value >= 0,
                "0 or more seconds",
            ),
            ("workers", (int,), lambda value: value >= 1, "a whole number, 1 or more"),
            ("tune", (str,), lambda value: value in ("measure", "model"), '"measure" or "model"'),
            ("verify", (bool,), lambda value: True, "true or false"),
            ("candidates", (int,), lambda value: value >= 1, "a whole number, 1 or more"),
            ("tolerance", (int, float), lambda value: value > 0, "more than 0"),
            ("non_finite", (str,), lambda value: value in ("spread", "exact"), '"spread" or "exact"'),
            ("margin", (int, float), lambda value: 0 <= value < 1, "in [0, 1)"),
            ("freeze", (bool, NoneType), lambda value: True, "true, false or None"),
            ("half_in_float32", (bool,), lambda value: True, "true or false"),
            ("portable", (bool,), lambda value: True, "true or false"),
        ):
            value = getattr(self, name)
            known = isinstance(value, kinds) and (bool in kinds or not isinstance(value, bool))
            if not known or not valid(value):
                raise ValueError(f"`{name}` must be {must}, got {value!r}.")

    def for_mode(self, mode: str | None) -> Self:
        """Itself with the budget of a mode of torch.compile, unless a budget is given."""
        if self.budget_s is not None or mode is None or not mode.startswith("max-autotune"):
            return self
        return dataclasses.replace(self, budget_s=AUTOTUNE_S)

    def budgeted(self, operators: int, inductor_s: float = 0.0) -> Self:
        """Itself with a budget of seconds, for a graph of so many operators.

        Args:
            inductor_s: seconds that Inductor took for the graph, perhaps from its caches.
        """
        if self.budget_s is not None:
            return self
        least_s = FROZEN_S if self.freeze else GRAPH_S
        return dataclasses.replace(self, budget_s=max(inductor_s, least_s + GRAPH_OPERATOR_S * operators))

    @classmethod
    def from_dict(cls, options: Mapping[str, Any]) -> Self:
        """A config from named options.

        Raises:
            ValueError: an option that does not exist, or a value out of its range.
        """
        names = [field.name for field in dataclasses.fields(cls)]
        for key in options:
            if key not in names:
                raise ValueError(f"The ollie backend has no option `{key}`: {_hint(str(key), names, names)}")
        return cls(**options)

    @classmethod
    def with_inductor(cls, options: Mapping[str, Any] | None) -> tuple[Self, dict[str, Any]]:
        """The backend's own config, and those of `options` that are Inductor's.

        Inductor's `freezing` is `freeze`.

        Raises:
            ValueError: an option of neither, a value out of its range, or of another type than Inductor's.
        """
        if options is not None and not isinstance(options, Mapping):
            raise ValueError(f'`options` must be a dict such as {{"freeze": True}}, got {options!r}.')
        names = {field.name for field in dataclasses.fields(cls)}
        own = {key: value for key, value in (options or {}).items() if key in names}
        others = {key: value for key, value in (options or {}).items() if key not in names}
        inductor = inductor_options(others, names) if others else {}
        if "freezing" in inductor:
            own["freeze"] = inductor.pop("freezing") or own.get("freeze", False)
        return cls.from_dict(own), inductor


def inductor_options(options: Mapping[str, Any], others: Collection[str] = ()) -> dict[str, Any]:
    """Options by the names that Inductor's config has for them.

    Args:
        others: names that a wrong one may have been meant for.

    Raises:
        ValueError: a name that Inductor does not know, or a value of another type.
    """
    from ollie_compile.compat import inductor_config as config

    known = config.get_config_copy()
    named = {str(key).replace("-", "_"): value for key, value in options.items()}
    for name, value in named.items():
        if name not in known:
            hint = _hint(name, [*others, *known], sorted(others))
            raise ValueError(f"Neither the ollie backend nor Inductor has an option `{name}`: {hint}")
        kind = config.get_type(name)
        if get_origin(kind) is None and kind is not Any and not isinstance(value, kind):
            wanted = getattr(kind, "__name__", str(kind))
            raise ValueError(f"Inductor's `{name}` must be of type {wanted}, got {value!r}.")
    return named


def mode_options(mode: str | None) -> dict[str, Any]:
    """Inductor's options for a mode of torch.compile; None is "default".

    Raises:
        ValueError: a mode that torch.compile does not know.
    """
    from ollie_compile.compat import list_mode_options

    modes = list_mode_options()
    if mode is not None and mode not in modes:
        raise ValueError(f"`mode` must be one of {', '.join(modes)}, got {mode!r}.")
    return dict(modes[mode]) if mode else {}


def _hint(name: str, names: Collection[str], listed: Collection[str]) -> str:
    near = difflib.get_close_matches(name, names, 1)
    return f"did you mean `{near[0]}`?" if near else f"known options are {', '.join(listed)}."
