"""MoeLayer, fused_moe and route."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import numpy as np

from octomoe import _tensors
from octomoe._native import InvalidArgument, find_cuda_libraries, lib
from octomoe._tensors import Tensor, is_torch, options, to_ffi, to_ffi_output
from octomoe.weights import MoeWeights


class MoeLayer:
    """A Mixture-of-Experts layer, ready to run on a device.

    Args:
        weights: the quantised weights. The layer keeps its own packed copy.
        device: "cpu", "cuda" or "cuda:1". A GPU uses weights on it where they lie and uploads
            others.
        swiglu_alpha: of the activation swigluoai.
        swiglu_limit: clamp of swigluoai (7 if not given) and of swiglu (none if not given).
        router_weight_on_input: multiply x by the router's weight instead of the output.
        combine_order: in which order a token's rows are added up. "slots": that of topk_ids, in
            float32, rounded once: the same bits on every device and in every batch. "any": as it
            comes: on SM90, if `out` is bfloat16 or float16, the second GEMM adds its rows to
            `out`, and a launch less runs (docs/performance.md). Each sum is rounded then, and last
            bits may differ from call to call; docs/schemes.md, section 4, has the bound. Where that
            cannot be done, as "slots".
        shared_expert: MoeWeights with E = 1, same H and kind of scheme; it sees every token.
        shared_gate: [H]: the shared expert's weight is sigmoid(x . shared_gate), else 1.
        expert_map: int32 [global experts] -> expert of these weights, -1 = on another rank. Its
            length says what share of the routes is this rank's, for which kernels are chosen; so
            it is worth giving also where ids are local already (-1: elsewhere), as a map of all
            ranks' experts that leaves local ids as they are.
        threads: 0 = $OCTOMOE_NUM_THREADS, else all cores.
        fused_gather, fused_activation, fused_requantize: CUDA: False runs the step as a kernel of
            its own, with the same result, to measure what the fusion is worth. The last is about
            int8_block with block_k = 128 on SM90; other schemes always requantise in a kernel.
        family: CUDA: "automatic", or "sm80" (mma.sync) or "sm90" (wgmma) for the GEMM kernels of
            that family alone, with the same result to the bit.
        prepack: CUDA: copy integer weights [E, N, K] into panels [E, K/128, N, 128] on the device,
            which its kernels read faster, with the same result. H and I a multiple of 128. It is a
            second copy on the device for as long as weights that lie there are referenced
            elsewhere: by the MoeWeights, or by the tensors they were made of. Weights in panels
            are used as they are. The CPU packs in its own way and takes no notice.
        replays: CUDA: how many kinds of calls (T, k, stream) the layer keeps a CUDA graph of, to
            launch that in place of its kernels; 0 to 64.

    Raises:
        InvalidArgument, Unsupported: the weights do not fit together, or the device cannot.
    """

    __slots__ = ("__weakref__", "_handle", "_info")

    def __init__(
        self,
        weights: MoeWeights,
        *,
        device: str = "cpu",
        swiglu_alpha: float | None = None,
        swiglu_limit: float | None = None,
        router_weight_on_input: bool = False,
        combine_order: str = "slots",
        shared_expert: MoeWeights | None = None,
        shared_gate: Tensor | None = None,
        expert_map: Tensor | None = None,
        threads: int = 0,
        fused_gather: bool = True,
        fused_activation: bool = True,
        fused_requantize: bool = True,
        family: str = "automatic",
        prepack: bool = False,
        replays: int = 16,
    ) -> None:
        if not isinstance(weights, MoeWeights):
            raise InvalidArgument(f"weights: expected MoeWeights, got {type(weights).__name__}")
        named = options(
            swiglu_alpha=None if swiglu_alpha is None else float(swiglu_alpha),
            swiglu_limit=None if swiglu_limit is None else float(swiglu_limit),
            router_weight_on_input=bool(router_weight_on_input),
            combine_order=str(combine_order),
            shared_expert=None if shared_expert is None else shared_expert._live(),
            shared_gate=shared_gate,
            expert_map=expert_map,
            threads=threads,
            fused_gather=bool(fused_gather),
            fused_activation=bool(fused_activation),
            fused_requantize=bool(fused_requantize),
            family=str(family),
            prepack=bool(prepack),
            replays=replays,
        )
        self._handle = lib.make_layer(find_cuda_libraries(str(device)), weights._live(), named)
        self._info = dict(lib.layer_info(self._handle).items())

    def forward(
        self,
        x: Tensor,
        topk_ids: Tensor,
        topk_weights: Tensor,
        *,
        out: Tensor | None = None,
        accumulate: bool = False,
        out_dtype: Any = None,
        check_ids: bool = False,
        workspace: Tensor | None = None,
        stream: int | None = None,
    ) -> Any:
        """Run the layer. The interpreter lock is released meanwhile.

        Args:
            x: bfloat16, float16 or float32 [T, H]; rows may have any stride, columns must be
                adjacent.
            topk_ids: int32 or int64 [T, k]; -1 = this route contributes nothing.
            topk_weights: float32 [T, k].
            out: written if given: bfloat16, float16 or float32 [T, H].
            accumulate: add to `out` instead of overwriting it.
            out_dtype: of the result if `out` is not given; by default x's.
            check_ids: CUDA: refuse ids outside -1..E-1, which waits for the stream; without it
                they count as -1. The CPU always checks.
            workspace: CUDA: uint8 of at least ``workspace_bytes(T, k)``, used by this call alone.
                Without it the layer has its own, one for each stream.
            stream: CUDA: a cudaStream_t as an integer; by default the current stream of torch for
                torch tensors, else that of ``tvm_ffi.use_raw_stream``. The call returns at once.

        Returns:
            `out`, or a new [T, H]: a torch.Tensor for a torch.Tensor, a JAX array for a JAX
            array, else a NumPy array.

        Raises:
            InvalidArgument: names the argument, what was expected and what came.
        """
        framework = "torch"
        if out is not None:
            result, target = out, to_ffi_output(out, "out")
        else:
            if accumulate:
                raise InvalidArgument("accumulate: needs `out`")
            if is_torch(x):
                if out_dtype is None:
                    result = target = _empty_like(x)
                else:
                    dtype = _tensors.output_dtype(out_dtype, x)
                    result = target = _tensors.empty(x.shape, dtype, "torch", x)
            else:
                framework = _tensors.framework_of(x)
                result = _tensors.empty(
                    _shape(x, "x"), _tensors.output_dtype(out_dtype, x), framework
                )
                target = to_ffi(result, "out")
        lib.layer_forward(
            self._handle,
            to_ffi(x, "x"),
            to_ffi(topk_ids, "topk_ids"),
            to_ffi(topk_weights, "topk_weights"),
            target,
            accumulate,
            check_ids,
            None if workspace is None else to_ffi_output(workspace, "workspace"),
            stream,
        )
        return result if framework != "jax" else _tensors.finish(result, framework)

    __call__ = forward

    def reserve(self, max_tokens: int, top_k: int) -> None:
        """Allocate the workspace once; calls of up to max_tokens x top_k allocate nothing."""
        lib.layer_reserve(self._handle, max_tokens, top_k)

    def workspace_bytes(self, tokens: int, top_k: int) -> int:
        """Bytes that a call of this size needs beside the weights."""
        return lib.layer_workspace_bytes(self._handle, tokens, top_k)

    @property
    def experts(self) -> int:
        """E, of this rank."""
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
    def scheme(self) -> str:
        """The scheme's canonical name."""
        return str(self._info["scheme"])

    @property
    def device(self) -> str:
        """ "cpu" or "cuda:0"."""
        return str(self._info["device"])

    @property
    def weight_bytes(self) -> int:
        """Bytes of the packed weights."""
        return self._info["weight_bytes"]

    def __repr__(self) -> str:
        return (
            f"MoeLayer({self.scheme}, experts={self.experts}, hidden={self.hidden}, "
            f"intermediate={self.intermediate}, {self.device})"
        )


