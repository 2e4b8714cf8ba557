#!/usr/bin/env python3
"""OctoMoE and its peers on one NVIDIA GPU, timed in the same process in interleaved rounds.

    bench/peers/fetch.py --into .peers                     once: the peers' packages from PyPI
    python bench/gpu_peers.py --layers --json layers.json
    python bench/gpu_peers.py --gemms --library build-peers/libcutlass_int8.so --json gemms.json
    python bench/gpu_peers.py --layers --models qwen3-30b --tokens 1,64 --peers octomoe,lmdeploy

Layers: bfloat16 x, given top-k ids and weights, bfloat16 out, CUDA graphs. Every contender's output
is compared with a float64 reference on the unquantised weights before it is timed; one that is
wrong is reported and not timed. A peer that is not there is named with the reason.

Needs PyTorch and Triton with a GPU, and the package octomoe (PYTHONPATH=python in the source tree).
docs/peers.md says what each peer is, how to get it, and what the figures mean.
"""

from __future__ import annotations

import argparse
import dataclasses
import datetime
import functools
import gc
import importlib
import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))
sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "python"))

import torch
from peers import PeerMissing
from peers.harness import Harness, capture, relative_error
from peers.problems import GEMM_CASES, MODELS, GemmProblem, LayerProblem

PEERS = ("octomoe", "lmdeploy", "humming", "deepgemm", "hybrid", "library")
SCHEMES = (
    "int8_channel",
    "int8_channel_prepacked",
    "int8_channel_any_order",  # of layers
    "int8_block",
    "int8_hybrid",
)  # by default, of OctoMoE
WIDE_SCHEMES = ("int8_block:block_k=256", "int8_hybrid:block_k=256")
TOKENS = (1, 4, 16, 64, 256, 1024, 4096, 8192)
WRONG = 0.10  # relative error of an output that is not counted; INT8 layers have 0.01 to 0.03


