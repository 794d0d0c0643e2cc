"""Runs programs eager and compiled, and compares their values."""

from __future__ import annotations

import contextlib
import importlib
import linecache
import logging
import random
import re
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from ollie_compile import backend
from tests.ollie.programs import Program

# Shares of a tensor's largest value. Two results that differ by no more than the limit are equal, in programs
# of float32 and of float64. One operator of OLLIE may round by `ROUNDING`; in half precision by half a step.
LIMIT, WIDE_LIMIT = 1e-4, 1e-8
ROUNDING = {torch.float32: 2e-5, torch.float64: 1e-13}
NOISE_RUNS, NOISE_FACTOR = 4, 4.0

Values = list[tuple[str, Any]]


def values(source: str, compiled: Callable[[Any], Any]) -> Values:
    """What a session yields, each value copied at once; an exception ends it and is its last value."""
    name = f"<program {hash(source)}>"
    linecache.cache[name] = (len(source), None, source.splitlines(True), name)
    sys.modules["program"] = module = ModuleType("program")  # Dynamo imports it to go on after a graph break
    exec(compile(source, name, "exec"), vars(module))
    found: Values = []
    try:
        for label, value in module.session(compiled):
            found.append((label, pytree.tree_map(_copied, value)))
    except Exception as error:
        found.append(("raised", error))
    finally:
        del sys.modules["program"]
    return found


def _copied(value: Any) -> Any:
    return value.detach().clone().requires_grad_(value.requires_grad) if isinstance(value, Tensor) else value


def runs(source: str) -> bool:
    """Whether eager torch takes a program."""
    return values(source, lambda f: f)[-1][0] != "raised"


def difference(want: Values, got: Values, limit: float) -> tuple[str, float] | None:
    """The first label whose values differ, and by how much: relative to the largest, or infinity."""
    for (label, value), (other, result) in zip(want, got, strict=False):
        if label != other:
            return f"{label}, got {other}: {result}", float("inf")
        apart = max(_apart(value, result), default=0.0)
        if apart > limit:
            return label, apart
    return None if len(want) == len(got) else ("length", float("inf"))


def _apart(want: Any, got: Any) -> list[float]:
    """How much each tensor or number of a value differs."""
    leaves, structure = pytree.tree_flatten(want)
    others, same = pytree.tree_flatten(got)
    return list(map(_leaf_apart, leaves, others)) if structure == same else [float("inf")]


def _leaf_apart(want: Any, got: Any) -> float:
    if isinstance(want, Exception):
        return 0.0 if isinstance(got, Exception) else float("inf")
    if not isinstance(want, Tensor):
        return 0.0 if want == got else float("inf")
    if not isinstance(got, Tensor) or _kind(want) != _kind(got):
        return float("inf")
    if not want.is_floating_point():
        return 0.0 if torch.equal(want, got) else float("inf")
    a, b = want.detach().double(), got.detach().double()
    finite = a.isfinite()
    if not torch.equal(finite, b.isfinite()) or not torch.equal(
        a[~finite].nan_to_num(), b[~finite].nan_to_num()
    ):
        return float("inf")
    if not finite.any():
        return 0.0
    a, b = a[finite], b[finite]
    return ((a - b).abs().max() / a.abs().max().clamp(min=1e-6)).item()


def _kind(value: Tensor) -> tuple[Any, ...]:
    return value.shape, value.dtype, value.requires_grad


class Noise(TorchDispatchMode):
    """Adds to the results of operators about what OLLIE may round, or their dtype does.

    That is a share of the largest value where values cancel, and else of each value, so that none changes its
    sign: a norm divides by the root of a mean of squares.
    """

    def __init__(self, seed: int) -> None:
        super().__init__()
        self.generator = torch.Generator().manual_seed(seed)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        computes = func.namespace == "aten" and not func.is_view and not func._schema.is_mutable
        if computes and isinstance(result, Tensor) and result.is_floating_point() and result.numel():
            with torch.no_grad():
                cancels = torch.Tag.pointwise not in func.tags and result.amin() < 0 < result.amax()
                level = result.abs().max() if cancels else result.abs()
                level = ROUNDING.get(result.dtype, torch.finfo(result.dtype).eps / 2) * level.double()
                noise = torch.empty(result.shape, dtype=torch.float64).uniform_(
                    -1, 1, generator=self.generator
                )
                result.add_((noise * level).to(result.dtype))
        return result


def explained(program: Program, want: Values, got: Values) -> bool:
    """Whether rounding alone may change the reference as much as a compiled program's values differ.

    Two things are asked. In float64, where rounding changes next to nothing, the program must have eager's
    values. And in its own dtype no tensor may differ by much more than it does where every operator of the
    reference is rounded, or under Inductor without OLLIE: a gradient that is zero but for rounding has no
    other measure.
    """
    return (program.wide or agrees(replace(program, wide=True))) and rounded(program, want, got)


def agrees(program: Program) -> bool:
    """Whether a compiled program has eager's values."""
    want, got = values(program.source, lambda f: f), compiled_values(program)
    return difference(want, got, limit_of(program)) is None or rounded(program, want, got)


def rounded(program: Program, want: Values, got: Values) -> bool:
    """Whether no tensor differs from the reference by more than under Inductor, or with rounded operators."""
    noisy = [values_with("inductor", program.source, program.style, program.seed, program.named)]
    for seed in range(NOISE_RUNS):
        with Noise(seed):
            noisy.append(values(program.source, lambda f: f))
    if any([label for label, _ in run] != [label for label, _ in want] for run in [*noisy, got]):
        return False
    limit = limit_of(program)
    for place, ((_, value), (_, result)) in enumerate(zip(want, got, strict=True)):
        moved = zip(*(_apart(value, run[place][1]) for run in noisy), strict=True)
        for apart, most in zip(_apart(value, result), map(max, moved), strict=False):
            if apart > limit and not apart <= NOISE_FACTOR * most < float("inf"):
                return False
    return True


