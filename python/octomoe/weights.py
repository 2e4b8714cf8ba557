"""Quantised weights: of a whole MoE layer, and of one matrix stack."""

from __future__ import annotations

import threading
from typing import Any

from octomoe import _tensors
from octomoe._native import InvalidArgument, lib
from octomoe._tensors import Tensor, from_ffi, options, to_ffi


def schemes() -> list[str]:
    """The schemes with their default parameters, in the order of the documentation."""
    return [str(name) for name in lib.schemes()]


def canonical_scheme(scheme: str) -> str:
    """The full name of a scheme, for example of ``"int8_block"``. Raises Error for a bad one."""
    return str(lib.canonical_scheme(scheme))


def _tensor_tree(value: Any, framework: str) -> Any:
    if hasattr(value, "items"):
        return {str(name): _tensor_tree(item, framework) for name, item in value.items()}
    return from_ffi(value, framework)


class MoeWeights:
    """The quantised weights of one Mixture-of-Experts layer.

    Made by :func:`quantize`, by the ``from_*`` constructors, or by :func:`load_checkpoint`. Shapes:
    E experts, H hidden size, I intermediate size, T tokens. Layout: ``w13`` [E, 2I, H] holds gate
    and up ([E, I, H] for an activation that is not gated), ``w2`` is [E, H, I].

    Integers of the int8 schemes may also come in panels, which CUDA kernels read faster, with the
    same result: w13 [E, H/128, 2I, 128], w2 [E, I/128, H, 128], each of the two in either layout.
    With PyTorch, for a ``w`` [E, N, K] whose K is a multiple of 128::

        w.view(E, N, K // 128, 128).transpose(1, 2).contiguous()

    That is a second copy until the caller drops ``w``. ``MoeLayer(weights, prepack=True)`` makes
    it as well.
    """

    __slots__ = ("__weakref__", "_framework", "_handle", "_info", "_layers", "_lock")

    def __init__(self, handle: Any, framework: str = "numpy") -> None:
        """Not for users: use :func:`quantize` or a ``from_*`` constructor."""
        self._handle = handle
        self._framework = framework
        self._info = dict(lib.weights_info(handle).items())
        self._layers: dict[tuple, Any] = {}
        self._lock = threading.Lock()

    @classmethod
    def from_int8_channel(
        cls,
        w13: Tensor,
        w13_scale: Tensor,
        w2: Tensor,
        w2_scale: Tensor,
        *,
        scheme: str = "int8_channel",
        activation: str = "swiglu",
        gate_up_order: str = "gate_up",
        b13: Tensor | None = None,
        b2: Tensor | None = None,
        x_scale: Tensor | None = None,
        act_scale: Tensor | None = None,
        threads: int = 0,
    ) -> MoeWeights:
        """Adopt INT8 weights with one scale per output channel.

        The integers are used where they lie: keep them unchanged while this object lives.

        Args:
            w13: int8 [E, 2I, H], or panels [E, H/128, 2I, 128]. w13_scale: float32, float16 or
                bfloat16 [E, 2I] or [E, 2I, 1]; [E] with ``scheme="int8_channel:per_tensor"``.
            w2: int8 [E, H, I], or panels [E, I/128, H, 128]. w2_scale: [E, H], [E, H, 1] or [E].
            scheme: ``int8_channel``; ``static``, ``asymmetric``, ``per_tensor`` follow a colon.
            activation: "swiglu", "geglu_tanh", "geglu_erf", "swigluoai", "silu", "gelu_tanh",
                "gelu_erf", "relu", "relu2" or "none".
            gate_up_order: "gate_up" (vLLM, SGLang, Hugging Face) or "up_gate" (FlashInfer).
            b13, b2: optional biases [E, 2I], [E, H].
            x_scale, act_scale: float32 [1], with a static scheme.
            threads: 0 = all cores.

        Raises:
            InvalidArgument: a wrong dtype or shape, panels that are not contiguous or not of 128
                columns, or a scale that is not positive and finite.
        """
        return cls._from_integers(
            scheme,
            (w13, w13_scale, w2, w2_scale),
            options(
                activation=activation,
                gate_up_order=gate_up_order,
                b13=b13,
                b2=b2,
                x_scale=x_scale,
                act_scale=act_scale,
                threads=threads,
            ),
            "int8_channel",
        )

    @classmethod
    def from_int8_block(
        cls,
        w13: Tensor,
        w13_scale: Tensor,
        w2: Tensor,
        w2_scale: Tensor,
        *,
        block: tuple[int, int] = (128, 128),
        activation: str = "swiglu",
        gate_up_order: str = "gate_up",
        b13: Tensor | None = None,
        b2: Tensor | None = None,
        threads: int = 0,
    ) -> MoeWeights:
        """Adopt INT8 weights with one scale per block (DeepSeek's block format).

        Args:
            w13: int8 [E, 2I, H], or panels [E, H/128, 2I, 128]. w13_scale: [E, 2*ceil(I/block_n),
                ceil(H/block_k)]: the values are multiplied by it; gate and up have their own
                blocks.
            w2: int8 [E, H, I], or panels [E, I/128, H, 128]. w2_scale: [E, ceil(H/block_n),
                ceil(I/block_k)].
            block: (rows, columns) of a block.

        The other arguments and errors are those of :meth:`from_int8_channel`.
        """
        block_n, block_k = block
        return cls._from_integers(
            f"int8_block:block_n={block_n},block_k={block_k}",
            (w13, w13_scale, w2, w2_scale),
            options(
                activation=activation,
                gate_up_order=gate_up_order,
                b13=b13,
                b2=b2,
                threads=threads,
            ),
            "int8_block",
        )

    @classmethod
    def from_w4a8_fp8(
        cls,
        w13: Tensor,
        w13_scale: Tensor,
        w2: Tensor,
        w2_scale: Tensor,
        *,
        group_size: int = 128,
        activation_scale: str = "dynamic",
        activation: str = "swiglu",
        gate_up_order: str = "gate_up",
        b13: Tensor | None = None,
        b2: Tensor | None = None,
        x_scale: Tensor | None = None,
        act_scale: Tensor | None = None,
        threads: int = 0,
    ) -> MoeWeights:
        """Adopt INT4 weights that meet E4M3 activations.

        Args:
            w13: int8 or uint8 [E, 2I, H/2], two signed 4-bit values a byte, the even column in the
                low half. w13_scale: [E, 2I, ceil(H/group_size)]; group_size 0: [E, 2I, 1].
            w2: [E, H, I/2]. w2_scale: [E, H, ceil(I/group_size)].
            group_size: columns that share a scale; 0 = a whole row.
            activation_scale: "dynamic" (one scale per row), "static" (x_scale and act_scale,
                float32 [E]) or "none" (activations converted as they are).

        The other arguments and errors are those of :meth:`from_int8_channel`.
        """
        if activation_scale not in ("dynamic", "static", "none"):
            raise InvalidArgument(
                "activation_scale: expected 'dynamic', 'static' or 'none', "
                f"got {activation_scale!r}"
            )
        suffix = "" if activation_scale == "dynamic" else f",{activation_scale}"
        return cls._from_integers(
            f"w4a8_fp8:group={group_size}{suffix}",
            (w13, w13_scale, w2, w2_scale),
            options(
                activation=activation,
                gate_up_order=gate_up_order,
                b13=b13,
                b2=b2,
                x_scale=x_scale,
                act_scale=act_scale,
                threads=threads,
            ),
            "w4a8_fp8",
        )

    @classmethod
    def from_int8_hybrid(
        cls,
        w13: Tensor,
        w13_scale: Tensor,
        w13_q: Tensor,
        w2: Tensor,
        w2_scale: Tensor,
        w2_q: Tensor,
        *,
        scheme: str = "int8_hybrid",
        activation: str = "swiglu",
        gate_up_order: str = "gate_up",
        b13: Tensor | None = None,
        b2: Tensor | None = None,
        threads: int = 0,
    ) -> MoeWeights:
        """Adopt INT8 weights with two-level scales.

        Args:
            w13: int8 [E, 2I, H], or panels [E, H/128, 2I, 128]. w13_scale: [E, NB, SG], one float
                per super group of K-blocks.
            w13_q: uint8 [E, NB, KB], the integer scale of a block, 1..q_max.
            w2, w2_scale, w2_q: the same of [E, H, I].
            scheme: ``int8_hybrid`` with its parameters (``block``, ``super``, ``q_max``).

        The other arguments and errors are those of :meth:`from_int8_channel`.
        """
        return cls._from_integers(
            scheme,
            (w13, w13_scale, w2, w2_scale),
            options(
                activation=activation,
                gate_up_order=gate_up_order,
                b13=b13,
                b2=b2,
                threads=threads,
                w13_q=w13_q,
                w2_q=w2_q,
            ),
            "int8_hybrid",
        )

    @classmethod
    def from_float(
        cls,
        w13: Tensor,
        w2: Tensor,
        *,
        activation: str = "swiglu",
        gate_up_order: str = "gate_up",
        b13: Tensor | None = None,
        b2: Tensor | None = None,
        threads: int = 0,
    ) -> MoeWeights:
        """Use bfloat16 or float16 weights w13 [E, 2I, H] and w2 [E, H, I] as they are."""
        handle = lib.weights_from_float(
            to_ffi(w13, "w13"),
            to_ffi(w2, "w2"),
            options(
                activation=activation,
                gate_up_order=gate_up_order,
                b13=b13,
                b2=b2,
                threads=threads,
            ),
        )
        return cls(handle, _tensors.framework_of(w13))

    @classmethod
    def _from_integers(
        cls, scheme: str, tensors: tuple[Tensor, ...], named: dict[str, Any], kind: str
    ) -> MoeWeights:
        if scheme.split(":")[0] != kind:
            raise InvalidArgument(f"scheme: expected a form of {kind}, got {scheme!r}")
        names = ("w13", "w13_scale", "w2", "w2_scale")
        converted = [to_ffi(tensor, name) for tensor, name in zip(tensors, names, strict=True)]
        handle = lib.weights_from_integers(scheme, *converted, named)
        return cls(handle, _tensors.framework_of(tensors[0]))

    @property
    def scheme(self) -> str:
        """The scheme's canonical name."""
        return str(self._info["scheme"])

    @property
    def activation(self) -> str:
        """The activation between the two GEMMs."""
        return str(self._info["activation"])

    @property
    def gate_up_order(self) -> str:
        """Which half of w13 comes first: "gate_up" or "up_gate"."""
        return str(self._info["gate_up_order"])

    @property
    def experts(self) -> int:
        """E."""
        return self._info["experts"]

    @property
    def hidden(self) -> int:
        """H."""
        return self._info["hidden"]

    @property
    def intermediate(self) -> int:
        """I."""
        return self._info["intermediate"]

    @property
    def bytes(self) -> int:
        """Bytes of values, scales and biases."""
        return self._info["bytes"]

    def _live(self) -> Any:
        if self._handle is None:
            raise InvalidArgument("weights: they were released; only their layers are left")
        return self._handle

    def tensors(self, framework: str | None = None) -> dict[str, Any]:
        """The stored tensors: ``{"w13": {"values", "scale", "q", ...}, "w2": {...}, "b13", "b2"}``.

        They share memory with the weights: do not write to them. ``framework`` is "numpy" or
        "torch"; by default the one that the weights came from. INT4 values are uint8, two a byte;
        values in panels have four dimensions.
        """
        return _tensor_tree(lib.weights_tensors(self._live()), framework or self._framework)

    def dequantize(self, framework: str | None = None, threads: int = 0) -> tuple[Any, Any]:
        """float32 (w13 [E, 2I, H], w2 [E, H, I]): the numbers that the stored ones stand for."""
        w13, w2 = lib.weights_dequantize(self._live(), threads)
        chosen = framework or self._framework
        return from_ffi(w13, chosen), from_ffi(w2, chosen)

    def release(self) -> None:
        """Drop the weights' own layout, once :func:`fused_moe` has made its packed copy.

        On the CPU a layer packs the weights, so both copies are held until this call. Afterwards
        only layers made before it work; :meth:`dequantize` and :meth:`tensors` raise.
        """
        if not self._layers:
            raise InvalidArgument("weights: release() before any layer was made would lose them")
        self._handle = None

    def __repr__(self) -> str:
        return (
            f"MoeWeights({self.scheme}, experts={self.experts}, hidden={self.hidden}, "
            f"intermediate={self.intermediate}, {self.activation}, {self.bytes / 1e6:.1f} MB)"
        )


