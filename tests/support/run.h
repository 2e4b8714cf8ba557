// Runs the public calls on a device from host tensors, so that one test body serves every engine.
#pragma once

#include <gtest/gtest.h>

#include <cstring>
#include <utility>
#include <vector>

#include "cuda/driver.h"
#include "octomoe/layer.h"
#include "support/random.h"

namespace octomoe::testing {

// Every engine's device. A test of one that is not here skips: skip_without(device).
inline std::vector<Device> devices() { return {Device::cpu(), Device::cuda(0)}; }
inline const Device kGpu = Device::cuda(0);

inline bool is_here(Device device) { return device.type == DeviceType::cpu || cuda::driver_available(); }

inline Tensor on(Device device, const TensorView& t) {
  if (!t.defined()) return {};
  return device == t.device() ? Tensor::wrap(t, nullptr) : Tensor::copy_of(t, device);
}

// What `call(tensor on device)` writes into a copy of `out` there comes back into `out`.
template <class Call>
void through(Device device, const TensorView& out, const Call& call) {
  if (device == out.device()) return call(out);
  const Tensor there = Tensor::copy_of(out, device);
  call(there.view());
  const Tensor back = Tensor::copy_of(there);
  const auto row = static_cast<std::size_t>(out.dim(out.rank() - 1)) * size_bytes(out.dtype());
  const TensorView flat = back.view();
  ASSERT_EQ(out.is_contiguous(), true);
  if (out.elems() > 0)
    std::memcpy(out.data(), flat.data(), row * static_cast<std::size_t>(out.elems() / out.dim(out.rank() - 1)));
}

inline void forward(Device device, MoeLayer& layer, const TensorView& x, const TensorView& ids,
                    const TensorView& weights, const TensorView& out, ForwardOptions options = {}) {
  through(device, out, [&](const TensorView& there) {
    layer.forward(on(device, x), on(device, ids), on(device, weights), there, options);
  });
}

inline void gemm(Device device, const Activations& a, const PreparedMatrix& b, const TensorView& d, Groups groups,
                 GemmOptions options = {}) {
  const Tensor values = on(device, a.values), scale = on(device, a.scale), q = on(device, a.q),
               zero = on(device, a.zero);
  const Tensor index = on(device, groups.index), bias = on(device, options.bias);
  groups.index = index;
  options.bias = bias;
  through(device, d, [&](const TensorView& there) {
    grouped_gemm({values, scale, q, zero}, b, there, groups, options);
  });
}

struct LayerCase {
  std::int64_t experts = 8, hidden = 128, intermediate = 96, tokens = 13;
  int top_k = 3;
  Scheme scheme;
  Activation activation = Activation::swiglu;
  GateUpOrder order = GateUpOrder::gate_up;
  bool biases = false;
  std::uint32_t seed = 1;
};

// Float schemes must stay inside fp16's range, also where the data have rows 3000 times larger than others.
inline float amplitude(const LayerCase& c) {
  if (c.scheme.is_integer()) return 1.0f;
  return c.scheme.kind == SchemeKind::fp16 ? 0.02f : 0.1f;
}

inline MoeWeights make_weights(const LayerCase& c, std::int64_t experts) {
  const std::int64_t n13 = c.intermediate * (is_gated(c.activation) ? 2 : 1);
  const Tensor w13 = random_tensor(DType::float32, {experts, n13, c.hidden}, c.seed * 10 + 1, 0.05f * amplitude(c));
  const Tensor w2 =
      random_tensor(DType::float32, {experts, c.hidden, c.intermediate}, c.seed * 10 + 2, 0.05f * amplitude(c));
  QuantizeOptions o;
  o.activation = c.activation;
  o.gate_up_order = c.order;
  Tensor b13, b2, x_scale, act_scale;
  if (c.biases) {
    o.b13 = b13 = random_tensor(DType::float32, {experts, n13}, c.seed * 10 + 3, 0.2f);
    o.b2 = b2 = random_tensor(DType::float32, {experts, c.hidden}, c.seed * 10 + 4, 0.2f);
  }
  if (c.scheme.activation_scale == ActivationScale::static_) {
    const std::int64_t count = c.scheme.is_integer() ? 1 : experts;
    x_scale = Tensor::empty(DType::float32, {count});
    act_scale = Tensor::empty(DType::float32, {count});
    for (std::int64_t i = 0; i < count; ++i) {
      x_scale.as<float>()[i] = 0.05f + 0.01f * static_cast<float>(i);
      act_scale.as<float>()[i] = 0.03f + 0.002f * static_cast<float>(i);
    }
    o.x_scale = x_scale;
    o.act_scale = act_scale;
  }
  return quantize(c.scheme, w13, w2, o);
}

struct LayerInput {
  Tensor x, ids, weights;
};

// x's values grow with `scale`, out's as well: 1 passes fp16's range here and there, kSmall does not.
inline constexpr float kSmall = 0.002f;
inline LayerInput make_input(const LayerCase& c, DType dtype = DType::bfloat16, bool holes = true, float scale = 1.0f) {
  return {random_tensor(dtype, {c.tokens, c.hidden}, c.seed * 10 + 5, scale * amplitude(c)),
          random_ids(c.tokens, c.top_k, c.experts, c.seed * 10 + 6, holes),
          random_topk_weights(c.tokens, c.top_k, c.seed * 10 + 7)};
}

// Canaries before and after every output row's memory: a write outside is seen.
class GuardedOutput {
 public:
  static constexpr std::uint8_t kInside = 0xFF;
  GuardedOutput(DType dtype, std::int64_t rows, std::int64_t columns, Device device = {})
      : dtype_(dtype), rows_(rows), columns_(columns), pad_(32), raw_(Tensor::empty(DType::uint8, {bytes_in_all()})) {
    // Outside of the rows canaries, inside NaN of every type: what is added to must have been written before.
    for (std::int64_t i = 0; i < raw_.elems(); ++i) raw_.as<std::uint8_t>()[i] = inside(i) ? kInside : 0xA5;
    there_ = on(device, raw_);
  }
  TensorView view() { return view_of(there_); }
  Tensor dense() { return Tensor::copy_of(view_of(Tensor::copy_of(there_))); }
  bool intact() const {
    const Tensor raw = Tensor::copy_of(there_);
    for (std::int64_t i = 0; i < raw.elems(); ++i) {
      if (!inside(i) && raw.as<std::uint8_t>()[i] != 0xA5) return false;
    }
    return true;
  }

