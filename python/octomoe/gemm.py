"""Grouped GEMM: one matrix per group of rows."""

from __future__ import annotations

from typing import Any

import numpy as np

from octomoe import _tensors
from octomoe._native import InvalidArgument, find_cuda_libraries, lib
from octomoe._tensors import Tensor, is_torch, options, to_ffi, to_ffi_output
from octomoe.layer import _shape
from octomoe.weights import QuantizedMatrix, quantize_matrix


class PreparedMatrix:
    """A stack of quantised matrices [E, N, K], packed for a device. Make it once, use it often.

    Values on a GPU are used where they lie, and must not change from then on: a GEMM may read
    them before kernels that were launched earlier have ended.

    Args:
        matrix: a QuantizedMatrix (see :func:`quantize_matrix`).
        device: "cpu", "cuda" or "cuda:1".
        threads: 0 = $OCTOMOE_NUM_THREADS, else all cores.
        family: CUDA: "automatic", "sm80" or "sm90", as for :class:`MoeLayer`.
        prepack: CUDA: copy integers [E, N, K] into panels on the device, as for :class:`MoeLayer`.
    """

    __slots__ = ("__weakref__", "_handle", "_info")

    def __init__(
        self,
        matrix: QuantizedMatrix,
        *,
        device: str = "cpu",
        threads: int = 0,
        family: str = "automatic",
        prepack: bool = False,
    ) -> None:
        if not isinstance(matrix, QuantizedMatrix):
            raise InvalidArgument(
                f"matrix: expected a QuantizedMatrix, got {type(matrix).__name__}"
            )
        self._handle = lib.prepare_matrix(
            find_cuda_libraries(str(device)), matrix._handle, threads, str(family), bool(prepack)
        )
        self._info = dict(lib.prepared_info(self._handle).items())

    @property
    def scheme(self) -> str:
        """The scheme's canonical name."""
        return str(self._info["scheme"])

    @property
    def shape(self) -> tuple[int, int, int]:
        """(E, N, K)."""
        return self._info["experts"], self._info["n"], self._info["k"]

    @property
    def device(self) -> str:
        """ "cpu" or "cuda:0"."""
        return str(self._info["device"])

    def workspace_bytes(self, rows: int) -> int:
        """Of a :func:`grouped_gemm` over `rows` rows of a (masked: E * max_rows); 0 on the CPU."""
        return lib.prepared_workspace_bytes(self._handle, rows)

    def __repr__(self) -> str:
        return f"PreparedMatrix({self.scheme}, {list(self.shape)})"


def _prepare(b: Any, b_scale: Tensor | None, scheme: str | None, device: str) -> PreparedMatrix:
    if isinstance(b, PreparedMatrix):
        return b
    if isinstance(b, QuantizedMatrix):
        return PreparedMatrix(b, device=device)
    shape = _shape(b, "b")
    dtype = getattr(b.dtype, "name", str(b.dtype).removeprefix("torch."))
    if dtype != "int8":
        if b_scale is not None:
            raise InvalidArgument(f"b_scale: expected none beside a float b, got one ({dtype} b)")
        own = dtype if dtype in ("bfloat16", "float16") else "bfloat16"
        default = {"bfloat16": "bf16", "float16": "fp16"}[own]
        return PreparedMatrix(quantize_matrix(b, scheme or default), device=device)
    if b_scale is None:
        raise InvalidArgument("b_scale: an int8 b needs its scales")
    if scheme is None:
        rank = len(_shape(b_scale, "b_scale"))
        if len(shape) not in (3, 4) or rank not in (2, 3):
            raise InvalidArgument(
                f"b_scale: expected [E, N] or [E, ceil(N/128), ceil(K/128)] beside b "
                f"{list(shape)}, got {list(_shape(b_scale, 'b_scale'))}"
            )
        scheme = "int8_channel" if rank == 2 else "int8_block"
    return PreparedMatrix(QuantizedMatrix.from_parts(scheme, b, b_scale), device=device)


