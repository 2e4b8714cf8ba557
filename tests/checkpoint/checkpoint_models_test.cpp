// Unquantised checkpoints of each model family: names, prefixes, fused and separate experts, shards, slices, errors.
#include "checkpoint/tiny_model.h"

namespace octomoe::test {
namespace {

using testing::ElementsAre;

class CheckpointModelsTest : public testing::Test {
 protected:
  Checkpoint open(const TinyModel& m, std::size_t shards = 1) {
    m.write(dir_ / "m", shards);
    return Checkpoint::open(dir_ / "m");
  }
  TempDir dir_;
};

TEST_F(CheckpointModelsTest, Qwen3PerExpert) {
  const TinyModel m = qwen3_model(plain());
  const Checkpoint c = open(m);
  EXPECT_THAT(c.moe_layers(), ElementsAre(0, 1));
  for (const int l : c.moe_layers()) {
    const std::string block = "model.layers." + std::to_string(l) + ".mlp.";
    const Checkpoint::Layer layer = c.layer(l);
    const FloatLayer expected = float_layer(m, block);
    expect_equal(layer.experts, MoeWeights::from_float(expected.w13, expected.w2));
    EXPECT_EQ(bytes_of(layer.router), m.at(block + "gate.weight").bytes);
    EXPECT_FALSE(layer.shared_expert.has_value());
    EXPECT_FALSE(layer.shared_gate.defined());
    EXPECT_FALSE(layer.correction_bias.defined());
  }
}

TEST_F(CheckpointModelsTest, ShardsGiveTheSame) {
  const TinyModel m = qwen3_model(plain());
  const FloatLayer expected = float_layer(m, "model.layers.1.mlp.");
  expect_equal(open(m, 3).layer(1).experts, MoeWeights::from_float(expected.w13, expected.w2));
}

TEST_F(CheckpointModelsTest, OpensOneFileBesideItsConfig) {
  const TinyModel m = qwen3_model(plain());
  open(m);
  EXPECT_THAT(Checkpoint::open(dir_ / "m/model.safetensors").moe_layers(), ElementsAre(0, 1));
}

TEST_F(CheckpointModelsTest, Float16AndFloat32) {
  const TinyModel half = qwen3_model(plain("F16"), {}, "F16");
  const Checkpoint c = open(half);
  EXPECT_EQ(c.config().scheme, Scheme::fp16());
  EXPECT_EQ(c.layer(0).experts.scheme, Scheme::fp16());
  const TinyModel full = qwen3_model(plain("F32"), {}, "F32");
  const Checkpoint d = open(full);
  const FloatLayer expected = float_layer(full, "model.layers.0.mlp.", "F32");
  EXPECT_EQ(d.config().scheme, Scheme::bf16());
  expect_equal(d.layer(0).experts, quantize(Scheme::bf16(), expected.w13, expected.w2));
}

TEST_F(CheckpointModelsTest, ExpertSlices) {
  const TinyModel m = qwen3_model(plain());
  const Checkpoint c = open(m);
  const Checkpoint::Layer layer = c.layer(1, 1, 2);
  EXPECT_EQ(layer.experts.experts(), 2);
  EXPECT_EQ(bytes_of(layer.experts.w13.values), concat(m, part_names("model.layers.1.mlp.", true, ".weight", 1, 3)));
  EXPECT_EQ(bytes_of(layer.experts.w2.values), concat(m, part_names("model.layers.1.mlp.", false, ".weight", 1, 3)));
  EXPECT_EQ(layer.router.dim(0), 4);  // routing is global
  EXPECT_EQ(c.layer(0, 3).experts.experts(), 1);
  const auto refused = [&](int l, std::int64_t first, std::int64_t count, const char* part) {
    expect_error(ErrorCode::invalid_argument, {part}, [&] { static_cast<void>(c.layer(l, first, count)); });
  };
  refused(2, 0, -1, "index: expected a layer with experts (0, 1), got 2");
  refused(-1, 0, -1, "got -1");
  refused(0, 4, -1, "first_expert: expected 0..3, got 4");
  refused(0, -1, -1, "got -1");
  refused(0, 2, 3, "expert_count: expected 1..2 or -1, got 3");
  refused(0, 0, 0, "got 0");
  refused(0, 1, INT64_MAX, "9223372036854775807");
}

// Qwen3.5 and 3.6: text_config, model.language_model, fused experts, gated shared expert, a draft layer beside it.
TinyModel qwen35_model(const std::string& prefix) {
  const TinySizes s;
  TinyModel m{s, {}, {}};
  m.config = {{"model_type", "qwen3_5_moe"}, {"text_config", qwen3_config(s)}};
  m.config["text_config"]["model_type"] = "qwen3_5_moe_text";
  m.config["text_config"]["shared_expert_intermediate_size"] = 64;
  const auto add_block = [&](const std::string& block) {
    m.add(float_tensor(block + "gate.weight", "BF16", {s.experts, s.hidden}));
    m.add(float_tensor(block + "experts.gate_up_proj", "BF16", {s.experts, 2 * s.intermediate, s.hidden}));
    m.add(float_tensor(block + "experts.down_proj", "BF16", {s.experts, s.hidden, s.intermediate}));
    m.add(float_tensor(block + "shared_expert.gate_proj.weight", "BF16", {64, s.hidden}));
    m.add(float_tensor(block + "shared_expert.up_proj.weight", "BF16", {64, s.hidden}));
    m.add(float_tensor(block + "shared_expert.down_proj.weight", "BF16", {s.hidden, 64}));
    m.add(float_tensor(block + "shared_expert_gate.weight", "BF16", {1, s.hidden}));
  };
  for (int l = 0; l < 2; ++l) add_block(prefix + "layers." + std::to_string(l) + ".mlp.");
  add_block("mtp.layers.0.mlp.");
  m.add(float_tensor("model.visual.patch_embed.proj.weight", "BF16", {4, 3, 2, 2, 2}));
  return m;
}

TEST_F(CheckpointModelsTest, Qwen35Fused) {
  for (const std::string prefix : {"model.language_model.", "model."}) {
    const TinyModel m = qwen35_model(prefix);
    const TinySizes& s = m.sizes;
    const Checkpoint c = open(m);
    EXPECT_THAT(c.moe_layers(), ElementsAre(0, 1));
    const std::string block = prefix + "layers.1.mlp.";
    const Checkpoint::Layer layer = c.layer(1);
    EXPECT_EQ(bytes_of(layer.experts.w13.values), m.at(block + "experts.gate_up_proj").bytes);
    EXPECT_EQ(bytes_of(layer.experts.w2.values), m.at(block + "experts.down_proj").bytes);
    EXPECT_EQ(layer.experts.gate_up_order, GateUpOrder::gate_up);
    ASSERT_TRUE(layer.shared_expert.has_value());
    EXPECT_EQ(bytes_of(layer.shared_expert->w13.values),
              concat(m, {block + "shared_expert.gate_proj.weight", block + "shared_expert.up_proj.weight"}));
    EXPECT_EQ(layer.shared_expert->intermediate(), 64);
    EXPECT_THAT(dims_of(layer.shared_gate), ElementsAre(s.hidden));
    EXPECT_EQ(bytes_of(layer.shared_gate), m.at(block + "shared_expert_gate.weight").bytes);

    const std::string& whole = m.at(block + "experts.gate_up_proj").bytes;
    const auto slice = c.layer(1, 2, 2).experts.w13.values;
    EXPECT_EQ(bytes_of(slice), whole.substr(whole.size() / 2));
  }
}

TEST_F(CheckpointModelsTest, FusedExpertsAreUsedWhereTheyLie) {
  const TinyModel m = qwen35_model("model.language_model.");
  open(m);
  const SafetensorsFile file = SafetensorsFile::open(dir_ / "m/model.safetensors");
  MoeWeights w;
  { w = Checkpoint::open(dir_ / "m").layer(0).experts; }
  // Two maps of one file: the same offset within a page shows that no copy was made.
  const std::string name = "model.language_model.layers.0.mlp.experts.gate_up_proj";
  EXPECT_EQ(reinterpret_cast<std::uintptr_t>(w.w13.values.view().data()) % 4096,
            reinterpret_cast<std::uintptr_t>(file.bytes(name).data()) % 4096);
  EXPECT_EQ(bytes_of(w.w13.values), m.at(name).bytes);
}

TEST_F(CheckpointModelsTest, TransposedFusedExpertsAreRefused) {
  TinyModel m = qwen35_model("model.language_model.");
  auto& t = m.at("model.language_model.layers.0.mlp.experts.gate_up_proj");
  std::swap(t.shape[1], t.shape[2]);
  const Checkpoint c = open(m);
  expect_error(ErrorCode::format, {"gate_up_proj", "BF16 [4, 192, 160]", "got BF16 [4, 160, 192]", "model.safetensors"},
               [&] { static_cast<void>(c.layer(0)); });
}

TinyModel ernie_model(const std::string& bias_name) {
  TinySizes s;
  TinyModel m = qwen3_model(plain(), s);
  m.config = {{"model_type", "ernie4_5_moe"},
              {"hidden_size", s.hidden},
              {"moe_intermediate_size", s.intermediate},
              {"moe_num_experts", s.experts},
              {"moe_k", 2},
              {"num_hidden_layers", 3},
              {"moe_num_shared_experts", 2},
              {"moe_layer_start_index", 1}};
  // The first layer is dense.
  for (RawTensor& t : m.tensors) {
    if (t.name.starts_with("model.layers.1.")) t.name.replace(13, 1, "2");
    if (t.name.starts_with("model.layers.0.")) t.name.replace(13, 1, "1");
  }
  m.add(float_tensor("model.layers.0.mlp.gate_proj.weight", "BF16", {64, s.hidden}));
  for (const std::string block : {"model.layers.1.mlp.", "model.layers.2.mlp."}) {
    m.remove(block + "gate.weight");
    m.add(float_tensor(block + "gate.weight", "F32", {s.experts, s.hidden}));
    m.add(float_tensor(block + bias_name, "F32", {1, s.experts}));
    m.add(float_tensor(block + "shared_experts.gate_proj.weight", "BF16", {2 * s.intermediate, s.hidden}));
    m.add(float_tensor(block + "shared_experts.up_proj.weight", "BF16", {2 * s.intermediate, s.hidden}));
    m.add(float_tensor(block + "shared_experts.down_proj.weight", "BF16", {s.hidden, 2 * s.intermediate}));
  }
  return m;
}

TEST_F(CheckpointModelsTest, Ernie) {
  for (const std::string bias : {"moe_statics.e_score_correction_bias", "gate.moe_statics.e_score_correction_bias"}) {
    const TinyModel m = ernie_model(bias);
    const Checkpoint c = open(m);
    EXPECT_THAT(c.moe_layers(), ElementsAre(1, 2));
    EXPECT_TRUE(c.config().has_correction_bias);
    const Checkpoint::Layer layer = c.layer(2);
    EXPECT_EQ(layer.router.dtype(), DType::float32);
    EXPECT_THAT(dims_of(layer.correction_bias), ElementsAre(m.sizes.experts));
    EXPECT_EQ(bytes_of(layer.correction_bias), m.at("model.layers.2.mlp." + bias).bytes);
    ASSERT_TRUE(layer.shared_expert.has_value());
    EXPECT_EQ(layer.shared_expert->intermediate(), 2 * m.sizes.intermediate);
  }
}

TEST_F(CheckpointModelsTest, DeepSeekV3) {
  TinyModel m = ernie_model("gate.e_score_correction_bias");
  const TinySizes& s = m.sizes;
  for (RawTensor& t : m.tensors) {
    if (t.name.ends_with("bias")) t = float_tensor(t.name, "BF16", {s.experts});
  }
  m.config = {{"model_type", "deepseek_v3"},
              {"hidden_size", s.hidden},
              {"moe_intermediate_size", s.intermediate},
              {"n_routed_experts", s.experts},
              {"num_experts_per_tok", 2},
              {"num_hidden_layers", 3},
              {"n_shared_experts", 2},
              {"first_k_dense_replace", 1},
              {"n_group", 2},
              {"topk_group", 1},
              {"routed_scaling_factor", 2.5},
              {"topk_method", "noaux_tc"},
              {"scoring_func", "sigmoid"}};
  const Checkpoint::Layer layer = open(m).layer(1);
  const auto expected = floats_of(m.at("model.layers.1.mlp.gate.e_score_correction_bias"));
  EXPECT_EQ(bytes_of(layer.correction_bias), bytes_of(expected));
  EXPECT_TRUE(layer.shared_expert.has_value());

  m.remove("model.layers.1.mlp.gate.e_score_correction_bias");
  const Checkpoint c = open(m);
  expect_error(ErrorCode::format, {"layer 1", "`model.layers.1.mlp.gate.e_score_correction_bias`"},
               [&] { static_cast<void>(c.layer(1)); });
}

TEST_F(CheckpointModelsTest, Mixtral) {
  TinyModel m = qwen3_model(plain());
  const FloatLayer expected = float_layer(m, "model.layers.1.mlp.");
  m.config = {{"model_type", "mixtral"},
              {"hidden_size", m.sizes.hidden},
              {"intermediate_size", m.sizes.intermediate},
              {"num_local_experts", m.sizes.experts},
              {"num_experts_per_tok", 2},
              {"num_hidden_layers", 2}};
  for (RawTensor& t : m.tensors) {
    const std::pair<std::string, std::string> renames[] = {
        {".mlp.", ".block_sparse_moe."}, {"gate_proj", "w1"}, {"up_proj", "w3"}, {"down_proj", "w2"}};
    for (const auto& [from, to] : renames) {
      if (const auto at = t.name.find(from); at != std::string::npos) t.name.replace(at, from.size(), to);
    }
  }
  expect_equal(open(m).layer(1).experts, MoeWeights::from_float(expected.w13, expected.w2));
}

TEST_F(CheckpointModelsTest, MissingTensorsAreNamedAndCounted) {
  TinyModel m = qwen3_model(plain());
  for (const int e : {1, 3}) {
    for (const char* p : {"gate_proj", "up_proj", "down_proj"}) {
      m.remove("model.layers.1.mlp.experts." + std::to_string(e) + "." + p + ".weight");
    }
  }
  const Checkpoint c = open(m);
  EXPECT_EQ(c.layer(0).experts.experts(), 4);
  EXPECT_EQ(c.layer(1, 2, 1).experts.experts(), 1);
  expect_error(ErrorCode::format,
               {"layer 1: experts: 6 of 12 tensors are missing", "`model.layers.1.mlp.experts.1.gate_proj.weight`",
                "`model.layers.1.mlp.experts.3.gate_proj.weight`", "..."},
               [&] { static_cast<void>(c.layer(1)); });
  m = qwen3_model(plain());
  m.remove("model.layers.0.mlp.gate.weight");
  const Checkpoint d = open(m);
  expect_error(ErrorCode::format, {"layer 0: router", "`model.layers.0.mlp.gate.weight`"},
               [&] { static_cast<void>(d.layer(0)); });
}

TEST_F(CheckpointModelsTest, WrongShapesAndTypes) {
  const std::string name = "model.layers.0.mlp.experts.2.up_proj.weight";
  const auto refused = [&](const RawTensor& t, const std::vector<std::string>& parts) {
    TinyModel m = qwen3_model(plain());
    m.at(t.name) = t;
    const Checkpoint c = open(m);
    expect_error(ErrorCode::format, parts, [&] { static_cast<void>(c.layer(0)); });
  };
  refused(float_tensor(name, "BF16", {96, 161}),
          {name, "or BF16 [96, 160]", "got BF16 [96, 161]", "model.safetensors"});
  refused(float_tensor(name, "BF16", {96 * 160}), {name, "[15360]"});
  refused(float_tensor(name, "F16", {96, 160}), {name, "expected BF16", "got F16"});
  refused(int_tensor(name, "I8", {96, 160}, -1, 1), {name, "got I8"});
  refused(float_tensor("model.layers.0.mlp.gate.weight", "BF16", {160, 4}),
          {"gate.weight", "[4, 160]", "got BF16 [160, 4]"});
}

TEST_F(CheckpointModelsTest, FoldersThatAreNotCheckpoints) {
  const auto refused = [&](ErrorCode code, const std::vector<std::string>& parts) {
    expect_error(code, parts, [&] { Checkpoint::open(dir_ / "m"); });
  };
  refused(ErrorCode::io, {"m", "No such file"});
  fs::create_directories(dir_ / "m");
  refused(ErrorCode::io, {"model.safetensors", "neither"});
  TinyModel m = qwen3_model(plain());
  m.write(dir_ / "m");
  fs::remove(dir_ / "m/config.json");
  refused(ErrorCode::io, {"config.json", "No such file"});
  write_file(dir_ / "m/config.json", "{");
  refused(ErrorCode::format, {"config.json", "expected JSON"});
  m.config["quantization_config"] = {{"quant_method", "fp8"}};
  m.write(dir_ / "m");
  refused(ErrorCode::unsupported, {"config.json", "quant_method", "fp8", "blockwise_int8"});
  m.config.erase("quantization_config");
  std::erase_if(m.tensors, [](const RawTensor& t) { return t.name.find("experts") != std::string::npos; });
  m.write(dir_ / "m");
  refused(ErrorCode::format, {"experts.0.gate_proj.weight", "qwen3_moe"});
}

TEST_F(CheckpointModelsTest, HostileIndexes) {
  const TinyModel m = qwen3_model(plain());
  m.write(dir_ / "m", 2);
  const std::string index = dir_ / "m/model.safetensors.index.json";
  const Json good = Json::parse(read_file(index));
  const auto refused = [&](const Json& json, ErrorCode code, const std::vector<std::string>& parts) {
    write_file(index, json.dump());
    expect_error(code, parts, [&] { Checkpoint::open(dir_ / "m"); });
  };
  for (const char* file : {"../m/model.safetensors", "/etc/passwd", "..", "", ".hidden", "a/b.safetensors"}) {
    Json bad = good;
    bad["weight_map"]["lm_head.weight"] = file;
    refused(bad, ErrorCode::format, {"index.json", "lm_head.weight", "same folder"});
  }
  Json bad = good;
  bad["weight_map"]["lm_head.weight"] = 3;
  refused(bad, ErrorCode::format, {"lm_head.weight", "a string"});
  bad["weight_map"]["lm_head.weight"] = "model-00009-of-00002.safetensors";
  refused(bad, ErrorCode::io, {"model-00009-of-00002.safetensors", "No such file"});
  bad = good;
  bad["weight_map"]["ghost.weight"] = "model-00001-of-00002.safetensors";
  refused(bad, ErrorCode::format, {"model-00001-of-00002.safetensors", "`ghost.weight`"});
  refused(Json{{"weight_map", 3}}, ErrorCode::format, {"weight_map", "JSON object"});
  refused(Json::object(), ErrorCode::format, {"weight_map"});
  write_file(index, good.dump());
  EXPECT_EQ(Checkpoint::open(dir_ / "m").moe_layers().size(), 2u);
}

}  // namespace
}  // namespace octomoe::test
