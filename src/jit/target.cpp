#include "jit/target.h"

#include <algorithm>

#include "cuda/driver.h"
#include "tensor/check.h"

namespace octomoe::jit {
namespace {

// sm_90a holds wgmma and setmaxnreg, which no other architecture runs: its kernels are compiled for it alone.
constexpr int kHopper = 90;

}  // namespace

std::string to_string(Target t) {
  if (t.ptx) return fmt::format("compute_{}", t.arch);
  return fmt::format("sm_{}{}", t.arch, t.arch == kHopper ? "a" : "");
}

Target parse_target(const std::string& name) {
  for (const bool ptx : {false, true}) {
    const std::string prefix = ptx ? "compute_" : "sm_";
    if (!name.starts_with(prefix)) continue;
    std::string digits = name.substr(prefix.size());
    const bool suffix = !ptx && digits.ends_with('a');
    if (suffix) digits.pop_back();
    const bool number = !digits.empty() && digits.size() <= 3 &&
                        std::all_of(digits.begin(), digits.end(), [](char c) { return c >= '0' && c <= '9'; });
    if (!number) break;
    const Target t(std::stoi(digits), ptx);
    if (t.arch < cuda::kOldestComputeCapability) bad_argument("arch: expected sm_80 or newer, got {}", name);
    if (suffix && t.arch != kHopper) break;
    return t;
  }
  bad_argument("arch: expected sm_80, sm_86, sm_89, sm_90a, another sm_NN, or compute_{} (PTX), got {}", kPtxArch,
               name);
}

std::vector<Target> targets_for(const KernelEntry& entry, int cc) {
  cuda::check_compute_capability(cc, "the GPU");
  const auto& archs = entry.archs;
  std::vector<Target> out;
  if (std::find(archs.begin(), archs.end(), cc) != archs.end()) out.emplace_back(cc);
  // A cubin runs on later minor versions of its major one.
  std::vector<int> older;
  for (const int a : archs) {
    if (a != kHopper && a / 10 == cc / 10 && a < cc) older.push_back(a);
  }
  std::sort(older.rbegin(), older.rend());
  out.insert(out.end(), older.begin(), older.end());
  // Plain CUDA C++ runs on everything newer: compiled for the device itself, else as PTX.
  const bool portable = std::any_of(archs.begin(), archs.end(), [&](int a) { return a < kHopper && a <= cc; });
  if (out.empty() && portable) {
    out.emplace_back(cc);
    if (cc >= kPtxArch) out.emplace_back(kPtxArch, true);
  }
  if (out.empty()) {
    std::string list;
    for (const int a : archs) list += (list.empty() ? "" : ", ") + to_string(Target(a));
    fail(ErrorCode::unsupported, "kernel {}: made for {}, cannot run on compute capability {}.{}", entry.id, list,
         cc / 10, cc % 10);
  }
  return out;
}

}  // namespace octomoe::jit
