#!/usr/bin/env bash
# The demo: the bundled model through every scheme with the command, then the same from Python with its figures.
# scripts/demo.sh [build folder] writes out/run.json and what `python -m octomoe.demo` makes.
set -euo pipefail
cd "$(dirname "$0")/.."
build=$(realpath "${1:-build}")
export OCTOMOE_PYTHON_LIBRARY=$build/python/_octomoe.so
export PYTHONPATH=$PWD/python${PYTHONPATH:+:$PYTHONPATH}
export PATH="$build:$PATH"

mkdir -p out
octomoe run --checkpoint data/tiny-qwen3-moe --scheme all --json out/run.json
.venv/bin/python -m octomoe.demo