def _empty_like(x: Any) -> Any:
    import torch

    return torch.empty_like(x, memory_format=torch.contiguous_format, requires_grad=False)


def _shape(x: Any, name: str) -> tuple[int, ...]:
    try:
        return tuple(x.shape)
    except AttributeError:
        raise InvalidArgument(
            f"{name}: expected a tensor (PyTorch, NumPy or anything with DLPack), "
            f"got {type(x).__name__}"
        ) from None


def layer_of(
    weights: MoeWeights,
    *,
    activation: str | None = None,
    swiglu_alpha: float | None = None,
    swiglu_limit: float | None = None,
    router_weight_on_input: bool = False,
    device: str = "cpu",
) -> MoeLayer:
    """The layer that :func:`fused_moe` uses for `weights`; it lives as long as they do."""
    if not isinstance(weights, MoeWeights):
        raise InvalidArgument(f"weights: expected MoeWeights, got {type(weights).__name__}")
    if activation == weights._info["activation"]:
        activation = None
    key = (activation, swiglu_alpha, swiglu_limit, router_weight_on_input, device)
    layer = weights._layers.get(key)
    if layer is not None:
        return layer
    with weights._lock:
        layer = weights._layers.get(key)
        if layer is None:
            source = weights
            if activation is not None:
                source = MoeWeights(lib.weights_with_activation(weights._live(), activation))
            layer = weights._layers[key] = MoeLayer(
                source,
                device=device,
                swiglu_alpha=swiglu_alpha,
                swiglu_limit=swiglu_limit,
                router_weight_on_input=router_weight_on_input,
            )
    return layer


