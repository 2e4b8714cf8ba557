"""docs/schemes.md in NumPy: a second opinion on the C++ library, written from the document alone.

Quantising and the products of integer schemes follow the document bit by bit (float32 steps, fused
multiply-adds by way of float64). The layer is float64 between the places where the document rounds.
"""

from __future__ import annotations

import dataclasses

import ml_dtypes
import numpy as np

F32, F64 = np.float32, np.float64
BF16, FP8 = ml_dtypes.bfloat16, ml_dtypes.float8_e4m3fn
TINY = F32(2.0**-100)


@dataclasses.dataclass
class Scheme:
    kind: str
    static: bool = False
    none: bool = False
    asymmetric: bool = False
    per_tensor: bool = False
    block_n: int = 128
    block_k: int = 128
    super_group: int = 256
    q_max: int = 16
    group: int = 128

    @classmethod
    def parse(cls, text: str) -> Scheme:
        kind, _, rest = text.partition(":")
        s = cls(kind)
        for part in filter(None, rest.split(",")):
            name, _, value = part.partition("=")
            if name == "block":
                s.block_n = s.block_k = int(value)
            elif name == "super":
                s.super_group = int(value)
            elif value:
                setattr(s, name, int(value))
            else:
                setattr(s, name, True)
        return s


def fma(a, b, c):
    """float32 fused multiply-add: the product of two float32 is exact in float64."""
    return (a.astype(F64) * np.asarray(b, F64) + np.asarray(c, F64)).astype(F32)


def absmax(x, axis=None, keepdims=False):
    return np.maximum(np.abs(x).max(axis, keepdims=keepdims, initial=0), TINY).astype(F32)


def blocks(n: int, size: int) -> list[slice]:
    return [slice(i, min(i + size, n)) for i in range(0, n, size)]


def row_blocks(n: int, size: int, segments: int) -> list[slice]:
    part = n // segments
    cuts = blocks(part, size)
    return [slice(s.start + i * part, s.stop + i * part) for i in range(segments) for s in cuts]


def to_int8(x, inverse):
    return np.clip(np.rint(x * inverse), -127, 127).astype(np.int8)


# -------------------------------------------------------------------------- weights, section 2


def quantize_matrix(scheme: Scheme, w, segments: int = 1) -> dict[str, np.ndarray]:
    """values, scale (and q) of w [E, N, K], as docs/schemes.md has them."""
    w = np.asarray(w).astype(F32)
    experts, n, k = w.shape
    if scheme.kind in ("bf16", "fp16"):
        return {"values": w.astype(BF16 if scheme.kind == "bf16" else np.float16)}
    if scheme.kind == "int8_channel":
        m = absmax(w, (1, 2) if scheme.per_tensor else 2, keepdims=True)
        scale = (m / F32(127)).reshape((experts,) if scheme.per_tensor else (experts, n))
        return {"values": to_int8(w, F32(127) / m), "scale": scale}
    if scheme.kind == "w4a8_fp8":
        size = scheme.group or k
        cuts = blocks(k, size)
        values, scale = np.zeros(w.shape, np.int8), np.zeros((experts, n, len(cuts)), F32)
        for g, cut in enumerate(cuts):
            m = absmax(w[:, :, cut], 2, keepdims=True)
            scale[:, :, g] = (m / F32(7))[:, :, 0]
            values[:, :, cut] = np.clip(np.rint(w[:, :, cut] * (F32(7) / m)), -7, 7)
        nibbles = values.view(np.uint8) & 15
        return {"values": nibbles[..., 0::2] | nibbles[..., 1::2] << 4, "scale": scale}
    rows, cols = row_blocks(n, scheme.block_n, segments), blocks(k, scheme.block_k)
    values = np.zeros(w.shape, np.int8)
    if scheme.kind == "int8_block":
        scale = np.zeros((experts, len(rows), len(cols)), F32)
        for i, row in enumerate(rows):
            for j, col in enumerate(cols):
                m = absmax(w[:, row, col], (1, 2), keepdims=True)
                scale[:, i, j] = (m / F32(127))[:, 0, 0]
                values[:, row, col] = to_int8(w[:, row, col], F32(127) / m)
        return {"values": values, "scale": scale}
    groups = blocks(len(cols), scheme.super_group)
    scale = np.zeros((experts, len(rows), len(groups)), F32)
    q = np.zeros((experts, len(rows), len(cols)), np.uint8)
    for i, row in enumerate(rows):
        for g, group in enumerate(groups):
            chosen = cols[group]
            peak = absmax(w[:, row, chosen[0].start : chosen[-1].stop], (1, 2))
            scale[:, i, g] = peak / F32(127 * scheme.q_max)
            for j, col in zip(range(group.start, group.stop), chosen, strict=True):
                m = np.abs(w[:, row, col]).max((1, 2)).astype(F32)
                q[:, i, j] = np.clip(np.ceil(m * (F32(scheme.q_max) / peak)), 1, scheme.q_max)
                effective = q[:, i, j].astype(F32) * scale[:, i, g]
                values[:, row, col] = to_int8(w[:, row, col], (F32(1) / effective)[:, None, None])
    return {"values": values, "scale": scale, "q": q}


