"""Every refusal names the argument, what was expected and what came; nothing has been written."""

import numpy as np
import octomoe
import pytest
from problems import random_input, random_weights


def test_classes():
    assert issubclass(octomoe.Error, RuntimeError)
    assert issubclass(octomoe.InvalidArgument, ValueError)
    assert issubclass(octomoe.OutOfMemory, MemoryError)
    codes = {
        octomoe.InvalidArgument: "invalid_argument",
        octomoe.Unsupported: "unsupported",
        octomoe.FileError: "io",
        octomoe.FormatError: "format",
        octomoe.OutOfMemory: "out_of_memory",
        octomoe.CudaError: "cuda",
        octomoe.InternalError: "internal",
    }
    for kind, code in codes.items():
        assert issubclass(kind, octomoe.Error)
        assert kind.code == code
        assert kind("text").code == code


def test_an_error_carries_code_and_message():
    with pytest.raises(octomoe.Error) as caught:
        octomoe.canonical_scheme("int9")
    assert caught.value.code == "invalid_argument"
    assert 'got "int9"' in str(caught.value)
    assert isinstance(caught.value, ValueError)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("int8", "expected int8_channel"),
        ("int8_block:block=0", "block"),
        ("int8_block:block=48", "multiple of 32"),
        ("int8_block:block=x", "whole number"),
        ("int8_hybrid:q_max=65", r"1\.\.64"),
        ("int8_channel:asymmetric,static", "asymmetric"),
        ("int8_channel:q_max=3", "int8_hybrid"),
        ("bf16:per_tensor", "per_tensor"),
        ("w4a8_fp8:group=33", "multiple of 32"),
        ("int8_channel:fast", 'got "fast"'),
    ],
)
def test_schemes(text, message):
    with pytest.raises(octomoe.InvalidArgument, match=message):
        octomoe.canonical_scheme(text)


FLOATS = {
    "w13": np.ones((4, 192, 64), np.float32),
    "w2": np.ones((4, 64, 96), np.float32),
}


def with_value(array, index, value):
    changed = array.copy()
    changed[index] = value
    return changed


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"w13": np.ones((4, 192), np.float32)}, r"w13: expected .*\[E, N, K\].*\[4, 192\]"),
        ({"w13": np.ones((4, 191, 64), np.float32)}, "w13"),
        ({"w2": np.ones((3, 64, 96), np.float32)}, "w2: expected .*fit w13"),
        ({"w2": np.ones((4, 64, 112), np.float32)}, "w2: expected .*fit w13"),
        ({"w13": np.ones((4, 192, 63), np.float32), "w2": np.ones((4, 63, 96), np.float32)}, "w13"),
        ({"w13": np.ones((4, 192, 64), np.int8)}, "w13: .*int8"),
        ({"w13": with_value(FLOATS["w13"], (2, 7, 1), np.nan)}, "w13: .*expert 2.*row 7"),
        ({"w2": with_value(FLOATS["w2"], (3, 5, 0), -np.inf)}, "w2: .*expert 3.*row 5"),
        ({"activation": "swish"}, "activation: .*swish"),
        ({"gate_up_order": "up"}, "gate_up_order|order"),
        ({"b13": np.ones((4, 191), np.float32)}, "b13"),
        ({"b2": np.ones(64, np.float32)}, "b2"),
        ({"x_scale": np.ones(1, np.float32)}, "x_scale: expected none"),
        ({"scheme": "int8_channel:static"}, "x_scale: expected a static activation scale"),
        ({"w13": "weights"}, "w13: expected a tensor .*got str"),
    ],
)
def test_quantize(change, message):
    with pytest.raises(octomoe.InvalidArgument, match=message):
        octomoe.quantize(**(FLOATS | change))


