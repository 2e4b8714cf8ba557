"""PyTorch custom operators: octomoe::fused_moe, octomoe::route, octomoe::grouped_gemm.

They take CPU and CUDA tensors, on torch's current stream, with a workspace of torch's allocator:
calls on several streams and torch.cuda.graph are safe. They work eagerly, under torch.compile and
with fake tensors, on any build of PyTorch. Weights reach an operator as a *handle*: a zero-
dimensional int64 tensor on the CPU that names an entry of a weak registry. torch.compile sees an
ordinary graph input: layers that differ only in their weights share one compiled graph, where an
integer would be burnt into it: one graph for each layer. Whoever made a handle keeps the weights
alive; they are freed with their owner.

    layer = octomoe.torch.FusedMoe(weights)            # a module: holds weights and handle
    y = layer(x, topk_weights, topk_ids)

    h = octomoe.torch.handle(weights)                  # or by hand
    y = torch.ops.octomoe.fused_moe(x, h, topk_weights, topk_ids)
"""

from __future__ import annotations

import itertools
import threading
import weakref
from typing import Any

import torch

from octomoe._native import InvalidArgument, lib
from octomoe.gemm import PreparedMatrix
from octomoe.gemm import grouped_gemm as _grouped_gemm
from octomoe.layer import MoeLayer, RouteOptions, layer_of
from octomoe.layer import route as _route
from octomoe.weights import MoeWeights

_registry: weakref.WeakValueDictionary[int, Any] = weakref.WeakValueDictionary()
_handles: weakref.WeakKeyDictionary[Any, torch.Tensor] = weakref.WeakKeyDictionary()
_next_id = itertools.count(1)
_lock = threading.Lock()


def handle(owner: MoeWeights | MoeLayer | PreparedMatrix, device: str = "cpu") -> torch.Tensor:
    """The handle of a layer (or of the layer that fused_moe makes of weights) or of a matrix.

    Args:
        owner: what the handle names.
        device: where the layer of MoeWeights runs.

    Returns:
        An int64 tensor of no dimensions on the CPU, the same one for each call. It does not keep
        its owner alive.
    """
    target = layer_of(owner, device=device) if isinstance(owner, MoeWeights) else owner
    if not isinstance(target, (MoeLayer, PreparedMatrix)):
        raise InvalidArgument(
            "owner: expected MoeWeights, a MoeLayer or a PreparedMatrix, "
            f"got {type(owner).__name__}"
        )
    with _lock:
        found = _handles.get(target)
        if found is None:
            number = next(_next_id)
            _registry[number] = target
            found = _handles[target] = torch.tensor(number, dtype=torch.int64)
        return found


def _lookup(number: torch.Tensor, kind: type) -> Any:
    target = _registry.get(int(number))
    if target is None:
        raise InvalidArgument(
            f"handle: {int(number)} names nothing: its weights have been freed (keep a reference "
            "to them), or it comes from another process"
        )
    if not isinstance(target, kind):
        raise InvalidArgument(
            f"handle: expected one of a {kind.__name__}, got one of a {type(target).__name__}"
        )
    return target


_library = torch.library.Library("octomoe", "DEF")
_library.define(
    "fused_moe(Tensor x, Tensor handle, Tensor topk_weights, Tensor topk_ids, *, "
    "ScalarType? out_dtype=None) -> Tensor",
    tags=(torch.Tag.needs_fixed_stride_order,),
)
_library.define(
    "route(Tensor logits, int top_k, Tensor? correction_bias=None, *, str scoring='softmax', "
    "str renormalize='divide', float renormalize_min=0.0, float scaling_factor=1.0, int groups=1, "
    "int topk_groups=1) -> (Tensor, Tensor)",
    tags=(torch.Tag.needs_fixed_stride_order,),
)
_library.define(
    "grouped_gemm(Tensor a, Tensor handle, int n, Tensor index, Tensor? a_scale=None, "
    "Tensor? a_q=None, Tensor? a_zero=None, Tensor? bias=None, *, bool masked=False, "
    "ScalarType? out_dtype=None) -> Tensor",
    tags=(torch.Tag.needs_fixed_stride_order,),
)


# Whether this PyTorch lends the library its allocator: from 2.10 on, or with torch-c-dlpack-ext.
_lends_allocator = hasattr(torch.Tensor, "__dlpack_c_exchange_api__")


