#!/usr/bin/env python3
"""Markdown tables of the result files of bench/gpu_peers.py, for documents.

    scripts/peer_tables.py bench/results/peers_layers_h100.json ...

Times are medians in us; the last line of each table is the fastest peer over the fastest OctoMoE
whose weights are not prepacked.
"""

import json
import sys
from pathlib import Path

OWN = ("int8_channel", "int8_block", "int8_hybrid")  # from weights where they lie


def number(value: float | None) -> str:
    if value is None:
        return "-"
    return f"{value:.0f}" if value >= 100 else f"{value:.1f}"


def table(header: list[str], rows: list[list[str]]) -> str:
    rule = ["---"] + ["---:"] * (len(header) - 1)
    return "".join(f"| {' | '.join(cells)} |\n" for cells in [header, rule, *rows])


def grid(results: list[dict], column: str, title) -> str:
    """Contenders down, values of `column` across, then floor, ratio and clock."""
    columns = list(dict.fromkeys(r[column] for r in results))
    if column == "tokens":
        columns.sort()  # runs that were appended stand last
    by_key = {(r["name"], r[column]): r for r in results}
    by_name = list(dict.fromkeys(r["name"] for r in results))
    rows = []
    for name in by_name:
        found = [by_key.get((name, c)) for c in columns]
        error = max(r["error"] for r in found if r)
        times = [number(r["median_us"] if r else None) for r in found]
        rows.append([f"`{name}`", *times, f"{100 * error:.1f} %"])

    def over(values) -> list[str]:
        return [number(value) for value in values]

    def fastest(c, own: bool) -> float | None:
        # FP8 and INT8 are compared as they are; the error column says what each costs.
        names = OWN if own else [n for n in by_name if not n.startswith("int8_")]
        times = [r["median_us"] for r in results if r[column] == c and r["name"] in names]
        return min(times, default=None)

    first = [next(r for r in results if r[column] == c) for c in columns]
    rows.append(["floor", *over(r["floor_us"] for r in first), ""])
    pairs = [(fastest(c, own=False), fastest(c, own=True)) for c in columns]
    ratios = [f"**{peer / own:.2f}x**" if peer and own else "-" for peer, own in pairs]
    rows.append(["fastest peer / OctoMoE", *ratios, ""])
    return table(["", *(title(c) for c in columns), "error"], rows)


def report(path: Path) -> str:
    data = json.loads(path.read_text())
    peers = {name: version for run in data["runs"] for name, version in run["peers"].items()}
    versions = ", ".join(f"{name} {version}".strip() for name, version in peers.items())
    date = data["runs"][-1]["date"][:10]
    parts = [f"{data['gpu']['name']}, {date}; {versions} ([{path.name}]({path})).\n"]
    for model in dict.fromkeys(r["model"] for r in data["results"]):
        mine = [r for r in data["results"] if r["model"] == model]
        parts.append(f"`{model}`, us:\n\n" + grid(mine, "tokens", lambda t: f"T = {t}"))
    for uniform, rows in ((False, "rows vary"), (True, "equal rows")):
        mine = [r for r in data["gemms"] if r["uniform"] == uniform]
        if mine:
            parts.append(f"Grouped GEMM, {rows}, us:\n\n" + grid(mine, "case", lambda c: f"`{c}`"))
    return "\n".join(parts)


def main() -> int:
    if len(sys.argv) < 2:
        print(__doc__, file=sys.stderr)
        return 2
    print("\n".join(report(Path(name)) for name in sys.argv[1:]))
    return 0


if __name__ == "__main__":
    sys.exit(main())
