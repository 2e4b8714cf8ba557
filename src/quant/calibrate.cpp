// calibrate: a dot product, an activation and a maximum for each (row, channel), nothing else is kept.
#include "quant/calibrate.h"

#include <algorithm>
#include <atomic>

#include "base/thread_pool.h"
#include "cpu/ops.h"
#include "quant/matrix.h"
#include "quant/numerics.h"
#include "quant/reference.h"
#include "tensor/check.h"

namespace octomoe {
namespace {

constexpr std::int64_t kChannels = 8;  // a thread's share: their weights (2 x 8 rows) and a row of x stay in L2

void raise(std::atomic<std::uint32_t>& top, std::uint32_t value) {
  for (std::uint32_t seen = top.load(); value > seen && !top.compare_exchange_weak(seen, value);) {
  }
}

void check_static(const Scheme& scheme) {
  check(scheme);
  if (scheme.activation_scale != ActivationScale::static_) {
    bad_argument("scheme: expected static activation scales, got {}", to_string(scheme));
  }
}

float scale_of(std::uint32_t peak, float limit) {
  // At least what MoeWeights accepts: everything is 0 then, whatever the scale.
  return std::max(num::symmetric_scale(peak, limit).scale, num::kTiny);
}

}  // namespace

CalibrationRows::CalibrationRows(TensorView x, TensorView topk_ids, std::int64_t experts, TensorView topk_weights) {
  check_defined(x, "x");
  check_device(x, "x", Device::cpu());
  check_dtype(x, "x", {DType::float32, DType::float16, DType::bfloat16});
  check_shape(x, "x", {-1, -1});
  check_rows(x, "x");
  const std::int64_t tokens = x.dim(0), hidden = x.dim(1);
  check_defined(topk_ids, "topk_ids");
  check_device(topk_ids, "topk_ids", Device::cpu());
  check_dtype(topk_ids, "topk_ids", {DType::int32, DType::int64});
  check_shape(topk_ids, "topk_ids", {tokens, -1});
  if (topk_weights.defined()) {
    check_device(topk_weights, "topk_weights", Device::cpu());
    check_dtype(topk_weights, "topk_weights", {DType::float32});
    check_shape(topk_weights, "topk_weights", {tokens, topk_ids.dim(1)});
  }

  x_ = Tensor::empty(DType::float32, {tokens, hidden});
  x_peak_.resize(static_cast<std::size_t>(tokens));
  for (std::int64_t t = 0; t < tokens; ++t) {
    float* row = x_.as<float>() + t * hidden;
    cpu::to_float(x.at(t).data(), x.dtype(), hidden, row);
    const std::uint32_t peak = cpu::absmax_bits(row, hidden);
    if (peak >= num::kInfBits) {
      const float* bad = std::find_if(row, row + hidden, [](float v) { return !num::is_finite(v); });
      bad_argument("x: expected finite values, got {} at row {}, column {}", *bad, t, bad - row);
    }
    x_peak_[static_cast<std::size_t>(t)] = peak;
  }

  rows_.resize(static_cast<std::size_t>(experts));
  bool any = false;
  for (std::int64_t t = 0; t < tokens; ++t) {
    for (std::int64_t j = 0; j < topk_ids.dim(1); ++j) {
      const std::int64_t at = t * topk_ids.strides()[0] + j * topk_ids.strides()[1];
      const std::int64_t e =
          topk_ids.dtype() == DType::int32 ? topk_ids.as<std::int32_t>()[at] : topk_ids.as<std::int64_t>()[at];
      if (e < -1 || e >= experts) {
        bad_argument("topk_ids: expected -1 to {}, got {} at token {}, slot {}", experts - 1, e, t, j);
      }
      if (e < 0) continue;
      any = true;
      const float weight = topk_weights.defined()
                               ? topk_weights.as<float>()[t * topk_weights.strides()[0] + j * topk_weights.strides()[1]]
                               : 1.0f;
      rows_[static_cast<std::size_t>(e)].push_back({t, weight});
    }
  }
  if (!any) bad_argument("topk_ids: expected at least one row for an expert to calibrate on, got none");
}

Peaks CalibrationRows::peaks(std::int64_t expert, TensorView first, TensorView second, const CalibrateOptions& o,
                             const std::string& name) const {
  const std::vector<Row>& rows = rows_[static_cast<std::size_t>(expert)];
  Peaks peaks;
  for (const Row& r : rows) peaks.x = std::max(peaks.x, x_peak_[static_cast<std::size_t>(r.token)]);
  if (rows.empty()) return peaks;

  const bool gated = is_gated(o.activation), up_first = gated && o.gate_up_order == GateUpOrder::up_gate;
  const std::int64_t h = hidden(), inter = first.dim(0) / (gated && !second.defined() ? 2 : 1);
  const TensorView low = gated ? first.slice(0, inter) : first;
  const TensorView high = gated ? (second.defined() ? second : first.slice(inter, inter)) : TensorView();
  const Tensor bias = o.b13.defined() ? to_float32(o.b13, "b13", o.b13.shape(), false) : Tensor();
  const float* b = bias.defined() ? bias.as<float>() + expert * bias.dim(1) : nullptr;

  std::atomic<std::uint32_t> top{0};
  ThreadPool::shared(o.threads).parallel_for(ceil_div(inter, kChannels), [&](std::int64_t chunk, int) {
    std::vector<float> w(static_cast<std::size_t>(2 * h));
    float *const w0 = w.data(), *const w1 = w.data() + h;
    std::uint32_t best = 0;
    for (std::int64_t i = chunk * kChannels; i < std::min(inter, (chunk + 1) * kChannels); ++i) {
      cpu::to_float(low.at(i).data(), low.dtype(), h, w0);
      if (gated) cpu::to_float(high.at(i).data(), high.dtype(), h, w1);
      for (const Row& r : rows) {
        const float* x = x_.as<float>() + r.token * h;
        const auto value = [&](const float* weights, std::int64_t channel) {
          const float v = cpu::gate_dot(x, weights, h) * r.weight;
          return b != nullptr ? v + b[channel] : v;
        };
        const float v0 = value(w0, i), v1 = gated ? value(w1, inter + i) : 0.0f;
        const float act = reference::activate(o.activation, up_first ? v1 : v0, up_first ? v0 : v1, o.layer);
        best = std::max(best, num::abs_bits(num::bf16_to_float(num::float_to_bf16(act))));
      }
    }
    raise(top, best);
  });
  if (top.load() >= num::kInfBits) {
    bad_argument("{}: expected finite activations of expert {}, got {}", name, expert, num::from_bits(top.load()));
  }
  peaks.act = top.load();
  return peaks;
}

ActivationScales scales_of(const Scheme& scheme, const std::vector<Peaks>& peaks) {
  check_static(scheme);
  Peaks all;
  for (const Peaks& p : peaks) all = {std::max(all.x, p.x), std::max(all.act, p.act)};
  const bool per_expert = scheme.kind == SchemeKind::w4a8_fp8;
  const float limit = per_expert ? num::kE4m3Max : num::kInt8Max;
  const std::int64_t count = per_expert ? static_cast<std::int64_t>(peaks.size()) : 1;
  const ActivationScales s{Tensor::empty(DType::float32, {count}), Tensor::empty(DType::float32, {count})};
  for (std::int64_t e = 0; e < count; ++e) {
    const Peaks own = per_expert ? peaks[static_cast<std::size_t>(e)] : all;
    s.x_scale.as<float>()[e] = scale_of(own.x != 0 ? own.x : all.x, limit);
    s.act_scale.as<float>()[e] = scale_of(own.act != 0 ? own.act : all.act, limit);
  }
  return s;
}

ActivationScales calibrate(const Scheme& scheme, TensorView w13, TensorView x, TensorView topk_ids,
                           const CalibrateOptions& options) {
  check_static(scheme);
  check_defined(w13, "w13");
  check_device(w13, "w13", Device::cpu());
  check_dtype(w13, "w13", {DType::float32, DType::float16, DType::bfloat16});
  check_shape(w13, "w13", {-1, -1, -1});
  if (w13.strides()[2] != 1) bad_argument("w13: expected contiguous rows, got strides {}", to_string(w13.strides()));
  if (is_gated(options.activation) && w13.dim(1) % 2 != 0) {
    bad_argument("w13: expected an even number of rows (gate and up), got {}", to_string(w13.shape()));
  }
  check_defined(x, "x");
  check_shape(x, "x", {-1, w13.dim(2)});
  if (options.b13.defined()) check_shape(options.b13, "b13", {w13.dim(0), w13.dim(1)});
  const bool on_input = options.layer.router_weight_on_input;
  if (on_input) check_defined(options.topk_weights, "topk_weights");

  const CalibrationRows rows(x, topk_ids, w13.dim(0), on_input ? options.topk_weights : TensorView());
  std::vector<Peaks> peaks;
  for (std::int64_t e = 0; e < w13.dim(0); ++e) peaks.push_back(rows.peaks(e, w13.at(e), {}, options, "w13"));
  return scales_of(scheme, peaks);
}

}  // namespace octomoe
