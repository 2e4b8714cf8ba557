// KernelStore: where a kernel's image comes from. Packs in memory, then the disk cache, then NVRTC; each key once in a
// process, however many threads ask.
#pragma once

#include <memory>
#include <mutex>
#include <string>
#include <vector>

#include "jit/cache.h"
#include "jit/compile.h"
#include "jit/pack.h"

namespace octomoe::jit {

// Where a file that is installed with the library may be, in order: seen from the library's own file,
// share/octomoe/NAME below its folder, one and two levels up, and NAME beside it.
std::vector<std::string> installed_files(const std::string& name);

class KernelStore {
 public:
  struct Options {
    std::string cache_folder = {};                        // "": no disk cache
    const SourceSet* sources = nullptr;                   // nullptr: the embedded ones
    std::vector<std::shared_ptr<const Pack>> packs = {};  // earlier ones win
  };
  explicit KernelStore(Options options);
  ~KernelStore();

  // Of this process: the packs of $OCTOMOE_PACK (colon-separated) or, if that is not set, the one installed with the
  // library; the default cache folder. The environment is read once, at the first call. Error(io, format) if a pack
  // that $OCTOMOE_PACK names is refused; an installed one that is refused is a warning.
  static KernelStore& shared();
  // Candidates for the installed pack, in order.
  static std::vector<std::string> installed_packs();

  void add_pack(std::shared_ptr<const Pack> pack);  // ahead of those there
  std::vector<std::shared_ptr<const Pack>> packs() const;
  const DiskCache& cache() const;

  // An image that runs on a device of this compute capability. Error(unsupported) if there is no way to get one, saying
  // what was tried.
  std::shared_ptr<const CompiledKernel> get(const KernelEntry& entry, int compute_capability);
  // The same without packs: for an image of a pack that the driver has refused.
  std::shared_ptr<const CompiledKernel> compile_for(const KernelEntry& entry, int compute_capability);

  struct Counts {
    int from_pack = 0, from_cache = 0, compiled = 0;
  };
  Counts counts() const;

 private:
  struct Impl;
  std::unique_ptr<Impl> impl_;
};

}  // namespace octomoe::jit
