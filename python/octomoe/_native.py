"""The shared library, its functions, and the errors that they raise."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import tvm_ffi


class Error(RuntimeError):
    """Base of every error that OctoMoE raises; the message names the argument and what came.

    ``code`` is the library's error code: ``"invalid_argument"``, ``"unsupported"``, ``"io"``,
    ``"format"``, ``"out_of_memory"``, ``"cuda"`` or ``"internal"``.
    """

    code = "internal"


class InvalidArgument(Error, ValueError):
    """A caller's argument is wrong: dtype, shape, stride, device or value."""

    code = "invalid_argument"


class Unsupported(Error):
    """A valid request that this build or machine cannot serve."""

    code = "unsupported"


class FileError(Error):
    """A file that cannot be read or written."""

    code = "io"


class FormatError(Error, ValueError):
    """A file whose content is malformed."""

    code = "format"


class OutOfMemory(Error, MemoryError):
    """An allocation failed."""

    code = "out_of_memory"


class CudaError(Error):
    """A failure of the CUDA driver, NVRTC or cuBLAS."""

    code = "cuda"


class InternalError(Error):
    """A broken invariant of the library itself: please report it."""

    code = "internal"


for _class in (
    InvalidArgument,
    Unsupported,
    FileError,
    FormatError,
    OutOfMemory,
    CudaError,
    InternalError,
):
    _class.__module__ = "octomoe"
    tvm_ffi.error.register_error(f"octomoe.{_class.code}", _class)
Error.__module__ = "octomoe"


def _find_library() -> Path:
    """Beside this file (installed), $OCTOMOE_PYTHON_LIBRARY, or the source tree's newest build."""
    here = Path(__file__).resolve().parent
    if named := os.environ.get("OCTOMOE_PYTHON_LIBRARY"):
        if not Path(named).is_file():
            raise ImportError(f"OCTOMOE_PYTHON_LIBRARY: no such file: {named}")
        return Path(named)
    if (installed := here / "_octomoe.so").is_file():
        return installed
    root = here.parent.parent
    built = (
        list(root.glob("build*/python/_octomoe.so")) if (root / "CMakeLists.txt").exists() else []
    )
    if built:
        return max(built, key=lambda path: path.stat().st_mtime)
    raise ImportError(
        "octomoe: _octomoe.so is missing. Install the package (pip install .), or build it in the "
        "source tree: cmake -B build -DOCTOMOE_BUILD_PYTHON=ON && cmake --build build"
    )


LIBRARY_PATH = _find_library()
_module = tvm_ffi.load_module(str(LIBRARY_PATH))

_NAMES = (
    "quantize",
    "weights_from_integers",
    "weights_from_float",
    "weights_with_activation",
    "weights_info",
    "weights_tensors",
    "weights_dequantize",
    "quantize_matrix",
    "matrix_from_parts",
    "matrix_info",
    "matrix_parts",
    "matrix_dequantize",
    "prepare_matrix",
    "prepared_info",
    "prepared_workspace_bytes",
    "grouped_gemm",
    "make_layer",
    "layer_forward",
    "layer_forward_allocating",
    "layer_reserve",
    "layer_workspace_bytes",
    "layer_info",
    "make_router",
    "route",
    "open_checkpoint",
    "checkpoint_config",
    "checkpoint_moe_layers",
    "checkpoint_layer",
    "quantize_checkpoint",
    "add_cuda_library_paths",
    "version",
    "schemes",
    "canonical_scheme",
    "reinterpret",
)


class _Functions:
    """The exported functions by name. Calls release the interpreter lock."""

    __slots__ = _NAMES

    def __init__(self) -> None:
        for name in _NAMES:
            setattr(self, name, _module.get_function(name))


lib = _Functions()
_searched: list[str] = []


def find_cuda_libraries(device: str) -> str:
    """`device`, after telling the library where the wheels with NVRTC are if it is a GPU."""
    if device.startswith("cuda") and sys.path != _searched:
        _searched[:] = sys.path
        lib.add_cuda_library_paths([path for path in sys.path if path])
    return device
