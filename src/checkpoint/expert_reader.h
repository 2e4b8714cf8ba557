// One MLP stack (the experts of a layer, or its shared expert) from the tensors of any supported format.
#pragma once

#include <string>
#include <vector>

#include "checkpoint/tensor_store.h"
#include "octomoe/checkpoint.h"

namespace octomoe::checkpoint {

// E gated MLPs with separate tensors: PREFIX + gate + ".weight" and so on.
struct MlpNames {
  std::vector<std::string> prefixes;  // one an expert, each ends in "."
  std::string gate, up, down;
};
struct MlpSizes {
  std::int64_t hidden, intermediate;
};

// In the format of `config`, or bf16/fp16 where the tensors are float (a module that the checkpoint's ignore list
// names). F8_E4M3 with 128x128 block scales (the shared experts of W4AFP8 checkpoints) becomes bf16. `what` names the
// stack in errors.
MoeWeights read_mlp(const TensorStore& store, const ModelConfig& config, const MlpNames& names, const MlpSizes& sizes,
                    const std::string& what);

// Experts [first, first + count) of fused float tensors gate_up [E, 2I, H] and down [E, H, I]: used where they lie,
// float32 is rounded to bf16.
MoeWeights read_fused_mlp(const TensorStore& store, const ModelConfig& config, const std::string& gate_up,
                          const std::string& down, std::int64_t first, std::int64_t count, const std::string& what);

// Error(format) unless the tensor is there with one of these types (names of the file format) and one of these shapes.
void expect_tensor(const TensorStore& store, const std::string& name, const std::vector<std::string>& dtypes,
                   const std::vector<std::vector<std::int64_t>>& shapes);
// Error(format) that names the first few and counts all; nothing if `names` are all there.
void expect_present(const TensorStore& store, const std::vector<std::string>& names, const std::string& what);

bool is_float_dtype(const std::string& dtype_name);                                   // F32, F16, BF16
Tensor read_float32(const TensorStore& store, const std::string& name, Shape shape);  // any float type, same elements

}  // namespace octomoe::checkpoint
