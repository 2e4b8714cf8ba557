#!/usr/bin/env bash
# Makes a fresh Debian 12+ or Ubuntu 24.04+ machine ready: Debian packages, then .venv with pinned Python packages.
# Runs again in well under a second when nothing has changed.
#
#   scripts/setup.sh          what `make demo` and `make test` need
#   scripts/setup.sh --dev    also clang, clang-tidy and libFuzzer's run time, for `make lint` and `make fuzz`
#   scripts/setup.sh --dev --packages    the Debian packages alone
#
# PYTHON=/path/to/python3 chooses the interpreter that .venv is made from: 3.11 or newer, which the pinned packages of
# demo and tests ask for. The package itself runs on 3.10.
set -euo pipefail
cd "$(dirname "$0")/.."

packages=(ca-certificates ccache cmake g++ libcli11-dev libfmt-dev libgmock-dev libgtest-dev libhwy-dev
  libxxhash-dev libzstd-dev ninja-build nlohmann-json3-dev pkg-config)
[[ ${1:-} == --dev ]] && packages+=(clang clang-tidy libclang-rt-dev)

fail() {
  { printf '\nsetup: %s\n' "$1"; shift; (($#)) && printf '%s\n' "$@"; } >&2
  exit 1
}

# ---- Debian packages ----
install_packages() {
  if ! command -v dpkg-query >/dev/null; then
    for tool in cmake g++ ninja pkg-config; do
      command -v "$tool" >/dev/null || fail "$tool is missing. This is not a Debian system: install what these Debian packages hold:" "  ${packages[*]}"
    done
    return
  fi
  local missing=() package
  for package in "${packages[@]}"; do
    # pkgconf provides pkg-config, and so on: a virtual package counts by what provides it.
    if [[ $(dpkg-query -W -f='${db:Status-Status}' "$package" 2>/dev/null) != installed ]]; then
      [[ $package == pkg-config ]] && command -v pkg-config >/dev/null && continue
      missing+=("$package")
    fi
  done
  ((${#missing[@]})) || return 0
  local line="apt-get install --yes --no-install-recommends ${missing[*]}"
  if ((EUID != 0)); then
    fail "Debian packages are missing. Run this, then make again:" "  sudo $line"
  fi
  echo "setup: $line"
  export DEBIAN_FRONTEND=noninteractive
  local log
  log=$(mktemp)
  if ! { apt-get update && $line; } >"$log" 2>&1 </dev/null; then
    tail -n 20 "$log" >&2
    rm -f "$log"
    fail "apt-get failed (its last lines are above). The command was:" "  $line"
  fi
  rm -f "$log"
}

# ---- Python ----
usable_python() { "$1" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; }

find_python() {
  local candidate
  for candidate in ${PYTHON:-} python3 /usr/bin/python3 python3.13 python3.12 python3.11; do
    if command -v "$candidate" >/dev/null && usable_python "$candidate"; then
      echo "$candidate"
      return
    fi
  done
}

make_venv() {
  local python
  python=$(find_python)
  [[ $python ]] || fail "no Python 3.11 or newer found (set PYTHON=/path/to/python3)."
  if ! "$python" -c 'import ensurepip, venv' 2>/dev/null; then
    # Debian ships venv apart from the interpreter.
    packages=(python3-venv)
    install_packages
    "$python" -c 'import ensurepip, venv' 2>/dev/null || fail "$python cannot make virtual environments (no ensurepip)."
  fi
  rm -rf .venv
  "$python" -m venv .venv
}

install_python_packages() {
  local stamp
  stamp=.venv/.requirements-$(sha256sum scripts/requirements.txt | cut -c1-16)
  [[ -e $stamp ]] && .venv/bin/python -c '' 2>/dev/null && return
  .venv/bin/python -c 'import sys, pip; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || make_venv

  if ! .venv/bin/python -c 'import torch' 2>/dev/null; then
    local free_gib
    free_gib=$(df --output=avail -BG . | tail -n 1 | tr -dc 0-9)
    ((free_gib >= 8)) || fail "only $free_gib GiB free here; PyTorch and its CUDA libraries need 8 to install."
    echo "setup: installing Python packages into .venv (PyTorch with its CUDA libraries: about 5 GB, some minutes)"
  else
    echo "setup: updating the Python packages in .venv"
  fi
  if ! .venv/bin/python -m pip install --quiet --disable-pip-version-check -r scripts/requirements.txt </dev/null; then
    fail "pip could not install scripts/requirements.txt (its error is above). The demo and the Python tests need" \
      "  all of it; the C++ library does not: cmake -S . -B build -G Ninja && cmake --build build"
  fi
  rm -f .venv/.requirements-*
  touch "$stamp"
}

install_packages
[[ ${2:-} == --packages ]] || install_python_packages
