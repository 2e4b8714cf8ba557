// The models' own names for the same few numbers. Sources: the configuration classes and routers of transformers 5.
#include "checkpoint/model_config.h"

#include <array>
#include <string_view>

#include "tensor/check.h"

namespace octomoe::checkpoint {
namespace {

constexpr std::int64_t kMaxSize = std::int64_t{1} << 24;
constexpr std::int64_t kMaxExperts = 1 << 16;

enum class Family { qwen, ernie, deepseek, mixtral };

struct Model {
  const char* type;
  Family family;
  bool shared_gate;         // a shared expert times sigmoid(x . gate)
  bool always_renormalize;  // the router has no norm_topk_prob
};
constexpr std::array<Model, 8> kModels{{
    {"qwen3_moe", Family::qwen, false, false},
    {"qwen3_next", Family::qwen, true, false},
    {"qwen3_5_moe", Family::qwen, true, true},
    {"qwen3_5_moe_text", Family::qwen, true, true},
    {"ernie4_5_moe", Family::ernie, false, true},
    {"deepseek_v3", Family::deepseek, false, false},
    {"kimi_k2", Family::deepseek, false, false},
    {"mixtral", Family::mixtral, false, true},
}};

const Model& find_model(const JsonObject& config) {
  const std::string type = config.string("model_type").value_or("");
  std::string known;
  for (const Model& m : kModels) {
    if (type == m.type) return m;
    known += (known.empty() ? "" : ", ") + std::string(m.type);
  }
  config.unsupported("model_type", "one of " + known);
}

// The same number goes by several names; the first that is there counts.
std::int64_t first_integer(const JsonObject& config, std::initializer_list<const char*> keys, std::int64_t high) {
  for (const char* key : keys) {
    if (config.find(key)) return config.integer_in(key, 1, high);
  }
  config.missing(*keys.begin());
}

Activation parse_hidden_act(const JsonObject& config) {
  const std::string name = config.string("hidden_act").value_or("silu");
  if (name == "silu" || name == "swish") return Activation::swiglu;
  if (name == "gelu_pytorch_tanh" || name == "gelu_new") return Activation::geglu_tanh;
  if (name == "gelu") return Activation::geglu_erf;
  config.unsupported("hidden_act", "silu, gelu_pytorch_tanh or gelu");
}

void expect_text(const JsonObject& config, const char* key, const char* wanted) {
  if (config.string(key).value_or(wanted) != wanted) config.unsupported(key, wanted);
}
void expect_false(const JsonObject& config, const char* key) {
  if (config.boolean(key).value_or(false)) config.unsupported(key, "false");
}

void read_deepseek_routing(const JsonObject& config, ModelConfig& out) {
  expect_text(config, "topk_method", "noaux_tc");
  expect_text(config, "scoring_func", "sigmoid");
  if (config.integer_in("moe_layer_freq", 1, kMaxExperts, 1) != 1) config.unsupported("moe_layer_freq", "1");
  out.has_correction_bias = true;
  out.route.scoring = Scoring::sigmoid;
  const bool renormalize = config.boolean("norm_topk_prob").value_or(true);
  out.route.renormalize = renormalize ? Renormalize::add_eps : Renormalize::none;
  out.route.renormalize_min = renormalize ? 1e-20f : 0.0f;
  out.route.scaling_factor = static_cast<float>(config.number("routed_scaling_factor").value_or(1.0));
  if (!(out.route.scaling_factor > 0.0f)) config.wrong("routed_scaling_factor", "a positive number");
  out.route.groups = static_cast<int>(config.integer_in("n_group", 1, kMaxExperts, 1));
  out.route.topk_groups = static_cast<int>(config.integer_in("topk_group", 1, kMaxExperts, 1));
  if (out.experts % out.route.groups != 0) {
    config.wrong("n_group", fmt::format("a divisor of the {} experts", out.experts));
  }
  if (out.route.topk_groups > out.route.groups) {
    config.wrong("topk_group", fmt::format("at most n_group = {}", out.route.groups));
  }
  if (out.top_k > out.experts / out.route.groups * out.route.topk_groups) {
    config.wrong("num_experts_per_tok",
                 fmt::format("at most the {} experts of {} groups",
                             out.experts / out.route.groups * out.route.topk_groups, out.route.topk_groups));
  }
}

void read_ernie_routing(const JsonObject& config, ModelConfig& out) {
  expect_false(config, "use_bias");
  expect_text(config, "moe_gate_act", "softmax");
  const double least = config.number("moe_norm_min").value_or(1e-12);
  if (!(least >= 0.0 && least <= 1.0)) config.wrong("moe_norm_min", "a number in 0..1");
  out.route.renormalize_min = static_cast<float>(least);
}

}  // namespace

ModelConfig parse_model_config(const nlohmann::json& json, const std::string& path) {
  const JsonObject top(json, path);
  // Multimodal models keep the language model's numbers one level down.
  const std::optional<JsonObject> text = top.object("text_config");
  const JsonObject& config = text ? *text : top;
  const Model& model = text && !text->find("model_type") ? find_model(top) : find_model(config);

  ModelConfig out;
  out.model_type = top.string("model_type").value_or(model.type);
  out.hidden = first_integer(config, {"hidden_size"}, kMaxSize);
  out.layers = first_integer(config, {"num_hidden_layers"}, 1 << 20);
  out.experts =
      first_integer(config, {"num_experts", "n_routed_experts", "moe_num_experts", "num_local_experts"}, kMaxExperts);
  out.top_k = static_cast<int>(first_integer(config, {"num_experts_per_tok", "moe_k"}, kMaxExperts));
  if (out.top_k > out.experts) {
    config.wrong(config.find("num_experts_per_tok") ? "num_experts_per_tok" : "moe_k",
                 fmt::format("at most the {} experts", out.experts));
  }
  out.intermediate = model.family == Family::mixtral ? first_integer(config, {"intermediate_size"}, kMaxSize)
                                                     : first_integer(config, {"moe_intermediate_size"}, kMaxSize);
  out.activation = parse_hidden_act(config);

  const bool renormalize = model.always_renormalize || config.boolean("norm_topk_prob").value_or(false);
  out.route.renormalize = renormalize ? Renormalize::divide : Renormalize::none;
  const auto shared_of = [&](const char* key) { return out.intermediate * config.integer_in(key, 0, 1024, 0); };
  switch (model.family) {
    case Family::qwen:
      out.shared_gate = model.shared_gate;
      if (model.shared_gate)
        out.shared_intermediate = config.integer_in("shared_expert_intermediate_size", 1, kMaxSize);
      break;
    case Family::ernie:
      read_ernie_routing(config, out);
      out.shared_intermediate = shared_of("moe_num_shared_experts");
      break;
    case Family::deepseek:
      read_deepseek_routing(config, out);
      out.shared_intermediate = shared_of("n_shared_experts");
      break;
    case Family::mixtral:
      break;
  }

  out.scheme = Scheme::bf16();
  for (const JsonObject* level : {&top, &config}) {
    for (const char* key : {"quantization_config", "compression_config"}) {
      if (const auto quant = level->object(key)) {
        const QuantConfig q = parse_quantization_config(*quant);
        out.format = q.format;
        out.scheme = q.scheme;
        return out;
      }
    }
  }
  return out;
}

}  // namespace octomoe::checkpoint
