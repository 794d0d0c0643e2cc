"""Running programs: eager and compiled, what they give compared, and the source that shows a difference alone."""

from __future__ import annotations

import contextlib
import importlib
import inspect
import linecache
import logging
import random
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from tests.ollie.programs import Program

LIMIT = 1e-4  # of the largest value, up to which results are equal
ROUNDING = 2e-5  # of the largest value, by which OLLIE may change the result of an operator
NOISE_RUNS, NOISE_FACTOR = 4, 4.0

Values = list[tuple[str, Any]]


def values(source: str, compiled: Callable[[Any], Any]) -> Values:
    """What a session yields, each value copied at once; an exception ends it and is its last value."""
    name = f"<program {hash(source)}>"
    linecache.cache[name] = (len(source), None, source.splitlines(True), name)
    space: dict[str, Any] = {"__name__": "program"}
    exec(compile(source, name, "exec"), space)
    found: Values = []
    try:
        for label, value in space["session"](compiled):
            found.append((label, pytree.tree_map(_copied, value)))
    except Exception as error:
        found.append(("raised", error))
    return found


def _copied(value: Any) -> Any:
    return value.detach().clone() if isinstance(value, Tensor) else value


def runs(source: str) -> bool:
    """Whether eager torch takes a program."""
    return values(source, lambda f: f)[-1][0] != "raised"


def difference(want: Values, got: Values) -> tuple[str, float] | None:
    """The first label whose values differ, and by how much: relative to the largest, or infinity."""
    for (label, value), (other, result) in zip(want, got, strict=False):
        if label != other:
            return f"{label}, got {other}: {result}", float("inf")
        apart = _apart(value, result)
        if apart > LIMIT:
            return label, apart
    return None if len(want) == len(got) else ("length", float("inf"))


def _apart(want: Any, got: Any) -> float:
    leaves, structure = pytree.tree_flatten(want)
    others, same = pytree.tree_flatten(got)
    if structure != same:
        return float("inf")
    return max(map(_leaf_apart, leaves, others), default=0.0)


def _leaf_apart(want: Any, got: Any) -> float:
    if isinstance(want, Exception):
        return 0.0 if isinstance(got, Exception) else float("inf")
    if not isinstance(want, Tensor):
        return 0.0 if want == got else float("inf")
    if not isinstance(got, Tensor) or (want.shape, want.dtype) != (got.shape, got.dtype):
        return float("inf")
    if not want.is_floating_point():
        return 0.0 if torch.equal(want, got) else float("inf")
    a, b = want.double(), got.double()
    finite = a.isfinite()
    if not torch.equal(finite, b.isfinite()) or not torch.equal(a[~finite].nan_to_num(), b[~finite].nan_to_num()):
        return float("inf")
    if not finite.any():
        return 0.0
    a, b = a[finite], b[finite]
    return ((a - b).abs().max() / a.abs().max().clamp(min=1e-6)).item()


class Noise(TorchDispatchMode):
    """Adds to the results of operators about what OLLIE may round, or their dtype does."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        self.generator = torch.Generator().manual_seed(seed)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        computes = func.namespace == "aten" and not func.is_view and not func._schema.is_mutable
        if computes and isinstance(result, Tensor) and result.is_floating_point() and result.numel():
            level = max(ROUNDING, 2 * torch.finfo(result.dtype).eps) * result.abs().max()
            noise = torch.empty(result.shape, dtype=torch.float64).uniform_(-1, 1, generator=self.generator)
            result.add_((noise * level).to(result.dtype))
        return result


def explained(source: str, want: Values, got: Values) -> bool:
    """Whether rounding alone may change the reference as much as a compiled program's values differ."""
    runs = []
    for seed in range(NOISE_RUNS):
        with Noise(seed):
            runs.append(values(source, lambda f: f))
    if any([label for label, _ in run] != [label for label, _ in want] for run in [*runs, got]):
        return False
    for place, ((_, value), (_, result)) in enumerate(zip(want, got, strict=True)):
        apart = _apart(value, result)
        if apart > LIMIT and not apart <= NOISE_FACTOR * max(_apart(value, run[place][1]) for run in runs):
            return False
    return True


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

    return replaced("ollie_compile.cost.bound_seconds", make)


def drawn_times(seed: int) -> contextlib.AbstractContextManager[None]:
    """Whatever is measured is called once; its time is drawn, so that every decision is made some time."""
    drawn = random.Random(seed)

    def measure(calls, *arguments):
        for call in calls:
            call()
        return [drawn.random() for _ in calls]

    return replaced("ollie_compile.tune.measure", lambda original: measure)


def uncompiled() -> contextlib.AbstractContextManager[None]:
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

    return replaced("torch._inductor.compile_fx.compile_fx", make)


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
        inductors: whether Inductor without OLLIE differs as well.
    """

    rewritten: int
    wrong: tuple[str, float] | None = None
    inductors: bool = False


def compiled_values(program: Program, backend: str) -> Values:
    named = dict(program.named)
    if backend == "inductor":
        given = named["options"]
        named["options"] = {name: given[name] for name in ("fallback_random",) if name in given}
    torch.compiler.reset()
    with styled(program.style, program.seed), torch._dynamo.config.patch(recompile_limit=64):
        return values(program.source, lambda f: torch.compile(f, backend=backend, **named))


def outcome(program: Program) -> Outcome:
    """How a program runs under OLLIE."""
    want = values(program.source, lambda f: f)
    with Rewritten() as rewritten:
        got = compiled_values(program, "ollie")
    wrong = difference(want, got)
    if wrong is None or explained(program.source, want, got):
        return Outcome(rewritten.count)
    return Outcome(rewritten.count, wrong, difference(want, compiled_values(program, "inductor")) is not None)
