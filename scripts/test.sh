#!/usr/bin/env bash
# Runs every test of a build and prints one summary: scripts/test.sh [build folder]
# A failing suite does not stop the others; the exit status says whether all passed.
set -uo pipefail
cd "$(dirname "$0")/.."
build=$(realpath "${1:-build}")
jobs=${JOBS:-$(nproc)}
logs=$build/test-logs
mkdir -p "$logs"

# What the Python tests look for: this build, not another that happens to lie about.
export OCTOMOE_PYTHON_LIBRARY=$build/python/_octomoe.so
export OCTOMOE_BUILD_DIR=$build
export PYTHONPATH=$PWD/python${PYTHONPATH:+:$PYTHONPATH}
export PATH="$build:$PATH"

summary=()
status=0
run_suite() {
  local name=$1 closing=$2 log begin result
  shift 2
  log="$logs/${name// /-}.log"
  printf '\n== %s\n' "$name"
  begin=$SECONDS
  "$@" 2>&1 </dev/null | tee "$log"
  result=${PIPESTATUS[0]}
  ((result == 0)) || status=1
  summary+=("$(printf '%-16s %-6s %4d s  %s' "$name" "$( ((result)) && echo FAILED || echo ok)" $((SECONDS - begin)) \
    "$(grep -E "$closing" "$log" | tail -n 1 | sed -E 's/^=+ | =+$//g')")")
}

run_suite "C++" 'tests passed' ctest --test-dir "$build" -j "$jobs" --output-on-failure --no-tests=error
run_suite "Python" '(passed|failed|error).* in ' .venv/bin/python -m pytest -q -ra tests/python
run_suite "package, README" '(passed|failed|error).* in ' .venv/bin/python -m pytest -q -ra tests/package

printf '\n== summary\n'
printf '%s\n' "${summary[@]}" | tee "$logs/summary"
exit $status
