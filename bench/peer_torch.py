#!/usr/bin/env python3
"""The PyTorch peer of `octomoe bench --device cpu`: a bfloat16 MoE layer, two ways.

    loop     one matmul pair for each expert that has rows (what model code without kernels does)
    grouped  torch.nn.functional.grouped_mm, where this PyTorch has it on the CPU

One-shot: a JSON request as the argument or on stdin, medians as JSON on stdout.

    python bench/peer_torch.py '{"experts": 16, "hidden": 512, "intermediate": 256, "top_k": 4,
        "tokens": [1, 64], "threads": 2, "iterations": 20, "seed": 1}'

Served: one JSON object a line on stdin, one on stdout: another program can interleave its rounds
of its own. `python bench/peer_torch.py --serve`:

    {"prepare": {"experts", "hidden", "intermediate", "top_k", "threads", "seed",
                 "topk_ids": {"64": [T*k ints, row by row], ...}}}     topk_ids may be missing
        -> {"peers": ["loop", "grouped"], "torch": "2.x", "threads": 2}
    {"time": 64, "peer": "loop"}     one call                      -> {"us": 812.5}
    {"compare": 64}                  both ways on the same input   -> {"difference": 0.003}
    {"overhead": true}               octomoe.bench_overhead()      -> {"call_us": ...}
    anything wrong                                                 -> {"error": "..."}

The end of stdin ends it.
"""

import json
import statistics
import sys
import time


class Layer:
    """Random weights and, for each number of tokens, the inputs and their routing."""

    def __init__(self, request):
        import torch

        self.torch = torch
        if request.get("threads"):
            torch.set_num_threads(int(request["threads"]))
        self.experts, self.hidden = int(request["experts"]), int(request["hidden"])
        self.intermediate, self.top_k = int(request["intermediate"]), int(request["top_k"])
        self.generator = torch.Generator().manual_seed(int(request.get("seed", 0)))
        self.given_ids = request.get("topk_ids") or {}
        self.w13 = self.normal(self.experts, 2 * self.intermediate, self.hidden)
        self.w2 = self.normal(self.experts, self.hidden, self.intermediate)
        self.inputs = {}

    def normal(self, *shape):
        """Random bfloat16 with a matrix's usual size of 1/sqrt(columns)."""
        torch = self.torch
        out = torch.empty(shape, dtype=torch.bfloat16)
        return out.normal_(0.0, shape[-1] ** -0.5, generator=self.generator)

    def problem(self, tokens):
        """x, expert weights [T, k] and the routing, made once for each number of tokens."""
        if tokens not in self.inputs:
            torch = self.torch
            x = torch.empty(tokens, self.hidden, dtype=torch.bfloat16)
            x.normal_(generator=self.generator)
            scores = torch.rand(tokens, self.experts, generator=self.generator)
            weights, ids = torch.softmax(scores, -1).topk(self.top_k, -1)
            if str(tokens) in self.given_ids:
                ids = torch.tensor(self.given_ids[str(tokens)]).view(tokens, self.top_k)
            weights = (weights / weights.sum(-1, keepdim=True)).to(torch.bfloat16)
            self.inputs[tokens] = x, weights, ids
        return self.inputs[tokens]

    def activation(self, gate_up):
        gate, up = gate_up.chunk(2, -1)
        return self.torch.nn.functional.silu(gate) * up

    def loop(self, tokens):
        """Sorting is timed, as it is in a real layer."""
        torch = self.torch
        x, weights, ids = self.problem(tokens)
        flat = ids.flatten()
        order = flat.argsort(stable=True)
        counts = torch.bincount(flat, minlength=self.experts).tolist()
        out = torch.zeros_like(x)
        begin = 0
        for expert, count in enumerate(counts):
            if count == 0:
                continue
            rows = order[begin : begin + count]
            begin += count
            token = rows // self.top_k
            h = self.activation(x[token] @ self.w13[expert].T)
            y = h @ self.w2[expert].T
            out.index_add_(0, token, y * weights.flatten()[rows, None])
        return out

    def grouped(self, tokens):
        torch = self.torch
        x, weights, ids = self.problem(tokens)
        flat = ids.flatten()
        order = flat.argsort(stable=True)
        offsets = torch.bincount(flat, minlength=self.experts).cumsum(0, dtype=torch.int32)
        grouped_mm = torch.nn.functional.grouped_mm
        h = self.activation(grouped_mm(x[order // self.top_k], self.w13.mT, offs=offsets))
        y = grouped_mm(h, self.w2.mT, offs=offsets)
        unsorted = torch.empty_like(y)
        unsorted[order] = y
        routes = unsorted.view(tokens, self.top_k, self.hidden)
        return torch.bmm(weights[:, None, :], routes)[:, 0]

    def peers(self):
        """The ways that run here."""
        found = ["loop"]
        try:
            with self.torch.inference_mode():
                self.grouped(2)
            found.append("grouped")
        except (AttributeError, RuntimeError, NotImplementedError):
            pass
        return found

    def time_us(self, peer, tokens):
        self.problem(tokens)
        with self.torch.inference_mode():
            begin = time.perf_counter_ns()
            getattr(self, peer)(tokens)
            return (time.perf_counter_ns() - begin) / 1e3

    def difference(self, tokens):
        """||loop - grouped|| / ||loop||."""
        with self.torch.inference_mode():
            a, b = self.loop(tokens).double(), self.grouped(tokens).double()
        return float((a - b).norm() / a.norm())


def one_shot(request):
    """Medians over interleaved rounds."""
    layer = Layer(request)
    peers = layer.peers()
    iterations = int(request.get("iterations", 20))
    results = []
    for tokens in request["tokens"]:
        samples = {peer: [] for peer in peers}
        for step in range(iterations + 2):
            for peer in peers:
                us = layer.time_us(peer, int(tokens))
                if step >= 2:  # the first two warm up
                    samples[peer].append(us)
        medians = {peer: statistics.median(values) for peer, values in samples.items()}
        results.append({"tokens": int(tokens), "us": medians})
    torch = layer.torch
    return {"torch": torch.__version__, "threads": torch.get_num_threads(), "results": results}


def serve():
    layer = None
    for line in sys.stdin:
        if not line.strip():
            continue
        try:
            message = json.loads(line)
            if "prepare" in message:
                layer = Layer(message["prepare"])
                torch = layer.torch
                answer = {
                    "peers": layer.peers(),
                    "torch": torch.__version__,
                    "threads": torch.get_num_threads(),
                }
            elif "overhead" in message:
                import octomoe

                answer = octomoe.bench_overhead()
            elif layer is None:
                answer = {"error": "prepare comes first"}
            elif "time" in message:
                peer = message.get("peer", "loop")
                if peer not in ("loop", "grouped"):
                    raise ValueError(f"no such peer: {peer}")
                answer = {"us": layer.time_us(peer, int(message["time"]))}
            elif "compare" in message:
                answer = {"difference": layer.difference(int(message["compare"]))}
            else:
                answer = {
                    "error": f"expected prepare, time, compare or overhead, got {line.strip()}"
                }
        except Exception as error:  # the other program decides what to do without this peer
            answer = {"error": f"{type(error).__name__}: {error}"}
        print(json.dumps(answer), flush=True)


def main():
    arguments = sys.argv[1:]
    if arguments == ["--serve"]:
        serve()
    elif arguments in (["-h"], ["--help"]):
        print(__doc__)
    else:
        text = arguments[0] if arguments else sys.stdin.read()
        print(json.dumps(one_shot(json.loads(text)), indent=2))


if __name__ == "__main__":
    main()
