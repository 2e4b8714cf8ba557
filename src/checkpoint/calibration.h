// Captured hidden states and routes, and the static activation scales of a checkpoint's matrices that follow from them.
#pragma once

#include <map>
#include <string>

#include "checkpoint/expert_names.h"
#include "checkpoint/tensor_store.h"
#include "octomoe/checkpoint.h"

namespace octomoe::checkpoint {

// x . routerᵀ in float32, [T, E]. x, router: float32, fp16 or bf16.
Tensor router_logits(const TensorView& x, const TensorView& router, int threads);

// Captured states: layers.L.hidden_states [T, H] (or hidden_states for every layer), and where the tokens go:
// layers.L.topk_ids [T, k] int32 or int64, else layers.L.router_logits [T, E], else the router's weight says.
class CapturedStates {
 public:
  CapturedStates(const std::string& path, const ModelConfig& config);  // Error(io), Error(format)

  const std::string& path() const { return file_.path(); }
  Tensor hidden_states(int layer) const;                // as stored
  Tensor logits(int layer, std::int64_t tokens) const;  // as stored, or undefined
  // int32 or int64 [T, k] of x = hidden_states(layer). `layer` supplies router and correction bias.
  Tensor topk_ids(int index, const Tensor& x, const Checkpoint::Layer& layer, int threads) const;

 private:
  SafetensorsFile file_;
  const ModelConfig& config_;
};

struct CalibrationJob {
  const TensorStore& store;
  const Checkpoint& checkpoint;
  const std::map<int, LayerNames>& layers;
  const Scheme& scheme;
  const std::string& path;
  bool shared_experts = true;
  int threads = 0;
};
// Module ("model.layers.0.mlp.experts.3.gate_proj") -> scale of its input. Reads w13 once, one expert at a time.
// `on_layer(index)` comes before each layer.
std::map<std::string, float> calibrate_modules(const CalibrationJob& job, const std::function<void(int)>& on_layer);

}  // namespace octomoe::checkpoint
