"""What quantised experts do to a language model: `python -m octomoe.demo`.

Reads held-out text with the bundled Qwen3-MoE byte model: as it is in float32 and bfloat16, then
with its experts computed by OctoMoE in every scheme. Joins that with what `octomoe run` measured of
the layers (out/run.json; it is run if the file is missing), prints one table, and writes
out/demo.json and out/demo.png. Needs PyTorch, transformers and matplotlib.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from octomoe import plot

LOG2E = 1.0 / math.log(2.0)


def parse_arguments(arguments: list[str] | None) -> argparse.Namespace:
    root = Path(__file__).resolve().parents[2]
    bundled = root / "data" / "tiny-qwen3-moe"
    parser = argparse.ArgumentParser(prog="python -m octomoe.demo", description=__doc__)
    parser.add_argument(
        "--checkpoint", type=Path, default=bundled, help="a folder with a byte model"
    )
    parser.add_argument("--text", type=Path, help="held-out text (default: heldout.txt beside it)")
    parser.add_argument("--windows", type=int, default=32, help="windows of text to read (32)")
    parser.add_argument("--window", type=int, default=1024, help="bytes in a window (1024)")
    parser.add_argument("--out", type=Path, default=Path("out"), help="folder for results (out)")
    parser.add_argument("--run", type=Path, help="result of `octomoe run` (default: OUT/run.json)")
    options = parser.parse_args(arguments)
    if not options.checkpoint.is_dir():
        parser.error(f"--checkpoint: no such folder: {options.checkpoint}")
    options.text = options.text or options.checkpoint / "heldout.txt"
    options.run = options.run or options.out / "run.json"
    if options.windows < 1 or options.window < 2:
        parser.error("--windows and --window: expected at least 1 and 2")
    return options


def layer_results(options: argparse.Namespace) -> dict[str, Any]:
    """What `octomoe run` wrote; runs it if it has not been run."""
    from octomoe import command_path

    if not options.run.exists():
        command = command_path()
        if command is None:
            sys.exit(f"{options.run} is missing, and so is the octomoe command that writes it")
        options.run.parent.mkdir(parents=True, exist_ok=True)
        parts = [
            "run",
            "--checkpoint",
            options.checkpoint,
            "--scheme",
            "all",
            "--json",
            options.run,
        ]
        subprocess.run([command, *parts], check=True)
    return json.loads(options.run.read_text(encoding="utf-8"))


def read_windows(path: Path, count: int, window: int) -> Any:
    """`count` windows of `window` + 1 bytes, spread over the text: int64 [count, window + 1]."""
    import torch

    data = path.read_bytes()
    count = min(count, (len(data) - 1) // window)
    if count < 1:
        sys.exit(f"{path}: {len(data)} bytes are too few for a window of {window}")
    stride = (len(data) - window - 1) / max(1, count - 1)
    rows = [data[int(i * stride) : int(i * stride) + window + 1] for i in range(count)]
    return torch.tensor([list(row) for row in rows])


def bits_per_byte(model: Any, windows: Any, batch: int = 4) -> tuple[float, float]:
    """(mean bits of every byte but a window's first, seconds)."""
    import torch
    import torch.nn.functional as F

    nats, count = 0.0, 0
    begin = time.perf_counter()
    with torch.inference_mode():
        for part in windows.split(batch):
            logits = model(part[:, :-1], use_cache=False).logits.float()
            nats += float(
                F.cross_entropy(logits.flatten(0, 1), part[:, 1:].flatten(), reduction="sum")
            )
            count += part[:, 1:].numel()
    return nats / count * LOG2E, time.perf_counter() - begin


def load_model(path: Path, dtype: str) -> Any:
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    import torch
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()
    logging.set_verbosity_error()
    return AutoModelForCausalLM.from_pretrained(path, dtype=getattr(torch, dtype)).eval()


def expert_bytes(model: Any) -> int:
    """Bytes of the experts' float weights."""
    return sum(
        p.numel() * p.element_size() for name, p in model.named_parameters() if ".experts." in name
    )


class Progress:
    """One line on a terminal that is rewritten; silent elsewhere."""

    def __init__(self) -> None:
        self.live = sys.stderr.isatty()

    def __call__(self, text: str) -> None:
        if self.live:
            print(f"\r\033[K{text}", end="", file=sys.stderr, flush=True)


def measure(options: argparse.Namespace, layers: dict[str, Any]) -> list[dict[str, Any]]:
    """One row for each way to compute the experts."""
    import octomoe
    from octomoe.transformers import replace_experts

    progress = Progress()
    windows = read_windows(options.text, options.windows, options.window)
    by_scheme = {row["scheme"]: row for row in layers["results"]}
    rows: list[dict[str, Any]] = []

    def add(name: str, engine: str, bits: float, seconds: float, weight_bytes: int) -> None:
        layer = by_scheme.get(name, {}) if engine == "octomoe" else {}
        first = rows[0]["bits_per_byte"] if rows else bits
        rows.append(
            {
                "scheme": name,
                "engine": engine,
                "bits_per_byte": bits,
                "perplexity_per_byte": 2.0**bits,
                "bits_over_float32": bits - first,
                "weight_bytes": weight_bytes,
                "layer_error_worst": layer.get("error_vs_float32_worst"),
                "layer_error_mean": layer.get("error_vs_float32_mean"),
                "bit_equal": layer.get("bit_equal"),
                "us_per_token": layer.get("us_per_token"),
                "speedup_over_bf16": layer.get("speedup_over_bf16"),
                "model_seconds": seconds,
            }
        )

    progress("reading with the bfloat16 model")
    half = load_model(options.checkpoint, "bfloat16")
    half_result = *bits_per_byte(half, windows), expert_bytes(half)
    del half
    progress("reading with the float32 model")
    model = load_model(options.checkpoint, "float32")
    add("float32", "torch", *bits_per_byte(model, windows), expert_bytes(model))
    add("bfloat16", "torch", *half_result)
    for scheme in octomoe.schemes():
        progress(f"reading with experts in {scheme}")
        with replace_experts(model, scheme) as replaced:
            bits, seconds = bits_per_byte(model, windows)
            add(scheme, "octomoe", bits, seconds, replaced.weight_bytes)
    progress("")
    return rows


def _cell(value: float | None, text: str) -> str:
    return "-" if value is None else text.format(value)


def print_table(rows: list[dict[str, Any]]) -> None:
    head = (
        "experts",
        "bits per byte",
        "vs float32",
        "perplexity",
        "layer error",
        "expert weights",
        "time per token",
        "vs bf16",
    )
    table = [head]
    for row in rows:
        engine = " (PyTorch)" if row["engine"] == "torch" else ""
        over = None if row is rows[0] else 100 * row["bits_over_float32"] / rows[0]["bits_per_byte"]
        error = row["layer_error_worst"]
        table.append(
            (
                row["scheme"] + engine,
                f"{row['bits_per_byte']:.4f}",
                _cell(over, "{:+.3f} %"),
                f"{row['perplexity_per_byte']:.4f}",
                _cell(None if error is None else 100 * error, "{:.2f} %"),
                f"{row['weight_bytes'] / 1e6:.1f} MB",
                _cell(row["us_per_token"], "{:.2f} us"),
                _cell(row["speedup_over_bf16"], "{:.2f}x"),
            )
        )
    widths = [max(len(line[i]) for line in table) for i in range(len(head))]

    def format_line(line: tuple[str, ...]) -> str:
        cells = [line[0].ljust(widths[0])]
        cells += [cell.rjust(width) for cell, width in zip(line[1:], widths[1:], strict=True)]
        return "  ".join(cells).rstrip()

    bold, plain = ("\033[1m", "\033[0m") if sys.stdout.isatty() else ("", "")
    print(f"{bold}{format_line(table[0])}{plain}")
    print("  ".join("-" * width for width in widths))
    for line in table[1:]:
        print(format_line(line))


def draw(rows: list[dict[str, Any]], title: str, subtitle: str, path: Path) -> None:
    """Error, size and time of every scheme, as three columns of bars."""
    plt = plot.pyplot()
    schemes = [row for row in rows if row["engine"] == "octomoe"]
    labels = [f"{row['scheme']}\n{row['bits_per_byte']:.4f} bits/byte" for row in schemes]
    colours = [plot.colour_of(row["scheme"], i) for i, row in enumerate(schemes)]

    def scaled(field: str, factor: float) -> list[float | None]:
        return [None if row[field] is None else row[field] * factor for row in schemes]

    panels = (
        ("Error of a layer's output", scaled("layer_error_worst", 100), "{:.3g} %", "worst layer"),
        ("Expert weights", scaled("weight_bytes", 1e-6), "{:.1f} MB", "all layers"),
        ("Time per token", scaled("us_per_token", 1), "{:.2f} us", "mean layer"),
    )
    figure, axes = plt.subplots(1, 3, figsize=(11, 4.6), sharey=True)
    places = range(len(schemes))
    for axis, (name, values, form, note) in zip(axes, panels, strict=True):
        known = [value or 0.0 for value in values]
        axis.barh(places, known, color=colours, height=0.62)
        top = max(known) or 1.0
        for place, value in zip(places, values, strict=True):
            text = "not measured" if value is None else form.format(value)
            axis.text((value or 0) + 0.02 * top, place, text, va="center", fontsize=9.5)
        axis.set_xlim(0, 1.33 * top)
        axis.set_title(name)
        axis.set_xlabel(f"{note}; less is better", color=plot.MUTED, fontsize=9)
        axis.set_xticks([])
        axis.spines["bottom"].set_visible(False)
        axis.tick_params(axis="y", length=0)
    axes[0].set_yticks(list(places), labels, color=plot.INK)
    axes[0].invert_yaxis()
    figure.subplots_adjust(left=0.16, right=0.985, top=0.77, bottom=0.09, wspace=0.10)
    figure.text(0.015, 0.935, title, fontsize=14, fontweight="bold")
    figure.text(0.015, 0.88, subtitle, fontsize=9.5, color=plot.MUTED)
    figure.savefig(path)
    plt.close(figure)


def main(arguments: list[str] | None = None) -> None:
    """Command line."""
    options = parse_arguments(arguments)
    begin = time.perf_counter()
    missing = [name for name in ("torch", "transformers", "matplotlib") if not _installed(name)]
    if missing:
        sys.exit(f"octomoe.demo needs {', '.join(missing)}: pip install {' '.join(missing)}")
    layers = layer_results(options)
    options.out.mkdir(parents=True, exist_ok=True)
    rows = measure(options, layers)
    read = min(options.windows * options.window, options.text.stat().st_size)
    machine = layers.get("machine") or {}
    report = {
        **{key: layers.get(key) for key in ("version", "date", "commit", "machine", "checkpoint")},
        "model": {
            key: layers.get(key)
            for key in ("model_type", "hidden", "intermediate", "experts", "top_k", "layers")
        },
        "text": {"file": options.text.name, "windows": options.windows, "window": options.window},
        "results": rows,
    }
    json_path, png_path = options.out / "demo.json", options.out / "demo.png"
    json_path.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    size = (
        f"{layers.get('model_type')}: {len(layers.get('layers') or [])} MoE layers of "
        f"{layers.get('experts')} experts, top {layers.get('top_k')}, hidden {layers.get('hidden')}"
    )
    print(
        f"\nThe language model with quantised experts ({size}),"
        f"\nreading {read // 1024} KiB of held-out text\n"
    )
    print_table(rows)
    print(
        "\nlayer error: worst layer's ||out - ref|| / ||ref|| against float64 arithmetic;"
        "\ntime per token: one layer, mean over layers (octomoe run); bits per byte: whole model"
    )
    where = f"{machine['cpu']}, {machine.get('threads')} threads" if machine.get("cpu") else "CPU"
    reference = rows[0]["bits_per_byte"]
    draw(
        rows,
        "A trained MoE language model with its experts in every scheme",
        f"{size}  |  float32 experts: {reference:.4f} bits/byte  |  {where}",
        png_path,
    )
    print(f"\nwritten: {json_path} and {png_path} ({time.perf_counter() - begin:.0f} s)")


def _installed(name: str) -> bool:
    import importlib.util

    return importlib.util.find_spec(name) is not None


if __name__ == "__main__":
    # PyTorch's OpenMP threads would spin between its operators, on the cores that OctoMoE's threads
    # need. OpenMP reads this once, when PyTorch is loaded: importing octomoe has done that already.
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ["OMP_WAIT_POLICY"] = "PASSIVE"
        os.execv(sys.executable, [sys.executable, "-m", "octomoe.demo", *sys.argv[1:]])
    main()
