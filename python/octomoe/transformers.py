"""Hugging Face models with OctoMoE's experts.

    model = AutoModelForCausalLM.from_pretrained(path)
    replaced = octomoe.transformers.replace_experts(model, "int8_channel")
    ...
    replaced.restore()                     # or: with replace_experts(...): ...

Works with every model whose experts module holds stacked weights, gate_up_proj [E, 2I, H] and
down_proj [E, H, I] (transformers 5: Qwen3-MoE, Qwen3.5-MoE, Mixtral, DeepSeek-V3, ERNIE 4.5), also
transposed, interleaved and with biases (GPT-OSS), or up_proj alone. The router stays as it is.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from octomoe import torch as octomoe_torch
from octomoe._native import InvalidArgument, Unsupported
from octomoe.layer import MoeLayer
from octomoe.weights import quantize

# transformers' act_fn, by class name, with and without a gate.
_GATED = {
    "SiLUActivation": "swiglu",
    "SiLU": "swiglu",
    "GELUActivation": "geglu_erf",
    "GELU": "geglu_erf",
    "GELUTanh": "geglu_tanh",
    "NewGELUActivation": "geglu_tanh",
    "PytorchGELUTanh": "geglu_tanh",
}
_UNGATED = {
    "SiLUActivation": "silu",
    "SiLU": "silu",
    "GELUActivation": "gelu_erf",
    "GELU": "gelu_erf",
    "GELUTanh": "gelu_tanh",
    "NewGELUActivation": "gelu_tanh",
    "PytorchGELUTanh": "gelu_tanh",
    "ReLU": "relu",
    "ReLUSquaredActivation": "relu2",
}


class Experts(torch.nn.Module):
    """Stands where a model's experts stood: same arguments, same result's shape and dtype."""

    def __init__(self, layer: MoeLayer, expert_parallel: bool = False) -> None:
        super().__init__()
        self.layer = layer
        self.num_experts = layer.experts
        self.number = octomoe_torch.handle(layer)
        self.expert_parallel = expert_parallel

    def forward(
        self,
        hidden_states: torch.Tensor,
        top_k_index: torch.Tensor,
        top_k_weights: torch.Tensor,
    ) -> torch.Tensor:
        """hidden_states [..., H], top_k_index and top_k_weights [T, k]; T: product of the dots."""
        x = hidden_states.reshape(-1, hidden_states.shape[-1])
        if self.expert_parallel:  # transformers marks the routes of other ranks by E
            top_k_index = top_k_index.masked_fill(top_k_index >= self.num_experts, -1)
        y = torch.ops.octomoe.fused_moe(x, self.number, top_k_weights.float(), top_k_index)
        return y.reshape(hidden_states.shape)

    def extra_repr(self) -> str:
        layer = self.layer
        return (
            f"octomoe {layer.scheme}, experts={layer.experts}, hidden={layer.hidden}, "
            f"intermediate={layer.intermediate}"
        )


class Replacement:
    """What :func:`replace_experts` did; a context manager that undoes it."""

    def __init__(self, model: torch.nn.Module) -> None:
        self.model = model
        self.scheme = ""
        self._places: list[tuple[torch.nn.Module, str, torch.nn.Module | None]] = []
        self._layers: list[MoeLayer] = []

    @property
    def count(self) -> int:
        """Experts modules that were replaced."""
        return len(self._places)

    @property
    def weight_bytes(self) -> int:
        """Bytes of the quantised expert weights of all layers."""
        return sum(layer.weight_bytes for layer in self._layers)

    def restore(self) -> None:
        """Put the model's own experts back. Raises Error if their float weights were freed."""
        if any(original is None for _, _, original in self._places):
            raise InvalidArgument("restore: the float weights were freed (keep_weights=False)")
        for parent, name, original in self._places:
            setattr(parent, name, original)
        self._places.clear()
        self._layers.clear()

    def __enter__(self) -> Replacement:
        return self

    def __exit__(self, *exc: object) -> None:
        if self._places:
            self.restore()

    def __repr__(self) -> str:
        return f"Replacement({self.count} layers, {self.scheme}, {self.weight_bytes / 1e6:.1f} MB)"


def _is_experts(module: torch.nn.Module) -> bool:
    first = getattr(module, "gate_up_proj", None)
    if first is None:
        first = getattr(module, "up_proj", None)
    second = getattr(module, "down_proj", None)
    stacked = (isinstance(t, torch.Tensor) and t.dim() == 3 for t in (first, second))
    return all(stacked)


def _find_experts(model: torch.nn.Module) -> Iterator[tuple[torch.nn.Module, str, torch.nn.Module]]:
    for parent in model.modules():
        for name, child in parent.named_children():
            if _is_experts(child):
                yield parent, name, child


