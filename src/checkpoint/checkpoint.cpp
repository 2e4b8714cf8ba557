// Checkpoint: config.json, tensors, and one MoE layer at a time.
#include "octomoe/checkpoint.h"

#include <filesystem>
#include <utility>

#include "checkpoint/expert_names.h"
#include "checkpoint/expert_reader.h"
#include "checkpoint/file_io.h"
#include "checkpoint/json_read.h"
#include "checkpoint/model_config.h"
#include "checkpoint/tensor_store.h"
#include "tensor/check.h"

namespace octomoe {

using namespace checkpoint;

struct Checkpoint::Impl {
  TensorStore store;
  ModelConfig config;
  std::map<int, LayerNames> layers;

  std::string what(int index, const char* part) const {
    return fmt::format("{}: layer {}: {}", store.folder(), index, part);
  }
};

namespace {

// ERNIE keeps the bias beside the gate or (transformers 5 in memory) below it; others have it in the gate.
constexpr const char* kBiasNames[] = {"gate.e_score_correction_bias", "moe_statics.e_score_correction_bias",
                                      "gate.moe_statics.e_score_correction_bias"};

std::optional<std::string> find_bias(const TensorStore& store, const LayerNames& layer) {
  for (const char* name : kBiasNames) {
    if (store.has(layer.block + name)) return layer.block + name;
  }
  return std::nullopt;
}

// What only the tensors tell.
void complete_config(const TensorStore& store, const LayerNames& layer, ModelConfig& config) {
  if (!config.has_correction_bias) config.has_correction_bias = find_bias(store, layer).has_value();
  if (config.format != QuantFormat::none) return;
  const std::string gate = layer.expert(0) + layer.gate;
  const auto* info = store.find(layer.fused ? layer.fused_gate_up() : gate + ".weight");
  if (info && info->dtype_name == "F16") config.scheme = Scheme::fp16();
  // Channel-wise INT8 models exist whose config is silent: the engine is told on its command line.
  if (info && info->dtype_name == "I8" && store.has(gate + ".weight_scale")) {
    config.format = QuantFormat::channel_int8;
    config.scheme = Scheme::int8_channel();
  }
}

}  // namespace

Checkpoint Checkpoint::open(const std::string& path) {
  auto impl = std::make_shared<Impl>();
  impl->store = TensorStore::open(path);
  const std::string config_path = (std::filesystem::path(impl->store.folder()) / "config.json").string();
  impl->config = parse_model_config(parse_json(read_text(config_path, kMaxConfigBytes), config_path), config_path);
  impl->layers = find_expert_layers(impl->store.names());
  if (impl->layers.empty()) {
    fail(ErrorCode::format,
         "{}: expected tensors named like `model.layers.0.mlp.experts.0.gate_proj.weight`, got none in {}", path,
         impl->config.model_type);
  }
  complete_config(impl->store, impl->layers.begin()->second, impl->config);
  Checkpoint checkpoint;
  checkpoint.impl_ = std::move(impl);
  return checkpoint;
}

const ModelConfig& Checkpoint::config() const { return impl_->config; }

std::vector<int> Checkpoint::moe_layers() const {
  std::vector<int> out;
  for (const auto& [index, names] : impl_->layers) out.push_back(index);
  return out;
}

Checkpoint::Layer Checkpoint::layer(int index, std::int64_t first_expert, std::int64_t expert_count) const {
  const TensorStore& store = impl_->store;
  const ModelConfig& config = impl_->config;
  const auto found = impl_->layers.find(index);
  if (found == impl_->layers.end()) {
    bad_argument("index: expected a layer with experts ({}), got {}", fmt::join(moe_layers(), ", "), index);
  }
  if (first_expert < 0 || first_expert >= config.experts) {
    bad_argument("first_expert: expected 0..{}, got {}", config.experts - 1, first_expert);
  }
  const std::int64_t count = expert_count == -1 ? config.experts - first_expert : expert_count;
  if (count < 1 || count > config.experts - first_expert) {
    bad_argument("expert_count: expected 1..{} or -1, got {}", config.experts - first_expert, expert_count);
  }

  const LayerNames& names = found->second;
  Layer layer;
  if (names.fused) {
    layer.experts = read_fused_mlp(store, config, names.fused_gate_up(), names.fused_down(), first_expert, count,
                                   impl_->what(index, "experts"));
  } else {
    MlpNames mlp{{}, names.gate, names.up, names.down};
    for (std::int64_t e = first_expert; e < first_expert + count; ++e) mlp.prefixes.push_back(names.expert(e));
    layer.experts = read_mlp(store, config, mlp, {config.hidden, config.intermediate}, impl_->what(index, "experts"));
  }

  if (config.shared_intermediate > 0) {
    const MlpNames mlp{{names.shared(!config.shared_gate)}, "gate_proj", "up_proj", "down_proj"};
    layer.shared_expert =
        read_mlp(store, config, mlp, {config.hidden, config.shared_intermediate}, impl_->what(index, "shared expert"));
  }
  const std::vector<std::string> floats = {"F32", "F16", "BF16"};
  std::vector<std::string> wanted = {names.block + "gate.weight"};
  if (config.shared_gate) wanted.push_back(names.block + "shared_expert_gate.weight");
  const std::string bias = find_bias(store, names).value_or(names.block + kBiasNames[0]);
  if (config.has_correction_bias) wanted.push_back(bias);
  expect_present(store, wanted, impl_->what(index, "router"));

  expect_tensor(store, wanted[0], floats, {{config.experts, config.hidden}});
  layer.router = store.tensor(wanted[0]);
  if (config.shared_gate) {
    expect_tensor(store, wanted[1], floats, {{1, config.hidden}, {config.hidden}});
    auto whole = std::make_shared<const Tensor>(store.tensor(wanted[1]));
    layer.shared_gate = Tensor::wrap(TensorView(whole->view().data(), whole->dtype(), {config.hidden}), whole);
  }
  if (config.has_correction_bias) {
    expect_tensor(store, bias, floats, {{config.experts}, {1, config.experts}});
    layer.correction_bias = read_float32(store, bias, {config.experts});
  }
  return layer;
}

}  // namespace octomoe
