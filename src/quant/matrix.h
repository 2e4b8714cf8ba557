// Shapes of the parts of a QuantizedMatrix, shared by the quantiser, the reference and the engines.
#pragma once

#include <cstdint>
#include <string>

#include "octomoe/weights.h"

namespace octomoe {

inline std::int64_t ceil_div(std::int64_t a, std::int64_t b) { return (a + b - 1) / b; }

// The sizes that follow from a scheme and [E, N, K].
struct MatrixLayout {
  std::int64_t blocks_n, blocks_k, super_groups, groups_k;
  DType value_dtype;
  Shape values, scale;  // scale has rank 0 if the scheme has none
};
MatrixLayout layout_of(const Scheme& scheme, std::int64_t experts, std::int64_t n, std::int64_t k, int segments);

// Error unless N and K suit the scheme: rows of a multiple of 16 bytes, K within the int32 bound.
void check_sizes(const Scheme& scheme, std::int64_t experts, std::int64_t n, std::int64_t k, int segments,
                 const std::string& name);

// float32, fp16 or bf16 of any of the accepted shapes -> contiguous float32 of `shape`; every value must be >= 0 and
// finite if `is_scale`.
Tensor to_float32(const TensorView& t, const std::string& name, const Shape& shape, bool is_scale);

// Columns per group of activations and weights along K: block_k, group_size, or all of K.
std::int64_t group_columns(const Scheme& scheme, std::int64_t k);

}  // namespace octomoe
