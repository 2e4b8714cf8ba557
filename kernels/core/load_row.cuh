// Eight neighbouring elements of a row of float32, fp16 or bf16, whatever the row's alignment.
#pragma once

#include "core/args.h"
#include "core/numerics.cuh"

namespace octomoe::kernels {

inline constexpr int kRowElems = 8;

__device__ __forceinline__ float load_elem(const RowView& x, int64_t at) {
  if (x.type == RowType::f32) return static_cast<const float*>(x.data)[at];
  const uint16_t h = static_cast<const uint16_t*>(x.data)[at];
  return x.type == RowType::bf16 ? num::bf16_low(h) : num::fp16_to_float(h);
}

// Eight of bf16 or fp16.
__device__ __forceinline__ void unpack_elems(RowType type, const uint4& raw, float (&v)[kRowElems]) {
  const uint32_t w[4] = {raw.x, raw.y, raw.z, raw.w};
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    if (type == RowType::bf16) {
      v[2 * i] = num::bf16_low(w[i]);
      v[2 * i + 1] = num::bf16_high(w[i]);
    } else {
      v[2 * i] = num::fp16_to_float(static_cast<uint16_t>(w[i] & 0xffffu));
      v[2 * i + 1] = num::fp16_to_float(static_cast<uint16_t>(w[i] >> 16));
    }
  }
}

// Columns [column, column + 8) of a row.
__device__ __forceinline__ void load_elems(const RowView& x, int64_t row, int32_t column, float (&v)[kRowElems]) {
  const int64_t at = row * x.stride + column;
  if (!x.aligned) {
#pragma unroll
    for (int i = 0; i < kRowElems; ++i) v[i] = load_elem(x, at + i);
  } else if (x.type == RowType::f32) {
    const float4* p = reinterpret_cast<const float4*>(static_cast<const float*>(x.data) + at);
    const float4 a = p[0], b = p[1];
    v[0] = a.x;
    v[1] = a.y;
    v[2] = a.z;
    v[3] = a.w;
    v[4] = b.x;
    v[5] = b.y;
    v[6] = b.z;
    v[7] = b.w;
  } else {
    unpack_elems(x.type, *reinterpret_cast<const uint4*>(static_cast<const uint16_t*>(x.data) + at), v);
  }
}

}  // namespace octomoe::kernels
