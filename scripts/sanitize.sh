#!/usr/bin/env bash
# Builds and runs the C++ tests under sanitizers: scripts/sanitize.sh address,undefined|thread [ctest arguments]
# The address build is clang's and holds the fuzzers too (scripts/fuzz.sh): its tests replay their corpora. BUILD_CLI=OFF: the
# library alone, without the command and its tests.
set -euo pipefail
cd "$(dirname "$0")/.."
sanitizers=$1
shift
options=(-DCMAKE_BUILD_TYPE=RelWithDebInfo -DCMAKE_CXX_FLAGS_RELWITHDEBINFO=-O1 "-DOCTOMOE_SANITIZE=$sanitizers"
  -DOCTOMOE_INSTALL=OFF "-DOCTOMOE_BUILD_CLI=${BUILD_CLI:-ON}")
case $sanitizers in
  address,undefined)
    build=build-asan
    options+=(-DCMAKE_CXX_COMPILER=clang++ -DOCTOMOE_BUILD_FUZZERS=ON)
    ;;
  thread) build=build-tsan ;;
  *) build=build-$sanitizers ;;
esac

scripts/build.sh $build "${options[@]}"
export ASAN_OPTIONS=detect_stack_use_after_return=1:strict_string_checks=1
export UBSAN_OPTIONS=print_stacktrace=1
export TSAN_OPTIONS=second_deadlock_stack=1
ctest --test-dir $build -j "${JOBS:-$(nproc)}" --output-on-failure --no-tests=error "$@" </dev/null
