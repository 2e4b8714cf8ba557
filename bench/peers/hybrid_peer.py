"""The reference "INT8 hybrid MoE" project (public repository PatchouliTIS/INT8BlockwiseGEMM).

Its grouped GEMM comes in a library with `hybrid_grouped_gemm` of peer_abi.h, its Triton quantisers
from `int8_hybrid_moe/quant.py` of a folder. The layer is its fused path: sort, permute + quantise,
GEMM1, SiLU + quantise, GEMM2, combine; for sorting and combining stands routing.py, since the
kernels it uses are vLLM's. Weights as in its own benchmark: blocks of 64 x 128, q_max 16.
"""

from __future__ import annotations

import ctypes
import functools
import importlib.util
from pathlib import Path

import torch

from . import PeerMissing
from .problems import BLOCK, Q_MAX, GemmProblem, Inputs, LayerProblem
from .routing import Combine, Sort

VERSION = "b5ca7e47fceb"
TILE_N, SUPER_GROUP = 64, 256


@functools.cache
def load(library: str, folder: str):
    """(hybrid_grouped_gemm, the module quant)."""
    source = Path(folder) / "int8_hybrid_moe" / "quant.py"
    for path in (Path(library), source):
        if not path.is_file():
            raise PeerMissing(f"reference project: no such file: {path}")
    gemm = ctypes.CDLL(str(Path(library).resolve())).hybrid_grouped_gemm
    pointer, number = ctypes.c_void_p, ctypes.c_int
    gemm.argtypes = (number, *[pointer] * 10, *[number] * 6, pointer)
    spec = importlib.util.spec_from_file_location("int8_hybrid_moe_quant", source)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return gemm, module


def weight_form(quant, w: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """As its benchmark makes them: float scales first, rounded to Q x F after quantising."""
    experts, n, k = w.shape
    tiles = w.float().view(experts, n // TILE_N, TILE_N, k // BLOCK, BLOCK)
    scale = tiles.abs().amax((2, 4)).clamp_min(1e-10) / 127
    values = (tiles / scale[:, :, None, :, None]).round().clamp(-128, 127).to(torch.int8)
    q, f = quant.quantize_scales_for_hybrid(
        scale.view(-1, k // BLOCK).contiguous(), Q_max=Q_MAX, super_group_size=SUPER_GROUP
    )
    return values.view(w.shape), q.view(experts, -1, k // BLOCK), f.view(experts, n // TILE_N, -1)


class _Product:
    """A weight matrix of the reference project and the launch of its GEMM."""

    def __init__(self, gemm, form) -> None:
        self.gemm, self.form = gemm, form
        self.experts, self.n, self.k = form[0].shape

    def sizes(self, counts: torch.Tensor) -> torch.Tensor:
        """int32 [E, 3]."""
        fixed = torch.tensor([self.n, self.k], dtype=torch.int32, device=counts.device)
        return torch.cat([counts.int()[:, None], fixed.expand(self.experts, 2)], 1).contiguous()

    def run(self, a, offsets, sizes, out, tile: int) -> None:
        values, q, f, scale_offsets = a
        w, w_q, w_f = self.form
        tensors = (values, q, f, w, w_q, w_f, offsets, sizes, scale_offsets, out)
        code = self.gemm(
            tile,
            *(tensor.data_ptr() for tensor in tensors),
            self.experts,
            self.n,
            self.k,
            values.shape[0],
            q.shape[0],
            SUPER_GROUP,
            torch.cuda.current_stream().cuda_stream,
        )
        if code:
            raise RuntimeError(f"hybrid_grouped_gemm: CUDA error {code}")


def tile_rows(rows: int, experts: int) -> int:
    """Its choice of the kernel by the mean rows per expert."""
    return 64 if rows / experts <= 70 else 128


class Layer:
    def __init__(self, problem: LayerProblem, library: str, folder: str) -> None:
        gemm, self.quant = load(library, folder)
        self.model = problem.model
        self.first = _Product(gemm, weight_form(self.quant, problem.w13))
        self.second = _Product(gemm, weight_form(self.quant, problem.w2))

    def call(self, inputs: Inputs):
        model, quant = self.model, self.quant
        tokens, top_k = inputs.ids.shape
        rows = tokens * top_k
        tile = tile_rows(rows, model.experts)
        sort = Sort(inputs.local_ids, model.experts, 1)
        device = inputs.x.device
        order = torch.empty(rows, dtype=torch.int32, device=device)
        routes = torch.arange(rows, dtype=torch.int32, device=device)
        hidden = torch.empty((rows, self.first.n), dtype=torch.bfloat16, device=device)
        y = torch.empty((rows, model.hidden), dtype=torch.bfloat16, device=device)
        out = torch.empty_like(inputs.x)
        combine = Combine(y, sort.rows, inputs.weights, out)
        sizes1, sizes2 = (p.sizes(sort.offsets[1:]) for p in (self.first, self.second))
        options = {"block_k": BLOCK, "q_max": Q_MAX, "super_group_size": SUPER_GROUP}
        options |= {"expert_offsets": sort.offsets, "tile_m": tile}

        def run() -> torch.Tensor:
            sort.run()
            order.scatter_(0, sort.rows.view(-1).long(), routes)
            counts = sort.offsets[1:] - sort.offsets[:-1]
            sizes1[:, 0] = counts
            sizes2[:, 0] = counts
            a = quant.fused_permute_quant_int8_hybrid_grouped(
                inputs.x, order, topk=top_k, **options
            )
            self.first.run(a, sort.offsets, sizes1, hidden, tile)
            b = quant.fused_silu_quant_int8_hybrid_grouped(hidden, **options)
            self.second.run(b, sort.offsets, sizes2, y, tile)
            combine.run()
            return out

        return run


class GroupedGemm:
    def __init__(self, problem: GemmProblem, library: str, folder: str) -> None:
        gemm, quant = load(library, folder)
        self.problem = problem
        first = weight_form(quant, problem.w)
        forms = [first] + [(first[0].clone(), *first[1:]) for _ in range(problem.copies - 1)]
        self.products = [_Product(gemm, form) for form in forms]
        self.tile = tile_rows(problem.rows, problem.case.experts)
        device = problem.x.device
        self.a = quant.fused_permute_quant_int8_hybrid_grouped(
            problem.x,
            torch.arange(problem.rows, dtype=torch.int32, device=device),
            topk=1,
            block_k=BLOCK,
            q_max=Q_MAX,
            super_group_size=SUPER_GROUP,
            expert_offsets=problem.offsets,
            tile_m=self.tile,
        )
        counts = problem.offsets[1:] - problem.offsets[:-1]
        self.sizes = self.products[0].sizes(counts)
        self.out = torch.empty((problem.rows, problem.n), dtype=torch.bfloat16, device=device)

    def call(self, index: int):
        def run() -> torch.Tensor:
            self.products[index].run(self.a, self.problem.offsets, self.sizes, self.out, self.tile)
            return self.out

        return run
