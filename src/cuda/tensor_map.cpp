#include "cuda/tensor_map.h"

#include <array>

#include "core/gemm_config.h"
#include "cuda/driver.h"
#include "tensor/check.h"

namespace octomoe::cuda {

TensorBoxes weight_boxes(std::int64_t experts, std::int64_t n, std::int64_t k, bool gated) {
  // From the fastest dimension: columns; row g, h, w (on through all experts) and b of a box, whose shared row is
  // 64b + 16w + 8h + g. Sizes keep the last expert's boxes inside w: what lies behind arrives as zeros.
  const std::uint64_t rows = static_cast<std::uint64_t>(experts * n), columns = static_cast<std::uint64_t>(k);
  const std::uint64_t half = static_cast<std::uint64_t>(n) / 2;
  return {5,
          {columns, 8, 2, gated ? (rows - half) / 16 : rows / 32, 2},
          {(gated ? 2 : 4) * columns, columns, (gated ? 16 : 32) * columns, gated ? half * columns : 2 * columns},
          {128, 8, 2, 4, 2}};
}

TensorBoxes token_major_weight_boxes(std::int64_t experts, std::int64_t n, std::int64_t k, int box_rows) {
  // Columns; row e, q and j of 32, whose shared row is 8j + 2q + e; and the runs of 32.
  const std::uint64_t columns = static_cast<std::uint64_t>(k);
  return {5,
          {columns, 2, 4, 4, static_cast<std::uint64_t>(experts * n) / 32},
          {columns, 8 * columns, 2 * columns, 32 * columns},
          {128, 2, 4, 4, static_cast<std::uint32_t>(box_rows) / 32}};
}

TensorBoxes token_boxes(std::int64_t rows, std::int64_t k, int box_rows) {
  const std::uint64_t columns = static_cast<std::uint64_t>(k), all = static_cast<std::uint64_t>(rows) * columns;
  return {2,
          {columns, static_cast<std::uint64_t>(rows), 1, 1, 1},
          {columns, all, all, all},
          {128, static_cast<std::uint32_t>(box_rows), 1, 1, 1}};
}

namespace {

kernels::TensorMap encode(const void* base, const TensorBoxes& boxes) {
  if (!driver().cuTensorMapEncodeTiled) {
    fail(ErrorCode::unsupported,
         "the driver (CUDA {}.{}) has no cuTensorMapEncodeTiled: a driver of CUDA 12.0 or "
         "newer is needed",
         driver().version / 1000, driver().version % 1000 / 10);
  }
  const std::uint32_t steps[] = {1, 1, 1, 1, 1};
  constexpr int kUint8 = 0, kNoInterleave = 0, kSwizzle128 = 3, kPromote256 = 3, kFillZeros = 0;
  kernels::TensorMap map;
  OCTOMOE_CUDA(cuTensorMapEncodeTiled, reinterpret_cast<CuTensorMap*>(&map), kUint8, boxes.dimensions,
               const_cast<void*>(base), boxes.sizes, boxes.strides, boxes.box, steps, kNoInterleave, kSwizzle128,
               kPromote256, kFillZeros);
  return map;
}

}  // namespace

kernels::TensorMap weight_map(const void* w, std::int64_t experts, std::int64_t n, std::int64_t k, bool gated) {
  return encode(w, weight_boxes(experts, n, k, gated));
}
kernels::TensorMap token_major_weight_map(const void* w, std::int64_t experts, std::int64_t n, std::int64_t k,
                                          int box_rows) {
  return encode(w, token_major_weight_boxes(experts, n, k, box_rows));
}
kernels::TensorMap token_map(const void* a, std::int64_t rows, std::int64_t k, int box_rows) {
  // A layer asks for the same map in every call (its rows of h lie in its workspace): no driver call on that path.
  struct Known {
    const void* a = nullptr;
    std::int64_t rows = 0, k = 0;
    int box_rows = 0;
    kernels::TensorMap map;
  };
  thread_local std::array<Known, 8> known;
  thread_local std::size_t oldest = 0;
  for (const Known& m : known) {
    if (m.a == a && m.rows == rows && m.k == k && m.box_rows == box_rows) return m.map;
  }
  const kernels::TensorMap map = encode(a, token_boxes(rows, k, box_rows));
  known[oldest++ % known.size()] = {a, rows, k, box_rows, map};
  return map;
}

}  // namespace octomoe::cuda
