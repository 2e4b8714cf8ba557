"""What the installation consists of, and what a call from Python costs."""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from octomoe._native import LIBRARY_PATH, lib


def command_path() -> Path | None:
    """The compiled `octomoe` command: $OCTOMOE_COMMAND, the installed one, or the newest build."""
    here = Path(__file__).resolve().parent
    if named := os.environ.get("OCTOMOE_COMMAND"):
        return Path(named)
    if (installed := here / "bin" / "octomoe").is_file():
        return installed
    root = here.parent.parent
    built = list(root.glob("build*/octomoe")) if (root / "CMakeLists.txt").exists() else []
    built = [path for path in built if path.is_file()]
    return max(built, key=lambda path: path.stat().st_mtime) if built else None


def main() -> None:
    """The console script `octomoe`: becomes the compiled command."""
    command = command_path()
    if command is None:
        raise SystemExit("octomoe: the compiled command is not part of this installation")
    os.environ.setdefault("OCTOMOE_PYTHON", sys.executable)  # for the peers of `octomoe bench`
    os.execv(command, [str(command), *sys.argv[1:]])


def doctor() -> dict[str, Any]:
    """Versions and places of the parts, and what `octomoe doctor --json` says of the machine."""
    packages = {}
    for name in ("apache-tvm-ffi", "numpy", "ml_dtypes", "torch", "transformers", "jax"):
        try:
            packages[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            packages[name] = None
    command = command_path()
    report: dict[str, Any] = {
        "version": str(lib.version()),
        "library": str(LIBRARY_PATH),
        "command": None if command is None else str(command),
        "python": platform.python_version(),
        "packages": packages,
        "machine": None,
    }
    if command is not None:
        answer = subprocess.run(
            [command, "doctor", "--json"], capture_output=True, text=True, check=False
        )
        if answer.returncode == 0:
            report["machine"] = json.loads(answer.stdout)
    return report


def bench_overhead(rounds: int = 30, calls: int = 200) -> dict[str, float]:
    """Microseconds of one call of a one-token layer, small enough that Python's part shows.

    Returns:
        ``call_us``: what a call costs beside the layer's own work (no token: allocating the
        result, the binding and the checks; PyTorch where it is installed, else NumPy).
        ``numpy_us``, ``numpy_out_us`` (with `out`), ``numpy_empty_us`` (no token) and
        ``route_numpy_us``; and with PyTorch ``torch_us``, ``torch_out_us``, ``torch_empty_us`` and
        ``torch_op_us`` (the custom operator). Medians over `rounds` of the mean of `calls`.
    """
    import numpy as np

    from octomoe.layer import MoeLayer, route
    from octomoe.weights import quantize

    experts, hidden, intermediate, top_k = 8, 64, 64, 2
    random = np.random.default_rng(0)
    w13 = random.standard_normal((experts, 2 * intermediate, hidden), np.float32)
    w2 = random.standard_normal((experts, hidden, intermediate), np.float32)
    layer = MoeLayer(quantize(w13, w2), threads=1)
    x = random.standard_normal((1, hidden), np.float32)
    ids = np.array([[3, 5]], np.int32)
    weights = np.array([[0.75, 0.25]], np.float32)
    logits = random.standard_normal((1, experts), np.float32)
    out = np.empty_like(x)
    empty = x[:0], ids[:0], weights[:0]
    layer.reserve(1, top_k)
    cases = {
        "numpy_us": lambda: layer.forward(x, ids, weights),
        "numpy_out_us": lambda: layer.forward(x, ids, weights, out=out),
        "numpy_empty_us": lambda: layer.forward(*empty),
        "route_numpy_us": lambda: route(logits, top_k),
    }
    try:
        import torch
    except ImportError:
        pass
    else:
        from octomoe import torch as octomoe_torch

        tx, ti, tw = torch.from_numpy(x), torch.from_numpy(ids), torch.from_numpy(weights)
        none = tx[:0], ti[:0], tw[:0]
        t_out = torch.empty_like(tx)
        handle = octomoe_torch.handle(layer)
        cases |= {
            "torch_us": lambda: layer.forward(tx, ti, tw),
            "torch_out_us": lambda: layer.forward(tx, ti, tw, out=t_out),
            "torch_empty_us": lambda: layer.forward(*none),
            "torch_op_us": lambda: torch.ops.octomoe.fused_moe(tx, handle, tw, ti),
        }
    samples: dict[str, list[float]] = {name: [] for name in cases}
    for _ in range(rounds):
        for name, call in cases.items():
            begin = time.perf_counter_ns()
            for _ in range(calls):
                call()
            samples[name].append((time.perf_counter_ns() - begin) / 1e3 / calls)
    medians = {name: statistics.median(values) for name, values in samples.items()}
    call = medians.get("torch_empty_us", medians["numpy_empty_us"])
    return {"call_us": call, **medians}
