// quantize_checkpoint: reads back bit-equal, changes nothing else, leaves nothing half-written.
#include <fcntl.h>
#include <sys/resource.h>

#include <csignal>

#include "checkpoint/tiny_model.h"
#include "octomoe/calibrate.h"
#include "support/sanitizer.h"

namespace octomoe::test {
namespace {

using testing::ElementsAre;
using testing::UnorderedElementsAre;

class QuantizeCheckpointTest : public testing::Test {
 protected:
  std::string in() { return dir_ / "in"; }
  std::string out() { return dir_ / "out"; }
  // Nothing beside the source.
  void expect_clean() { EXPECT_THAT(list_folder(dir_.path()), ElementsAre("in")); }
  TempDir dir_;
};

constexpr const char* kSchemes[] = {"int8_channel",
                                    "int8_channel:asymmetric",
                                    "int8_channel:per_tensor",
                                    "int8_channel:asymmetric,per_tensor",
                                    "int8_block",
                                    "int8_hybrid",
                                    "int8_hybrid:block=32,super=2,q_max=32",
                                    "w4a8_fp8",
                                    "w4a8_fp8:group=32",
                                    "w4a8_fp8:group=0",
                                    "w4a8_fp8:none",
                                    "bf16",
                                    "fp16"};

TEST_F(QuantizeCheckpointTest, EverySchemeAndSourceTypeReadsBackBitEqual) {
  for (const std::string dtype : {"BF16", "F16", "F32"}) {
    const TinyModel m = qwen3_model(plain(dtype), {}, dtype);
    m.write(in());
    for (const std::string text : kSchemes) {
      SCOPED_TRACE(dtype + " -> " + text);
      const Scheme scheme = Scheme::parse(text);
      quantize_checkpoint(in(), out(), scheme, {.overwrite = true});
      const Checkpoint c = Checkpoint::open(out());
      EXPECT_EQ(c.config().scheme, scheme);
      for (const int l : {0, 1}) {
        const FloatLayer f = float_layer(m, "model.layers." + std::to_string(l) + ".mlp.", dtype);
        expect_equal(c.layer(l).experts, quantize(scheme, f.w13, f.w2));
      }
      // Everything else, byte for byte.
      const SafetensorsFile file = SafetensorsFile::open(out() + "/model.safetensors");
      for (const RawTensor& t : m.tensors) {
        if (t.name.find(".experts.") != std::string::npos) continue;
        ASSERT_NE(file.find(t.name), nullptr) << t.name;
        EXPECT_EQ(file.find(t.name)->dtype_name, t.dtype);
        EXPECT_EQ(file.find(t.name)->shape, t.shape);
        EXPECT_EQ(bytes_of(file.tensor(t.name)), t.bytes) << t.name;
      }
      fs::remove_all(out());
    }
  }
}

TinyModel fused_model(const std::string& prefix) {
  TinyModel m = qwen3_model(plain());
  const TinySizes s = m.sizes;
  m.config = {{"model_type", "qwen3_5_moe"}, {"text_config", m.config}};
  m.config["text_config"]["model_type"] = "qwen3_5_moe_text";
  m.config["text_config"]["shared_expert_intermediate_size"] = 64;
  for (int l = 0; l < 2; ++l) {
    const std::string from = "model.layers." + std::to_string(l) + ".mlp.",
                      to = prefix + "layers." + std::to_string(l) + ".mlp.";
    m.add({to + "experts.gate_up_proj",
           "BF16",
           {s.experts, 2 * s.intermediate, s.hidden},
           concat(m, part_names(from, true, ".weight", 0, s.experts))});
    m.add({to + "experts.down_proj",
           "BF16",
           {s.experts, s.hidden, s.intermediate},
           concat(m, part_names(from, false, ".weight", 0, s.experts))});
    m.add({to + "gate.weight", "BF16", {s.experts, s.hidden}, m.at(from + "gate.weight").bytes});
    m.add(float_tensor(to + "shared_expert.gate_proj.weight", "BF16", {64, s.hidden}));
    m.add(float_tensor(to + "shared_expert.up_proj.weight", "BF16", {64, s.hidden}));
    m.add(float_tensor(to + "shared_expert.down_proj.weight", "BF16", {s.hidden, 64}));
    m.add(float_tensor(to + "shared_expert_gate.weight", "BF16", {1, s.hidden}));
  }
  std::erase_if(m.tensors, [](const RawTensor& t) { return t.name.starts_with("model.layers."); });
  m.add(float_tensor("mtp.layers.0.mlp.experts.gate_up_proj", "BF16", {2, 32, s.hidden}));
  return m;
}

// layers.L.hidden_states and, as `routes` says, ids or logits; what quantize_checkpoint must make of them.
struct Captured {
  static constexpr std::int64_t kTokens = 11;
  std::vector<RawTensor> tensors;
  std::vector<Tensor> x, ids;

