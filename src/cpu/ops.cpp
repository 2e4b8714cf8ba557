// Row operations: quantising, conversions. One vector body per Highway target; the scalar steps of numerics.h finish
// the last few values of a row and stand in on machines without a fused multiply-add.
#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "cpu/ops.cpp"
#include "cpu/hwy_targets.h"
//
#include <hwy/foreach_target.h>
//
#include <hwy/highway.h>

#include <algorithm>
#include <cstring>

#include "cpu/isa.h"
#include "cpu/ops.h"
#include "cpu/vec-inl.h"
#include "quant/numerics.h"

HWY_BEFORE_NAMESPACE();
namespace octomoe::cpu::HWY_NAMESPACE {
namespace {

// fn(i) for whole vectors, then tail(i) for the rest.
template <class Vector, class Scalar>
HWY_INLINE void sweep(std::int64_t n, const Vector& vector, const Scalar& scalar) {
  std::int64_t i = 0;
#if OCTOMOE_VECTOR
  const auto lanes = static_cast<std::int64_t>(hn::Lanes(F()));
  for (; i + lanes <= n; i += lanes) vector(i);
#else
  (void)vector;
#endif
  for (; i < n; ++i) scalar(i);
}

float load_scalar(const void* p, DType dtype, std::int64_t i) {
  if (dtype == DType::float32) return static_cast<const float*>(p)[i];
  const std::uint16_t h = static_cast<const std::uint16_t*>(p)[i];
  return dtype == DType::bfloat16 ? num::bf16_to_float(h) : num::fp16_to_float(h);
}
void store_scalar(float x, void* p, DType dtype, std::int64_t i) {
  if (dtype == DType::float32) {
    static_cast<float*>(p)[i] = num::canonical(x);
  } else {
    static_cast<std::uint16_t*>(p)[i] = dtype == DType::bfloat16 ? num::float_to_bf16(x) : num::float_to_fp16(x);
  }
}

#undef VECTOR
#if OCTOMOE_VECTOR
#define VECTOR(...) [&](std::int64_t i) HWY_ATTR { __VA_ARGS__ }
#else
#define VECTOR(...) 0
#endif

}  // namespace

void ToFloat(const void* src, DType dtype, std::int64_t n, float* dst) {
  if (dtype == DType::float32) {
    if (n > 0) std::memcpy(dst, src, static_cast<std::size_t>(n) * sizeof(float));
    return;
  }
  sweep(n, VECTOR(hn::StoreU(load_any(src, dtype, i), F(), dst + i);),
        [&](std::int64_t i) { dst[i] = load_scalar(src, dtype, i); });
}

void FromFloat(const float* src, std::int64_t n, DType dtype, void* dst) {
  sweep(n, VECTOR(store_any(hn::LoadU(F(), src + i), dst, dtype, i);),
        [&](std::int64_t i) { store_scalar(src[i], dst, dtype, i); });
}

std::uint32_t AbsmaxBits(const float* x, std::int64_t n) {
  std::uint32_t top = 0;
#if OCTOMOE_VECTOR
  const U du;
  const I di;  // magnitudes are positive as signed numbers too, and signed maxima are cheap everywhere
  auto m = hn::Zero(di);
  const auto mask = hn::Set(du, 0x7fffffffu);
  const auto* p = reinterpret_cast<const std::uint32_t*>(x);
#endif
  sweep(n, VECTOR(m = hn::Max(m, hn::BitCast(di, hn::And(hn::LoadU(du, p + i), mask)));),
        [&](std::int64_t i) { top = std::max(top, num::abs_bits(x[i])); });
#if OCTOMOE_VECTOR
  top = std::max(top, static_cast<std::uint32_t>(hn::GetLane(hn::MaxOfLanes(di, m))));
#endif
  return top;
}

void MinMax(const float* x, std::int64_t n, float* lo, float* hi) {
  float l = 0, h = 0;
#if OCTOMOE_VECTOR
  const F df;
  auto vl = hn::Zero(df), vh = hn::Zero(df);
#endif
  sweep(n,
        VECTOR(const auto v = hn::LoadU(df, x + i); vl = hn::IfThenElse(hn::Lt(v, vl), v, vl);
               vh = hn::IfThenElse(hn::Gt(v, vh), v, vh);),
        [&](std::int64_t i) {
          if (x[i] < l) l = x[i];
          if (x[i] > h) h = x[i];
        });
#if OCTOMOE_VECTOR
  HWY_ALIGN float lanes[hn::MaxLanes(df)];
  hn::Store(vl, df, lanes);
  for (std::size_t i = 0; i < hn::Lanes(df); ++i) l = lanes[i] < l ? lanes[i] : l;
  hn::Store(vh, df, lanes);
  for (std::size_t i = 0; i < hn::Lanes(df); ++i) h = lanes[i] > h ? lanes[i] : h;
#endif
  *lo = l;
  *hi = h;
}

void QuantizeInt8(const float* x, std::int64_t n, const Int8Step& s, std::int8_t* q) {
  if (s.inverse == 0.0f) {
    if (n > 0) std::memset(q, 0, static_cast<std::size_t>(n));
    return;
  }
#if OCTOMOE_VECTOR
  const F df;
  const hn::Rebind<std::int8_t, F> d8;
  const auto r = hn::Set(df, s.inverse), z = hn::Set(df, static_cast<float>(s.zero));
  const auto lo = hn::Set(df, s.lo), hi = hn::Set(df, s.hi);
#endif
  sweep(n,
        VECTOR(auto v = hn::Add(hn::Round(hn::Mul(hn::LoadU(df, x + i), r)), z); v = clamp_v(v, lo, hi);
               hn::StoreU(hn::DemoteTo(d8, hn::ConvertTo(I(), v)), d8, q + i);),
        [&](std::int64_t i) { q[i] = static_cast<std::int8_t>(num::quantize(x[i], s.inverse, s.zero, s.lo, s.hi)); });
}

void QuantizeE4m3(const float* x, std::int64_t n, float inverse, std::uint8_t* q) {
  if (inverse == 0.0f) {
    if (n > 0) std::memset(q, 0, static_cast<std::size_t>(n));
    return;
  }
#if OCTOMOE_VECTOR
  const F df;
  const U du;
  const hn::Rebind<std::uint8_t, F> d8;
  const auto r = hn::Set(df, inverse);
#endif
  sweep(n,
        VECTOR(const auto v = hn::Mul(hn::LoadU(df, x + i), r); const auto b = hn::BitCast(du, v);
               const auto sign = hn::And(hn::ShiftRight<24>(b), hn::Set(du, 0x80u)); const auto a = hn::Abs(v);
               const auto ab = hn::BitCast(du, a);
               const auto small =
                   hn::Sub(hn::BitCast(du, hn::Add(a, hn::Set(df, 0x1p14f))), hn::Set(du, num::bits(0x1p14f)));
               const auto odd = hn::And(hn::ShiftRight<20>(ab), hn::Set(du, 1u));
               auto m = hn::Sub(hn::ShiftRight<20>(hn::Add(hn::Add(ab, hn::Set(du, 0x7ffffu)), odd)),
                                hn::Set(du, 120u << 3));
               m = hn::IfThenElse(hn::RebindMask(du, hn::Lt(a, hn::Set(df, 0x1p-6f))), small, m);
               m = hn::IfThenElse(hn::RebindMask(du, hn::Ge(a, hn::Set(df, num::kE4m3Max))), hn::Set(du, 0x7eu), m);
               m = hn::IfThenElse(hn::RebindMask(du, is_nan_v(v)), hn::Set(du, 0x7fu), hn::Or(m, sign));
               hn::StoreU(hn::TruncateTo(d8, m), d8, q + i);),
        [&](std::int64_t i) { q[i] = num::float_to_e4m3(x[i] * inverse); });
}

void E4m3ToFloat(const std::uint8_t* q, std::int64_t n, float* x) {
#if OCTOMOE_VECTOR
  const F df;
  const U du;
  const hn::Rebind<std::uint8_t, F> d8;
#endif
  // The 7 magnitude bits, moved to a float's place, are the value times 2^-120, subnormals included.
  sweep(
      n,
      VECTOR(const auto v = hn::PromoteTo(du, hn::LoadU(d8, q + i)); const auto mag = hn::And(v, hn::Set(du, 0x7fu));
             auto f = hn::Mul(hn::BitCast(df, hn::ShiftLeft<20>(mag)), hn::Set(df, 0x1p120f));
             const auto sign = hn::ShiftLeft<24>(hn::And(v, hn::Set(du, 0x80u))); f = hn::Or(f, hn::BitCast(df, sign));
             f = hn::IfThenElse(hn::RebindMask(df, hn::Eq(mag, hn::Set(du, 0x7fu))), nan_v(), f);
             hn::StoreU(f, df, x + i);),
      [&](std::int64_t i) { x[i] = num::e4m3_to_float(q[i]); });
}

void WidenInt8(const std::int8_t* q, std::int64_t n, std::int16_t* x) {
  for (std::int64_t i = 0; i < n; ++i) x[i] = q[i];
}

// o = w0 * y0, then fma in slot order; out + o when accumulating.
void Combine(const CombineArgs& c) {
  const auto finish_scalar = [&](std::int64_t i) {
    float o = 0.0f;
    for (int j = 0; j < c.count; ++j) {
      const float y = load_scalar(c.y[j], c.y_dtype, i);
      o = j == 0 ? c.weight[0] * y : std::fma(c.weight[j], y, o);
    }
    if (c.accumulate) o = load_scalar(c.out, c.out_dtype, i) + o;
    store_scalar(o, c.out, c.out_dtype, i);
  };
#if OCTOMOE_VECTOR
  const F df;
#endif
  sweep(c.n,
        VECTOR(
            auto o = hn::Zero(df); if (c.count > 0) {
              o = hn::Mul(hn::Set(df, c.weight[0]), load_any(c.y[0], c.y_dtype, i));
            } for (int j = 1; j < c.count; ++j) {
              o = hn::MulAdd(hn::Set(df, c.weight[j]), load_any(c.y[j], c.y_dtype, i), o);
            } if (c.accumulate) { o = hn::Add(load_any(c.out, c.out_dtype, i), o); } store_any(o, c.out, c.out_dtype,
                                                                                               i);),
        finish_scalar);
}

float GateDot(const float* x, const float* gate, std::int64_t n) {
  constexpr std::int64_t kLanes = 256;
  HWY_ALIGN float s[kLanes] = {};
  for (std::int64_t c = 0; c < n; c += kLanes) {
#if OCTOMOE_VECTOR
    const F df;
#endif
    sweep(std::min(kLanes, n - c),
          VECTOR(hn::Store(hn::MulAdd(hn::LoadU(df, x + c + i), hn::LoadU(df, gate + c + i), hn::Load(df, s + i)), df,
                           s + i);),
          [&](std::int64_t i) { s[i] = std::fma(x[c + i], gate[c + i], s[i]); });
  }
  for (std::int64_t w = kLanes / 2; w >= 1; w /= 2) {
    for (std::int64_t j = 0; j < w; ++j) s[j] += s[j + w];
  }
  return s[0];
}

}  // namespace octomoe::cpu::HWY_NAMESPACE
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace octomoe::cpu {
namespace {

// OCTOMOE_CPU_ISA=portable takes the baseline's bodies here too.
bool portable_only() {
  static const bool portable = best_isa() == Isa::portable;
  return portable;
}

HWY_EXPORT(ToFloat);
HWY_EXPORT(FromFloat);
HWY_EXPORT(AbsmaxBits);
HWY_EXPORT(MinMax);
HWY_EXPORT(QuantizeInt8);
HWY_EXPORT(QuantizeE4m3);
HWY_EXPORT(E4m3ToFloat);
HWY_EXPORT(WidenInt8);
HWY_EXPORT(Combine);
HWY_EXPORT(GateDot);

}  // namespace

#define OCTOMOE_DISPATCH(fn) (portable_only() ? HWY_STATIC_DISPATCH(fn) : HWY_DYNAMIC_DISPATCH(fn))

void to_float(const void* src, DType dtype, std::int64_t n, float* dst) {
  OCTOMOE_DISPATCH(ToFloat)(src, dtype, n, dst);
}
void from_float(const float* src, std::int64_t n, DType dtype, void* dst) {
  OCTOMOE_DISPATCH(FromFloat)(src, n, dtype, dst);
}
std::uint32_t absmax_bits(const float* x, std::int64_t n) { return OCTOMOE_DISPATCH(AbsmaxBits)(x, n); }
void min_max(const float* x, std::int64_t n, float* lo, float* hi) { OCTOMOE_DISPATCH(MinMax)(x, n, lo, hi); }
void quantize_int8(const float* x, std::int64_t n, float inverse, std::int32_t zero, float lo, float hi,
                   std::int8_t* q) {
  OCTOMOE_DISPATCH(QuantizeInt8)(x, n, Int8Step{inverse, zero, lo, hi}, q);
}
void quantize_e4m3(const float* x, std::int64_t n, float inverse, std::uint8_t* q) {
  OCTOMOE_DISPATCH(QuantizeE4m3)(x, n, inverse, q);
}
void e4m3_to_float(const std::uint8_t* q, std::int64_t n, float* x) { OCTOMOE_DISPATCH(E4m3ToFloat)(q, n, x); }
void widen_int8(const std::int8_t* q, std::int64_t n, std::int16_t* x) { OCTOMOE_DISPATCH(WidenInt8)(q, n, x); }
void combine(const CombineArgs& args) { OCTOMOE_DISPATCH(Combine)(args); }
float gate_dot(const float* x, const float* gate, std::int64_t n) { return OCTOMOE_DISPATCH(GateDot)(x, gate, n); }

}  // namespace octomoe::cpu
#endif
