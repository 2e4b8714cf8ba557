#!/usr/bin/env bash
# Builds the micro-benchmarks (with oneDNN as the yardstick where libdnnl-dev is installed) and runs them.
# Arguments go to each program.
set -euo pipefail
cd "$(dirname "$0")/.."
scripts/build.sh build-bench -DOCTOMOE_BUILD_BENCH=ON -DOCTOMOE_BUILD_TESTS=OFF
found=0
for program in build-bench/octomoe_bench_*; do
  [[ -x $program && -f $program ]] || continue
  found=1
  "$program" "$@"
done
((found)) || { echo "bench: no benchmark programs were built" >&2; exit 1; }
