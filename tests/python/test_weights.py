"""Quantising against docs/schemes.md in NumPy, bit for bit; adopting stored integers."""

import ml_dtypes
import numpy as np
import octomoe
import pytest
import reference
from hypothesis import given
from hypothesis import strategies as st
from problems import INTEGER_SCHEMES, SCHEMES, adopt, in_panels, random_input, random_weights

DYNAMIC = [s for s in SCHEMES if ":static" not in s]


def assert_same_parts(scheme, stored, expected):
    for name, value in expected.items():
        np.testing.assert_array_equal(
            np.asarray(stored[name]).view(np.uint8).reshape(-1),
            np.ascontiguousarray(value).view(np.uint8).reshape(-1),
            err_msg=f"{scheme}: {name}",
        )


@pytest.mark.parametrize("scheme", DYNAMIC)
@pytest.mark.parametrize("intermediate", [64, 96, 192, 352, 448])
def test_quantize_equals_the_document(scheme, intermediate):
    if scheme == "w4a8_fp8:group=0" and intermediate % 32:
        pytest.skip("rows of 16 bytes")
    weights, w13, w2 = random_weights(scheme, 3, 160, intermediate, seed=intermediate)
    parsed, stored = reference.Scheme.parse(scheme), weights.tensors()
    assert_same_parts(scheme, stored["w13"], reference.quantize_matrix(parsed, w13, 2))
    assert_same_parts(scheme, stored["w2"], reference.quantize_matrix(parsed, w2))


@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16])
@pytest.mark.parametrize("scheme", ["int8_channel", "int8_block", "int8_hybrid", "w4a8_fp8"])
def test_every_source_dtype(scheme, dtype):
    weights, w13, _ = random_weights(scheme, 2, 64, 96, dtype=dtype)
    expected = reference.quantize_matrix(reference.Scheme.parse(scheme), w13, 2)
    assert_same_parts(scheme, weights.tensors()["w13"], expected)


@pytest.mark.parametrize("scheme", DYNAMIC)
def test_dequantize_equals_the_document(scheme):
    weights, w13, w2 = random_weights(scheme, 3, 192, 96)
    parsed, stored = reference.Scheme.parse(scheme), weights.tensors()
    d13, d2 = weights.dequantize()
    np.testing.assert_allclose(d13, reference.dequantize(parsed, stored["w13"], 2), rtol=3e-7)
    np.testing.assert_allclose(d2, reference.dequantize(parsed, stored["w2"]), rtol=3e-7)
    limits = {"int8_channel:per_tensor": 0.06, "bf16": 0.003, "fp16": 3e-4}
    limit = limits.get(scheme, 0.2 if scheme.startswith("w4") else 0.04)
    assert reference.error(d13, w13) < limit
    assert reference.error(d2, w2) < limit


@given(
    experts=st.integers(1, 5),
    n=st.integers(1, 9).map(lambda i: 16 * i),
    k=st.integers(1, 13).map(lambda i: 32 * i),
    scheme=st.sampled_from(DYNAMIC),
    seed=st.integers(0, 99),
)
def test_quantize_matrix_any_shape(experts, n, k, scheme, seed):
    random = np.random.default_rng(seed)
    w = random.normal(0, 1, (experts, n, k)) * np.exp(random.normal(0, 2, (experts, n, 1)))
    w[random.random(w.shape) < 0.1] = 0
    w[0, 0] = 0  # a row of zeros
    w = w.astype(np.float32)
    matrix = octomoe.quantize_matrix(w, scheme)
    assert matrix.shape == (experts, n, k)
    assert_same_parts(
        scheme, matrix.tensors(), reference.quantize_matrix(reference.Scheme.parse(scheme), w)
    )


def test_threads_do_not_change_the_result():
    for scheme in DYNAMIC:
        one = random_weights(scheme, 4, 128, 192, threads=1)[0].tensors()
        two = random_weights(scheme, 4, 128, 192, threads=2)[0].tensors()
        for part in ("w13", "w2"):
            assert_same_parts(scheme, one[part], two[part])


