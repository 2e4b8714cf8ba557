// MoeWeights: two quantised matrices that fit together.
#include "octomoe/weights.h"

#include <utility>

#include "quant/matrix.h"
#include "quant/numerics.h"
#include "tensor/check.h"

namespace octomoe {

QuantizedMatrix adopt_matrix(const Scheme& scheme, Tensor values, TensorView scale, TensorView q, int segments,
                             const std::string& name, int threads) {
  check(scheme);
  check_defined(values, name.c_str());
  const bool int4 = scheme.kind == SchemeKind::w4a8_fp8;
  const int rank = values.view().rank();
  const bool panels = scheme.is_integer() && rank == 4;
  if ((rank != 3 && !panels) || (panels && values.dim(3) != kPanelColumns)) {
    const char* want = panels                ? "[E, K/128, N, 128]"
                       : scheme.is_integer() ? "[E, N, K] or [E, K/128, N, 128]"
                       : int4                ? "[E, N, K/2]"
                                             : "[E, N, K]";
    bad_argument("{}: expected shape {}, got {}", name, want, to_string(values.shape()));
  }
  QuantizedMatrix m;
  m.scheme = scheme;
  m.experts = values.dim(0);
  m.n = values.dim(panels ? 2 : 1);
  m.k = panels ? values.dim(1) * kPanelColumns : values.dim(2) * (int4 ? 2 : 1);
  m.segments = segments;
  if (panels) m.layout = WeightLayout::panels;
  check_sizes(scheme, m.experts, m.n, m.k, segments, name);
  const MatrixLayout layout = layout_of(scheme, m.experts, m.n, m.k, segments);
  if (int4) {
    check_dtype(values, name.c_str(), {DType::int4x2, DType::uint8, DType::int8});
  } else {
    check_dtype(values, name.c_str(), {layout.value_dtype});
  }
  check_contiguous(values, name.c_str());
  if (layout.scale.rank() > 0) m.scale = to_float32(scale, name + "_scale", layout.scale, true);
  if (scheme.kind == SchemeKind::int8_hybrid) {
    const std::string q_name = name + "_q";
    check_defined(q, q_name.c_str());
    check_dtype(q, q_name.c_str(), {DType::uint8});
    check_shape(q, q_name.c_str(), {m.experts, layout.blocks_n, layout.blocks_k});
    m.q = Tensor::copy_of(q);
  }
  m.values = std::move(values);
  finish_matrix(m, name, threads);
  return m;
}

namespace {

int segments_of(const MoeWeights::Options& options) { return is_gated(options.activation) ? 2 : 1; }

Tensor bias_of(const TensorView& bias, const char* name, const QuantizedMatrix& m) {
  return bias.defined() ? to_float32(bias, name, {m.experts, m.n}, false) : Tensor();
}

void set_activation_scale(QuantizedMatrix& m, const TensorView& scale, const char* name) {
  const bool wanted = m.scheme.activation_scale == ActivationScale::static_;
  if (wanted != scale.defined()) {
    bad_argument("{}: expected {}, got {}", name,
                 wanted ? "a static activation scale (the scheme is static)" : "none (the scheme is not static)",
                 scale.defined() ? "one" : "none");
  }
  if (!wanted) return;
  const bool per_expert = m.scheme.kind == SchemeKind::w4a8_fp8;
  m.activation_scale = to_float32(scale, name, per_expert ? Shape{m.experts} : Shape{1}, true);
  for (std::int64_t i = 0; i < m.activation_scale.elems(); ++i) {
    const float s = m.activation_scale.as<float>()[i];
    if (s < 0x1p-100f) bad_argument("{}: expected a scale of at least 2^-100, got {} at element {}", name, s, i);
  }
}

MoeWeights assemble(QuantizedMatrix w13, QuantizedMatrix w2, const MoeWeights::Options& options) {
  const std::int64_t factor = segments_of(options);
  if (w13.experts != w2.experts || w13.k != w2.n || w13.n != factor * w2.k) {
    bad_argument("w2: expected [E, H, I] to fit w13 [E, {}, H] = {}, got {}", factor == 2 ? "2I" : "I",
                 to_string(Shape{w13.experts, w13.n, w13.k}), to_string(Shape{w2.experts, w2.n, w2.k}));
  }
  MoeWeights w;
  w.scheme = w2.scheme;
  w.activation = options.activation;
  w.gate_up_order = options.gate_up_order;
  w.b13 = bias_of(options.b13, "b13", w13);
  w.b2 = bias_of(options.b2, "b2", w2);
  set_activation_scale(w13, options.x_scale, "x_scale");
  set_activation_scale(w2, options.act_scale, "act_scale");
  w.w13 = std::move(w13);
  w.w2 = std::move(w2);
  return w;
}

struct Parts {
  Tensor values;
  TensorView scale, q;
};

MoeWeights adopt(SchemeKind kind, const Scheme& scheme, Parts w13, Parts w2, const MoeWeights::Options& options) {
  if (scheme.kind != kind) bad_argument("scheme: expected {}, got {}", to_string(kind), to_string(scheme));
  // One after the other: errors name w13 first.
  QuantizedMatrix first =
      adopt_matrix(scheme, std::move(w13.values), w13.scale, w13.q, segments_of(options), "w13", options.threads);
  QuantizedMatrix second = adopt_matrix(scheme, std::move(w2.values), w2.scale, w2.q, 1, "w2", options.threads);
  return assemble(std::move(first), std::move(second), options);
}

}  // namespace

MoeWeights MoeWeights::from_int8_channel(Tensor w13, TensorView w13_scale, Tensor w2, TensorView w2_scale,
                                         const Options& options, const Scheme& scheme) {
  return adopt(SchemeKind::int8_channel, scheme, {std::move(w13), w13_scale, {}}, {std::move(w2), w2_scale, {}},
               options);
}

MoeWeights MoeWeights::from_int8_block(Tensor w13, TensorView w13_scale, Tensor w2, TensorView w2_scale,
                                       const Options& options, const Scheme& scheme) {
  return adopt(SchemeKind::int8_block, scheme, {std::move(w13), w13_scale, {}}, {std::move(w2), w2_scale, {}}, options);
}

MoeWeights MoeWeights::from_w4a8_fp8(Tensor w13, TensorView w13_scale, Tensor w2, TensorView w2_scale,
                                     const Options& options, const Scheme& scheme) {
  return adopt(SchemeKind::w4a8_fp8, scheme, {std::move(w13), w13_scale, {}}, {std::move(w2), w2_scale, {}}, options);
}

MoeWeights MoeWeights::from_int8_hybrid(Tensor w13, TensorView w13_scale, TensorView w13_q, Tensor w2,
                                        TensorView w2_scale, TensorView w2_q, const Options& options,
                                        const Scheme& scheme) {
  return adopt(SchemeKind::int8_hybrid, scheme, {std::move(w13), w13_scale, w13_q}, {std::move(w2), w2_scale, w2_q},
               options);
}

MoeWeights MoeWeights::from_float(Tensor w13, Tensor w2, const Options& options) {
  check_defined(w13, "w13");
  check_dtype(w13, "w13", {DType::bfloat16, DType::float16});
  const Scheme scheme = w13.dtype() == DType::bfloat16 ? Scheme::bf16() : Scheme::fp16();
  return adopt(scheme.kind, scheme, {std::move(w13), {}, {}}, {std::move(w2), {}, {}}, options);
}

MoeWeights quantize(const Scheme& scheme, TensorView w13, TensorView w2, const QuantizeOptions& options) {
  QuantizedMatrix first = quantize_matrix(scheme, w13, segments_of(options), options.threads, "w13");
  return assemble(std::move(first), quantize_matrix(scheme, w2, 1, options.threads, "w2"), options);
}

}  // namespace octomoe
