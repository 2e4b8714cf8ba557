#!/usr/bin/env python3
"""Runs clang-tidy over every file of src/ that the build compiles, skipping what passed before.

A file has passed when its preprocessed text (so every header counts), .clang-tidy and the tool's
version are the same as when clang-tidy last found nothing; the record is a folder of empty files in
the build folder.

    scripts/tidy.py --build build [--all] [FILE ...]

With $CI nothing is kept, and no file preprocessed for it.
"""

import argparse
import concurrent.futures
import hashlib
import json
import os
import shlex
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def sources(build: Path) -> dict[str, dict]:
    """The compile command of each source under src/, by path relative to the repository."""
    found = {}
    for entry in json.loads((build / "compile_commands.json").read_text()):
        path = Path(entry["directory"], entry["file"]).resolve()
        if path.is_relative_to(ROOT / "src"):
            found[str(path.relative_to(ROOT))] = entry
    return dict(sorted(found.items()))


def preprocessed(entry: dict) -> bytes:
    words = shlex.split(entry["command"])
    words = words[1:] if Path(words[0]).name == "ccache" else words
    for option in ("-o", "-MF", "-MT"):
        if option in words:
            at = words.index(option)
            del words[at : at + 2]
    words = [w for w in words if w not in ("-c", "-MD")]
    return subprocess.run(
        [*words, "-E", "-P", "-C"], cwd=entry["directory"], check=True, capture_output=True
    ).stdout


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--build", type=Path, default=ROOT / "build")
    parser.add_argument("--all", action="store_true", help="check also what has passed before")
    parser.add_argument(
        "files", nargs="*", help="paths relative to the repository (default: all of src/)"
    )
    options = parser.parse_args()

    tidy = os.environ.get("CLANG_TIDY", "clang-tidy")
    version = subprocess.run([tidy, "--version"], check=True, capture_output=True).stdout
    settings = [ROOT / ".clang-tidy", *sorted((ROOT / "src").rglob(".clang-tidy"))]
    common = version + b"".join(path.read_bytes() for path in settings)
    passed = options.build / "tidy-passed"
    passed.mkdir(exist_ok=True)

    todo = sources(options.build)
    if options.files:
        todo = {name: entry for name, entry in todo.items() if name in options.files}

    def check(item):
        name, entry = item
        record = None
        if not os.environ.get("CI"):
            text = common + name.encode() + preprocessed(entry)
            record = passed / hashlib.sha256(text).hexdigest()[:32]
            if record.exists() and not options.all:
                return name, None, 0.0
        begin = time.monotonic()
        # The compile commands are GCC's.
        extra = ["-Wno-unknown-warning-option", f"-include{ROOT / 'cmake/source_location.h'}"]
        arguments = [f"--extra-arg={word}" for word in extra]
        command = [tidy, "--quiet", "-p", str(options.build), *arguments, str(ROOT / name)]
        run = subprocess.run(command, check=False, capture_output=True, text=True)
        if run.returncode == 0 and record:
            record.touch()
        return name, run, time.monotonic() - begin

    failed = skipped = 0
    workers = int(os.environ.get("JOBS") or os.cpu_count() or 2)
    with concurrent.futures.ThreadPoolExecutor(workers) as pool:
        for name, run, seconds in pool.map(check, todo.items()):
            if run is None:
                skipped += 1
            elif run.returncode:
                failed += 1
                print(f"{name}: FAILED ({seconds:.0f} s)\n{run.stdout}{run.stderr}", flush=True)
            elif seconds > 60:
                print(f"{name}: ok, but it took {seconds:.0f} s", flush=True)
    print(f"clang-tidy: {len(todo)} files, {failed} failed, {skipped} unchanged since they passed")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
