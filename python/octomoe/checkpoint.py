"""Checkpoints of Hugging Face models: read layer by layer, quantise to a new folder."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Iterator
from typing import Any

from octomoe._native import lib
from octomoe._tensors import from_ffi
from octomoe.layer import MoeLayer, RouteOptions
from octomoe.weights import MoeWeights, quantize


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """What config.json says of the MoE layers."""

    model_type: str
    hidden: int
    intermediate: int
    experts: int
    layers: int
    top_k: int
    shared_intermediate: int
    shared_gate: bool
    activation: str
    has_correction_bias: bool
    format: str  # "none", "compressed_tensors", "block_int8", "channel_int8", "w4afp8", ...
    scheme: str  # of the stored weights
    route: RouteOptions


@dataclasses.dataclass
class CheckpointLayer:
    """One MoE layer of a checkpoint."""

    index: int
    experts: MoeWeights
    shared_expert: MoeWeights | None
    shared_gate: Any | None  # [H]
    router: Any | None  # [E, H], as stored
    correction_bias: Any | None  # float32 [E]

    def to(self, scheme: str) -> CheckpointLayer:
        """The same layer with its experts (and shared expert) quantised to `scheme`."""

        def convert(weights: MoeWeights | None) -> MoeWeights | None:
            if weights is None or weights.scheme == scheme:
                return weights
            w13, w2 = weights.dequantize()
            tensors = weights.tensors()
            return quantize(
                w13,
                w2,
                scheme,
                activation=weights.activation,
                gate_up_order=weights.gate_up_order,
                b13=tensors.get("b13"),
                b2=tensors.get("b2"),
            )

        return dataclasses.replace(
            self, experts=convert(self.experts), shared_expert=convert(self.shared_expert)
        )

    def moe_layer(self, **layer_options: Any) -> MoeLayer:
        """A MoeLayer of these weights with their shared expert; the arguments are MoeLayer's."""
        return MoeLayer(
            self.experts,
            shared_expert=self.shared_expert,
            shared_gate=self.shared_gate,
            **layer_options,
        )


class Checkpoint:
    """An open checkpoint: ``checkpoint[index]`` reads one MoE layer.

    Iterating yields every :class:`CheckpointLayer` in turn; ``len()`` counts them.
    """

    __slots__ = ("__weakref__", "_framework", "_handle", "config", "layers", "path")

    def __init__(self, path: str | os.PathLike[str], framework: str = "numpy") -> None:
        self.path = os.fspath(path)
        self._framework = framework
        self._handle = lib.open_checkpoint(self.path)
        fields = {str(k): v for k, v in lib.checkpoint_config(self._handle).items()}
        fields["route"] = RouteOptions(**{str(k): _plain(v) for k, v in fields["route"].items()})
        self.config = ModelConfig(**{name: _plain(value) for name, value in fields.items()})
        self.layers = [int(index) for index in lib.checkpoint_moe_layers(self._handle)]

    def layer(self, index: int, first_expert: int = 0, expert_count: int = -1) -> CheckpointLayer:
        """Read the MoE layer of decoder layer `index`, or a slice of its experts (-1 = all)."""
        parts = {
            str(k): v
            for k, v in lib.checkpoint_layer(
                self._handle, index, first_expert, expert_count
            ).items()
        }

        def tensor(name: str) -> Any | None:
            return from_ffi(parts[name], self._framework) if name in parts else None

        shared = parts.get("shared_expert")
        return CheckpointLayer(
            index=index,
            experts=MoeWeights(parts["experts"], self._framework),
            shared_expert=None if shared is None else MoeWeights(shared, self._framework),
            shared_gate=tensor("shared_gate"),
            router=tensor("router"),
            correction_bias=tensor("correction_bias"),
        )

    __getitem__ = layer

    def __len__(self) -> int:
        return len(self.layers)

    def __iter__(self) -> Iterator[CheckpointLayer]:
        return (self.layer(index) for index in self.layers)

    def __repr__(self) -> str:
        return f"Checkpoint({self.path!r}, {self.config.model_type}, {self.config.scheme})"


def _plain(value: Any) -> Any:
    return str(value) if isinstance(value, str) else value


def load_checkpoint(path: str | os.PathLike[str], *, framework: str = "numpy") -> Checkpoint:
    """Open a Hugging Face folder: bf16, fp16, or quantised in one of the published formats.

    Args:
        path: the folder with config.json and the .safetensors files.
        framework: "numpy" or "torch": of the router and other tensors that come with a layer.

    Raises:
        FileError, FormatError: names the missing file or tensor, or the unknown quant_method.
    """
    return Checkpoint(path, framework)


def quantize_checkpoint(
    source: str | os.PathLike[str],
    destination: str | os.PathLike[str],
    scheme: str = "int8_channel",
    *,
    max_shard_bytes: int = 5 << 30,
    threads: int = 0,
    overwrite: bool = False,
    progress: Callable[[int, int, str], None] | None = None,
) -> None:
    """Write `source` again with its expert weights in `scheme`, one tensor group at a time.

    Args:
        source: a folder of bf16, fp16 or float32 weights. destination: the folder to make.
        progress: called with (bytes done, bytes in all, name of the tensor); what it raises stops
            the work, leaves no destination and is raised here.
        overwrite: allow a destination that exists.

    Raises:
        FileError, FormatError, InvalidArgument.
    """
    raised: list[BaseException] = []
    named: dict[str, Any] = {
        "max_shard_bytes": max_shard_bytes,
        "threads": threads,
        "overwrite": overwrite,
    }
    if progress is not None:

        def report(done: int, total: int, name: str) -> None:
            try:
                progress(done, total, str(name))
            except BaseException as error:  # an interrupt too: it has to cross the library
                raised.append(error)
                raise

        named["progress"] = report
    try:
        lib.quantize_checkpoint(os.fspath(source), os.fspath(destination), scheme, named)
    except Exception:
        if raised:
            raise raised[0] from None
        raise
