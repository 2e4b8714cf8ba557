#!/usr/bin/env bash
# Configures and builds into a folder: scripts/build.sh build [-DNAME=VALUE ...]
# TARGETS="octomoe_cli ..." builds only those. UNITY=ON: several sources at once, which takes half as long from scratch
# and longer after a change (CMAKE_UNITY_BUILD).
set -euo pipefail
cd "$(dirname "$0")/.."
build=$1
shift
jobs=${JOBS:-$(nproc)}
read -ra targets <<<"${TARGETS:-}"

mkdir -p "$build"
if ! cmake -S . -B "$build" -G Ninja "-DCMAKE_UNITY_BUILD=${UNITY:-OFF}" "$@" >"$build/configure.log" 2>&1 </dev/null; then
  cat "$build/configure.log" >&2
  exit 1
fi
if [[ -t 1 ]]; then
  ninja -C "$build" -j "$jobs" "${targets[@]}"
else
  # One line when all is well; ninja prints a failed command's output in full.
  ninja -C "$build" -j "$jobs" --quiet "${targets[@]}" </dev/null
  echo "built $build"
fi
