"""Humming's INT8 kernels (PyPI: humming-kernels) as a whole layer and as a grouped GEMM.

Humming has the GEMMs and a kernel that quantises (with an activation before and a scatter after);
sorting and combining are left to the engine around it: two small Triton kernels here, about as
good as the ones engines use. Two ways to put a layer together, both in its own terms:

    grouped   sort; quantise x and scatter rows to their experts; GEMM1; SwiGLU + quantise; GEMM2;
              combine
    indexed   sort and pad to tiles; quantise x; GEMM1 gathers rows; SwiGLU + quantise; GEMM2;
              combine

Its tiles are the ones that its heuristics choose for the size, or the fastest of `candidates`,
each GEMM timed alone. Every kernel is compiled by NVRTC at its first use, several at a time.
"""

from __future__ import annotations

import json
import os
import sys
import time

import torch
import triton
import triton.language as tl

from . import PeerMissing
from .problems import Inputs, LayerProblem

VERSION = "0.1.19"
SMALL_SORT = 8192  # routes that one program sorts
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
    import humming.layer
    import humming.ops
    import humming.tune

    return humming


@triton.jit
def _count(ids, counts, ranks, routes, BLOCK: tl.constexpr):
    """ranks[r] = how many routes of the same expert came before (in any order)."""
    r = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    expert = tl.load(ids + r, mask=r < routes, other=-1)
    rank = tl.atomic_add(counts + expert, 1, mask=expert >= 0)
    tl.store(ranks + r, rank, mask=r < routes)


@triton.jit
def _scan(counts, offsets, padded, tile_experts, tiles, E: tl.constexpr, TILE: tl.constexpr):
    """offsets[0..E] of the rows, every expert's padded to TILE; the experts of the tiles."""
    e = tl.arange(0, E)
    count = tl.load(counts + e, cache_modifier=".cg")
    size = (count + TILE - 1) // TILE * TILE
    last = tl.cumsum(size, 0)
    tl.store(offsets + e + 1, last)
    tl.store(offsets + e, 0, mask=e == 0)
    tl.store(padded, tl.sum(size, 0))
    if TILE > 1:
        first_tile, own = (last - size) // TILE, size // TILE
        most = tl.max(own, 0)
        for index in range(0, most):
            tl.store(tile_experts + first_tile + index, e, mask=index < own)


@triton.jit
def _place(ids, ranks, offsets, rows, sorted_ids, routes, TILE: tl.constexpr, BLOCK: tl.constexpr):
    """TILE 1: rows[r] = the route's row, -1 for none; else sorted_ids[row] = r."""
    r = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    expert = tl.load(ids + r, mask=r < routes, other=-1)
    rank = tl.load(ranks + r, mask=r < routes, other=0)
    first = tl.load(offsets + expert, mask=expert >= 0, other=0, cache_modifier=".cg")
    if TILE == 1:
        tl.store(rows + r, tl.where(expert >= 0, first + rank, -1), mask=r < routes)
    else:
        tl.store(sorted_ids + first + rank, r, mask=expert >= 0)


