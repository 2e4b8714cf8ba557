#include "quant/reference.h"

#include <algorithm>
#include <cmath>
#include <limits>

#include "quant/matrix.h"
#include "quant/numerics.h"

namespace octomoe::reference {

float load(const void* p, DType dtype) {
  if (dtype == DType::float32) return *static_cast<const float*>(p);
  const std::uint16_t h = *static_cast<const std::uint16_t*>(p);
  return dtype == DType::bfloat16 ? num::bf16_to_float(h) : num::fp16_to_float(h);
}

void store(void* p, DType dtype, float v) {
  if (dtype == DType::float32) {
    *static_cast<float*>(p) = num::canonical(v);
  } else {
    *static_cast<std::uint16_t*>(p) = dtype == DType::bfloat16 ? num::float_to_bf16(v) : num::float_to_fp16(v);
  }
}

namespace {

// Element [i, j, ...] of a view as float.
float at(const TensorView& t, std::initializer_list<std::int64_t> index) {
  std::int64_t offset = 0;
  int d = 0;
  for (const std::int64_t i : index) offset += i * t.strides()[d++];
  return load(t.as<char>() + offset * static_cast<std::int64_t>(size_bytes(t.dtype())), t.dtype());
}

std::vector<float> row_of(const TensorView& t, std::int64_t row) {
  std::vector<float> x(static_cast<std::size_t>(t.dim(1)));
  for (std::int64_t i = 0; i < t.dim(1); ++i) x[static_cast<std::size_t>(i)] = at(t, {row, i});
  return x;
}

std::int64_t id_at(const TensorView& ids, std::int64_t t, std::int64_t j) {
  const std::int64_t offset = t * ids.strides()[0] + j * ids.strides()[1];
  return ids.dtype() == DType::int32 ? ids.as<std::int32_t>()[offset] : ids.as<std::int64_t>()[offset];
}

std::uint32_t absmax(const float* x, std::int64_t begin, std::int64_t end) {
  std::uint32_t top = 0;
  for (std::int64_t i = begin; i < end; ++i) top = std::max(top, num::abs_bits(x[i]));
  return top;
}

std::int8_t int8_of(float x, float inverse) {
  return static_cast<std::int8_t>(num::quantize(x, inverse, 0, -num::kInt8Max, num::kInt8Max));
}

// The type that h and y pass through between the steps of a layer.
DType between(const Scheme& scheme) { return scheme.kind == SchemeKind::fp16 ? DType::float16 : DType::bfloat16; }

float round_to(DType dtype, float v) {
  return dtype == DType::float16 ? num::fp16_to_float(num::float_to_fp16(v))
                                 : num::bf16_to_float(num::float_to_bf16(v));
}

int int4_at(const QuantizedMatrix& m, std::int64_t row, std::int64_t c) {
  const int byte = m.values.as<std::uint8_t>()[row * (m.k / 2) + c / 2];
  return ((c % 2 ? byte >> 4 : byte & 0xf) ^ 8) - 8;
}

}  // namespace

Row quantize_row(const Scheme& s, const float* x, std::int64_t k, float static_scale) {
  Row r;
  const auto size = static_cast<std::size_t>(k);
  const bool finite = absmax(x, 0, k) < num::kInfBits;
  if (s.is_integer())
    r.q.resize(size);
  else
    r.value.resize(size);

  if (s.kind == SchemeKind::int8_block || s.kind == SchemeKind::int8_hybrid) {
    const std::int64_t blocks = ceil_div(k, s.block_k);
    const std::int64_t per_super = s.kind == SchemeKind::int8_hybrid ? s.super_group : 1;
    for (std::int64_t first = 0; first < blocks; first += per_super) {
      const std::int64_t last = std::min(first + per_super, blocks);
      const num::SuperScale super =
          num::super_scale(absmax(x, first * s.block_k, std::min(k, last * s.block_k)), s.q_max);
      if (s.kind == SchemeKind::int8_hybrid) r.scale.push_back(super.f);
      for (std::int64_t b = first; b < last; ++b) {
        const std::int64_t begin = b * s.block_k, end = std::min(k, begin + s.block_k);
        float inverse = 0;
        if (s.kind == SchemeKind::int8_block) {
          const num::GroupScale g = num::symmetric_scale(absmax(x, begin, end), num::kInt8Max);
          r.scale.push_back(g.scale);
          inverse = g.inverse;
        } else {
          const num::BlockScale q = num::block_scale(super, absmax(x, begin, end), s.q_max);
          r.block.push_back(q.q);
          inverse = q.inverse;
        }
        for (std::int64_t i = begin; i < end; ++i) r.q[static_cast<std::size_t>(i)] = int8_of(x[i], inverse);
      }
    }
    return r;
  }

  if (s.kind == SchemeKind::bf16 || s.kind == SchemeKind::fp16) {
    for (std::size_t i = 0; i < size; ++i) r.value[i] = round_to(between(s), x[i]);
    return r;
  }

  if (s.asymmetric) {
    float lo = 0, hi = 0;
    for (std::int64_t i = 0; i < k; ++i) {
      if (x[i] < lo) lo = x[i];
      if (x[i] > hi) hi = x[i];
    }
    const num::RowScale g = num::asymmetric_scale(lo, hi, finite);
    r.scale = {g.scale};
    r.zero = g.zero;
    for (std::size_t i = 0; i < size; ++i) {
      r.q[i] = static_cast<std::int8_t>(num::quantize(x[i], g.inverse, g.zero, -128.0f, 127.0f));
    }
    return r;
  }

  // One scale per row: int8_channel and w4a8_fp8.
  const float limit = s.is_integer() ? num::kInt8Max : num::kE4m3Max;
  num::GroupScale g = num::symmetric_scale(absmax(x, 0, k), limit);
  if (s.activation_scale == ActivationScale::static_)
    g = {finite ? static_scale : num::nan(), finite ? 1.0f / static_scale : 0.0f};
  if (s.activation_scale == ActivationScale::none) g = {1.0f, 1.0f};
  r.scale = {g.scale};
  for (std::size_t i = 0; i < size; ++i) {
    if (s.is_integer()) {
      r.q[i] = int8_of(x[i], g.inverse);
    } else {
      r.value[i] = g.inverse == 0.0f ? 0.0f : num::e4m3_to_float(num::float_to_e4m3(x[i] * g.inverse));
    }
  }
  return r;
}

void product(const QuantizedMatrix& m, std::int64_t expert, const Row& a, float factor, float* v) {
  const Scheme& s = m.scheme;
  const MatrixLayout l = layout_of(s, m.experts, m.n, m.k, m.segments);
  IntegerRows rows(m);
  for (std::int64_t n = 0; n < m.n; ++n) {
    const std::int64_t row = expert * m.n + n;
    const std::int8_t* integers = s.is_integer() ? rows.read(expert, n) : nullptr;
    const std::int64_t block = s.has_blocks() ? expert * l.blocks_n + m.block_of_row(n) : 0;
    const float* scale = m.scale.as<float>();

    // Σ over columns [begin, end): exact for integers, float64 rounded once for floats.
    const auto int_dot = [&](std::int64_t begin, std::int64_t end) {
      std::int32_t sum = 0;
      for (std::int64_t c = begin; c < end; ++c) sum += std::int32_t{a.q[static_cast<std::size_t>(c)]} * integers[c];
      return sum;
    };
    const auto float_dot = [&](std::int64_t begin, std::int64_t end) {
      double sum = 0;
      for (std::int64_t c = begin; c < end; ++c) {
        const double w = s.kind == SchemeKind::w4a8_fp8
                             ? int4_at(m, row, c)
                             : load(m.values.as<std::uint16_t>() + row * m.k + c, m.values.dtype());
        sum += static_cast<double>(a.value[static_cast<std::size_t>(c)]) * w;
      }
      return static_cast<float>(sum);
    };

    switch (s.kind) {
      case SchemeKind::int8_channel: {
        std::int32_t acc = int_dot(0, m.k);
        if (s.asymmetric) acc -= a.zero * m.column_sum.as<std::int32_t>()[row];
        const float p = scale[s.per_tensor ? expert : row] * (a.scale[0] * factor);
        v[n] = static_cast<float>(acc) * p;
        break;
      }
      case SchemeKind::int8_block:
        for (std::int64_t b = 0; b < l.blocks_k; ++b) {
          const std::int32_t acc = int_dot(b * s.block_k, std::min(m.k, (b + 1) * s.block_k));
          const float p = scale[block * l.blocks_k + b] * (a.scale[static_cast<std::size_t>(b)] * factor);
          v[n] = b == 0 ? static_cast<float>(acc) * p : std::fma(static_cast<float>(acc), p, v[n]);
        }
        break;
      case SchemeKind::int8_hybrid: {
        bool first = true;
        for (std::int64_t g = 0; g < l.super_groups; ++g) {
          const std::int64_t stop = std::min<std::int64_t>(l.blocks_k, (g + 1) * s.super_group);
          const float p = scale[block * l.super_groups + g] * (a.scale[static_cast<std::size_t>(g)] * factor);
          for (std::int64_t chunk = g * s.super_group; chunk < stop; chunk += m.flush_blocks) {
            std::int32_t acc = 0;
            for (std::int64_t b = chunk; b < std::min<std::int64_t>(chunk + m.flush_blocks, stop); ++b) {
              const std::int32_t q =
                  a.block[static_cast<std::size_t>(b)] * m.q.as<std::uint8_t>()[block * l.blocks_k + b];
              acc += q * int_dot(b * s.block_k, std::min(m.k, (b + 1) * s.block_k));
            }
            v[n] = first ? static_cast<float>(acc) * p : std::fma(static_cast<float>(acc), p, v[n]);
            first = false;
          }
        }
        break;
      }
      case SchemeKind::w4a8_fp8: {
        const std::int64_t width = group_columns(s, m.k);
        for (std::int64_t g = 0; g < l.groups_k; ++g) {
          const float partial = float_dot(g * width, std::min(m.k, (g + 1) * width));
          const float p = scale[row * l.groups_k + g] * a.scale[0];
          v[n] = g == 0 ? partial * p : std::fma(partial, p, v[n]);
        }
        if (factor != 1.0f) v[n] *= factor;
        break;
      }
      case SchemeKind::bf16:
      case SchemeKind::fp16:
        v[n] = float_dot(0, m.k);
        if (factor != 1.0f) v[n] *= factor;
        break;
    }
  }
}

float activate(Activation kind, float g, float u, const LayerOptions& o) {
  const auto upper = [](float x, float limit) { return x > limit ? limit : x; };
  switch (kind) {
    case Activation::swiglu:
      if (o.swiglu_limit) {
        g = upper(g, *o.swiglu_limit);
        u = num::clamp(u, -*o.swiglu_limit, *o.swiglu_limit);
      }
      return num::silu(g) * u;
    case Activation::swigluoai: {
      const float limit = o.swiglu_limit.value_or(7.0f);
      g = upper(g, limit);
      u = num::clamp(u, -limit, limit) + 1.0f;
      return (g * num::sigmoid(o.swiglu_alpha * g)) * u;
    }
    case Activation::geglu_tanh:
      return num::gelu_tanh(g) * u;
    case Activation::geglu_erf:
      return num::gelu_erf(g) * u;
    case Activation::silu:
      return num::silu(g);
    case Activation::gelu_tanh:
      return num::gelu_tanh(g);
    case Activation::gelu_erf:
      return num::gelu_erf(g);
    case Activation::relu:
      return num::relu(g);
    case Activation::relu2:
      return num::relu(g) * num::relu(g);
    case Activation::none:
      return g;
  }
  return g;
}

namespace {

float static_scale_of(const QuantizedMatrix& m, std::int64_t expert) {
  if (!m.activation_scale.defined()) return 0.0f;
  return m.activation_scale.as<float>()[m.activation_scale.elems() == 1 ? 0 : expert];
}

// One route: x -> y, H values that already passed through bf16 (fp16).
std::vector<float> expert_row(const MoeWeights& w, const LayerOptions& o, std::int64_t e, const std::vector<float>& x,
                              float input_weight) {
  const std::int64_t inter = w.intermediate();
  const DType type = between(w.scheme);

  std::vector<float> v(static_cast<std::size_t>(w.w13.n));
  product(w.w13, e, quantize_row(w.w13.scheme, x.data(), w.hidden(), static_scale_of(w.w13, e)), input_weight,
          v.data());
  if (w.b13.defined()) {
    for (std::int64_t n = 0; n < w.w13.n; ++n) v[static_cast<std::size_t>(n)] += w.b13.as<float>()[e * w.w13.n + n];
  }

  std::vector<float> h(static_cast<std::size_t>(inter));
  const bool gated = is_gated(w.activation), gate_first = w.gate_up_order == GateUpOrder::gate_up;
  for (std::int64_t i = 0; i < inter; ++i) {
    const float first = v[static_cast<std::size_t>(i)];
    const float second = gated ? v[static_cast<std::size_t>(inter + i)] : 0.0f;
    const float act = activate(w.activation, gate_first || !gated ? first : second, gate_first ? second : first, o);
    h[static_cast<std::size_t>(i)] = round_to(type, act);
  }

  std::vector<float> y(static_cast<std::size_t>(w.hidden()));
  product(w.w2, e, quantize_row(w.w2.scheme, h.data(), inter, static_scale_of(w.w2, e)), 1.0f, y.data());
  for (std::int64_t n = 0; n < w.hidden(); ++n) {
    float& value = y[static_cast<std::size_t>(n)];
    if (w.b2.defined()) value += w.b2.as<float>()[e * w.hidden() + n];
    value = round_to(type, value);
  }
  return y;
}

float shared_gate_weight(const Tensor& gate, const std::vector<float>& x) {
  constexpr std::size_t kLanes = 256;
  std::vector<float> s(kLanes, 0.0f);
  for (std::size_t i = 0; i < x.size(); ++i) {
    const float g = load(gate.as<char>() + i * size_bytes(gate.dtype()), gate.dtype());
    s[i % kLanes] = std::fma(x[i], g, s[i % kLanes]);
  }
  for (std::size_t w = kLanes / 2; w >= 1; w /= 2) {
    for (std::size_t j = 0; j < w; ++j) s[j] += s[j + w];
  }
  return num::sigmoid(s[0]);
}

// Global id -> local expert, -1 = skip.
std::int64_t local_expert(const LayerOptions& o, std::int64_t id) {
  return id >= 0 && o.expert_map.defined() ? o.expert_map.as<std::int32_t>()[id] : id;
}

}  // namespace

void moe_forward(const MoeWeights& w, const LayerOptions& o, TensorView x, TensorView topk_ids, TensorView topk_weights,
                 TensorView out, bool accumulate) {
  const std::int64_t tokens = x.dim(0), hidden = w.hidden(), k = topk_ids.dim(1);
  for (std::int64_t t = 0; t < tokens; ++t) {
    const std::vector<float> row = row_of(x, t);
    std::vector<float> sum(static_cast<std::size_t>(hidden), 0.0f);
    bool first = true;
    const auto add = [&](float weight, const std::vector<float>& y) {
      for (std::size_t n = 0; n < y.size(); ++n) sum[n] = first ? weight * y[n] : std::fma(weight, y[n], sum[n]);
      first = false;
    };
    for (std::int64_t j = 0; j < k; ++j) {
      const std::int64_t e = local_expert(o, id_at(topk_ids, t, j));
      if (e < 0) continue;
      const float weight = at(topk_weights, {t, j});
      const bool on_input = o.router_weight_on_input;
      add(on_input ? 1.0f : weight, expert_row(w, o, e, row, on_input ? weight : 1.0f));
    }
    if (o.shared_expert) {
      add(o.shared_gate.defined() ? shared_gate_weight(o.shared_gate, row) : 1.0f,
          expert_row(*o.shared_expert, o, 0, row, 1.0f));
    }
    for (std::int64_t n = 0; n < hidden; ++n) {
      const std::int64_t offset = t * out.strides()[0] + n * out.strides()[1];
      void* p = out.as<char>() + offset * static_cast<std::int64_t>(size_bytes(out.dtype()));
      const float v = sum[static_cast<std::size_t>(n)];
      store(p, out.dtype(), accumulate ? load(p, out.dtype()) + v : v);
    }
  }
}

void grouped_gemm(const QuantizedMatrix& m, const Activations& a, TensorView d, const Groups& groups, TensorView bias) {
  const bool masked = groups.layout == Groups::Layout::masked;
  const auto index = [&](std::int64_t i) {
    return groups.index.dtype() == DType::int32 ? groups.index.as<std::int32_t>()[i]
                                                : groups.index.as<std::int64_t>()[i];
  };
  const Scheme& s = m.scheme;
  const std::int64_t kb = m.blocks_k(), sg = m.super_groups();
  const bool given = a.values.dtype() == DType::int8 || a.values.dtype() == DType::float8_e4m3;

  const auto run = [&](const TensorView& values, const TensorView& out, std::int64_t row, std::int64_t flat,
                       std::int64_t e) {
    Row r;
    if (given) {
      for (std::int64_t c = 0; c < m.k; ++c) {
        const std::int64_t offset = row * values.strides()[0] + c;
        if (s.is_integer())
          r.q.push_back(values.as<std::int8_t>()[offset]);
        else
          r.value.push_back(num::e4m3_to_float(values.as<std::uint8_t>()[offset]));
      }
      const float* scale = a.scale.as<float>();
      if (s.kind == SchemeKind::int8_block)
        r.scale.assign(scale + flat * kb, scale + (flat + 1) * kb);
      else if (s.kind == SchemeKind::int8_hybrid)
        r.scale.assign(scale + flat * sg, scale + (flat + 1) * sg);
      else if (s.activation_scale == ActivationScale::none)
        r.scale = {1.0f};
      else if (s.activation_scale == ActivationScale::static_)
        r.scale = {scale[s.is_integer() ? 0 : e]};
      else
        r.scale = {scale[flat]};
      if (s.kind == SchemeKind::int8_hybrid) {
        for (std::int64_t b = 0; b < kb; ++b) r.block.push_back(a.q.as<std::uint8_t>()[flat * kb + b]);
      }
      if (s.asymmetric) r.zero = a.zero.as<std::int32_t>()[flat];
    } else {
      r = quantize_row(s, row_of(values, row).data(), m.k, static_scale_of(m, e));
    }
    std::vector<float> v(static_cast<std::size_t>(m.n));
    product(m, e, r, 1.0f, v.data());
    for (std::int64_t n = 0; n < m.n; ++n) {
      const float b = bias.defined() ? bias.as<float>()[e * m.n + n] : 0.0f;
      const float value = bias.defined() ? v[static_cast<std::size_t>(n)] + b : v[static_cast<std::size_t>(n)];
      store(out.as<char>() + (row * out.strides()[0] + n) * static_cast<std::int64_t>(size_bytes(out.dtype())),
            out.dtype(), value);
    }
  };

  for (std::int64_t e = 0; e < m.experts; ++e) {
    if (masked) {
      for (std::int64_t i = 0; i < index(e); ++i) run(a.values.at(e), d.at(e), i, e * a.values.dim(1) + i, e);
    } else {
      for (std::int64_t i = index(e); i < index(e + 1); ++i) run(a.values, d, i, i, e);
    }
  }
}

namespace {

double activate_float64(Activation kind, double g, double u, const LayerOptions& o) {
  const auto sigmoid = [](double x) { return 1.0 / (1.0 + std::exp(-x)); };
  const auto gelu_tanh = [](double x) {
    return 0.5 * x * (1.0 + std::tanh(std::sqrt(2.0 / M_PI) * (x + 0.044715 * x * x * x)));
  };
  const auto gelu_erf = [](double x) { return 0.5 * x * (1.0 + std::erf(x / std::sqrt(2.0))); };
  switch (kind) {
    case Activation::swiglu:
      if (o.swiglu_limit) {
        g = std::min(g, static_cast<double>(*o.swiglu_limit));
        u = std::clamp(u, -static_cast<double>(*o.swiglu_limit), static_cast<double>(*o.swiglu_limit));
      }
      return g * sigmoid(g) * u;
    case Activation::swigluoai: {
      const double limit = o.swiglu_limit.value_or(7.0f);
      g = std::min(g, limit);
      return g * sigmoid(o.swiglu_alpha * g) * (std::clamp(u, -limit, limit) + 1.0);
    }
    case Activation::geglu_tanh:
      return gelu_tanh(g) * u;
    case Activation::geglu_erf:
      return gelu_erf(g) * u;
    case Activation::silu:
      return g * sigmoid(g);
    case Activation::gelu_tanh:
      return gelu_tanh(g);
    case Activation::gelu_erf:
      return gelu_erf(g);
    case Activation::relu:
      return std::max(g, 0.0);
    case Activation::relu2:
      return std::max(g, 0.0) * std::max(g, 0.0);
    case Activation::none:
      return g;
  }
  return g;
}

// w [E, N, K] as float32, once: the loops below read it often.
struct Dense {
  explicit Dense(const TensorView& w) : n(w.dim(1)), k(w.dim(2)), values(static_cast<std::size_t>(w.elems())) {
    std::size_t i = 0;
    for (std::int64_t e = 0; e < w.dim(0); ++e) {
      for (std::int64_t r = 0; r < n; ++r) {
        for (std::int64_t c = 0; c < k; ++c) values[i++] = at(w, {e, r, c});
      }
    }
  }
  std::vector<double> times(std::int64_t e, const std::vector<double>& x, const TensorView& bias) const {
    std::vector<double> y(static_cast<std::size_t>(n));
    for (std::int64_t r = 0; r < n; ++r) {
      const float* w = values.data() + (e * n + r) * k;
      double sum = 0;
      for (std::int64_t c = 0; c < k; ++c) sum += x[static_cast<std::size_t>(c)] * static_cast<double>(w[c]);
      y[static_cast<std::size_t>(r)] = sum + (bias.defined() ? static_cast<double>(at(bias, {e, r})) : 0.0);
    }
    return y;
  }
  std::int64_t n, k;
  std::vector<float> values;
};

}  // namespace

std::vector<double> moe_forward_float64(const FloatWeights& weights, const LayerOptions& o, const FloatWeights* shared,
                                        TensorView x, TensorView topk_ids, TensorView topk_weights) {
  const Dense w13(weights.w13), w2(weights.w2);
  std::optional<Dense> s13, s2;
  if (shared != nullptr) {
    s13.emplace(shared->w13);
    s2.emplace(shared->w2);
  }
  const std::int64_t tokens = x.dim(0), hidden = x.dim(1);
  std::vector<double> out(static_cast<std::size_t>(tokens * hidden), 0.0);

  const auto mlp = [&](const FloatWeights& f, const Dense& a, const Dense& b, std::int64_t e,
                       const std::vector<double>& row) {
    const std::vector<double> v = a.times(e, row, f.b13);
    const auto inter = static_cast<std::size_t>(b.k);
    std::vector<double> h(inter);
    const bool gated = is_gated(f.activation), gate_first = f.gate_up_order == GateUpOrder::gate_up;
    for (std::size_t i = 0; i < inter; ++i) {
      const double second = gated ? v[inter + i] : 0.0;
      h[i] = activate_float64(f.activation, gate_first || !gated ? v[i] : second, gate_first ? second : v[i], o);
    }
    return b.times(e, h, f.b2);
  };

  for (std::int64_t t = 0; t < tokens; ++t) {
    const std::vector<float> values = row_of(x, t);
    const std::vector<double> row(values.begin(), values.end());
    double* dst = out.data() + t * hidden;
    const auto add = [&](double weight, const std::vector<double>& y) {
      for (std::size_t n = 0; n < y.size(); ++n) dst[n] += weight * y[n];
    };
    for (std::int64_t j = 0; j < topk_ids.dim(1); ++j) {
      const std::int64_t e = local_expert(o, id_at(topk_ids, t, j));
      if (e < 0) continue;
      const double weight = at(topk_weights, {t, j});
      if (o.router_weight_on_input) {
        std::vector<double> scaled = row;
        for (double& v : scaled) v *= weight;
        add(1.0, mlp(weights, w13, w2, e, scaled));
      } else {
        add(weight, mlp(weights, w13, w2, e, row));
      }
    }
    if (shared != nullptr) {
      double weight = 1.0;
      if (o.shared_gate.defined()) {
        double dot = 0;
        for (std::int64_t i = 0; i < hidden; ++i) {
          dot += row[static_cast<std::size_t>(i)] *
                 load(o.shared_gate.as<char>() + i * static_cast<std::int64_t>(size_bytes(o.shared_gate.dtype())),
                      o.shared_gate.dtype());
        }
        weight = 1.0 / (1.0 + std::exp(-dot));
      }
      add(weight, mlp(*shared, *s13, *s2, 0, row));
    }
  }
  return out;
}

double relative_error(TensorView a, const std::vector<double>& b) {
  double difference = 0, norm = 0;
  std::size_t i = 0;
  for (std::int64_t t = 0; t < a.dim(0); ++t) {
    for (std::int64_t n = 0; n < a.dim(1); ++n, ++i) {
      const double got = at(a, {t, n});
      if (!std::isfinite(b[i])) {  // agrees or not; it has no distance
        if (got == b[i] || (std::isnan(got) && std::isnan(b[i]))) continue;
        return std::numeric_limits<double>::infinity();
      }
      const double d = got - b[i];
      difference += d * d;
      norm += b[i] * b[i];
    }
  }
  return norm > 0 ? std::sqrt(difference / norm) : std::sqrt(difference);
}

double relative_error(TensorView a, TensorView b) {
  std::vector<double> values;
  for (std::int64_t t = 0; t < b.dim(0); ++t) {
    for (std::int64_t n = 0; n < b.dim(1); ++n) values.push_back(at(b, {t, n}));
  }
  return relative_error(a, values);
}

}  // namespace octomoe::reference
