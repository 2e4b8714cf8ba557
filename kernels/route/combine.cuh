// Rows of the experts -> out [T, H]: float32, in slot order, one rounding (docs/schemes.md section 4).
#pragma once

#include "core/gemm_config.h"
#include "core/numerics.cuh"
#include "ptx/grid.cuh"

namespace octomoe::kernels {

struct CombineArgs {
  const void* y;  // [R, H] bf16 or fp16
  int32_t y_is_fp16;
  const int32_t* route_row;   // [T, k], -1 = skipped
  const float* topk_weights;  // [T, k], row stride in elements; null: 1 each
  int64_t weights_stride;
  const void* shared_y;        // [T, H] or null
  const float* shared_weight;  // [T] or null: 1
  void* out;                   // [T, H]
  int64_t out_stride;
  OutType out_type;
  int32_t accumulate;
  int32_t tokens, top_k, hidden;
};

inline constexpr int kCombineThreads = 256;

__device__ __forceinline__ void load_row(const CombineArgs& args, const void* y, int64_t at, float (&v)[8]) {
  const uint4 p = *reinterpret_cast<const uint4*>(static_cast<const uint16_t*>(y) + at);
  const uint32_t w[4] = {p.x, p.y, p.z, p.w};
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    if (args.y_is_fp16) {
      v[2 * i] = num::fp16_to_float(static_cast<uint16_t>(w[i] & 0xffffu));
      v[2 * i + 1] = num::fp16_to_float(static_cast<uint16_t>(w[i] >> 16));
    } else {
      v[2 * i] = num::bf16_low(w[i]);
      v[2 * i + 1] = num::bf16_high(w[i]);
    }
  }
}

__device__ __forceinline__ float load_out(const CombineArgs& args, int64_t at) {
  if (args.out_type == OutType::f32) return static_cast<const float*>(args.out)[at];
  const uint16_t h = static_cast<const uint16_t*>(args.out)[at];
  return args.out_type == OutType::bf16 ? num::bf16_low(h) : num::fp16_to_float(h);
}

// A thread owns 8 columns of a token.
__device__ __forceinline__ void combine(const CombineArgs& args) {
  ptx::grid_dependency_wait();
  ptx::grid_dependency_launch();
  const int32_t per_token = args.hidden / 8;
  const int64_t all = static_cast<int64_t>(args.tokens) * per_token;
  for (int64_t i = static_cast<int64_t>(blockIdx.x) * kCombineThreads + threadIdx.x; i < all;
       i += static_cast<int64_t>(gridDim.x) * kCombineThreads) {
    const int32_t token = static_cast<int32_t>(i / per_token), column = static_cast<int32_t>(i % per_token) * 8;
    float sum[8] = {};
    bool first = true;
    const auto add = [&](float weight, const float(&y)[8]) {
#pragma unroll
      for (int c = 0; c < 8; ++c) sum[c] = first ? __fmul_rn(weight, y[c]) : __fmaf_rn(weight, y[c], sum[c]);
      first = false;
    };
    for (int32_t base = 0; base < args.top_k; base += 4) {  // four rows in flight
      int32_t row[4];
      float y[4][8];
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        row[j] = base + j < args.top_k ? args.route_row[static_cast<int64_t>(token) * args.top_k + base + j] : -1;
        if (row[j] >= 0) load_row(args, args.y, static_cast<int64_t>(row[j]) * args.hidden + column, y[j]);
      }
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        if (row[j] >= 0)
          add(args.topk_weights != nullptr ? args.topk_weights[token * args.weights_stride + base + j] : 1.0f, y[j]);
      }
    }
    if (args.shared_y != nullptr) {
      float y[8];
      load_row(args, args.shared_y, static_cast<int64_t>(token) * args.hidden + column, y);
      add(args.shared_weight != nullptr ? args.shared_weight[token] : 1.0f, y);
    }
    const int64_t at = token * args.out_stride + column;
#pragma unroll
    for (int c = 0; c < 8; c += 2) {
      float a = sum[c], b = sum[c + 1];
      if (args.accumulate) {
        a = __fadd_rn(load_out(args, at + c), a);
        b = __fadd_rn(load_out(args, at + c + 1), b);
      }
      // out's rows may start at any element: pairs are stored apart.
      if (args.out_type == OutType::f32) {
        static_cast<float*>(args.out)[at + c] = num::canonical(a);
        static_cast<float*>(args.out)[at + c + 1] = num::canonical(b);
      } else {
        const uint32_t pair = args.out_type == OutType::bf16 ? num::pack_bf16(a, b) : num::pack_fp16(a, b);
        static_cast<uint16_t*>(args.out)[at + c] = static_cast<uint16_t>(pair);
        static_cast<uint16_t*>(args.out)[at + c + 1] = static_cast<uint16_t>(pair >> 16);
      }
    }
  }
}

}  // namespace octomoe::kernels
