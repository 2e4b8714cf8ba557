"""Tensors of every framework in and out, without copies; others are refused by name."""

import ml_dtypes
import numpy as np
import octomoe
import pytest
from octomoe import _tensors
from problems import random_input, random_weights


@pytest.fixture(scope="module")
def problem():
    weights = random_weights("int8_channel", 4, 64, 96)[0]
    return weights, *random_input(5, 64, 4, 2)


def call(weights, x, ids, topk_weights, **options):
    return octomoe.fused_moe(x, weights, topk_weights, ids, **options)


def test_read_only_arrays(problem):
    weights, *arrays = problem
    frozen = [array.copy() for array in arrays]
    for array in frozen:
        array.flags.writeable = False
    np.testing.assert_array_equal(call(weights, *frozen), call(weights, *arrays))
    frozen_half = frozen[0].astype(ml_dtypes.bfloat16)
    frozen_half.flags.writeable = False
    assert call(weights, frozen_half, *frozen[1:]).dtype == ml_dtypes.bfloat16
    with pytest.raises(octomoe.InvalidArgument, match="out: the array is read-only"):
        call(weights, *arrays, out=frozen[0])


def test_memory_map(problem, tmp_path):
    weights, x, ids, topk_weights = problem
    np.save(tmp_path / "x.npy", x)
    mapped = np.load(tmp_path / "x.npy", mmap_mode="r")
    np.testing.assert_array_equal(
        call(weights, mapped, ids, topk_weights), call(weights, x, ids, topk_weights)
    )


def test_ids_of_64_bits(problem):
    weights, x, ids, topk_weights = problem
    np.testing.assert_array_equal(
        call(weights, x, ids.astype(np.int64), topk_weights), call(weights, x, ids, topk_weights)
    )


def test_no_copy():
    array = np.arange(12, dtype=np.float32).reshape(3, 4)
    back = _tensors.from_ffi(_tensors.to_ffi(array, "a"), "numpy")
    assert np.shares_memory(array, back)
    half = array.astype(ml_dtypes.bfloat16)
    back = _tensors.from_ffi(_tensors.to_ffi(half[:, 1:3], "a"), "numpy")
    assert back.dtype == ml_dtypes.bfloat16
    assert np.shares_memory(half, back)
    np.testing.assert_array_equal(back, half[:, 1:3])


def test_any_object_with_dlpack(problem):
    class Wrapped:
        def __init__(self, array):
            self.array, self.shape, self.dtype = array, array.shape, array.dtype

        def __dlpack__(self, **options):
            return self.array.__dlpack__(**options)

        def __dlpack_device__(self):
            return self.array.__dlpack_device__()

    weights, *arrays = problem
    y = call(weights, *map(Wrapped, arrays))
    assert isinstance(y, np.ndarray)
    np.testing.assert_array_equal(y, call(weights, *arrays))


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ([[1.0, 2.0]], "x: expected a tensor .*got list"),
        (None, "x: expected a tensor .*got NoneType"),
        (3, "x: expected a tensor .*got int"),
        (np.zeros((5, 64), ">f4"), "x: .*float32|x: NumPy cannot export"),
        (np.zeros((5, 64), object), "x: .*object"),
        (np.zeros((5, 64), np.float64), "x: .*float64"),
        (np.zeros((5, 64), np.int32), "x: .*int32"),
        (np.zeros((5, 63), np.float32), r"x: expected shape \[\*, 64\], got \[5, 63\]"),
        (np.zeros((5, 8, 8), np.float32), "x: expected shape"),
        (np.zeros((5, 1, 1, 1, 1, 64), np.float32), "x: expected .*dim"),
    ],
)
def test_bad_x(problem, value, message):
    weights, _, ids, topk_weights = problem
    with pytest.raises(octomoe.InvalidArgument, match=message):
        call(weights, value, ids, topk_weights)


