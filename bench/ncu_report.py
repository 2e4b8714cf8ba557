#!/usr/bin/env python3
"""What limits a layer's kernels on a GPU, as Nsight Compute (ncu) counts it.

    python bench/ncu_report.py --cli build/octomoe --json ncu.json
    python bench/ncu_report.py --cli build/octomoe qwen3-30b/int8_channel/1,8192 ...
    python bench/ncu_report.py --cli build/octomoe --replay range --json whole_layers.json

A case is SHAPE/SCHEME/TOKENS[,TOKENS]: a shape is a preset of `octomoe bench`, PRESET@N (the first
N experts, one rank) or HIDDENxINTERMEDIATExEXPERTSxTOPK. For each, ncu runs `octomoe bench --device
cuda --profile` and counts the kernels of its one call; what the same process measured outside of
that call (times, clock, floor) goes beside them as `bench`. The clocks stay as they are.

ncu replays each kernel once a pass, alone: NOTES, also in the JSON, say how that differs from a
layer in use. A case that fails is reported with ncu's last lines, and the next one begins; a
metric that this ncu or GPU does not have is null.
"""

from __future__ import annotations

import argparse
import csv
import datetime
import itertools
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

CASES = (
    "qwen3-30b/int8_channel/1,4,1024,8192",
    "qwen3-30b/int8_block/8192",
    "qwen3-30b/int8_hybrid/8192",
    "7168x2048x8x8/int8_channel/4096",  # GEMM1: 8 experts of 4096 rows, N 4096, K 7168
)

ELAPSED, ACTIVE = ".avg.pct_of_peak_sustained_elapsed", ".avg.pct_of_peak_sustained_active"
# Field: ncu's metric, what its base unit is multiplied by, what it is. Parts of a peak are of the
# whole kernel's time (elapsed) unless the name of the metric ends in "active".
METRICS = {
    "us": ("gpu__time_duration.sum", 1e-3, "time of the kernel alone"),
    "clock_ghz": ("sm__cycles_elapsed.avg.per_second", 1e-9, "clock of the SMs"),
    "sm_active_percent": ("sm__cycles_active" + ELAPSED, 1, "SMs that hold a warp"),
    "dram_read_bytes": ("dram__bytes_read.sum", 1, "DRAM to L2"),
    "dram_write_bytes": ("dram__bytes_write.sum", 1, "L2 to DRAM"),
    "dram_percent": ("gpu__dram_throughput" + ELAPSED, 1, "DRAM's busiest part"),
    "l2_bytes": ("lts__t_bytes.sum", 1, "bytes asked of L2's slices"),
    "l2_percent": ("lts__throughput" + ELAPSED, 1, "L2's busiest part"),
    "l2_hit_percent": ("lts__t_sector_hit_rate.pct", 1, "sectors found in L2"),
    "l2_fabric_sectors": (
        "lts__t_sectors_srcunit_ltcfabric.sum",
        1,
        "sectors (32 bytes) asked for by the other half of L2",
    ),
    "l2_to_l1_bytes": ("l1tex__m_xbar2l1tex_read_bytes.sum", 1, "L2 to SMs, bulk copies included"),
    "l1_to_l2_bytes": ("l1tex__m_l1tex2xbar_write_bytes.sum", 1, "SMs to L2"),
    "bank_read_percent": ("l1tex__data_bank_reads" + ELAPSED, 1, "reads of shared memory's banks"),
    "bank_write_percent": ("l1tex__data_bank_writes" + ELAPSED, 1, "writes, bulk copies' as well"),
    "shared_wavefronts": (
        "l1tex__data_pipe_lsu_wavefronts_mem_shared.sum",
        1,
        "cycles of the data stage for ld/st/ldmatrix/atom.shared; not wgmma's own reads",
    ),
    "shared_percent": (
        "l1tex__data_pipe_lsu_wavefronts_mem_shared" + ELAPSED,
        1,
        "the same, of one a cycle and SM",
    ),
    "shared_conflicts": (
        "l1tex__data_bank_conflicts_pipe_lsu_mem_shared.sum",
        1,
        "those of them that bank conflicts add",
    ),
    "instructions": ("smsp__inst_executed.sum", 1, "warp instructions"),
    "issue_percent": ("sm__inst_issued" + ELAPSED, 1, "issue slots taken"),
    "issue_active_percent": ("sm__inst_issued" + ACTIVE, 1, "the same, while an SM has warps"),
    "no_eligible_percent": (
        "smsp__issue_inst0" + ACTIVE,
        1,
        "cycles in which a scheduler with warps had none to issue",
    ),
    "tensor_percent": ("sm__pipe_tensor_cycles_active" + ELAPSED, 1, "tensor cores busy"),
    "tensor_int8_percent": (
        "sm__pipe_tensor_op_imma_cycles_active" + ELAPSED,
        1,
        "the same, integer products alone",
    ),
    "warps_percent": ("sm__warps_active" + ACTIVE, 1, "warps on an SM, of the 64 it can hold"),
    "warp_cycles_per_issue": (
        "smsp__average_warp_latency_per_inst_issued.ratio",
        1,
        "cycles of a warp for each instruction it issues, the sum of all stalls",
    ),
    "registers": ("launch__registers_per_thread", 1, "registers of a thread"),
    "shared_bytes": ("launch__shared_mem_per_block", 1, "shared memory of a CTA"),
}
# Reasons why a warp did not issue: smsp__average_warps_issue_stalled_*_per_issue_active, cycles for
# each instruction issued. "selected" is the issue itself.
STALL = "smsp__average_warps_issue_stalled_{}_per_issue_active.ratio"
STALLS = (
    "barrier",
    "branch_resolving",
    "dispatch_stall",
    "drain",
    "gmma",
    "imc_miss",
    "lg_throttle",
    "long_scoreboard",
    "math_pipe_throttle",
    "membar",
    "mio_throttle",
    "misc",
    "no_instruction",
    "not_selected",
    "short_scoreboard",
    "sleeping",
    "tex_throttle",
    "wait",
)
# Of units that `--print-units base` might still give with a prefix.
UNITS = {"us": 1e3, "usecond": 1e3, "ms": 1e6, "msecond": 1e6, "s": 1e9, "second": 1e9}
PREFIXES = {"K": 1e3, "M": 1e6, "G": 1e9, "T": 1e12}