def fused_moe(
    x: Tensor,
    weights: MoeWeights,
    topk_weights: Tensor,
    topk_ids: Tensor,
    *,
    activation: str | None = None,
    swiglu_alpha: float | None = None,
    swiglu_limit: float | None = None,
    router_weight_on_input: bool = False,
    device: str | None = None,
    out: Tensor | None = None,
    out_dtype: Any = None,
) -> Any:
    """A whole MoE layer in one call.

    The first call makes a :class:`MoeLayer` of the weights, later calls reuse it (one for each
    combination of the keyword arguments). Use MoeLayer itself for a shared expert or an expert map.

    Args:
        x: bfloat16, float16 or float32 [T, H].
        weights: MoeWeights.
        topk_weights: float32 [T, k]. topk_ids: int32 or int64 [T, k]. As :func:`route` gives them.
        activation: if another than the weights were made for.
        swiglu_alpha, swiglu_limit, router_weight_on_input, device: see :class:`MoeLayer`; the
            device is by default that of a torch x.
        out, out_dtype: see :meth:`MoeLayer.forward`.

    Returns:
        [T, H], of x's framework and dtype.
    """
    if device is None:
        device = str(x.device) if is_torch(x) else "cpu"
    layer = layer_of(
        weights,
        activation=activation,
        swiglu_alpha=swiglu_alpha,
        swiglu_limit=swiglu_limit,
        router_weight_on_input=router_weight_on_input,
        device=device,
    )
    return layer.forward(x, topk_ids, topk_weights, out=out, out_dtype=out_dtype)


@dataclasses.dataclass(frozen=True)
class RouteOptions:
    """How a router turns logits into experts and weights.

    scoring: "softmax" or "sigmoid". renormalize: "divide" (by max(sum, renormalize_min)), "add_eps"
    (divide by sum + renormalize_min), "none", or True / False for "divide" / "none".
    scaling_factor multiplies the weights. groups > 1: only the topk_groups best groups of experts
    stay.
    """

    scoring: str = "softmax"
    renormalize: str | bool = "divide"
    renormalize_min: float = 0.0
    scaling_factor: float = 1.0
    groups: int = 1
    topk_groups: int = 1

    @classmethod
    def qwen3(cls) -> RouteOptions:
        """Softmax over all experts, top k, renormalised; the same numbers as Mixtral's."""
        return cls()

    mixtral = qwen3

    @classmethod
    def ernie45(cls) -> RouteOptions:
        """ERNIE 4.5: softmax; the correction bias selects; the sum is clamped at 1e-12."""
        return cls(renormalize_min=1e-12)

    @classmethod
    def deepseek_v3(cls) -> RouteOptions:
        """DeepSeek-V3: sigmoid, 8 groups of which 4 stay, bias, sum + 1e-20, times 2.5."""
        return cls("sigmoid", "add_eps", 1e-20, 2.5, 8, 4)