 private:
  TensorView view_of(const Tensor& raw) const {
    return TensorView(raw.as<std::uint8_t>() + pad_ * size(), dtype_, Shape{rows_, columns_}, Shape{columns_ + pad_, 1},
                      raw.device());
  }
  std::int64_t size() const { return static_cast<std::int64_t>(size_bytes(dtype_)); }
  bool inside(std::int64_t byte) const {
    const std::int64_t at = byte - pad_ * size(), step = (columns_ + pad_) * size();
    return at >= 0 && at / step < rows_ && at % step < columns_ * size();
  }
  std::int64_t bytes_in_all() const { return (pad_ + rows_ * (columns_ + pad_)) * size(); }
  DType dtype_;
  std::int64_t rows_, columns_, pad_;
  Tensor raw_, there_;
};

inline Tensor run_layer(Device device, const MoeWeights& weights, LayerOptions options, const LayerInput& in,
                        DType out_dtype = DType::bfloat16) {
  MoeLayer layer(device, weights, std::move(options));
  GuardedOutput out(out_dtype, in.x.dim(0), weights.hidden(), device);
  layer.forward(on(device, in.x), on(device, in.ids), on(device, in.weights), out.view());
  EXPECT_TRUE(out.intact()) << "wrote outside the output";
  return out.dense();
}

// Values of out in float16 that stay far enough from Inf to be checked, and all.
struct Checked {
  std::int64_t values = 0, all = 0;
};
// out, of a layer with CombineOrder::any and `before` in it, is within the bound of docs/schemes.md section 4 of what
// the CPU engine makes of each slot alone. At least a quarter of it can be checked, unless `checked` counts.
inline void expect_any_order(const Tensor& out, const MoeWeights& weights, const LayerOptions& options,
                             const LayerInput& in, const Tensor& before = {}, Checked* checked = nullptr) {
  const std::int64_t top_k = in.ids.dim(1), elems = out.elems(), hidden = weights.hidden();
  std::vector<double> sum(static_cast<std::size_t>(elems)), size(sum);
  const auto add = [&](const Tensor& values, double keep) {
    for (std::int64_t i = 0; i < elems; ++i) {
      const double v = reference::load(values.as<char>() + i * static_cast<std::int64_t>(size_bytes(values.dtype())),
                                       values.dtype());
      sum[static_cast<std::size_t>(i)] += v;
      size[static_cast<std::size_t>(i)] += std::abs(v) * (1 + keep);
    }
  };
  LayerOptions one = options;
  one.shared_expert.reset();
  one.shared_gate = {};
  one.combine_order = CombineOrder::slots;
  LayerInput alone{Tensor::copy_of(in.x), Tensor::copy_of(in.ids), Tensor::copy_of(in.weights)};
  const double y = std::ldexp(1.0, -8);  // what bf16 takes or adds, which the slots' rows passed through
  for (std::int64_t j = 0; j < top_k; ++j) {
    for (std::int64_t i = 0; i < in.ids.elems(); ++i) {
      alone.ids.as<std::int32_t>()[i] = i % top_k == j ? in.ids.as<std::int32_t>()[i] : -1;
    }
    add(run_layer(Device::cpu(), weights, one, alone, DType::float32), y);
  }
  if (options.shared_expert) {
    one.shared_expert = options.shared_expert;
    one.shared_gate = options.shared_gate;
    for (std::int64_t i = 0; i < in.ids.elems(); ++i) alone.ids.as<std::int32_t>()[i] = -1;
    add(run_layer(Device::cpu(), weights, one, alone, DType::float32), y);
  }
  if (before.defined()) add(before, 0);
  const bool half = out.dtype() == DType::float16;
  const double u = std::ldexp(1.0, half ? -11 : -8), least = std::ldexp(1.0, half ? -25 : -134);
  const auto n = static_cast<double>(top_k + 2);
  std::int64_t values = 0;
  for (std::int64_t i = 0; i < elems; ++i) {
    const auto at = static_cast<std::size_t>(i);
    if (half && size[at] > 65000) continue;  // may be Inf on the way
    ++values;
    const double got = reference::load(out.as<char>() + 2 * i, out.dtype());
    const double bound = (std::pow(1 + u, n) * (1 + y) * (1 + 1e-6) - 1) * size[at] + n * least;
    ASSERT_LE(std::abs(got - sum[at]), bound)
        << "token " << i / hidden << ", column " << i % hidden << ": " << got << " instead of " << sum[at];
  }
  if (checked == nullptr) {
    EXPECT_GE(values, elems / 4);
  } else {
    checked->values += values;
    checked->all += elems;
  }
}

// NaN of every floating type, so that what is added to without having been written shows.
inline Tensor nan_tensor(DType type, Shape shape, Device device = {}) {
  const Tensor all = Tensor::empty(type, std::move(shape));
  std::memset(all.view().data(), GuardedOutput::kInside, all.bytes());
  return Tensor::copy_of(all, device);
}

inline bool same_bits(const Tensor& a, const Tensor& b) {
  return a.bytes() == b.bytes() && (a.bytes() == 0 || std::memcmp(a.view().data(), b.view().data(), a.bytes()) == 0);
}

}  // namespace octomoe::testing
