#include "jit/pack_build.h"

#include <algorithm>
#include <chrono>
#include <mutex>
#include <optional>

#include "base/thread_pool.h"
#include "cuda/nvrtc.h"
#include "jit/sass.h"
#include "tensor/check.h"

namespace octomoe::jit {

std::vector<std::pair<const KernelEntry*, Target>> pack_jobs(std::span<const KernelEntry> entries,
                                                             std::span<const Target> targets) {
  std::vector<std::pair<const KernelEntry*, Target>> jobs;
  const auto made_for = [](const KernelEntry& entry, int arch) { return std::ranges::count(entry.archs, arch) > 0; };
  for (const Target target : targets) {
    const std::size_t before = jobs.size();
    // An architecture that the catalogue knows has kernels of its own, and no use for the others that would run there.
    const bool known =
        !target.ptx && std::ranges::any_of(entries, [&](const auto& e) { return made_for(e, target.arch); });
    for (const KernelEntry& entry : entries) {
      if (known && !made_for(entry, target.arch)) continue;
      // PTX is for devices newer than any that we know.
      constexpr int kFuture = 990;
      const int device = target.ptx ? kFuture : target.arch;
      try {
        const std::vector<Target> runs = targets_for(entry, device);
        if (std::find(runs.begin(), runs.end(), target) != runs.end()) jobs.emplace_back(&entry, target);
      } catch (const Error& e) {
        if (e.code() != ErrorCode::unsupported) throw;
      }
    }
    if (jobs.size() == before) bad_argument("arch: expected one that a kernel is made for, got {}", to_string(target));
  }
  return jobs;
}

PackBuild build_pack(std::span<const KernelEntry> entries, const PackBuildOptions& options) {
  const auto jobs = pack_jobs(entries, options.targets);
  const SourceSet& sources = options.sources ? *options.sources : SourceSet::embedded();
  const int nvrtc_version = cuda::Nvrtc::get().version();  // without NVRTC: one error instead of one per kernel
  const auto find_reusable = [&](const KernelEntry& entry, Target target) -> std::optional<CompiledKernel> {
    if (!options.reuse) return std::nullopt;
    const PackEntry* old = options.reuse->find(source_key(translate(entry, target, sources)), target);
    if (!old || old->nvrtc_version != nvrtc_version || old->expect != entry.expect) return std::nullopt;
    try {
      CompiledKernel kernel = options.reuse->kernel(*old);
      kernel.id = entry.id;
      return kernel;
    } catch (const Error&) {
      return std::nullopt;
    }
  };
  PackBuild out;
  std::vector<std::optional<PackItem>> items(jobs.size());
  std::mutex mutex;
  std::size_t done = 0;
  ThreadPool pool(std::max(options.jobs, 1));
  pool.parallel_for(static_cast<std::int64_t>(jobs.size()), [&](std::int64_t i, int) {
    const auto& [entry, target] = jobs[static_cast<std::size_t>(i)];
    const auto begin = std::chrono::steady_clock::now();
    std::string failure;
    double seconds = 0;
    bool reused = false;
    try {
      std::optional<CompiledKernel> old = find_reusable(*entry, target);
      reused = old.has_value();
      CompiledKernel kernel = reused ? std::move(*old) : compile(*entry, target, sources);
      if (!reused) seconds = std::chrono::duration<double>(std::chrono::steady_clock::now() - begin).count();
      if (kernel.report.tensor_instructions < 0 && !options.disassembler.empty() && !entry->expect.empty() &&
          !target.ptx) {
        kernel.report.tensor_instructions =
            count_mnemonic(disassemble(kernel.image, options.disassembler), entry->expect);
      }
      items[static_cast<std::size_t>(i)] = PackItem{std::move(kernel), *entry};
    } catch (const Error& e) {
      failure = e.what();
    }
    const std::lock_guard lock(mutex);
    if (!failure.empty()) out.failures.push_back(failure);
    out.total_s += seconds;
    out.reused += reused;
    if (seconds > out.slowest_s) {
      out.slowest_s = seconds;
      out.slowest = fmt::format("{} for {}", entry->id, to_string(target));
    }
    ++done;
    if (options.progress) options.progress(done, jobs.size(), entry->id);
  });
  for (auto& item : items) {
    if (item) out.items.push_back(std::move(*item));
  }
  std::sort(out.failures.begin(), out.failures.end());
  return out;
}

}  // namespace octomoe::jit