def _describe(module: torch.nn.Module) -> dict[str, Any]:
    """Activation and weights of an experts module in OctoMoE's layout, w13 [E, 2I, H]."""
    kind = type(module).__name__
    gated = hasattr(module, "gate_up_proj")
    interleaved = not getattr(module, "is_concatenated", True)
    if getattr(module, "has_post_expert_norm", False):
        raise Unsupported(f"{kind}: has a norm after each expert")
    found: dict[str, Any] = {"swiglu_alpha": None, "swiglu_limit": None}
    gate = getattr(type(module), "_apply_gate", None)
    own_gate = gate is not None and gate.__module__ == type(module).__module__
    if own_gate:
        if not (interleaved and hasattr(module, "alpha") and hasattr(module, "limit")):
            raise Unsupported(f"{kind}: computes its activation in a way of its own")
        found |= {
            "activation": "swigluoai",
            "swiglu_alpha": float(module.alpha),
            "swiglu_limit": float(module.limit),
        }
    else:
        function = type(getattr(module, "act_fn", None)).__name__
        table = _GATED if gated else _UNGATED
        if function not in table:
            raise Unsupported(
                f"{kind}: expected an activation among {', '.join(table)}, got {function}"
            )
        found["activation"] = table[function]
    w13 = (module.gate_up_proj if gated else module.up_proj).detach()
    w2 = module.down_proj.detach()
    prefix = "gate_up_proj" if gated else "up_proj"
    b13, b2 = getattr(module, f"{prefix}_bias", None), getattr(module, "down_proj_bias", None)
    if getattr(module, "is_transposed", False):
        w13, w2 = w13.transpose(1, 2), w2.transpose(1, 2)
    if interleaved and gated:
        w13 = torch.cat((w13[:, 0::2], w13[:, 1::2]), 1)
        b13 = None if b13 is None else torch.cat((b13[:, 0::2], b13[:, 1::2]), 1)
    experts, hidden, intermediate = w2.shape
    expected = (experts, (2 if gated else 1) * intermediate, hidden)
    if tuple(w13.shape) != expected:
        raise Unsupported(
            f"{kind}: expected {prefix} {list(expected)} to fit down_proj {list(w2.shape)}, "
            f"got {list(w13.shape)}"
        )
    found |= {"w13": w13.contiguous(), "w2": w2.contiguous(), "b13": b13, "b2": b2}
    return found


def _make_layer(
    module: torch.nn.Module, scheme: str, threads: int, device: str | None, prepack: bool
) -> MoeLayer:
    found = _describe(module)
    weights = quantize(
        found["w13"],
        found["w2"],
        scheme,
        activation=found["activation"],
        b13=found["b13"],
        b2=found["b2"],
        threads=threads,
    )
    return MoeLayer(
        weights,
        device=device or str(module.down_proj.device),
        swiglu_alpha=found["swiglu_alpha"],
        swiglu_limit=found["swiglu_limit"],
        threads=threads,
        prepack=prepack,
    )


def replace_experts(
    model: torch.nn.Module,
    scheme: str = "int8_channel",
    *,
    device: str | None = None,
    keep_weights: bool = True,
    threads: int = 0,
    prepack: bool = False,
) -> Replacement:
    """Quantise the experts of a loaded model and let OctoMoE compute them.

    Args:
        model: a Hugging Face MoE model, float32, bfloat16 or float16, on the CPU or a GPU.
        scheme: see :func:`octomoe.schemes`.
        device: where the experts run: "cpu", "cuda:0", or None for that of each module's weights.
            The weights are quantised on the CPU.
        keep_weights: keep the float weights, so that :meth:`Replacement.restore` works. False frees
            each layer's as soon as it is quantised.
        threads: 0 = $OCTOMOE_NUM_THREADS, else all cores.
        prepack: on a GPU, put integer weights into panels: see :class:`octomoe.MoeLayer`.

    Returns:
        A :class:`Replacement`.

    Raises:
        InvalidArgument: the model has no experts module, or they are replaced already.
        Unsupported: an experts module computes something else. The model is then unchanged, unless
            keep_weights is False.
    """
    places = list(_find_experts(model))
    if not places:
        replaced = any(isinstance(module, Experts) for module in model.modules())
        reason = "its experts are replaced already" if replaced else "no module of stacked experts"
        raise InvalidArgument(f"model: {reason} ({type(model).__name__})")
    for place in places:  # refuse before anything changes
        where = place[2].down_proj.device
        if where.type not in ("cpu", "cuda"):
            raise Unsupported(f"model: expected weights on cpu or cuda, got {where}")
    result = Replacement(model)
    result.scheme = scheme
    places.reverse()
    try:
        while places:  # nothing here may hold on to a module that has been replaced
            parent, name, module = places.pop()
            layer = _make_layer(module, scheme, threads, device, prepack)
            parallel = bool(getattr(module, "_is_expert_parallel", False))
            setattr(parent, name, Experts(layer, parallel))
            result._layers.append(layer)
            result._places.append((parent, name, module if keep_weights else None))
            del module
    except Exception:
        if keep_weights:
            result.restore()
        raise
    return result