  Captured(const TinySizes& s, const std::string& routes) {
    for (std::int64_t l = 0; l < s.layers; ++l) {
      const std::string layer = "layers." + std::to_string(l) + ".";
      tensors.push_back(
          float_tensor(layer + "hidden_states", "BF16", {kTokens, s.hidden}, 1.0f + static_cast<float>(l)));
      x.push_back(tensor_of(tensors.back().bytes, DType::bfloat16, {kTokens, s.hidden}));
      if (routes == "topk_ids") {
        tensors.push_back(int_tensor(layer + routes, "I8", {kTokens * 2}, 0, 2));  // expert 3 sees nothing
        std::string wide;
        for (const char id : tensors.back().bytes) wide += std::string{id, 0, 0, 0};
        tensors.back() = {layer + routes, "I32", {kTokens, 2}, wide};
        ids.push_back(tensor_of(wide, DType::int32, {kTokens, 2}));
      } else if (routes == "router_logits") {
        tensors.push_back(float_tensor(layer + routes, "F32", {kTokens, s.experts}));
        ids.push_back(Tensor::empty(DType::int32, {kTokens, 2}));
        route(tensor_of(tensors.back().bytes, DType::float32, {kTokens, s.experts}),
              Tensor::empty(DType::float32, {kTokens, 2}), ids.back());
      }
    }
  }
};

constexpr const char* kStaticSchemes[] = {"int8_channel:static", "int8_channel:per_tensor,static", "w4a8_fp8:static",
                                          "w4a8_fp8:group=32,static"};

TEST_F(QuantizeCheckpointTest, StaticScalesAreThoseOfCalibrate) {
  const TinyModel m = qwen3_model(plain());
  m.write(in());
  const std::string path = dir_ / "states.safetensors";
  for (const std::string routes : {"topk_ids", "router_logits"}) {
    const Captured captured(m.sizes, routes);
    write_file(path, safetensors_bytes(captured.tensors));
    for (const std::string text : kStaticSchemes) {
      SCOPED_TRACE(routes + " -> " + text);
      const Scheme scheme = Scheme::parse(text);
      quantize_checkpoint(in(), out(), scheme, {.overwrite = true, .calibration = path});
      const Checkpoint c = Checkpoint::open(out());
      EXPECT_EQ(c.config().scheme, scheme);
      for (const int l : {0, 1}) {
        const FloatLayer f = float_layer(m, "model.layers." + std::to_string(l) + ".mlp.");
        const auto i = static_cast<std::size_t>(l);
        const ActivationScales scales = calibrate(scheme, f.w13, captured.x[i], captured.ids[i]);
        QuantizeOptions options;
        options.x_scale = scales.x_scale;
        options.act_scale = scales.act_scale;
        expect_equal(c.layer(l).experts, quantize(scheme, f.w13, f.w2, options));
      }
    }
  }
  const Captured captured(m.sizes, "no routes");  // the router's weight decides
  write_file(path, safetensors_bytes(captured.tensors));
  quantize_checkpoint(in(), out(), Scheme::parse("w4a8_fp8:static"), {.overwrite = true, .calibration = path});
  const MoeWeights w = Checkpoint::open(out()).layer(0).experts;
  EXPECT_NE(w.w13.activation_scale.as<float>()[0], w.w13.activation_scale.as<float>()[1]);
}

TEST_F(QuantizeCheckpointTest, CalibrationFilesAreChecked) {
  const TinyModel m = qwen3_model(plain());
  m.write(in());
  const std::string path = dir_ / "states.safetensors";
  const auto refused = [&](const std::vector<RawTensor>& tensors, const std::vector<std::string>& parts) {
    write_file(path, safetensors_bytes(tensors));
    expect_error(ErrorCode::format, parts, [&] {
      quantize_checkpoint(in(), out(), Scheme::parse("int8_channel:static"), {.calibration = path});
    });
    EXPECT_FALSE(fs::exists(out()));
  };
  std::vector<RawTensor> good = Captured(m.sizes, "topk_ids").tensors;
  auto bad = good;
  bad.erase(bad.begin() + 2, bad.end());
  refused(bad, {path, "layers.1.hidden_states"});
  bad = good;
  bad[0] = float_tensor("layers.0.hidden_states", "BF16", {11, 32});
  refused(bad, {path, "layers.0.hidden_states", "[T, 160]", "[11, 32]"});
  bad = good;
  bad[1] = {"layers.0.topk_ids", "I32", {1, 2}, std::string(8, '\0')};
  refused(bad, {"layers.0.topk_ids", "[11, k]", "[1, 2]"});
  bad = good;
  bad[3].bytes[0] = 9;
  refused(bad, {path, "layer 1: topk_ids", "got 9 at token 0"});
  bad = good;
  bad[2].bytes[1] = '\x7f';
  bad[2].bytes[0] = '\x80';
  refused(bad, {path, "layer 1: x: expected finite values", "row 0, column 0"});
  expect_error(ErrorCode::io, {"absent.safetensors"}, [&] {
    quantize_checkpoint(in(), out(), Scheme::parse("w4a8_fp8:static"), {.calibration = dir_ / "absent.safetensors"});
  });
}

TEST_F(QuantizeCheckpointTest, FusedExpertsBecomeOnePerExpert) {
  const std::string prefix = "model.language_model.", block = prefix + "layers.1.mlp.";
  const TinyModel m = fused_model(prefix);
  const TinySizes s = m.sizes;
  m.write(in());
  const Tensor w13 =
      tensor_of(m.at(block + "experts.gate_up_proj").bytes, DType::bfloat16, {s.experts, 2 * s.intermediate, s.hidden});
  const Tensor w2 =
      tensor_of(m.at(block + "experts.down_proj").bytes, DType::bfloat16, {s.experts, s.hidden, s.intermediate});
  const Tensor s13 =
      tensor_of(concat(m, {block + "shared_expert.gate_proj.weight", block + "shared_expert.up_proj.weight"}),
                DType::bfloat16, {1, 128, s.hidden});
  const Tensor s2 = tensor_of(m.at(block + "shared_expert.down_proj.weight").bytes, DType::bfloat16, {1, s.hidden, 64});
  for (const std::string text : kSchemes) {
    SCOPED_TRACE(text);
    const Scheme scheme = Scheme::parse(text);
    quantize_checkpoint(in(), out(), scheme);
    const Checkpoint c = Checkpoint::open(out());
    expect_equal(c.layer(1).experts, quantize(scheme, w13, w2));
    expect_equal(*c.layer(1).shared_expert, quantize(scheme, s13, s2));
    const SafetensorsFile file = SafetensorsFile::open(out() + "/model.safetensors");
    const bool quantised = c.config().format != QuantFormat::none;
    EXPECT_EQ(file.find(block + "experts.3.up_proj.weight") != nullptr, quantised);
    EXPECT_EQ(file.find(block + "experts.gate_up_proj") != nullptr, !quantised);
    EXPECT_EQ(bytes_of(file.tensor("mtp.layers.0.mlp.experts.gate_up_proj")),
              m.at("mtp.layers.0.mlp.experts.gate_up_proj").bytes);
    fs::remove_all(out());
  }
  const Captured captured(s, "router_logits");
  write_file(dir_ / "states.safetensors", safetensors_bytes(captured.tensors));
  for (const std::string text : kStaticSchemes) {
    SCOPED_TRACE(text);
    const Scheme scheme = Scheme::parse(text);
    quantize_checkpoint(in(), out(), scheme, {.calibration = dir_ / "states.safetensors"});
    const Checkpoint c = Checkpoint::open(out());
    const auto expected = [&](const Tensor& first, const Tensor& second, const Tensor& ids) {
      const ActivationScales scales = calibrate(scheme, first, captured.x[1], ids);
      QuantizeOptions options;
      options.x_scale = scales.x_scale;
      options.act_scale = scales.act_scale;
      return quantize(scheme, first, second, options);
    };
    expect_equal(c.layer(1).experts, expected(w13, w2, captured.ids[1]));
    const Tensor every = Tensor::zeros(DType::int32, {Captured::kTokens, 1});
    expect_equal(*c.layer(1).shared_expert, expected(s13, s2, every));
    fs::remove_all(out());
  }
  quantize_checkpoint(in(), out(), Scheme::int8_block(), {.shared_experts = false});
  EXPECT_EQ(Checkpoint::open(out()).layer(1).shared_expert->scheme, Scheme::bf16());
  const Json config = Json::parse(read_file(out() + "/config.json"));
  EXPECT_THAT(config["quantization_config"]["ignored_layers"].get<std::vector<std::string>>(),
              testing::IsSupersetOf({std::string("lm_head"), block + "gate", block + "shared_expert.gate_proj",
                                     block + "shared_expert_gate", std::string("mtp.layers.0.mlp.experts")}));
}

TEST_F(QuantizeCheckpointTest, WritesThePublishedNamesTypesAndShapes) {
  const TinyModel m = qwen3_model(plain());
  m.write(in());
  const std::string name = "model.layers.0.mlp.experts.3.gate_proj";
  const auto expect = [&](const char* scheme, const std::map<std::string, std::pair<std::string, Dims>>& wanted) {
    quantize_checkpoint(in(), out(), Scheme::parse(scheme));
    const SafetensorsFile file = SafetensorsFile::open(out() + "/model.safetensors");
    std::size_t found = 0;
    for (const auto& info : file.tensors()) {
      if (!info.name.starts_with(name)) continue;
      ++found;
      ASSERT_TRUE(wanted.contains(info.name.substr(name.size()))) << scheme << info.name;
      EXPECT_EQ(wanted.at(info.name.substr(name.size())), std::make_pair(info.dtype_name, info.shape))
          << scheme << info.name;
      EXPECT_EQ(info.begin % size_bytes(*info.dtype), 0u);
    }
    EXPECT_EQ(found, wanted.size()) << scheme;
    fs::remove_all(out());
  };
  using P = std::pair<std::string, Dims>;
  expect("int8_channel", {{".weight", P{"I8", {96, 160}}}, {".weight_scale", P{"F32", {96, 1}}}});
  expect("int8_channel:per_tensor", {{".weight", P{"I8", {96, 160}}}, {".weight_scale", P{"F32", {1}}}});
  expect("int8_block", {{".weight", P{"I8", {96, 160}}}, {".weight_scale_inv", P{"F32", {1, 2}}}});
  expect("w4a8_fp8:group=32", {{".weight", P{"I8", {96, 80}}}, {".weight_scale_inv", P{"F32", {96, 5}}}});
  expect("int8_hybrid:block=32,super=2",
         {{".weight", P{"I8", {96, 160}}}, {".weight_scale", P{"F32", {3, 3}}}, {".weight_scale_q", P{"U8", {3, 5}}}});
  expect("fp16", {{".weight", P{"F16", {96, 160}}}});
}

TEST_F(QuantizeCheckpointTest, ConfigAndSideFiles) {
  const TinyModel m = qwen3_model(plain());
  m.write(in());
  write_file(in() + "/config.json",
             R"({"zeta": 1.5, "model_type": "qwen3_moe", "hidden_size": 160, "moe_intermediate_size": 96,
    "num_experts": 4, "num_experts_per_tok": 2, "num_hidden_layers": 2, "rms_norm_eps": 1e-06, "alpha": [1, {"b": "\u00e9"}]})");
  write_file(in() + "/tokenizer.json", "{\"t\": 1}");
  write_file(in() + "/LICENSE", "text");
  write_file(in() + "/.gitattributes", "hidden");
  write_file(in() + "/pytorch_model.bin", "weights");
  write_file(in() + "/consolidated.safetensors", "weights");
  fs::create_directories(in() + "/code/deeper");
  write_file(in() + "/code/deeper/model.py", "print()");
  fs::create_symlink(in() + "/LICENSE", in() + "/LINKED");
  fs::create_directory_symlink(in(), in() + "/loop");
  quantize_checkpoint(in(), out(), Scheme::int8_channel());
  EXPECT_THAT(list_folder(out()),
              ElementsAre("LICENSE", "LINKED", "code", "config.json", "model.safetensors", "tokenizer.json"));
  EXPECT_EQ(read_file(out() + "/code/deeper/model.py"), "print()");
  EXPECT_EQ(read_file(out() + "/LINKED"), "text");
  EXPECT_FALSE(fs::is_symlink(out() + "/LINKED"));

