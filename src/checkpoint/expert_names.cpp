#include "checkpoint/expert_names.h"

#include <array>
#include <charconv>
#include <optional>
#include <string_view>

namespace octomoe::checkpoint {
namespace {

constexpr std::array<std::string_view, 5> kPrefixes = {"model.language_model.", "model.", "language_model.model.",
                                                       "language_model.", ""};

bool skip(std::string_view& text, std::string_view expected) {
  if (!text.starts_with(expected)) return false;
  text.remove_prefix(expected.size());
  return true;
}

std::optional<int> read_number(std::string_view& text) {
  int value = 0;
  const auto [end, error] = std::from_chars(text.data(), text.data() + text.size(), value);
  if (error != std::errc() || value < 0 || text.front() == '-') return std::nullopt;
  text.remove_prefix(static_cast<std::size_t>(end - text.data()));
  return value;
}

struct Found {
  int layer;
  LayerNames names;
};

// "layers.3.mlp.experts.0.gate_proj.weight" after `prefix`.
std::optional<Found> parse_name(std::string_view name, std::string_view prefix) {
  std::string_view rest = name;
  if (!skip(rest, prefix) || !skip(rest, "layers.")) return std::nullopt;
  const std::optional<int> layer = read_number(rest);
  if (!layer || !skip(rest, ".")) return std::nullopt;
  if (!skip(rest, "mlp.") && !skip(rest, "block_sparse_moe.")) return std::nullopt;
  LayerNames names;
  names.block = std::string(name.substr(0, name.size() - rest.size()));
  if (!skip(rest, "experts.")) return std::nullopt;
  if (rest == "gate_up_proj" || rest == "down_proj") {
    names.fused = true;
    return Found{*layer, names};
  }
  if (!read_number(rest) || !skip(rest, ".")) return std::nullopt;
  const std::string_view projection = rest.substr(0, rest.find('.'));
  if (projection == "w1" || projection == "w2" || projection == "w3") {
    names.gate = "w1";
    names.up = "w3";
    names.down = "w2";
  } else if (projection != "gate_proj" && projection != "up_proj" && projection != "down_proj") {
    return std::nullopt;
  }
  return Found{*layer, names};
}

}  // namespace

std::string LayerNames::expert(std::int64_t e) const { return block + "experts." + std::to_string(e) + "."; }

std::string LayerNames::shared(bool plural) const { return block + (plural ? "shared_experts." : "shared_expert."); }

std::map<int, LayerNames> find_expert_layers(const std::vector<std::string>& names) {
  for (const std::string_view prefix : kPrefixes) {
    std::map<int, LayerNames> layers;
    for (const std::string& name : names) {
      if (const auto found = parse_name(name, prefix)) layers.emplace(found->layer, found->names);
    }
    if (!layers.empty()) return layers;
  }
  return {};
}

}  // namespace octomoe::checkpoint
