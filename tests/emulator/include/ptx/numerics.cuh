// Stands for kernels/ptx/numerics.cuh.
#pragma once

#include <bit>
#include <cmath>
#include <cstdint>

namespace octomoe::ptx {

inline float min_nan(float a, float b) { return a != a || b != b ? std::bit_cast<float>(0x7fffffffu) : fminf(a, b); }
inline float max_nan(float a, float b) { return a != a || b != b ? std::bit_cast<float>(0x7fffffffu) : fmaxf(a, b); }

inline std::uint32_t to_bf16(float x) {
  if (x != x) return 0x7fff;
  const auto b = std::bit_cast<std::uint32_t>(x);
  return (b + 0x7fffu + (b >> 16 & 1u)) >> 16;
}
inline std::uint32_t to_fp16(float x) {
  if (x != x) return 0x7fff;
  const std::uint32_t sign = std::bit_cast<std::uint32_t>(x) >> 31 << 15;
  const double m = std::fabs(static_cast<double>(x));
  if (m >= 65520.0) return sign | 0x7c00u;
  // In units of the last place, whose exponent ends at the subnormals'. 1024 of them carry into the exponent field.
  const int exponent = m < 0x1p-14 ? -14 : std::ilogb(m);
  return sign | ((static_cast<std::uint32_t>(exponent + 14) << 10) +
                 static_cast<std::uint32_t>(std::nearbyint(std::ldexp(m, 10 - exponent))));
}
inline std::uint32_t to_bf16x2(float hi, float lo) { return to_bf16(hi) << 16 | to_bf16(lo); }
inline std::uint32_t to_fp16x2(float hi, float lo) { return to_fp16(hi) << 16 | to_fp16(lo); }
inline float from_fp16(std::uint16_t h) {
  const int exponent = h >> 10 & 31, mantissa = h & 1023;
  float m;
  if (exponent == 31) {
    m = std::bit_cast<float>(mantissa == 0 ? 0x7f800000u : 0x7fffffffu);
  } else {
    m = std::ldexp(static_cast<float>(exponent == 0 ? mantissa : mantissa + 1024), (exponent == 0 ? 1 : exponent) - 25);
  }
  return h >> 15 != 0 ? -m : m;
}

}  // namespace octomoe::ptx
