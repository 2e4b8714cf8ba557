#!/usr/bin/env python3
"""What one eager layer call on a GPU costs the calling thread, as a graph and kernel by kernel.

    python bench/host_cost.py --cli build/octomoe --json host_cost.json

C++: `octomoe bench` (host_us, host_new_us: 16 calls, then a synchronisation, over and over), with
the time on the GPU beside it, since replaying must not slow the kernels down. PyTorch: the custom
operator, its module and MoeLayer, four calls between synchronisations, so that the GPU's queue is
never full; medians. `new_memory`: x, the routes and the result lie elsewhere than in the call
before. The layer in Python is small: its size does not matter to the host.
"""

import argparse
import collections
import itertools
import json
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

CALLS, ROUNDS, WARMUP = 4, 300, 20
WAYS = {"replayed": 16, "launched": 0}  # LayerOptions::replays


def cli_results(cli, tokens, flags):
    """`octomoe bench`'s times by number of tokens, medians of three, and its whole report."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "bench.json"
        command = [cli, "bench", "--device", "cuda", "--scheme", "int8_channel", *flags]
        command += ["--graph", "--min-time", "0.1"]
        command += ["--tokens", ",".join(map(str, tokens * 3)), "--json", str(path)]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
        report = json.loads(path.read_text())

    def median(t, value):
        rows = [r for r in report["results"] if r["tokens"] == t]
        return round(statistics.median(map(value, rows)), 2)

    values = {
        "cpp_us": lambda r: r["host_us"],
        "cpp_new_memory_us": lambda r: r["host_new_us"],
        "gpu_us": lambda r: r["eager"]["median_us"],
        "gpu_in_callers_graph_us": lambda r: r["median_us"],
    }
    return {t: {name: median(t, v) for name, v in values.items()} for t in tokens}, report


def problem(tokens):
    """Weights of a small layer, and x, topk_ids, topk_weights on the GPU."""
    import numpy as np
    import octomoe
    import torch

    experts, hidden, intermediate, top_k = 8, 256, 128, 2
    random = np.random.default_rng(0)
    weights = octomoe.quantize(
        random.standard_normal((experts, 2 * intermediate, hidden), np.float32) * 0.05,
        random.standard_normal((experts, hidden, intermediate), np.float32) * 0.05,
        scheme="int8_channel",
    )
    x = torch.randn(tokens, hidden, device="cuda").bfloat16()
    ids = torch.randint(experts, (tokens, top_k), device="cuda", dtype=torch.int32)
    return weights, x, ids, torch.rand(tokens, top_k, device="cuda")


def python_costs(tokens, replays):
    """Microseconds a call of the ways into the library that PyTorch has."""
    import octomoe
    import octomoe.torch as octomoe_torch
    import torch

    weights, x, ids, topk_weights = problem(tokens)
    layer = octomoe.MoeLayer(weights, device="cuda", replays=replays)
    module = octomoe_torch.FusedMoe(layer)
    number = octomoe_torch.handle(layer)
    operator = torch.ops.octomoe.fused_moe
    out = torch.empty_like(x)
    # Other inputs for each call. The operator's results stay for a while: torch cannot give their
    # memory to the next ones.
    given = (x, topk_weights, ids, out)
    moved = itertools.cycle([[t.clone() for t in given] for _ in range(8)])
    results = collections.deque(maxlen=7)

    def operator_moved():
        xs, shares, routes, _ = next(moved)
        results.append(operator(xs, number, shares, routes))

    def layer_moved():
        xs, shares, routes, to = next(moved)
        layer(xs, routes, shares, out=to)

    def measure(call):
        us = []
        for _ in range(WARMUP + ROUNDS):
            torch.cuda.synchronize()
            begin = time.perf_counter()
            for _ in range(CALLS):
                call()
            us.append((time.perf_counter() - begin) / CALLS * 1e6)
        return round(statistics.median(us[WARMUP:]), 2)

    costs = {
        "torch_operator_us": measure(lambda: operator(x, number, topk_weights, ids)),
        "torch_operator_new_memory_us": measure(operator_moved),
        "torch_module_us": measure(lambda: module(x, topk_weights, ids)),
        "moe_layer_us": measure(lambda: layer(x, ids, topk_weights, out=out)),
        "moe_layer_new_memory_us": measure(layer_moved),
        "torch_add_us": measure(lambda: torch.add(x, x, out=out)),  # for comparison
    }
    with torch.inference_mode():
        costs["torch_operator_inference_mode_us"] = measure(
            lambda: operator(x, number, topk_weights, ids)
        )
    return costs


def graph_costs():
    """What making a graph costs: MoeLayer's calls one by one, each kind of call (T) six times.

    Sixteen kinds fill each layer's graphs; the rest make the layer release older ones. The last
    call of a kind has other memory than those before.
    """
    import octomoe
    import torch

    weights, x, ids, topk_weights = problem(32)
    layers = [octomoe.MoeLayer(weights, device="cuda") for _ in range(32)]
    other = [t.clone() for t in (x, ids, topk_weights)]
    us = [[] for _ in range(6)]

    def calls(kinds):
        for layer in layers:
            for t in kinds:
                usual, last = [
                    [*(v[:t] for v in given), torch.empty_like(x[:t])]
                    for given in ((x, ids, topk_weights), other)
                ]
                for i in range(6):
                    xs, routes, shares, out = last if i == 5 else usual
                    begin = time.perf_counter()
                    layer(xs, routes, shares, out=out)
                    us[i].append((time.perf_counter() - begin) * 1e6)
                    torch.cuda.synchronize()

    for layer in layers:
        layer(x, ids, topk_weights)  # makes the workspace
    before = torch.cuda.mem_get_info()[0]
    calls(range(1, 17))
    taken = before - torch.cuda.mem_get_info()[0]
    us = [[] for _ in range(6)]
    calls(range(17, 33))
    names = ("first", "second", "third_makes_the_graph", "fourth", "fifth", "new_memory")
    times = {f"{n}_us": round(statistics.median(t), 2) for n, t in zip(names, us, strict=True)}
    return {**times, "gpu_mib_per_graph": round(taken / len(layers) / 16 / 2**20, 3)}


def main():
    """Measure everything and print or write it."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cli", required=True, help="the octomoe executable")
    parser.add_argument("--tokens", default="1,16,256")
    parser.add_argument("--commit", help="instead of the one that the executable finds")
    parser.add_argument("--before", help="another such JSON, of an older commit, to put beside")
    parser.add_argument("--json", help="output; default: stdout")
    options = parser.parse_args()
    import torch

    tokens = [int(t) for t in options.tokens.split(",")]
    results = []
    for way, replays in WAYS.items():
        cli, report = cli_results(options.cli, tokens, [] if replays else ["--no-replay"])
        results += [{"tokens": t, "way": way, **cli[t], **python_costs(t, replays)} for t in tokens]
    document = {
        "date": report["date"],
        "commit": options.commit or report["commit"],
        "gpu": report["gpu"],
        "cpu": report["machine"]["cpu"],
        "cpp_layer": report["problem"]["model"],
        "torch": torch.__version__,
        "python": platform.python_version(),
        "results": results,
        "graphs": graph_costs(),
    }
    if options.before:
        document["before"] = json.loads(Path(options.before).read_text())
    text = json.dumps(document, indent=2) + "\n"
    if options.json:
        Path(options.json).write_text(text)
    else:
        sys.stdout.write(text)


if __name__ == "__main__":
    main()
