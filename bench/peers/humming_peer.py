"""Humming's INT8 kernels (PyPI: humming-kernels) as a whole layer and as a grouped GEMM.

Humming has the GEMMs and a kernel that quantises (with an activation before and a scatter after);
sorting and combining are left to the engine around it: here those of routing.py. Two ways to put
a layer together, both in its own terms:

    grouped   sort; quantise x and scatter rows to their experts; GEMM1; SwiGLU + quantise; GEMM2;
              combine
    indexed   sort and pad to tiles; quantise x; GEMM1 gathers rows; SwiGLU + quantise; GEMM2;
              combine

Its tiles are the ones that its heuristics choose for the size, or the fastest of `candidates`,
each GEMM timed alone. Every kernel is compiled by NVRTC at its first use, several at a time.
"""

from __future__ import annotations

import concurrent.futures
import copy
import functools
import json
import os
import sys
import time

import torch

from . import PeerMissing
from .harness import capture
from .problems import GemmProblem, Inputs, LayerProblem
from .routing import Combine, Sort

VERSION = "0.1.19"
# Rows, weights and CTAs per SM: the first four or so in races of 8 to 20 tiles over the cases of
# problems.GEMM_CASES on an H100, November 2026.
SMALL_TILES = ((16, 128, 2), (16, 256, 1), (32, 128, 2), (32, 256, 1), (48, 128, 2), (48, 256, 1))
LARGE_TILES = (
    (64, 256, 1),
    (96, 128, 2),
    (96, 256, 1),
    (128, 128, 2),
    (128, 256, 1),
    (144, 128, 1),
    (176, 128, 1),
)
KINDS = {"grouped": "grouped_contiguous", "indexed": "indexed"}
SWIGLU = "a / (1.0f + __expf(-a)) * b"


def load(site: str):
    """The package `humming` from `site`."""
    if not os.path.isfile(f"{site}/humming/layer.py"):
        raise PeerMissing(f"humming: no package under {site}: run bench/peers/fetch.py")
    if site not in sys.path:
        sys.path.append(site)
    # It would build its launcher in a second process; the wheel brings it ready-made.
    os.environ.setdefault("HUMMING_DISABLE_PARALLEL_BUILD", "0")
    import humming.config
    import humming.layer
    import humming.ops
    import humming.tune.sm90_policies

    return humming


