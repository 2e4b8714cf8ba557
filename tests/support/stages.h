// Which stages the layers of a thread went through, for tests.
#pragma once

#include <algorithm>
#include <string>
#include <vector>

#include "cuda/observe.h"

namespace octomoe::testing {

struct Stages : cuda::StageObserver {
  std::vector<std::string> names;
  void on_plan(std::size_t, std::size_t) override {}
  void on_stage(const char* name, Stream) override {
    if (name != nullptr) names.emplace_back(name);
  }
  auto count(const char* name) const { return std::count(names.begin(), names.end(), name); }
};

}  // namespace octomoe::testing
