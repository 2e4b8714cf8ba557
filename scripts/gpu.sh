#!/usr/bin/env bash
# The GPU's checks, one command each: scripts/gpu.sh check|sanitize|fuzz|bench [build folder]
#   check     every C++ test that wants a GPU; those that all engines share with each family of kernels forced
#   sanitize  compute-sanitizer memcheck, racecheck, synccheck and initcheck over a reduced suite
#   fuzz      100000 random layers (OCTOMOE_FUZZ_PROBLEMS) in both families against the CPU engine
#   bench     layers beside their floors, one layer taken apart, the grouping study; JSON into $OUT (default: out/)
# Needs a build (make build) with its kernel pack (cmake --build build --target pack), nothing else of the tree's tools.
set -uo pipefail
cd "$(dirname "$0")/.."
what=${1:-check}
build=$(realpath "${2:-build}")
out=${OUT:-out}
mkdir -p "$out"
export LD_LIBRARY_PATH="$build/runtime${LD_LIBRARY_PATH:+:$LD_LIBRARY_PATH}" # libraries that travel with the build
summary=()
status=0
step() {
  local name=$1 begin=$SECONDS result=0
  shift
  "$@" >"$out/$name.log" 2>&1 </dev/null || result=$?
  summary+=("$(printf '%-24s %-6s %4d s  %s' "$name" "$( ((result)) && echo FAILED || echo ok)" $((SECONDS - begin)) \
    "$(grep -E 'PASSED|FAILED  |ERROR SUMMARY|passed|failed' "$out/$name.log" | tail -n 1)")")
  ((result == 0)) || { status=1; grep -E 'Failure|FAILED|rror' -A4 "$out/$name.log" | head -n 40; }
}

case $what in
  check)
    step cuda "$build/octomoe_tests_cuda"
    for family in sm80 sm90; do # where a family cannot run the weights, the other one does
      step "layer_$family" env OCTOMOE_KERNEL_FAMILY=$family "$build/octomoe_tests_layer" "--gtest_filter=*cuda*"
    done
    step gpu "$build/octomoe_tests_gpu"
    step cli env OCTOMOE_CLI="$build/octomoe" "$build/octomoe_tests_cli" "--gtest_filter=GpuCommand.*"
    ;;
  sanitize)
    for tool in memcheck racecheck synccheck initcheck; do
      step "$tool" compute-sanitizer --tool "$tool" --error-exitcode 9 "$build/octomoe_tests_gpu" \
        "--gtest_filter=*Sanitized*"
    done
    ;;
  fuzz)
    # The CPU's part takes longest: a process for each core, with seeds of its own.
    shards=$(nproc)
    total=${OCTOMOE_FUZZ_PROBLEMS:-100000}
    fuzz_all() {
      local pids=() result=0
      for ((i = 1; i <= shards; ++i)); do
        OCTOMOE_NUM_THREADS=1 OCTOMOE_FUZZ_PROBLEMS=$(((total + shards - 1) / shards)) OCTOMOE_FUZZ_SEED=$i \
          "$build/octomoe_tests_gpu" "--gtest_filter=Family.RandomProblems" &
        pids+=($!)
      done
      for pid in "${pids[@]}"; do wait "$pid" || result=1; done
      return $result
    }
    step fuzz fuzz_all
    summary+=("$(grep -c 'PASSED  . 1 test' "$out/fuzz.log") of $shards processes passed, $total problems in all")
    ;;
  bench)
    step layer "$build/octomoe" bench --device cuda --graph --tokens 1,16,128,1024,8192 --min-time 0.1 \
      --json "$out/layer.json"
    step default "$build/octomoe" bench --device cuda --graph --min-time 0.1 --json "$out/default.json"
    step profile "$build/octomoe" bench --device cuda --profile --min-time 0.1 --json "$out/profile.json"
    step grouping "$build/octomoe" bench --device cuda --study grouping --json "$out/grouping.json"
    for name in layer default profile grouping; do
      printf '\n== %s\n' "$name"
      cat "$out/$name.log"
    done
    ;;
  *) echo "usage: scripts/gpu.sh check|sanitize|fuzz|bench [build folder]" >&2; exit 2 ;;
esac
printf '\n== gpu %s\n' "$what"
printf '%s\n' "${summary[@]}"
exit $status
