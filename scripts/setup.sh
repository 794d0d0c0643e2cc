#!/usr/bin/env bash
# Makes .venv with everything the demo, the tests and the benchmarks need. Source or run it; a second
# call is free until pyproject.toml, the constraints or the Python change.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
python=${PYTHON:-python3}
"$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || {
    echo "setup: Python 3.11 or newer is needed, $("$python" --version 2>&1) is $(command -v "$python"); set PYTHON=..." >&2
    exit 2
}
command -v "${CXX:-c++}" >/dev/null || {
    echo "setup: a C++ compiler is needed (torch.compile builds its kernels with it); install g++ or clang, or set CXX=..." >&2
    exit 2
}
stamp=$("$python" --version; cat pyproject.toml scripts/constraints.txt; pwd)
if [ ! -f .venv/stamp ] || [ "$(cat .venv/stamp)" != "$stamp" ]; then
    echo "setup: installing into .venv"
    "$python" -m venv .venv
    .venv/bin/python -m pip install --quiet --upgrade pip
    # torch first and by its exact version, so that a CPU build on disk or in the cache is taken.
    .venv/bin/python -m pip install --quiet -c scripts/constraints.txt torch
    .venv/bin/python -m pip install --quiet -c scripts/constraints.txt -e '.[dev,bench]'
    printf '%s' "$stamp" > .venv/stamp
fi
export PATH="$PWD/.venv/bin:$PATH"
