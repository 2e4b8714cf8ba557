"""The installed library: complete, movable, exporting the public API only, usable from outside."""

import os
import re
import shutil
import subprocess
import sys

import pytest
from conftest import BUILD, ROOT, run

HEADERS = [*sorted(path.name for path in (ROOT / "include/octomoe").glob("*.h")), "version.h"]


def test_installed_tree_is_complete(prefix, libdir):
    assert (prefix / "bin/octomoe").is_file()
    assert sorted(path.name for path in (prefix / "include/octomoe").iterdir()) == sorted(HEADERS)
    assert (libdir / "pkgconfig/octomoe.pc").is_file()
    assert (libdir / "cmake/octomoe/octomoeConfig.cmake").is_file()
    soname = run("readelf", "-d", libdir / "liboctomoe.so")
    assert re.search(r"SONAME.*\[liboctomoe\.so\.0\.1\]", soname)
    assert (libdir / "liboctomoe.so.0.1").is_symlink()


def test_installed_text_files_hold_no_absolute_path(prefix, libdir):
    for path in [*(libdir / "cmake").rglob("*.cmake"), *(libdir / "pkgconfig").glob("*.pc")]:
        text = path.read_text()
        assert str(prefix.parent) not in text, path
        assert str(ROOT) not in text, path


def test_destdir_stages_under_the_prefix(tmp_path):
    env = {**os.environ, "DESTDIR": str(tmp_path)}
    run("cmake", "--install", BUILD, "--prefix", "/opt/octomoe", "--component", "runtime", env=env)
    assert (tmp_path / "opt/octomoe/bin/octomoe").is_file()
    assert not (tmp_path / "opt/octomoe/include").exists()


def exported(library) -> list[str]:
    lines = run("nm", "--dynamic", "--defined-only", "--demangle", library).splitlines()
    return [re.sub(r"^[0-9a-f]* +\w ", "", line) for line in lines]


def test_only_the_public_api_is_exported(libdir):
    symbols = exported(libdir / "liboctomoe.so")
    public = re.compile(r"((typeinfo|typeinfo name|vtable|guard variable) for )?octomoe::")
    assert [s for s in symbols if not public.match(s)] == []
    internal = re.compile(r"octomoe::(cpu|num|cli|detail|reference|\(anonymous namespace\))::")
    assert [s for s in symbols if internal.search(s)] == []
    assert "octomoe::ThreadPool::threads() const" not in symbols


@pytest.mark.parametrize(
    "name",
    [
        "octomoe::quantize(",
        "octomoe::quantize_checkpoint(",
        "octomoe::grouped_gemm(",
        "octomoe::route(",
        "octomoe::MoeLayer::forward(",
        "octomoe::Checkpoint::open(",
        "octomoe::Scheme::parse(",
        "octomoe::Tensor::empty(",
        "typeinfo for octomoe::Error",
    ],
)
def test_public_name_is_exported(libdir, name):
    assert any(symbol.startswith(name) for symbol in exported(libdir / "liboctomoe.so"))


@pytest.mark.parametrize("header", HEADERS)
def test_header_compiles_alone(prefix, tmp_path, header):
    source = tmp_path / "alone.cpp"
    source.write_text(f"#include <octomoe/{header}>\n" * 2 + "int main() {}\n")
    options = ["-std=c++20", "-Wall", "-Wextra", "-Wpedantic", "-Werror", "-fsyntax-only"]
    for compiler in filter(shutil.which, ["g++", "clang++"]):
        run(compiler, *options, f"-I{prefix}/include", source)


def test_command_runs_from_the_installed_tree(prefix):
    assert "0.1.0" in run(prefix / "bin/octomoe", "--version")
    command = [prefix / "bin/octomoe", "no-such-command"]
    refused = subprocess.run(command, check=False, capture_output=True)
    assert refused.returncode != 0


def test_installed_bench_finds_its_peer(prefix, tmp_path):
    pytest.importorskip("torch")
    shape = ["--experts", "4", "--hidden", "64", "--intermediate", "32", "--top-k", "2"]
    command = [prefix / "bin/octomoe", "bench", *shape, "--tokens", "2", "--iters", "5"]
    env = {**os.environ, "OCTOMOE_PYTHON": sys.executable}
    out = run(*command, "--schemes", "bf16", "--peer", "torch", cwd=tmp_path, env=env)
    assert "torch loop" in out


def run_examples(programs, env):
    assert programs, "no example was built"
    for program in programs:
        run(program, env=env, cwd=ROOT)


def test_example_builds_with_find_package(prefix, user_env, tmp_path):
    shutil.copytree(ROOT / "examples/cpp", tmp_path / "example")
    build = tmp_path / "build"
    options = ["-G", "Ninja", "-DCMAKE_BUILD_TYPE=Release", f"-DCMAKE_PREFIX_PATH={prefix}"]
    run("cmake", "-S", tmp_path / "example", "-B", build, *options)
    run("cmake", "--build", build)
    files = [path for path in build.iterdir() if path.is_file()]
    programs = [path for path in files if path.read_bytes()[:4] == b"\x7fELF"]
    run_examples(programs, user_env)


def test_example_builds_with_pkg_config(compile_program, user_env, tmp_path):
    sources = sorted((ROOT / "examples/cpp").glob("*.cpp"))
    run_examples([compile_program(source, tmp_path / source.stem) for source in sources], user_env)


def test_error_crosses_the_library_boundary(compile_program, user_env, tmp_path):
    source = tmp_path / "catch.cpp"
    source.write_text(
        """#include <octomoe/octomoe.h>
int main() {
  try {
    octomoe::Scheme::parse("int9");
  } catch (const octomoe::Error& error) {
    return error.code() == octomoe::ErrorCode::invalid_argument ? 0 : 1;
  }
  return 2;
}
"""
    )
    run(compile_program(source, tmp_path / "catch"), env=user_env)


def test_project_can_be_a_subdirectory(tmp_path):
    (tmp_path / "CMakeLists.txt").write_text(
        f"""cmake_minimum_required(VERSION 3.25)
project(user LANGUAGES CXX)
add_subdirectory({ROOT} octomoe)
if(NOT TARGET octomoe::octomoe OR OCTOMOE_BUILD_TESTS OR OCTOMOE_INSTALL)
  message(FATAL_ERROR "target missing, or tests and install rules forced on a user")
endif()
"""
    )
    run("cmake", "-S", tmp_path, "-B", tmp_path / "build", "-G", "Ninja")
