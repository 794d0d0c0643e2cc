"""PyTorch's own samples of its operators through torch.compile, compared with eager: "inductor" and "ollie".

    python scripts/torch_tests.py [--operators conv linear] [--dtypes float32] [--samples 4]

The samples are those of `torch.testing._internal.common_methods_invocations.op_db`, which torch tests its own
backends with. "ollie" has the default options; "ollie, forced" replaces whatever it can, however slow that
is. A result is right if it has eager's shape and dtype, and its values up to rounding. Where eager raises an
error, so must the backend.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import math
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree
from tqdm import tqdm

from ollie_compile.backend import CONTEXT, compile_with
from ollie_compile.measure.machine import Machine
from ollie_compile.plan.context import Context
from ollie_compile.report.report import Report

OPERATORS = (
    *(f"nn.functional.{name}{dims}d" for name in ("conv", "conv_transpose") for dims in (1, 2, 3)),
    *("nn.functional.linear", "matmul", "__rmatmul__", "mm", "bmm", "addmm", "addbmm", "baddbmm", "einsum"),
    *("mv", "addmv", "inner", "tensordot", "nn.functional.bilinear"),
    *(f"nn.functional.{name}_pool{dims}d" for name in ("avg", "max", "adaptive_avg") for dims in (1, 2, 3)),
    *(f"nn.functional.{name}_norm" for name in ("batch", "group", "instance", "layer", "rms")),
    "nn.functional.local_response_norm",
)
DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.complex64)
# The largest difference that is rounding, as a share of the largest value.
LIMITS = {torch.float32: 1e-4, torch.float64: 1e-9, torch.bfloat16: 0.03, torch.complex64: 1e-4}
OWN = {"tune": "model", "margin": 0.0, "budget_s": 60, "candidates": 1, "portable": True}

Call = Callable[[], Any]


class Forcing(Machine):
    """A machine on which every program is estimated to be faster than the original."""

    def bound_seconds(self, program: Any, *arguments: Any, **named: Any) -> float:
        return 1e-12 * sum(1 for _ in program.scope.scopes())


FORCED = Context(machine=Forcing())


@dataclass(slots=True)
class Counts:
    """How the samples ran under one backend.

    Attributes:
        wrong: the samples whose results are not eager's, with what differs.
    """

    samples: int = 0
    rewritten: int = 0
    wrong: dict[str, str] = field(default_factory=dict)


def backends() -> dict[str, Callable[[Counts], Any]]:
    """The backends by name, each made for the counts that it adds to."""

    def ours(counts: Counts, context: Context, options: dict[str, Any]) -> Any:
        def backend(graph: Any, inputs: Any) -> Any:
            report = Report()
            compiled = compile_with(graph, inputs, report, options=options, context=context)
            counts.rewritten += report.rewritten
            return compiled

        return backend

    return {
        "inductor": lambda counts: "inductor",
        "ollie": functools.partial(ours, context=CONTEXT, options={}),
        "ollie, forced": functools.partial(ours, context=FORCED, options=OWN),
    }


def samples(
    operators: Sequence[str], dtypes: Sequence[torch.dtype], most: int
) -> Iterator[tuple[str, torch.dtype, Call]]:
    """Calls of torch's samples, at most so many of an operator and dtype, evenly chosen.

    Args:
        operators: parts of their names in `OPERATORS`.
    """
    from torch.testing._internal.common_methods_invocations import op_db

    wanted = {name for name in OPERATORS if any(part in name for part in operators)}
    for operator in op_db:
        if operator.name not in wanted or operator.variant_test_name:
            continue
        for dtype in dtypes:
            if not operator.supports_dtype(dtype, "cpu"):
                continue
            torch.manual_seed(0)
            found = list(operator.sample_inputs("cpu", dtype))
            step = math.ceil(len(found) / most)
            for place, sample in enumerate(found[::step]):
                arguments = (sample.input, *sample.args)
                call = functools.partial(operator.op, *arguments, **sample.kwargs)
                yield f"{operator.name} {dtype} {place * step}".replace("torch.", ""), dtype, call


def run(name: str, dtype: torch.dtype, call: Call, counts: dict[str, Counts]) -> None:
    """Run one sample eagerly and under each backend, and add to the counts."""
    want = _result(call.func, call)
    for backend, make in backends().items():
        if backend not in counts:
            continue
        torch.compiler.reset()
        function = torch.compile(
            lambda arguments, named: call.func(*arguments, **named),
            backend=make(counts[backend]),
            dynamic=False,
        )
        got = _result(function, call, whole=True)
        counts[backend].samples += 1
        if (why := difference(want, got, LIMITS[dtype])) is not None:
            counts[backend].wrong[name] = why


def difference(want: Any, got: Any, limit: float) -> str | None:
    """None, or how a result differs from eager's."""
    if isinstance(want, Exception) or isinstance(got, Exception):
        both = isinstance(want, Exception) and isinstance(got, Exception)
        return None if both else f"{type(got).__name__}: {str(got)[:200]}"
    for a, b in zip(pytree.tree_leaves(want), pytree.tree_leaves(got), strict=True):
        if not isinstance(a, Tensor):
            continue
        if (a.shape, a.dtype) != (b.shape, b.dtype):
            return f"{tuple(b.shape)} {b.dtype} in place of {tuple(a.shape)} {a.dtype}"
        if not a.numel():
            continue
        finite = a.isfinite()
        if not torch.equal(finite, b.isfinite()):
            return "other values are finite"
        wide = torch.complex128 if a.is_complex() else torch.float64
        a, b = (value.to(wide).where(finite, 0) for value in (a, b))
        error = ((a - b).abs().max() / a.abs().max().clamp_min(1e-6)).item()
        if not error <= limit:
            return f"off by {error:.1e} of the largest value"
    return None


def _result(function: Callable[..., Any], call: Any, *, whole: bool = False) -> Any:
    """The result of a sample on copies of its tensors, or the error that it raises."""
    arguments, named = pytree.tree_map_only(Tensor, Tensor.clone, (call.args, call.keywords))
    try:
        with torch.no_grad():
            return function(arguments, named) if whole else function(*arguments, **named)
    except Exception as error:
        return error


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--operators", nargs="*", default=list(OPERATORS), help="parts of their names")
    parser.add_argument("--dtypes", nargs="*", default=[str(dtype)[6:] for dtype in DTYPES])
    parser.add_argument("--samples", type=int, default=1, help="at most, of one operator and dtype")
    parser.add_argument("--backends", nargs="*", default=list(backends()), choices=list(backends()))
    options = parser.parse_args()
    counts = {name: Counts() for name in options.backends}
    dtypes = [getattr(torch, name) for name in options.dtypes]
    operators: Counter[str] = Counter()
    chosen = list(samples(options.operators, dtypes, options.samples))
    with contextlib.suppress(KeyboardInterrupt):  # what has run is counted
        for name, dtype, call in tqdm(chosen, mininterval=20):
            run(name, dtype, call, counts)
            operators[name.partition(" ")[0]] += 1
    print(f"{operators.total()} samples of {len(operators)} operators, torch {torch.__version__}")
    for name, count in counts.items():
        right = count.samples - len(count.wrong)
        print(f"{name}: {right} of {count.samples} as in eager torch, {count.rewritten} operators rewritten")
    inductors = counts["inductor"].wrong if "inductor" in counts else {}
    for name, count in counts.items():
        for sample, why in count.wrong.items():
            if name == "inductor" or sample not in inductors:
                print(f"{name}: {sample}: {why}")


if __name__ == "__main__":
    main()
