"""Tensors of any framework in, tensors of the caller's framework out.

Everything goes through DLPack without a copy. Two things NumPy cannot do by itself are done here:
bfloat16 and float8 arrays (dtypes of ``ml_dtypes``) and read-only arrays.
"""

from __future__ import annotations

import sys
from typing import Any

import numpy as np
import tvm_ffi

from octomoe._native import InvalidArgument, lib

Tensor = Any  # a torch.Tensor, a NumPy array, or anything else with __dlpack__

# Dtypes of ml_dtypes, which NumPy holds but cannot export -> (dtype of the same size, DLPack name).
_ML_DTYPES = {
    "bfloat16": (np.uint16, "bfloat16"),
    "float8_e4m3fn": (np.uint8, "float8_e4m3fn"),
}
_USER_DTYPES = 256  # NumPy numbers dtypes that other packages define from here on
_OUTPUT_DTYPES = {
    "bf16": "bfloat16",
    "bfloat16": "bfloat16",
    "fp16": "float16",
    "float16": "float16",
    "fp32": "float32",
    "float32": "float32",
}


def is_torch(value: Any) -> bool:
    """Whether `value` is a torch.Tensor; does not import torch."""
    torch = sys.modules.get("torch")
    return torch is not None and isinstance(value, torch.Tensor)


def is_jax(value: Any) -> bool:
    """Whether `value` is a jax.Array; does not import JAX."""
    jax = sys.modules.get("jax")
    return jax is not None and isinstance(value, jax.Array)


def ml_dtype(name: str) -> np.dtype:
    """NumPy's dtype for "bfloat16" and "float8_e4m3fn", which the package ml_dtypes defines."""
    try:
        import ml_dtypes
    except ImportError:
        raise InvalidArgument(f"NumPy arrays of {name} need the package ml_dtypes") from None
    return np.dtype(getattr(ml_dtypes, name))


def to_ffi(value: Any, name: str) -> Any:
    """What the library takes for `value`: the same memory, never a copy."""
    if is_torch(value):
        return value.detach() if value.requires_grad else value
    if isinstance(value, np.ndarray):
        foreign = None
        if value.dtype.num >= _USER_DTYPES and value.dtype.name in _ML_DTYPES:
            carrier, foreign = _ML_DTYPES[value.dtype.name]
            value = value.view(carrier)
        try:
            if value.flags.writeable:
                tensor = tvm_ffi.from_dlpack(value)
            else:  # only the newer capsule can carry a read-only array
                tensor = tvm_ffi.from_dlpack(value.__dlpack__(max_version=(1, 0)))
        except (BufferError, TypeError) as error:
            kind = "" if value.flags.writeable else " read-only"
            raise InvalidArgument(
                f"{name}: NumPy cannot export this{kind} array of {value.dtype}: {error}"
            ) from None
        return tensor if foreign is None else lib.reinterpret(tensor, foreign)
    if isinstance(value, tvm_ffi.Tensor):
        return value
    if hasattr(value, "__dlpack__"):
        try:
            return tvm_ffi.from_dlpack(value)
        except (BufferError, TypeError, ValueError) as error:
            raise InvalidArgument(f"{name}: its DLPack export failed: {error}") from None
    raise InvalidArgument(
        f"{name}: expected a tensor (PyTorch, NumPy or anything with DLPack), "
        f"got {type(value).__name__}"
    )


def to_ffi_output(value: Any, name: str) -> Any:
    """As `to_ffi`, for memory that the library writes."""
    if isinstance(value, np.ndarray) and not value.flags.writeable:
        raise InvalidArgument(f"{name}: the array is read-only")
    if is_jax(value):
        raise InvalidArgument(f"{name}: JAX arrays are immutable; leave {name} out")
    return to_ffi(value, name)


def options(**values: Any) -> dict[str, Any]:
    """Named options of a call: tensors converted, None left out."""
    plain = (str, int, float, bool, tvm_ffi.Object, tvm_ffi.Function)
    return {
        name: value if isinstance(value, plain) or callable(value) else to_ffi(value, name)
        for name, value in values.items()
        if value is not None
    }


def framework_of(*values: Any) -> str:
    """ "torch" if the first tensor is PyTorch's, else "jax" if it is JAX's, else "numpy"."""
    if is_torch(values[0]):
        return "torch"
    return "jax" if is_jax(values[0]) else "numpy"


def output_dtype(dtype: Any, like: Any) -> str:
    """ "bfloat16", "float16" or "float32", from a name, a dtype object, or a tensor's own dtype."""
    wanted = like.dtype if dtype is None else dtype
    try:
        return _output_names[wanted]
    except (KeyError, TypeError):
        result = _output_names[wanted] = _output_dtype(wanted, dtype is None)
        return result


_output_names: dict[Any, str] = {}  # NumPy's dtype.name is slow


def _output_dtype(wanted: Any, of_input: bool) -> str:
    name = wanted.name if isinstance(wanted, np.dtype) else str(wanted).removeprefix("torch.")
    if isinstance(wanted, type) and issubclass(wanted, np.generic):
        name = np.dtype(wanted).name
    try:
        return _OUTPUT_DTYPES[name]
    except KeyError:
        what = "x" if of_input else "out_dtype"
        raise InvalidArgument(
            f"{what}: expected bfloat16, float16 or float32, got {name}"
        ) from None


def empty(shape: tuple[int, ...], dtype: str, framework: str, like: Any = None) -> Any:
    """An uninitialised array: torch's for "torch", on the device of `like`, else NumPy's."""
    if framework == "torch":
        import torch

        device = None if like is None else like.device
        return torch.empty(shape, dtype=getattr(torch, dtype), device=device)
    return np.empty(shape, ml_dtype(dtype) if dtype in _ML_DTYPES else dtype)


def from_ffi(tensor: Any, framework: str) -> Any:
    """A tensor that the library returned, as the framework's, sharing its memory."""
    if framework == "torch":
        if is_torch(tensor):
            return tensor
        import torch

        return torch.from_dlpack(tensor)
    if is_torch(tensor):
        tensor = tvm_ffi.from_dlpack(tensor)
    name = str(tensor.dtype)
    if name in _ML_DTYPES:
        carrier, _ = _ML_DTYPES[name]
        array = np.from_dlpack(lib.reinterpret(tensor, np.dtype(carrier).name))
        return array.view(ml_dtype(name))
    return np.from_dlpack(tensor)


def finish(array: Any, framework: str) -> Any:
    """The caller's kind of array for a NumPy result (JAX), itself otherwise."""
    if framework == "jax":
        import jax

        return jax.numpy.asarray(array)
    return array
