"""README.md's examples, extracted and run: what a reader copies works."""

import os
import re
import sys

import pytest
from conftest import BUILD, ROOT, run


def examples(language: str) -> list[str]:
    text = (ROOT / "README.md").read_text()
    return re.findall(rf"^```{language}\n(.*?)^```$", text, re.DOTALL | re.MULTILINE)


CPP, PYTHON = examples("cpp"), examples("python")


def test_readme_has_both_examples():
    assert CPP
    assert PYTHON


@pytest.mark.parametrize("number", range(len(CPP)))
def test_cpp_example(compile_program, user_env, tmp_path, number):
    source = tmp_path / "example.cpp"
    source.write_text(CPP[number])
    run(compile_program(source, tmp_path / "example"), env=user_env, cwd=ROOT)


@pytest.mark.parametrize("number", range(len(PYTHON)))
def test_python_example(number, tmp_path):
    source = tmp_path / "example.py"
    source.write_text(PYTHON[number])
    env = {
        **os.environ,
        "PYTHONPATH": str(ROOT / "python"),
        "OCTOMOE_PYTHON_LIBRARY": str(BUILD / "python/_octomoe.so"),
    }
    run(sys.executable, source, env=env, cwd=ROOT)


def test_links_point_at_files():
    text = (ROOT / "README.md").read_text()
    links = re.findall(r"\]\((?!https?://|#)([^)#]+)", text)
    assert links
    assert [link for link in links if not (ROOT / link).exists()] == []


def test_results_come_from_committed_files():
    run(sys.executable, ROOT / "scripts/readme_results.py", "--check")