def quantize(
    w13: Tensor,
    w2: Tensor,
    scheme: str = "int8_channel",
    *,
    activation: str = "swiglu",
    gate_up_order: str = "gate_up",
    b13: Tensor | None = None,
    b2: Tensor | None = None,
    x_scale: Tensor | None = None,
    act_scale: Tensor | None = None,
    threads: int = 0,
) -> MoeWeights:
    """Quantise the weights of a layer.

    Args:
        w13: float32, float16 or bfloat16 [E, 2I, H] ([E, I, H] if the activation is not gated).
        w2: [E, H, I].
        scheme: see :func:`schemes`; parameters after a colon, for example
            ``"int8_hybrid:block=64,q_max=32"`` or ``"w4a8_fp8:group=0"``.

    The other arguments are those of :meth:`MoeWeights.from_int8_channel`. The result is the
    same for any number of threads.

    Raises:
        InvalidArgument: a wrong dtype or shape, or an Inf or NaN (its expert and row are named).
    """
    named = options(
        activation=activation,
        gate_up_order=gate_up_order,
        b13=b13,
        b2=b2,
        x_scale=x_scale,
        act_scale=act_scale,
        threads=threads,
    )
    handle = lib.quantize(scheme, to_ffi(w13, "w13"), to_ffi(w2, "w2"), named)
    return MoeWeights(handle, _tensors.framework_of(w13))


