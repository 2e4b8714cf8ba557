"""Pictures of results: `python -m octomoe.plot bench.json out.png`.

Draws what `octomoe bench --json` wrote: the time of a layer over the number of tokens, one line per
scheme and peer, above the floor that memory and arithmetic set; for `--study grouping`, what one
GEMM per expert takes beside one grouped GEMM. Missing fields are left out.
"""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path
from typing import Any

# One colour per scheme in every picture (Okabe-Ito: distinct for colour-blind readers).
COLOURS = {
    "int8_channel": "#0072B2",
    "int8_block": "#009E73",
    "int8_hybrid": "#D55E00",
    "w4a8_fp8": "#CC79A7",
    "bf16": "#444444",
    "fp16": "#999999",
}
_SPARE = ("#56B4E9", "#E69F00", "#8C564B", "#17BECF")
_MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*")
INK, MUTED, GRID = "#222222", "#666666", "#E3E3E3"


def pyplot() -> Any:
    """matplotlib.pyplot, drawing to files only, in the house style; ends the program if absent."""
    try:
        import matplotlib
    except ImportError:
        raise SystemExit("octomoe.plot needs matplotlib: pip install matplotlib") from None
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    plt.rcParams.update(
        {
            "font.family": "DejaVu Sans",
            "font.size": 10,
            "text.color": INK,
            "axes.edgecolor": MUTED,
            "axes.labelcolor": INK,
            "axes.spines.top": False,
            "axes.spines.right": False,
            "axes.titlesize": 11,
            "axes.titleweight": "bold",
            "axes.titlelocation": "left",
            "axes.titlepad": 10,
            "axes.axisbelow": True,
            "grid.color": GRID,
            "xtick.color": MUTED,
            "ytick.color": MUTED,
            "legend.frameon": False,
            "figure.dpi": 110,
            "savefig.dpi": 160,
        }
    )
    return plt


def colour_of(name: str, index: int = 0) -> str:
    """The colour of a scheme (its parameters do not matter) or of anything else by position."""
    return COLOURS.get(name.split(":")[0], _SPARE[index % len(_SPARE)])


def format_us(us: float) -> str:
    """ "12.3 us", "4.56 ms", "1.23 s"."""
    if us < 1000:
        return f"{us:.3g} us" if us >= 1 else f"{us:.2g} us"
    return f"{us / 1e3:.3g} ms" if us < 1e6 else f"{us / 1e6:.3g} s"


def _number(value: Any) -> float | None:
    good = isinstance(value, (int, float)) and not isinstance(value, bool) and value > 0
    return float(value) if good else None


