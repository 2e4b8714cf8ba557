// sigmoid(x . gate): 256 partial sums in column order, then a tree (docs/schemes.md section 4). One CTA a token.
#pragma once

#include "core/load_row.cuh"
#include "ptx/grid.cuh"

namespace octomoe::kernels {

inline constexpr int kSharedGateThreads = 256;

__device__ __forceinline__ void shared_gate(const SharedGateArgs& args) {
  __shared__ float sums[kSharedGateThreads];
  ptx::grid_dependency_wait();
  ptx::grid_dependency_launch();
  for (int64_t token = blockIdx.x; token < args.tokens; token += gridDim.x) {
    float s = 0.0f;
    for (int32_t c = static_cast<int32_t>(threadIdx.x); c < args.hidden; c += kSharedGateThreads) {
      s = __fmaf_rn(load_elem(args.x, token * args.x.stride + c), args.gate[c], s);
    }
    sums[threadIdx.x] = s;
    __syncthreads();
    for (int w = kSharedGateThreads / 2; w > 0; w /= 2) {
      if (static_cast<int>(threadIdx.x) < w) {
        sums[threadIdx.x] = __fadd_rn(sums[threadIdx.x], sums[threadIdx.x + w]);
      }
      __syncthreads();
    }
    if (threadIdx.x == 0) args.weight[token] = num::sigmoid(sums[0]);
    __syncthreads();
  }
}

}  // namespace octomoe::kernels
