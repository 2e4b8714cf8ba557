"""Random layers and routings for the tests."""

from __future__ import annotations

import numpy as np
import octomoe

SCHEMES = (
    "int8_channel",
    "int8_channel:asymmetric",
    "int8_channel:per_tensor",
    "int8_channel:static",
    "int8_block",
    "int8_block:block=64",
    "int8_block:block_n=32,block_k=96",
    "int8_hybrid",
    "int8_hybrid:block=64,super=2,q_max=5",
    "w4a8_fp8",
    "w4a8_fp8:group=0",
    "w4a8_fp8:static,group=32",
    "w4a8_fp8:none",
    "bf16",
    "fp16",
)
INTEGER_SCHEMES = tuple(s for s in SCHEMES if s.startswith("int8"))


def random_weights(
    scheme,
    experts,
    hidden,
    intermediate,
    *,
    seed=0,
    activation="swiglu",
    bias=False,
    dtype=np.float32,
    **options,
):
    """MoeWeights, and the floats that they were made of."""
    random = np.random.default_rng(seed)
    rows = intermediate * (
        2 if activation in ("swiglu", "geglu_tanh", "geglu_erf", "swigluoai") else 1
    )
    # Scales that differ between experts, rows and columns: a wrong index must show.
    spread = np.exp(random.normal(0, 0.7, (experts, rows, 1)))
    w13 = random.normal(0, hidden**-0.5, (experts, rows, hidden)) * spread
    w13 *= np.exp(random.normal(0, 0.5, (1, 1, hidden)))
    w2 = random.normal(0, intermediate**-0.5, (experts, hidden, intermediate))
    w2 *= np.exp(random.normal(0, 0.7, (experts, hidden, 1)))
    w13, w2 = w13.astype(dtype), w2.astype(dtype)
    if bias:
        options["b13"] = random.normal(0, 0.3, (experts, rows)).astype(np.float32)
        options["b2"] = random.normal(0, 0.3, (experts, hidden)).astype(np.float32)
    if ":static" in scheme:
        size = experts if scheme.startswith("w4a8") else 1
        top = 448 if scheme.startswith("w4a8") else 127
        options["x_scale"] = np.full(size, 6.0 / top, np.float32)
        options["act_scale"] = np.full(size, 4.0 / top, np.float32)
    made = octomoe.quantize(w13, w2, scheme, activation=activation, **options)
    return made, w13, w2


def in_panels(values):
    """int8 [E, N, K] -> [E, K/128, N, 128], of NumPy."""
    experts, n, k = values.shape
    return np.ascontiguousarray(values.reshape(experts, n, k // 128, 128).transpose(0, 2, 1, 3))


def adopt(scheme, w13, w2, stored):
    """MoeWeights by the `from_*` of a scheme with other values beside the stored scales."""
    options = {}
    maker = octomoe.MoeWeights
    s13, s2 = stored["w13"], stored["w2"]
    if scheme.startswith("int8_channel"):
        if ":static" in scheme:
            options["x_scale"] = s13["activation_scale"]
            options["act_scale"] = s2["activation_scale"]
        return maker.from_int8_channel(w13, s13["scale"], w2, s2["scale"], scheme=scheme, **options)
    if scheme.startswith("int8_hybrid"):
        return maker.from_int8_hybrid(
            w13, s13["scale"], s13["q"], w2, s2["scale"], s2["q"], scheme=scheme, **options
        )
    block = {"int8_block": (128, 128), "int8_block:block=64": (64, 64)}.get(scheme, (32, 96))
    return maker.from_int8_block(w13, s13["scale"], w2, s2["scale"], block=block, **options)


def random_input(tokens, hidden, experts, top_k, *, seed=1, routing="uniform", dtype=np.float32):
    """x, topk_ids, topk_weights. routing: uniform, skewed, single, holes."""
    random = np.random.default_rng(seed)
    x = (random.normal(0, 1, (tokens, hidden)) * np.exp(random.normal(0, 0.8, (tokens, 1)))).astype(
        dtype
    )
    popularity = np.ones(experts)
    if routing == "skewed":
        popularity = 1.0 / np.arange(1, experts + 1) ** 2
    scores = random.gumbel(size=(tokens, experts)) + np.log(popularity)
    ids = np.argsort(-scores, 1)[:, :top_k].astype(np.int32)
    if routing == "single":
        ids = np.tile(np.arange(top_k, dtype=np.int32), (tokens, 1))
    if routing == "holes":
        ids[random.random(ids.shape) < 0.3] = -1
    weights = random.random((tokens, top_k), np.float32) + np.float32(0.05)
    return x, ids, (weights / weights.sum(1, keepdims=True)).astype(np.float32)
