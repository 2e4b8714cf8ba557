"""grouped_gemm: integer schemes bit for bit, both layouts, float and quantised activations."""

import ml_dtypes
import numpy as np
import octomoe
import pytest
import reference
from hypothesis import given
from hypothesis import strategies as st
from problems import in_panels

INTEGER = (
    "int8_channel",
    "int8_channel:asymmetric",
    "int8_channel:per_tensor",
    "int8_block",
    "int8_block:block=64",
    "int8_hybrid",
    "int8_hybrid:block=32,super=4,q_max=7",
)
FLOAT = ("w4a8_fp8", "w4a8_fp8:group=32", "w4a8_fp8:none", "bf16", "fp16")


def random_problem(experts, rows, n, k, seed=0):
    random = np.random.default_rng(seed)
    w = random.normal(0, k**-0.5, (experts, n, k)) * np.exp(random.normal(0, 0.8, (experts, n, 1)))
    a = random.normal(0, 1, (rows, k)) * np.exp(random.normal(0, 0.8, (rows, 1)))
    cuts = np.sort(random.integers(0, rows + 1, experts - 1))
    offsets = np.concatenate(([0], cuts, [rows])).astype(np.int32)
    return a.astype(np.float32), w.astype(np.float32), offsets


def expected_product(scheme, a, parts, offsets):
    """float32 for integer schemes (exact), float64 for the others."""
    parsed = reference.Scheme.parse(scheme)
    exact = scheme.startswith("int8")
    experts, n = len(offsets) - 1, parts["values"].shape[1]
    out = np.zeros((len(a), n), np.float32 if exact else np.float64)
    for e in range(experts):
        rows = slice(offsets[e], offsets[e + 1])
        if rows.start == rows.stop:
            continue
        quantised = reference.quantize_rows(parsed, a[rows])
        if exact:
            out[rows] = reference.product(parsed, quantised, parts, e)
        else:
            out[rows] = quantised["stands_for"] @ reference.dequantize(parsed, parts)[e].T
    return out


@given(
    scheme=st.sampled_from(INTEGER + FLOAT),
    experts=st.integers(1, 9),
    rows=st.integers(0, 50),
    n=st.integers(1, 20).map(lambda i: 16 * i),
    k=st.integers(1, 12).map(lambda i: 32 * i),
    seed=st.integers(0, 9),
)
def test_offsets(scheme, experts, rows, n, k, seed):
    a, w, offsets = random_problem(experts, rows, n, k, seed)
    matrix = octomoe.quantize_matrix(w, scheme)
    prepared = octomoe.PreparedMatrix(matrix)
    assert prepared.shape == (experts, n, k)
    d = octomoe.grouped_gemm(a, prepared, offsets, out_dtype="float32")
    expected = expected_product(scheme, a, matrix.tensors(), offsets)
    if scheme.startswith("int8"):
        np.testing.assert_array_equal(d, expected)
    else:
        assert reference.error(d, expected) < 1e-5


@pytest.mark.parametrize("scheme", INTEGER + FLOAT)
def test_masked_equals_offsets(scheme):
    a, w, _ = random_problem(4, 40, 96, 160)
    prepared = octomoe.PreparedMatrix(octomoe.quantize_matrix(w, scheme))
    counts = np.array([10, 0, 3, 7], np.int32)
    offsets = np.concatenate(([0], np.cumsum(counts))).astype(np.int32)
    stacked = a.reshape(4, 10, 160)
    rows = np.concatenate([stacked[e, :c] for e, c in enumerate(counts)])
    flat = octomoe.grouped_gemm(rows, prepared, offsets, out_dtype="float32")
    out = np.full((4, 10, 96), 5, np.float32)
    octomoe.grouped_gemm(stacked, prepared, rows_per_expert=counts, out=out)
    for e, count in enumerate(counts):
        np.testing.assert_array_equal(out[e, :count], flat[offsets[e] : offsets[e + 1]])
        assert (out[e, count:] == 5).all()
    fresh = octomoe.grouped_gemm(stacked, prepared, rows_per_expert=counts, out_dtype="float32")
    assert (fresh[1] == 0).all()


@pytest.mark.parametrize("scheme", INTEGER + ("w4a8_fp8",))
def test_quantised_activations(scheme):
    """Given integers and scales, the result is that of the floats they came from."""
    a, w, offsets = random_problem(5, 30, 64, 192)
    prepared = octomoe.PreparedMatrix(octomoe.quantize_matrix(w, scheme))
    parts = reference.quantize_rows(reference.Scheme.parse(scheme), a)
    given_parts = {"a_scale": parts["scale"]}
    if "q" in parts:
        given_parts["a_q"] = parts["q"]
    if "zero" in parts:
        given_parts["a_zero"] = parts["zero"]
    d = octomoe.grouped_gemm(parts["values"], prepared, offsets, out_dtype="float32", **given_parts)
    plain = octomoe.grouped_gemm(a, prepared, offsets, out_dtype="float32")
    np.testing.assert_array_equal(d, plain)


def test_bias_and_out_dtypes():
    a, w, offsets = random_problem(3, 20, 64, 96)
    bias = np.random.default_rng(2).normal(size=(3, 64)).astype(np.float32)
    prepared = octomoe.PreparedMatrix(octomoe.quantize_matrix(w))
    wide = octomoe.grouped_gemm(a, prepared, offsets, bias=bias, out_dtype=np.float32)
    plain = octomoe.grouped_gemm(a, prepared, offsets, out_dtype="float32")
    expert = np.repeat(np.arange(3), np.diff(offsets))
    np.testing.assert_array_equal(wide, plain + bias[expert])
    for dtype in (np.float16, ml_dtypes.bfloat16):
        narrow = octomoe.grouped_gemm(a, prepared, offsets, bias=bias, out_dtype=np.dtype(dtype))
        np.testing.assert_array_equal(narrow, wide.astype(dtype))
    assert octomoe.grouped_gemm(a, prepared, offsets).dtype == ml_dtypes.bfloat16


