// Reading the values of options: lists, sizes, devices, schemes. Errors are UsageError and name the option and the bad
// part.
#pragma once

#include <fmt/format.h>

#include <algorithm>
#include <charconv>
#include <cstdint>
#include <string>
#include <string_view>
#include <vector>

#include "cli/usage_error.h"
#include "octomoe/scheme.h"
#include "octomoe/tensor.h"

namespace octomoe::cli {

inline std::int64_t parse_integer(const std::string& option, std::string_view text, std::int64_t low,
                                  std::int64_t high) {
  std::int64_t value = 0;
  const auto [end, ec] = std::from_chars(text.data(), text.data() + text.size(), value);
  if (ec != std::errc() || end != text.data() + text.size() || text.empty()) {
    throw UsageError(fmt::format("{}: expected an integer, got '{}'", option, text));
  }
  if (value < low || value > high) {
    throw UsageError(fmt::format("{}: expected {} to {}, got {}", option, low, high, value));
  }
  return value;
}

// "1,16,128" -> {1, 16, 128}. Empty parts are errors.
inline std::vector<std::int64_t> parse_integers(const std::string& option, const std::string& text, std::int64_t low,
                                                std::int64_t high) {
  std::vector<std::int64_t> values;
  for (std::size_t begin = 0; begin <= text.size();) {
    const std::size_t end = std::min(text.find(',', begin), text.size());
    values.push_back(parse_integer(option, std::string_view(text).substr(begin, end - begin), low, high));
    begin = end + 1;
  }
  return values;
}

// "0,3-5" -> {0, 3, 4, 5}.
inline std::vector<int> parse_layers(const std::string& text) {
  constexpr std::int64_t kMaxLayers = 100'000;
  std::vector<int> layers;
  for (std::size_t begin = 0; begin <= text.size();) {
    const std::size_t end = std::min(text.find(',', begin), text.size());
    const std::string_view part = std::string_view(text).substr(begin, end - begin);
    const std::size_t dash = part.find('-');
    const std::int64_t first = parse_integer("--layers", part.substr(0, dash), 0, kMaxLayers);
    const std::int64_t last =
        dash == std::string_view::npos ? first : parse_integer("--layers", part.substr(dash + 1), first, kMaxLayers);
    for (std::int64_t l = first; l <= last; ++l) layers.push_back(static_cast<int>(l));
    begin = end + 1;
  }
  return layers;
}

inline Device parse_device(const std::string& option, const std::string& text) {
  try {
    return Device::parse(text);
  } catch (const Error& e) {
    throw UsageError(fmt::format("{}: {}", option, e.what()));
  }
}

inline Scheme parse_scheme(const std::string& option, const std::string& text) {
  try {
    const Scheme scheme = Scheme::parse(text);
    check(scheme);
    return scheme;
  } catch (const Error& e) {
    throw UsageError(fmt::format("{}: {}", option, e.what()));
  }
}

// "all", or names separated by commas. A comma also separates the options of one scheme
// ("int8_hybrid:block=64,q_max=32"), so a part that starts with the name of a scheme begins a new one and any other
// part belongs to the one before it.
inline std::vector<Scheme> parse_schemes(const std::string& option, const std::string& text) {
  if (text == "all") return all_schemes();
  const auto starts_scheme = [](std::string_view part) {
    const std::string_view name = part.substr(0, part.find(':'));
    for (const Scheme& s : all_schemes()) {
      if (name == to_string(s.kind)) return true;
    }
    return false;
  };
  std::vector<std::string> parts;
  for (std::size_t begin = 0; begin <= text.size();) {
    const std::size_t end = std::min(text.find(',', begin), text.size());
    const std::string part = text.substr(begin, end - begin);
    const bool continues =
        !parts.empty() && !part.empty() && !starts_scheme(part) && parts.back().find(':') != std::string::npos;
    if (continues) {
      parts.back() += "," + part;
    } else {
      parts.push_back(part);
    }
    begin = end + 1;
  }
  std::vector<Scheme> schemes;
  for (const std::string& part : parts) {
    if (part == "all") throw UsageError(fmt::format("{}: 'all' stands alone", option));
    const Scheme scheme = parse_scheme(option, part);
    if (std::find(schemes.begin(), schemes.end(), scheme) != schemes.end()) {
      throw UsageError(fmt::format("{}: '{}' is given twice", option, part));
    }
    schemes.push_back(scheme);
  }
  return schemes;
}

// --quant-block-size, --super-group-size, --q-max: parameters of every int8_hybrid among the schemes; 0: not given.
struct HybridParameters {
  int block_k = 0, super_group = 0, q_max = 0;
};
inline void set_hybrid(const HybridParameters& given, std::vector<Scheme>& schemes) {
  const Scheme base = Scheme::int8_hybrid();
  const struct {
    const char* option;
    int value;
    int Scheme::*field;
  } parameters[] = {{"--quant-block-size", given.block_k, &Scheme::block_k},
                    {"--super-group-size", given.super_group, &Scheme::super_group},
                    {"--q-max", given.q_max, &Scheme::q_max}};
  for (const auto& p : parameters) {
    if (p.value == 0) continue;
    bool any = false;
    for (Scheme& s : schemes) {
      if (s.kind != SchemeKind::int8_hybrid) continue;
      any = true;
      if (s.*p.field != base.*p.field && s.*p.field != p.value) {
        throw UsageError(fmt::format("{}: expected what --schemes says ({}), got {}", p.option, to_string(s), p.value));
      }
      s.*p.field = p.value;
      try {
        check(s);
      } catch (const Error& e) {
        throw UsageError(fmt::format("{}: {}", p.option, e.what()));
      }
    }
    if (!any) throw UsageError(fmt::format("{}: expected int8_hybrid among --schemes, got none", p.option));
  }
  for (std::size_t i = 0; i < schemes.size(); ++i) {
    if (std::find(schemes.begin() + static_cast<std::ptrdiff_t>(i) + 1, schemes.end(), schemes[i]) != schemes.end())
      throw UsageError(fmt::format("--schemes: '{}' is given twice", to_string(schemes[i])));
  }
}

// "5GB", "512MiB", "1000000": bytes. KB, MB, GB are powers of 1000, KiB, MiB, GiB of 1024.
inline std::int64_t parse_size(const std::string& option, const std::string& text) {
  double value = 0;
  const char* const last = text.data() + text.size();
  const auto [end, ec] = std::from_chars(text.data(), last, value);
  std::string_view unit(end, static_cast<std::size_t>(last - end));
  while (!unit.empty() && unit.front() == ' ') unit.remove_prefix(1);
  static constexpr struct {
    std::string_view name;
    double factor;
  } kUnits[] = {{"", 1},      {"B", 1},        {"KB", 1e3},        {"MB", 1e6},           {"GB", 1e9},
                {"TB", 1e12}, {"KiB", 1024.0}, {"MiB", 1048576.0}, {"GiB", 1073741824.0}, {"TiB", 1099511627776.0}};
  for (const auto& u : kUnits) {
    if (ec != std::errc() || unit != u.name) continue;
    const double bytes = value * u.factor;
    if (!(bytes >= 1 && bytes < 9e18)) break;
    return static_cast<std::int64_t>(bytes);
  }
  throw UsageError(fmt::format("{}: expected a size such as 5GB or 512MiB, got '{}'", option, text));
}

}  // namespace octomoe::cli
