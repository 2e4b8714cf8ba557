// Small checkpoints in the shapes, types and names that the real writers use.
#pragma once

#include <functional>
#include <map>

#include "checkpoint/test_files.h"

namespace octomoe::test {

// H has a short last 128-block; I = 96 is a tensor-parallel slice.
struct TinySizes {
  std::int64_t hidden = 160, intermediate = 96, experts = 4, layers = 2;
};

struct TinyModel {
  TinySizes sizes;
  Json config;
  std::vector<RawTensor> tensors;

  void add(RawTensor t) { tensors.push_back(std::move(t)); }
  const RawTensor& at(const std::string& name) const {
    for (const RawTensor& t : tensors) {
      if (t.name == name) return t;
    }
    throw std::runtime_error("no tensor " + name);
  }
  RawTensor& at(const std::string& name) { return const_cast<RawTensor&>(std::as_const(*this).at(name)); }
  void remove(const std::string& name) {
    std::erase_if(tensors, [&](const RawTensor& t) { return t.name == name; });
  }

  // As one file, or as `shards` files and an index.
  void write(const std::string& folder, std::size_t shards = 1) const {
    fs::create_directories(folder);
    write_file(folder + "/config.json", config.dump(2));
    if (shards == 1) return write_file(folder + "/model.safetensors", safetensors_bytes(tensors));
    Json map;
    for (std::size_t s = 0; s < shards; ++s) {
      const std::string name =
          "model-0000" + std::to_string(s + 1) + "-of-0000" + std::to_string(shards) + ".safetensors";
      std::vector<RawTensor> part;
      for (std::size_t i = s; i < tensors.size(); i += shards) {
        part.push_back(tensors[i]);
        map[tensors[i].name] = name;
      }
      write_file(folder + "/" + name, safetensors_bytes(part));
    }
    write_file(folder + "/model.safetensors.index.json",
               Json{{"metadata", {{"total_size", 1}}}, {"weight_map", map}}.dump());
  }
};

inline Json qwen3_config(const TinySizes& s) {
  return {{"model_type", "qwen3_moe"}, {"hidden_size", s.hidden},  {"moe_intermediate_size", s.intermediate},
          {"num_experts", s.experts},  {"num_experts_per_tok", 2}, {"num_hidden_layers", s.layers},
          {"norm_topk_prob", true},    {"hidden_act", "silu"},     {"architectures", {"Qwen3MoeForCausalLM"}}};
}

// Attention, norms, embedding and router around experts that `add_expert` writes: (model, "…experts.0.gate_proj", N,
// K).
using AddMatrix = std::function<void(TinyModel&, const std::string&, std::int64_t, std::int64_t)>;
inline TinyModel qwen3_model(const AddMatrix& add_matrix, TinySizes s = {}, const std::string& dtype = "BF16") {
  TinyModel m{s, qwen3_config(s), {}};
  m.add(float_tensor("model.embed_tokens.weight", dtype, {32, s.hidden}));
  for (std::int64_t l = 0; l < s.layers; ++l) {
    const std::string layer = "model.layers." + std::to_string(l) + ".";
    m.add(float_tensor(layer + "input_layernorm.weight", dtype, {s.hidden}));
    m.add(float_tensor(layer + "self_attn.q_proj.weight", dtype, {32, s.hidden}));
    m.add(float_tensor(layer + "mlp.gate.weight", dtype, {s.experts, s.hidden}));
    for (std::int64_t e = 0; e < s.experts; ++e) {
      const std::string expert = layer + "mlp.experts." + std::to_string(e) + ".";
      add_matrix(m, expert + "gate_proj", s.intermediate, s.hidden);
      add_matrix(m, expert + "up_proj", s.intermediate, s.hidden);
      add_matrix(m, expert + "down_proj", s.hidden, s.intermediate);
    }
  }
  m.add(float_tensor("lm_head.weight", dtype, {32, s.hidden}));
  return m;
}
inline AddMatrix plain(const std::string& dtype = "BF16") {
  return [dtype](TinyModel& m, const std::string& name, std::int64_t n, std::int64_t k) {
    m.add(float_tensor(name + ".weight", dtype, {n, k}));
  };
}

// Bytes of the given tensors one behind another: what stacking must give.
inline std::string concat(const TinyModel& m, const std::vector<std::string>& names) {
  std::string out;
  for (const std::string& name : names) out += m.at(name).bytes;
  return out;
}
// Names of w13's (or w2's) parts over experts [first, last).
inline std::vector<std::string> part_names(const std::string& block, bool w13, const std::string& suffix,
                                           std::int64_t first, std::int64_t last) {
  std::vector<std::string> out;
  for (std::int64_t e = first; e < last; ++e) {
    const std::string expert = block + "experts." + std::to_string(e) + ".";
    if (w13) {
      out.push_back(expert + "gate_proj" + suffix);
      out.push_back(expert + "up_proj" + suffix);
    } else {
      out.push_back(expert + "down_proj" + suffix);
    }
  }
  return out;
}
inline Tensor tensor_of(const std::string& bytes, DType dtype, Shape shape) {
  Tensor t = Tensor::empty(dtype, shape);
  EXPECT_EQ(t.bytes(), bytes.size());
  std::memcpy(t.view().data(), bytes.data(), bytes.size());
  return t;
}
inline DType dtype_of(const std::string& name) {
  return name == "F32" ? DType::float32 : (name == "F16" ? DType::float16 : DType::bfloat16);
}
// The float weights of a layer as [E, 2I, H] and [E, H, I].
struct FloatLayer {
  Tensor w13, w2;
};
inline FloatLayer float_layer(const TinyModel& m, const std::string& block, const std::string& dtype = "BF16") {
  const auto& s = m.sizes;
  return {tensor_of(concat(m, part_names(block, true, ".weight", 0, s.experts)), dtype_of(dtype),
                    {s.experts, 2 * s.intermediate, s.hidden}),
          tensor_of(concat(m, part_names(block, false, ".weight", 0, s.experts)), dtype_of(dtype),
                    {s.experts, s.hidden, s.intermediate})};
}

}  // namespace octomoe::test