def unpack_int4(values):
    low = (values << 4).astype(np.int8) >> 4
    high = values.astype(np.int8) >> 4
    return np.stack((low, high), -1).reshape(*values.shape[:-1], -1)


def dequantize(scheme: Scheme, parts, segments: int = 1) -> np.ndarray:
    """float64 [E, N, K] that stored tensors stand for."""
    values = parts["values"]
    if scheme.kind in ("bf16", "fp16"):
        return values.astype(F64)
    scale = parts["scale"].astype(F64)
    if scheme.kind == "int8_channel":
        return values * (scale[:, None, None] if scale.ndim == 1 else scale[:, :, None])
    if scheme.kind == "w4a8_fp8":
        values = unpack_int4(values)
        size = scheme.group or values.shape[2]
        return values * np.repeat(scale, size, 2)[:, :, : values.shape[2]]
    out = values.astype(F64)
    cols = blocks(values.shape[2], scheme.block_k)
    for i, row in enumerate(row_blocks(values.shape[1], scheme.block_n, segments)):
        for j, col in enumerate(cols):
            if scheme.kind == "int8_block":
                out[:, row, col] *= scale[:, i, j, None, None]
            else:
                factor = parts["q"][:, i, j] * scale[:, i, j // scheme.super_group]
                out[:, row, col] *= factor[:, None, None]
    return out


# -------------------------------------------------------------------------- activations, section 2


def quantize_rows(scheme: Scheme, x, static=None) -> dict[str, np.ndarray]:
    """Integers (or E4M3) and scales of x [R, K]; `stands_for` are the float64 numbers they mean.

    `static` is one scale, or one for each row.
    """
    x = np.asarray(x).astype(F32)
    rows = len(x)
    if scheme.kind in ("bf16", "fp16"):
        values = x.astype(BF16 if scheme.kind == "bf16" else np.float16)
        return {"values": values, "stands_for": values.astype(F64)}
    if scheme.kind == "w4a8_fp8":
        if scheme.none:
            scale, inverse = np.ones((rows, 1), F32), F32(1)
        elif static is not None:
            scale = np.broadcast_to(np.asarray(static, F32).reshape(-1, 1), (rows, 1))
            inverse = F32(1) / scale
        else:
            m = absmax(x, 1, keepdims=True)
            scale, inverse = m / F32(448), F32(448) / m
        values = np.clip(x * inverse, -448, 448).astype(FP8)
        return {
            "values": values,
            "scale": scale[:, 0],
            "stands_for": values.astype(F64) * scale.astype(F64),
        }
    if scheme.kind == "int8_channel":
        if static is not None:
            scale = np.full((rows, 1), static, F32)
            values = to_int8(x, F32(1) / scale)
        elif scheme.asymmetric:
            low = np.minimum(x.min(1, keepdims=True), 0)
            gap = np.maximum(np.maximum(x.max(1, keepdims=True), 0) - low, TINY)
            scale, inverse = gap / F32(255), F32(255) / gap
            zero = np.rint(-low * inverse) - F32(128)
            values = np.clip(np.rint(x * inverse) + zero, -128, 127).astype(np.int8)
            return {
                "values": values,
                "scale": scale[:, 0],
                "zero": zero[:, 0].astype(np.int32),
                "stands_for": (values - zero.astype(F64)) * scale.astype(F64),
            }
        else:
            m = absmax(x, 1, keepdims=True)
            scale, values = m / F32(127), to_int8(x, F32(127) / m)
        return {
            "values": values,
            "scale": scale[:, 0],
            "stands_for": values * scale.astype(F64),
        }
    # A row is a tile of one row: the weights' rule does the rest.
    one_row = dataclasses.replace(scheme, block_n=1)
    parts = quantize_matrix(one_row, x[None])
    stands_for = dequantize(one_row, parts)[0]
    return {name: part[0] for name, part in parts.items()} | {"stands_for": stands_for}


# -------------------------------------------------------------------------- products, section 3


def product(scheme: Scheme, a, b, expert: int, segments: int = 1) -> np.ndarray:
    """float32 [R, N] of an integer scheme, bit for bit. `a`, `b`: quantised parts."""
    av, bv = a["values"].astype(np.int64), b["values"][expert].astype(np.int64)
    n, k = bv.shape
    if scheme.kind == "int8_channel":
        acc = av @ bv.T
        if scheme.asymmetric:
            acc = acc - a["zero"].astype(np.int64)[:, None] * bv.sum(1)[None, :]
        scale = b["scale"][expert]
        return acc.astype(F32) * (np.broadcast_to(scale, (n,))[None, :] * a["scale"][:, None])
    cols, out = blocks(k, scheme.block_k), np.zeros((len(av), n), F32)
    rows = row_blocks(n, scheme.block_n, segments)
    block_of = np.concatenate([np.full(r.stop - r.start, i) for i, r in enumerate(rows)])
    if scheme.kind == "int8_block":
        for j, col in enumerate(cols):
            acc = (av[:, col] @ bv[:, col].T).astype(F32)
            p = b["scale"][expert][block_of, j][None, :] * a["scale"][:, j : j + 1]
            out = acc * p if j == 0 else fma(acc, p, out)
        return out
    # Hybrid, chunks of a whole super group (callers keep clear of the overflow bound).
    for g, group in enumerate(blocks(len(cols), scheme.super_group)):
        acc = np.zeros((len(av), n), np.int64)
        for j in range(group.start, group.stop):
            q = a["q"][:, j : j + 1].astype(np.int64) * b["q"][expert][block_of, j][None, :]
            acc += q * (av[:, cols[j]] @ bv[:, cols[j]].T)
        assert np.abs(acc).max(initial=0) < 2**31
        p = b["scale"][expert][block_of, g][None, :] * a["scale"][:, g : g + 1]
        out = acc.astype(F32) * p if g == 0 else fma(acc.astype(F32), p, out)
    return out


# -------------------------------------------------------------------------- layer, sections 4 and 6


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def _erf(x):
    import math

    return np.vectorize(math.erf, otypes=[F64])(x)


def activate(name: str, g, u=None, alpha=1.702, limit=None):
    if name == "swigluoai":
        limit = 7.0 if limit is None else limit
        g, u = np.minimum(g, limit), np.clip(u, -limit, limit) + 1
        return g * sigmoid(alpha * g) * u
    if name == "swiglu" and limit is not None:
        g, u = np.minimum(g, limit), np.clip(u, -limit, limit)
    gelu_tanh = 0.5 * g * (1 + np.tanh(np.sqrt(2 / np.pi) * (g + 0.044715 * g**3)))
    single = {
        "swiglu": lambda: g * sigmoid(g),
        "silu": lambda: g * sigmoid(g),
        "geglu_tanh": lambda: gelu_tanh,
        "gelu_tanh": lambda: gelu_tanh,
        "geglu_erf": lambda: 0.5 * g * (1 + _erf(g / np.sqrt(2))),
        "gelu_erf": lambda: 0.5 * g * (1 + _erf(g / np.sqrt(2))),
        "relu": lambda: np.maximum(g, 0),
        "relu2": lambda: np.maximum(g, 0) ** 2,
        "none": lambda: g,
    }[name]()
    return single if u is None else single * u


GATED = ("swiglu", "geglu_tanh", "geglu_erf", "swigluoai")


def moe(weights, x, ids, topk_weights, *, alpha=1.702, limit=None, on_input=False) -> np.ndarray:
    """float64 [T, H]: the layer of an octomoe.MoeWeights, computed from its stored tensors."""
    scheme, name = Scheme.parse(weights.scheme), weights.activation
    gated = name in GATED
    stored = weights.tensors("numpy")
    w13 = dequantize(scheme, stored["w13"], 2 if gated else 1)
    w2 = dequantize(scheme, stored["w2"])
    half = np.float16 if scheme.kind == "fp16" else BF16
    x_static = stored["w13"].get("activation_scale")
    act_static = stored["w2"].get("activation_scale")
    out = np.zeros((len(x), w2.shape[1]))

    def rows_of(values, static, expert):
        if static is not None:
            static = static[expert if len(static) > 1 else 0]
        return quantize_rows(scheme, values, static)["stands_for"]

    for expert in range(len(w2)):
        token, slot = np.nonzero(np.asarray(ids) == expert)
        if not len(token):
            continue
        routed = np.asarray(topk_weights, F64)[token, slot]
        a = rows_of(np.asarray(x)[token], x_static, expert)
        v = a @ w13[expert].T
        if on_input:
            v = v * routed[:, None]
        if "b13" in stored:
            v = v + stored["b13"][expert].astype(F64)
        if gated:
            first, second = np.split(v, 2, axis=1)
            g, u = (first, second) if weights.gate_up_order == "gate_up" else (second, first)
            h = activate(name, g, u, alpha, limit)
        else:
            h = activate(name, v)
        h = h.astype(F32).astype(half)
        y = rows_of(h, act_static, expert) @ w2[expert].T
        if "b2" in stored:
            y = y + stored["b2"][expert].astype(F64)
        y = y.astype(F32).astype(half).astype(F64)
        np.add.at(out, token, y if on_input else y * routed[:, None])
    return out


def error(a, b) -> float:
    """||a - b|| / ||b|| (0 / 0 = 0)."""
    a, b = np.asarray(a).astype(F64), np.asarray(b).astype(F64)
    norm = np.linalg.norm(b)
    return float(np.linalg.norm(a - b) / norm) if norm else float(np.abs(a).max(initial=0))


# -------------------------------------------------------------------------- route, section 7


def route(
    logits,
    k,
    *,
    scoring="softmax",
    bias=None,
    renormalize="divide",
    minimum=0.0,
    scaling=1.0,
    groups=1,
    topk_groups=1,
):
    """(weights float64 [T, k], ids [T, k])."""
    logits = np.asarray(logits).astype(F64)
    if scoring == "softmax":
        e = np.exp(logits - logits.max(1, keepdims=True))
        scores = e / e.sum(1, keepdims=True)
    else:
        scores = sigmoid(logits)
    chosen = scores if bias is None else scores + np.asarray(bias, F64)
    if groups > 1:
        parts = chosen.reshape(len(logits), groups, -1)
        ranked = np.sort(parts, 2)[:, :, ::-1]
        best = ranked[:, :, 0] if bias is None else ranked[:, :, :2].sum(2)
        keep = np.argsort(-best, 1, kind="stable")[:, :topk_groups]
        mask = np.zeros(best.shape, bool)
        np.put_along_axis(mask, keep, True, 1)
        chosen = np.where(mask[:, :, None], parts, -np.inf).reshape(chosen.shape)
    ids = np.argsort(-chosen, 1, kind="stable")[:, :k]
    weights = np.take_along_axis(scores, ids, 1)
    total = weights.sum(1, keepdims=True)
    if renormalize == "divide":
        weights = weights / np.maximum(total, minimum)
    elif renormalize == "add_eps":
        weights = weights / (total + minimum)
    return weights * scaling, ids
