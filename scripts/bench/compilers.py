"""Compilers as contenders: torch.compile's backends, OpenVINO and TVM, compiled cold, checked and timed."""

import contextlib
import importlib.util
import os
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from harness import Race, close, timed
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

BACKENDS = ("inductor", "ollie")
_AUTOTUNE = {"max_autotune": True}
CONTENDERS: dict[str, dict[str, Any]] = {
    "inductor": {"backend": "inductor"},
    "inductor freezing": {"backend": "inductor", "options": {"freezing": True}},
    "inductor max-autotune freezing": {"backend": "inductor", "options": {"freezing": True, **_AUTOTUNE}},
    "openvino": {"backend": "openvino"},
    "tvm": {"backend": "tvm"},
    "ollie": {"backend": "ollie"},  # what a user gets without options
    "ollie freeze": {"backend": "ollie", "options": {"freeze": True}},
    "ollie max-autotune freeze": {"backend": "ollie", "options": {"freeze": True, **_AUTOTUNE}},
}
Compiled = Callable[[Tensor], Any]


def openvino(net: nn.Module, x: Tensor) -> Compiled:
    """OpenVINO's runtime on the converted net: one thread, float32, tensors shared."""
    import openvino as library

    hints = {"INFERENCE_NUM_THREADS": 1, "INFERENCE_PRECISION_HINT": "f32", "PERFORMANCE_HINT": "LATENCY"}
    model = library.convert_model(net, example_input=x, input=[tuple(x.shape)])
    request = library.Core().compile_model(model, "CPU", hints).create_infer_request()
    infer = partial(request.infer, share_inputs=True, share_outputs=True)
    return lambda x: torch.from_numpy(infer([x.numpy()])[0])


def tvm(net: nn.Module, x: Tensor) -> Compiled:
    """TVM's runtime on the exported net: one thread, untuned; naming the CPU as target makes it slower."""
    import tvm as library
    from tvm import relax
    from tvm.relax.frontend.torch import from_exported_program

    module = from_exported_program(torch.export.export(net, (x,)))
    machine = relax.VirtualMachine(library.compile(module, target="llvm"), library.cpu())
    return lambda x: torch.from_dlpack(machine["main"](library.runtime.from_dlpack(x))[0])


RUNTIMES = {"openvino": openvino, "tvm": tvm}  # by what has to be installed
INSTALLED = [name for name in CONTENDERS if name not in RUNTIMES or importlib.util.find_spec(name)]


def freezing(name: str) -> Any:
    """Inductor's freezing for a contender of that name. As an option of torch.compile it comes too late, for
    Dynamo has made the parameters inputs by then; without the option, Dynamo takes a net that is compiled by
    Inductor's default for the same."""
    from torch._inductor import config

    return config.patch(freezing=name.startswith("inductor") and name.endswith("freezing"))


def caches(folder: Path) -> dict[str, str]:
    """The environment in which Inductor and OLLIE keep their caches under `folder`."""
    return {"TORCHINDUCTOR_CACHE_DIR": str(folder / "inductor"), "OLLIE_CACHE_DIR": str(folder / "ollie")}


@contextlib.contextmanager
def cold() -> Iterator[None]:
    """No cache answers: those on disk are in a new folder, and Inductor forgets what it holds in memory, such
    as kernels that another backend had built."""
    from torch._inductor.utils import clear_caches

    clear_caches()
    with tempfile.TemporaryDirectory() as folder, mock.patch.dict(os.environ, caches(Path(folder))):
        yield


@torch.no_grad()
def warm_up() -> None:
    """Pay what only the first compilation of a process pays."""
    with cold():
        for backend in BACKENDS:
            torch.compile(nn.Conv2d(8, 1, 1), backend=backend)(torch.randn(1, 8, 4, 4))


def first_call(name: str, net: nn.Module, x: Tensor, budget_s: float | None = None) -> Compiled:
    """The net compiled by a contender, after its first result; `budget_s` is for OLLIE with options."""
    if name in RUNTIMES:
        compiled = RUNTIMES[name](net, x)
    else:
        how = dict(CONTENDERS[name])
        if how["backend"] == "ollie" and "options" in how:
            how["options"] = {**how["options"], "budget_s": budget_s}
        compiled = torch.compile(net, fullgraph=True, dynamic=False, **how)
    with freezing(name):
        compiled(x)
    return compiled


def largest_error(got: Any, want: Any) -> float:
    """The largest difference of tensors, relative to the largest value of each."""
    pairs = zip(tree_leaves(got), tree_leaves(want), strict=True)
    return max(((g - w).abs().max() / w.abs().max().clamp_min(1e-6)).item() for g, w in pairs)


def equal(got: Any, want: Any) -> float:
    """Their `largest_error`."""
    close(rtol=1e-3, atol=1e-4)(got, want)
    return largest_error(got, want)


@torch.no_grad()
def compare(
    net: nn.Module, x: Tensor, contenders: Sequence[str], rounds: int, calls: int, budget_s: float
) -> dict[str, dict[str, float]]:
    """The columns of eager and of each contender for one net; they must equal eager."""
    running: dict[str, Callable[[], Any]] = {"eager": lambda: net(x)}
    compile_s = {"eager": 0.0}
    for name in contenders:
        torch.compiler.reset()
        try:
            took = timed(partial(first_call, name, net, x, budget_s))
        except Exception as why:  # whatever a runtime raises for operators that it does not know
            if name not in RUNTIMES:
                raise
            print(f"{name} does not take this net: {str(why).splitlines()[-1]}", file=sys.stderr)
            continue
        compile_s[name], running[name] = took.wall, partial(took.result, x)
    for name, call in running.items():  # the resets made all but the last compile anew at the next call
        with freezing(name):
            call()
    race = Race(running, equal=equal)
    times = race.run(rounds, calls=calls)
    best = min(each.median for name, each in times.items() if not name.startswith("ollie"))
    inductor = times["inductor"].median if "inductor" in times else float("nan")
    return {
        name: {
            **each.columns("ms"),
            "speedup_over_best_peer": best / each.median,
            "speedup_over_inductor": inductor / each.median,
            "largest_relative_error": race.errors[name],
            "compile_s": compile_s[name],
        }
        for name, each in times.items()
    }
