#!/usr/bin/env bash
# The tests, lint and types; arguments go to pytest. Property tests draw the same examples each time here, new ones
# when pytest is called by itself.
set -euo pipefail
cd "$(dirname "$0")/.."
source scripts/setup.sh
python scripts/assets.py --quiet
ruff check .
ruff format --check .
mypy
HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1 python -m pytest -n 2 --dist loadscope --no-loadscope-reorder --hypothesis-profile=ci "$@"