def test_torch_in_torch_out(problem):
    torch = pytest.importorskip("torch", reason="PyTorch is missing")
    weights, *arrays = problem
    x, ids, topk_weights = map(torch.from_numpy, arrays)
    y = call(weights, x, ids, topk_weights)
    assert isinstance(y, torch.Tensor)
    np.testing.assert_array_equal(y.numpy(), call(weights, *arrays))
    half = call(weights, x.bfloat16(), ids.long(), topk_weights)
    assert half.dtype == torch.bfloat16
    wide = call(weights, x, ids, topk_weights, out_dtype=torch.float16)
    assert wide.dtype == torch.float16
    out = torch.empty(5, 64)
    assert call(weights, x, ids, topk_weights, out=out) is out
    assert torch.equal(out, y)
    learning = x.clone().requires_grad_()
    assert not call(weights, learning, ids, topk_weights).requires_grad
    mixed = call(weights, x, arrays[1], arrays[2])
    assert torch.equal(mixed, y)
    strided = torch.zeros(5, 128)
    strided[:, :64] = x
    assert torch.equal(call(weights, strided[:, :64], ids, topk_weights), y)
    with pytest.raises(octomoe.InvalidArgument, match=r"x: .*contiguous"):
        call(weights, x.T.contiguous().T, ids, topk_weights)


def test_torch_weights():
    torch = pytest.importorskip("torch", reason="PyTorch is missing")
    w13 = torch.nn.Parameter(torch.randn(4, 192, 64, dtype=torch.bfloat16))
    w2 = torch.nn.Parameter(torch.randn(4, 64, 96, dtype=torch.bfloat16))
    weights = octomoe.quantize(w13, w2, "int8_block")
    d13, d2 = weights.dequantize()
    assert isinstance(d13, torch.Tensor)
    assert (d13 - w13.float()).norm() / w13.float().norm() < 0.02
    assert d2.shape == w2.shape
    stored = weights.tensors()
    assert stored["w13"]["values"].dtype == torch.int8
    assert isinstance(weights.tensors("numpy")["w13"]["values"], np.ndarray)
    floats = octomoe.MoeWeights.from_float(w13, w2)
    assert floats.tensors()["w2"]["values"].dtype == torch.bfloat16
    assert torch.equal(floats.tensors()["w2"]["values"], w2)


def test_cuda_without_a_gpu():
    torch = pytest.importorskip("torch", reason="PyTorch is missing")
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    weights = random_weights("int8_channel", 4, 64, 96)[0]
    with pytest.raises(octomoe.Unsupported, match="cuda") as caught:
        octomoe.MoeLayer(weights, device="cuda:0")
    assert caught.value.code == "unsupported"
    with pytest.raises(octomoe.Unsupported, match="cuda"):
        octomoe.PreparedMatrix(
            octomoe.quantize_matrix(np.ones((2, 16, 32), np.float32)), device="cuda"
        )
    with pytest.raises(octomoe.InvalidArgument, match="gpu"):
        octomoe.MoeLayer(weights, device="gpu")


def test_cuda_tensor_on_a_cpu_layer(problem):
    torch = pytest.importorskip("torch", reason="PyTorch is missing")
    if not torch.cuda.is_available():
        pytest.skip("no GPU")
    weights, *arrays = problem
    x, ids, topk_weights = (torch.from_numpy(a).cuda() for a in arrays)
    with pytest.raises(octomoe.InvalidArgument, match=r"x: expected .*cpu.*cuda:0"):
        call(weights, x, ids, topk_weights, device="cpu")


def test_workspace_is_for_cuda(problem):
    weights, x, ids, topk_weights = problem
    layer = octomoe.MoeLayer(
        weights, fused_gather=False, fused_activation=False, fused_requantize=False
    )
    with pytest.raises(octomoe.InvalidArgument, match="workspace: expected none on cpu"):
        layer(x, ids, topk_weights, workspace=np.empty(64, np.uint8))
    np.testing.assert_array_equal(
        layer(x, ids, topk_weights, check_ids=True, stream=0), call(weights, x, ids, topk_weights)
    )


def test_jax(problem):
    jax = pytest.importorskip("jax", reason="JAX is missing")
    weights, *arrays = problem
    x, ids, topk_weights = map(jax.numpy.asarray, arrays)
    y = call(weights, x, ids, topk_weights)
    assert isinstance(y, jax.Array)
    np.testing.assert_array_equal(np.asarray(y), call(weights, *arrays))
    half = call(weights, x.astype(jax.numpy.bfloat16), ids, topk_weights)
    assert half.dtype == jax.numpy.bfloat16
    route_weights, route_ids = octomoe.route(x[:, :4], 2)
    assert isinstance(route_weights, jax.Array)
    assert isinstance(route_ids, jax.Array)
    with pytest.raises(octomoe.InvalidArgument, match="immutable"):
        call(weights, x, ids, topk_weights, out=x)
