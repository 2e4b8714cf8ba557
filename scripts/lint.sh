#!/usr/bin/env bash
# Formatting, clang-tidy over src/ and ruff. clang-tidy remembers what it passed: a file is checked again only when its
# preprocessed text, .clang-tidy or the tool changes.
set -euo pipefail
cd "$(dirname "$0")/.."
build=build-lint # where every source has a compile command of its own
status=0

echo "== format and ruff"
scripts/format.sh --check || status=1

echo "== clang-tidy"
mkdir -p "$build"
if ! cmake -S . -B "$build" -G Ninja -DCMAKE_UNITY_BUILD=OFF >"$build/configure.log" 2>&1 </dev/null; then
  cat "$build/configure.log" >&2
  exit 1
fi
scripts/tidy.py --build "$build" || status=1

((status == 0)) && echo "lint: clean"
exit $status
