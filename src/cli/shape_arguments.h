// The options that say which layer: --model and its sizes.
#pragma once

#include <CLI/CLI.hpp>
#include <cstdint>
#include <string>

#include "cli/problem.h"

namespace octomoe::cli {

struct ShapeArguments {
  std::string model;
  std::int64_t experts = 0, experts_local = 0, hidden = 0, intermediate = 0;  // 0: not given
  int top_k = 0;

  bool any_size() const { return experts > 0 || hidden > 0 || intermediate > 0 || top_k > 0; }
};

// All but --model, which every command describes for itself.
void add_size_options(CLI::App& command, ShapeArguments& a);

// The preset, with single sizes replaced by what was given. `model` gets its name. UsageError.
ProblemShape shape_of(const ShapeArguments& a, const char* default_model, std::string* model);

}  // namespace octomoe::cli
