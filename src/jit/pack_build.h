// What `octomoe pack` does: compile many entries for many targets at once.
#pragma once

#include <functional>
#include <memory>
#include <span>
#include <string>
#include <vector>

#include "jit/pack.h"

namespace octomoe::jit {

struct PackBuildOptions {
  std::vector<Target> targets;
  int jobs = 1;
  std::string disassembler = {};  // of find_disassembler(); "": instructions are not counted
  const SourceSet* sources = nullptr;
  // Images that the same NVRTC made from the same sources are taken from here instead of being compiled.
  std::shared_ptr<const Pack> reuse = {};
  // After each kernel, from any thread but one at a time.
  std::function<void(std::size_t done, std::size_t total, const std::string& current)> progress = {};
};
struct PackBuild {
  std::vector<PackItem> items;
  std::vector<std::string> failures;  // one line per kernel that did not compile
  std::size_t reused = 0;
  double slowest_s = 0, total_s = 0;  // compile time of the slowest kernel, and of all together
  std::string slowest;
};

// Entries with their target, in the order of the targets. Error(invalid_argument) for a target that no entry is for.
std::vector<std::pair<const KernelEntry*, Target>> pack_jobs(std::span<const KernelEntry> entries,
                                                             std::span<const Target> targets);
PackBuild build_pack(std::span<const KernelEntry> entries, const PackBuildOptions& options);

}  // namespace octomoe::jit
