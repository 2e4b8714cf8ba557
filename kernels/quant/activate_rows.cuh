// v [R, 2I] (gated) or [R, I] -> h bf16 [R, I], for every activation of docs/schemes.md section 6. SwiGLU normally
// happens in GEMM1's epilogue; this kernel serves the others, and shows what the fusion is worth.
#pragma once

#include "core/args.h"
#include "core/numerics.cuh"
#include "ptx/grid.cuh"

namespace octomoe::kernels {

inline constexpr int kActivateThreads = 256;

__device__ __forceinline__ float activate(const ActivateArgs& args, float g, float u) {
  const float limit = args.limit;
  switch (args.act) {
    case Act::swiglu:
      return __fmul_rn(num::silu(num::min_nan(g, limit)), num::clamp(u, -limit, limit));
    case Act::swigluoai:
      g = num::min_nan(g, limit);
      u = __fadd_rn(num::clamp(u, -limit, limit), 1.0f);
      return __fmul_rn(__fmul_rn(g, num::sigmoid(__fmul_rn(args.alpha, g))), u);
    case Act::geglu_tanh:
      return __fmul_rn(num::gelu_tanh(g), u);
    case Act::geglu_erf:
      return __fmul_rn(num::gelu_erf(g), u);
    case Act::silu:
      return num::silu(g);
    case Act::gelu_tanh:
      return num::gelu_tanh(g);
    case Act::gelu_erf:
      return num::gelu_erf(g);
    case Act::relu:
      return num::relu(g);
    case Act::relu2:
      return __fmul_rn(num::relu(g), num::relu(g));
    case Act::none:
      break;
  }
  return g;
}

// A thread owns four columns of a row.
__device__ __forceinline__ void activate_rows(const ActivateArgs& args) {
  ptx::grid_dependency_wait();
  ptx::grid_dependency_launch();
  const int32_t rows = min(*args.row_count, args.rows), per_row = args.width / 4;
  const int32_t in_width = args.gated ? 2 * args.width : args.width;
  const int64_t all = static_cast<int64_t>(rows) * per_row;
  for (int64_t i = static_cast<int64_t>(blockIdx.x) * kActivateThreads + threadIdx.x; i < all;
       i += static_cast<int64_t>(gridDim.x) * kActivateThreads) {
    const int64_t row = i / per_row;
    const int32_t column = static_cast<int32_t>(i % per_row) * 4;
    const float* v = args.v + row * in_width + column;
    const float4 first = *reinterpret_cast<const float4*>(v);
    const float4 second = args.gated ? *reinterpret_cast<const float4*>(v + args.width) : first;
    const float4 g = args.up_first ? second : first, u = args.up_first ? first : second;
    const float x = activate(args, g.x, u.x), y = activate(args, g.y, u.y);
    const float z = activate(args, g.z, u.z), w = activate(args, g.w, u.w);
    *reinterpret_cast<uint2*>(args.h + row * args.width + column) =
        make_uint2(num::pack_bf16(x, y), num::pack_bf16(z, w));
  }
}

}  // namespace octomoe::kernels
