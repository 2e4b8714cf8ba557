#!/usr/bin/env bash
# Compiles the catalogue for every architecture into one pack and checks it: no spill, no local memory, tensor-core
# instructions where they are expected. scripts/packs.sh [build folder]
set -euo pipefail
cd "$(dirname "$0")/.."
build=$(realpath "${1:-build}")
export PATH="$PWD/.venv/bin:$PATH" OCTOMOE_PYTHON="$PWD/.venv/bin/python" # NVRTC and nvdisasm of the wheels there
pack=$build/share/octomoe/kernels.pack
mkdir -p "$(dirname "$pack")"
"$build/octomoe" pack --arch sm_80,sm_86,sm_89,sm_90a --out "$pack"
"$build/octomoe" pack --check "$pack" >"$build/pack-check.txt" || {
  grep -E 'kernel|spill|local|IMMA|C75|fault' "$build/pack-check.txt" >&2
  exit 1
}
tail -n 6 "$build/pack-check.txt"
