#include "checkpoint/calibration.h"

#include <algorithm>
#include <vector>

#include "base/thread_pool.h"
#include "checkpoint/expert_reader.h"
#include "checkpoint/file_io.h"
#include "cpu/ops.h"
#include "quant/calibrate.h"
#include "quant/matrix.h"
#include "tensor/check.h"

namespace octomoe::checkpoint {

Tensor router_logits(const TensorView& x, const TensorView& router, int threads) {
  constexpr std::int64_t kRun = 8;
  const std::int64_t tokens = x.dim(0), hidden = x.dim(1), experts = router.dim(0);
  const Tensor w = to_float32(router, "router", router.shape(), false);
  Tensor logits = Tensor::empty(DType::float32, {tokens, experts});
  ThreadPool::shared(threads).parallel_for(ceil_div(tokens, kRun), [&](std::int64_t run, int) {
    std::vector<float> row(static_cast<std::size_t>(hidden));
    for (std::int64_t t = run * kRun; t < std::min(tokens, (run + 1) * kRun); ++t) {
      cpu::to_float(x.at(t).data(), x.dtype(), hidden, row.data());
      for (std::int64_t e = 0; e < experts; ++e) {
        logits.as<float>()[t * experts + e] = cpu::gate_dot(row.data(), w.as<float>() + e * hidden, hidden);
      }
    }
  });
  return logits;
}

CapturedStates::CapturedStates(const std::string& path, const ModelConfig& config)
    : file_(SafetensorsFile::open(path)), config_(config) {}

Tensor CapturedStates::hidden_states(int layer) const {
  std::string name = fmt::format("layers.{}.hidden_states", layer);
  if (!file_.find(name) && file_.find("hidden_states")) name = "hidden_states";
  const Tensor x = file_.tensor(name);
  const bool floats = x.dtype() == DType::float32 || x.dtype() == DType::float16 || x.dtype() == DType::bfloat16;
  if (!floats || x.view().rank() != 2 || x.dim(1) != config_.hidden || x.dim(0) < 1) {
    fail(ErrorCode::format, "{}: {}: expected F32, F16 or BF16 [T, {}], got {} {}", path(), name, config_.hidden,
         to_string(x.dtype()), to_string(x.shape()));
  }
  return x;
}

Tensor CapturedStates::logits(int layer, std::int64_t tokens) const {
  const std::string name = fmt::format("layers.{}.router_logits", layer);
  if (!file_.find(name)) return {};
  const Tensor logits = file_.tensor(name);
  if (logits.view().rank() != 2 || logits.dim(0) != tokens || logits.dim(1) != config_.experts) {
    fail(ErrorCode::format, "{}: {}: expected [{}, {}], got {}", path(), name, tokens, config_.experts,
         to_string(logits.shape()));
  }
  return logits;
}

Tensor CapturedStates::topk_ids(int index, const Tensor& x, const Checkpoint::Layer& layer, int threads) const {
  const std::string name = fmt::format("layers.{}.topk_ids", index);
  if (file_.find(name)) {
    const Tensor ids = file_.tensor(name);
    if (ids.view().rank() != 2 || ids.dim(0) != x.dim(0)) {
      fail(ErrorCode::format, "{}: {}: expected [{}, k], got {}", path(), name, x.dim(0), to_string(ids.shape()));
    }
    return ids;
  }
  const Tensor given = logits(index, x.dim(0));
  Tensor ids = Tensor::empty(DType::int32, {x.dim(0), config_.top_k});
  const Tensor weights = Tensor::empty(DType::float32, ids.shape());
  RouteOptions rule = config_.route;
  rule.correction_bias = layer.correction_bias;
  route(given.defined() ? given : router_logits(x, layer.router, threads), weights, ids, rule);
  return ids;
}

namespace {

// One layer's experts, or its shared expert: gate and up of expert e.
struct Source {
  const TensorStore& store;
  const ModelConfig& config;
  const CalibrateOptions& options;

