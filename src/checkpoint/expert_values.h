// The tensors of one projection, stacked over experts in the library's own layout.
#pragma once

#include <string>
#include <vector>

#include "checkpoint/tensor_store.h"

namespace octomoe::checkpoint {

// The tensors of one projection (w13: gate and up; w2: down) over all experts, in stacking order. One part is [n, k].
struct Parts {
  std::vector<std::string> names;  // without suffix
  std::int64_t segments = 1, n = 0, k = 0;
  std::int64_t experts() const { return static_cast<std::int64_t>(names.size()) / segments; }
};

// All of these expect tensors whose type and shape are already checked.
Tensor stack_bytes(const TensorStore& store, const Parts& p, const std::string& suffix, DType dtype, std::int64_t rows,
                   std::int64_t cols);  // [E, segments * rows, cols]
// Float scales of any float type, part behind part, as float32 of `shape`.
Tensor stack_float32(const TensorStore& store, const Parts& p, const std::string& suffix, Shape shape);
// int8 values in -8..7, one a byte -> int4x2 [E, segments * n, k / 2]. Error(format) if one is outside.
Tensor pack_int4(const TensorStore& store, const Parts& p);
// ".weight_packed" words of compressed-tensors: 8 values a word as value + 8, the first lowest -> int4x2.
Tensor unpack_int4_words(const TensorStore& store, const Parts& p);
// F8_E4M3 ".weight" times ".weight_scale_inv" of 128 x 128 blocks -> bf16 [E, segments * n, k].
Tensor dequantize_fp8_blocks(const TensorStore& store, const Parts& p);

inline constexpr std::int64_t kFp8Block = 128;

}  // namespace octomoe::checkpoint