def note(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def commit() -> str:
    """$OCTOMOE_COMMIT, else the source tree's, else "unknown"."""
    if named := os.environ.get("OCTOMOE_COMMIT"):
        return named
    root = Path(__file__).resolve().parent.parent
    command = ["git", "-C", str(root), "describe", "--always", "--dirty", "--abbrev=12"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def calls_for(tokens: int) -> int:
    """Calls in a graph: enough different routings that few weights are found in L2."""
    return 16 if tokens <= 64 else 8 if tokens <= 1024 else 4


class Report:
    """What goes into the JSON file; written after every problem, so that nothing is lost.

    `runs` describes each run of this command; a result names its run. With `append` the file's
    other results stay, so that one file can come from several runs: compare within a run only.
    """

    def __init__(self, path: Path | None, append: bool) -> None:
        self.path = path
        properties = torch.cuda.get_device_properties(0)
        gpu = {
            "name": properties.name,
            "multiprocessors": properties.multi_processor_count,
            "memory_bytes": properties.total_memory,
            "l2_bytes": properties.L2_cache_size,
        }
        self.data = {"gpu": gpu, "runs": [], "results": [], "gemms": []}
        if append and path and path.is_file():
            self.data = json.loads(path.read_text())
            if self.data["gpu"]["name"] != gpu["name"]:
                raise SystemExit(
                    f"--append: expected a file of {gpu['name']}, got {self.data['gpu']['name']}"
                )
        self.run = {
            "date": datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%dT%H:%M:%SZ"),
            "commit": commit(),
            "torch": torch.__version__,
            "cuda": torch.version.cuda,
            "peers": {},
            "missing": {},
            "seconds": {},
            "ceilings": {},
            "humming_tiles": {},
        }
        self.data["runs"].append(self.run)

    def add(self, kind: str, row: dict, keys: tuple[str, ...]) -> None:
        """Appends a row of this run; rows of earlier runs with the same `keys` go."""
        mine = len(self.data["runs"]) - 1
        self.data[kind] = [
            other
            for other in self.data[kind]
            if other["run"] == mine or any(other[key] != row[key] for key in keys)
        ]
        self.data[kind].append({"run": mine, **row})

    def mine(self, kind: str) -> list[dict]:
        """This run's rows."""
        return [row for row in self.data[kind] if row["run"] == len(self.data["runs"]) - 1]

    def write(self) -> None:
        if self.path:
            part = self.path.with_suffix(".part")
            part.write_text(json.dumps(self.data, indent=1) + "\n")
            part.replace(self.path)


class Peers:
    """The adapters that can run here."""

    def __init__(self, arguments: argparse.Namespace, report: Report) -> None:
        self.site = str(arguments.peers_dir)
        self.reference = str(arguments.reference_library), str(arguments.reference_dir)
        self.peer_file = str(arguments.peer_file)
        self.adapters = {}
        for name in arguments.peers:
            unused = ("lmdeploy",) if not arguments.layers else ()
            unused += ("deepgemm", "library") if not arguments.gemms else ()
            if name in unused:
                continue
            try:
                adapter = importlib.import_module(f"peers.{name}_peer")
                if name == "lmdeploy":
                    adapter.modules(self.site)
                elif name in ("humming", "deepgemm"):
                    adapter.load(self.site)
                elif name == "hybrid":
                    adapter.load(*self.reference)
                elif name == "library":
                    self.variants = adapter.variants(self.peer_file)
            except (PeerMissing, ImportError) as error:
                report.run["missing"][name] = str(error)
                note(f"gpu_peers: without {name}: {error}")
                continue
            self.adapters[name] = adapter
            version = adapter.version(self.peer_file) if name == "library" else adapter.VERSION
            report.run["peers"][name] = version

    def layers(self, problem: LayerProblem, arguments: argparse.Namespace) -> dict[str, object]:
        """Contender's name -> its layer. Weights are quantised here."""
        made: dict[str, object] = {}
        model = problem.model
        for name, adapter in self.adapters.items():
            if name == "octomoe":
                for scheme in arguments.schemes:
                    made[scheme] = adapter.Layer(problem, scheme)
            elif name == "hybrid":
                if model.routed == model.experts and model.name in arguments.reference_models:
                    made["reference_hybrid"] = adapter.Layer(problem, *self.reference)
            elif name in ("lmdeploy", "humming"):
                made[name] = adapter.Layer(problem, self.site)
        return made

    def gemms(self, problem: GemmProblem, arguments) -> dict[str, dict[str, object]]:
        """Form -> its variants: name -> a function of a copy's index that makes a call."""
        made: dict[str, dict[str, object]] = {}
        for name, adapter in self.adapters.items():
            if problem.uniform and name not in ("octomoe", "library"):
                continue
            try:
                if name == "octomoe":
                    schemes = [s for s in arguments.schemes if not s.endswith(adapter.ANY_ORDER)]
                    for scheme in schemes[: 1 if problem.uniform else None]:
                        made[scheme] = {scheme: adapter.GroupedGemm(problem, scheme).call}
                elif name == "library":
                    made |= self.make_peer_gemms(problem)
                elif name == "hybrid":
                    gemm = adapter.GroupedGemm(problem, *self.reference)
                    made["reference_hybrid"] = {"reference_hybrid": gemm.call}
                elif name == "deepgemm":
                    made["deepgemm_fp8"] = {
                        "deepgemm_fp8": adapter.GroupedGemm(problem, self.site).call
                    }
                elif name == "humming":
                    gemm = adapter.GroupedGemm(problem, self.site)
                    configs = gemm.configs(arguments.humming_best_from > 0)
                    tiles = {
                        "x".join(map(str, (*c["block_shape"][:2], c.get("num_ctas_per_sm", 1))))
                        + f"_{index}": functools.partial(gemm.call, config=c)
                        for index, c in enumerate(configs)
                    }
                    made["humming_default"] = dict([next(iter(tiles.items()))])
                    if len(tiles) > 1:
                        made["humming_best"] = tiles
            except (RuntimeError, AssertionError, ValueError, TypeError) as error:
                note(f"gpu_peers: {name} failed on {problem.case.name}: {error}")
        return made

    def make_peer_gemms(self, problem: GemmProblem) -> dict[str, dict[str, object]]:
        """A form is a variant's name up to the first digit."""
        made: dict[str, dict[str, object]] = {}
        for variant, index in self.variants.items():
            if ("batched" in variant) != problem.uniform:
                continue
            try:
                gemm = self.adapters["library"].GroupedGemm(problem, self.peer_file, index)
            except RuntimeError as error:
                note(f"gpu_peers: {variant} on {problem.case.name}: {error}")
                continue
            form = re.sub(r"_?\d.*", "", variant)
            made.setdefault(form, {})[variant] = gemm.call
        return made


def humming_calls(layer, inputs, arguments, report: Report) -> dict[str, object]:
    """Contender -> a function of one Inputs that makes a call: default tiles, and the best."""
    tokens = len(inputs[0].ids)
    found = {}
    # With routes to other GPUs only the grouped form leaves their rows out.
    searched = "indexed" if layer.model.routed == layer.model.experts else "grouped"
    for kind in arguments.humming:
        tiles = {f"humming_{kind}": layer.defaults(kind, tokens)}
        if kind == searched and 0 < arguments.humming_best_from <= tokens:
            quick = Harness(seconds=0.1, warmup=0.05, min_rounds=3)
            best = layer.best(kind, inputs[0], quick)
            report.run["humming_tiles"][f"{layer.model.name}, T={tokens}, {kind}"] = best
            tiles["humming_best"] = best
        for name, (first, second) in tiles.items():
            found[name] = lambda i, k=kind, a=first, b=second: layer.call(i, k, a, b)
    return found


def time_layers(arguments, harness: Harness, peers: Peers, report: Report) -> None:
    seconds = report.run["seconds"]
    if "lmdeploy" in peers.adapters:
        models = [MODELS[name] for name in arguments.models]
        spent = peers.adapters["lmdeploy"].precompile(peers.site, models, arguments.tokens)
        seconds["lmdeploy_compile"] = round(spent, 1)
        note(f"gpu_peers: lmdeploy's kernels compiled in {spent:.0f} s")
    for model_name in arguments.models:
        begin = time.monotonic()
        problem = LayerProblem(MODELS[model_name])
        layers = peers.layers(problem, arguments)
        problem.drop_float_weights()
        torch.cuda.empty_cache()
        if "humming" in layers:
            layers["humming"].compile_defaults(arguments.humming, arguments.tokens)
        note(f"gpu_peers: {model_name} prepared in {time.monotonic() - begin:.1f} s")
        for tokens in arguments.tokens:
            time_size(arguments, harness, problem, layers, tokens, report)
            report.write()
        seconds[model_name] = round(time.monotonic() - begin, 1)
        if "humming" in layers:
            seconds[f"{model_name}_humming_compile"] = round(layers["humming"].compile_seconds, 1)
        del problem, layers
        gc.collect()
        torch.cuda.empty_cache()


def time_size(arguments, harness, problem, layers, tokens: int, report: Report) -> None:
    """One model at one number of tokens: check everyone, then time those that are right."""
    inputs = problem.inputs(tokens, calls_for(tokens))
    rows = problem.checked_rows(tokens).to(problem.device)
    reference = problem.reference[: len(rows)]
    makers = {}
    for name, layer in layers.items():
        if name == "lmdeploy":
            layer.new_size()
        if name == "humming":
            makers |= humming_calls(layer, inputs, arguments, report)
        else:
            makers[name] = layer.call
    graphs, errors, alive, whole = {}, {}, [], None
    for name, make in makers.items():
        try:
            calls = [make(each) for each in inputs]
            out = calls[0]()
            torch.cuda.synchronize()
            error = relative_error(out[rows], reference)
            whole = out if whole is None else whole
            against = relative_error(out, whole)
            errors[name] = error, against
            if not (error < WRONG and against < 2 * WRONG):
                note(f"gpu_peers: {name} is wrong at T={tokens}: error {error:.3f}, {against:.3f}")
                continue
            graphs[name] = capture(calls), len(calls)
            alive.append(calls)  # a graph holds addresses, not tensors
        except (RuntimeError, AssertionError, ValueError, TypeError) as error:
            if "illegal memory access" in str(error):
                raise
            note(f"gpu_peers: {name} failed at T={tokens}: {type(error).__name__}: {error}")
            report.run["missing"][f"{name}, {problem.model.name}, T={tokens}"] = str(error)[:300]
    floor = problem.floor(inputs, report.run["ceilings"])
    model = {"model": problem.model.name, "tokens": tokens}
    for name, sample in harness.run(graphs).items():
        error, against = errors[name]
        report.add(
            "results",
            model
            | {"name": name, "error": error, "difference_to_first": against}
            | dataclasses.asdict(sample)
            | floor,
            ("model", "tokens"),
        )
    line = ", ".join(
        f"{r['name']} {r['median_us']:.1f}"
        for r in report.mine("results")
        if (r["model"], r["tokens"]) == (problem.model.name, tokens)
    )
    note(f"gpu_peers: {problem.model.name} T={tokens}: {line}")
    del graphs, alive


def time_gemms(arguments, harness: Harness, peers: Peers, report: Report) -> None:
    """Every case twice: ragged rows, and for batched variants as many rows in every group."""
    begin = time.monotonic()
    for case_name in arguments.cases:
        for uniform in (False, True):
            if uniform and not any("batched" in name for name in getattr(peers, "variants", ())):
                continue
            time_case(arguments, harness, peers, GEMM_CASES[case_name], uniform, report)
            gc.collect()
            torch.cuda.empty_cache()
            report.write()
    report.run["seconds"]["gemms"] = round(time.monotonic() - begin, 1)


def time_case(arguments, harness, peers, case, uniform: bool, report: Report) -> None:
    """Checks every variant, keeps the fastest of each form in a short race, then times these."""
    problem = GemmProblem(case, uniform)
    forms = peers.gemms(problem, arguments)
    count = max(2, problem.copies) if case.rows > 1000 else max(4, problem.copies)
    quick = Harness(seconds=0.1, warmup=0.05, min_rounds=3)
    graphs, errors, chosen, alive = {}, {}, {}, []
    for form, variants in forms.items():
        race = {}
        for name, make in variants.items():
            try:
                calls = [make(index % problem.copies) for index in range(count)]
                out = calls[0]()
                torch.cuda.synchronize()
                rows = problem.checked
                place = getattr(calls[0], "place", None)  # where the problem's rows are in out
                error = relative_error(
                    out[rows if place is None else place[rows]], problem.reference
                )
                if not error < WRONG:
                    note(f"gpu_peers: {form} {name} is wrong on {case.name}: error {error:.3f}")
                    continue
                race[name] = capture(calls), len(calls)
                errors[form, name] = error
                alive.append(calls)
            except (RuntimeError, AssertionError, ValueError, TypeError) as error:
                if "illegal memory access" in str(error):
                    raise
                note(f"gpu_peers: {form} {name} failed on {case.name}: {error}")
                report.run["missing"][f"{form} {name}, {case.name}"] = str(error)[:300]
        if not race:
            continue
        first = next(iter(race))
        times = quick.run(race) if len(race) > 1 else {}
        fastest = min(times, key=lambda name: times[name].median_us, default=first)
        graphs[form] = race[fastest]
        chosen[form] = fastest, {name: sample.median_us for name, sample in times.items()}
    if not graphs:
        return
    shape = dataclasses.asdict(case) | {"case": case.name, "uniform": uniform}
    floor = problem.floor(report.run["ceilings"])
    for form, sample in harness.run(graphs).items():
        variant, race = chosen[form]
        report.add(
            "gemms",
            shape
            | {"name": form, "variant": variant, "error": errors[form, variant]}
            | dataclasses.asdict(sample)
            | {"tops": 1e-6 * floor["ops"] / sample.median_us, "race_us": race}
            | floor,
            ("case", "uniform"),
        )
    mine = report.mine("gemms")
    mine = [r for r in mine if r["case"] == case.name and r["uniform"] == uniform]
    label = case.name + (" (equal rows)" if uniform else "")
    note(f"gpu_peers: {label}: " + ", ".join(f"{r['name']} {r['median_us']:.1f}" for r in mine))


def gemm_table(gemms: list[dict]) -> str:
    """Microseconds by form and case."""
    cases = list(dict.fromkeys(r["case"] for r in gemms))
    by_key = {(r["name"], r["uniform"], r["case"]): r for r in gemms}
    lines = [f"{'us':28}" + "".join(f"{case:>18}" for case in cases)]
    for name, uniform in dict.fromkeys((r["name"], r["uniform"]) for r in gemms):
        cells = (by_key.get((name, uniform, case)) for case in cases)
        label = name + (", equal rows" if uniform else "")
        lines.append(
            f"{label:28}" + "".join(f"{c['median_us']:18.1f}" if c else f"{'-':>18}" for c in cells)
        )
    floors = [next(r["floor_us"] for r in gemms if r["case"] == case) for case in cases]
    lines.append(f"{'floor':28}" + "".join(f"{floor:18.1f}" for floor in floors))
    return "\n".join(lines)


def layer_table(results: list[dict]) -> str:
    """Microseconds by model, contender and T, with the floor and the error."""
    lines = []
    for model in dict.fromkeys(r["model"] for r in results):
        mine = [r for r in results if r["model"] == model]
        tokens = sorted({r["tokens"] for r in mine})
        by_key = {(r["name"], r["tokens"]): r for r in mine}
        lines.append(f"{model:24}" + "".join(f"{'T=' + str(t):>9}" for t in tokens) + "    error")
        for name in dict.fromkeys(r["name"] for r in mine):
            cells = [by_key.get((name, t)) for t in tokens]
            times = "".join(f"{c['median_us']:9.1f}" if c else f"{'-':>9}" for c in cells)
            error = max(c["error"] for c in cells if c)
            lines.append(f"  {name:22}{times}{100 * error:8.2f}%")
        floors = [next(r["floor_us"] for r in mine if r["tokens"] == t) for t in tokens]
        lines.append(f"  {'floor':22}" + "".join(f"{f:9.1f}" for f in floors))
        clocks = [[r["clock_mhz"] for r in mine if r["tokens"] == t] for t in tokens]
        lines.append(f"  {'SM clock, MHz':22}" + "".join(f"{sum(c) / len(c):9.0f}" for c in clocks))
    return "\n".join(lines)


def parse() -> argparse.Namespace:
    def words(allowed):
        def parse_words(text: str) -> list[str]:
            chosen = text.split(",")
            for word in chosen:
                if word not in allowed:
                    expected = ", ".join(allowed)
                    raise argparse.ArgumentTypeError(f"expected of {expected}, got {word!r}")
            return chosen

        return parse_words

    def numbers(text: str) -> list[int]:
        return [int(word) for word in text.split(",")]

    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--layers", action="store_true", help="time whole layers")
    parser.add_argument("--gemms", action="store_true", help="time grouped GEMMs")
    parser.add_argument("--models", type=words(MODELS), default=list(MODELS))
    parser.add_argument("--tokens", type=numbers, default=list(TOKENS))
    parser.add_argument(
        "--cases", type=words(GEMM_CASES), default=list(GEMM_CASES), help="of --gemms"
    )
    parser.add_argument("--peers", type=words(PEERS), default=list(PEERS))
    parser.add_argument("--schemes", type=words(SCHEMES + WIDE_SCHEMES), default=list(SCHEMES))
    parser.add_argument(
        "--humming", type=words(("grouped", "indexed")), default=["grouped", "indexed"]
    )
    parser.add_argument(
        "--humming-best-from",
        type=int,
        default=1024,
        metavar="T",
        help="search Humming's best tiles from this many tokens on, 0: never",
    )
    parser.add_argument(
        "--library", dest="peer_file", type=Path, default=Path(".peers/libcutlass_int8.so")
    )
    parser.add_argument("--reference-library", type=Path, default=Path(".peers/libhybrid.so"))
    parser.add_argument("--reference-dir", type=Path, default=Path(".peers/reference"))
    parser.add_argument("--reference-models", type=words(MODELS), default=["qwen3.6-35b"])
    parser.add_argument("--peers-dir", type=Path, default=Path(".peers"))
    parser.add_argument("--seconds", type=float, default=0.6, help="timed for each problem")
    parser.add_argument("--json", type=Path, help="result file")
    parser.add_argument("--append", action="store_true", help="keep the file's other results")
    arguments = parser.parse_args()
    if not arguments.layers and not arguments.gemms:
        parser.error("nothing to do: expected --layers, --gemms or both")
    return arguments


def main() -> int:
    arguments = parse()
    if not torch.cuda.is_available():
        print("gpu_peers: error: no CUDA device", file=sys.stderr)
        return 1
    begin = time.monotonic()
    report = Report(arguments.json, arguments.append)
    harness = Harness(seconds=arguments.seconds)
    peers = Peers(arguments, report)
    report.run["ceilings"] = harness.ceilings()
    note(f"gpu_peers: ceilings {report.run['ceilings']}")
    if arguments.layers:
        time_layers(arguments, harness, peers, report)
    if arguments.gemms:
        time_gemms(arguments, harness, peers, report)
    report.run["seconds"]["total"] = round(time.monotonic() - begin, 1)
    report.write()
    if report.mine("results"):
        print(layer_table(report.mine("results")))
    if report.mine("gemms"):
        print(gemm_table(report.mine("gemms")))
    print(f"total {report.run['seconds']['total']} s")
    return 0


if __name__ == "__main__":
    sys.exit(main())
