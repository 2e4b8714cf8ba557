// Epilogue of both GEMMs. One vector body per Highway target, the scalar steps of numerics.h elsewhere.
#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "cpu/finish.cpp"
#include "cpu/hwy_targets.h"
//
#include <hwy/foreach_target.h>
//
#include <hwy/highway.h>

#include <algorithm>
#include <cmath>
#include <cstring>

#include "cpu/finish.h"
#include "cpu/isa.h"
#include "cpu/kernel.h"
#include "cpu/vec-inl.h"
#include "quant/numerics.h"

HWY_BEFORE_NAMESPACE();
namespace octomoe::cpu::HWY_NAMESPACE {
namespace {

// A run of columns as one value: a vector, or a plain float on the baseline. The activations below are written once
// against these names.
#if OCTOMOE_VECTOR
using Value = VF;
constexpr int kStep = static_cast<int>(hn::MaxLanes(F()));
HWY_INLINE Value make(float x) { return splat(x); }
HWY_INLINE Value load(const float* p) { return hn::LoadU(F(), p); }
HWY_INLINE Value load_int(const std::int32_t* p) { return hn::ConvertTo(F(), hn::LoadU(I(), p)); }
HWY_INLINE Value load_int(const std::int32_t* p, const std::int32_t* sum, std::int32_t zero) {
  const I di;
  return hn::ConvertTo(F(), hn::Sub(hn::LoadU(di, p), hn::Mul(hn::Set(di, zero), hn::LoadU(di, sum))));
}
HWY_INLINE Value mul(Value a, Value b) { return hn::Mul(a, b); }
HWY_INLINE Value add(Value a, Value b) { return hn::Add(a, b); }
HWY_INLINE Value upper(Value x, float hi) { return at_most(x, splat(hi)); }
HWY_INLINE Value between(Value x, float lo, float hi) { return clamp_v(x, splat(lo), splat(hi)); }
HWY_INLINE Value sigmoid(Value x) { return sigmoid_v(x); }
HWY_INLINE Value silu(Value x) { return silu_v(x); }
HWY_INLINE Value gelu_tanh(Value x) { return gelu_tanh_v(x); }
HWY_INLINE Value gelu_erf(Value x) { return gelu_erf_v(x); }
HWY_INLINE Value relu(Value x) { return relu_v(x); }
HWY_INLINE void put(Value v, std::uint8_t* out, DType dtype, std::int64_t column) { store_any(v, out, dtype, column); }
#else
using Value = float;
constexpr int kStep = 1;
Value make(float x) { return x; }
Value load(const float* p) { return *p; }
Value load_int(const std::int32_t* p) { return static_cast<float>(*p); }
Value load_int(const std::int32_t* p, const std::int32_t* sum, std::int32_t zero) {
  return static_cast<float>(*p - zero * *sum);
}
Value mul(Value a, Value b) { return a * b; }
Value add(Value a, Value b) { return a + b; }
Value upper(Value x, float hi) { return x > hi ? hi : x; }
Value between(Value x, float lo, float hi) { return num::clamp(x, lo, hi); }
Value sigmoid(Value x) { return num::sigmoid(x); }
Value silu(Value x) { return num::silu(x); }
Value gelu_tanh(Value x) { return num::gelu_tanh(x); }
Value gelu_erf(Value x) { return num::gelu_erf(x); }
Value relu(Value x) { return num::relu(x); }
void put(Value v, std::uint8_t* out, DType dtype, std::int64_t column) {
  if (dtype == DType::float32) {
    reinterpret_cast<float*>(out)[column] = num::canonical(v);
  } else {
    reinterpret_cast<std::uint16_t*>(out)[column] =
        dtype == DType::bfloat16 ? num::float_to_bf16(v) : num::float_to_fp16(v);
  }
}
#endif

// Before bias and activation: row m, column c of panel p.
HWY_INLINE Value value_of(const FinishArgs& a, int m, int p, int c) {
  const std::int64_t at = (static_cast<std::int64_t>(p) * a.rows + m) * kPanel + c;
  Value v;
  if (a.integers) {
    const auto* sums = static_cast<const std::int32_t*>(a.c) + at;
    v = a.zero ? load_int(sums, a.column_sum + p * kPanel + c, a.zero[m]) : load_int(sums);
    v = mul(v, mul(load(a.sw + p * kPanel + c), make(a.sa[m])));
  } else {
    v = load(static_cast<const float*>(a.c) + at);
  }
  if (a.factor) v = mul(v, make(a.factor[m]));
  return a.bias ? add(v, load(a.bias + p * kPanel + c)) : v;
}

// fn(g, u) -> output. The last columns of a matrix go through a buffer: nothing is written past them.
template <class Fn>
HWY_INLINE void each(const FinishArgs& a, const Fn& fn) {
  const auto size = static_cast<std::int64_t>(size_bytes(a.out_dtype));
  for (int m = 0; m < a.rows; ++m) {
    for (int p = 0; p < (a.gated ? 1 : 2); ++p) {
      const std::int64_t columns = std::min<std::int64_t>(kPanel, a.columns - p * kPanel);
      if (columns <= 0) break;
      alignas(64) std::uint8_t buffer[kPanel * 4];
      std::uint8_t* row = a.out[m] + p * kPanel * size;
      std::uint8_t* out = columns == kPanel ? row : buffer;
      for (int c = 0; c < kPanel; c += kStep) {
        const Value g = value_of(a, m, p, c);
        put(fn(g, a.gated ? value_of(a, m, 1, c) : g), out, a.out_dtype, c);
      }
      if (out == buffer) std::memcpy(row, buffer, static_cast<std::size_t>(columns * size));
    }
  }
}

}  // namespace

void Finish(const FinishArgs& a) {
  const float limit = a.activation.limit, alpha = a.activation.alpha;
  switch (a.activation.kind) {
    case Activation::swiglu:
      if (std::isinf(limit)) return each(a, [](Value g, Value u) HWY_ATTR { return mul(silu(g), u); });
      return each(a, [=](Value g, Value u) HWY_ATTR { return mul(silu(upper(g, limit)), between(u, -limit, limit)); });
    case Activation::swigluoai:
      return each(a, [=](Value g, Value u) HWY_ATTR {
        g = upper(g, limit);
        u = add(between(u, -limit, limit), make(1.0f));
        return mul(mul(g, sigmoid(mul(make(alpha), g))), u);
      });
    case Activation::geglu_tanh:
      return each(a, [](Value g, Value u) HWY_ATTR { return mul(gelu_tanh(g), u); });
    case Activation::geglu_erf:
      return each(a, [](Value g, Value u) HWY_ATTR { return mul(gelu_erf(g), u); });
    case Activation::silu:
      return each(a, [](Value g, Value) HWY_ATTR { return silu(g); });
    case Activation::gelu_tanh:
      return each(a, [](Value g, Value) HWY_ATTR { return gelu_tanh(g); });
    case Activation::gelu_erf:
      return each(a, [](Value g, Value) HWY_ATTR { return gelu_erf(g); });
    case Activation::relu:
      return each(a, [](Value g, Value) HWY_ATTR { return relu(g); });
    case Activation::relu2:
      return each(a, [](Value g, Value) HWY_ATTR { return mul(relu(g), relu(g)); });
    case Activation::none:
      return each(a, [](Value g, Value) HWY_ATTR { return g; });
  }
}

}  // namespace octomoe::cpu::HWY_NAMESPACE
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace octomoe::cpu {
namespace {
HWY_EXPORT(Finish);
}
void finish(const FinishArgs& args) {
  static const bool portable = best_isa() == Isa::portable;
  portable ? HWY_STATIC_DISPATCH(Finish)(args) : HWY_DYNAMIC_DISPATCH(Finish)(args);
}
}  // namespace octomoe::cpu
#endif
