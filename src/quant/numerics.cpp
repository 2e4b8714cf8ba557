#include "quant/numerics.h"

namespace octomoe::num {

float fp16_to_float(std::uint16_t h) {
  const std::uint32_t sign = static_cast<std::uint32_t>(h & 0x8000u) << 16;
  const std::uint32_t exponent = (h >> 10) & 0x1fu;
  const std::uint32_t mantissa = h & 0x3ffu;
  if (exponent == 0x1f) return from_bits(sign | 0x7f800000u | (mantissa << 13));
  if (exponent != 0) return from_bits(sign | ((exponent + 112) << 23) | (mantissa << 13));
  const float magnitude = static_cast<float>(mantissa) * 0x1p-24f;
  return sign ? -magnitude : magnitude;
}

std::uint16_t float_to_fp16(float x) {
  if (is_nan(x)) return 0x7fff;
  const auto sign = static_cast<std::uint16_t>((bits(x) >> 16) & 0x8000u);
  const float a = std::fabs(x);
  if (a >= 65520.0f) return static_cast<std::uint16_t>(sign | 0x7c00u);
  if (a < 0x1p-14f) {  // subnormal: a multiple of 2^-24; a + 0.5 has that spacing, so the addition rounds it
    return static_cast<std::uint16_t>(sign | (bits(a + 0.5f) - bits(0.5f)));
  }
  const std::uint32_t b = bits(a);
  const std::uint32_t rounded = b + 0xfffu + ((b >> 13) & 1u);
  return static_cast<std::uint16_t>(sign | ((rounded >> 13) - (112u << 10)));
}

float e4m3_to_float(std::uint8_t v) {
  const std::uint32_t sign = static_cast<std::uint32_t>(v & 0x80u) << 24;
  const std::uint32_t exponent = (v >> 3) & 0xfu;
  const std::uint32_t mantissa = v & 7u;
  if (exponent == 0xf && mantissa == 7) return nan();
  if (exponent != 0) return from_bits(sign | ((exponent + 120) << 23) | (mantissa << 20));
  const float magnitude = static_cast<float>(mantissa) * 0x1p-9f;
  return sign ? -magnitude : magnitude;
}

std::uint8_t float_to_e4m3(float x) {
  if (is_nan(x)) return 0x7f;
  const auto sign = static_cast<std::uint8_t>((bits(x) >> 24) & 0x80u);
  const float a = std::fabs(x);
  if (a >= kE4m3Max) return static_cast<std::uint8_t>(sign | 0x7e);
  if (a < 0x1p-6f) {  // subnormal: a multiple of 2^-9; a + 2^14 has that spacing
    return static_cast<std::uint8_t>(sign | (bits(a + 0x1p14f) - bits(0x1p14f)));
  }
  const std::uint32_t b = bits(a);
  const std::uint32_t rounded = b + 0x7ffffu + ((b >> 20) & 1u);
  return static_cast<std::uint8_t>(sign | ((rounded >> 20) - (120u << 3)));
}

}  // namespace octomoe::num
