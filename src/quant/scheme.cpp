#include "octomoe/scheme.h"

#include <algorithm>
#include <charconv>
#include <string_view>

#include "tensor/check.h"

namespace octomoe {
namespace {

constexpr const char* kSchemeNames[] = {"int8_channel", "int8_block", "int8_hybrid", "w4a8_fp8", "bf16", "fp16"};
constexpr const char* kActivationNames[] = {"swiglu",    "geglu_tanh", "geglu_erf", "swigluoai", "silu",
                                            "gelu_tanh", "gelu_erf",   "relu",      "relu2",     "none"};

int parse_int(const std::string& text, std::string_view key, std::string_view value) {
  int n = 0;
  const auto [end, error] = std::from_chars(value.data(), value.data() + value.size(), n);
  if (error != std::errc() || end != value.data() + value.size()) {
    bad_argument("scheme \"{}\": expected a whole number for {}, got \"{}\"", text, key, value);
  }
  return n;
}

void set_option(Scheme& s, const std::string& text, std::string_view part) {
  const std::size_t eq = part.find('=');
  const std::string_view key = part.substr(0, eq);
  const std::string_view value = eq == std::string_view::npos ? std::string_view() : part.substr(eq + 1);
  if (eq == std::string_view::npos) {
    if (key == "dynamic") return void(s.activation_scale = ActivationScale::dynamic);
    if (key == "static") return void(s.activation_scale = ActivationScale::static_);
    if (key == "none") return void(s.activation_scale = ActivationScale::none);
    if (key == "asymmetric") return void(s.asymmetric = true);
    if (key == "per_tensor") return void(s.per_tensor = true);
  } else {
    if (key == "block") return void(s.block_n = s.block_k = parse_int(text, key, value));
    if (key == "block_n") return void(s.block_n = parse_int(text, key, value));
    if (key == "block_k") return void(s.block_k = parse_int(text, key, value));
    if (key == "super") return void(s.super_group = parse_int(text, key, value));
    if (key == "q_max") return void(s.q_max = parse_int(text, key, value));
    if (key == "group") return void(s.group_size = parse_int(text, key, value));
  }
  bad_argument(
      "scheme \"{}\": expected dynamic, static, none, asymmetric, per_tensor, block=, block_n=, block_k=, super=, "
      "q_max= or "
      "group=, got \"{}\"",
      text, part);
}

}  // namespace

const char* to_string(SchemeKind kind) { return kSchemeNames[static_cast<std::size_t>(kind)]; }

Scheme Scheme::parse(const std::string& text) {
  const std::size_t colon = text.find(':');
  const std::string kind = text.substr(0, colon);
  const auto* found =
      std::ranges::find(kSchemeNames, std::string_view(kind), [](const char* n) { return std::string_view(n); });
  if (found == std::end(kSchemeNames)) {
    bad_argument("scheme: expected int8_channel, int8_block, int8_hybrid, w4a8_fp8, bf16 or fp16, got \"{}\"", text);
  }
  Scheme s = Scheme::of(static_cast<SchemeKind>(found - std::begin(kSchemeNames)));
  if (colon != std::string::npos) {
    std::string_view rest = std::string_view(text).substr(colon + 1);
    while (true) {
      const std::size_t comma = rest.find(',');
      set_option(s, text, rest.substr(0, comma));
      if (comma == std::string_view::npos) break;
      rest.remove_prefix(comma + 1);
    }
  }
  check(s);
  return s;
}

std::string to_string(const Scheme& s) {
  const Scheme base = Scheme::of(s.kind);
  std::string options;
  const auto add = [&](const std::string& part) { options += (options.empty() ? ":" : ",") + part; };
  if (s.activation_scale == ActivationScale::static_) add("static");
  if (s.activation_scale == ActivationScale::none) add("none");
  if (s.asymmetric) add("asymmetric");
  if (s.per_tensor) add("per_tensor");
  if (s.block_n != base.block_n) add(fmt::format("block_n={}", s.block_n));
  if (s.block_k != base.block_k) add(fmt::format("block_k={}", s.block_k));
  if (s.super_group != base.super_group) add(fmt::format("super={}", s.super_group));
  if (s.q_max != base.q_max) add(fmt::format("q_max={}", s.q_max));
  if (s.group_size != base.group_size) add(fmt::format("group={}", s.group_size));
  return to_string(s.kind) + options;
}

void check(const Scheme& s) {
  const auto need = [&](bool good, const char* field, const std::string& expected, auto got) {
    if (!good) bad_argument("scheme {}: {}: expected {}, got {}", to_string(s.kind), field, expected, got);
  };
  const bool channel = s.kind == SchemeKind::int8_channel;
  const bool w4 = s.kind == SchemeKind::w4a8_fp8;
  const Scheme base = Scheme::of(s.kind);
  need(s.activation_scale == ActivationScale::dynamic || channel || w4, "activation_scale", "dynamic",
       s.activation_scale == ActivationScale::static_ ? "static" : "none");
  need(s.activation_scale != ActivationScale::none || w4, "activation_scale", "dynamic or static", "none");
  need(!s.asymmetric || (channel && s.activation_scale == ActivationScale::dynamic), "asymmetric",
       "false (it goes with int8_channel and dynamic activations)", "true");
  need(!s.per_tensor || channel, "per_tensor", "false (it goes with int8_channel)", "true");
  if (s.has_blocks()) {
    need(s.block_n >= 1 && s.block_n <= 1024, "block_n", "1..1024", s.block_n);
    need(s.block_k >= 32 && s.block_k <= 1024 && s.block_k % 32 == 0, "block_k", "a multiple of 32 in 32..1024",
         s.block_k);
  } else {
    need(s.block_n == base.block_n && s.block_k == base.block_k, "block",
         "the default (blocks go with int8_block and int8_hybrid)", s.block_k);
  }
  if (s.kind == SchemeKind::int8_hybrid) {
    need(s.super_group >= 1 && s.super_group <= 65536, "super_group", "1..65536 K-blocks", s.super_group);
    need(s.q_max >= 1 && s.q_max <= 64, "q_max", "1..64", s.q_max);
  } else {
    need(s.super_group == base.super_group && s.q_max == base.q_max, "super_group and q_max",
         "the defaults (they go with int8_hybrid)", s.q_max);
  }
  if (w4) {
    need(s.group_size == 0 || (s.group_size >= 32 && s.group_size <= 1024 && s.group_size % 32 == 0), "group_size",
         "0 (one scale per channel) or a multiple of 32 up to 1024", s.group_size);
  } else {
    need(s.group_size == base.group_size, "group_size", "the default (it goes with w4a8_fp8)", s.group_size);
  }
}

std::vector<Scheme> all_schemes() {
  std::vector<Scheme> out;
  for (int i = 0; i < 6; ++i) out.push_back(Scheme::of(static_cast<SchemeKind>(i)));
  return out;
}

const char* to_string(Activation a) { return kActivationNames[static_cast<std::size_t>(a)]; }

Activation parse_activation(const std::string& name) {
  if (name == "gelu") return Activation::gelu_erf;
  if (name == "geglu") return Activation::geglu_erf;
  for (std::size_t i = 0; i < std::size(kActivationNames); ++i) {
    if (name == kActivationNames[i]) return static_cast<Activation>(i);
  }
  std::string list;
  for (const char* n : kActivationNames) list += (list.empty() ? "" : ", ") + std::string(n);
  bad_argument("activation: expected one of {}, got \"{}\"", list, name);
}

const char* to_string(GateUpOrder order) { return order == GateUpOrder::gate_up ? "gate_up" : "up_gate"; }

GateUpOrder parse_gate_up_order(const std::string& name) {
  if (name == "gate_up") return GateUpOrder::gate_up;
  if (name == "up_gate") return GateUpOrder::up_gate;
  bad_argument("gate_up_order: expected \"gate_up\" or \"up_gate\", got \"{}\"", name);
}

}  // namespace octomoe
