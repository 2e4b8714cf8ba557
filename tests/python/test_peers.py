"""bench/peers without a GPU: problems, references, sorting (in Triton's interpreter), arguments."""

import os
import subprocess
import sys
from pathlib import Path

import octomoe
import pytest

torch = pytest.importorskip("torch")

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "bench"))

from peers.problems import GemmCase, GemmProblem, LayerProblem, Model  # noqa: E402

WEIGHTS = {
    "channel": octomoe.MoeWeights.from_int8_channel,
    "block": octomoe.MoeWeights.from_int8_block,
    "hybrid": octomoe.MoeWeights.from_int8_hybrid,
}


@pytest.fixture(scope="module")
def layer_problem():
    """Ids name 6 experts, of which 4 are here."""
    return LayerProblem(Model("tiny", 4, 6, 2, 256, 128), device="cpu")


@pytest.mark.parametrize("form", list(WEIGHTS))
def test_a_layer_of_each_form_matches_the_reference(layer_problem, form):
    weights = WEIGHTS[form](*layer_problem.form(form))
    layer = octomoe.MoeLayer(weights)
    for tokens in (1, 100):
        inputs = layer_problem.inputs(tokens, 2)[0]
        assert (inputs.local_ids[0] >= 0).any()
        assert tokens == 1 or (inputs.local_ids < 0).any()
        out = layer(inputs.x, inputs.local_ids, inputs.weights).double()
        rows = layer_problem.checked_rows(tokens)
        reference = layer_problem.reference[: len(rows)]
        assert 0.001 < (out[rows] - reference).norm() / reference.norm() < 0.04


@pytest.mark.parametrize("form", list(WEIGHTS))
def test_a_gemm_of_each_form_matches_the_reference(form):
    problem = GemmProblem(GemmCase(4, 12, 256, 384), device="cpu")
    assert sum(problem.counts) == 48
    assert problem.offsets[-1] == 48
    values, scale, *q = problem.weights(form)[-1]
    matrix = octomoe.QuantizedMatrix.from_parts(
        f"int8_{form}", values, scale, **({"q": q[0]} if q else {})
    )
    a, a_scale, *a_q = problem.activations(form)
    out = octomoe.grouped_gemm(
        a, matrix, problem.offsets, a_scale=a_scale, a_q=a_q[0] if a_q else None
    ).double()
    reference = problem.reference
    assert 0.001 < (out[problem.checked] - reference).norm() / reference.norm() < 0.03


def test_uniform_problems_have_equal_rows():
    assert GemmProblem(GemmCase(3, 5, 128, 128), uniform=True, device="cpu").counts == [5, 5, 5]


SORT = """
import torch
from peers import routing

generator = torch.Generator().manual_seed(1)
for tokens, top_k, tile, small in [(5, 4, 1, 9), (5, 4, 16, 9), (40, 8, 1, 0), (40, 8, 16, 0),
                                   (40, 8, 16, 999)]:
    routing.SMALL_SORT = small
    scores = torch.rand(tokens, 48, generator=generator)
    ids = scores.topk(top_k, -1).indices.int()
    ids[ids >= 32] = -1
    sort = routing.Sort(ids, 32, tile)
    sort.run()
    counts = torch.bincount(ids[ids >= 0], minlength=32)
    padded = (counts + tile - 1) // tile * tile
    assert sort.offsets.tolist() == [0, *padded.cumsum(0).tolist()]
    assert int(sort.num_tokens_padded) == int(padded.sum())
    if tile == 1:
        here = ids >= 0
        assert (sort.rows[~here] == -1).all()
        assert sorted(sort.rows[here].tolist()) == list(range(int(counts.sum())))
        owner = torch.repeat_interleave(torch.arange(32), counts)
        assert (owner[sort.rows[here].long()] == ids[here]).all()
    else:
        lists = sort.sorted_ids[: int(padded.sum())].view(-1, tile)
        seen = []
        for block, expert in zip(lists, sort.expert_ids):
            routes = block[block < ids.numel()].long()
            assert (ids.view(-1)[routes] == expert).all() and len(routes)
            seen += routes.tolist()
        assert sorted(seen) == (ids.view(-1) >= 0).nonzero().view(-1).tolist()
"""


def run(*command: str, stdin: str = "", **environment: str) -> subprocess.CompletedProcess:
    path = os.pathsep.join([str(ROOT / "bench"), *sys.path])
    environment = {**os.environ, "PYTHONPATH": path, **environment}
    return subprocess.run(
        [sys.executable, *command],
        input=stdin,
        capture_output=True,
        text=True,
        env=environment,
    )


def test_routes_are_sorted():
    pytest.importorskip("triton")
    result = run("-c", SORT, TRITON_INTERPRET="1")
    assert result.returncode == 0, result.stderr


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--layers", "--models", "gpt"], "qwen3-30b"),
        (["--gemms", "--cases", "8x8"], "8x4096:4096:7168"),
        ([], "--layers"),
    ],
)
def test_wrong_arguments_name_what_was_expected(arguments, expected):
    pytest.importorskip("triton")
    result = run(str(ROOT / "bench" / "gpu_peers.py"), *arguments)
    assert result.returncode == 2
    assert expected in result.stderr.splitlines()[-1]


REPORT = """
import json, sys, types
from pathlib import Path
import torch
sys.argv = ["gpu_peers", "--layers"]
import gpu_peers

device = types.SimpleNamespace(
    name="GPU", multi_processor_count=1, total_memory=1, L2_cache_size=1
)
torch.cuda.is_available = lambda: True
torch.cuda.get_device_properties = lambda index: device
gpu_peers.Harness = lambda **_: types.SimpleNamespace(ceilings=lambda: {"ops_per_s": 1.0})
gpu_peers.Peers = lambda *_: None
row = {"model": "m", "tokens": 1, "median_us": 1.0, "error": 0.0, "floor_us": 1.0, "clock_mhz": 1.0}


def layers(arguments, harness, peers, report):
    name = "second" if len(report.data["runs"]) == 2 else "first"
    report.add("results", {**row, "name": name}, ("model", "tokens"))
    if name == "first":
        report.add("results", {**row, "name": name, "tokens": 4}, ("model", "tokens"))


gpu_peers.time_layers = layers
file = Path(sys.stdin.read())
for _ in range(2):
    sys.argv = ["gpu_peers", "--layers", "--json", str(file), "--append"]
    assert gpu_peers.main() == 0
data = json.loads(file.read_text())
assert [run["ceilings"] for run in data["runs"]] == [{"ops_per_s": 1.0}] * 2
assert {(r["tokens"], r["name"], r["run"]) for r in data["results"]} == {
    (4, "first", 0), (1, "second", 1)
}
"""


def test_append_keeps_what_was_not_measured_again(tmp_path):
    pytest.importorskip("triton")
    result = run("-c", REPORT, stdin=str(tmp_path / "results.json"))
    assert result.returncode == 0, result.stderr
    assert "second" in result.stdout
    tables = run(str(ROOT / "scripts" / "peer_tables.py"), str(tmp_path / "results.json"))
    assert tables.returncode == 0, tables.stderr
    assert "| `second` |" in tables.stdout