@triton.jit
def _sort_small(
    ids,
    counts,
    ranks,
    offsets,
    rows,
    sorted_ids,
    tile_experts,
    padded,
    routes,
    tiles,
    E: tl.constexpr,
    TILE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """All of the above in one program, for up to BLOCK routes."""
    tl.store(counts + tl.arange(0, E), 0)
    tl.debug_barrier()
    _count(ids, counts, ranks, routes, BLOCK)
    tl.debug_barrier()
    _scan(counts, offsets, padded, tile_experts, tiles, E, TILE)
    tl.debug_barrier()
    _place(ids, ranks, offsets, rows, sorted_ids, routes, TILE, BLOCK)


@triton.jit
def _combine(y, rows, weights, out, H, K: tl.constexpr, BLOCK: tl.constexpr):
    """out[t] = sum of weights[t, j] * y[rows[t, j]] in slot order; rows of -1 are left out."""
    token = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros((BLOCK,), tl.float32)
    for j in tl.static_range(K):
        row = tl.load(rows + token * K + j).to(tl.int64)
        weight = tl.load(weights + token * K + j)
        here = (column < H) & (row >= 0)
        total += weight * tl.load(y + row * H + column, mask=here, other=0.0).to(tl.float32)
    tl.store(out + token * H + column, total.to(out.dtype.element_ty), mask=column < H)


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
        self.configs: dict[tuple[str, int], dict] = {}

    def default(self, kind: str, rows: int) -> dict:
        """What its heuristics choose for this many routes."""
        config = self.humming.tune.get_heuristics_config(
            self.config, shape_m=rows, gemm_type=kind, device=0
        )
        return json.loads(json.dumps(config))

    def candidates(self, kind: str, rows: int) -> list[dict]:
        """Tiles around its own choices: rows per tile from 16 to 176, 128 and 256 weights wide."""
        found = [self.default(kind, rows)]
        for other in (rows // 2, rows * 2):
            found.append(self.default(kind, max(1, other)))
        per_expert = rows / self.config.num_experts
        sizes = [m for m in (16, 32, 48, 64, 96, 128, 160, 176) if m <= max(32, 2.5 * per_expert)]
        for block_m in sizes[-4:]:
            for block_n in (128, 256):
                if self.config.shape_n % block_n or self.config.shape_k % 128:
                    continue
                if block_m * block_n > 128 * 256 or (block_n == 256 and block_m > 128):
                    continue
                found.append(
                    {
                        "mma_type": "wgmma",
                        "block_shape": [block_m, block_n, 128],
                        "warp_shape": [block_m, block_n // 8, 128],
                        "num_stages": 4,
                        "num_ctas_per_sm": 1,
                        "use_warp_spec": True,
                        "use_tma": True,
                        "use_stream_k": False,
                        "smem_reuse_mode": "none",
                        "producer_stage_unroll": 1,
                        "wgmma_split_issue_wait": True,
                        "raster_group_m": 4 if block_n == 256 and block_m >= 48 else 1,
                    }
                )
                if kind == "indexed":
                    found[-1] |= {"use_tma_a": False, "use_tma_c": False}
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

    def _sort(self, inputs: Inputs, tile: int) -> dict[str, torch.Tensor]:
        """The buffers of a sort. tile 1: rows without padding."""
        routes, experts = inputs.local_ids.numel(), self.model.experts

        def empty(size: int) -> torch.Tensor:
            return torch.empty(size, dtype=torch.int32, device=inputs.x.device)

        tiles = min(routes, routes // tile + experts)
        return {
            "counts": empty(experts),
            "ranks": empty(routes),
            "offsets": empty(experts + 1),
            "rows": empty(routes).view(inputs.ids.shape),
            "sorted_ids": empty(tiles * tile),
            "expert_ids": empty(tiles),
            "num_tokens_padded": empty(1),
        }

    def _run_sort(self, inputs: Inputs, tile: int, s: dict[str, torch.Tensor]) -> None:
        ids, routes = inputs.local_ids, inputs.local_ids.numel()
        experts, tiles, padded = s["expert_ids"], s["expert_ids"].numel(), s["num_tokens_padded"]
        if tile > 1:
            s["sorted_ids"].fill_(routes)
        if routes <= SMALL_SORT:
            block = max(128, triton.next_power_of_2(routes))
            _sort_small[(1,)](
                ids,
                s["counts"],
                s["ranks"],
                s["offsets"],
                s["rows"],
                s["sorted_ids"],
                experts,
                padded,
                routes,
                tiles,
                self.model.experts,
                tile,
                block,
                num_warps=min(32, max(4, block // 256)),
            )
            return
        s["counts"].zero_()
        grid = (triton.cdiv(routes, 512),)
        _count[grid](ids, s["counts"], s["ranks"], routes, 512)
        _scan[(1,)](s["counts"], s["offsets"], padded, experts, tiles, self.model.experts, tile)
        _place[grid](ids, s["ranks"], s["offsets"], s["rows"], s["sorted_ids"], routes, tile, 512)

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
        tile = 1 if grouped else config1["block_shape"][0]
        s = self._sort(inputs, tile)
        name = KINDS[kind]
        a, a_scale, hidden, act, act_scale, y = self._buffers(
            routes if grouped else tokens, routes, device
        )
        out = torch.empty_like(inputs.x)
        if grouped:
            where = {"expert_layout": s["offsets"]}
            valid = s["offsets"][-1:]
            rows = s["rows"]
        else:
            where = {k: s[k] for k in ("sorted_ids", "expert_ids", "num_tokens_padded")}
            valid = None
            index = torch.arange(routes, dtype=torch.int32, device=device).view(tokens, top_k)
            rows = torch.where(inputs.local_ids >= 0, index, -1)
        block = min(1024, triton.next_power_of_2(model.hidden))
        quantise = {"quant_mode": "dynamic_token", "quant_dtype": "int8", "use_pdl": False}
        place = {"layout": "scatter", "scatter_idx": s["rows"]} if grouped else {}

        def run() -> torch.Tensor:
            self._run_sort(inputs, tile, s)
            ops.process_input(inputs.x, outputs=a, token_scales=a_scale, **place, **quantise)
            self.gemm1.run(name, config1, a, a_scale, hidden, where, 1 if grouped else top_k)
            ops.process_input(
                hidden,
                outputs=act,
                token_scales=act_scale,
                activation_type="binary_split",
                activation_impl=SWIGLU,
                num_valid_tokens=valid,
                **quantise,
            )
            self.gemm2.run(name, config2, act, act_scale, y, where, 1)
            grid = (tokens, triton.cdiv(model.hidden, block))
            _combine[grid](y, rows, inputs.weights, out, model.hidden, top_k, block)
            return out

        run.parts = (a, a_scale, hidden, act, act_scale, y, where)
        return run

    def defaults(self, kind: str, tokens: int) -> tuple[dict, dict]:
        """Its own choice for both GEMMs."""
        name, routes = KINDS[kind], tokens * self.model.top_k
        return self.gemm1.default(name, routes), self.gemm2.default(name, routes)

    @staticmethod
    def fits(kind: str, config1: dict, config2: dict) -> bool:
        """indexed: one sort serves both GEMMs only if they agree on the rows per tile."""
        return kind == "grouped" or config1["block_shape"][0] == config2["block_shape"][0]

    def compile_defaults(self, kinds: list[str], tokens: list[int]) -> None:
        jobs = []
        for kind in kinds:
            for size in tokens:
                first, second = self.defaults(kind, size)
                if self.fits(kind, first, second):
                    jobs += [("gemm1", kind, first), ("gemm2", kind, second)]
        self.compile(jobs)

    def compile(self, jobs: list[tuple[str, str, dict]]) -> list[tuple[str, str, dict]]:
        """Compiles (gemm name, kind, config) several at a time; returns those that compiled."""
        from concurrent.futures import ThreadPoolExecutor

        begin = time.monotonic()
        kernel = self.humming.kernel.humming.HummingKernel

        def build(job: tuple[str, str, dict]) -> bool:
            gemm, kind, config = job
            try:
                kernel.prepare_kernels(
                    getattr(self, gemm).config.to_str(),
                    json.dumps({"gemm_type": KINDS[kind]}),
                    json.dumps(config),
                    0,
                )
            except (AssertionError, ValueError, RuntimeError):
                return False
            return True

        with ThreadPoolExecutor(max(1, len(os.sched_getaffinity(0)) - 2)) as pool:
            good = list(pool.map(build, jobs))
        self.compile_seconds += time.monotonic() - begin
        return [job for job, ok in zip(jobs, good, strict=True) if ok]