INTEGERS = {
    "w13": np.ones((4, 192, 64), np.int8),
    "w13_scale": np.ones((4, 192), np.float32),
    "w2": np.ones((4, 64, 96), np.int8),
    "w2_scale": np.ones((4, 64), np.float32),
}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"w13": np.ones((4, 192, 64), np.uint8)}, "w13: .*int8.*uint8"),
        ({"w13_scale": np.ones((4, 191), np.float32)}, "w13_scale"),
        ({"w13_scale": with_value(INTEGERS["w13_scale"], (1, 1), -1)}, "w13_scale: .*-1"),
        ({"w13_scale": with_value(INTEGERS["w13_scale"], (1, 1), np.nan)}, "w13_scale"),
        ({"w2_scale": with_value(INTEGERS["w2_scale"], (1, 1), np.inf)}, "w2_scale"),
        ({"w2": np.ones((4, 64, 80), np.int8)}, "w2"),
        ({"scheme": "int8_block"}, "scheme: expected a form of int8_channel"),
    ],
)
def test_from_integers(change, message):
    with pytest.raises(octomoe.InvalidArgument, match=message):
        octomoe.MoeWeights.from_int8_channel(**(INTEGERS | change))


PANELS = {
    "w13": np.ones((4, 2, 256, 128), np.int8),
    "w13_scale": np.ones((4, 256), np.float32),
    "w2": np.ones((4, 1, 256, 128), np.int8),
    "w2_scale": np.ones((4, 256), np.float32),
}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"w13": np.ones((4, 4, 256, 64), np.int8)}, r"w13: expected .*\[E, K/128, N, 128\], got"),
        ({"w2": np.ones((4, 3, 256, 64), np.int8)}, r"w2: expected .*\[E, K/128, N, 128\], got"),
        ({"w13": np.ones((4, 2, 256, 128), np.uint8)}, "w13: .*int8.*uint8"),
        ({"w13": np.ones((1, 4, 2, 256, 128), np.int8)}, r"w13: expected .*\[E, N, K\] or \[E, K"),
        ({"w2": np.ones((4, 2, 256, 128), np.int8)}, "w2: expected .*fit w13"),
        ({"w2": np.ones((4, 256, 256), np.int8)}, "w2: expected .*fit w13"),
        ({"w13_scale": np.ones((4, 2, 256, 1), np.float32)}, "w13_scale: expected shape"),
        ({"w13": np.ones((4, 256, 2, 128), np.int8).transpose(0, 2, 1, 3)}, "w13: .*contiguous"),
    ],
)
def test_from_panels(change, message):
    assert octomoe.MoeWeights.from_int8_channel(**PANELS).intermediate == 128
    with pytest.raises(octomoe.InvalidArgument, match=message):
        octomoe.MoeWeights.from_int8_channel(**(PANELS | change))


def test_panels_of_other_schemes():
    scale = np.ones((4, 256, 2), np.float32)
    with pytest.raises(octomoe.InvalidArgument, match=r"w13: expected .*\[E, N, K/2\], got \[4, 2"):
        octomoe.MoeWeights.from_w4a8_fp8(PANELS["w13"], scale, PANELS["w2"], scale)
    floats = {name: PANELS[name].astype(np.float16) for name in ("w13", "w2")}
    with pytest.raises(octomoe.InvalidArgument, match=r"w13: expected .*\[E, N, K\], got \[4, 2"):
        octomoe.MoeWeights.from_float(**floats)
    with pytest.raises(octomoe.InvalidArgument, match=r"w13: expected .*\[E, N, K\]"):
        octomoe.quantize(PANELS["w13"].astype(np.float32), PANELS["w2"].astype(np.float32))


def test_other_constructors():
    with pytest.raises(octomoe.InvalidArgument, match="w13_scale|w2_scale"):
        octomoe.MoeWeights.from_int8_block(**INTEGERS)
    with pytest.raises(octomoe.InvalidArgument, match="activation_scale: expected 'dynamic'"):
        octomoe.MoeWeights.from_w4a8_fp8(**INTEGERS, activation_scale="often")
    with pytest.raises(octomoe.InvalidArgument, match="two INT4 values"):
        octomoe.MoeWeights.from_w4a8_fp8(**(INTEGERS | {"w13": np.ones((4, 192, 64), np.int32)}))
    with pytest.raises(octomoe.InvalidArgument, match="w13: .*float32"):
        octomoe.MoeWeights.from_float(FLOATS["w13"], FLOATS["w2"])
    with pytest.raises(octomoe.InvalidArgument, match="values: expected"):
        octomoe.QuantizedMatrix.from_parts("int8_channel", np.ones((4, 4), np.int8))
    with pytest.raises(octomoe.InvalidArgument, match="matrix: expected a QuantizedMatrix"):
        octomoe.PreparedMatrix(FLOATS["w13"])


