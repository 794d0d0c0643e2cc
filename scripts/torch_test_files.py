"""PyTorch's own test files with another backend in place of those that they name: "inductor", then "ollie".

    python scripts/torch_test_files.py --pytorch CHECKOUT [dynamo/test_hooks.py ...] [--seconds 600]

A checkout of PyTorch brings the files, best at the version that is installed. Whichever of `REPLACED` a test
names, or the default, is replaced by the backend under test. Tests that inspect the backend they name
therefore fail under every other one, which the count under "inductor" shows. Printed are the tests that pass,
fail and are skipped under each backend, and those that pass under one alone. A file runs in one process for
each backend, which ends after `--seconds`; tests that have not run by then are counted for neither.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

REPLACED = ("inductor", "eager", "aot_eager", "aot_eager_decomp_partition")
FILES = (
    *("dynamo/test_verify_correctness.py", "dynamo/test_hooks.py", "dynamo/test_autograd_function.py"),
    *("dynamo/test_aot_autograd.py", "dynamo/test_subgraphs.py", "dynamo/test_unspec.py"),
    *("dynamo/test_modules.py", "dynamo/test_functions.py", "dynamo/test_repros.py", "dynamo/test_misc.py"),
    "inductor/test_torchinductor.py",
)
BACKEND, RESULTS = "TORCH_TESTS_BACKEND", "TORCH_TESTS_RESULTS"  # what the plugin reads


def pytest_configure(config: Any) -> None:
    """As a plugin of pytest: put the backend under test in place of others."""
    import torch
    from torch._dynamo.backends import registry

    backend = os.environ[BACKEND]
    compiler = registry.lookup_backend(backend)
    for name in REPLACED:
        registry._COMPILER_FNS[name] = compiler
    compile_with = torch.compile

    def compiled(model: Any = None, *, backend: Any = "inductor", **named: Any) -> Any:
        if backend in REPLACED:
            backend = os.environ[BACKEND]
        return compile_with(model, backend=backend, **named)

    torch.compile = compiled


def pytest_runtest_logreport(report: Any) -> None:
    """As a plugin of pytest: write what became of each test as soon as it has run."""
    if report.when == "call" or report.outcome != "passed":
        # A test that is expected to fail is so with the backend that it names.
        outcome = "skipped" if hasattr(report, "wasxfail") else report.outcome
        why = str(report.longrepr).strip().splitlines()[-1:] if outcome == "failed" else []
        with Path(os.environ[RESULTS]).open("a") as file:
            file.write(json.dumps([report.nodeid, outcome, *why]) + "\n")


def run(tests: Path, file: str, backend: str, seconds: float) -> dict[str, tuple[str, str]]:
    """What became of each test of a file, and why it failed."""
    with tempfile.TemporaryDirectory() as folder:
        results = Path(folder) / "results"
        results.touch()
        root = Path(__file__).parents[1]
        environment = os.environ | {
            BACKEND: backend,
            RESULTS: str(results),
            "PYTHONPATH": os.pathsep.join([str(root), os.environ.get("PYTHONPATH", "")]),
        }
        command = [sys.executable, "-m", "pytest", "-q", "-p", "scripts.torch_test_files", file]
        options = ["-c", os.devnull, "--rootdir", str(tests), "-p", "no:cacheprovider", "-W", "ignore"]
        try:
            subprocess.run(
                command + options,
                cwd=tests,
                env=environment,
                timeout=seconds,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                check=False,
            )
        except subprocess.TimeoutExpired:
            print(f"{file} under {backend} was ended after {seconds:.0f} s")
        found = [json.loads(line) for line in results.read_text().splitlines()]
    return {name: (outcome, why[0] if why else "") for name, outcome, *why in found}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--pytorch", type=Path, required=True, help="the folder of a checkout")
    parser.add_argument("--seconds", type=float, default=600.0, help="at most, for each file and backend")
    parser.add_argument("--backends", nargs="*", default=["inductor", "ollie"])
    parser.add_argument("files", nargs="*", default=FILES, help="within the checkout's folder `test`")
    options = parser.parse_args()
    tests = (options.pytorch / "test").resolve()
    totals = {backend: Counter[str]() for backend in options.backends}
    for file in options.files:
        if not (tests / file).exists():
            print(f"{file}: not in the checkout")
            continue
        results = {backend: run(tests, file, backend, options.seconds) for backend in options.backends}
        both = set.intersection(*(set(outcomes) for outcomes in results.values()))
        for backend, outcomes in results.items():
            counts = Counter(outcomes[name][0] for name in both)
            totals[backend] += counts
            print(f"{file} {backend}: {_line(counts)}", flush=True)
        for name in sorted(both):
            if len({outcomes[name][0] for outcomes in results.values()}) > 1:
                each = [f"{backend} {' '.join(outcomes[name])}" for backend, outcomes in results.items()]
                print(f"    {name}: {'; '.join(each)}", flush=True)
    for backend, counts in totals.items():
        print(f"all, {backend}: {_line(counts)}")


def _line(counts: Counter[str]) -> str:
    return ", ".join(f"{counts[outcome]} {outcome}" for outcome in ("passed", "failed", "skipped"))


if __name__ == "__main__":
    main()