def _fused_moe_op(x, number, topk_weights, topk_ids, *, out_dtype=None):
    layer = _lookup(number, MoeLayer)._handle
    if x.requires_grad:
        x = x.detach()
    if topk_weights.requires_grad:
        topk_weights = topk_weights.detach()
    out = torch.empty_like(x) if out_dtype is None else torch.empty_like(x, dtype=out_dtype)
    # On a GPU the workspace is of torch's allocator, which knows streams and graphs: memory of this
    # call is never another's.
    if x.is_cuda and _lends_allocator:
        lib.layer_forward_allocating(layer, x, topk_ids, topk_weights, out)
        return out
    workspace = None
    if x.is_cuda and x.dim() == topk_ids.dim() == 2:  # else the library says what it expected
        size = lib.layer_workspace_bytes(layer, x.shape[0], topk_ids.shape[1])
        workspace = torch.empty(size, dtype=torch.uint8, device=x.device)
    lib.layer_forward(layer, x, topk_ids, topk_weights, out, False, False, workspace, None)
    return out


def _route_op(
    logits,
    top_k,
    correction_bias=None,
    *,
    scoring="softmax",
    renormalize="divide",
    renormalize_min=0.0,
    scaling_factor=1.0,
    groups=1,
    topk_groups=1,
):
    return _route(
        logits,
        top_k,
        correction_bias=correction_bias,
        scoring=scoring,
        renormalize=renormalize,
        renormalize_min=renormalize_min,
        scaling_factor=scaling_factor,
        groups=groups,
        topk_groups=topk_groups,
    )


def _grouped_gemm_op(
    a,
    number,
    n,
    index,
    a_scale=None,
    a_q=None,
    a_zero=None,
    bias=None,
    *,
    masked=False,
    out_dtype=None,
):
    matrix = _lookup(number, PreparedMatrix)
    if matrix.shape[1] != n:
        raise InvalidArgument(f"n: expected the matrix's {matrix.shape[1]}, got {n}")
    workspace = None
    if a.is_cuda:
        size = matrix.workspace_bytes(a.shape[:-1].numel())
        workspace = torch.empty(size, dtype=torch.uint8, device=a.device)
    return _grouped_gemm(
        a,
        matrix,
        None if masked else index,
        rows_per_expert=index if masked else None,
        a_scale=a_scale,
        a_q=a_q,
        a_zero=a_zero,
        bias=bias,
        out_dtype=torch.bfloat16 if out_dtype is None else out_dtype,
        workspace=workspace,
    )


def _fake_fused_moe(x, number, topk_weights, topk_ids, *, out_dtype=None):
    torch._check(x.dim() == 2, lambda: f"x: expected [T, H], got {list(x.shape)}")
    return x.new_empty(x.shape, dtype=out_dtype or x.dtype)


def _fake_route(logits, top_k, correction_bias=None, **_):
    torch._check(logits.dim() == 2, lambda: f"logits: expected [T, E], got {list(logits.shape)}")
    size = (logits.shape[0], top_k)
    weights = logits.new_empty(size, dtype=torch.float32)
    return weights, logits.new_empty(size, dtype=torch.int32)


def _fake_grouped_gemm(a, number, n, index, *_, out_dtype=None, **__):
    return a.new_empty((*a.shape[:-1], n), dtype=out_dtype or torch.bfloat16)


class _NoGradient(torch.autograd.Function):
    """Runs an operator on tensors that require gradients; to ask for one is an error."""

    @staticmethod
    def forward(ctx, run, *tensors):
        return run()

    @staticmethod
    def backward(ctx, *grads):
        raise NotImplementedError("OctoMoE's operators have no gradients: they are for inference")


# Dispatch keys of an ordinary call: no mode, transform, subclass, tracer between it and the kernel.
_ORDINARY = (
    torch._C._dispatch_keys(torch.empty(0))
    | torch._C.DispatchKeySet(torch._C.DispatchKey.CUDA)
    | torch._C.DispatchKeySet(torch._C.DispatchKey.AutocastCUDA)
).raw_repr()


def _autograd_kernel(operator, kernel):
    """What autograd runs: the kernel itself where nothing else wants to see the call.

    torch.library.register_autograd would dispatch every call through Python a second time, which
    costs as much as the rest of the call.
    """

    def call(keyset, *args, **kwargs):
        wants_gradient = torch._C._any_requires_grad(*args)  # no keyword is a tensor
        if not wants_gradient and not keyset.raw_repr() & ~_ORDINARY:
            return kernel(*args, **kwargs)

        def below():
            with torch._C._AutoDispatchBelowAutograd():
                rest = keyset & torch._C._after_autograd_keyset
                return operator.redispatch(rest, *args, **kwargs)

        if not wants_gradient or not torch.is_grad_enabled():
            return below()
        return _NoGradient.apply(below, *args)

    return call