  const std::string text = read_file(out() + "/config.json");
  EXPECT_LT(text.find("zeta"), text.find("model_type"));  // the order is kept
  Json config = Json::parse(text), quant = config["quantization_config"];
  config.erase("quantization_config");
  EXPECT_EQ(config, Json::parse(read_file(in() + "/config.json")));
  EXPECT_EQ(quant["quant_method"], "compressed-tensors");
  EXPECT_EQ(quant["format"], "int-quantized");
  const Json& group = quant["config_groups"]["group_0"];
  EXPECT_EQ(group["weights"]["strategy"], "channel");
  EXPECT_EQ(group["weights"]["dynamic"], false);
  EXPECT_EQ(group["input_activations"]["strategy"], "token");
  EXPECT_EQ(group["input_activations"]["dynamic"], true);
  EXPECT_THAT(quant["ignore"].get<std::vector<std::string>>(),
              UnorderedElementsAre("lm_head", "model.layers.0.self_attn.q_proj", "model.layers.0.mlp.gate",
                                   "model.layers.1.self_attn.q_proj", "model.layers.1.mlp.gate"));
}

TEST_F(QuantizeCheckpointTest, Shards) {
  const TinyModel m = qwen3_model(plain());
  m.write(in(), 3);
  constexpr std::int64_t kMost = 40000;
  quantize_checkpoint(in(), out(), Scheme::int8_channel(), {.max_shard_bytes = kMost});
  const Json index = Json::parse(read_file(out() + "/model.safetensors.index.json"));
  std::map<std::string, std::size_t> bytes;
  std::size_t total = 0;
  for (const auto& [name, file] : index["weight_map"].items()) {
    const SafetensorsFile shard = SafetensorsFile::open(out() + "/" + file.get<std::string>());
    bytes[file] += shard.bytes(name).size();
    total += shard.bytes(name).size();
  }
  EXPECT_GT(bytes.size(), 5u);
  EXPECT_EQ(index["metadata"]["total_size"], total);
  for (const auto& [file, size] : bytes) EXPECT_LE(size, static_cast<std::size_t>(kMost)) << file;
  EXPECT_TRUE(bytes.begin()->first.starts_with("model-00001-of-000"));
  const FloatLayer f = float_layer(m, "model.layers.1.mlp.");
  expect_equal(Checkpoint::open(out()).layer(1).experts, quantize(Scheme::int8_channel(), f.w13, f.w2));
  // A limit below any tensor still works: one step a file.
  quantize_checkpoint(in(), out(), Scheme::int8_hybrid(), {.max_shard_bytes = 1, .overwrite = true});
  expect_equal(Checkpoint::open(out()).layer(1).experts, quantize(Scheme::int8_hybrid(), f.w13, f.w2));
}

TEST_F(QuantizeCheckpointTest, ProgressCountsEveryByte) {
  const TinyModel m = qwen3_model(plain());
  m.write(in());
  std::int64_t total = 0, last = 0;
  for (const RawTensor& t : m.tensors) total += static_cast<std::int64_t>(t.bytes.size());
  std::size_t calls = 0;
  quantize_checkpoint(in(), out(), Scheme::int8_block(), {.progress = [&](const QuantizeProgress& p) {
                        EXPECT_EQ(p.total, total);
                        EXPECT_GT(p.done, last);
                        EXPECT_FALSE(p.current.empty());
                        last = p.done;
                        ++calls;
                      }});
  EXPECT_EQ(last, total);
  EXPECT_EQ(calls, m.tensors.size());
}

TEST_F(QuantizeCheckpointTest, RefusedTargets) {
  const TinyModel m = qwen3_model(plain());
  m.write(in());
  const auto refused = [&](const std::string& to, bool overwrite, ErrorCode code,
                           const std::vector<std::string>& parts) {
    expect_error(code, parts, [&] { quantize_checkpoint(in(), to, Scheme::int8_channel(), {.overwrite = overwrite}); });
  };
  const auto argument = ErrorCode::invalid_argument;
  refused(in(), true, argument, {"outside of in"});
  refused(in() + "/", true, argument, {"outside of in"});
  refused(in() + "/../in", true, argument, {"outside of in"});
  refused(in() + "/sub", true, argument, {"outside of in"});
  refused(dir_.path(), true, argument, {"outside of in"});
  fs::create_directory_symlink(in(), dir_ / "link");
  refused(dir_ / "link", true, argument, {"outside of in"});
  fs::remove(dir_ / "link");
  refused(dir_ / "no/where", false, ErrorCode::io, {"parent folder"});
  expect_clean();
  write_file(out(), "a file");
  refused(out(), true, argument, {"expected a folder", "out"});
  fs::remove(out());
  fs::create_directories(out());
  write_file(out() + "/precious.txt", "x");
  refused(out(), false, argument, {"overwrite"});
  refused(out(), true, argument, {"without config.json"});
  EXPECT_EQ(read_file(out() + "/precious.txt"), "x");
  fs::remove(out() + "/precious.txt");
  quantize_checkpoint(in(), out(), Scheme::int8_channel());  // into an empty folder
  EXPECT_TRUE(fs::exists(out() + "/config.json"));
  refused(out(), false, argument, {"overwrite"});
  write_file(out() + "/stale.txt", "x");
  quantize_checkpoint(in(), out() + "/", Scheme::int8_block(), {.overwrite = true});
  EXPECT_EQ(Checkpoint::open(out()).config().format, QuantFormat::block_int8);
  EXPECT_FALSE(fs::exists(out() + "/stale.txt"));
  EXPECT_THAT(list_folder(dir_.path()), ElementsAre("in", "out"));
}

TEST_F(QuantizeCheckpointTest, RefusedSourcesAndSchemes) {
  TinyModel m = qwen3_model(plain());
  m.write(in());
  const auto refused = [&](const Scheme& scheme, ErrorCode code, const std::vector<std::string>& parts) {
    expect_error(code, parts, [&] { quantize_checkpoint(in(), out(), scheme); });
    expect_clean();
  };
  refused(Scheme::parse("int8_channel:static"), ErrorCode::invalid_argument, {"calibration: expected a file", "none"});
  refused(Scheme::parse("w4a8_fp8:static"), ErrorCode::invalid_argument, {"calibration"});
  expect_error(ErrorCode::invalid_argument, {"calibration: expected none", "got x"},
               [&] { quantize_checkpoint(in(), out(), Scheme::int8_channel(), {.calibration = "x"}); });
  expect_error(ErrorCode::invalid_argument, {"max_shard_bytes"},
               [&] { quantize_checkpoint(in(), out(), Scheme::bf16(), {.max_shard_bytes = 0}); });
  expect_error(ErrorCode::io, {"none"}, [&] { quantize_checkpoint(dir_ / "none", out(), Scheme::bf16()); });

  TinyModel bad = m;
  const std::string name = "model.layers.1.mlp.experts.2.down_proj.weight";
  const std::uint16_t nan = 0x7fc0;
  std::memcpy(bad.at(name).bytes.data() + 2 * (96 * 7 + 5), &nan, 2);
  bad.write(in());
  refused(Scheme::int8_channel(), ErrorCode::invalid_argument, {name, "row 7"});
  bad = m;
  bad.remove(name);
  bad.write(in());
  refused(Scheme::int8_channel(), ErrorCode::format, {"`" + name + "`"});
  bad = m;
  bad.config["quantization_config"] = {{"quant_method", "w8a8_int8"}};
  bad.write(in());
  refused(Scheme::int8_block(), ErrorCode::unsupported, {"w8a8_int8"});
}

TEST_F(QuantizeCheckpointTest, NothingIsLeftWhenProgressThrows) {
  const TinyModel m = qwen3_model(plain());
  m.write(in());
  int calls = 0;
  const auto stop = [&](const QuantizeProgress&) {
    if (++calls == 10) throw std::runtime_error("stop");
  };
  EXPECT_THROW(quantize_checkpoint(in(), out(), Scheme::int8_channel(), {.max_shard_bytes = 40000, .progress = stop}),
               std::runtime_error);
  EXPECT_EQ(calls, 10);
  expect_clean();
}

TEST_F(QuantizeCheckpointTest, FullDiskLeavesTheOldCheckpoint) {
  const TinyModel m = qwen3_model(plain());
  m.write(in());
  quantize_checkpoint(in(), out(), Scheme::int8_channel());
  const std::string before = read_file(out() + "/model.safetensors");
  rlimit old{};
  ::getrlimit(RLIMIT_FSIZE, &old);
  const auto handler = std::signal(SIGXFSZ, SIG_IGN);
  const rlimit limit{100000, old.rlim_max};
  ::setrlimit(RLIMIT_FSIZE, &limit);
  expect_error(ErrorCode::io, {"File too large"},
               [&] { quantize_checkpoint(in(), out(), Scheme::int8_block(), {.overwrite = true}); });
  ::setrlimit(RLIMIT_FSIZE, &old);
  std::signal(SIGXFSZ, handler);
  EXPECT_EQ(read_file(out() + "/model.safetensors"), before);
  EXPECT_THAT(list_folder(dir_.path()), ElementsAre("in", "out"));
}

// Anonymous memory while streaming stays far below one layer; mapped source pages are given back as they are done with.
std::int64_t status_kib(const char* key) {
  std::ifstream in("/proc/self/status");
  for (std::string line; std::getline(in, line);) {
    if (line.starts_with(key)) return std::stoll(line.substr(std::strlen(key) + 1));
  }
  return 0;
}

TEST_F(QuantizeCheckpointTest, PeakMemoryStaysUnderTwiceTheLargestLayer) {
  if (kAddressSanitizer) GTEST_SKIP() << "AddressSanitizer keeps freed memory back";
  const TinySizes s{512, 256, 32, 3};  // 25 MB a layer
  qwen3_model(plain(), s).write(in());
  const std::int64_t layer_kib = 3 * s.experts * s.hidden * s.intermediate * 2 / 1024;
  quantize_checkpoint(in(), out(), Scheme::bf16());  // threads and arenas exist from here on
  fs::remove_all(out());
  const std::int64_t before = status_kib("VmRSS:");
  std::int64_t peak = 0;
  quantize_checkpoint(in(), out(), Scheme::int8_channel(), {.progress = [&](const QuantizeProgress&) {
                        peak = std::max(peak, status_kib("VmRSS:") - before);
                      }});
  EXPECT_GT(layer_kib, 20000);
  EXPECT_LT(peak, 2 * layer_kib);
  EXPECT_LT(peak, layer_kib / 2) << "expected the matrices of one expert, not of a layer";
}

}  // namespace
}  // namespace octomoe::test
