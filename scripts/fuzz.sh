#!/usr/bin/env bash
# Runs each libFuzzer program of the sanitized build: scripts/fuzz.sh SECONDS
# A finding is left in build-asan/findings/; add it to tests/fuzz/corpus/NAME/ with the fix.
set -euo pipefail
cd "$(dirname "$0")/.."
seconds=${1:-60}
build=build-asan

scripts/sanitize.sh address,undefined -L '^fuzz$' # builds, and replays the corpora
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