def grouped_gemm(
    a: Tensor,
    b: PreparedMatrix | QuantizedMatrix | Tensor,
    expert_offsets: Tensor | None = None,
    *,
    rows_per_expert: Tensor | None = None,
    a_scale: Tensor | None = None,
    a_q: Tensor | None = None,
    a_zero: Tensor | None = None,
    b_scale: Tensor | None = None,
    bias: Tensor | None = None,
    scheme: str | None = None,
    out_dtype: Any = "bfloat16",
    out: Tensor | None = None,
    workspace: Tensor | None = None,
    stream: int | None = None,
) -> Any:
    """``d[r] = a[r] @ b[expert of r].T`` for every row r.

    Two layouts: with `expert_offsets` rows are sorted by expert, a is [R, K] and d [R, N]; with
    `rows_per_expert` (masked) a is [E, max_rows, K] and d [E, max_rows, N], and rows beyond an
    expert's count are neither read nor written.

    Args:
        a: bfloat16, float16 or float32: quantised inside as the scheme says. Or already quantised
            (int8, or float8_e4m3fn for w4a8_fp8) with its `a_scale`.
        b: a PreparedMatrix; or a QuantizedMatrix, or a tensor [E, N, K], which are prepared anew in
            each call: int8 (also in panels [E, K/128, N, 128]) with `b_scale`, or float (quantised
            to `scheme`, by default its own dtype).
        expert_offsets: int32 or int64 [E+1]: prefix sums of the rows, from 0 to R.
        rows_per_expert: int32 [E].
        a_scale: float32: int8_channel and w4a8_fp8 [R] (static: [1], [E]); int8_block [R, KB];
            int8_hybrid [R, SG]. Masked: [E, max_rows, ...].
        a_q: int8_hybrid: uint8 [R, KB]. a_zero: asymmetric: int32 [R].
        bias: float32 [E, N].
        out_dtype: "bfloat16", "float16" or "float32".
        out: written if given.
        workspace: CUDA: uint8 of at least ``b.workspace_bytes(rows)``, used by this call alone.
        stream: see :meth:`MoeLayer.forward`.

    Returns:
        `out`, or a new tensor of a's framework. (Rows of a masked result without an owner are 0.)

    Raises:
        InvalidArgument: names the argument, what was expected and what came.
    """
    if (expert_offsets is None) == (rows_per_expert is None):
        raise InvalidArgument("expert_offsets: give it or rows_per_expert, and not both")
    masked = rows_per_expert is not None
    matrix = _prepare(b, b_scale, scheme, str(a.device) if is_torch(a) else "cpu")
    framework = _tensors.framework_of(a)
    if out is None:
        shape = (*_shape(a, "a")[:-1], matrix._info["n"])
        out = _tensors.empty(shape, _tensors.output_dtype(out_dtype, a), framework, a)
        if masked:
            out[...] = 0
    else:
        framework = "numpy"
    extras = (
        options(a_scale=a_scale, a_q=a_q, a_zero=a_zero, bias=bias, workspace=workspace) or None
    )
    index = rows_per_expert if masked else expert_offsets
    lib.grouped_gemm(
        to_ffi(a, "a"),
        matrix._handle,
        to_ffi_output(out, "out"),
        to_ffi(index, "rows_per_expert" if masked else "expert_offsets"),
        masked,
        extras,
        stream,
    )
    return _tensors.finish(out, framework)


def expert_offsets(topk_ids: Tensor, experts: int) -> tuple[np.ndarray, np.ndarray]:
    """Rows sorted by expert, for :func:`grouped_gemm`.

    Args:
        topk_ids: integers [T, k]; -1 = no route.
        experts: E.

    Returns:
        (offsets int32 [E+1], routes int64 [R]): routes lists the positions in the flattened
        topk_ids, sorted by expert, then by token; a row's token is ``route // k``.
    """
    flat = np.asarray(topk_ids).reshape(-1)
    order = np.argsort(flat, kind="stable")
    order = order[flat[order] >= 0]
    counts = np.bincount(flat[order], minlength=experts)
    if len(counts) > experts:
        raise InvalidArgument(f"topk_ids: expected ids below {experts}, got {flat.max()}")
    offsets = np.zeros(experts + 1, np.int32)
    offsets[1:] = np.cumsum(counts)
    return offsets, order