for _name, _kernel, _fake in (
    ("fused_moe", _fused_moe_op, _fake_fused_moe),
    ("route", _route_op, _fake_route),
    ("grouped_gemm", _grouped_gemm_op, _fake_grouped_gemm),
):
    _library.impl(_name, _kernel, "CPU")
    _library.impl(_name, _kernel, "CUDA")
    torch.library.register_fake(f"octomoe::{_name}", _fake, lib=_library)
    _operator = getattr(torch.ops.octomoe, _name).default
    _library.impl(_name, _autograd_kernel(_operator, _kernel), "Autograd", with_keyset=True)

_fused_moe = torch.ops.octomoe.fused_moe.default


def fused_moe(
    x: torch.Tensor,
    weights: MoeWeights | MoeLayer | torch.Tensor,
    topk_weights: torch.Tensor,
    topk_ids: torch.Tensor,
    *,
    out_dtype: torch.dtype | None = None,
) -> torch.Tensor:
    """A whole MoE layer: x [T, H], topk_weights float32 [T, k], topk_ids int32/int64 [T, k].

    `weights` may be a handle: inside torch.compile take it outside of the compiled code
    (:func:`handle`), or use :class:`FusedMoe`.
    """
    number = weights if isinstance(weights, torch.Tensor) else handle(weights, str(x.device))
    return torch.ops.octomoe.fused_moe(x, number, topk_weights, topk_ids, out_dtype=out_dtype)


def route(
    logits: torch.Tensor,
    top_k: int,
    *,
    correction_bias: torch.Tensor | None = None,
    options: RouteOptions | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """(topk_weights float32 [T, k], topk_ids int32 [T, k]) of logits [T, E]."""
    o = options or RouteOptions()
    renormalize = {True: "divide", False: "none"}.get(o.renormalize, o.renormalize)
    return torch.ops.octomoe.route(
        logits,
        top_k,
        correction_bias,
        scoring=o.scoring,
        renormalize=renormalize,
        renormalize_min=o.renormalize_min,
        scaling_factor=o.scaling_factor,
        groups=o.groups,
        topk_groups=o.topk_groups,
    )


def grouped_gemm(
    a: torch.Tensor,
    matrix: PreparedMatrix,
    expert_offsets: torch.Tensor | None = None,
    *,
    rows_per_expert: torch.Tensor | None = None,
    a_scale: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    out_dtype: torch.dtype | None = None,
) -> torch.Tensor:
    """``a[r] @ matrix[expert of r].T``: see :func:`octomoe.grouped_gemm`."""
    if (expert_offsets is None) == (rows_per_expert is None):
        raise InvalidArgument("expert_offsets: give it or rows_per_expert, and not both")
    masked = rows_per_expert is not None
    return torch.ops.octomoe.grouped_gemm(
        a,
        handle(matrix),
        matrix.shape[1],
        rows_per_expert if masked else expert_offsets,
        a_scale,
        bias=bias,
        masked=masked,
        out_dtype=out_dtype,
    )


class FusedMoe(torch.nn.Module):
    """A module around the weights of one MoE layer, for torch.compile and Hugging Face models.

    Args:
        weights: MoeWeights, or a MoeLayer made with other options.
        device: of the layer that is made of MoeWeights.

    The layer is not a parameter: it is neither moved by ``.to()`` nor part of the state dict.
    """

    def __init__(self, weights: MoeWeights | MoeLayer, device: str = "cpu") -> None:
        super().__init__()
        self.layer = (
            MoeLayer(weights, device=device) if isinstance(weights, MoeWeights) else weights
        )
        self.number = handle(self.layer)  # a plain attribute: `.to()` and `.half()` leave it alone

    def forward(
        self, x: torch.Tensor, topk_weights: torch.Tensor, topk_ids: torch.Tensor
    ) -> torch.Tensor:
        """x [T, H] -> [T, H]."""
        return _fused_moe(x, self.number, topk_weights, topk_ids)

    def extra_repr(self) -> str:
        layer = self.layer
        return (
            f"{layer.scheme}, experts={layer.experts}, hidden={layer.hidden}, "
            f"intermediate={layer.intermediate}"
        )