_RENORMALIZE = {True: "divide", False: "none"}


@functools.lru_cache(maxsize=256)
def _router(
    scoring: str,
    renormalize: str | bool,
    renormalize_min: float,
    scaling_factor: float,
    groups: int,
    topk_groups: int,
) -> Any:
    return lib.make_router(
        {
            "scoring": scoring,
            "renormalize": _RENORMALIZE.get(renormalize, renormalize),
            "renormalize_min": float(renormalize_min),
            "scaling_factor": float(scaling_factor),
            "groups": groups,
            "topk_groups": topk_groups,
        }
    )


def route(
    logits: Tensor,
    top_k: int,
    *,
    correction_bias: Tensor | None = None,
    options: RouteOptions | None = None,
    scoring: str = "softmax",
    renormalize: str | bool = True,
    renormalize_min: float = 0.0,
    scaling_factor: float = 1.0,
    groups: int = 1,
    topk_groups: int = 1,
    out: tuple[Tensor, Tensor] | None = None,
    stream: int | None = None,
) -> tuple[Any, Any]:
    """Choose the experts of each token.

    Args:
        logits: float32, bfloat16 or float16 [T, E].
        top_k: k, 1..E.
        correction_bias: float32 [E], added for the selection only.
        options: a RouteOptions in place of the keyword arguments below it.
        scoring, renormalize, renormalize_min, scaling_factor, groups, topk_groups: the fields of
            :class:`RouteOptions`.
        out: (topk_weights, topk_ids) to write.
        stream: see :meth:`MoeLayer.forward`.

    Returns:
        (topk_weights float32 [T, k], topk_ids int32 [T, k]) in descending order of selection score;
        ties go to the lower expert.

    Raises:
        InvalidArgument: names the argument, what was expected and what came.
    """
    if options is None:
        router = _router(scoring, renormalize, renormalize_min, scaling_factor, groups, topk_groups)
    else:
        router = _router(*(getattr(options, field) for field in _ROUTE_FIELDS))
    framework = "torch"
    if out is not None:
        weights, ids = out
        targets = to_ffi_output(weights, "out[0]"), to_ffi_output(ids, "out[1]")
    else:
        shape = _shape(logits, "logits")
        if len(shape) != 2:
            raise InvalidArgument(f"logits: expected [T, E], got {list(shape)}")
        size = (shape[0], int(top_k))
        if size[1] < 1 or size[1] > shape[1]:
            raise InvalidArgument(f"top_k: expected 1..{shape[1]} (the experts), got {top_k}")
        if is_torch(logits):
            import torch

            weights = logits.new_empty(size, dtype=torch.float32)
            ids = logits.new_empty(size, dtype=torch.int32)
            targets = weights, ids
        else:
            framework = _tensors.framework_of(logits)
            weights, ids = np.empty(size, np.float32), np.empty(size, np.int32)
            targets = to_ffi(weights, "topk_weights"), to_ffi(ids, "topk_ids")
    bias = None if correction_bias is None else to_ffi(correction_bias, "correction_bias")
    if getattr(logits, "is_cuda", False):
        find_cuda_libraries("cuda")
    lib.route(router, to_ffi(logits, "logits"), bias, *targets, stream)
    if framework == "jax":
        return _tensors.finish(weights, framework), _tensors.finish(ids, framework)
    return weights, ids


_ROUTE_FIELDS = tuple(field.name for field in dataclasses.fields(RouteOptions))
