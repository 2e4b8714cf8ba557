"""CUDA tensors: equal to the CPU, streams, graphs, errors."""

import pytest

torch = pytest.importorskip("torch", reason="PyTorch is missing")
if not torch.cuda.is_available():
    pytest.skip("no GPU", allow_module_level=True)

import octomoe  # noqa: E402
import octomoe.torch as octomoe_torch  # noqa: E402
from problems import INTEGER_SCHEMES, adopt, random_input, random_weights  # noqa: E402


def problem(scheme="int8_channel", tokens=33):
    weights = random_weights(scheme, 8, 256, 128)[0]
    x, ids, topk_weights = map(torch.from_numpy, random_input(tokens, 256, 8, 2))
    return weights, x.cuda(), topk_weights.cuda(), ids.cuda()


def same(one, two):
    """Integer schemes: every bit, whatever the device."""
    return torch.equal(one.cpu(), two.cpu())


@pytest.mark.parametrize("scheme", INTEGER_SCHEMES)
def test_layer(scheme):
    weights, x, topk_weights, ids = problem(scheme)
    try:
        layer = octomoe.MoeLayer(weights, device="cuda")
    except octomoe.Unsupported as error:
        pytest.skip(str(error))
    y = layer(x, ids, topk_weights)
    assert y.device == x.device
    assert same(y, octomoe.fused_moe(x.cpu(), weights, topk_weights.cpu(), ids.cpu()))
    workspace = torch.empty(layer.workspace_bytes(33, 2), dtype=torch.uint8, device="cuda")
    assert torch.equal(layer(x, ids, topk_weights, workspace=workspace), y)
    assert torch.equal(octomoe_torch.FusedMoe(layer)(x, topk_weights, ids), y)
    with pytest.raises(octomoe.InvalidArgument, match=r"x: expected .*cuda:0"):
        layer(x.cpu(), ids, topk_weights)
    with pytest.raises(octomoe.InvalidArgument, match="topk_ids: expected expert ids"):
        layer(x, ids + 8, topk_weights, check_ids=True)


@pytest.mark.parametrize("scheme", INTEGER_SCHEMES)
def test_panels_and_prepack(scheme):
    weights, x, topk_weights, ids = problem(scheme)
    try:
        expected = octomoe.MoeLayer(weights, device="cuda")(x, ids, topk_weights)
    except octomoe.Unsupported as error:
        pytest.skip(str(error))
    layer = octomoe.MoeLayer(weights, device="cuda", prepack=True)  # uploaded
    assert torch.equal(layer(x, ids, topk_weights), expected)
    stored = weights.tensors("torch")
    natural = [stored[name]["values"].cuda() for name in ("w13", "w2")]
    panels = [w.view(*w.shape[:2], -1, 128).transpose(1, 2).contiguous() for w in natural]
    for w13, w2 in (natural, panels, (panels[0], natural[1]), (natural[0], panels[1])):
        there = adopt(scheme, w13, w2, stored)
        assert there.tensors()["w13"]["values"].data_ptr() == w13.data_ptr()
        for prepack in (False, True):
            layer = octomoe.MoeLayer(there, device="cuda", prepack=prepack)
            assert torch.equal(layer(x, ids, topk_weights), expected)
    with pytest.raises(octomoe.InvalidArgument, match="w13: expected a contiguous tensor"):
        adopt(scheme, panels[0][:, :, ::2], natural[1], stored)


@pytest.mark.parametrize("scheme", INTEGER_SCHEMES)
def test_combine_order(scheme):
    weights, x, topk_weights, ids = problem(scheme)
    try:
        in_order = octomoe.MoeLayer(weights, device="cuda")
    except octomoe.Unsupported as error:
        pytest.skip(str(error))
    layer = octomoe.MoeLayer(weights, device="cuda", combine_order="any")
    tokens = 40 * x.shape[0]
    x, ids, topk_weights = (t.repeat(40, 1) for t in (x, ids, topk_weights))
    expected = in_order(x, ids, topk_weights).float()
    for _ in range(5):  # the last ones from a graph
        out = torch.full((tokens, x.shape[1]), torch.nan, dtype=torch.bfloat16, device="cuda")
        assert layer(x, ids, topk_weights, out=out) is out
        assert (out.float() - expected).norm() < 0.01 * expected.norm()
    exact = in_order(x, ids, topk_weights, out_dtype=torch.float32)
    assert torch.equal(layer(x, ids, topk_weights, out_dtype=torch.float32), exact)


def test_prepack_needs_whole_panels():
    weights = random_weights("int8_channel", 8, 256, 192)[0]
    with pytest.raises(octomoe.InvalidArgument, match="multiple of 128"):
        octomoe.MoeLayer(weights, device="cuda", prepack=True)


