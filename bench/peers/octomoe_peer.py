"""OctoMoE itself, through its Python package: one contender for each integer scheme.

A scheme's name that ends with _prepacked: its weights are copied into panels beforehand. With
_any_order: a layer's rows are added up as they come.
"""

from __future__ import annotations

import torch

from . import PeerMissing
from .problems import BLOCK, GemmProblem, Inputs, LayerProblem, parse_scheme

try:
    import octomoe
except ImportError as error:
    raise PeerMissing(f"octomoe: {error}") from error

VERSION = octomoe.__version__
PREPACKED, ANY_ORDER = "_prepacked", "_any_order"


class Layer:
    """One of the integer schemes on the problem's weights, where they lie."""

    def __init__(self, problem: LayerProblem, name: str) -> None:
        scheme = name.removesuffix(PREPACKED).removesuffix(ANY_ORDER)
        form = problem.form(scheme)
        kind, block_k = parse_scheme(scheme)
        if kind == "channel":
            weights = octomoe.MoeWeights.from_int8_channel(*form)
        elif kind == "block":
            weights = octomoe.MoeWeights.from_int8_block(*form, block=(BLOCK, block_k))
        else:
            weights = octomoe.MoeWeights.from_int8_hybrid(*form, scheme=scheme)
        self.weights = weights
        model = problem.model
        expert_map = None
        if model.routed > model.experts:  # one GPU of several
            held = torch.arange(model.routed, dtype=torch.int32)
            expert_map = torch.where(held < model.experts, held, -1)
        self.layer = octomoe.MoeLayer(
            weights,
            device=problem.device,
            expert_map=expert_map,
            prepack=name.endswith(PREPACKED),
            combine_order="any" if name.endswith(ANY_ORDER) else "slots",
        )
        self.workspace = torch.empty(0, dtype=torch.uint8, device=problem.device)

    def call(self, inputs: Inputs):
        """A function of no arguments that runs the layer; its result is the output."""
        out = torch.empty_like(inputs.x)
        tokens, top_k = inputs.ids.shape
        size = self.layer.workspace_bytes(tokens, top_k)
        if self.workspace.numel() < size:
            self.workspace = torch.empty(size, dtype=torch.uint8, device=out.device)
        workspace = self.workspace

        def run() -> torch.Tensor:
            self.layer.forward(inputs.x, inputs.ids, inputs.weights, out=out, workspace=workspace)
            return out

        return run


class GroupedGemm:
    """grouped_gemm on rows that are already quantised."""

    def __init__(self, problem: GemmProblem, name: str) -> None:
        scheme = name.removesuffix(PREPACKED)
        self.problem = problem
        self.matrices = []
        for values, scale, *q in problem.weights(scheme):
            matrix = octomoe.QuantizedMatrix.from_parts(
                scheme, values, scale, **({"q": q[0]} if q else {})
            )
            prepared = octomoe.PreparedMatrix(
                matrix, device="cuda", prepack=name.endswith(PREPACKED)
            )
            self.matrices.append((prepared, matrix, values))  # used where they lie: keep them
        self.a, self.scale, *q = problem.activations(scheme)
        self.q = {"a_q": q[0]} if q else {}
        self.out = torch.empty(
            (problem.rows, problem.n), dtype=torch.bfloat16, device=self.a.device
        )
        size = self.matrices[0][0].workspace_bytes(problem.rows)
        self.workspace = torch.empty(size, dtype=torch.uint8, device=self.a.device)

    def call(self, index: int):
        matrix = self.matrices[index][0]

        def run() -> torch.Tensor:
            return octomoe.grouped_gemm(
                self.a,
                matrix,
                self.problem.offsets,
                a_scale=self.scale,
                out=self.out,
                workspace=self.workspace,
                **self.q,
            )

        return run