class QuantizedMatrix:
    """A stack of E quantised matrices [N, K], for :func:`grouped_gemm`."""

    __slots__ = ("__weakref__", "_framework", "_handle", "_info")

    def __init__(self, handle: Any, framework: str = "numpy") -> None:
        """Not for users: use :func:`quantize_matrix` or :meth:`from_parts`."""
        self._handle = handle
        self._framework = framework
        self._info = dict(lib.matrix_info(handle).items())

    @classmethod
    def from_parts(
        cls,
        scheme: str,
        values: Tensor,
        scale: Tensor | None = None,
        *,
        q: Tensor | None = None,
        activation_scale: Tensor | None = None,
        segments: int = 1,
        threads: int = 0,
    ) -> QuantizedMatrix:
        """Adopt stored values, where they lie, with float32 scales.

        Args:
            values: int8 [E, N, K], or panels [E, K/128, N, 128] (see :class:`MoeWeights`); two
                INT4 a byte [E, N, K/2] for w4a8_fp8; bfloat16 or float16 for the schemes of that
                name.
            scale: int8_channel [E, N] (per_tensor [E]); int8_block [E, NB, KB]; int8_hybrid
                [E, NB, SG]; w4a8_fp8 [E, N, ceil(K/group)].
            q: int8_hybrid: uint8 [E, NB, KB], the integer scales.
            activation_scale: static schemes: float32 [1], or [E] for w4a8_fp8.
            segments: 2 if scale blocks restart at row N/2, as for gate and up.
        """
        parts = options(
            scale=scale,
            q=q,
            activation_scale=activation_scale,
            segments=segments,
            threads=threads,
        )
        handle = lib.matrix_from_parts(scheme, to_ffi(values, "values"), parts)
        return cls(handle, _tensors.framework_of(values))

    @property
    def scheme(self) -> str:
        """The scheme's canonical name."""
        return str(self._info["scheme"])

    @property
    def shape(self) -> tuple[int, int, int]:
        """(E, N, K)."""
        return self._info["experts"], self._info["n"], self._info["k"]

    @property
    def bytes(self) -> int:
        """Bytes of values and scales."""
        return self._info["bytes"]

    @property
    def flush_blocks(self) -> int:
        """int8_hybrid: K-blocks that are summed in int32 before a float step."""
        return self._info["flush_blocks"]

    def tensors(self, framework: str | None = None) -> dict[str, Any]:
        """The stored tensors by name; they share memory with the matrix: do not write to them."""
        return _tensor_tree(lib.matrix_parts(self._handle), framework or self._framework)

    def dequantize(self, framework: str | None = None, threads: int = 0) -> Any:
        """float32 [E, N, K]."""
        tensor = lib.matrix_dequantize(self._handle, threads)
        return from_ffi(tensor, framework or self._framework)

    def __repr__(self) -> str:
        return f"QuantizedMatrix({self.scheme}, {list(self.shape)})"


def quantize_matrix(
    w: Tensor, scheme: str = "int8_channel", *, segments: int = 1, threads: int = 0
) -> QuantizedMatrix:
    """Quantise a stack of matrices ``w`` (float32, float16 or bfloat16 [E, N, K])."""
    handle = lib.quantize_matrix(scheme, to_ffi(w, "w"), segments, threads)
    return QuantizedMatrix(handle, _tensors.framework_of(w))