def test_two_streams_and_a_graph():
    weights, x, topk_weights, ids = problem()
    module = octomoe_torch.FusedMoe(weights, "cuda")
    expected = module(x, topk_weights, ids)
    torch.cuda.synchronize()
    streams, results = [torch.cuda.Stream(), torch.cuda.Stream()], []
    for stream in streams * 8:
        with torch.cuda.stream(stream):
            results.append(module(x, topk_weights, ids))
    torch.cuda.synchronize()
    assert all(torch.equal(y, expected) for y in results)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = module(x, topk_weights, ids)
    y.zero_()
    graph.replay()
    assert torch.equal(y, expected)
    x.mul_(2)
    graph.replay()
    assert torch.equal(y, module(x, topk_weights, ids))


@pytest.mark.parametrize("lends", [True, False])
def test_repeated_calls(lends, monkeypatch):
    """Graphs of the layer's own: other contents, other memory, a capture in between."""
    if not lends:  # as PyTorch before 2.10
        monkeypatch.setattr(octomoe_torch, "_lends_allocator", False)
    weights, x, topk_weights, ids = problem()
    layers = [octomoe.MoeLayer(weights, device="cuda", replays=n) for n in (16, 0)]
    replayed, plain = map(octomoe_torch.FusedMoe, layers)
    kept = []
    for i in range(40):
        x.mul_(0.9)
        ids.copy_((ids + 1) % 8)
        y = replayed(x, topk_weights, ids)
        assert torch.equal(y, plain(x, topk_weights, ids))
        if i % 3 == 0:
            kept.append(y)  # the next call writes elsewhere
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = replayed(x, topk_weights, ids)
    for _ in range(3):
        x.mul_(-0.5)
        graph.replay()
        expected = plain(x, topk_weights, ids)
        assert torch.equal(captured, expected)
        assert torch.equal(replayed(x, topk_weights, ids), expected)
    with pytest.raises(octomoe.InvalidArgument, match=r"topk_ids: expected shape"):
        replayed(x, topk_weights, ids[0])
    with pytest.raises(octomoe.InvalidArgument, match=r"replays: expected 0..64, got 99"):
        octomoe.MoeLayer(weights, device="cuda", replays=99)


@pytest.mark.parametrize("scheme", ["int8_channel", "int8_block"])
def test_offsets_written_just_before(scheme):
    """Kernels begin with what the offsets were before: that must not show."""
    experts, rows, n, k = 8, 96, 768, 1024
    matrix = octomoe.PreparedMatrix(
        octomoe.quantize_matrix(torch.randn(experts, n, k), scheme), device="cuda"
    )
    a = torch.randint(-127, 128, (rows, k), dtype=torch.int8, device="cuda")
    a_scale = torch.rand(rows, *([k // 128] if scheme == "int8_block" else []), device="cuda")
    bounds = torch.randint(0, rows + 1, (6, experts - 1)).sort().values
    edges = [torch.zeros(6, 1), bounds, torch.full((6, 1), rows)]
    groups = torch.cat(edges, 1).to(torch.int32).cuda()
    groups[0] = 0  # no rows at all

    size = matrix.workspace_bytes(rows)
    memory = {"workspace": torch.empty(size, dtype=torch.uint8, device="cuda")}

    def gemm(offsets):
        out = torch.zeros(rows, n, device="cuda")
        return octomoe.grouped_gemm(a, matrix, offsets, a_scale=a_scale, out=out, **memory)

    expected = [gemm(offsets).clone() for offsets in groups]
    offsets = groups[0].clone()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = []
        for other in groups:
            offsets.copy_(other)
            captured.append(gemm(offsets))
    for _ in range(50):
        graph.replay()
        assert all(torch.equal(d, want) for d, want in zip(captured, expected, strict=True))
    for i in range(100):
        offsets.copy_(groups[i % 6])
        assert torch.equal(gemm(offsets), expected[i % 6])


def test_route_and_gemm():
    logits = torch.randn(9, 16, device="cuda")
    for one, two in zip(
        octomoe_torch.route(logits, 3), octomoe.route(logits.cpu(), 3), strict=True
    ):
        assert same(one, two)
    stack = octomoe.quantize_matrix(torch.randn(3, 64, 128))
    a, offsets = torch.randn(10, 128, device="cuda"), torch.tensor([0, 4, 4, 10], device="cuda")
    d = octomoe_torch.grouped_gemm(a, octomoe.PreparedMatrix(stack, device="cuda"), offsets)
    expected = octomoe.grouped_gemm(a.cpu(), octomoe.PreparedMatrix(stack), offsets.cpu())
    assert same(d, expected)
