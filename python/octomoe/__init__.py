"""OctoMoE: Mixture-of-Experts layers and grouped GEMMs in INT8, INT4 x FP8 and bfloat16.

    import octomoe

    weights = octomoe.quantize(w13, w2, scheme="int8_channel")
    topk_weights, topk_ids = octomoe.route(logits, top_k=8)
    y = octomoe.fused_moe(x, weights, topk_weights, topk_ids)

Tensors are anything with DLPack: PyTorch, NumPy (bfloat16 through ml_dtypes), JAX. A result is of
the framework of the first tensor. Calls release the interpreter lock. Every error is an
:class:`octomoe.Error`. ``octomoe.torch`` has custom operators for torch.compile,
``octomoe.transformers`` puts the layers into a Hugging Face model.
"""

from octomoe._info import bench_overhead, command_path, doctor
from octomoe._native import (
    CudaError,
    Error,
    FileError,
    FormatError,
    InternalError,
    InvalidArgument,
    OutOfMemory,
    Unsupported,
    lib,
)
from octomoe.checkpoint import (
    Checkpoint,
    CheckpointLayer,
    ModelConfig,
    load_checkpoint,
    quantize_checkpoint,
)
from octomoe.gemm import PreparedMatrix, expert_offsets, grouped_gemm
from octomoe.layer import MoeLayer, RouteOptions, fused_moe, route
from octomoe.weights import (
    MoeWeights,
    QuantizedMatrix,
    canonical_scheme,
    quantize,
    quantize_matrix,
    schemes,
)

__version__ = str(lib.version())

__all__ = [
    "Checkpoint",
    "CheckpointLayer",
    "CudaError",
    "Error",
    "FileError",
    "FormatError",
    "InternalError",
    "InvalidArgument",
    "ModelConfig",
    "MoeLayer",
    "MoeWeights",
    "OutOfMemory",
    "PreparedMatrix",
    "QuantizedMatrix",
    "RouteOptions",
    "Unsupported",
    "__version__",
    "bench_overhead",
    "canonical_scheme",
    "command_path",
    "doctor",
    "expert_offsets",
    "fused_moe",
    "grouped_gemm",
    "load_checkpoint",
    "quantize",
    "quantize_checkpoint",
    "quantize_matrix",
    "route",
    "schemes",
]