def limit_of(program: Program) -> float:
    return WIDE_LIMIT if program.wide else LIMIT


@contextlib.contextmanager
def replaced(path: str, make: Callable[[Any], Any]) -> Iterator[None]:
    """Put `make(original)` in the place of a module's attribute."""
    module, _, name = path.rpartition(".")
    owner = importlib.import_module(module)
    original = getattr(owner, name)
    setattr(owner, name, make(original))
    try:
        yield
    finally:
        setattr(owner, name, original)


def rewriting() -> contextlib.AbstractContextManager[None]:
    """Bounds so low that every candidate may beat the original, those with the least to compute first."""

    def make(original):
        return lambda program, *arguments, **named: 1e-9 * original(program, *arguments, limit=0.0)

    return replaced("ollie_compile.measure.bounds.bound_seconds", make)


def drawn_times(seed: int) -> contextlib.AbstractContextManager[None]:
    """Whatever is measured is called once; its time is drawn, so that every decision is made some time."""
    drawn = random.Random(seed)

    def measure(calls, *arguments, **named):
        for call in calls:
            call()
        return [drawn.random() for _ in calls]

    return replaced("ollie_compile.measure.timing.measure", lambda original: measure)


@contextlib.contextmanager
def uncompiled() -> Iterator[None]:
    """Inductor's graphs run as they are after its passes over the joint graph: no kernel is built."""

    def run(gm, example_inputs, **named):
        def call(inputs):
            return gm(*inputs)

        call._boxed_call = True
        return call

    def make(original):
        def compile_graph(gm, example_inputs, inner_compile=run, **named):
            return original(gm, example_inputs, inner_compile=inner_compile, **named)

        return compile_graph

    with (
        replaced("torch._inductor.compile_fx.compile_fx", make),
        replaced("torch._inductor.compile_fx.compile_fx_inner", lambda original: run),  # of frozen graphs
    ):
        yield


@contextlib.contextmanager
def styled(style: str, seed: int) -> Iterator[None]:
    """What the backend of a program is run under.

    Args:
        style: "forced" rewrites whatever it can, "timed" draws what is measured, and both build no kernels;
            "real" is the backend as users have it.
    """
    with contextlib.ExitStack() as stack:
        if style != "real":
            stack.enter_context(uncompiled())
            stack.enter_context(rewriting())
        if style == "timed":
            stack.enter_context(drawn_times(seed))
        yield


class Rewritten(logging.Handler):
    """Counts what the backend says that it rewrote."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def emit(self, record: logging.LogRecord) -> None:
        if said := re.search(r"(\d+) of \d+ convolutions and subprograms rewritten", record.getMessage()):
            self.count += int(said[1])

    def __enter__(self) -> Rewritten:
        self.logger = logging.getLogger("ollie_compile")
        self.level = self.logger.level
        self.logger.setLevel(logging.INFO)
        self.logger.addHandler(self)
        return self

    def __exit__(self, *error: object) -> None:
        self.logger.removeHandler(self)
        self.logger.setLevel(self.level)


@dataclass(slots=True)
class Outcome:
    """How a program ran.

    Attributes:
        rewritten: operators that OLLIE replaced.
        wrong: the first value that differs from eager's, and by how much; None where all are equal.
    """

    rewritten: int
    wrong: tuple[str, float] | None = None


def compiled_values(program: Program) -> Values:
    """What a session yields under OLLIE."""
    return values_with("ollie", program.source, program.style, program.seed, program.named)


def values_with(name: str, source: str, style: str, seed: int, named: dict[str, Any]) -> Values:
    """What a session yields under a backend of torch.compile."""
    if name == "inductor":
        kept = {key: value for key, value in named["options"].items() if key == "fallback_random"}
        named = {**named, "options": kept}
    _reset(style)
    with styled(style, seed), torch._dynamo.config.patch(recompile_limit=64):
        return values(source, lambda f: torch.compile(f, backend=name, **named))


def _reset(style: str) -> None:
    """Forget all compiled graphs; plans stay where they are the same for every program of the style."""
    plans = dict(backend.CONTEXT.plans) if style == "forced" else {}
    torch.compiler.reset()
    backend.CONTEXT.plans.update(plans)


def outcome(program: Program) -> Outcome:
    """How a program runs under OLLIE."""
    want = values(program.source, lambda f: f)
    with Rewritten() as rewritten:
        got = compiled_values(program)
    wrong = difference(want, got, limit_of(program))
    if wrong is not None and explained(program, want, got):
        wrong = None
    return Outcome(rewritten.count, wrong)


def script(program: Program) -> str:
    """Python source that shows how a program runs, wherever `tests` can be imported."""
    return f"""{program.source}
if __name__ == "__main__":
    from tests.ollie.program_runs import show

    show(__file__, {program.style!r}, {program.seed}, {program.named!r})
"""


def show(path: str, style: str, seed: int, named: dict[str, Any]) -> None:
    """Print how much each value of the program in a file differs from eager's, by OLLIE and by Inductor."""
    source = Path(path).read_text()
    want = values(source, lambda f: f)
    for name in ("ollie", "inductor"):
        for (label, value), (_, result) in zip(
            want, values_with(name, source, style, seed, named), strict=False
        ):
            print(name, label, _apart(value, result), result if isinstance(result, Exception) else "")
