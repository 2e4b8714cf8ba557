#!/usr/bin/env bash
# Builds the libFuzzer programs and runs each: scripts/fuzz.sh SECONDS. With 0 it replays the corpora only.
# A finding is left in build-fuzz/findings/; add it to tests/fuzz/corpus/NAME/ with the fix.
set -euo pipefail
cd "$(dirname "$0")/.."
seconds=${1:-60}
build=build-fuzz

scripts/build.sh $build -DCMAKE_CXX_COMPILER=clang++ -DCMAKE_BUILD_TYPE=RelWithDebInfo \
  -DCMAKE_CXX_FLAGS_RELWITHDEBINFO=-O1 -DOCTOMOE_SANITIZE=address,undefined -DOCTOMOE_INSTALL=OFF \
  -DOCTOMOE_BUILD_FUZZERS=ON -DOCTOMOE_BUILD_TESTS=OFF -DOCTOMOE_BUILD_CLI=OFF
ctest --test-dir $build --output-on-failure --no-tests=error </dev/null
((seconds)) || exit 0

mkdir -p $build/findings
for fuzzer in $build/fuzz_*; do
  [[ -x $fuzzer && -f $fuzzer ]] || continue
  name=${fuzzer##*/fuzz_}
  # New inputs go to a folder of the build; the committed seeds are only read.
  mkdir -p "$build/corpus/$name"
  echo "fuzzing $name for $seconds s"
  "$fuzzer" -max_total_time="$seconds" -rss_limit_mb=2048 -timeout=20 -print_final_stats=1 -verbosity=0 \
    -artifact_prefix="$build/findings/$name-" "$build/corpus/$name" "tests/fuzz/corpus/$name" </dev/null
done
echo "fuzz: no findings"
