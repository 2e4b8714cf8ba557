// `quantization_config` of each format, read and written. docs/checkpoints.md lists them.
#include <algorithm>

#include "checkpoint/model_config.h"
#include "tensor/check.h"

namespace octomoe {

const char* to_string(QuantFormat format) {
  switch (format) {
    case QuantFormat::none:
      return "none";
    case QuantFormat::compressed_tensors:
      return "compressed-tensors";
    case QuantFormat::block_int8:
      return "blockwise_int8";
    case QuantFormat::channel_int8:
      return "w8a8_int8";
    case QuantFormat::w4afp8:
      return "w4afp8";
    case QuantFormat::hybrid_int8:
      return "octomoe_int8_hybrid";
  }
  return "?";
}

namespace checkpoint {
namespace {

constexpr int kMaxBlock = 1 << 16;

void expect_string(const JsonObject& o, const char* key, const std::string& wanted) {
  if (o.string(key).value_or("") != wanted) o.unsupported(key, wanted);
}
// Absent counts as `wanted`.
void expect_bool(const JsonObject& o, const char* key, bool wanted) {
  if (o.boolean(key).value_or(wanted) != wanted) o.unsupported(key, wanted ? "true" : "false");
}
void expect_absent(const JsonObject& o, const char* key, const char* wanted) {
  if (o.find(key)) o.unsupported(key, wanted);
}

// Scheme's own limits, with the place in the file in front.
Scheme checked(const Scheme& scheme, const JsonObject& where) {
  try {
    check(scheme);
  } catch (const Error& e) {
    fail(ErrorCode::unsupported, "{}: {}", where.where(), e.what());
  }
  return scheme;
}

void read_block(const JsonObject& o, Scheme& scheme) {
  const auto block = o.integers("weight_block_size");
  if (!block) o.missing("weight_block_size");
  if (block->size() != 2 || (*block)[0] < 1 || (*block)[1] < 1 || (*block)[0] > kMaxBlock || (*block)[1] > kMaxBlock) {
    o.wrong("weight_block_size", "[rows, columns]");
  }
  scheme.block_n = static_cast<int>((*block)[0]);
  scheme.block_k = static_cast<int>((*block)[1]);
}

// ---- compressed-tensors ----

// Several groups: the one whose targets speak of experts, else the one for all Linear modules.
JsonObject expert_group(const JsonObject& config) {
  const auto groups = config.object("config_groups");
  if (!groups || groups->value().empty()) config.missing("config_groups");
  std::vector<std::string> names, linear, experts;
  for (const auto& [name, value] : groups->value().items()) {
    const JsonObject group(value, groups->where() + ": " + name);
    names.push_back(name);
    const nlohmann::json* targets = group.find("targets");
    if (!targets) continue;
    if (!targets->is_array()) group.wrong("targets", "a list of strings");
    bool is_linear = false, is_experts = false;
    for (const auto& target : *targets) {
      if (!target.is_string()) group.wrong("targets", "a list of strings");
      is_linear = is_linear || target.get_ref<const std::string&>() == "Linear";
      is_experts = is_experts || target.get_ref<const std::string&>().find("experts") != std::string::npos;
    }
    if (is_linear) linear.push_back(name);
    if (is_experts) experts.push_back(name);
  }
  const auto& chosen = names.size() == 1 ? names : (experts.empty() ? linear : experts);
  if (chosen.size() != 1) {
    fail(ErrorCode::unsupported, "{}: config_groups: expected one group for the experts, got {} of: {}", config.where(),
         chosen.size(), fmt::join(names, ", "));
  }
  return *groups->object(chosen.front());
}

// Dynamic, one scale a token; true if asymmetric.
bool token_activations(const JsonObject& a, const char* type) {
  expect_string(a, "type", type);
  if (a.integer("num_bits").value_or(0) != 8) a.unsupported("num_bits", "8");
  if (a.string("strategy").value_or("token") != "token") a.unsupported("strategy", "token");
  if (!a.boolean("dynamic").value_or(false)) a.unsupported("dynamic", "true");
  return !a.boolean("symmetric").value_or(true);
}

Scheme group_scheme(const JsonObject& group, const std::string& format) {
  const auto weights = group.object("weights");
  if (!weights) group.missing("weights");
  const auto activations = group.object("input_activations");
  if (!activations)
    group.unsupported("input_activations", "8-bit activations (weight-only formats are not computed here)");
  expect_absent(group, "output_activations", "null");
  expect_string(*weights, "type", "int");
  expect_bool(*weights, "symmetric", true);
  if (const auto* dynamic = weights->find("dynamic"); dynamic && *dynamic != false)
    weights->unsupported("dynamic", "false");
  expect_absent(*weights, "block_structure", "null");
  if (const auto* order = weights->find("actorder");
      order && *order != "static" && *order != "weight" && *order != false) {
    weights->unsupported("actorder", "null, static or weight");
  }
  const std::string strategy = weights->string("strategy").value_or("");
  const std::int64_t bits = weights->integer("num_bits").value_or(0);
  if (bits == 8) {
    if (format != "int-quantized" && format != "naive-quantized") {
      fail(ErrorCode::unsupported, "{}: format: expected int-quantized for 8-bit weights, got {}", group.where(),
           in_quotes(format));
    }
    Scheme scheme = Scheme::int8_channel();
    scheme.per_tensor = strategy == "tensor";
    if (strategy != "channel" && strategy != "tensor") weights->unsupported("strategy", "channel or tensor");
    expect_absent(*weights, "group_size", "null");
    // Without "dynamic" the group's input_scale tensors hold the scale.
    if (!activations->boolean("dynamic").value_or(false) && activations->string("strategy").value_or("") == "tensor") {
      expect_string(*activations, "type", "int");
      if (activations->integer("num_bits").value_or(0) != 8) activations->unsupported("num_bits", "8");
      expect_bool(*activations, "symmetric", true);
      scheme.activation_scale = ActivationScale::static_;
    } else {
      scheme.asymmetric = token_activations(*activations, "int");
    }
    return checked(scheme, group);
  }
  if (bits != 4) weights->unsupported("num_bits", "8 or 4");
  if (format != "int-quantized" && format != "naive-quantized" && format != "pack-quantized") {
    fail(ErrorCode::unsupported, "{}: format: expected int-quantized or pack-quantized for 4-bit weights, got {}",
         group.where(), in_quotes(format));
  }
  Scheme scheme = Scheme::w4a8_fp8();
  if (strategy == "group") {
    scheme.group_size = static_cast<int>(weights->integer_in("group_size", 1, kMaxBlock));
  } else if (strategy == "channel") {
    scheme.group_size = 0;
  } else {
    weights->unsupported("strategy", "group or channel");
  }
  if (token_activations(*activations, "float")) activations->unsupported("symmetric", "true");
  return checked(scheme, group);
}

QuantConfig read_compressed_tensors(const JsonObject& config) {
  if (const auto status = config.string("quantization_status");
      status && *status != "compressed" && *status != "frozen") {
    config.unsupported("quantization_status", "compressed");
  }
  if (const auto sparsity = config.object("sparsity_config"); sparsity && !sparsity->value().empty()) {
    if (sparsity->string("format").value_or("dense") != "dense") sparsity->unsupported("format", "dense");
  }
  const JsonObject group = expert_group(config);
  const std::string format = group.string("format").value_or(config.string("format").value_or(""));
  return {QuantFormat::compressed_tensors, group_scheme(group, format)};
}

// ---- the other formats ----

QuantConfig read_block_int8(const JsonObject& config) {
  if (config.string("activation_scheme").value_or("dynamic") != "dynamic")
    config.unsupported("activation_scheme", "dynamic");
  Scheme scheme = Scheme::int8_block();
  read_block(config, scheme);
  return {QuantFormat::block_int8, checked(scheme, config)};
}

QuantConfig read_channel_int8(const JsonObject& config) {
  if (config.string("activation_scheme").value_or("dynamic") != "dynamic")
    config.unsupported("activation_scheme", "dynamic");
  expect_bool(config, "is_dynamic", true);
  return {QuantFormat::channel_int8, Scheme::int8_channel()};
}

QuantConfig read_w4afp8(const JsonObject& config) {
  Scheme scheme = Scheme::w4a8_fp8();
  scheme.group_size = static_cast<int>(config.integer_in("group_size", 0, kMaxBlock, 128));
  const std::string activations = config.string("moe_activation_scheme").value_or("static");
  if (activations == "static") {
    scheme.activation_scale = ActivationScale::static_;
  } else if (activations == "none") {
    scheme.activation_scale = ActivationScale::none;
  } else if (activations != "dynamic") {
    config.unsupported("moe_activation_scheme", "static, dynamic or none");
  }
  return {QuantFormat::w4afp8, checked(scheme, config)};
}

QuantConfig read_hybrid(const JsonObject& config) {
  if (config.integer_in("version", 1, 1 << 20) != 1) config.unsupported("version", "1");
  if (config.string("activation_scheme").value_or("dynamic") != "dynamic")
    config.unsupported("activation_scheme", "dynamic");
  Scheme scheme = Scheme::int8_hybrid();
  read_block(config, scheme);
  scheme.super_group = static_cast<int>(config.integer_in("super_group", 1, kMaxBlock));
  scheme.q_max = static_cast<int>(config.integer_in("q_max", 1, 255));
  return {QuantFormat::hybrid_int8, checked(scheme, config)};
}

}  // namespace

QuantConfig parse_quantization_config(const JsonObject& config) {
  const auto method = config.string("quant_method");
  if (!method) config.missing("quant_method");
  if (*method == "compressed-tensors") return read_compressed_tensors(config);
  if (*method == "blockwise_int8") return read_block_int8(config);
  if (*method == "w8a8_int8") return read_channel_int8(config);
  if (*method == "w4afp8") return read_w4afp8(config);
  if (*method == to_string(QuantFormat::hybrid_int8)) return read_hybrid(config);
  config.unsupported("quant_method", fmt::format("compressed-tensors, blockwise_int8, w8a8_int8, w4afp8 or {}",
                                                 to_string(QuantFormat::hybrid_int8)));
}

QuantFormat format_of(const Scheme& scheme) {
  switch (scheme.kind) {
    case SchemeKind::int8_channel:
      return QuantFormat::compressed_tensors;
    case SchemeKind::int8_block:
      return QuantFormat::block_int8;
    case SchemeKind::int8_hybrid:
      return QuantFormat::hybrid_int8;
    case SchemeKind::w4a8_fp8:
      return QuantFormat::w4afp8;
    case SchemeKind::bf16:
    case SchemeKind::fp16:
      break;
  }
  return QuantFormat::none;
}

nlohmann::ordered_json make_quantization_config(const Scheme& scheme, const std::vector<std::string>& ignored) {
  using Json = nlohmann::ordered_json;
  const char* method = to_string(format_of(scheme));
  switch (scheme.kind) {
    case SchemeKind::int8_channel: {
      const auto args = [](bool symmetric, const char* strategy, bool dynamic) {
        return Json{{"num_bits", 8},
                    {"type", "int"},
                    {"symmetric", symmetric},
                    {"strategy", strategy},
                    {"dynamic", dynamic},
                    {"group_size", nullptr},
                    {"block_structure", nullptr},
                    {"actorder", nullptr},
                    {"observer", dynamic ? Json(nullptr) : Json("minmax")},
                    {"observer_kwargs", Json::object()}};
      };
      const bool fixed = scheme.activation_scale == ActivationScale::static_;
      const Json group{{"targets", Json::array({"Linear"})},
                       {"weights", args(true, scheme.per_tensor ? "tensor" : "channel", false)},
                       {"input_activations", args(!scheme.asymmetric, fixed ? "tensor" : "token", !fixed)},
                       {"output_activations", nullptr}};
      return Json{{"quant_method", method},
                  {"format", "int-quantized"},
                  {"quantization_status", "compressed"},
                  {"config_groups", Json{{"group_0", group}}},
                  {"ignore", ignored},
                  {"kv_cache_scheme", nullptr}};
    }
    case SchemeKind::int8_block:
      return Json{{"quant_method", method},
                  {"activation_scheme", "dynamic"},
                  {"weight_block_size", Json::array({scheme.block_n, scheme.block_k})},
                  {"ignored_layers", ignored}};
    case SchemeKind::int8_hybrid:
      return Json{{"quant_method", method},
                  {"version", 1},
                  {"activation_scheme", "dynamic"},
                  {"weight_block_size", Json::array({scheme.block_n, scheme.block_k})},
                  {"super_group", scheme.super_group},
                  {"q_max", scheme.q_max},
                  {"ignored_layers", ignored}};
    case SchemeKind::w4a8_fp8: {
      const char* activations = scheme.activation_scale == ActivationScale::none      ? "none"
                                : scheme.activation_scale == ActivationScale::static_ ? "static"
                                                                                      : "dynamic";
      return Json{{"quant_method", method},
                  {"group_size", scheme.group_size},
                  {"moe_activation_scheme", activations},
                  {"linear_activation_scheme", "dynamic"},
                  {"ignored_layers", ignored}};
    }
    case SchemeKind::bf16:
    case SchemeKind::fp16:
      break;
  }
  return Json();
}

}  // namespace checkpoint
}  // namespace octomoe
