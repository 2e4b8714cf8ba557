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
log_of() { echo "$logs/${1// /-}.log"; }
report() { # NAME RESULT SECONDS CLOSING
  (($2 == 0)) || status=1
  summary+=("$(printf '%-16s %-6s %4d s  %s' "$1" "$( (($2)) && echo FAILED || echo ok)" "$3" \
    "$(grep -E "$4" "$(log_of "$1")" | tail -n 1 | sed -E 's/^=+ | =+$//g')")")
}
run_suite() { # NAME CLOSING COMMAND...
  local name=$1 closing=$2 begin=$SECONDS result
  shift 2
  printf '\n== %s\n' "$name"
  "$@" 2>&1 </dev/null | tee "$(log_of "$name")"
  result=${PIPESTATUS[0]}
  report "$name" "$result" $((SECONDS - begin)) "$closing"
}

run_suite "C++" 'tests passed' ctest --test-dir "$build" -j "$jobs" --output-on-failure --no-tests=error
# Neither of these fills more than one core: they run side by side.
pytest_closing='(passed|failed|error).* in '
begin=$SECONDS
(
  .venv/bin/python -m pytest -q -ra tests/package >"$(log_of "package, README")" 2>&1 </dev/null
  result=$?
  echo $((SECONDS - begin)) >"$logs/package-seconds"
  exit $result
) &
package=$!
run_suite "Python" "$pytest_closing" .venv/bin/python -m pytest -q -ra tests/python
wait $package
result=$?
printf '\n== %s\n' "package, README"
cat "$(log_of "package, README")"
report "package, README" $result "$(cat "$logs/package-seconds")" "$pytest_closing"

printf '\n== summary\n'
printf '%s\n' "${summary[@]}" | tee "$logs/summary"
exit $status
