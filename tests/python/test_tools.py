"""Plots, the demo, the PyTorch peer, doctor, call overhead, and the examples of docs/python.md."""

import importlib.util
import json
import os
import re
import subprocess
import sys

import octomoe
import pytest
from conftest import ROOT

SCHEMES = octomoe.schemes()


def environment():
    python = f"{ROOT / 'python'}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"
    library = octomoe.doctor()["library"]
    return {**os.environ, "PYTHONPATH": python, "OCTOMOE_PYTHON_LIBRARY": library}


def need(*modules):
    for name in modules:
        if importlib.util.find_spec(name) is None:
            pytest.skip(f"{name} is missing")


def is_png(path):
    return path.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n" and path.stat().st_size > 10_000


def bench_report(**fields):
    results = [
        {
            "tokens": tokens,
            "name": name,
            "kind": "peer" if name.startswith("torch") else "scheme",
            "median_us": 50.0 * (i + 1) * tokens,
            "p10_us": 48.0 * (i + 1) * tokens,
            "p90_us": 55.0 * (i + 1) * tokens,
            "floor_us": 10.0 * tokens,
        }
        for tokens in (1, 16, 128)
        for i, name in enumerate([*SCHEMES, "torch loop", "torch grouped"])
    ]
    return {"problem": {"model": "qwen3-30b", "experts": 128}, "results": results} | fields


@pytest.mark.parametrize(
    "report",
    [
        bench_report(),
        {"results": [{"tokens": 4, "median_us": 3.0}]},
        {
            "results": [
                {"tokens": 4, "name": "x", "median_us": 3.0, "floor_us": None, "p90_us": "?"},
                7,
            ]
        },
        bench_report(problem=None, machine={"cpu": "some CPU", "threads": 2}),
    ],
)
def test_plot(report, tmp_path):
    need("matplotlib")
    from octomoe import plot

    source, target = tmp_path / "bench.json", tmp_path / "bench.png"
    source.write_text(json.dumps(report))
    plot.main([str(source), str(target)])
    assert is_png(target)


def grouping_report(**fields):
    names = ["grouped", "per expert", "per expert, 8 streams", "cuBLAS"]
    cases = [
        {
            "experts": experts,
            "rows_per_expert": tokens * 8 / experts,
            "skew": skew,
            "ways": [
                {"name": name, "graph": {"median_us": 9.0 * (i + 1)}, "eager": {"median_us": 50.0}}
                for i, name in enumerate(names)
            ],
        }
        for experts in (8, 64)
        for tokens in (1, 128)
        for skew in ("uniform", "zipf:1.2")
    ]
    return {"study": "grouping", "scheme": "int8_channel", "cases": cases} | fields


@pytest.mark.parametrize(
    "report",
    [
        grouping_report(gpu={"name": "some GPU"}, n=1024, k=2048),
        grouping_report(
            cases=[{"experts": 8, "rows_per_expert": 1.0}, grouping_report()["cases"][1]]
        ),
        grouping_report(gpu=None),
    ],
)
def test_plot_of_the_grouping_study(report, tmp_path):
    need("matplotlib")
    from octomoe import plot

    source, target = tmp_path / "grouping.json", tmp_path / "grouping.png"
    source.write_text(json.dumps(report))
    plot.main([str(source), str(target)])
    assert is_png(target)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[]",
        "{}",
        '{"results": [{"tokens": 1}]}',
        '{"study": "grouping", "cases": []}',
        '{"study": "grouping", "cases": [{"experts": 8, "rows_per_expert": 1.0}]}',
    ],
)
def test_plot_refuses(text, tmp_path):
    need("matplotlib")
    from octomoe import plot

    (tmp_path / "bench.json").write_text(text)
    with pytest.raises(SystemExit, match="bench.json"):
        plot.main([str(tmp_path / "bench.json"), str(tmp_path / "out.png")])
    with pytest.raises(SystemExit, match="usage"):
        plot.main([])


def run_report():
    results = [
        {
            "scheme": scheme,
            "error_vs_float32_worst": 0.01,
            "error_vs_float32_mean": 0.009,
            "weight_bytes": 1_000_000,
            "us_per_token": 2.0 + i,
            "speedup_over_bf16": 1.5,
        }
        for i, scheme in enumerate(SCHEMES[:-1])
    ]
    return {"version": "0", "model_type": "qwen3_moe", "layers": [0, 1], "results": results}