def test_adopted_integers_give_the_same_layer():
    x = np.random.default_rng(0).normal(size=(7, 128)).astype(np.float32)
    topk_weights, ids = octomoe.route(x[:, :4], 2)
    makers = {
        "int8_channel": octomoe.MoeWeights.from_int8_channel,
        "int8_block": octomoe.MoeWeights.from_int8_block,
        "w4a8_fp8": octomoe.MoeWeights.from_w4a8_fp8,
    }
    for scheme, maker in makers.items():
        weights = random_weights(scheme, 4, 128, 96)[0]
        stored = weights.tensors()
        adopted = maker(
            stored["w13"]["values"],
            stored["w13"]["scale"],
            stored["w2"]["values"],
            stored["w2"]["scale"],
        )
        assert adopted.scheme == weights.scheme
        assert adopted.bytes == weights.bytes
        np.testing.assert_array_equal(
            octomoe.fused_moe(x, adopted, topk_weights, ids),
            octomoe.fused_moe(x, weights, topk_weights, ids),
        )
    weights = random_weights("int8_hybrid", 4, 128, 96)[0]
    w13, w2 = weights.tensors()["w13"], weights.tensors()["w2"]
    adopted = octomoe.MoeWeights.from_int8_hybrid(
        w13["values"], w13["scale"], w13["q"], w2["values"], w2["scale"], w2["q"]
    )
    np.testing.assert_array_equal(
        octomoe.fused_moe(x, adopted, topk_weights, ids),
        octomoe.fused_moe(x, weights, topk_weights, ids),
    )
    floats = random_weights("bf16", 4, 128, 96)[0].tensors()
    adopted = octomoe.MoeWeights.from_float(floats["w13"]["values"], floats["w2"]["values"])
    assert adopted.scheme == "bf16"


@pytest.mark.parametrize("scheme", INTEGER_SCHEMES)
@pytest.mark.parametrize(("hidden", "intermediate"), [(256, 384), (384, 128)])
def test_panels_give_the_same_layer(scheme, hidden, intermediate):
    weights = random_weights(scheme, 4, hidden, intermediate)[0]
    stored = weights.tensors()
    w13, w2 = stored["w13"]["values"], stored["w2"]["values"]
    x, ids, topk_weights = random_input(7, hidden, 4, 2)
    expected = octomoe.fused_moe(x, weights, topk_weights, ids)
    for first, second in (
        (in_panels(w13), in_panels(w2)),
        (in_panels(w13), w2),
        (w13, in_panels(w2)),
    ):
        adopted = adopt(scheme, first, second, stored)
        assert adopted.scheme == weights.scheme
        assert adopted.bytes == weights.bytes
        assert (adopted.hidden, adopted.intermediate) == (hidden, intermediate)
        for name, values in (("w13", first), ("w2", second)):
            kept = adopted.tensors()[name]["values"]
            assert kept.shape == values.shape
            assert np.shares_memory(kept, values)
        for one, two in zip(adopted.dequantize(), weights.dequantize(), strict=True):
            np.testing.assert_array_equal(one, two)
        np.testing.assert_array_equal(octomoe.fused_moe(x, adopted, topk_weights, ids), expected)
        y = octomoe.MoeLayer(adopted, prepack=True)(x, ids, topk_weights)  # the CPU does not mind
        np.testing.assert_array_equal(y, expected)


