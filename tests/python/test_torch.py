"""The custom operators: eager, torch.compile, fake tensors, lifetime of handles."""

import gc
import weakref

import pytest

torch = pytest.importorskip("torch", reason="PyTorch is missing")

import octomoe  # noqa: E402
import octomoe.torch as octomoe_torch  # noqa: E402
from problems import random_input, random_weights  # noqa: E402


def problem(tokens=6, scheme="int8_channel"):
    weights = random_weights(scheme, 4, 64, 96)[0]
    x, ids, topk_weights = map(torch.from_numpy, random_input(tokens, 64, 4, 2))
    return weights, x, topk_weights, ids


def test_operators_equal_the_functions():
    weights, x, topk_weights, ids = problem()
    expected = octomoe.fused_moe(x, weights, topk_weights, ids)
    assert torch.equal(octomoe_torch.fused_moe(x, weights, topk_weights, ids), expected)
    assert torch.equal(octomoe_torch.FusedMoe(weights)(x, topk_weights, ids), expected)
    handle = octomoe_torch.handle(weights)
    assert handle is octomoe_torch.handle(weights)
    half = torch.ops.octomoe.fused_moe(x, handle, topk_weights, ids, out_dtype=torch.bfloat16)
    assert half.dtype == torch.bfloat16
    logits = torch.randn(9, 16, generator=torch.Generator().manual_seed(0))
    for one, two in zip(octomoe_torch.route(logits, 3), octomoe.route(logits, 3), strict=True):
        assert torch.equal(one, two)
    matrix = octomoe.PreparedMatrix(octomoe.quantize_matrix(torch.randn(3, 32, 64)))
    a, offsets = torch.randn(10, 64), torch.tensor([0, 4, 4, 10])
    assert torch.equal(
        octomoe_torch.grouped_gemm(a, matrix, offsets), octomoe.grouped_gemm(a, matrix, offsets)
    )
    counts = torch.tensor([2, 0, 4], dtype=torch.int32)
    stacked = torch.randn(3, 4, 64)
    assert torch.equal(
        octomoe_torch.grouped_gemm(
            stacked, matrix, rows_per_expert=counts, out_dtype=torch.float32
        ),
        octomoe.grouped_gemm(stacked, matrix, rows_per_expert=counts, out_dtype="float32"),
    )


def test_opcheck():
    weights, x, topk_weights, ids = problem()
    handle = octomoe_torch.handle(weights)
    check = torch.library.opcheck
    check(torch.ops.octomoe.fused_moe, (x, handle, topk_weights, ids))
    check(torch.ops.octomoe.fused_moe, (x[::2], handle, topk_weights[::2], ids[::2].long()))
    check(
        torch.ops.octomoe.fused_moe,
        (x.bfloat16(), handle, topk_weights, ids),
        {"out_dtype": torch.float32},
    )
    logits = torch.randn(9, 16)
    check(torch.ops.octomoe.route, (logits, 3))
    check(torch.ops.octomoe.route, (logits, 3, torch.zeros(16)), {"scoring": "sigmoid"})
    matrix = octomoe.PreparedMatrix(octomoe.quantize_matrix(torch.randn(3, 32, 64)))
    offsets = torch.tensor([0, 4, 4, 10])
    number = octomoe_torch.handle(matrix)
    check(torch.ops.octomoe.grouped_gemm, (torch.randn(10, 64), number, 32, offsets))
    counts = torch.tensor([1, 0, 4], dtype=torch.int32)
    check(
        torch.ops.octomoe.grouped_gemm,
        (torch.randn(3, 4, 64), number, 32, counts),
        {"masked": True},
    )


class Block(torch.nn.Module):
    def __init__(self, weights):
        super().__init__()
        self.router = torch.nn.Linear(64, 4, bias=False)
        self.experts = octomoe_torch.FusedMoe(weights)

    def forward(self, x):
        topk_weights, ids = octomoe_torch.route(self.router(x), 2)
        return x + self.experts(x, topk_weights, ids)


@pytest.mark.parametrize("backend", ["eager", "aot_eager", "inductor"])
def test_compile(backend):
    if backend == "inductor":
        import shutil

        if not any(map(shutil.which, ("g++", "clang++", "c++"))):
            pytest.skip("inductor needs a C++ compiler")
    torch._dynamo.reset()
    block = Block(problem()[0]).eval()
    compiled = torch.compile(block, backend=backend, fullgraph=True, dynamic=True)
    with torch.inference_mode():
        for tokens in (6, 9, 33):
            x = torch.randn(tokens, 64)
            torch.testing.assert_close(compiled(x), block(x))


