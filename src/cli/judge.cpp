#include "cli/judge.h"

#include <fmt/format.h>

#include <algorithm>
#include <cstring>
#include <memory>
#include <optional>

#include "base/thread_pool.h"
#include "checkpoint/calibration.h"
#include "cli/gpu.h"
#include "octomoe/calibrate.h"
#include "quant/matrix.h"
#include "quant/reference.h"

namespace octomoe::cli {
namespace {

// The references take one row at a time, and a token's result depends on that token only: so tokens go in parallel.
template <class Fn>
void for_token_runs(std::int64_t tokens, int threads, const Fn& fn) {
  constexpr std::int64_t kRun = 8;
  ThreadPool::shared(threads).parallel_for(
      ceil_div(tokens, kRun), [&](std::int64_t i, int) { fn(i * kRun, std::min(kRun, tokens - i * kRun)); });
}

struct FloatLayer {
  Tensor w13, w2;
  reference::FloatWeights view;
};

FloatLayer float_layer(const MoeWeights& w, int threads) {
  const bool plain = w.scheme.kind == SchemeKind::bf16 || w.scheme.kind == SchemeKind::fp16;
  FloatLayer f{plain ? w.w13.values : dequantize(w.w13, threads), plain ? w.w2.values : dequantize(w.w2, threads), {}};
  f.view = {f.w13, f.w2, w.b13, w.b2, w.activation, w.gate_up_order};
  return f;
}

// Where tokens go, by the model's rule.
struct Routed {
  Tensor x, ids, weights;
};
Routed routed(const JudgeInput& in, const Tensor& x, const Tensor& logits) {
  const Shape shape{x.dim(0), in.config.top_k};
  Routed r{x, Tensor::empty(DType::int32, shape), Tensor::empty(DType::float32, shape)};
  RouteOptions rule = in.config.route;
  rule.correction_bias = in.layer.correction_bias;
  route(logits.defined() ? logits : checkpoint::router_logits(x, in.layer.router, in.threads), r.weights, r.ids, rule);
  return r;
}

// In the scheme asked for: as it is, or quantised from floats, static scales from `calibration`.
MoeWeights in_scheme(const Scheme& scheme, const MoeWeights& own, const FloatLayer& floats, const Routed& calibration,
                     int threads) {
  if (scheme == own.scheme) return own;
  QuantizeOptions options;
  options.activation = own.activation;
  options.gate_up_order = own.gate_up_order;
  options.b13 = own.b13;
  options.b2 = own.b2;
  options.threads = threads;
  ActivationScales scales;
  if (scheme.activation_scale == ActivationScale::static_) {
    CalibrateOptions how;
    how.activation = own.activation;
    how.gate_up_order = own.gate_up_order;
    how.b13 = own.b13;
    how.threads = threads;
    scales = calibrate(scheme, floats.w13, calibration.x, calibration.ids, how);
    options.x_scale = scales.x_scale;
    options.act_scale = scales.act_scale;
  }
  return quantize(scheme, floats.w13, floats.w2, options);
}

}  // namespace

Judgement judge(const JudgeInput& in) {
  const std::int64_t tokens = in.x.dim(0), judged = in.judged_tokens, hidden = in.config.hidden;
  const int k = in.config.top_k;
  const double steps = static_cast<double>(in.schemes.size()) + 2;  // the float reference, each scheme, the timing
  const auto step = [&](double done, const std::string& what) { in.on_step(done / steps, what); };

  step(0, "reference");
  const Routed routes = routed(in, in.x, in.logits);
  const Tensor &ids = routes.ids, &weights = routes.weights;
  Routed calibration, shared_calibration;
  if (in.calibration_x.defined()) {
    calibration = routed(in, in.calibration_x, in.calibration_logits);
    const std::int64_t rows = in.calibration_x.dim(0);
    shared_calibration = {in.calibration_x, Tensor::zeros(DType::int32, {rows, 1}), {}};  // sees every token
  }

  LayerOptions base;
  base.threads = in.threads;
  base.shared_gate = in.layer.shared_gate;
  const FloatLayer experts = float_layer(in.layer.experts, in.threads);
  FloatLayer shared;
  if (in.layer.shared_expert) shared = float_layer(*in.layer.shared_expert, in.threads);

  std::vector<double> exact(static_cast<std::size_t>(judged * hidden));
  for_token_runs(judged, in.threads, [&](std::int64_t begin, std::int64_t count) {
    const std::vector<double> part = reference::moe_forward_float64(
        experts.view, base, in.layer.shared_expert ? &shared.view : nullptr, in.x.view().slice(begin, count),
        ids.view().slice(begin, count), weights.view().slice(begin, count));
    std::copy(part.begin(), part.end(), exact.begin() + begin * hidden);
  });

  // The bf16 layer is timed even if nobody asked for it: it is the yardstick, where the engine has it.
  std::vector<Scheme> schemes = in.schemes;
  std::optional<GpuBench> gpu;
  if (in.device.type == DeviceType::cuda) gpu.emplace(in.device);
  auto yardstick =
      static_cast<std::size_t>(std::find(schemes.begin(), schemes.end(), Scheme::bf16()) - schemes.begin());
  if (yardstick == schemes.size() && !gpu) schemes.push_back(Scheme::bf16());

  Judgement result;
  std::vector<std::unique_ptr<MoeLayer>> layers;
  std::vector<Contender> contenders;
  const Tensor x = Tensor::copy_of(in.x, in.device), device_ids = Tensor::copy_of(ids, in.device),
               device_weights = Tensor::copy_of(weights, in.device);
  const Tensor out = Tensor::empty(DType::float32, {tokens, hidden}, in.device);
  const Tensor unwritten = Tensor::empty(DType::float32, {tokens, hidden});
  std::memset(unwritten.view().data(), 0xff, unwritten.bytes());  // NaN: a row that is not written shows
  Tensor expected = Tensor::empty(DType::float32, {judged, hidden});
  for (std::size_t s = 0; s < schemes.size(); ++s) {
    const std::string name = to_string(schemes[s]);
    step(1 + static_cast<double>(std::min(s, in.schemes.size() - 1)), name);
    const MoeWeights w = in_scheme(schemes[s], in.layer.experts, experts, calibration, in.threads);
    LayerOptions options = base;
    if (in.layer.shared_expert)
      options.shared_expert = in_scheme(schemes[s], *in.layer.shared_expert, shared, shared_calibration, in.threads);
    layers.push_back(std::make_unique<MoeLayer>(in.device, w, options));
    MoeLayer* layer = layers.back().get();
    layer->reserve(tokens, k);
    const auto forward = [=](const Tensor& to, Stream stream) {
      layer->forward(x, device_ids, device_weights, to, {}, stream);
    };
    contenders.push_back(gpu ? gpu->cold_contender(name, [=](Stream stream) { forward(out, stream); })
                             : Contender{name, [=] { return time_us([&] { forward(out, nullptr); }); }});
    if (s >= in.schemes.size()) continue;

    LayerJudgement j;
    j.weight_bytes = static_cast<double>(layer->weight_bytes());
    const Tensor fresh = Tensor::copy_of(unwritten, in.device);
    forward(fresh, gpu ? gpu->stream() : nullptr);
    if (gpu) gpu->synchronize();
    const Tensor result_on_host = Tensor::copy_of(fresh);
    for_token_runs(judged, in.threads, [&](std::int64_t begin, std::int64_t count) {
      reference::moe_forward(w, options, in.x.view().slice(begin, count), ids.view().slice(begin, count),
                             weights.view().slice(begin, count), expected.view().slice(begin, count));
    });
    const TensorView got = result_on_host.view().slice(0, judged);
    j.error_vs_float = reference::relative_error(got, exact);
    j.error_vs_quantised = reference::relative_error(got, expected);
    j.bit_equal = std::memcmp(got.data(), expected.view().data(), expected.bytes()) == 0;
    result.schemes.push_back(j);
  }

  step(1 + static_cast<double>(in.schemes.size()), "timing");
  const std::vector<Timing> timings = interleave(contenders, in.timing);
  for (std::size_t s = 0; s < in.schemes.size(); ++s) result.schemes[s].us = timings[s].median_us;
  if (yardstick < timings.size()) result.bf16_us = timings[yardstick].median_us;
  return result;
}

}  // namespace octomoe::cli