def test_panels_of_torch():
    torch = pytest.importorskip("torch", reason="PyTorch is missing")
    weights = random_weights("int8_channel", 4, 256, 128)[0]
    stored = weights.tensors("torch")
    w = stored["w13"]["values"]
    experts, n, k = w.shape
    strided = w.view(experts, n, k // 128, 128).transpose(1, 2)
    panels = strided.contiguous()
    np.testing.assert_array_equal(panels.numpy(), in_panels(w.numpy()))
    adopted = adopt("int8_channel", panels, stored["w2"]["values"], stored)
    kept = adopted.tensors()["w13"]["values"]
    assert kept.shape == (4, 2, 256, 128)
    assert kept.data_ptr() == panels.data_ptr()
    x, ids, topk_weights = map(torch.from_numpy, random_input(7, 256, 4, 2))
    assert torch.equal(
        octomoe.fused_moe(x, adopted, topk_weights, ids),
        octomoe.fused_moe(x, weights, topk_weights, ids),
    )
    with pytest.raises(octomoe.InvalidArgument, match="w13: expected a contiguous tensor"):
        adopt("int8_channel", strided, stored["w2"]["values"], stored)


def test_panels_of_jax():
    jax = pytest.importorskip("jax", reason="JAX is missing")
    weights = random_weights("int8_channel", 4, 128, 256)[0]
    stored = weights.tensors()
    w13, w2 = (jax.numpy.asarray(in_panels(stored[m]["values"])) for m in ("w13", "w2"))
    adopted = adopt("int8_channel", w13, w2, stored)
    np.testing.assert_array_equal(adopted.dequantize("numpy")[1], weights.dequantize()[1])


def test_weights_of_minus_128_and_scales_of_a_checkpoint():
    """-128 is legal in a checkpoint; scales come as [E, N, 1] and bfloat16 too."""
    random = np.random.default_rng(3)
    w13 = random.integers(-128, 128, (4, 192, 64), np.int8)
    w2 = random.integers(-128, 128, (4, 64, 96), np.int8)
    w13[:, ::3], w2[:, ::2] = -128, -128
    s13 = (random.random((4, 192, 1)) * 1e-3 + 1e-4).astype(ml_dtypes.bfloat16)
    s2 = (random.random((4, 64, 1)) * 1e-3 + 1e-4).astype(ml_dtypes.bfloat16)
    weights = octomoe.MoeWeights.from_int8_channel(w13, s13, w2, s2)
    assert weights.tensors()["w13"]["scale"].shape == (4, 192)
    x = random.normal(0, 1, (9, 64)).astype(np.float32)
    topk_weights, ids = octomoe.route(x[:, :4], 2)
    y = octomoe.fused_moe(x, weights, topk_weights, ids)
    assert reference.error(y, reference.moe(weights, x, ids, topk_weights)) < 1e-3


def test_adopted_memory_is_kept_alive_and_released():
    import gc
    import weakref

    class Array(np.ndarray):
        pass

    values = np.ones((2, 64, 64), np.int8).view(Array)
    gone = weakref.ref(values)
    scale = np.ones((2, 64), np.float32)
    matrix = octomoe.QuantizedMatrix.from_parts("int8_channel", values, scale)
    stored = matrix.tensors()["values"]
    assert np.shares_memory(np.asarray(values), stored)
    del values, stored
    gc.collect()
    assert matrix.dequantize().sum() == 2 * 64 * 64
    del matrix
    gc.collect()
    assert gone() is None


def test_release_keeps_the_layer():
    weights = random_weights("int8_channel", 4, 64, 64)[0]
    x = np.ones((2, 64), np.float32)
    topk_weights, ids = octomoe.route(x[:, :4], 2)
    with pytest.raises(octomoe.InvalidArgument, match="before any layer"):
        weights.release()
    before = octomoe.fused_moe(x, weights, topk_weights, ids)
    weights.release()
    np.testing.assert_array_equal(octomoe.fused_moe(x, weights, topk_weights, ids), before)
    with pytest.raises(octomoe.InvalidArgument, match="released"):
        weights.dequantize()


def test_names():
    assert octomoe.schemes() == [
        "int8_channel",
        "int8_block",
        "int8_hybrid",
        "w4a8_fp8",
        "bf16",
        "fp16",
    ]
    assert octomoe.canonical_scheme("int8_hybrid:q_max=16,block=64") == (
        "int8_hybrid:block_n=64,block_k=64"
    )
    weights = random_weights("int8_block", 2, 64, 96)[0]
    assert (weights.experts, weights.hidden, weights.intermediate) == (2, 64, 96)
    assert "int8_block" in repr(weights)
    assert weights.activation == "swiglu"
    assert weights.gate_up_order == "gate_up"
