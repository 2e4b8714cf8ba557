// Rows of the experts -> out [T, H]: float32, in slot order, one rounding (docs/schemes.md section 4).
#pragma once

#include "core/args.h"
#include "core/numerics.cuh"
#include "ptx/grid.cuh"
#include "ptx/sm80.cuh"

namespace octomoe::kernels {

inline constexpr int kCombineThreads = 256;

inline constexpr int kCombineSlots = 8;  // rows that a thread has under way

// Of a token: the rows of some of its slots, -1 where there is none, and what multiplies them.
struct CombineSlots {
  int32_t row[kCombineSlots];
  float weight[kCombineSlots];

  __device__ __forceinline__ void load(const CombineArgs& args, int64_t token, int32_t first) {
#pragma unroll
    for (int j = 0; j < kCombineSlots; ++j) {
      const bool exists = first + j < args.top_k;
      row[j] = exists ? args.route_row[token * args.top_k + first + j] : -1;
      weight[j] =
          exists && args.topk_weights != nullptr ? args.topk_weights[token * args.weights_stride + first + j] : 1.0f;
    }
  }
};

__device__ __forceinline__ uint4 load_y(const uint16_t* y, int64_t at) {
  return *reinterpret_cast<const uint4*>(y + at);
}

__device__ __forceinline__ void load_out(const CombineArgs& args, int64_t at, float (&v)[8]) {
#pragma unroll
  for (int i = 0; i < 8; ++i) {
    if (args.out_type == OutType::f32) {
      v[i] = static_cast<const float*>(args.out)[at + i];
    } else {
      const uint16_t h = static_cast<const uint16_t*>(args.out)[at + i];
      v[i] = args.out_type == OutType::bf16 ? num::bf16_low(h) : num::fp16_to_float(h);
    }
  }
}

__device__ __forceinline__ void store_out(const CombineArgs& args, int64_t at, const float (&v)[8]) {
  if (args.out_type == OutType::f32) {
    float* out = static_cast<float*>(args.out) + at;
    float c[8];
#pragma unroll
    for (int i = 0; i < 8; ++i) c[i] = num::canonical(v[i]);
    if (args.out_aligned) {
      reinterpret_cast<float4*>(out)[0] = make_float4(c[0], c[1], c[2], c[3]);
      reinterpret_cast<float4*>(out)[1] = make_float4(c[4], c[5], c[6], c[7]);
    } else {
#pragma unroll
      for (int i = 0; i < 8; ++i) out[i] = c[i];
    }
    return;
  }
  uint16_t* out = static_cast<uint16_t*>(args.out) + at;
  uint32_t w[4];
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    w[i] = args.out_type == OutType::bf16 ? num::pack_bf16(v[2 * i], v[2 * i + 1])
                                          : num::pack_fp16(v[2 * i], v[2 * i + 1]);
  }
  if (args.out_aligned) {
    *reinterpret_cast<uint4*>(out) = make_uint4(w[0], w[1], w[2], w[3]);
  } else {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      out[2 * i] = static_cast<uint16_t>(w[i]);
      out[2 * i + 1] = static_cast<uint16_t>(w[i] >> 16);
    }
  }
}

// A thread owns 8 columns of a token.
__device__ __forceinline__ void combine(const CombineArgs& args) {
  const int32_t per_token = args.hidden / 8;
  const int64_t all = static_cast<int64_t>(args.tokens) * per_token;
  int64_t i = static_cast<int64_t>(blockIdx.x) * kCombineThreads + threadIdx.x;
  CombineSlots slots{};
  if (i < all) slots.load(args, i / per_token, 0);
  ptx::grid_dependency_wait();
  ptx::grid_dependency_launch();
  for (bool loaded = true; i < all; i += static_cast<int64_t>(gridDim.x) * kCombineThreads, loaded = false) {
    const int64_t token = i / per_token;
    const int32_t column = static_cast<int32_t>(i % per_token) * 8;
    float sum[8];
#pragma unroll
    for (float& v : sum) v = -0.0f;  // changes no product that is added to it
    bool any = args.shared_y != nullptr;
    const auto add = [&](float weight, const uint4& p) {
      const uint32_t w[4] = {p.x, p.y, p.z, p.w};
#pragma unroll
      for (int c = 0; c < 8; ++c) {
        sum[c] = __fmaf_rn(weight, c % 2 ? num::bf16_high(w[c / 2]) : num::bf16_low(w[c / 2]), sum[c]);
      }
    };
    for (int32_t base = 0; base < args.top_k; base += kCombineSlots) {
      if (!loaded || base > 0) slots.load(args, token, base);
      const auto place = [&](int j) { return static_cast<int64_t>(slots.row[j]) * args.hidden + column; };
      uint4 y[kCombineSlots];
      bool holes = false;  // slots that are skipped
#pragma unroll
      for (int j = 0; j < kCombineSlots; ++j) {
        const bool exists = slots.row[j] >= 0;
        if (exists) y[j] = load_y(args.y, place(j));
        any |= exists;
        holes |= !exists && base + j < args.top_k;
      }
      if (!holes) {
#pragma unroll
        for (int j = 0; j < kCombineSlots; ++j) {
          if (base + j < args.top_k) add(slots.weight[j], y[j]);
        }
      } else {
#pragma unroll
        for (int j = 0; j < kCombineSlots; ++j) {
          if (slots.row[j] >= 0) add(slots.weight[j], y[j]);
        }
      }
      if (args.read_once != 0) {
        __syncwarp();  // eight lanes have read a line
#pragma unroll
        for (int j = 0; j < kCombineSlots; ++j) {
          ptx::discard_line(slots.row[j] >= 0 && column % 64 == 0, args.y + place(j));
        }
      }
    }
    if (args.shared_y != nullptr) {
      add(args.shared_weight != nullptr ? args.shared_weight[token] : 1.0f,
          load_y(args.shared_y, token * args.hidden + column));
    }
#pragma unroll
    for (float& v : sum) v = any ? v : 0.0f;
    const int64_t at = token * args.out_stride + column;
    if (args.accumulate) {
      float old[8];
      load_out(args, at, old);
#pragma unroll
      for (int c = 0; c < 8; ++c) sum[c] = __fadd_rn(old[c], sum[c]);
    }
    store_out(args, at, sum);
  }
}

}  // namespace octomoe::kernels
