#!/usr/bin/env python3
"""An MoE layer out of two grouped GEMMs, for engines that dispatch tokens themselves.

python examples/grouped_gemm.py
"""

import numpy as np
import octomoe


def main() -> None:
    random = np.random.default_rng(0)
    tokens, experts, top_k, hidden, intermediate = 64, 8, 2, 256, 192
    x = random.normal(size=(tokens, hidden)).astype(np.float32)
    w13 = random.normal(0, hidden**-0.5, (experts, 2 * intermediate, hidden)).astype(np.float32)
    w2 = random.normal(0, intermediate**-0.5, (experts, hidden, intermediate)).astype(np.float32)
    logits = random.normal(size=(tokens, experts)).astype(np.float32)

    # Once, when the model is loaded.
    first = octomoe.PreparedMatrix(octomoe.quantize_matrix(w13, "int8_channel", segments=2))
    second = octomoe.PreparedMatrix(octomoe.quantize_matrix(w2, "int8_channel"))

    # For each batch: route, sort the rows by expert, two products, combine.
    topk_weights, topk_ids = octomoe.route(logits, top_k)
    offsets, routes = octomoe.expert_offsets(topk_ids, experts)
    token = routes // top_k
    gate, up = np.split(octomoe.grouped_gemm(x[token], first, offsets, out_dtype="float32"), 2, 1)
    act = gate / (1 + np.exp(-gate)) * up
    rows = octomoe.grouped_gemm(act, second, offsets, out_dtype="float32")
    y = np.zeros_like(x)
    np.add.at(y, token, rows * topk_weights.reshape(-1)[routes, None])

    # The fused layer does the same in one call (and rounds act and rows to bfloat16 on the way).
    weights = octomoe.quantize(w13, w2, "int8_channel")
    fused = octomoe.fused_moe(x, weights, topk_weights, topk_ids)
    difference = np.linalg.norm(fused - y) / np.linalg.norm(y)
    print(f"{tokens} tokens, {offsets[-1]} rows; fused layer differs by {difference:.1e}")
    assert difference < 1e-2


if __name__ == "__main__":
    main()
