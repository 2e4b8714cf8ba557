"""What a user of the library gets: an installed tree, moved away from where it was installed."""

import os
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
BUILD = Path(os.environ.get("OCTOMOE_BUILD_DIR", ROOT / "build"))


def run(*command, **options) -> str:
    """Standard output of a command that has to succeed; a failure shows all of its output."""
    words = [str(word) for word in command]
    done = subprocess.run(words, check=False, text=True, capture_output=True, **options)
    assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
    return done.stdout


@pytest.fixture(scope="session")
def prefix(tmp_path_factory) -> Path:
    """Installed in one place, then moved: nothing in the tree may remember the first."""
    if not (BUILD / "CMakeCache.txt").exists():
        pytest.fail(f"no build in {BUILD}: run make build, or set OCTOMOE_BUILD_DIR")
    home = tmp_path_factory.mktemp("install")
    run("cmake", "--install", BUILD, "--prefix", home / "first")
    return (home / "first").rename(home / "moved")


@pytest.fixture(scope="session")
def libdir(prefix) -> Path:
    (library,) = prefix.glob("lib*/**/liboctomoe.so")
    return library.parent


@pytest.fixture(scope="session")
def user_env(libdir) -> dict:
    return {
        **os.environ,
        "LD_LIBRARY_PATH": str(libdir),
        "PKG_CONFIG_PATH": str(libdir / "pkgconfig"),
    }


@pytest.fixture(scope="session")
def compile_program(user_env):
    """Compiles one C++ file against the installed library, by pkg-config; returns the program."""

    def compile_one(source: Path, program: Path) -> Path:
        flags = run("pkg-config", "--cflags", "--libs", "octomoe", env=user_env).split()
        run("g++", "-O1", "-Wall", "-Wextra", "-Werror", source, "-o", program, *flags)
        return program

    return compile_one
