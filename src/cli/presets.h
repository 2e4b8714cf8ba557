// Layer shapes of known models (their config.json), by name.
#pragma once

#include <fmt/format.h>

#include <cstdint>
#include <string>
#include <vector>

#include "cli/usage_error.h"

namespace octomoe::cli {

struct Preset {
  const char* name;
  const char* model;
  std::int64_t hidden, intermediate, experts;
  int top_k;
  std::int64_t experts_of_a_rank = 0;  // where a GPU usually holds a part of them: what `tune --all-models` takes
};

inline constexpr Preset kPresets[] = {
    {"qwen3-30b", "Qwen3-30B-A3B", 2048, 768, 128, 8},
    {"qwen3-235b", "Qwen3-235B-A22B", 4096, 1536, 128, 8},
    {"qwen3.6-35b", "Qwen3.5/3.6-35B-A3B", 2048, 512, 256, 8},
    {"ernie-21b", "ERNIE-4.5-21B-A3B", 2560, 1536, 64, 6},
    {"ernie-300b", "ERNIE-4.5-300B-A47B", 8192, 3584, 64, 8},
    {"deepseek-v3", "DeepSeek-V3/R1", 7168, 2048, 256, 8, 32},
    {"mixtral-8x7b", "Mixtral-8x7B", 4096, 14336, 8, 2},
};

inline std::string preset_names() {
  std::string names;
  for (const Preset& p : kPresets) names += (names.empty() ? "" : ", ") + std::string(p.name);
  return names;
}

inline const Preset& find_preset(const std::string& name) {
  for (const Preset& p : kPresets) {
    if (name == p.name) return p;
  }
  throw UsageError(fmt::format("--model: unknown preset '{}'; known: {}", name, preset_names()));
}

}  // namespace octomoe::cli