class Gemm:
    """One stack of matrices in Humming's layout."""

    def __init__(self, humming, w: torch.Tensor) -> None:
        experts, n, k = w.shape
        self.humming = humming
        layer = humming.layer.HummingLayer(
            shape_n=n,
            shape_k=k,
            weight_config={"dtype": "int8", "group_size": 0},
            input_config={"dtype": "int8"},
            num_experts=experts,
            torch_dtype=torch.bfloat16,
        ).to(w.device)
        layer.load_from_unquantized(w)
        layer.transform()
        self.layer, self.config = layer, layer.humming_config

    def copy(self) -> Gemm:
        """The same matrices in other memory."""
        other = object.__new__(Gemm)
        other.humming, other.config = self.humming, self.config
        other.layer = copy.deepcopy(self.layer)
        return other

    def default(self, kind: str, rows: int) -> dict:
        """What its heuristics choose for this many routes."""
        config = self.humming.tune.get_heuristics_config(
            self.config, shape_m=rows, gemm_type=kind, device=0
        )
        return json.loads(json.dumps(config))

    def candidates(self, kind: str, rows: int) -> list[dict]:
        """Its own choices for this size and its neighbours, and the tiles that won such races."""
        found = [self.default(kind, max(1, size)) for size in (rows, rows // 2, rows * 2)]
        per_expert = rows / self.config.num_experts
        policies = self.humming.tune.sm90_policies
        form = self.humming.config.GemmType(kind)
        for block_m, block_n, ctas in SMALL_TILES if per_expert <= 48 else LARGE_TILES:
            if self.config.shape_n % block_n or self.config.shape_k % 128:
                continue
            if block_m > max(32, 1.5 * per_expert):
                continue
            config = {
                "mma_type": "wgmma",
                "block_shape": (block_m, block_n, 128),
                "warp_shape": (block_m, block_n // 8, 128),
                "num_stages": 4 if ctas == 1 else 3,
                "num_ctas_per_sm": ctas,
                "use_warp_spec": True,
                "use_tma": True,
                "use_stream_k": False,
                "smem_reuse_mode": "none",
                "producer_stage_unroll": 1,
                "wgmma_split_issue_wait": True,
                "raster_group_m": 4 if block_n == 256 and block_m >= 48 else 1,
            }
            if kind == "indexed":
                config |= {"use_tma_a": False, "use_tma_c": False}
            try:
                fitted = policies.fit_sm90_tile(self.config, config, gemm_type=form)
            except (AssertionError, ValueError):  # what Humming itself does not allow
                continue
            if fitted["block_shape"] == config["block_shape"]:
                found.append(json.loads(json.dumps(fitted)))
        unique = {json.dumps(config, sort_keys=True): config for config in found}
        return list(unique.values())

    def run(
        self,
        kind: str,
        config: dict,
        a: torch.Tensor,
        a_scale: torch.Tensor,
        out: torch.Tensor,
        sort: dict[str, torch.Tensor],
        top_k: int,
    ) -> None:
        self.layer(
            a,
            outputs=out,
            input_scale=a_scale,
            top_k=top_k,
            compute_config={"gemm_type": kind},
            tuning_config=config,
            **sort,
        )


class Layer:
    """A whole layer, `kind` "grouped" or "indexed"; the weights are quantised by Humming."""

    def __init__(self, problem: LayerProblem, site: str) -> None:
        self.humming = load(site)
        self.model = problem.model
        self.gemm1 = Gemm(self.humming, problem.w13)
        self.gemm2 = Gemm(self.humming, problem.w2)
        self.compile_seconds = 0.0
        self.buffers = None, ()

    def _buffers(self, a_rows: int, routes: int, device) -> tuple[torch.Tensor, ...]:
        """What lies between the kernels; calls of one size share it, as calls of an engine do."""
        key = a_rows, routes
        if self.buffers[0] != key:
            model = self.model
            shapes = [(a_rows, model.hidden), (a_rows, 1), (routes, 2 * model.intermediate)]
            shapes += [(routes, model.intermediate), (routes, 1), (routes, model.hidden)]
            types = [torch.int8, torch.float32, torch.bfloat16]
            types += [torch.int8, torch.float32, torch.bfloat16]
            made = (
                torch.empty(shape, dtype=dtype, device=device)
                for shape, dtype in zip(shapes, types, strict=True)
            )
            self.buffers = key, tuple(made)
        return self.buffers[1]

    def call(self, inputs: Inputs, kind: str, config1: dict, config2: dict):
        """A function of no arguments; `kind` is "grouped" or "indexed"."""
        model, ops = self.model, self.humming.ops
        tokens, top_k = inputs.ids.shape
        routes = tokens * top_k
        device = inputs.x.device
        grouped = kind == "grouped"
        tiles = [1, 1] if grouped else [c["block_shape"][0] for c in (config1, config2)]
        sort = Sort(inputs.local_ids, model.experts, tiles[0])
        sort2 = sort
        if tiles[0] != tiles[1]:
            sort2 = Sort(inputs.local_ids, model.experts, tiles[1])
        name = KINDS[kind]
        a, a_scale, hidden, act, act_scale, y = self._buffers(
            routes if grouped else tokens, routes, device
        )
        out = torch.empty_like(inputs.x)
        if grouped:
            valid, rows = sort.offsets[-1:], sort.rows
        else:
            valid = None
            index = torch.arange(routes, dtype=torch.int32, device=device).view(tokens, top_k)
            rows = torch.where(inputs.local_ids >= 0, index, -1)
        where, where2 = self._where(sort), self._where(sort2)
        combine = Combine(y, rows, inputs.weights, out)
        quantise = {"quant_mode": "dynamic_token", "quant_dtype": "int8", "use_pdl": False}
        place = {"layout": "scatter", "scatter_idx": sort.rows} if grouped else {}

        def run() -> torch.Tensor:
            sort.run()
            if sort2 is not sort:
                sort2.run()
            ops.process_input(inputs.x, outputs=a, token_scales=a_scale, **place, **quantise)
            self.gemm1.run(name, config1, a, a_scale, hidden, where, first_k)
            ops.process_input(
                hidden,
                outputs=act,
                token_scales=act_scale,
                activation_type="binary_split",
                activation_impl=SWIGLU,
                num_valid_tokens=valid,
                **quantise,
            )
            self.gemm2.run(name, config2, act, act_scale, y, where2, 1)
            combine.run()
            return out

        first_k = 1 if grouped else top_k
        run.parts = {"gemm1": (a, a_scale, hidden, first_k), "gemm2": (act, act_scale, y, 1)}
        return run

    @staticmethod
    def _where(sort: Sort) -> dict[str, torch.Tensor]:
        if sort.tile == 1:
            return {"expert_layout": sort.offsets}
        return {k: getattr(sort, k) for k in ("sorted_ids", "expert_ids", "num_tokens_padded")}

    def defaults(self, kind: str, tokens: int) -> tuple[dict, dict]:
        """Its own choice for both GEMMs."""
        name, routes = KINDS[kind], tokens * self.model.top_k
        return self.gemm1.default(name, routes), self.gemm2.default(name, routes)

    def compile_defaults(self, kinds: list[str], tokens: list[int]) -> None:
        jobs = []
        for kind in kinds:
            for size in tokens:
                first, second = self.defaults(kind, size)
                jobs += [("gemm1", kind, first), ("gemm2", kind, second)]
        self.compile(jobs)

    def best(self, kind: str, inputs: Inputs, harness) -> tuple[dict, dict]:
        """The fastest of the candidates for each GEMM, timed alone on these inputs."""
        name, routes = KINDS[kind], inputs.ids.numel()
        whole = self.call(inputs, kind, *self.defaults(kind, len(inputs.ids)))
        whole()
        chosen = []
        for which in ("gemm1", "gemm2"):
            gemm = getattr(self, which)
            jobs = self.compile([(which, kind, c) for c in gemm.candidates(name, routes)])
            graphs, a = {}, whole.parts[which]
            for index, (_, _, config) in enumerate(jobs):
                tile = 1 if kind == "grouped" else config["block_shape"][0]
                sort = Sort(inputs.local_ids, self.model.experts, tile)
                sort.run()
                where, sorts = self._where(sort), sort
                run = functools.partial(gemm.run, name, config, *a[:3], where, a[3])
                try:
                    graphs[str(index)] = capture([run] * 3), 3, sorts
                except RuntimeError:
                    continue
            samples = harness.run({key: value[:2] for key, value in graphs.items()})
            fastest = min(samples, key=lambda key: samples[key].median_us)
            chosen.append(jobs[int(fastest)][2])
        return chosen[0], chosen[1]

    def compile(self, jobs: list[tuple[str, str, dict]]) -> list[tuple[str, str, dict]]:
        """Compiles (gemm name, kind, config) several at a time; returns those that compiled."""
        begin = time.monotonic()
        good = compile_all([(getattr(self, gemm), KINDS[kind], c) for gemm, kind, c in jobs])
        self.compile_seconds += time.monotonic() - begin
        return [job for job, ok in zip(jobs, good, strict=True) if ok]


def compile_all(jobs: list[tuple[Gemm, str, dict]]) -> list[bool]:
    """Compiles several kernels at a time; False for a configuration that Humming refuses."""

    def build(job: tuple[Gemm, str, dict]) -> bool:
        gemm, name, config = job
        try:
            gemm.humming.kernel.humming.HummingKernel.prepare_kernels(
                gemm.config.to_str(), json.dumps({"gemm_type": name}), json.dumps(config), 0
            )
        except (AssertionError, ValueError, RuntimeError):
            return False
        return True

    with concurrent.futures.ThreadPoolExecutor(max(1, len(os.sched_getaffinity(0)) - 2)) as pool:
        return list(pool.map(build, jobs))


class GroupedGemm:
    """The grouped GEMM alone: rows sorted by expert, without padding."""

    def __init__(self, problem: GemmProblem, site: str) -> None:
        self.humming = load(site)
        self.problem = problem
        self.gemms = [Gemm(self.humming, problem.w)]
        for _ in range(problem.copies - 1):
            self.gemms.append(self.gemms[0].copy())
        self.a, _, self.a_scale = self.humming.ops.process_input(
            problem.x, quant_mode="dynamic_token", quant_dtype="int8", use_pdl=False
        )
        self.out = torch.empty(
            (problem.rows, problem.n), dtype=torch.bfloat16, device=problem.x.device
        )

    def configs(self, best: bool) -> list[dict]:
        """Its default, or all candidates that compile."""
        name, rows = KINDS["grouped"], self.problem.rows
        gemm = self.gemms[0]
        found = gemm.candidates(name, rows) if best else [gemm.default(name, rows)]
        good = compile_all([(gemm, name, config) for config in found])
        return [config for config, ok in zip(found, good, strict=True) if ok]

    def call(self, index: int, config: dict):
        gemm, where = self.gemms[index], {"expert_layout": self.problem.offsets}

        def run() -> torch.Tensor:
            gemm.run(KINDS["grouped"], config, self.a, self.a_scale, self.out, where, 1)
            return self.out

        return run
