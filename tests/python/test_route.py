"""route against float64 in NumPy."""

import ml_dtypes
import numpy as np
import octomoe
import pytest
import reference
from hypothesis import given
from hypothesis import strategies as st


def check_route(logits, top_k, bias=None, **options):
    weights, ids = octomoe.route(logits, top_k, correction_bias=bias, **options)
    names = {"renormalize_min": "minimum", "scaling_factor": "scaling"}
    renormalize = {True: "divide", False: "none"}.get(
        options.get("renormalize", True), options.get("renormalize")
    )
    other = {names.get(k, k): v for k, v in options.items() if k != "renormalize"}
    expected, expected_ids = reference.route(
        logits, top_k, bias=bias, renormalize=renormalize, **other
    )
    assert weights.dtype == np.float32
    assert ids.dtype == np.int32
    np.testing.assert_array_equal(ids, expected_ids)
    np.testing.assert_allclose(weights, expected, rtol=3e-6, atol=1e-30)


@given(
    tokens=st.integers(0, 40),
    experts=st.integers(1, 300),
    scoring=st.sampled_from(["softmax", "sigmoid"]),
    renormalize=st.sampled_from([True, False, "divide", "add_eps", "none"]),
    with_bias=st.booleans(),
    seed=st.integers(0, 99),
    data=st.data(),
)
def test_any_router(tokens, experts, scoring, renormalize, with_bias, seed, data):
    top_k = data.draw(st.integers(1, min(experts, 32)))
    random = np.random.default_rng(seed)
    # Distinct by more than the arithmetic's error.
    logits = random.permuted(np.tile(np.linspace(-4, 4, experts), (tokens, 1)), axis=1)
    bias = random.permutation(experts).astype(np.float32) if with_bias else None
    check_route(
        logits.astype(np.float32),
        top_k,
        bias,
        scoring=scoring,
        renormalize=renormalize,
        renormalize_min=1e-12,
        scaling_factor=2.5,
    )


def test_groups_of_deepseek():
    random = np.random.default_rng(1)
    logits = random.normal(size=(50, 256)).astype(np.float32)
    bias = random.normal(0, 0.1, 256).astype(np.float32)
    options = octomoe.RouteOptions.deepseek_v3()
    weights, ids = octomoe.route(logits, 8, correction_bias=bias, options=options)
    expected, expected_ids = reference.route(
        logits,
        8,
        scoring="sigmoid",
        bias=bias,
        renormalize="add_eps",
        minimum=1e-20,
        scaling=2.5,
        groups=8,
        topk_groups=4,
    )
    np.testing.assert_array_equal(ids, expected_ids)
    np.testing.assert_allclose(weights, expected, rtol=3e-6)
    check_route(logits, 8, scoring="sigmoid", groups=8, topk_groups=3)


def test_presets():
    logits = np.random.default_rng(2).normal(size=(9, 64)).astype(np.float32)
    qwen, ids = octomoe.route(logits, 6, options=octomoe.RouteOptions.qwen3())
    mixtral, _ = octomoe.route(logits, 6, options=octomoe.RouteOptions.mixtral())
    np.testing.assert_array_equal(qwen, mixtral)
    top = np.take_along_axis(logits.astype(np.float64), ids, 1)
    e = np.exp(top - top.max(1, keepdims=True))
    np.testing.assert_allclose(qwen, e / e.sum(1, keepdims=True), rtol=3e-6)
    octomoe.route(
        logits,
        6,
        correction_bias=np.zeros(64, np.float32),
        options=octomoe.RouteOptions.ernie45(),
    )


def test_ties_go_to_the_lower_expert():
    weights, ids = octomoe.route(np.zeros((3, 8), np.float32), 3)
    np.testing.assert_array_equal(ids, [[0, 1, 2]] * 3)
    np.testing.assert_allclose(weights, 1 / 3, rtol=1e-6)


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16])
def test_half_precision_logits(dtype):
    logits = np.random.default_rng(3).permuted(np.tile(np.linspace(-2, 2, 32), (10, 1)), axis=1)
    check_route(logits.astype(dtype), 4)


def test_nan_logits():
    logits = np.random.default_rng(4).normal(size=(3, 8)).astype(np.float32)
    logits[1, 5] = np.nan
    weights, ids = octomoe.route(logits, 2)
    assert np.isnan(weights[1]).all()
    np.testing.assert_array_equal(ids[1], [0, 1])
    assert np.isfinite(weights[[0, 2]]).all()


def test_out():
    logits = np.random.default_rng(5).normal(size=(4, 8)).astype(np.float32)
    out = np.empty((4, 2), np.float32), np.empty((4, 2), np.int32)
    weights, ids = octomoe.route(logits, 2, out=out)
    assert weights is out[0]
    assert ids is out[1]
    np.testing.assert_array_equal(ids, octomoe.route(logits, 2)[1])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"top_k": 0}, r"top_k: expected 1\.\.8"),
        ({"top_k": 9}, r"top_k: expected 1\.\.8 .*got 9"),
        ({"logits": np.zeros(8, np.float32)}, r"logits: expected \[T, E\], got \[8\]"),
        ({"logits": np.zeros((2, 8), np.int32)}, "logits: .*int32"),
        ({"scoring": "tanh"}, "scoring: expected one of softmax, sigmoid, got 'tanh'"),
        ({"renormalize": "twice"}, "renormalize: expected one of none, divide, add_eps"),
        ({"correction_bias": np.zeros(7, np.float32)}, "correction_bias: .*8"),
        ({"groups": 3}, "groups"),
        ({"groups": 4, "topk_groups": 5}, "topk_groups"),
    ],
)
def test_errors(arguments, message):
    call = {"logits": np.zeros((2, 8), np.float32), "top_k": 2} | arguments
    with pytest.raises(octomoe.InvalidArgument, match=message):
        octomoe.route(**call)