def _series(report: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """name -> {"peer": bool, "points": [(tokens, us, low, high)], "floor": {tokens: us}}."""
    found: dict[str, dict[str, Any]] = {}
    for row in report.get("results") or []:
        if not isinstance(row, dict):
            continue
        tokens, us = _number(row.get("tokens")), _number(row.get("median_us"))
        if tokens is None or us is None:
            continue
        name = str(row.get("name") or row.get("scheme") or "layer")
        entry = found.setdefault(
            name, {"peer": row.get("kind") == "peer", "points": [], "floor": {}}
        )
        low, high = _number(row.get("p10_us")) or us, _number(row.get("p90_us")) or us
        entry["points"].append((tokens, us, min(low, us), max(high, us)))
        if (floor := _number(row.get("floor_us"))) is not None:
            entry["floor"][tokens] = floor
    for entry in found.values():
        entry["points"].sort()
    return found


def _subtitle(report: dict[str, Any]) -> str:
    problem = report.get("problem") or {}
    machine = report.get("machine") or {}
    sizes = [
        f"{letter} {problem[key]}"
        for letter, key in (
            ("E", "experts"),
            ("k", "top_k"),
            ("H", "hidden"),
            ("I", "intermediate"),
        )
        if problem.get(key)
    ]
    parts = [", ".join(sizes)]
    if problem.get("routing"):
        parts.append(f"{problem['routing']} routing")
    gpu = report.get("gpu") or {}
    if gpu.get("name"):
        return "  |  ".join([*(part for part in parts if part), gpu["name"]])
    if machine.get("cpu"):
        isa = f", {machine['isa']}" if machine.get("isa") else ""
        parts.append(f"{machine['cpu']}{isa}")
    if machine.get("threads"):
        parts.append(f"{machine['threads']} threads")
    return "  |  ".join(part for part in parts if part)


def draw_bench(report: dict[str, Any], path: str | Path) -> None:
    """Draw a bench report (the parsed JSON) into a .png, .svg or .pdf file.

    Raises:
        ValueError: there is nothing to draw.
    """
    series = _series(report)
    if not series:
        raise ValueError("no result with tokens and median_us")
    plt = pyplot()
    figure, axes = plt.subplots(figsize=(8.6, 5.6))
    tokens = sorted({point[0] for entry in series.values() for point in entry["points"]})
    spare = 0
    handles = []
    for index, (name, entry) in enumerate(series.items()):
        colour = colour_of(name, spare)
        spare += name.split(":")[0] not in COLOURS
        x = [point[0] for point in entry["points"]]
        y = [point[1] for point in entry["points"]]
        low = [point[1] - point[2] for point in entry["points"]]
        high = [point[3] - point[1] for point in entry["points"]]
        line = axes.errorbar(
            x,
            y,
            yerr=(low, high),
            color=colour,
            linestyle="--" if entry["peer"] else "-",
            marker=_MARKERS[index % len(_MARKERS)],
            markersize=5 if len(x) <= 16 else 2.5,
            linewidth=1.8,
            elinewidth=1,
            capsize=2,
            label=name,
            zorder=3,
        )
        handles.append((y[-1], line))
        if entry["floor"] and not entry["peer"]:
            floor = sorted(entry["floor"].items())
            axes.plot(
                [t for t, _ in floor],
                [us for _, us in floor],
                color=colour,
                linestyle=":",
                linewidth=1.2,
                alpha=0.75,
                marker="_" if len(floor) == 1 else None,
                zorder=2,
            )
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    # Every number of tokens has a tick as long as the labels find room, else powers of two.
    ticks = tokens
    if len(tokens) > 16:
        ticks = [t for t in tokens if math.log2(t).is_integer()] or tokens[:: len(tokens) // 8]
    axes.set_xticks(ticks, [f"{t:g}" for t in ticks])
    axes.minorticks_off()
    axes.yaxis.set_major_formatter(lambda value, _: format_us(value))
    axes.yaxis.set_major_locator(plt.matplotlib.ticker.LogLocator(subs=(1, 2, 5)))
    if len(tokens) == 1:
        axes.set_xlim(tokens[0] / 2, tokens[0] * 2)
    axes.grid(axis="y", linewidth=0.8)
    axes.set_xlabel("tokens in the call")
    axes.set_ylabel("time of one layer (median, p10 to p90)")
    model = (report.get("problem") or {}).get("model")
    model = None if model == "custom" else model
    title = f"One MoE layer{f' of {model}' if model else ''}"
    axes.text(0, 1.09, title, transform=axes.transAxes, fontsize=13, fontweight="bold")
    axes.set_title(_subtitle(report), fontsize=9, fontweight="normal", color=MUTED)
    handles.sort(key=lambda item: -item[0])  # the order of the lines' right ends
    lines = [line for _, line in handles]
    if any(entry["floor"] for entry in series.values()):
        (dotted,) = axes.plot([], [], color=MUTED, linestyle=":", label="floor of each scheme")
        lines.append(dotted)
    axes.legend(handles=lines, loc="center left", bbox_to_anchor=(1.01, 0.5))
    figure.savefig(path, bbox_inches="tight")
    plt.close(figure)


# The ways of the grouping study: (name, field of the time, label, colour, line style).
_WAYS = (
    ("per expert", "graph", "our kernel per expert, graph", "#D55E00", "-"),
    ("cuBLAS", "graph", "cuBLAS per expert, graph", "#444444", "-"),
    ("cuBLAS", "eager", "cuBLAS per expert, eager", "#444444", "--"),
    ("per expert, 8 streams", "graph", "our kernel on 8 streams, graph", "#009E73", "-"),
    ("per expert, 8 streams", "eager", "our kernel on 8 streams, eager", "#009E73", "--"),
)


def _relative_times(case: dict[str, Any]) -> dict[tuple[str, str], float]:
    """(way, "graph" or "eager") -> its time over the grouped kernel's in a graph."""
    times = {
        (way.get("name"), how): _number((way.get(how) or {}).get("median_us"))
        for way in case.get("ways") or []
        for how in ("graph", "eager")
    }
    grouped = times.get(("grouped", "graph"))
    return {key: us / grouped for key, us in times.items() if us and grouped}


def draw_grouping(report: dict[str, Any], path: str | Path) -> None:
    """Draw a grouping study (the parsed JSON) into a .png, .svg or .pdf file.

    Raises:
        ValueError: there is nothing to draw.
    """
    cases = [
        case
        for case in report.get("cases") or []
        if _number(case.get("experts"))
        and _number(case.get("rows_per_expert"))
        and len(_relative_times(case)) > 1
    ]
    counts = sorted({case["experts"] for case in cases})
    if not counts:
        raise ValueError("no case with experts, rows_per_expert and the times of several ways")
    plt = pyplot()
    figure, panels = plt.subplots(
        1, len(counts), figsize=(3.6 * len(counts) + 0.6, 4.2), sharey=True, squeeze=False
    )
    handles: dict[str, Any] = {}
    for axes, experts in zip(panels[0], counts, strict=True):
        axes.axhline(1, color=INK, linewidth=1.2, zorder=1)
        for name, how, label, colour, style in _WAYS:
            points: dict[bool, list[tuple[float, float]]] = {True: [], False: []}
            for case in cases:
                ratio = _relative_times(case).get((name, how))
                if case["experts"] == experts and ratio:
                    uniform = case.get("skew") == "uniform"
                    points[uniform].append((case["rows_per_expert"], ratio))
            line = sorted(points[True])
            (handles[f"{name} {how}"],) = axes.plot(
                [x for x, _ in line],
                [y for _, y in line],
                color=colour,
                linestyle=style,
                linewidth=1.8,
                marker="o",
                markersize=4,
                label=label,
                zorder=3 if how == "graph" else 2.5,
            )
            axes.scatter(
                [x for x, _ in points[False]],
                [y for _, y in points[False]],
                s=12,
                color=colour,
                alpha=0.35,
                linewidths=0,
                zorder=2,
            )
        axes.set_xscale("log", base=2)
        axes.set_yscale("log")
        axes.set_yticks((0.5, 1, 2, 5, 10, 20), ("0.5", "1", "2", "5", "10", "20"))
        axes.minorticks_off()
        axes.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
        axes.grid(axis="y", linewidth=0.8)
        axes.set_title(f"{experts} experts", fontsize=10)
        axes.set_xlabel("rows of an expert")
    panels[0][0].set_ylabel("time / time of the grouped kernel in a graph")
    gpu = (report.get("gpu") or {}).get("name") or ""
    figure.suptitle(
        f"One GEMM per expert beside one grouped GEMM: {report.get('scheme', '')}, "
        f"N {report.get('n', '?')}, K {report.get('k', '?')}, {gpu}\n"
        "lines: rows fall at random; faint dots: even, Zipf 1.2, one expert with a quarter",
        x=0.01,
        ha="left",
        fontsize=9,
        color=MUTED,
    )
    figure.legend(
        handles=list(handles.values()), loc="upper left", bbox_to_anchor=(0.04, 0.0), ncols=3
    )
    figure.tight_layout()
    figure.savefig(path, bbox_inches="tight")
    plt.close(figure)


def main(arguments: list[str] | None = None) -> None:
    """Command line."""
    arguments = sys.argv[1:] if arguments is None else arguments
    if len(arguments) != 2 or arguments[0] in ("-h", "--help"):
        raise SystemExit("usage: python -m octomoe.plot bench.json out.png")
    source, target = arguments
    try:
        report = json.loads(Path(source).read_text(encoding="utf-8"))
        if not isinstance(report, dict):
            raise ValueError("expected a JSON object")
        draw = draw_grouping if report.get("study") == "grouping" else draw_bench
        draw(report, target)
    except (OSError, ValueError) as error:
        raise SystemExit(f"octomoe.plot: {source}: {error}") from None


if __name__ == "__main__":
    main()
