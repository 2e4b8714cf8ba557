"""Peers in a shared library with the C interface of peer_abi.h: CUTLASS, or any other."""

from __future__ import annotations

import ctypes
import functools
from pathlib import Path

import torch

from . import PeerMissing
from .problems import GemmProblem


class _Problem(ctypes.Structure):
    _fields_ = (
        ("groups", ctypes.c_int32),
        ("n", ctypes.c_int32),
        ("k", ctypes.c_int32),
        ("rows", ctypes.POINTER(ctypes.c_int32)),
        ("a", ctypes.c_void_p),
        ("b", ctypes.c_void_p),
        ("a_scale", ctypes.c_void_p),
        ("b_scale", ctypes.c_void_p),
        ("d", ctypes.c_void_p),
    )


@functools.cache
def load(path: str) -> ctypes.CDLL:
    if not Path(path).is_file():
        raise PeerMissing(f"library: no such file: {path}")
    try:
        library = ctypes.CDLL(str(Path(path).resolve()))
        library.peer_name.restype = ctypes.c_char_p
        library.peer_error.restype = ctypes.c_char_p
        library.peer_version.restype = ctypes.c_char_p
        library.peer_prepare.restype = ctypes.c_void_p
        library.peer_prepare.argtypes = (ctypes.c_int, ctypes.POINTER(_Problem))
        library.peer_run.argtypes = (ctypes.c_void_p, ctypes.c_void_p)
        library.peer_release.argtypes = (ctypes.c_void_p,)
    except (OSError, AttributeError) as error:
        raise PeerMissing(f"library: {path}: {error}") from error
    return library


def version(path: str) -> str:
    return load(path).peer_version().decode()


def variants(path: str) -> dict[str, int]:
    library = load(path)
    return {library.peer_name(index).decode(): index for index in range(library.peer_count())}


class GroupedGemm:
    """One variant on one problem; its handles live as long as this object."""

    def __init__(self, problem: GemmProblem, path: str, variant: int) -> None:
        self.peer, self.problem = load(path), problem
        self.a, self.a_scale = problem.activations("int8_channel")
        self.weights = problem.weights("int8_channel")
        self.out = torch.empty(
            (problem.rows, problem.n), dtype=torch.bfloat16, device=self.a.device
        )
        rows = (ctypes.c_int32 * len(problem.counts))(*problem.counts)
        self.handles = []
        for values, scale in self.weights:
            handle = self.peer.peer_prepare(
                variant,
                _Problem(
                    len(problem.counts),
                    problem.n,
                    problem.k,
                    rows,
                    self.a.data_ptr(),
                    values.data_ptr(),
                    self.a_scale.data_ptr(),
                    scale.data_ptr(),
                    self.out.data_ptr(),
                ),
            )
            if not handle:
                raise RuntimeError(self.peer.peer_error().decode())
            self.handles.append(handle)

    def __del__(self) -> None:
        for handle in getattr(self, "handles", ()):
            self.peer.peer_release(handle)

    def call(self, index: int):
        handle = self.handles[index]

        def run() -> torch.Tensor:
            code = self.peer.peer_run(handle, torch.cuda.current_stream().cuda_stream)
            if code:
                raise RuntimeError(f"peer_run: {code}")
            return self.out

        return run
