// Where each model keeps its experts: pure functions of tensor names.
#pragma once

#include <cstdint>
#include <map>
#include <string>
#include <vector>

namespace octomoe::checkpoint {

// One MoE layer. `block` is "model.layers.3.mlp." or the like, the other names follow it.
struct LayerNames {
  std::string block;
  bool fused = false;  // experts.gate_up_proj [E, 2I, H] and experts.down_proj [E, H, I], no suffix
  std::string gate = "gate_proj", up = "up_proj", down = "down_proj";  // Mixtral: w1, w3, w2

  std::string expert(std::int64_t e) const;  // "...experts.5."
  std::string shared(bool plural) const;     // "...shared_experts." (DeepSeek, ERNIE), "...shared_expert." (Qwen)
  std::string fused_gate_up() const { return block + "experts.gate_up_proj"; }
  std::string fused_down() const { return block + "experts.down_proj"; }
};

// Layers that have experts. Model prefixes: "model.language_model.", "model.", "language_model.model.",
// "language_model." and none; the first that occurs counts, so a vision tower or a draft model ("mtp.") does not.
std::map<int, LayerNames> find_expert_layers(const std::vector<std::string>& names);

}  // namespace octomoe::checkpoint
