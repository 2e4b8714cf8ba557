#!/usr/bin/env python3
"""Writes README.md's results tables from the committed result files, bench/results/*.json.

Files are those of `octomoe run --json` (a checkpoint's error and speed in each scheme), of
`octomoe bench --json` (one layer's times at several numbers of tokens) and bench/gpu_peers.py's
peers_layers*.json. Those whose names begin with a family of kernels (sm80_, sm90_) are left out:
docs/performance.md and docs/kernels.md speak of them.

    scripts/readme_results.py            rewrite the part of README.md between its markers
    scripts/readme_results.py --check    exit 1 if that would change it
"""

import json
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
BEGIN, END = "<!-- results:begin", "<!-- results:end -->"


def table(header: list[str], rows: list[list[str]]) -> str:
    rule = ["---"] + ["---:"] * (len(header) - 1)
    return "".join(f"| {' | '.join(cells)} |\n" for cells in [header, rule, *rows])


def microseconds(us: float) -> str:
    if us >= 1e5:
        return f"{us / 1e3:.0f} ms"
    if us >= 1e3:
        return f"{us / 1e3:.3g} ms"
    return f"{us:.3g} us"


def where(data: dict) -> str:
    if data.get("gpu"):
        how = "CUDA graph" if data["graph"] else "eager"
        return f"{data['gpu']['name']}, {how}, {data['date'][:10]}"
    machine = data["machine"]
    threads = machine["threads"]
    plural = "" if threads == 1 else "s"
    return f"{machine['cpu']} ({machine['isa']}), {threads} thread{plural}, {data['date'][:10]}"


def run_table(data: dict, name: str) -> str:
    rows = [
        [
            f"`{result['scheme']}`",
            f"{100 * result['error_vs_float32_worst']:.2f} %",
            "yes" if result["bit_equal"] else f"{result['error_vs_quantised_worst']:.1e}",
            f"{result['weight_bytes'] / 2**20:.1f} MiB",
            microseconds(result["us_per_token"]),
            f"{speedup:.2f}x" if (speedup := result["speedup_over_bf16"]) else "-",
        ]
        for result in data["results"]
    ]
    header = ["scheme", "error, worst layer", "bit-equal to the reference", "expert weights"]
    header += ["per token and layer", "against `bf16`"]
    count = len(data["layers"])
    return (
        f"`{data['checkpoint']}`, {count} MoE layers of {data['experts']} experts, "
        f"{data['tokens']} tokens; error against float64 arithmetic on unquantised weights. "
        f"{where(data)} ([{Path(name).name}]({name})).\n\n{table(header, rows)}"
    )


def bench_table(data: dict, name: str) -> str:
    names = list(dict.fromkeys(result["name"] for result in data["results"]))
    tokens = sorted({result["tokens"] for result in data["results"]})
    by_key = {(result["name"], result["tokens"]): result for result in data["results"]}

    def cell(row: str, t: int) -> str:
        result = by_key.get((row, t))
        if not result:
            return "-"
        floor = 100 * result["floor_us"] / result["median_us"]
        return f"{microseconds(result['median_us'])} ({floor:.0f} %)"

    rows = [[f"`{row}`", *(cell(row, t) for t in tokens)] for row in names]
    problem = data["problem"]
    peer = f" Peer: {data['peer']['name']} {data['peer']['version']}." if data["peer"] else ""
    return (
        f"One layer of {problem['model']} (E {problem['experts']}, k {problem['top_k']}, "
        f"H {problem['hidden']}, I {problem['intermediate']}) at T tokens: median time, and what "
        f"share of it the machine's floor is.{peer} {where(data)} "
        f"([{Path(name).name}]({name})).\n\n" + table(["", *(f"T = {t}" for t in tokens)], rows)
    )


def peers_table(data: dict, name: str) -> str:
    """OctoMoE's int8_channel beside the fastest peer of each size, in the same run."""
    own = "int8_channel"
    options = {"prepacked": "int8_channel_prepacked", "in any order": "int8_channel_any_order"}
    parts = []
    for model in dict.fromkeys(result["model"] for result in data["results"]):
        times: dict[int, dict[str, float]] = {}
        for result in data["results"]:
            if result["model"] == model:
                times.setdefault(result["tokens"], {})[result["name"]] = result["median_us"]
        rows = [
            [f"`{model}`", "OctoMoE `int8_channel`"],
            ["", "Triton (lmdeploy)"],
            ["", "Humming"],
            ["", "fastest peer / OctoMoE"],
        ]
        with_options = [["", title] for title in options]
        for t in sorted(times):
            at = times[t]
            humming = min(
                (us for peer, us in at.items() if peer.startswith("humming")), default=None
            )
            peers = [us for peer, us in at.items() if not peer.startswith("int8_")]
            rows[0].append(microseconds(at[own]))
            for line, option in zip(with_options, options.values(), strict=True):
                line.append(microseconds(at[option]) if option in at else "-")
            rows[1].append(microseconds(at["lmdeploy"]) if "lmdeploy" in at else "-")
            rows[2].append(microseconds(humming) if humming else "-")
            rows[3].append(f"**{min(peers) / at[own]:.2f}x**" if peers else "-")
        header = ["model", "", *(f"T = {t}" for t in sorted(times))]
        rows[1:1] = [line for line in with_options if any(cell != "-" for cell in line[2:])]
        parts.append(table(header, rows))
    versions = {peer: v for run in data["runs"] for peer, v in run["peers"].items()}
    listed = ", ".join(f"{peer} {v}" for peer, v in versions.items() if peer != "octomoe")
    return (
        f"Whole layers beside their peers in the same run ({listed}; all in "
        f"[docs/peers.md](docs/peers.md)). {data['gpu']['name']}, CUDA graph, weights and inputs "
        f"cold, {data['runs'][-1]['date'][:10]} ([{Path(name).name}]({name})).\n\n"
        + "\n".join(parts)
    )


def results() -> str:
    parts = []
    peers = []
    gpu = []
    for path in sorted((ROOT / "bench/results").glob("*.json")):
        data = json.loads(path.read_text())
        if (
            not isinstance(data, dict)
            or "results" not in data
            or path.name.startswith(("sm80_", "sm90_"))
        ):
            continue
        name = str(path.relative_to(ROOT))
        if "checkpoint" in data:
            parts.insert(0, run_table(data, name))
        elif path.name.startswith("peers_layers"):
            peers.append(peers_table(data, name))
        elif path.name.startswith("layers_"):
            gpu.append(bench_table(data, name))
        elif "problem" in data and path.name.startswith("cpu_"):
            parts.append(bench_table(data, name))
    if not (peers or gpu or parts):
        return "No result file is committed yet: `make demo` prints this machine's.\n"
    return "\n".join([*peers, *gpu, *parts])


def main() -> int:
    readme = ROOT / "README.md"
    text = readme.read_text()
    head, rest = text.split(BEGIN, 1)
    marker, rest = rest.split("\n", 1)
    _, tail = rest.split(END, 1)
    wanted = f"{head}{BEGIN}{marker}\n\n{results()}\n{END}{tail}"
    if "--check" in sys.argv[1:]:
        return int(text != wanted)
    if text != wanted:
        readme.write_text(wanted)
    return 0


if __name__ == "__main__":
    sys.exit(main())
