#!/usr/bin/env bash
# The tests, lint and types; other arguments go to pytest. Property tests draw the same examples each time here,
# new ones when pytest is called by itself.
#
#   scripts/test.sh --latest [...]   the tests alone, with the newest torch and transformers in an environment of
#                                    its own; says which versions these are and which tests they break
set -euo pipefail
cd "$(dirname "$0")/.."
if [ "${1:-}" = --latest ]; then
    LATEST=1
    shift
fi
source scripts/setup.sh
python scripts/assets.py --quiet --upscalers
tests=(env HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1 python -m pytest -n 2 --dist loadscope --no-loadscope-reorder
    --hypothesis-profile=ci)
if [ -n "${LATEST:-}" ]; then
    versions=$(python -c 'from importlib.metadata import version as v; print(*(f"{n} {v(n)}" for n in ("torch", "transformers")))')
    echo "latest: $versions"
    "${tests[@]}" --tb=line "$@" || { echo "latest: the tests above fail with $versions" >&2; exit 1; }
    echo "latest: everything passes with $versions"
    exit 0
fi
ruff check .
ruff format --check .
mypy
"${tests[@]}" "$@"