def test_demo(checkpoint_path, tmp_path, capsys):
    need("torch", "transformers", "matplotlib")
    from octomoe import demo

    (tmp_path / "run.json").write_text(json.dumps(run_report()))
    demo.main(["--out", str(tmp_path), "--windows", "2", "--window", "128"])
    printed = capsys.readouterr().out
    for scheme in SCHEMES:
        assert re.search(rf"^{scheme} .*\d\.\d{{4}}", printed, re.MULTILINE)
    assert "demo.json" in printed
    assert "demo.png" in printed
    assert is_png(tmp_path / "demo.png")
    report = json.loads((tmp_path / "demo.json").read_text())
    rows = {row["scheme"]: row for row in report["results"]}
    assert set(rows) == {"float32", "bfloat16", *SCHEMES}
    assert abs(rows["int8_channel"]["bits_over_float32"]) < 0.02
    assert rows["int8_channel"]["weight_bytes"] < 0.3 * rows["float32"]["weight_bytes"]
    assert rows["fp16"]["us_per_token"] is None


def ask(process, message):
    process.stdin.write(json.dumps(message) + "\n")
    process.stdin.flush()
    return json.loads(process.stdout.readline())


def test_peer():
    need("torch")
    command = [sys.executable, str(ROOT / "bench" / "peer_torch.py"), "--serve"]
    with subprocess.Popen(
        command, text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment()
    ) as process:
        assert "prepare" in ask(process, {"time": 4})["error"]
        shape = {
            "experts": 8,
            "hidden": 64,
            "intermediate": 32,
            "top_k": 2,
            "threads": 1,
            "seed": 3,
        }
        ready = ask(process, {"prepare": shape | {"topk_ids": {"2": [0, 1, 7, 0]}}})
        assert ready["peers"][0] == "loop"
        assert ready["threads"] == 1
        for peer in ready["peers"]:
            for tokens in (1, 2, 9):
                assert ask(process, {"time": tokens, "peer": peer})["us"] > 0
        if "grouped" in ready["peers"]:
            assert ask(process, {"compare": 9})["difference"] < 0.02
        assert "no such peer" in ask(process, {"time": 2, "peer": "x"})["error"]
        assert "error" in ask(process, {"something": 1})
        assert 0 < ask(process, {"overhead": True})["call_us"] < 1e4
        process.stdin.close()
        assert process.wait(10) == 0


def test_doctor_and_overhead():
    report = octomoe.doctor()
    assert report["version"] == octomoe.__version__
    assert report["packages"]["numpy"]
    overhead = octomoe.bench_overhead(rounds=2, calls=5)
    assert 0 < overhead["call_us"] <= overhead["numpy_us"] + overhead.get("torch_us", 0) + 1e3
    assert all(us > 0 for us in overhead.values())


def test_package_imports_without_torch():
    """The package itself needs NumPy and tvm-ffi only."""
    code = (
        "import sys; sys.modules['torch'] = None\n"
        "import numpy as np, octomoe\n"
        "w = octomoe.quantize(np.ones((2, 64, 32), np.float32), np.ones((2, 32, 32), np.float32))\n"
        "x = np.ones((1, 32), np.float32)\n"
        "print(octomoe.fused_moe(x, w, *octomoe.route(x[:, :2], 1)).shape)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment(), capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "(1, 32)"


def python_blocks():
    text = (ROOT / "docs" / "python.md").read_text(encoding="utf-8")
    return re.findall(r"^```python\n(.*?)^```", text, re.MULTILINE | re.DOTALL)


def test_the_documents_examples(checkpoint_path, monkeypatch, tmp_path):
    need("torch", "transformers")
    blocks = python_blocks()
    assert len(blocks) >= 4
    monkeypatch.chdir(ROOT)
    names = {"OUT": str(tmp_path)}
    for block in blocks:  # in order: each goes on where the last one ended
        exec(compile(block, "docs/python.md", "exec"), names)


@pytest.mark.parametrize(
    "example",
    [p for p in sorted((ROOT / "examples").glob("*.py")) if p.name != "train_tiny_moe.py"],
    ids=lambda path: path.name,
)
def test_examples(example, checkpoint_path):
    need("torch", "transformers")
    done = subprocess.run(
        [sys.executable, str(example)],
        env=environment(),
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip()
