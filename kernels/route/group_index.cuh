// What a caller's group index and scales become before a grouped GEMM reads them.
#pragma once

#include "core/args.h"
#include "ptx/grid.cuh"

namespace octomoe::kernels {

inline constexpr int kGroupIndexThreads = 1024;

__device__ __forceinline__ int32_t clamped_index(const GroupIndexArgs& args, int32_t i) {
  const int64_t v = args.is_64 ? static_cast<const int64_t*>(args.index)[i]
                               : static_cast<int64_t>(static_cast<const int32_t*>(args.index)[i]);
  return static_cast<int32_t>(v < 0 ? 0 : v > args.rows ? args.rows : v);
}

// One CTA; experts <= kGroupIndexThreads. A wrong index costs wrong rows, never a write outside.
__device__ __forceinline__ void group_index(const GroupIndexArgs& args) {
  __shared__ int32_t top[2][kGroupIndexThreads];
  const int32_t e = static_cast<int32_t>(threadIdx.x);
  ptx::grid_dependency_wait();
  ptx::grid_dependency_launch();
  if (e < kTakenWords) args.offsets[args.experts + 1 + e] = 0;
  const int32_t at = args.masked ? e : e + 1;
  const int32_t v = e < args.experts ? clamped_index(args, at) : 0;
  if (args.masked) {
    if (e < args.experts) args.offsets[e] = v;
    return;
  }
  // Running maximum: offsets that do not decrease.
  int from = 0;
  top[0][e] = v;
  __syncthreads();
  for (int d = 1; d < kGroupIndexThreads; d *= 2, from ^= 1) {
    top[from ^ 1][e] = e >= d ? max(top[from][e], top[from][e - d]) : top[from][e];
    __syncthreads();
  }
  if (e == 0) args.offsets[0] = 0;
  if (e < args.experts) args.offsets[e + 1] = top[from][e];
}

inline constexpr int kTransposeThreads = 256;

__device__ __forceinline__ void transpose_scales(const TransposeScalesArgs& args) {
  ptx::grid_dependency_wait();
  ptx::grid_dependency_launch();
  const int64_t step = static_cast<int64_t>(gridDim.x) * kTransposeThreads;
  const int64_t begin = static_cast<int64_t>(blockIdx.x) * kTransposeThreads + threadIdx.x;
  for (int64_t i = begin; args.scale != nullptr && i < args.rows * args.columns; i += step) {
    args.scale_out[i] = args.broadcast ? *args.scale : args.scale[i % args.rows * args.columns + i / args.rows];
  }
  for (int64_t i = begin; args.q != nullptr && i < args.rows * args.q_columns; i += step) {
    args.q_out[i] = args.q[i % args.rows * args.q_columns + i / args.rows];
  }
}

inline constexpr int kGatherThreads = 256;

// One CTA a row at a time.
__device__ __forceinline__ void gather_rows(const GatherRowsArgs& args) {
  ptx::grid_dependency_wait();
  ptx::grid_dependency_launch();
  const int32_t rows = min(*args.row_count, args.rows), thread = static_cast<int32_t>(threadIdx.x);
  for (int64_t row = blockIdx.x; row < rows; row += gridDim.x) {
    const int64_t token = args.row_token[row];
    for (int32_t c = thread * 16; c < args.k; c += kGatherThreads * 16) {
      *reinterpret_cast<uint4*>(args.q_out + row * args.k + c) =
          *reinterpret_cast<const uint4*>(args.q + token * args.k + c);
    }
    for (int32_t b = thread; b < args.columns; b += kGatherThreads) {
      args.scale_out[static_cast<int64_t>(b) * args.rows + row] = args.scale[b * args.tokens + token];
    }
    for (int32_t b = thread; b < args.q_columns; b += kGatherThreads) {
      args.block_q_out[static_cast<int64_t>(b) * args.rows + row] = args.block_q[b * args.tokens + token];
    }
    if (args.zero != nullptr && thread == 0) args.zero_out[row] = args.zero[token];
  }
}

}  // namespace octomoe::kernels