  Peaks separate(const CalibrationRows& rows, std::int64_t expert, const std::string& gate, const std::string& up,
                 std::int64_t intermediate) const {
    expect_present(store, {gate, up}, store.folder());
    for (const std::string& name : {gate, up})
      expect_tensor(store, name, {"F32", "F16", "BF16"}, {{intermediate, config.hidden}});
    const Peaks peaks = rows.peaks(expert, store.tensor(gate), store.tensor(up), options, store.describe(gate));
    release_pages(store.bytes(gate));
    release_pages(store.bytes(up));
    return peaks;
  }
  Peaks fused(const CalibrationRows& rows, std::int64_t expert, const std::string& name) const {
    expect_tensor(store, name, {"F32", "F16", "BF16"}, {{config.experts, 2 * config.intermediate, config.hidden}});
    const Tensor all = store.tensor(name);
    const Peaks peaks = rows.peaks(expert, all.view().at(expert), {}, options, store.describe(name));
    const std::span<const std::byte> bytes = store.bytes(name);
    const std::size_t each = bytes.size() / static_cast<std::size_t>(config.experts);
    release_pages(bytes.subspan(static_cast<std::size_t>(expert) * each, each));
    return peaks;
  }
};

float scale_at(const Tensor& scale, std::int64_t expert) { return scale.as<float>()[scale.elems() == 1 ? 0 : expert]; }

}  // namespace

std::map<std::string, float> calibrate_modules(const CalibrationJob& job, const std::function<void(int)>& on_layer) {
  const ModelConfig& config = job.checkpoint.config();
  const CapturedStates states(job.path, config);
  CalibrateOptions options;
  options.activation = config.activation;
  options.threads = job.threads;
  const Source source{job.store, config, options};

  std::map<std::string, float> scales;
  const auto record = [&](const std::string& prefix, const LayerNames& names, const ActivationScales& s,
                          std::int64_t expert) {
    scales[prefix + names.gate] = scales[prefix + names.up] = scale_at(s.x_scale, expert);
    scales[prefix + names.down] = scale_at(s.act_scale, expert);
  };
  for (const auto& [index, names] : job.layers) {
    on_layer(index);
    try {
      const Checkpoint::Layer layer = job.checkpoint.layer(index, 0, 1);  // for the router
      const Tensor x = states.hidden_states(index);
      const CalibrationRows rows(x, states.topk_ids(index, x, layer, job.threads), config.experts);
      std::vector<Peaks> peaks;
      for (std::int64_t e = 0; e < config.experts; ++e) {
        const std::string expert = names.expert(e);
        peaks.push_back(names.fused ? source.fused(rows, e, names.fused_gate_up())
                                    : source.separate(rows, e, expert + names.gate + ".weight",
                                                      expert + names.up + ".weight", config.intermediate));
      }
      const ActivationScales experts = scales_of(job.scheme, peaks);
      // Fused experts are written under the usual names.
      for (std::int64_t e = 0; e < config.experts; ++e) record(names.expert(e), names, experts, e);

      if (!job.shared_experts || config.shared_intermediate == 0) continue;
      const std::string prefix = names.shared(!config.shared_gate);
      const LayerNames usual;
      const Tensor ids = Tensor::zeros(DType::int32, {x.dim(0), 1});  // every token
      const Peaks shared = source.separate(CalibrationRows(x, ids, 1), 0, prefix + usual.gate + ".weight",
                                           prefix + usual.up + ".weight", config.shared_intermediate);
      record(prefix, usual, scales_of(job.scheme, {shared}), 0);
    } catch (const Error& e) {
      // What is wrong with its values is a fault of the file.
      if (e.code() != ErrorCode::invalid_argument) throw;
      fail(ErrorCode::format, "{}: layer {}: {}", job.path, index, e.what());
    }
  }
  return scales;
}

}  // namespace octomoe::checkpoint
