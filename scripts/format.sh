#!/usr/bin/env bash
# Rewrites the sources as .clang-format and ruff want them: scripts/format.sh [--check]
set -euo pipefail
cd "$(dirname "$0")/.."
export PATH="$PWD/.venv/bin:$PATH"

mapfile -t cpp < <(git ls-files -co --exclude-standard -- '*.h' '*.cpp' '*.cuh')
mapfile -t existing < <(for file in "${cpp[@]}"; do [[ -e $file ]] && echo "$file"; done)
if [[ ${1:-} == --check ]]; then
  clang-format --dry-run -Werror "${existing[@]}"
  ruff check
  ruff format --check
else
  clang-format -i "${existing[@]}"
  ruff check --fix
  ruff format
fi
