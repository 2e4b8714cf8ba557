// The float steps of docs/schemes.md on the device, the same operations in the same order as src/quant/numerics.h.
// Compiled with -fmad=false: an fma is written where one is meant.
#pragma once

#include "core/types.h"
#include "ptx/numerics.cuh"

namespace octomoe::num {

inline constexpr float kTiny = 0x1p-100f;
inline constexpr uint32_t kInfBits = 0x7f800000u;
inline constexpr uint32_t kNanBits = 0x7fffffffu;
inline constexpr float kInt8Max = 127.0f;

__device__ __forceinline__ uint32_t bits(float x) { return __float_as_uint(x); }
__device__ __forceinline__ float from_bits(uint32_t b) { return __uint_as_float(b); }
__device__ __forceinline__ float nan() { return from_bits(kNanBits); }
__device__ __forceinline__ uint32_t abs_bits(float x) { return bits(x) & 0x7fffffffu; }
__device__ __forceinline__ bool is_nan(float x) { return abs_bits(x) > kInfBits; }
__device__ __forceinline__ bool is_finite(float x) { return abs_bits(x) < kInfBits; }

// min and max that keep a NaN (sm_80), so that clamp(NaN) is NaN as on the host.
__device__ __forceinline__ float min_nan(float a, float b) { return ptx::min_nan(a, b); }
__device__ __forceinline__ float max_nan(float a, float b) { return ptx::max_nan(a, b); }
__device__ __forceinline__ float clamp(float x, float lo, float hi) { return min_nan(max_nan(x, lo), hi); }

__device__ __forceinline__ float exp2p_finite(float t) {  // |t| <= 126
  // 1.5 * 2^23 added and taken away rounds to the nearest even integer and leaves it in the low bits of the sum.
  const float shifted = __fadd_rn(t, 12582912.0f);
  const float f = __fsub_rn(t, __fsub_rn(shifted, 12582912.0f));
  float p = __fmaf_rn(0x1.5c08e6p-10f, f, 0x1.3d0c52p-7f);
  p = __fmaf_rn(p, f, 0x1.c6b6e4p-5f);
  p = __fmaf_rn(p, f, 0x1.ebf918p-3f);
  p = __fmaf_rn(p, f, 0x1.62e428p-1f);
  p = __fmaf_rn(p, f, 0x1.000002p+0f);
  return from_bits(bits(p) + (bits(shifted) << 23));
}
__device__ __forceinline__ float exp2p(float t) { return is_nan(t) ? nan() : exp2p_finite(t); }  // |t| <= 126 or NaN
__device__ __forceinline__ float exp(float x) { return exp2p(clamp(__fmul_rn(x, 0x1.715476p+0f), -126.0f, 126.0f)); }

__device__ __forceinline__ float rcp(float d) {  // d in [1, 2^127) or NaN
  const float r0 = from_bits(0x7ef31000u - bits(d));
  float t = __fmaf_rn(-d, r0, 1.0f);
  const float r1 = __fmaf_rn(r0, __fmaf_rn(t, t, t), r0);
  t = __fmaf_rn(-d, r1, 1.0f);
  return __fmaf_rn(r1, t, r1);
}
__device__ __forceinline__ float sigmoid(float x) { return rcp(__fadd_rn(1.0f, num::exp(-x))); }
// x * sigmoid(x). A NaN need not survive inside the sigmoid: the product with x keeps it.
__device__ __forceinline__ float silu(float x) {
  const float t = fminf(fmaxf(__fmul_rn(-x, 0x1.715476p+0f), -126.0f), 126.0f);
  return __fmul_rn(x, rcp(__fadd_rn(1.0f, exp2p_finite(t))));
}
__device__ __forceinline__ float gelu_tanh(float x) {
  const float d = __fmaf_rn(__fmul_rn(x, x), 0.044715f, 1.0f);
  return __fmul_rn(x, sigmoid(__fmul_rn(__fmul_rn(x, 1.5957691216f), d)));
}
__device__ __forceinline__ float gelu_erf(float x) {
  const float a = __fmul_rn(fabsf(x), 0.70710678f);
  const float t = rcp(__fmaf_rn(a, 0.3275911f, 1.0f));
  float q = __fmaf_rn(t, 1.061405429f, -1.453152027f);
  q = __fmaf_rn(q, t, 1.421413741f);
  q = __fmaf_rn(q, t, -0.284496736f);
  q = __fmaf_rn(q, t, 0.254829592f);
  const float tail = __fmul_rn(__fmul_rn(__fmul_rn(q, t), num::exp(-__fmul_rn(a, a))), 0.5f);
  return __fmul_rn(x, x < 0.0f ? tail : __fsub_rn(1.0f, tail));
}
__device__ __forceinline__ float relu(float x) { return x > 0.0f || is_nan(x) ? x : 0.0f; }

// ---- quantising ----
struct GroupScale {
  float scale, inverse;
};
__device__ __forceinline__ GroupScale symmetric_scale(uint32_t absmax, float limit) {
  if (absmax >= kInfBits) return {nan(), 0.0f};
  const float m = fmaxf(from_bits(absmax), kTiny);
  return {__fdiv_rn(m, limit), __fdiv_rn(limit, m)};
}
struct RowScale {
  float scale, inverse;
  int32_t zero;
};
__device__ __forceinline__ RowScale asymmetric_scale(float lo, float hi, bool finite) {
  const float range = __fsub_rn(hi, lo);
  if (!finite || !is_finite(range)) return {nan(), 0.0f, 0};
  const float g = fmaxf(range, kTiny);
  const float inverse = __fdiv_rn(255.0f, g);
  return {__fdiv_rn(g, 255.0f), inverse, __float2int_rn(__fmul_rn(-lo, inverse)) - 128};
}
struct SuperScale {
  float f, q_per_m;
};
__device__ __forceinline__ SuperScale super_scale(uint32_t absmax, int q_max) {
  if (absmax >= kInfBits) return {nan(), 0.0f};
  const float m = fmaxf(from_bits(absmax), kTiny);
  return {__fdiv_rn(m, __fmul_rn(kInt8Max, static_cast<float>(q_max))), __fdiv_rn(static_cast<float>(q_max), m)};
}
struct BlockScale {
  int32_t q;
  float inverse;
};
__device__ __forceinline__ BlockScale block_scale(const SuperScale& s, uint32_t absmax, int q_max) {
  if (s.q_per_m == 0.0f) return {1, 0.0f};
  const float q = fminf(fmaxf(ceilf(__fmul_rn(from_bits(absmax), s.q_per_m)), 1.0f), static_cast<float>(q_max));
  return {static_cast<int32_t>(q), __fdiv_rn(1.0f, __fmul_rn(q, s.f))};
}
__device__ __forceinline__ int32_t quantize(float x, float inverse, int32_t zero, float lo, float hi) {
  if (inverse == 0.0f) return 0;
  return static_cast<int32_t>(fminf(fmaxf(__fadd_rn(rintf(__fmul_rn(x, inverse)), static_cast<float>(zero)), lo), hi));
}

// quantize with inverse = 127 / m of a finite m that |x| does not exceed: nothing to clamp. In the low byte: 1.5 * 2^23
// added rounds to the nearest even integer and leaves it in the low bits of the sum.
__device__ __forceinline__ uint32_t quantize_within(float x, float inverse) {
  return bits(__fadd_rn(__fmul_rn(x, inverse), 12582912.0f));
}

// ---- conversions ----
// Two floats to packed bf16 (first in the low half), nearest even, NaN 0x7fff: what cvt does.
__device__ __forceinline__ uint32_t pack_bf16(float lo, float hi) { return ptx::to_bf16x2(hi, lo); }
__device__ __forceinline__ uint32_t pack_fp16(float lo, float hi) { return ptx::to_fp16x2(hi, lo); }
__device__ __forceinline__ float bf16_low(uint32_t pair) { return from_bits(pair << 16); }
__device__ __forceinline__ float bf16_high(uint32_t pair) { return from_bits(pair & 0xffff0000u); }
__device__ __forceinline__ float fp16_to_float(uint16_t h) { return ptx::from_fp16(h); }
__device__ __forceinline__ float canonical(float x) { return is_nan(x) ? nan() : x; }

}  // namespace octomoe::num
