#!/usr/bin/env bash
# LeMo, Ripple and OLLIE each do their main job on a real model; prints a table for each, appends to
# docs/results/*.csv and writes out/report.html. Needs Python >= 3.11, pip and a C++ compiler.
set -euo pipefail
cd "$(dirname "$0")/.."
source scripts/setup.sh
python scripts/assets.py
python scripts/bench/lemo_main.py
python scripts/bench/ripple_main.py
python scripts/bench/ollie_main.py --budget-s 30
python scripts/report.py
