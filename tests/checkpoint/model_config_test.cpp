// config.json of every model family: sizes, routing rule, and what is refused.
#include "checkpoint/model_config.h"

#include "checkpoint/test_files.h"

namespace octomoe::test {
namespace {

using checkpoint::parse_json;
using checkpoint::parse_model_config;

ModelConfig parse(const Json& config) {
  return parse_model_config(parse_json(config.dump(), "config.json"), "config.json");
}

// The published config.json files, reduced to what matters.
const Json kQwen3 = {{"model_type", "qwen3_moe"},    {"hidden_size", 2048},    {"intermediate_size", 6144},
                     {"moe_intermediate_size", 768}, {"num_experts", 128},     {"num_experts_per_tok", 8},
                     {"num_hidden_layers", 48},      {"norm_topk_prob", true}, {"hidden_act", "silu"}};
const Json kQwen35 = {{"model_type", "qwen3_5_moe"},
                      {"vision_config", {{"hidden_size", 1152}, {"model_type", "qwen3_5_moe"}}},
                      {"text_config",
                       {{"model_type", "qwen3_5_moe_text"},
                        {"hidden_size", 2048},
                        {"moe_intermediate_size", 512},
                        {"shared_expert_intermediate_size", 512},
                        {"num_experts", 256},
                        {"num_experts_per_tok", 8},
                        {"num_hidden_layers", 40},
                        {"hidden_act", "silu"}}}};
const Json kErnie = {{"model_type", "ernie4_5_moe"}, {"hidden_size", 2560},
                     {"intermediate_size", 12288},   {"moe_intermediate_size", 1536},
                     {"moe_num_experts", 64},        {"moe_k", 6},
                     {"moe_num_shared_experts", 2},  {"moe_layer_start_index", 1},
                     {"num_hidden_layers", 28},      {"use_bias", false},
                     {"hidden_act", "silu"}};
const Json kDeepseek = {{"model_type", "deepseek_v3"},
                        {"hidden_size", 7168},
                        {"intermediate_size", 18432},
                        {"moe_intermediate_size", 2048},
                        {"n_routed_experts", 256},
                        {"n_shared_experts", 1},
                        {"num_experts_per_tok", 8},
                        {"num_hidden_layers", 61},
                        {"first_k_dense_replace", 3},
                        {"n_group", 8},
                        {"topk_group", 4},
                        {"norm_topk_prob", true},
                        {"routed_scaling_factor", 2.5},
                        {"scoring_func", "sigmoid"},
                        {"topk_method", "noaux_tc"},
                        {"moe_layer_freq", 1},
                        {"hidden_act", "silu"}};
const Json kMixtral = {{"model_type", "mixtral"}, {"hidden_size", 4096},      {"intermediate_size", 14336},
                       {"num_local_experts", 8},  {"num_experts_per_tok", 2}, {"num_hidden_layers", 32},
                       {"hidden_act", "silu"}};

TEST(ModelConfigTest, Qwen3) {
  const ModelConfig c = parse(kQwen3);
  EXPECT_EQ(c.model_type, "qwen3_moe");
  EXPECT_EQ(std::tie(c.hidden, c.intermediate, c.experts, c.layers), std::make_tuple(2048, 768, 128, 48));
  EXPECT_EQ(c.top_k, 8);
  EXPECT_EQ(c.shared_intermediate, 0);
  EXPECT_EQ(c.activation, Activation::swiglu);
  EXPECT_EQ(c.route.scoring, Scoring::softmax);
  EXPECT_EQ(c.route.renormalize, Renormalize::divide);
  EXPECT_EQ(c.route.scaling_factor, 1.0f);
  EXPECT_EQ(c.route.groups, 1);
  EXPECT_FALSE(c.has_correction_bias);
  EXPECT_EQ(c.format, QuantFormat::none);
  EXPECT_EQ(c.scheme, Scheme::bf16());
}

TEST(ModelConfigTest, NormTopkProbDecides) {
  Json config = kQwen3;
  config["norm_topk_prob"] = false;
  EXPECT_EQ(parse(config).route.renormalize, Renormalize::none);
  config.erase("norm_topk_prob");  // transformers' default
  EXPECT_EQ(parse(config).route.renormalize, Renormalize::none);
}

TEST(ModelConfigTest, Qwen3SavedByTransformers5) {
  Json config = kQwen3;
  config["num_local_experts"] = config["num_experts"];
  config.erase("num_experts");
  EXPECT_EQ(parse(config).experts, 128);
}

TEST(ModelConfigTest, Qwen35IsNestedAndHasAGatedSharedExpert) {
  const ModelConfig c = parse(kQwen35);
  EXPECT_EQ(c.model_type, "qwen3_5_moe");
  EXPECT_EQ(std::tie(c.hidden, c.intermediate, c.experts, c.layers), std::make_tuple(2048, 512, 256, 40));
  EXPECT_EQ(c.shared_intermediate, 512);
  EXPECT_TRUE(c.shared_gate);
  EXPECT_EQ(c.route.renormalize, Renormalize::divide);  // always, in this model
}

TEST(ModelConfigTest, Ernie) {
  const ModelConfig c = parse(kErnie);
  EXPECT_EQ(std::tie(c.hidden, c.intermediate, c.experts, c.layers), std::make_tuple(2560, 1536, 64, 28));
  EXPECT_EQ(c.top_k, 6);
  EXPECT_EQ(c.shared_intermediate, 3072);
  EXPECT_FALSE(c.shared_gate);
  EXPECT_EQ(c.route.scoring, Scoring::softmax);
  EXPECT_EQ(c.route.renormalize, Renormalize::divide);
  EXPECT_EQ(c.route.renormalize_min, 1e-12f);
  Json config = kErnie;
  config["moe_norm_min"] = 1e-6;
  config["moe_num_shared_experts"] = 0;
  EXPECT_EQ(parse(config).route.renormalize_min, 1e-6f);
  EXPECT_EQ(parse(config).shared_intermediate, 0);
}

TEST(ModelConfigTest, DeepSeekV3) {
  const ModelConfig c = parse(kDeepseek);
  EXPECT_EQ(std::tie(c.hidden, c.intermediate, c.experts, c.layers), std::make_tuple(7168, 2048, 256, 61));
  EXPECT_EQ(c.shared_intermediate, 2048);
  EXPECT_TRUE(c.has_correction_bias);
  EXPECT_EQ(c.route.scoring, Scoring::sigmoid);
  EXPECT_EQ(c.route.renormalize, Renormalize::add_eps);
  EXPECT_EQ(c.route.renormalize_min, 1e-20f);
  EXPECT_EQ(c.route.scaling_factor, 2.5f);
  EXPECT_EQ(c.route.groups, 8);
  EXPECT_EQ(c.route.topk_groups, 4);
}

TEST(ModelConfigTest, Mixtral) {
  const ModelConfig c = parse(kMixtral);
  EXPECT_EQ(std::tie(c.hidden, c.intermediate, c.experts), std::make_tuple(4096, 14336, 8));
  EXPECT_EQ(c.top_k, 2);
  EXPECT_EQ(c.route.renormalize, Renormalize::divide);
}

TEST(ModelConfigTest, Refusals) {
  const auto refused = [](Json config, const char* key, const Json& value, ErrorCode code,
                          std::vector<std::string> parts) {
    if (value == "erase") {
      config.erase(key);
    } else {
      config[key] = value;
    }
    parts.push_back("config.json");
    parts.push_back(key);
    expect_error(code, parts, [&] { parse(config); });
  };
  const auto format = ErrorCode::format, unsupported = ErrorCode::unsupported;
  refused(kQwen3, "model_type", "llama", unsupported, {"qwen3_moe", "deepseek_v3", "got \"llama\""});
  refused(kQwen3, "model_type", "erase", unsupported, {"got nothing"});
  refused(kQwen3, "model_type", 3, format, {"a string"});
  refused(kQwen3, "hidden_size", "erase", format, {"got nothing"});
  refused(kQwen3, "hidden_size", nullptr, format, {"got nothing"});
  refused(kQwen3, "hidden_size", 0, format, {"got 0"});
  refused(kQwen3, "hidden_size", -2048, format, {"got -2048"});
  refused(kQwen3, "hidden_size", 2048.5, format, {"whole number", "2048.5"});
  refused(kQwen3, "hidden_size", std::uint64_t{1} << 63, format, {"9223372036854775808"});
  refused(kQwen3, "hidden_size", "2048", format, {"whole number"});
  refused(kQwen3, "num_experts", 1 << 20, format, {"65536"});
  refused(kQwen3, "num_experts_per_tok", 129, format, {"at most the 128"});
  refused(kQwen3, "hidden_act", "relu2", unsupported, {"silu", "relu2"});
  refused(kQwen3, "norm_topk_prob", 1, format, {"true or false"});
  refused(kErnie, "use_bias", true, unsupported, {"expected false"});
  refused(kErnie, "moe_norm_min", -1, format, {"0..1"});
  refused(kErnie, "moe_gate_act", "sigmoid", unsupported, {"softmax"});
  refused(kDeepseek, "topk_method", "group_limited_greedy", unsupported, {"noaux_tc"});
  refused(kDeepseek, "scoring_func", "softmax", unsupported, {"sigmoid"});
  refused(kDeepseek, "n_group", 7, format, {"divisor of the 256"});
  refused(kDeepseek, "topk_group", 9, format, {"at most n_group = 8"});
  refused(kDeepseek, "routed_scaling_factor", 0, format, {"positive"});
  refused(kQwen35, "text_config", 3, format, {"JSON object"});
  expect_error(format, {"config.json", "JSON object"}, [] { parse(Json::array()); });
}

}  // namespace
}  // namespace octomoe::test