@pytest.fixture(scope="module")
def weights():
    return random_weights("int8_channel", 4, 64, 96)[0]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"topk_ids": np.zeros((4, 2), np.int32)}, r"topk_ids: expected shape \[5, \*\]"),
        ({"topk_ids": np.zeros((5, 2), np.float32)}, "topk_ids: .*float32"),
        ({"topk_ids": np.full((5, 2), 4, np.int32)}, r"topk_ids: .*-1\.\.3, got 4 at token 0"),
        ({"topk_ids": np.full((5, 2), -2, np.int64)}, "topk_ids: .*got -2"),
        ({"topk_weights": np.zeros((5, 3), np.float32)}, r"topk_weights: expected shape \[5, 2\]"),
        ({"topk_weights": np.zeros((5, 2), np.float64)}, "topk_weights: .*float64"),
        (
            {"topk_ids": np.zeros((5, 5), np.int32), "topk_weights": np.zeros((5, 5), np.float32)},
            r"top_k in 1\.\.4",
        ),
        ({"out": np.zeros((5, 63), np.float32)}, "out: expected shape"),
        ({"out": np.zeros((5, 64), np.int32)}, "out: .*int32"),
        ({"out": np.zeros((64, 5), np.float32).T}, "out: .*contiguous"),
        ({"out_dtype": "float64"}, "out_dtype: expected bfloat16, float16 or float32, got float64"),
        ({"accumulate": True}, "accumulate: needs `out`"),
    ],
)
def test_forward(weights, change, message):
    layer = octomoe.MoeLayer(weights)
    x, ids, topk_weights = random_input(5, 64, 4, 2)
    call = {"x": x, "topk_ids": ids, "topk_weights": topk_weights} | change
    before = None if change.get("out") is None else change["out"].copy()
    with pytest.raises(octomoe.InvalidArgument, match=message):
        layer.forward(**call)
    if before is not None:
        np.testing.assert_array_equal(change["out"], before)


def test_overlapping_out(weights):
    x, ids, topk_weights = random_input(5, 64, 4, 2)
    with pytest.raises(octomoe.InvalidArgument, match="out: .*overlap"):
        octomoe.fused_moe(x, weights, topk_weights, ids, out=x)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"swiglu_limit": -1.0}, "swiglu_limit"),
        ({"swiglu_alpha": float("nan")}, "swiglu_alpha"),
        ({"threads": -3}, "threads: expected"),
        ({"expert_map": np.array([0, 1, 2, 9], np.int32)}, "expert_map: .*got 9"),
        ({"expert_map": np.array([0, 1], np.int64)}, "expert_map: .*int64"),
        ({"shared_gate": np.zeros(64, np.float32)}, "shared_gate: expected none"),
        ({"device": "tpu"}, "tpu"),
        ({"combine_order": "fast"}, 'combine_order: expected slots or any, got "fast"'),
        ({"family": "sm70"}, "family: expected automatic, sm80 or sm90, got"),
    ],
)
def test_layer_options(weights, options, message):
    with pytest.raises(octomoe.InvalidArgument, match=message):
        octomoe.MoeLayer(weights, **options)


def test_layer_of_something_else(weights):
    with pytest.raises(octomoe.InvalidArgument, match="weights: expected MoeWeights, got ndarray"):
        octomoe.MoeLayer(FLOATS["w13"])
    x, ids, topk_weights = random_input(5, 64, 4, 2)
    with pytest.raises(octomoe.InvalidArgument, match="weights: expected MoeWeights, got ndarray"):
        octomoe.fused_moe(x, topk_weights, weights, ids)
    with pytest.raises(octomoe.InvalidArgument, match="one is gated, the other is not"):
        octomoe.fused_moe(x, weights, topk_weights, ids, activation="relu")
    other = random_weights("int8_channel", 1, 32, 96)[0]
    with pytest.raises(octomoe.InvalidArgument, match="shared_expert: expected one expert"):
        octomoe.MoeLayer(weights, shared_expert=other)
    layer = octomoe.MoeLayer(weights)
    with pytest.raises(octomoe.InvalidArgument, match="tokens"):
        layer.workspace_bytes(-1, 2)
    with pytest.raises(octomoe.InvalidArgument, match="top_k"):
        layer.reserve(4, 5)