def test_layers_share_one_compiled_graph():
    """A handle is an input of the graph: thirteen layers do not make thirteen graphs."""
    import torch._dynamo.testing

    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    modules = [
        octomoe_torch.FusedMoe(random_weights("int8_channel", 4, 64, 64, seed=s)[0])
        for s in range(13)
    ]
    _, x, topk_weights, ids = problem()
    for module in modules:
        compiled = torch.compile(module, backend=counter, fullgraph=True)
        with torch.no_grad():
            assert torch.equal(compiled(x, topk_weights, ids), module(x, topk_weights, ids))
    assert counter.frame_count == 1


def test_handles_do_not_keep_weights_alive():
    weights, x, topk_weights, ids = problem()
    handle = octomoe_torch.handle(weights)
    octomoe_torch.fused_moe(x, weights, topk_weights, ids)
    gone = weakref.ref(weights)
    del weights
    gc.collect()
    assert gone() is None
    with pytest.raises(octomoe.InvalidArgument, match="its weights have been freed"):
        torch.ops.octomoe.fused_moe(x, handle, topk_weights, ids)


def test_a_module_keeps_its_layer():
    weights, x, topk_weights, ids = problem()
    module = octomoe_torch.FusedMoe(weights)
    expected = octomoe.fused_moe(x, weights, topk_weights, ids)
    del weights
    gc.collect()
    module = module.half().float()
    assert torch.equal(module(x, topk_weights, ids), expected)
    assert list(module.state_dict()) == []
    assert "int8_channel" in repr(module)


def test_no_gradients():
    weights, x, topk_weights, ids = problem()
    y = octomoe_torch.fused_moe(x.requires_grad_(), weights, topk_weights, ids)
    with pytest.raises(NotImplementedError, match="no gradients"):
        y.sum().backward()


def test_gradients_that_nobody_wants():
    weights, x, topk_weights, ids = problem()
    expected = octomoe_torch.fused_moe(x, weights, topk_weights, ids)
    with torch.no_grad():
        y = octomoe_torch.fused_moe(x.requires_grad_(), weights, topk_weights, ids)
    assert not y.requires_grad
    assert torch.equal(y, expected)
    with torch.inference_mode():
        y = octomoe_torch.fused_moe(x.detach().clone(), weights, topk_weights, ids)
    assert torch.equal(y, expected)


def test_modes_see_the_operator():
    """The short way through autograd is for calls that nothing else watches."""
    from torch.fx.experimental.proxy_tensor import make_fx
    from torch.utils._python_dispatch import TorchDispatchMode

    seen = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            seen.append(func)
            return func(*args, **(kwargs or {}))

    weights, x, topk_weights, ids = problem()
    number = octomoe_torch.handle(weights)
    op = torch.ops.octomoe.fused_moe
    expected = op(x, number, topk_weights, ids)
    for grad in (False, True):
        seen.clear()
        with Watch(), torch.set_grad_enabled(grad):
            assert torch.equal(op(x, number, topk_weights, ids), expected)
        assert op.default in seen
    graph = make_fx(lambda x: op(x, number, topk_weights, ids) + 1)(x)
    assert op.default in [node.target for node in graph.graph.nodes]
    assert torch.equal(graph(x), expected + 1)


def test_rows_of_any_stride():
    weights, x, topk_weights, ids = problem()
    wide = torch.zeros(6, 100)
    wide[:, :64] = x
    expected = octomoe_torch.fused_moe(x, weights, topk_weights, ids)
    y = octomoe_torch.fused_moe(wide[:, :64], weights, topk_weights, ids)
    assert y.is_contiguous()
    assert torch.equal(y, expected)
    y = octomoe_torch.fused_moe(x[:1].expand(6, 64), weights, topk_weights[:1].expand(6, 2), ids)
    assert y.is_contiguous()
    assert y.stride() == (64, 1)
    with pytest.raises(octomoe.InvalidArgument, match="x: expected rows that are contiguous"):
        octomoe_torch.fused_moe(x.t().contiguous().t(), weights, topk_weights, ids)


def test_fake_tensors_and_errors():
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode():
        y = torch.ops.octomoe.fused_moe(
            torch.empty(7, 64, dtype=torch.bfloat16),
            torch.tensor(1),
            torch.empty(7, 2),
            torch.empty(7, 2, dtype=torch.int32),
        )
        assert y.shape == (7, 64)
        assert y.dtype == torch.bfloat16
    weights, x, topk_weights, ids = problem()
    with pytest.raises(octomoe.InvalidArgument, match="x: expected shape"):
        octomoe_torch.fused_moe(x[:, :32], weights, topk_weights, ids)
    matrix = octomoe.PreparedMatrix(octomoe.quantize_matrix(torch.randn(3, 32, 64)))
    with pytest.raises(
        octomoe.InvalidArgument, match="expected one of a MoeLayer, got one of a Pre"
    ):
        torch.ops.octomoe.fused_moe(x, octomoe_torch.handle(matrix), topk_weights, ids)
    with pytest.raises(octomoe.InvalidArgument, match="owner: expected MoeWeights"):
        octomoe_torch.handle(x)
