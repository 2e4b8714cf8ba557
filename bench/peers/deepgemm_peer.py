"""DeepGEMM's FP8 grouped GEMM (PyPI: sgl-deep-gemm), 1x128 and 128x128 scales.

Rows are padded to 128 for each expert (`contiguous`), or lie in [experts, max rows] (`masked`, for
a few rows per expert); the time is that of the GEMM alone. Compiled by nvcc or NVRTC at first use.
"""

from __future__ import annotations

import importlib
import os
import sys

import torch

from . import PeerMissing
from .problems import GemmProblem

VERSION = "0.1.4"
ALIGNMENT = 128
MASKED_ROWS = 64  # up to this many rows per expert the masked form is the one to use


def load(site: str):
    if not os.path.isfile(f"{site}/deep_gemm/__init__.py"):
        raise PeerMissing(f"deep_gemm: no package under {site}: run bench/peers/fetch.py")
    if site not in sys.path:
        sys.path.append(site)
    try:
        import deep_gemm
    except (ImportError, OSError, RuntimeError, AssertionError) as error:
        raise PeerMissing(f"deep_gemm: {error}") from error
    return deep_gemm


def rows_to_fp8(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    groups = x.float().view(*x.shape[:-1], -1, 128)
    scale = groups.abs().amax(-1).clamp_min(1e-4) / 448
    return (groups / scale[..., None]).to(torch.float8_e4m3fn).view(x.shape), scale


def weights_to_fp8(w: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    experts, n, k = w.shape
    tiles = w.float().view(experts, n // 128, 128, k // 128, 128)
    scale = tiles.abs().amax((2, 4)).clamp_min(1e-4) / 448
    q = (tiles / scale[:, :, None, :, None]).to(torch.float8_e4m3fn)
    return q.view(w.shape), scale


class GroupedGemm:
    def __init__(self, problem: GemmProblem, site: str) -> None:
        self.deep_gemm = load(site)
        self.problem = problem
        values, scale = weights_to_fp8(problem.w)
        self.weights = [(values, scale)]
        self.weights += [(values.clone(), scale) for _ in range(problem.copies - 1)]
        experts, counts, device = problem.case.experts, problem.counts, problem.x.device
        self.masked = problem.case.rows <= MASKED_ROWS
        x, x_scale = rows_to_fp8(problem.x)
        if self.masked:
            most = -(-max(counts) // 64) * 64
            firsts = [expert * most for expert in range(experts)]
            total = experts * most
        else:
            padded = [-(-count // ALIGNMENT) * ALIGNMENT for count in counts]
            firsts = [sum(padded[:expert]) for expert in range(experts)]
            total = sum(padded)
        starts = torch.tensor(firsts, device=device)
        owner = torch.repeat_interleave(
            torch.arange(experts, device=device), torch.tensor(counts, device=device)
        )
        inside = torch.arange(problem.rows, device=device) - problem.offsets[:-1].long()[owner]
        self.place = starts[owner] + inside
        self.a = torch.zeros((total, problem.k), dtype=torch.float8_e4m3fn, device=device)
        self.a.view(torch.uint8)[self.place] = x.view(torch.uint8)
        self.a_scale = torch.ones((total, problem.k // 128), device=device)
        self.a_scale[self.place] = x_scale
        self.out = torch.empty((total, problem.n), dtype=torch.bfloat16, device=device)
        if self.masked:
            shape = (experts, most)
            self.a, self.a_scale = self.a.view(*shape, -1), self.a_scale.view(*shape, -1)
            self.out = self.out.view(*shape, -1)
            self.counts = torch.tensor(counts, dtype=torch.int32, device=device)
            self.expected = problem.case.rows
        else:
            self.layout = torch.full((total,), -1, dtype=torch.int32, device=device)
            self.layout[self.place] = owner.int()
        # Its scales of a are column-major with aligned columns; done once, as a producer would.
        layout = importlib.import_module("deep_gemm.utils.layout")
        self.a_scale = layout.get_mn_major_tma_aligned_tensor(self.a_scale)

    def call(self, index: int):
        weights = self.weights[index]
        a = self.a, self.a_scale

        def run() -> torch.Tensor:
            if self.masked:
                self.deep_gemm.fp8_m_grouped_gemm_nt_masked(
                    a, weights, self.out, self.counts, self.expected
                )
            else:
                self.deep_gemm.m_grouped_fp8_gemm_nt_contiguous(a, weights, self.out, self.layout)
            return self.out.view(-1, self.problem.n)

        run.place = self.place
        return run
