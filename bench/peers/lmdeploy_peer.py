"""lmdeploy's Triton INT8 layer, `fused_moe_w8a8`: int32 accumulation, autotuned.

It needs seven of the wheel's Python files (`fetch.py` takes just these). They import each other
through packages whose `__init__` would pull in all of lmdeploy, so the packages are made here as
empty ones with the right search path, and the files run unchanged.

Its kernels are specialised by N, K, strides and the power of two above T, four configurations
each: `precompile` fills Triton's disk cache from several processes, because one after the other
they take minutes.
"""

from __future__ import annotations

import concurrent.futures
import functools
import importlib
import multiprocessing
import os
import sys
import time
import types
from pathlib import Path

import torch

from . import PeerMissing
from .fetch import LMDEPLOY_FILES as FILES
from .problems import Inputs, LayerProblem, Model

VERSION = "0.18.0"


@functools.cache
def modules(site: str) -> tuple[types.ModuleType, types.ModuleType]:
    """(moe.w8a8, w8a8_triton_kernels) of the files under `site`."""
    missing = [name for name in FILES if not (Path(site) / name).is_file()]
    if missing:
        raise PeerMissing(f"lmdeploy: no {missing[0]} under {site}: run bench/peers/fetch.py")
    for name in sorted({str(Path(file).parent) for file in FILES} | {"lmdeploy"}):
        for depth in range(1, name.count("/") + 2):
            path = "/".join(name.split("/")[:depth])
            package = types.ModuleType(path.replace("/", "."))
            package.__path__ = [str(Path(site) / path)]
            sys.modules.setdefault(package.__name__, package)
    kernels = "lmdeploy.pytorch.kernels.cuda"
    layer = importlib.import_module(f"{kernels}.moe.w8a8")
    return layer, importlib.import_module(f"{kernels}.w8a8_triton_kernels")


def _compile(site: str, job: tuple[int, ...]) -> None:
    """One configuration of one GEMM, without running it."""
    n, k, rows, top_k, reindex_a, index = job
    import triton.language as tl
    from triton.runtime.jit import MockTensor

    layer, _ = modules(site)
    tuner = layer.fused_moe_w8a8_kernel
    pointers = [torch.int8, torch.float32, torch.int8, torch.float32, torch.bfloat16]
    pointers += [torch.int32] * 3
    tuner.fn.warmup(
        *(MockTensor(dtype) for dtype in pointers),
        N=n,
        K=k,
        stride_am=k,
        stride_ak=1,
        stride_be=n * k,
        stride_bn=k,
        stride_bk=1,
        stride_bse=n,
        stride_cm=n,
        stride_cn=1,
        M_NP2=rows,
        top_k=top_k,
        expert_offset=0,
        reindex_a=bool(reindex_a),
        reindex_c=not reindex_a,
        ACCUMULATOR_DTYPE=tl.int32,
        grid=(1,),
        **tuner.configs[index].all_kwargs(),
    )


def _compile_all(site: str, jobs: list[tuple[int, ...]]) -> str | None:
    try:
        for job in jobs:
            _compile(site, job)
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return None


def precompile(site: str, models: list[Model], tokens: list[int]) -> float:
    """Seconds that filling Triton's cache took."""
    begin = time.monotonic()
    rows = sorted({max(64, 1 << (t - 1).bit_length()) for t in tokens})
    jobs = []
    for model in models:
        h, i = model.hidden, model.intermediate
        for index in range(4):
            jobs += [(2 * i, h, r, model.top_k, 1, index) for r in rows]
            jobs += [(h, i, r, 1, 0, index) for r in rows]
    workers = max(1, min(len(os.sched_getaffinity(0)) - 2, len(jobs)))
    context = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(workers, mp_context=context) as pool:
        parts = [jobs[first::workers] for first in range(workers)]
        for problem in pool.map(functools.partial(_compile_all, site), parts):
            if problem:
                print(f"lmdeploy: compiling ahead failed, the run will compile: {problem}")
                break
    return time.monotonic() - begin


class Layer:
    """The chain of lmdeploy's own W8A8 backend: quantise, then fused_moe_w8a8."""

    def __init__(self, problem: LayerProblem, site: str) -> None:
        self.layer, self.kernels = modules(site)
        self.w13, self.s13, self.w2, self.s2 = problem.form("int8_channel")
        self.s13, self.s2 = self.s13[..., None], self.s2[..., None]
        self.model = problem.model

    def new_size(self) -> None:
        """Its autotuner's key holds a power of two of at least 64: tune for each T instead, and
        in 30 ms a configuration instead of 125."""
        from triton.testing import do_bench

        tuner = self.layer.fused_moe_w8a8_kernel
        tuner.cache.clear()
        vars(tuner)["do_bench"] = lambda call, quantiles: do_bench(
            call, warmup=5, rep=25, quantiles=quantiles
        )

    def call(self, inputs: Inputs):
        def run() -> torch.Tensor:
            q, scale = self.kernels.per_token_quant_int8(inputs.x, 1e-7)
            return self.layer.fused_moe_w8a8(
                q,
                scale,
                self.w13,
                self.s13,
                self.w2,
                self.s2,
                inputs.weights,
                inputs.ids,
                topk=self.model.top_k,
                out_dtype=inputs.x.dtype,
                num_experts=self.model.routed,
            )

        return run
