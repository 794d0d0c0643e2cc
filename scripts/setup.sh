#!/usr/bin/env bash
# Makes .venv with everything the demo, the tests and the benchmarks need. Source or run it; a second
# call is free until pyproject.toml, the constraints or the Python change. With LATEST=1 it makes .venv-latest
# instead, with the newest torch and transformers that pip finds, whatever pyproject.toml and the constraints say.
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
venv=.venv${LATEST:+-latest}
stamp=$("$python" --version; cat pyproject.toml scripts/constraints.txt; pwd; [ -z "${LATEST:-}" ] || date +%F)
if [ ! -f $venv/stamp ] || [ "$(cat $venv/stamp)" != "$stamp" ]; then
    echo "setup: installing into $venv"
    "$python" -m venv $venv
    pip=("$venv/bin/python" -m pip install --quiet)
    "${pip[@]}" --upgrade pip
    if [ -n "${LATEST:-}" ]; then
        # The project first, for its other requirements; pip then says which of its bounds the newest two pass.
        "${pip[@]}" -e '.[dev,bench]'
        "${pip[@]}" --upgrade torch transformers
    else
        # torch first and by its exact version, so that a CPU build on disk or in the cache is taken.
        "${pip[@]}" -c scripts/constraints.txt torch
        "${pip[@]}" -c scripts/constraints.txt -e '.[dev,bench]'
    fi
    printf '%s' "$stamp" > $venv/stamp
fi
export PATH="$PWD/$venv/bin:$PATH"
