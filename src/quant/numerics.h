// The float steps of docs/schemes.md section 1, 2 and 6, one scalar function each. The reference uses them as they
// stand; the vector code of the engines repeats the same operations in the same order.
#pragma once

#include <bit>
#include <cmath>
#include <cstdint>

namespace octomoe::num {

inline constexpr float kTiny = 0x1p-100f;
inline constexpr std::uint32_t kInfBits = 0x7f800000u;
inline constexpr std::uint32_t kNanBits = 0x7fffffffu;
inline constexpr float kInt8Max = 127.0f;
inline constexpr float kE4m3Max = 448.0f;

inline std::uint32_t bits(float x) { return std::bit_cast<std::uint32_t>(x); }
inline float from_bits(std::uint32_t b) { return std::bit_cast<float>(b); }
inline float nan() { return from_bits(kNanBits); }
inline std::uint32_t abs_bits(float x) { return bits(x) & 0x7fffffffu; }
inline bool is_nan(float x) { return abs_bits(x) > kInfBits; }
inline bool is_finite(float x) { return abs_bits(x) < kInfBits; }
inline float canonical(float x) { return is_nan(x) ? nan() : x; }

// Round to nearest even, independent of the caller's rounding mode setting only as far as that is the default one.
inline float rint(float x) { return std::nearbyint(x); }
// NaN stays NaN.
inline float clamp(float x, float lo, float hi) { return x < lo ? lo : (x > hi ? hi : x); }

// ---- bf16, fp16, E4M3 ----
inline float bf16_to_float(std::uint16_t h) { return from_bits(static_cast<std::uint32_t>(h) << 16); }
inline std::uint16_t float_to_bf16(float x) {
  if (is_nan(x)) return 0x7fff;
  const std::uint32_t b = bits(x);
  return static_cast<std::uint16_t>((b + 0x7fffu + ((b >> 16) & 1u)) >> 16);
}
float fp16_to_float(std::uint16_t h);
std::uint16_t float_to_fp16(float x);
float e4m3_to_float(std::uint8_t v);
std::uint8_t float_to_e4m3(float x);  // saturates at 448

// ---- exp, reciprocal, sigmoid ----
inline constexpr float kLog2e = 0x1.715476p+0f;
inline constexpr float kExp2Coef[6] = {0x1.000002p+0f, 0x1.62e428p-1f, 0x1.ebf918p-3f,
                                       0x1.c6b6e4p-5f, 0x1.3d0c52p-7f, 0x1.5c08e6p-10f};

inline float exp2p(float t) {  // |t| <= 126 or NaN
  if (is_nan(t)) return nan();
  const float n = rint(t);
  const float f = t - n;
  float p = kExp2Coef[5];
  for (int i = 4; i >= 0; --i) p = std::fma(p, f, kExp2Coef[i]);
  return from_bits(bits(p) + (static_cast<std::uint32_t>(static_cast<std::int32_t>(n)) << 23));
}
inline float exp(float x) { return exp2p(clamp(x * kLog2e, -126.0f, 126.0f)); }

inline float rcp(float d) {  // d in [1, 2^127) or NaN
  const float r0 = from_bits(0x7ef31000u - bits(d));
  float t = std::fma(-d, r0, 1.0f);
  const float r1 = std::fma(r0, std::fma(t, t, t), r0);
  t = std::fma(-d, r1, 1.0f);
  return std::fma(r1, t, r1);
}
inline float sigmoid(float x) { return rcp(1.0f + num::exp(-x)); }

// ---- activations ----
inline float silu(float x) { return x * sigmoid(x); }
inline float gelu_tanh(float x) {
  const float d = std::fma(x * x, 0.044715f, 1.0f);
  return x * sigmoid((x * 1.5957691216f) * d);
}
inline float gelu_erf(float x) {
  const float a = std::fabs(x) * 0.70710678f;
  const float t = rcp(std::fma(a, 0.3275911f, 1.0f));
  float q = std::fma(t, 1.061405429f, -1.453152027f);
  q = std::fma(q, t, 1.421413741f);
  q = std::fma(q, t, -0.284496736f);
  q = std::fma(q, t, 0.254829592f);
  const float tail = ((q * t) * num::exp(-(a * a))) * 0.5f;
  return x * (x < 0.0f ? tail : 1.0f - tail);
}
inline float relu(float x) { return x > 0.0f || is_nan(x) ? x : 0.0f; }

// ---- quantising ----
// A group's scale and the factor that its values are multiplied by, from absmax_bits of the group.
struct GroupScale {
  float scale;
  float inverse;  // 0 for a non-finite group
};
inline float raise_tiny(float m) { return m < kTiny ? kTiny : m; }

// limit = 127 (INT8), 7 (INT4), 448 (E4M3).
inline GroupScale symmetric_scale(std::uint32_t absmax_bits, float limit) {
  if (absmax_bits >= kInfBits) return {nan(), 0.0f};
  const float m = raise_tiny(from_bits(absmax_bits));
  return {m / limit, limit / m};
}

struct RowScale {
  float scale;
  float inverse;
  std::int32_t zero;
};
inline RowScale asymmetric_scale(float lo, float hi, bool finite) {  // lo <= 0 <= hi
  const float range = hi - lo;
  if (!finite || !is_finite(range)) return {nan(), 0.0f, 0};
  const float g = raise_tiny(range);
  const float inverse = 255.0f / g;
  return {g / 255.0f, inverse, static_cast<std::int32_t>(rint(-lo * inverse)) - 128};
}

// Hybrid: of one super group, from the absmax_bits over all of it.
struct SuperScale {
  float f;        // F
  float q_per_m;  // q_max / M; 0 for a non-finite super group
};
inline SuperScale super_scale(std::uint32_t absmax_bits, int q_max) {
  if (absmax_bits >= kInfBits) return {nan(), 0.0f};
  const float m = raise_tiny(from_bits(absmax_bits));
  return {m / (kInt8Max * static_cast<float>(q_max)), static_cast<float>(q_max) / m};
}
// Q of one block and the factor its values are multiplied by.
struct BlockScale {
  std::int32_t q;
  float inverse;
};
inline BlockScale block_scale(const SuperScale& s, std::uint32_t block_absmax_bits, int q_max) {
  if (s.q_per_m == 0.0f) return {1, 0.0f};
  const float q = clamp(std::ceil(from_bits(block_absmax_bits) * s.q_per_m), 1.0f, static_cast<float>(q_max));
  return {static_cast<std::int32_t>(q), 1.0f / (q * s.f)};
}

// x times the group's factor as an integer in [lo, hi]; a non-finite group (inverse 0) stores 0.
inline std::int32_t quantize(float x, float inverse, std::int32_t zero, float lo, float hi) {
  if (inverse == 0.0f) return 0;
  return static_cast<std::int32_t>(clamp(rint(x * inverse) + static_cast<float>(zero), lo, hi));
}

}  // namespace octomoe::num
