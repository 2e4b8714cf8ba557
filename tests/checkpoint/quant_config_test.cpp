// quantization_config of every format: what is read, what is refused by name, and that ours reads back.
#include "checkpoint/model_config.h"
#include "checkpoint/test_files.h"

namespace octomoe::test {
namespace {

using checkpoint::JsonObject;
using checkpoint::make_quantization_config;
using checkpoint::parse_quantization_config;
using checkpoint::QuantConfig;

QuantConfig parse_quant(const Json& config) {
  return parse_quantization_config(JsonObject(config, "quantization_config"));
}

// As llm-compressor writes it.
Json w8a8() {
  return Json::parse(R"({
    "config_groups": {"group_0": {
      "format": "int-quantized",
      "input_activations": {"actorder": null, "block_structure": null, "dynamic": true, "group_size": null, "num_bits": 8,
                            "observer": null, "observer_kwargs": {}, "strategy": "token", "symmetric": true, "type": "int"},
      "output_activations": null,
      "targets": ["Linear"],
      "weights": {"actorder": null, "block_structure": null, "dynamic": false, "group_size": null, "num_bits": 8,
                  "observer": "minmax", "observer_kwargs": {}, "strategy": "channel", "symmetric": true, "type": "int"}}},
    "format": "int-quantized", "global_compression_ratio": null, "ignore": ["lm_head", "re:.*mlp.gate$"],
    "kv_cache_scheme": null, "quant_method": "compressed-tensors", "quantization_status": "compressed",
    "sparsity_config": {}, "transform_config": {}, "version": "0.20.0"})");
}
Json w4afp8_compressed() {
  Json c = w8a8();
  auto& group = c["config_groups"]["group_0"];
  group["weights"]["num_bits"] = 4;
  group["weights"]["strategy"] = "group";
  group["weights"]["group_size"] = 128;
  group["input_activations"]["type"] = "float";
  return c;
}

TEST(QuantConfigTest, CompressedTensorsW8A8) {
  const QuantConfig q = parse_quant(w8a8());
  EXPECT_EQ(q.format, QuantFormat::compressed_tensors);
  EXPECT_EQ(q.scheme, Scheme::int8_channel());
  Json c = w8a8();
  c["config_groups"]["group_0"]["input_activations"]["symmetric"] = false;
  EXPECT_EQ(parse_quant(c).scheme, Scheme::parse("int8_channel:asymmetric"));
  c["config_groups"]["group_0"]["weights"]["strategy"] = "tensor";
  EXPECT_EQ(parse_quant(c).scheme, Scheme::parse("int8_channel:asymmetric,per_tensor"));
}

TEST(QuantConfigTest, CompressedTensorsW4AFp8) {
  Json c = w4afp8_compressed();
  EXPECT_EQ(parse_quant(c).scheme, Scheme::w4a8_fp8());
  c["config_groups"]["group_0"].erase("format");
  c["format"] = "pack-quantized";
  EXPECT_EQ(parse_quant(c).scheme, Scheme::w4a8_fp8());
  c["config_groups"]["group_0"]["weights"]["strategy"] = "channel";
  c["config_groups"]["group_0"]["weights"]["group_size"] = nullptr;
  EXPECT_EQ(parse_quant(c).scheme, Scheme::parse("w4a8_fp8:group=0"));
}

TEST(QuantConfigTest, EveryCompressedTensorsFieldIsChecked) {
  struct Case {
    const char* pointer;
    Json value;
    std::vector<std::string> parts;
  };
  const std::string group = "/config_groups/group_0";
  const auto check = [&](const Json& base, const std::string& pointer, const Json& value,
                         std::vector<std::string> parts, ErrorCode code = ErrorCode::unsupported) {
    Json c = base;
    c[Json::json_pointer(pointer)] = value;
    expect_error(code, parts, [&] { parse_quant(c); });
  };
  const Json base = w8a8();
  check(base, group + "/weights/num_bits", 6, {"group_0: weights", "num_bits", "8 or 4", "got 6"});
  check(base, group + "/weights/type", "float", {"weights", "type", "int", "float"});
  check(base, group + "/weights/strategy", "block", {"weights", "strategy", "channel", "block"});
  check(base, group + "/weights/symmetric", false, {"weights", "symmetric", "expected true"});
  check(base, group + "/weights/dynamic", true, {"weights", "dynamic", "expected false"});
  check(base, group + "/weights/group_size", 128, {"weights", "group_size", "null"});
  check(base, group + "/weights/block_structure", "128x128", {"weights", "block_structure"});
  check(base, group + "/weights/actorder", "group", {"weights", "actorder", "static"});
  check(base, group + "/weights", nullptr, {"weights"}, ErrorCode::format);
  check(base, group + "/input_activations", nullptr, {"input_activations", "weight-only"});
  check(base, group + "/input_activations/num_bits", 4, {"input_activations", "num_bits", "got 4"});
  check(base, group + "/input_activations/type", "float", {"input_activations", "type", "int", "float"});
  check(base, group + "/input_activations/strategy", "tensor", {"input_activations", "strategy", "token"});
  check(base, group + "/input_activations/dynamic", false, {"input_activations", "dynamic", "expected true"});
  check(base, group + "/input_activations/dynamic", "local", {"input_activations", "dynamic"}, ErrorCode::format);
  check(base, group + "/output_activations", Json{{"num_bits", 8}}, {"output_activations", "null"});
  check(base, group + "/format", "float-quantized", {"format", "int-quantized", "float-quantized"});
  check(base, group + "/format", "pack-quantized", {"format", "8-bit", "pack-quantized"});
  check(base, "/quantization_status", "initialized", {"quantization_status", "compressed"});
  check(base, "/sparsity_config", Json{{"format", "sparse-24-bitmask"}}, {"sparsity_config", "dense"});
  check(base, "/config_groups", Json::object(), {"config_groups"}, ErrorCode::format);
  Json fixed = base;  // static: one scale, in the file
  fixed["config_groups"]["group_0"]["input_activations"]["strategy"] = "tensor";
  fixed["config_groups"]["group_0"]["input_activations"]["dynamic"] = false;
  EXPECT_EQ(parse_quant(fixed).scheme, Scheme::parse("int8_channel:static"));
  check(fixed, group + "/input_activations/symmetric", false, {"input_activations", "symmetric", "expected true"});
  check(fixed, group + "/input_activations/num_bits", 4, {"input_activations", "num_bits", "got 4"});
  check(fixed, group + "/input_activations/type", "float", {"input_activations", "type", "int"});
  const Json four = w4afp8_compressed();
  check(four, group + "/weights/group_size", 100, {"group_0", "100"});
  check(four, group + "/weights/strategy", "tensor", {"strategy", "group or channel"});
  check(four, group + "/input_activations/type", "int", {"input_activations", "type", "float"});
  check(four, group + "/input_activations/symmetric", false, {"input_activations", "symmetric"});
}

TEST(QuantConfigTest, ChoosesTheGroupForExperts) {
  Json c = w8a8();
  c["config_groups"]["attention"] = c["config_groups"]["group_0"];
  expect_error(ErrorCode::unsupported, {"one group for the experts", "attention", "group_0"}, [&] { parse_quant(c); });
  c["config_groups"]["attention"]["weights"]["num_bits"] = 3;
  c["config_groups"]["attention"]["targets"] = {"re:.*self_attn.*"};
  EXPECT_EQ(parse_quant(c).scheme, Scheme::int8_channel());
  c["config_groups"]["moe"] = w4afp8_compressed()["config_groups"]["group_0"];
  c["config_groups"]["moe"]["targets"] = {"re:.*mlp.experts.*"};
  EXPECT_EQ(parse_quant(c).scheme, Scheme::w4a8_fp8());
}

TEST(QuantConfigTest, BlockwiseInt8) {
  Json c = {{"quant_method", "blockwise_int8"}, {"activation_scheme", "dynamic"}, {"weight_block_size", {128, 128}}};
  EXPECT_EQ(parse_quant(c).format, QuantFormat::block_int8);
  EXPECT_EQ(parse_quant(c).scheme, Scheme::int8_block());
  c["weight_block_size"] = {64, 32};
  EXPECT_EQ(parse_quant(c).scheme.block_n, 64);
  EXPECT_EQ(parse_quant(c).scheme.block_k, 32);
  for (const Json& bad : {Json({128}), Json({0, 128}), Json({-1, 128}), Json({128, 1 << 30}), Json("128")}) {
    c["weight_block_size"] = bad;
    expect_error(ErrorCode::format, {"weight_block_size"}, [&] { parse_quant(c); });
  }
  c["weight_block_size"] = {128, 100};  // not a multiple of 32
  expect_error(ErrorCode::unsupported, {"quantization_config", "100"}, [&] { parse_quant(c); });
  c["weight_block_size"] = {128, 128};
  c["activation_scheme"] = "static";
  expect_error(ErrorCode::unsupported, {"activation_scheme", "static"}, [&] { parse_quant(c); });
}

TEST(QuantConfigTest, W8A8Int8AndW4AFp8) {
  EXPECT_EQ(parse_quant({{"quant_method", "w8a8_int8"}}).format, QuantFormat::channel_int8);
  expect_error(ErrorCode::unsupported, {"is_dynamic"}, [] {
    parse_quant({{"quant_method", "w8a8_int8"}, {"is_dynamic", false}});
  });
  Json c = {{"quant_method", "w4afp8"}};  // the published model's config says little more
  EXPECT_EQ(parse_quant(c).format, QuantFormat::w4afp8);
  EXPECT_EQ(parse_quant(c).scheme, Scheme::parse("w4a8_fp8:static"));
  c["moe_activation_scheme"] = "dynamic";
  EXPECT_EQ(parse_quant(c).scheme, Scheme::w4a8_fp8());
  c["moe_activation_scheme"] = "online";
  expect_error(ErrorCode::unsupported, {"moe_activation_scheme", "online"}, [&] { parse_quant(c); });
}

TEST(QuantConfigTest, UnknownMethodNamesItAndTheKnownOnes) {
  for (const char* method : {"fp8", "awq", "gptq", "mxfp4"}) {
    expect_error(
        ErrorCode::unsupported,
        {"quant_method", method, "compressed-tensors", "blockwise_int8", "w8a8_int8", "w4afp8", "octomoe_int8_hybrid"},
        [&] {
          parse_quant({{"quant_method", method}});
        });
  }
  expect_error(ErrorCode::format, {"quant_method"}, [] { parse_quant(Json::object()); });
}

TEST(QuantConfigTest, OursReadsBack) {
  for (const char* text : {"int8_channel", "int8_channel:asymmetric", "int8_channel:per_tensor", "int8_block",
                           "int8_hybrid", "int8_hybrid:block=64,super=2,q_max=32", "w4a8_fp8", "w4a8_fp8:group=0",
                           "w4a8_fp8:none", "w4a8_fp8:group=64,static"}) {
    const Scheme scheme = Scheme::parse(text);
    const QuantConfig q = parse_quant(Json::parse(make_quantization_config(scheme, {"lm_head"}).dump()));
    EXPECT_EQ(q.scheme, scheme) << text;
    EXPECT_EQ(q.format, checkpoint::format_of(scheme)) << text;
  }
}

TEST(QuantConfigTest, HybridFields) {
  Json c = Json::parse(make_quantization_config(Scheme::int8_hybrid(), {}).dump());
  c["version"] = 2;
  expect_error(ErrorCode::unsupported, {"version", "got 2"}, [&] { parse_quant(c); });
  c["version"] = 1;
  c["q_max"] = 65;
  expect_error(ErrorCode::unsupported, {"65"}, [&] { parse_quant(c); });
  c.erase("q_max");
  expect_error(ErrorCode::format, {"q_max"}, [&] { parse_quant(c); });
}

}  // namespace
}  // namespace octomoe::test
