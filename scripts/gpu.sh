#!/usr/bin/env bash
# The GPU tests and every GPU table in one go, in under 9 minutes and without network; CSVs go to docs/results,
# and a copy to $OUT where that is set. PYTHON names the interpreter (.venv's, else python3).
set -uo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-$([ -x .venv/bin/python ] && echo .venv/bin/python || echo python3)}
export PYTHONPATH=$PWD HF_HUB_OFFLINE=1

if ! found=$("$python" -c 'import torch, sys
if not torch.cuda.is_available(): sys.exit(f"torch {torch.__version__} sees no CUDA device")
print(torch.cuda.get_device_name(), "torch", torch.__version__)' 2>&1); then
    echo "gpu: no GPU, nothing was run: ${found##*$'\n'}" >&2
    exit 2
fi
echo "gpu: $found"

# What the tests and tables import beside torch and transformers; all of it is small.
missing=$("$python" -c 'import importlib.util as u
names = {"pytest": "pytest", "hypothesis": "hypothesis", "peft": "peft", "rich": "rich", "typer": "typer", "yaml": "PyYAML"}
print(*(package for module, package in names.items() if u.find_spec(module) is None))')
if [ -n "$missing" ]; then
    # shellcheck disable=SC2086
    timeout 60 "$python" -m pip install --quiet --no-deps $missing ||
        echo "gpu: without a network these stay missing, and what needs them fails: $missing" >&2
fi

failed=()
run() { # SECONDS NAME COMMAND...
    local limit=$1 name=$2 start=$SECONDS
    shift 2
    echo "gpu: $name"
    timeout "$limit" "$@" || failed+=("$name")
    echo "gpu: $name took $((SECONDS - start)) s of at most $limit"
}
run 150 "tests" "$python" -m pytest -q -m gpu -p no:cacheprovider tests
run 120 "lemo_kernels" "$python" scripts/bench/lemo_kernels.py
run 240 "lemo_gpu" "$python" scripts/bench/lemo_gpu.py

if [ -n "${OUT:-}" ]; then cp docs/results/*.csv "$OUT"; fi
if [ ${#failed[@]} -gt 0 ]; then
    echo "gpu: failed: ${failed[*]}" >&2
    exit 1
fi
