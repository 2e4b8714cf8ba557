// Vector forms of the float steps of quant/numerics.h, the same operations in the same order. Included once per Highway
// target (no include guard by design; see foreach_target.h).
//
// OCTOMOE_VECTOR is 1 for targets with a fused multiply-add and exact half conversions; elsewhere row operations run
// the scalar steps of numerics.h, which are the law.
#if defined(OCTOMOE_CPU_VEC_INL_H_) == defined(HWY_TARGET_TOGGLE)
#ifdef OCTOMOE_CPU_VEC_INL_H_
#undef OCTOMOE_CPU_VEC_INL_H_
#else
#define OCTOMOE_CPU_VEC_INL_H_
#endif

#undef OCTOMOE_VECTOR
#if (HWY_ARCH_X86 && HWY_TARGET <= HWY_AVX2) || (HWY_ARCH_ARM_A64 && HWY_TARGET == HWY_NEON)
#define OCTOMOE_VECTOR 1
#else
#define OCTOMOE_VECTOR 0
#endif

#include "octomoe/tensor.h"
#include "quant/numerics.h"

HWY_BEFORE_NAMESPACE();
namespace octomoe::cpu::HWY_NAMESPACE {
namespace hn = hwy::HWY_NAMESPACE;

#if OCTOMOE_VECTOR

using F = hn::ScalableTag<float>;
using U = hn::RebindToUnsigned<F>;
using I = hn::RebindToSigned<F>;
using VF = hn::Vec<F>;
using VU = hn::Vec<U>;

HWY_INLINE VF splat(float x) { return hn::Set(F(), x); }
HWY_INLINE VF nan_v() { return hn::BitCast(F(), hn::Set(U(), num::kNanBits)); }
HWY_INLINE auto is_nan_v(VF x) { return hn::IsNaN(x); }  // Ne(x, x) is an ordered comparison on AVX
// x > hi ? hi : x, and x < lo ? lo : x: a NaN stays, whatever the target's own Min and Max do.
HWY_INLINE VF at_most(VF x, VF hi) { return hn::IfThenElse(hn::Gt(x, hi), hi, x); }
HWY_INLINE VF at_least(VF x, VF lo) { return hn::IfThenElse(hn::Lt(x, lo), lo, x); }
HWY_INLINE VF clamp_v(VF x, VF lo, VF hi) { return at_most(at_least(x, lo), hi); }

HWY_INLINE VF load_bf16(const std::uint16_t* p) {
  const hn::Rebind<std::uint16_t, F> d16;
  return hn::BitCast(F(), hn::ShiftLeft<16>(hn::PromoteTo(U(), hn::LoadU(d16, p))));
}
HWY_INLINE VF load_fp16(const std::uint16_t* p) {
  const hn::Rebind<hwy::float16_t, F> d16;
  return hn::PromoteTo(F(), hn::LoadU(d16, reinterpret_cast<const hwy::float16_t*>(p)));
}
HWY_INLINE void store_u16(VU v, std::uint16_t* p) {
  const hn::Rebind<std::uint16_t, F> d16;
  hn::StoreU(hn::TruncateTo(d16, v), d16, p);
}
HWY_INLINE void store_bf16(VF x, std::uint16_t* p) {
  const U du;
  const VU b = hn::BitCast(du, x);
  const VU odd = hn::And(hn::ShiftRight<16>(b), hn::Set(du, 1u));
  const VU r = hn::ShiftRight<16>(hn::Add(hn::Add(b, hn::Set(du, 0x7fffu)), odd));
  store_u16(hn::IfThenElse(hn::RebindMask(du, is_nan_v(x)), hn::Set(du, 0x7fffu), r), p);
}
HWY_INLINE void store_fp16(VF x, std::uint16_t* p) {
  const hn::Rebind<hwy::float16_t, F> d16;
  const hn::Rebind<std::uint16_t, F> du16;
  const auto h = hn::BitCast(du16, hn::DemoteTo(d16, x));
  const U du;
  store_u16(hn::IfThenElse(hn::RebindMask(du, is_nan_v(x)), hn::Set(du, 0x7fffu), hn::PromoteTo(du, h)), p);
}
HWY_INLINE VF canonical_v(VF x) { return hn::IfThenElse(is_nan_v(x), nan_v(), x); }

// One vector of a row of any of the three float types.
HWY_INLINE VF load_any(const void* p, DType dtype, std::int64_t i) {
  if (dtype == DType::float32) return hn::LoadU(F(), static_cast<const float*>(p) + i);
  const std::uint16_t* h = static_cast<const std::uint16_t*>(p) + i;
  return dtype == DType::bfloat16 ? load_bf16(h) : load_fp16(h);
}
HWY_INLINE void store_any(VF x, void* p, DType dtype, std::int64_t i) {
  if (dtype == DType::float32) return hn::StoreU(canonical_v(x), F(), static_cast<float*>(p) + i);
  std::uint16_t* h = static_cast<std::uint16_t*>(p) + i;
  dtype == DType::bfloat16 ? store_bf16(x, h) : store_fp16(x, h);
}

HWY_INLINE VF exp_v(VF x) {
  VF t = hn::Mul(x, splat(num::kLog2e));
  t = clamp_v(t, splat(-126.0f), splat(126.0f));
  const VF n = hn::Round(t);
  const VF f = hn::Sub(t, n);
  VF p = splat(num::kExp2Coef[5]);
  for (int i = 4; i >= 0; --i) p = hn::MulAdd(p, f, splat(num::kExp2Coef[i]));
  const auto e = hn::ShiftLeft<23>(hn::ConvertTo(I(), n));
  const VF r = hn::BitCast(F(), hn::Add(hn::BitCast(I(), p), e));
  return hn::IfThenElse(is_nan_v(t), nan_v(), r);
}
HWY_INLINE VF rcp_v(VF d) {
  const VF one = splat(1.0f);
  const VF r0 = hn::BitCast(F(), hn::Sub(hn::Set(U(), 0x7ef31000u), hn::BitCast(U(), d)));
  VF t = hn::NegMulAdd(d, r0, one);
  const VF r1 = hn::MulAdd(r0, hn::MulAdd(t, t, t), r0);
  t = hn::NegMulAdd(d, r1, one);
  return hn::MulAdd(r1, t, r1);
}
HWY_INLINE VF sigmoid_v(VF x) { return rcp_v(hn::Add(splat(1.0f), exp_v(hn::Neg(x)))); }
HWY_INLINE VF silu_v(VF x) { return hn::Mul(x, sigmoid_v(x)); }
HWY_INLINE VF gelu_tanh_v(VF x) {
  const VF d = hn::MulAdd(hn::Mul(x, x), splat(0.044715f), splat(1.0f));
  return hn::Mul(x, sigmoid_v(hn::Mul(hn::Mul(x, splat(1.5957691216f)), d)));
}
HWY_INLINE VF gelu_erf_v(VF x) {
  const VF a = hn::Mul(hn::Abs(x), splat(0.70710678f));
  const VF t = rcp_v(hn::MulAdd(a, splat(0.3275911f), splat(1.0f)));
  VF q = hn::MulAdd(t, splat(1.061405429f), splat(-1.453152027f));
  q = hn::MulAdd(q, t, splat(1.421413741f));
  q = hn::MulAdd(q, t, splat(-0.284496736f));
  q = hn::MulAdd(q, t, splat(0.254829592f));
  const VF tail = hn::Mul(hn::Mul(hn::Mul(q, t), exp_v(hn::Neg(hn::Mul(a, a)))), splat(0.5f));
  return hn::Mul(x, hn::IfThenElse(hn::Lt(x, hn::Zero(F())), tail, hn::Sub(splat(1.0f), tail)));
}
HWY_INLINE VF relu_v(VF x) { return hn::IfThenElse(hn::Le(x, hn::Zero(F())), hn::Zero(F()), x); }

#endif  // OCTOMOE_VECTOR

}  // namespace octomoe::cpu::HWY_NAMESPACE
HWY_AFTER_NAMESPACE();
#endif