NOTES = {
    "clock": "--clock-control none. Passes are short and far apart, so the GPU does not reach its "
    "power limit: clock_ghz is higher than bench.clock_mhz, of the same layer without pause.",
    "alone": "Each kernel runs alone: launches that overlap in use (programmatic dependent launch, "
    "prefetches for the next kernel) follow one another here, so the sum of us is more than a "
    "layer takes, bench.median_us; bench.stages_us are between events, launch by launch.",
    "all": "--cache-control all: caches are flushed and invalidated before each pass. Weights then "
    "come from DRAM, as in the bench, which gives every call others; what the kernel before has "
    "left in L2 (x, h, rows before combine: up to L2's size) is read from DRAM here.",
    "none": "--cache-control none: passes after a kernel's first find what its last pass and the "
    "restoring of its memory left in L2, so that weights that fit there are not read from DRAM.",
    "range": "The range between cuProfilerStart and cuProfilerStop is replayed as a whole, so that "
    "launches overlap and find each other's results in L2: one row for the layer and its route.",
    "stalls": "Averages over all warps, waiting producers and consumers alike: a warp that waits "
    "on an mbarrier by design counts as much as one that holds up the rest.",
}


def note(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def find_ncu() -> str:
    """The one on PATH, else CUDA's, else the newest in NVIDIA's folder."""
    newest = sorted(Path("/opt/nvidia/nsight-compute").glob("*/ncu"))
    for path in [shutil.which("ncu"), "/usr/local/cuda/bin/ncu", *map(str, newest[::-1])]:
        if path and os.access(path, os.X_OK):
            return path
    raise SystemExit("ncu: found none on PATH, in /usr/local/cuda and in /opt/nvidia; give --ncu")


def output(command: list[str]) -> str:
    """What a command prints, nothing if it fails."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout if done.returncode == 0 else ""


def run(command: list[str], log: Path, timeout: float) -> tuple[int, str]:
    """Exit status and what was printed; past the time limit, the command and its children end."""
    with log.open("w") as out:
        process = subprocess.Popen(
            command, stdout=out, stderr=subprocess.STDOUT, start_new_session=True
        )
        try:
            status = process.wait(timeout)
        except BaseException as error:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            if not isinstance(error, subprocess.TimeoutExpired):
                raise
            status = 124
    return status, log.read_text(errors="replace")


def parse_case(text: str) -> list[tuple[str, str, int]]:
    """(shape, scheme, tokens) for each number of tokens."""
    try:
        shape, scheme, tokens = text.split("/")
        return [(shape, scheme, int(t)) for t in tokens.split(",")]
    except ValueError:
        raise SystemExit(f"expected SHAPE/SCHEME/TOKENS[,TOKENS], got {text!r}") from None


def shape_options(shape: str) -> list[str]:
    if re.fullmatch(r"\d+(x\d+){3}", shape):
        names = ("--hidden", "--intermediate", "--experts", "--top-k")
        return list(itertools.chain(*zip(names, shape.split("x"), strict=True)))
    model, _, local = shape.partition("@")
    return ["--model", model] + (["--experts-local", local] if local else [])


def number(text: str | None, unit: str) -> float | None:
    """A cell in base units (ns, bytes, cycles a second); null where ncu gives no number."""
    try:
        value = float((text or "").replace(",", ""))
    except ValueError:
        return None
    head = unit.split("/")[0]
    scale = UNITS.get(head, 1.0)
    if head[:1] in PREFIXES and re.fullmatch(r"[KMGT](byte|B|hz|Hz|bit)s?", head):
        scale = PREFIXES[head[0]]
    if unit.startswith("cycle/"):
        scale = {"cycle/nsecond": 1e9, "cycle/ns": 1e9, "cycle/usecond": 1e6, "cycle/us": 1e6}.get(
            unit, 1.0
        )
    return value * scale


def stage_of(row: dict[str, str], stages: list[str]) -> tuple[str | None, str]:
    """Stage and kernel: with --print-nvtx-rename a name is "range/kernel"."""
    name = row.get("Kernel Name", "")
    head, slash, kernel = name.partition("/")
    if slash and (head in stages or not stages):
        return head, kernel
    ranges = " ".join(v for k, v in row.items() if k and "Push/Pop_Range" in k and v)
    parts = re.split(r"[:\",]", ranges)
    return next((p.strip() for p in reversed(parts) if p.strip() in stages), None), name


def kernels_of(text: str, stages: list[str]) -> list[dict]:
    """The rows of `--csv --page raw`: a header, units, one line for each kernel."""
    lines = [line for line in text.splitlines() if line and not line.startswith("==")]
    begin = next((i for i, line in enumerate(lines) if line.startswith('"ID"')), None)
    if begin is None:
        return []
    header, units, *rows = csv.reader(lines[begin:])
    unit = dict(zip(header, units, strict=False))
    kernels = []
    for cells in rows:
        row = dict(zip(header, cells, strict=False))
        if len(cells) < len(header) or not row["ID"].isdigit():
            continue

        def read(metric: str, row: dict = row) -> float | None:
            return number(row.get(metric), unit.get(metric, ""))

        stage, name = stage_of(row, stages)
        kernel = {"stage": stage, "kernel": name}
        kernel |= {"grid": row.get("Grid Size"), "block": row.get("Block Size")}
        for field, (metric, scale, _) in METRICS.items():
            value = read(metric)
            kernel[field] = None if value is None else float(f"{value * scale:.6g}")
        stalls = {s: v for s in STALLS if (v := read(STALL.format(s)))}
        top = sorted(stalls, key=stalls.get, reverse=True)[:5]
        kernel["stalls"] = {s: round(stalls[s], 3) for s in top} or None
        kernels.append(kernel)
    return kernels


class Report:
    """Runs the cases; the file is written after each."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        self.ncu = options.ncu or find_ncu()
        self.metrics = [metric for metric, _, _ in METRICS.values()]
        if options.replay != "kernel":
            self.metrics = [m for m in self.metrics if not m.startswith("launch__")]
        self.metrics += [STALL.format(stall) for stall in STALLS]
        query = ["nvidia-smi", "--query-gpu=name,driver_version", "--format=csv,noheader"]
        name, _, driver = (output(query).splitlines() or [""])[0].partition(", ")
        version = re.findall(r"^Version (\S+)", output([self.ncu, "--version"]), re.MULTILINE)
        self.data = {
            "date": datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%dT%H:%M:%SZ"),
            "commit": options.commit or os.environ.get("OCTOMOE_COMMIT"),
            "gpu": {"name": name or None, "driver": driver or None},
            "ncu": version[0] if version else None,
            "replay": options.replay,
            "cache_control": options.cache,
            "notes": self.notes(),
            "metrics": {f: {"metric": m, "is": text} for f, (m, _, text) in METRICS.items()},
            "missing_metrics": [],
            "cases": [],
        }
        self.data["metrics"]["stalls"] = {
            "metric": STALL.format("*"),
            "is": "cycles a warp waits for each instruction issued, the five largest reasons",
        }

    def notes(self) -> list[str]:
        kernel = self.options.replay == "kernel"
        chosen = ["clock", "alone" if kernel else "range", self.options.cache, "stalls"]
        return [NOTES[n] for n in chosen]

    def drop_unknown(self, said: str) -> bool:
        """Leaves out the metrics that ncu complained of, else those it does not list."""
        complaints = "\n".join(line for line in said.splitlines() if "metric" in line.lower())
        if not complaints:
            return False
        gone = [m for m in self.metrics if re.search(rf"\b{m.split('.')[0]}\b", complaints)]
        if not gone:
            known = set(re.findall(r"^\s*(\w+__\w+)", output([self.ncu, "--query-metrics"]), re.M))
            gone = [m for m in self.metrics if m.split(".")[0] not in known]
            gone = [m for m in gone if not m.startswith("launch__")]
        if not gone or len(gone) == len(self.metrics):
            return False
        note(f"without {', '.join(gone)}")
        self.metrics = [m for m in self.metrics if m not in gone]
        self.data["missing_metrics"] += gone
        return True

    def profile(self, shape: str, scheme: str, tokens: int, folder: Path) -> dict:
        """One case: the bench under ncu."""
        table, result = folder / "ncu.csv", folder / "bench.json"
        for old in (table, result):
            old.unlink(missing_ok=True)
        command = [self.ncu, "--profile-from-start", "off", "--target-processes"]
        command += ["application-only", "--clock-control", "none"]
        command += ["--cache-control", self.options.cache, "--replay-mode", self.options.replay]
        command += ["--nvtx", "--print-nvtx-rename", "kernel", "--print-kernel-base", "function"]
        command += ["--csv", "--page", "raw", "--print-units", "base", "--log-file", str(table)]
        command += ["--metrics", ",".join(self.metrics)]
        command += [self.options.cli, "bench", "--device", "cuda", "--profile", "--warmup", "2"]
        command += ["--iters", str(self.options.iters), *shape_options(shape)]
        command += ["--scheme", scheme, "--tokens", str(tokens), "--json", str(result)]
        begin = time.monotonic()
        status, printed = run(command, folder / "printed", self.options.timeout)
        seconds = round(time.monotonic() - begin, 1)
        said = table.read_text(errors="replace") if table.is_file() else ""
        bench = None
        if status == 0 and result.is_file():
            bench = json.loads(result.read_text())
        stages = {}
        case = {"shape": shape, "scheme": scheme, "tokens": tokens, "seconds": seconds}
        if bench:
            row = next(r for r in bench["results"] if r["kind"] == "scheme")
            stages = {s["name"]: s["median_us"] for s in row["stages"]}
            fields = ("median_us", "min_us", "clock_mhz", "clock_low_mhz", "floor_us", "floor_by")
            fields += ("bytes", "ops", "touched_experts", "weight_copies")
            case["problem"] = bench["problem"]
            case["bench"] = {f: row.get(f) for f in fields}
            case["bench"] |= {"ceilings": bench["ceilings"], "stages_us": stages}
            self.data["commit"] = self.data["commit"] or bench["commit"]
            known = {k: v for k, v in self.data["gpu"].items() if v is not None}
            self.data["gpu"] |= bench["gpu"] | known
        passes = [int(p) for p in re.findall(r"(\d+) pass(?:es)?\b", printed + said)]
        case["passes"] = max(passes, default=None)
        case["kernels"] = kernels_of(said, list(stages))
        if status != 0 or not case["kernels"]:
            # What ncu says of itself first, then the rest; progress is no news.
            lines = [s for s in said.splitlines() if s.startswith("==")] + printed.splitlines()
            lines = [s.split("\r")[-1] for s in lines if s.strip() and "==PROF==" not in s]
            errors = [s for s in lines if s.startswith(("==ERROR==", "octomoe"))]
            case["error"] = {
                "status": status,
                "last_lines": list(dict.fromkeys(errors + lines[-10:])),
            }
        return case

    def add(self, shape: str, scheme: str, tokens: int) -> None:
        note(f"{shape} {scheme} T = {tokens}")
        with tempfile.TemporaryDirectory() as folder:
            case = self.profile(shape, scheme, tokens, Path(folder))
            while not case["kernels"] and case["error"]["status"] != 124:
                if not self.drop_unknown("\n".join(case["error"]["last_lines"])):
                    break
                case = self.profile(shape, scheme, tokens, Path(folder))
        if error := case.get("error"):
            note(f"  failed with {error['status']}:")
            note("".join(f"    {line}\n" for line in error["last_lines"]))
        note(f"  {len(case['kernels'])} kernels, {case['passes']} passes, {case['seconds']} s")
        self.data["cases"].append(case)
        self.write()

    def write(self) -> None:
        path = self.options.json
        if path:
            part = path.with_suffix(".part")
            part.write_text(json.dumps(self.data, indent=1) + "\n")
            part.replace(path)

    def print(self) -> None:
        """A short table: the kernels with 3 % or more of a case's time."""
        gpu = self.data["gpu"]
        print(f"{gpu.get('name')}, driver {gpu.get('driver')}, ncu {self.data['ncu']}")
        print("% of peak; MB of DRAM read+written, L2 to SMs; rd+wr, lsu: shared memory")
        head = ("stage", "us", "GHz", "DRAM", "MB", "L2", "L2>L1", "rd+wr", "lsu")
        print(line_of(head + ("issue", "tensor")) + "  stalls")
        for case in self.data["cases"]:
            bench = case.get("bench")
            text = f"{case['shape']} {case['scheme']} T={case['tokens']}"
            if bench:
                text += f": bench {bench['median_us']:.1f} us at {bench['clock_mhz'] or 0:.0f} MHz"
                text += f", floor {bench['floor_us']:.1f} ({bench['floor_by']})"
            print(text + (", FAILED" if "error" in case else ""))
            total = sum(k["us"] or 0 for k in case["kernels"])
            for kernel in case["kernels"]:
                if kernel["us"] is not None and kernel["us"] < 0.03 * total:
                    continue
                print(row_of(kernel))


WIDTHS = (11, 7, 5, 5, 11, 4, 7, 6, 4, 6, 7)


def line_of(cells: tuple[str, ...]) -> str:
    first, *rest = (f"{c:>{w}}" for c, w in zip(cells, WIDTHS, strict=True))
    return " ".join([first.strip().ljust(WIDTHS[0]), *rest])


def row_of(kernel: dict) -> str:
    def shown(field: str, digits: int = 0, scale: float = 1) -> str:
        value = kernel[field]
        return "-" if value is None else f"{value * scale:.{digits}f}"

    cells = (
        (kernel["stage"] or kernel["kernel"])[: WIDTHS[0]],
        shown("us", 1),
        shown("clock_ghz", 2),
        shown("dram_percent"),
        shown("dram_read_bytes", 1, 1e-6) + "+" + shown("dram_write_bytes", 1, 1e-6),
        shown("l2_percent"),
        shown("l2_to_l1_bytes", 1, 1e-6),
        shown("bank_read_percent") + "+" + shown("bank_write_percent"),
        shown("shared_percent"),
        shown("issue_percent"),
        shown("tensor_percent"),
    )
    stalls = list((kernel["stalls"] or {}).items())[:3]
    return line_of(cells) + "  " + ", ".join(f"{s} {v:.1f}" for s, v in stalls)


def main() -> int:
    """Profile the cases, write the JSON, print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("cases", nargs="*", default=CASES, help="SHAPE/SCHEME/TOKENS[,TOKENS]")
    parser.add_argument("--cli", required=True, help="the octomoe executable")
    parser.add_argument("--json", type=Path, help="output")
    parser.add_argument("--commit", help="default: $OCTOMOE_COMMIT, else what the executable finds")
    parser.add_argument("--ncu", help="default: the one on PATH, else in CUDA's folders")
    parser.add_argument(
        "--replay",
        default="kernel",
        choices=("kernel", "range", "app-range"),
        help="each kernel alone; the whole call; the whole call, by running the command anew",
    )
    parser.add_argument(
        "--cache", default="all", choices=("all", "none"), help="what is flushed before a pass"
    )
    parser.add_argument("--iters", type=int, default=5, help="timed rounds of the bench")
    parser.add_argument("--timeout", type=float, default=60, help="seconds a case may take")
    options = parser.parse_args()
    cases = [case for text in options.cases for case in parse_case(text)]
    report = Report(options)
    for case in cases:
        report.add(*case)
    report.print()
    return 1 if any("error" in case for case in report.data["cases"]) else 0


if __name__ == "__main__":
    sys.exit(main())
