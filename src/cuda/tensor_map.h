// The tensor maps through which the SM90 family reads a stack of weights, and rows of tokens, where they lie.
#pragma once

#include <cstdint>

#include "core/tensor_map.h"

namespace octomoe::cuda {

// How a tensor lies, and its boxes, from the fastest dimension; sizes of 1 behind its last.
struct TensorBoxes {
  unsigned dimensions;
  std::uint64_t sizes[5], strides[4];  // strides in bytes, of all dimensions but the first
  std::uint32_t box[5];
};
TensorBoxes weight_boxes(std::int64_t experts, std::int64_t n, std::int64_t k, bool gated);
// w: int8 [experts, n, k], 16-byte aligned, k a multiple of 16. A box of the map is 128 rows by 128 columns in the
// order that kernels/sm90/grouped_gemm.cuh describes: n a multiple of 32; gated: of w13, n / 2 a multiple of 16. Panels
// [experts, k/128, n, 128] are experts * k/128 stacks of 128 columns.
kernels::TensorMap weight_map(const void* w, std::int64_t experts, std::int64_t n, std::int64_t k, bool gated);

// The same for kernels/sm90/token_major.cuh: boxes of box_rows rows by 128 columns; n a multiple of 32, gated n / 2.
TensorBoxes token_major_weight_boxes(std::int64_t experts, std::int64_t n, std::int64_t k, int box_rows);
kernels::TensorMap token_major_weight_map(const void* w, std::int64_t experts, std::int64_t n, std::int64_t k,
                                          int box_rows);

// a: int8 [rows, k], 16-byte aligned, k a multiple of 16. A box is box_rows rows by 128 columns.
TensorBoxes token_boxes(std::int64_t rows, std::int64_t k, int box_rows);
kernels::TensorMap token_map(const void* a, std::int64_t rows, std::int64_t k, int box_rows);

}  // namespace octomoe::cuda
