// Runs the CPU engines made in a scope on one instruction set.
#pragma once

#include <cstdlib>
#include <string>

#include "cpu/isa.h"

namespace octomoe::testing {

class ForcedIsa {
 public:
  explicit ForcedIsa(cpu::Isa isa) {
    if (const char* old = std::getenv(kName)) old_ = old;
    setenv(kName, cpu::to_string(isa), 1);
  }
  ~ForcedIsa() { old_.empty() ? unsetenv(kName) : setenv(kName, old_.c_str(), 1); }
  ForcedIsa(const ForcedIsa&) = delete;
  ForcedIsa& operator=(const ForcedIsa&) = delete;

 private:
  static constexpr const char* kName = "OCTOMOE_CPU_ISA";
  std::string old_;
};

}  // namespace octomoe::testing