def test_b_as_a_tensor():
    a, w, offsets = random_problem(3, 20, 64, 128)
    matrix = octomoe.quantize_matrix(w, "int8_channel")
    expected = octomoe.grouped_gemm(a, matrix, offsets)
    stored = matrix.tensors()
    given_integers = octomoe.grouped_gemm(a, stored["values"], offsets, b_scale=stored["scale"])
    np.testing.assert_array_equal(given_integers, expected)
    np.testing.assert_array_equal(
        octomoe.grouped_gemm(a, w, offsets, scheme="int8_channel"), expected
    )
    block = octomoe.quantize_matrix(w, "int8_block")
    np.testing.assert_array_equal(
        octomoe.grouped_gemm(
            a, block.tensors()["values"], offsets, b_scale=block.tensors()["scale"]
        ),
        octomoe.grouped_gemm(a, block, offsets),
    )
    half = w.astype(ml_dtypes.bfloat16)
    np.testing.assert_array_equal(
        octomoe.grouped_gemm(a, half, offsets),
        octomoe.grouped_gemm(a, octomoe.quantize_matrix(half, "bf16"), offsets),
    )


def test_a_layer_by_hand():
    """expert_offsets sorts the rows: GEMM by hand gives the layer's first product."""
    random = np.random.default_rng(8)
    x = random.normal(size=(12, 64)).astype(np.float32)
    w = random.normal(size=(4, 32, 64)).astype(np.float32)
    _, ids = octomoe.route(random.normal(size=(12, 4)).astype(np.float32), 2)
    ids[3, 1] = -1
    offsets, routes = octomoe.expert_offsets(ids, 4)
    assert offsets[-1] == len(routes) == 23
    d = octomoe.grouped_gemm(x[routes // 2], w, offsets, scheme="bf16", out_dtype="float32")
    for row, r in enumerate(routes):
        expected = (
            x[r // 2].astype(ml_dtypes.bfloat16).astype(np.float64)
            @ w[ids.flat[r]].astype(ml_dtypes.bfloat16).astype(np.float64).T
        )
        assert reference.error(d[row], expected) < 1e-5


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda p: p.update(expert_offsets=None), "expert_offsets: give it or rows_per_expert"),
        (lambda p: p.update(expert_offsets=np.array([0, 1, 2], np.int32)), "expert_offsets"),
        (lambda p: p.update(expert_offsets=np.array([0, 9, 2, 20], np.int32)), "expert_offsets"),
        (lambda p: p.update(expert_offsets=np.array([1, 2, 3, 20], np.int32)), "expert_offsets"),
        (lambda p: p.update(expert_offsets=np.array([0, 2, 3, 19], np.int32)), "expert_offsets"),
        (lambda p: p.update(a=np.zeros((20, 64), np.float32)), r"\ba\b.*96"),
        (lambda p: p.update(a=np.zeros((20, 96), np.int8)), "a.scale"),
        (lambda p: p.update(a=np.zeros((20, 96), np.float64)), "a: .*float64"),
        (lambda p: p.update(out=np.zeros((20, 63), np.float32)), "63"),
        (lambda p: p.update(out_dtype="int8"), "out_dtype: expected bfloat16, float16 or float32"),
        (lambda p: p.update(bias=np.zeros((3, 63), np.float32)), "bias"),
        (lambda p: p.update(b=np.zeros((3, 64, 96), np.int8)), "b_scale: an int8 b needs"),
        (lambda p: p.update(b=[1, 2]), "b: expected a tensor"),
    ],
)
def test_errors(change, message):
    a, w, offsets = random_problem(3, 20, 64, 96)
    problem = {"a": a, "b": octomoe.quantize_matrix(w), "expert_offsets": offsets}
    change(problem)
    with pytest.raises(octomoe.InvalidArgument, match=message):
        octomoe.grouped_gemm(**problem)


@pytest.mark.parametrize("scheme", INTEGER)
@pytest.mark.parametrize("k", [128, 384])
def test_panels(scheme, k):
    a, w, offsets = random_problem(3, 30, 80, k)
    matrix = octomoe.quantize_matrix(w, scheme)
    parts = matrix.tensors()
    panels = octomoe.QuantizedMatrix.from_parts(
        scheme, in_panels(parts["values"]), parts["scale"], q=parts.get("q")
    )
    assert panels.shape == (3, 80, k)
    assert panels.bytes == matrix.bytes
    assert panels.flush_blocks == matrix.flush_blocks
    assert panels.tensors()["values"].shape == (3, k // 128, 80, 128)
    np.testing.assert_array_equal(panels.dequantize(), matrix.dequantize())
    d = octomoe.grouped_gemm(a, matrix, offsets, out_dtype="float32")
    for prepack in (False, True):
        prepared = octomoe.PreparedMatrix(panels, prepack=prepack)
        assert prepared.shape == (3, 80, k)
        np.testing.assert_array_equal(
            octomoe.grouped_gemm(a, prepared, offsets, out_dtype="float32"), d
        )
    if scheme in ("int8_channel", "int8_block"):
        given = octomoe.grouped_gemm(
            a, in_panels(parts["values"]), offsets, b_scale=parts["scale"], out_dtype="float32"
        )
        np.testing.assert_array_equal(given, d)
