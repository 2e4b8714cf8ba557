// Row operations with runtime dispatch over instruction sets; each equals the scalar step of quant/numerics.h bit for
// bit.
#pragma once

#include <cstdint>

#include "octomoe/tensor.h"

namespace octomoe::cpu {

// float32, float16 or bfloat16 -> float32 (exact).
void to_float(const void* src, DType dtype, std::int64_t n, float* dst);
// float32 -> float32, float16 or bfloat16, nearest even, canonical NaN.
void from_float(const float* src, std::int64_t n, DType dtype, void* dst);

// max over bits(x) & 0x7fffffff.
std::uint32_t absmax_bits(const float* x, std::int64_t n);
// min(0, min x), max(0, max x) of finite values.
void min_max(const float* x, std::int64_t n, float* lo, float* hi);

// clamp(rint(x * inverse) + zero, lo, hi); inverse == 0 stores 0.
void quantize_int8(const float* x, std::int64_t n, float inverse, std::int32_t zero, float lo, float hi,
                   std::int8_t* q);
// e4m3(x * inverse); inverse == 0 stores 0.
void quantize_e4m3(const float* x, std::int64_t n, float inverse, std::uint8_t* q);
void e4m3_to_float(const std::uint8_t* q, std::int64_t n, float* x);
void widen_int8(const std::int8_t* q, std::int64_t n, std::int16_t* x);

struct Int8Step {
  float inverse;
  std::int32_t zero;
  float lo, hi;
};

// out[i] = weight[0] * y[0][i], then fma over the other slots in order; added to out if `accumulate`; +0 without slots.
struct CombineArgs {
  const void* const* y = nullptr;
  const float* weight = nullptr;
  int count = 0;
  DType y_dtype = DType::bfloat16;
  std::int64_t n = 0;
  void* out = nullptr;
  DType out_dtype = DType::bfloat16;
  bool accumulate = false;
};
void combine(const CombineArgs& args);

// x . gate in the order of docs/schemes.md section 4: 256 partial sums, then a tree.
float gate_dot(const float* x, const float* gate, std::int64_t n);

}  // namespace octomoe::cpu
