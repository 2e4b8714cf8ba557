// Quantised checkpoints, each as its real writer makes it: types, shapes, names, and errors.
#include "checkpoint/tiny_model.h"
#include "quant/matrix.h"

namespace octomoe::test {
namespace {

constexpr std::int64_t kGroup = 32;  // of the INT4 tests: 160 = 5 groups, 96 = 3

class CheckpointFormatsTest : public testing::Test {
 protected:
  Checkpoint open(const TinyModel& m) {
    m.write(dir_ / "m");
    return Checkpoint::open(dir_ / "m");
  }
  void refused(const TinyModel& m, ErrorCode code, const std::vector<std::string>& parts) {
    const Checkpoint c = open(m);
    expect_error(code, parts, [&] { static_cast<void>(c.layer(0)); });
  }
  // Float32 scales of all parts, one behind another.
  static std::string float_scales(const TinyModel& m, bool w13, const std::string& suffix) {
    std::string out;
    for (const std::string& name : part_names(kBlock, w13, suffix, 0, m.sizes.experts))
      out += bytes_of(floats_of(m.at(name)));
    return out;
  }
  static constexpr const char* kBlock = "model.layers.0.mlp.";
  static inline const std::string kFirst = "model.layers.0.mlp.experts.0.gate_proj";
  TempDir dir_;
};

Json w8a8_config(const char* strategy = "channel", bool symmetric = true) {
  const Json weights = {
      {"num_bits", 8}, {"type", "int"}, {"strategy", strategy}, {"symmetric", true}, {"dynamic", false}};
  const Json acts = {
      {"num_bits", 8}, {"type", "int"}, {"strategy", "token"}, {"symmetric", symmetric}, {"dynamic", true}};
  return {
      {"quant_method", "compressed-tensors"},
      {"format", "int-quantized"},
      {"quantization_status", "compressed"},
      {"config_groups", {{"group_0", {{"targets", {"Linear"}}, {"weights", weights}, {"input_activations", acts}}}}},
      {"ignore", {"lm_head"}}};
}

AddMatrix channel_int8(const std::string& scale_dtype, bool column = true) {
  return [=](TinyModel& m, const std::string& name, std::int64_t n, std::int64_t k) {
    m.add(int_tensor(name + ".weight", "I8", {n, k}, -128, 127));
    m.add(positive_tensor(name + ".weight_scale", scale_dtype, column ? Dims{n, 1} : Dims{n}));
  };
}

TEST_F(CheckpointFormatsTest, CompressedTensorsW8A8) {
  for (const char* dtype : {"BF16", "F32", "F16"}) {
    TinyModel m = qwen3_model(channel_int8(dtype));
    m.config["quantization_config"] = w8a8_config();
    const Checkpoint c = open(m);
    EXPECT_EQ(c.config().format, QuantFormat::compressed_tensors);
    const MoeWeights w = c.layer(0).experts;
    EXPECT_EQ(w.scheme, Scheme::int8_channel());
    EXPECT_EQ(dims_of(w.w13.values), (Dims{4, 192, 160}));
    EXPECT_EQ(bytes_of(w.w13.values), concat(m, part_names(kBlock, true, ".weight", 0, 4)));
    EXPECT_EQ(bytes_of(w.w2.values), concat(m, part_names(kBlock, false, ".weight", 0, 4)));
    EXPECT_EQ(dims_of(w.w13.scale), (Dims{4, 192}));
    EXPECT_EQ(bytes_of(w.w13.scale), float_scales(m, true, ".weight_scale"));
    EXPECT_EQ(bytes_of(w.w2.scale), float_scales(m, false, ".weight_scale"));
    const MoeWeights slice = c.layer(0, 3, 1).experts;
    EXPECT_EQ(bytes_of(slice.w2.values), m.at("model.layers.0.mlp.experts.3.down_proj.weight").bytes);
  }
}

TEST_F(CheckpointFormatsTest, AsymmetricActivationsHaveColumnSums) {
  TinyModel m = qwen3_model(channel_int8("F32"));
  m.config["quantization_config"] = w8a8_config("channel", false);
  const MoeWeights w = open(m).layer(0).experts;
  EXPECT_EQ(w.scheme, Scheme::parse("int8_channel:asymmetric"));
  std::int32_t sum = 0;
  for (const char v : m.at(kFirst + ".weight").bytes.substr(0, 160)) sum += static_cast<std::int8_t>(v);
  EXPECT_EQ(w.w13.column_sum.as<std::int32_t>()[0], sum);
}

TEST_F(CheckpointFormatsTest, PerTensorScales) {
  std::map<std::string, RawTensor> gates;
  const AddMatrix add = [&](TinyModel& m, const std::string& name, std::int64_t n, std::int64_t k) {
    m.add(int_tensor(name + ".weight", "I8", {n, k}, -127, 127));
    RawTensor scale = positive_tensor(name + ".weight_scale", "F32", {1});
    if (name.ends_with("up_proj")) scale.bytes = m.tensors[m.tensors.size() - 2].bytes;  // as gate_proj has it
    m.add(scale);
  };
  TinyModel m = qwen3_model(add);
  m.config["quantization_config"] = w8a8_config("tensor");
  const MoeWeights w = open(m).layer(0).experts;
  EXPECT_EQ(dims_of(w.w13.scale), (Dims{4}));
  EXPECT_EQ(bytes_of(w.w13.scale).substr(0, 4), m.at(kFirst + ".weight_scale").bytes);
  EXPECT_EQ(bytes_of(w.w2.scale), float_scales(m, false, ".weight_scale"));
  m.at("model.layers.0.mlp.experts.2.up_proj.weight_scale") =
      positive_tensor("model.layers.0.mlp.experts.2.up_proj.weight_scale", "F32", {1});
  refused(m, ErrorCode::unsupported, {"layer 0: experts", "expert 2", "one per-tensor scale for gate and up"});
}

TEST_F(CheckpointFormatsTest, ChannelInt8WithAndWithoutConfig) {
  TinyModel m = qwen3_model(channel_int8("F32", false));
  const Checkpoint silent = open(m);  // the engine is told by its command line
  EXPECT_EQ(silent.config().format, QuantFormat::channel_int8);
  EXPECT_EQ(silent.config().scheme, Scheme::int8_channel());
  const MoeWeights w = silent.layer(1).experts;
  m.config["quantization_config"] = {{"quant_method", "w8a8_int8"}};
  expect_equal(open(m).layer(1).experts, w);
}

AddMatrix block_int8(std::int64_t block_n, std::int64_t block_k) {
  return [=](TinyModel& m, const std::string& name, std::int64_t n, std::int64_t k) {
    m.add(int_tensor(name + ".weight", "I8", {n, k}, -127, 127));
    m.add(positive_tensor(name + ".weight_scale_inv", "F32", {ceil_div(n, block_n), ceil_div(k, block_k)}));
  };
}

TEST_F(CheckpointFormatsTest, BlockInt8) {
  for (const auto& [bn, bk] : {std::pair{128, 128}, std::pair{64, 32}}) {
    TinyModel m = qwen3_model(block_int8(bn, bk));
    m.config["quantization_config"] = {
        {"quant_method", "blockwise_int8"}, {"activation_scheme", "dynamic"}, {"weight_block_size", {bn, bk}}};
    const MoeWeights w = open(m).layer(0).experts;
    EXPECT_EQ(w.scheme.block_n, bn);
    // Gate and up keep their own, short, blocks.
    EXPECT_EQ(dims_of(w.w13.scale), (Dims{4, 2 * ceil_div(96, bn), ceil_div(160, bk)}));
    EXPECT_EQ(bytes_of(w.w13.scale), float_scales(m, true, ".weight_scale_inv"));
    EXPECT_EQ(bytes_of(w.w2.scale), float_scales(m, false, ".weight_scale_inv"));
    EXPECT_EQ(bytes_of(w.w13.values), concat(m, part_names(kBlock, true, ".weight", 0, 4)));
  }
}

TEST_F(CheckpointFormatsTest, DamagedInt8) {
  TinyModel m = qwen3_model(block_int8(128, 128));
  m.config["quantization_config"] = {{"quant_method", "blockwise_int8"}, {"weight_block_size", {128, 128}}};
  const std::string scale = kFirst + ".weight_scale_inv";
  TinyModel bad = m;
  bad.at(scale) = positive_tensor(scale, "F32", {2, 1});
  refused(bad, ErrorCode::format, {scale, "[1, 2]", "got F32 [2, 1]"});
  bad.at(scale) = int_tensor(scale, "I8", {1, 2}, 1, 1);
  refused(bad, ErrorCode::format, {scale, "F32 or F16 or BF16", "got I8"});
  bad.at(scale) = m.at(scale);
  const float infinite = HUGE_VALF;
  std::memcpy(bad.at(scale).bytes.data() + 4, &infinite, 4);
  refused(bad, ErrorCode::format, {"layer 0: experts", "w13_scale", "finite", "element 1"});
  bad = m;
  bad.remove(scale);
  refused(bad, ErrorCode::format, {"1 of 24 tensors are missing", "`" + scale + "`"});
  bad = m;
  bad.at(kFirst + ".weight").dtype = "U8";
  refused(bad, ErrorCode::format, {kFirst + ".weight", "expected I8", "got U8"});
  bad.at(kFirst + ".weight") = float_tensor(kFirst + ".weight", "BF16", {96, 160});  // scaled, so not an ignored module
  refused(bad, ErrorCode::format, {"expected I8", "got BF16"});
}

TEST_F(CheckpointFormatsTest, ALayerThatIsNotQuantised) {
  const AddMatrix mixed = [](TinyModel& m, const std::string& name, std::int64_t n, std::int64_t k) {
    (name.starts_with("model.layers.0.") ? channel_int8("BF16") : plain())(m, name, n, k);
  };
  TinyModel m = qwen3_model(mixed);
  m.config["quantization_config"] = w8a8_config();
  const Checkpoint c = open(m);
  EXPECT_EQ(c.layer(0).experts.scheme, Scheme::int8_channel());
  EXPECT_EQ(c.layer(1).experts.scheme, Scheme::bf16());
}

// ---- 4-bit weights: the same integers in the three ways they are stored ----

struct Int4Values {
  std::map<std::string, std::vector<int>> values;  // by module
  std::map<std::string, RawTensor> scales;
};
const std::vector<int>& int4_values(Int4Values& all, const std::string& name, std::int64_t n, std::int64_t k) {
  auto& v = all.values[name];
  if (v.empty()) {
    std::uniform_int_distribution<int> uniform(-8, 7);
    for (std::int64_t i = 0; i < n * k; ++i) v.push_back(uniform(rng()));
    all.scales[name] = positive_tensor(name, "BF16", {n, k / kGroup});
  }
  return v;
}
void add_scale(TinyModel& m, Int4Values& all, const std::string& name, const std::string& suffix) {
  RawTensor t = all.scales.at(name);
  t.name = name + suffix;
  m.add(t);
}

AddMatrix int4_bytes(Int4Values& all, const std::string& dtype = "I8", const std::string& input = "") {
  return [&all, dtype, input](TinyModel& m, const std::string& name, std::int64_t n, std::int64_t k) {
    const auto& v = int4_values(all, name, n, k);
    RawTensor t{name + ".weight", dtype, {n, k / 2}, ""};
    for (std::size_t i = 0; i < v.size(); i += 2) t.bytes += static_cast<char>((v[i] & 15) | (v[i + 1] & 15) << 4);
    m.add(t);
    add_scale(m, all, name, ".weight_scale_inv");
    if (!input.empty()) m.add(positive_tensor(name + ".input_scale", input, {1}));
  };
}
AddMatrix int4_unpacked(Int4Values& all) {
  return [&](TinyModel& m, const std::string& name, std::int64_t n, std::int64_t k) {
    RawTensor t{name + ".weight", "I8", {n, k}, ""};
    for (const int v : int4_values(all, name, n, k)) t.bytes += static_cast<char>(v);
    m.add(t);
    add_scale(m, all, name, ".weight_scale");
  };
}
AddMatrix int4_words(Int4Values& all) {
  return [&](TinyModel& m, const std::string& name, std::int64_t n, std::int64_t k) {
    const auto& v = int4_values(all, name, n, k);
    std::vector<std::uint32_t> words;
    for (std::size_t i = 0; i < v.size(); i += 8) {
      std::uint32_t w = 0;
      for (std::size_t j = 0; j < 8; ++j) w |= static_cast<std::uint32_t>(v[i + j] + 8) << (4 * j);
      words.push_back(w);
    }
    m.add({name + ".weight_packed", "I32", {n, k / 8}, bytes_of(words)});
    add_scale(m, all, name, ".weight_scale");
    m.add({name + ".weight_shape", "I64", {2}, bytes_of(std::vector<std::int64_t>{n, k})});
  };
}
Json compressed_w4a8(const char* format) {
  Json c = w8a8_config("group");
  auto& group = c["config_groups"]["group_0"];
  c["format"] = format;
  group["weights"]["num_bits"] = 4;
  group["weights"]["group_size"] = kGroup;
  group["input_activations"]["type"] = "float";
  return c;
}

TEST_F(CheckpointFormatsTest, Int4InThreeStoragesIsTheSame) {
  Int4Values all;
  TinyModel bytes = qwen3_model(int4_bytes(all));
  bytes.config["quantization_config"] = {
      {"quant_method", "w4afp8"}, {"group_size", kGroup}, {"moe_activation_scheme", "dynamic"}};
  const MoeWeights w = open(bytes).layer(0).experts;
  EXPECT_EQ(w.scheme, Scheme::parse("w4a8_fp8:group=32"));
  EXPECT_EQ(w.w13.values.dtype(), DType::int4x2);
  EXPECT_EQ(dims_of(w.w13.values), (Dims{4, 192, 80}));
  EXPECT_EQ(dims_of(w.w2.scale), (Dims{4, 160, 3}));
  EXPECT_EQ(bytes_of(w.w13.scale), float_scales(bytes, true, ".weight_scale_inv"));
  // The even column lies in the low half.
  const Tensor dense = dequantize(w.w13);
  const auto& v = all.values.at(kFirst);
  const float s = floats_of(all.scales.at(kFirst))[0];
  EXPECT_EQ(dense.as<float>()[0], static_cast<float>(v[0]) * s);
  EXPECT_EQ(dense.as<float>()[1], static_cast<float>(v[1]) * s);

  TinyModel unsigned_bytes = qwen3_model(int4_bytes(all, "U8"));
  unsigned_bytes.config["quantization_config"] = bytes.config["quantization_config"];
  expect_equal(open(unsigned_bytes).layer(0).experts, w);
  TinyModel unpacked = qwen3_model(int4_unpacked(all));
  unpacked.config["quantization_config"] = compressed_w4a8("int-quantized");
  expect_equal(open(unpacked).layer(0).experts, w);
  TinyModel words = qwen3_model(int4_words(all));
  words.config["quantization_config"] = compressed_w4a8("pack-quantized");
  expect_equal(open(words).layer(0).experts, w);

  unpacked.at(kFirst + ".weight").bytes[5] = 8;
  refused(unpacked, ErrorCode::format, {kFirst + ".weight", "-8..7", "got 8"});
  std::int64_t wrong = 161;
  std::memcpy(words.at(kFirst + ".weight_shape").bytes.data() + 8, &wrong, 8);
  refused(words, ErrorCode::format, {kFirst + ".weight_shape", "expected [96, 160]", "got [96, 161]"});
}

TEST_F(CheckpointFormatsTest, W4AFp8WithStaticInputScales) {
  for (const char* dtype : {"BF16", "F32"}) {
    Int4Values all;
    TinyModel m = qwen3_model(int4_bytes(all, "I8", dtype));
    m.config["quantization_config"] = {{"quant_method", "w4afp8"}, {"group_size", kGroup}};
    const MoeWeights w = open(m).layer(0).experts;
    EXPECT_EQ(w.scheme, Scheme::parse("w4a8_fp8:group=32,static"));
    for (int e = 0; e < 4; ++e) {
      const std::string expert = "model.layers.0.mlp.experts." + std::to_string(e) + ".";
      const auto scale = [&](const char* p) { return floats_of(m.at(expert + p + ".input_scale"))[0]; };
      EXPECT_EQ(w.w13.activation_scale.as<float>()[e], std::max(scale("gate_proj"), scale("up_proj")));
      EXPECT_EQ(w.w2.activation_scale.as<float>()[e], scale("down_proj"));
    }
    m.remove(kFirst + ".input_scale");
    refused(m, ErrorCode::format, {"missing", "`" + kFirst + ".input_scale`"});
  }
}

// ---- shared experts ----

TinyModel with_shared(const AddMatrix& routed, const AddMatrix& shared) {
  TinyModel m = qwen3_model(routed);
  m.config["model_type"] = "qwen3_next";
  m.config["shared_expert_intermediate_size"] = 64;
  for (int l = 0; l < 2; ++l) {
    const std::string block = "model.layers." + std::to_string(l) + ".mlp.";
    shared(m, block + "shared_expert.gate_proj", 64, 160);
    shared(m, block + "shared_expert.up_proj", 64, 160);
    shared(m, block + "shared_expert.down_proj", 160, 64);
    m.add(float_tensor(block + "shared_expert_gate.weight", "BF16", {1, 160}));
  }
  return m;
}

TEST_F(CheckpointFormatsTest, SharedExpertQuantisedOrNot) {
  TinyModel m = with_shared(channel_int8("BF16"), channel_int8("BF16"));
  m.config["quantization_config"] = w8a8_config();
  EXPECT_EQ(open(m).layer(0).shared_expert->scheme, Scheme::int8_channel());
  EXPECT_EQ(bytes_of(open(m).layer(0).shared_expert->w2.values),
            m.at("model.layers.0.mlp.shared_expert.down_proj.weight").bytes);
  m = with_shared(channel_int8("BF16"), plain());
  m.config["quantization_config"] = w8a8_config();
  const Checkpoint::Layer layer = open(m).layer(0);
  EXPECT_EQ(layer.experts.scheme, Scheme::int8_channel());
  EXPECT_EQ(layer.shared_expert->scheme, Scheme::bf16());
  m.remove("model.layers.0.mlp.shared_expert.up_proj.weight");
  refused(m, ErrorCode::format,
          {"layer 0: shared expert: 1 of 3", "`model.layers.0.mlp.shared_expert.up_proj.weight`"});
}

TEST_F(CheckpointFormatsTest, SharedExpertInFp8BlocksBecomesBf16) {
  Int4Values all;
  const AddMatrix fp8 = [](TinyModel& m, const std::string& name, std::int64_t n, std::int64_t k) {
    m.add(int_tensor(name + ".weight", "F8_E4M3", {n, k}, 0, 100));
    m.add(positive_tensor(name + ".weight_scale_inv", "F32", {ceil_div(n, 128), ceil_div(k, 128)}));
  };
  TinyModel m = with_shared(int4_bytes(all), fp8);
  m.config["quantization_config"] = {
      {"quant_method", "w4afp8"}, {"group_size", kGroup}, {"moe_activation_scheme", "dynamic"}};
  const MoeWeights w = *open(m).layer(0).shared_expert;
  EXPECT_EQ(w.scheme, Scheme::bf16());
  const std::string name = "model.layers.0.mlp.shared_expert.down_proj";
  const auto scales = floats_of(m.at(name + ".weight_scale_inv"));  // [2, 1]
  for (const std::int64_t row : {0, 127, 128, 159}) {
    const auto v = static_cast<std::uint8_t>(m.at(name + ".weight").bytes[static_cast<std::size_t>(row * 64 + 3)]);
    EXPECT_EQ(w.w2.values.as<std::uint16_t>()[row * 64 + 3],
              num::float_to_bf16(num::e4m3_to_float(v) * scales[static_cast<std::size_t>(row / 128)]))
        << row;
  }
}

}  // namespace
}  // namespace octomoe::test
