// Target: what an image is compiled for. "sm_80", "sm_86", "sm_89", "sm_90a": a cubin; "compute_90": PTX, which the
// driver compiles for devices that are newer than this library.
#pragma once

#include <compare>
#include <string>
#include <vector>

#include "jit/catalogue.h"

namespace octomoe::jit {

struct Target {
  Target() = default;
  Target(int arch, bool ptx = false) : arch(arch), ptx(ptx) {}  // NOLINT: compile(entry, 80) is meant to work
  int arch = 80;
  bool ptx = false;
  auto operator<=>(const Target&) const = default;
};

std::string to_string(Target target);
Target parse_target(const std::string& name);  // Error(invalid_argument)

// Targets of which an image of this entry runs on a device, best first. Error(unsupported) if none can: the device is
// older than SM80, or the kernel uses instructions of another architecture.
std::vector<Target> targets_for(const KernelEntry& entry, int compute_capability);

inline constexpr int kPtxArch = 90;

}  // namespace octomoe::jit
