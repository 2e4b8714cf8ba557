#include "jit/kernel_store.h"

#include <dlfcn.h>

#include <chrono>
#include <condition_variable>
#include <cstdlib>
#include <filesystem>
#include <map>
#include <set>

#include "base/log.h"
#include "cuda/nvrtc.h"
#include "tensor/check.h"

namespace octomoe::jit {
namespace {

namespace fs = std::filesystem;
using Image = std::shared_ptr<const CompiledKernel>;

std::vector<std::string> split_paths(const std::string& list) {
  std::vector<std::string> out;
  std::size_t begin = 0;
  while (begin <= list.size()) {
    const std::size_t end = std::min(list.find(':', begin), list.size());
    if (end > begin) out.push_back(list.substr(begin, end - begin));
    begin = end + 1;
  }
  return out;
}

}  // namespace

struct KernelStore::Impl {
  explicit Impl(Options o)
      : sources(o.sources ? *o.sources : SourceSet::embedded()),
        cache(std::move(o.cache_folder)),
        packs(std::move(o.packs)) {}

  const SourceSet& sources;
  DiskCache cache;
  mutable std::mutex mutex;
  std::vector<std::shared_ptr<const Pack>> packs;
  std::set<std::string> warned;
  Counts counts;

  // What was got or is being got, by source key and target. A slot without an image is tried afresh by the next call.
  struct Slot {
    std::mutex mutex;
    Image image;
  };
  std::map<std::pair<Key, Target>, std::shared_ptr<Slot>> slots;

  void warn(const std::string& message) {
    {
      const std::lock_guard lock(mutex);
      if (!warned.insert(message).second) return;
    }
    log(LogLevel::warning, message);
  }

  template <class Make>
  Image once(const Key& key, Target target, const Make& make) {
    std::shared_ptr<Slot> slot;
    {
      const std::lock_guard lock(mutex);
      std::shared_ptr<Slot>& s = slots[{key, target}];
      if (!s) s = std::make_shared<Slot>();
      slot = s;
    }
    const std::lock_guard lock(slot->mutex);  // who comes second waits here
    if (!slot->image) slot->image = make();
    return slot->image;
  }

  void count(int Counts::*which) {
    const std::lock_guard lock(mutex);
    ++(counts.*which);
  }

  Image from_packs(const KernelEntry& entry, const std::vector<std::pair<Target, Key>>& wanted) {
    std::vector<std::shared_ptr<const Pack>> all;
    {
      const std::lock_guard lock(mutex);
      all = packs;
    }
    for (const auto& [target, key] : wanted) {
      for (const auto& pack : all) {
        const PackEntry* found = pack->find(key, target);
        if (!found) continue;
        try {
          return once(key, target, [&] {
            auto image = std::make_shared<const CompiledKernel>(pack->kernel(*found));
            count(&Counts::from_pack);
            return image;
          });
        } catch (const Error& e) {
          warn(fmt::format("{}; kernel {} is taken from the cache or compiled", e.what(), entry.id));
        }
      }
    }
    return nullptr;
  }

  // Cache or NVRTC. nullptr and a reason if this target cannot be had.
  Image from_compiler(const KernelEntry& entry, Target target, const Key& key, std::string& problem) {
    const cuda::Nvrtc* nvrtc = cuda::Nvrtc::find(&problem);
    if (!nvrtc) return nullptr;
    if (!nvrtc->supports(target.arch)) {
      problem = fmt::format("NVRTC {}.{} does not know {}", nvrtc->version() / 1000, nvrtc->version() % 1000 / 10,
                            to_string(target));
      return nullptr;
    }
    const Key file = cache_key(key, nvrtc->version());
    bool compiled = false;
    const auto make = [&] {
      compiled = true;
      const auto begin = std::chrono::steady_clock::now();
      std::vector<std::byte> bytes = encode(jit::compile(entry, target, sources));
      const std::chrono::duration<double> seconds = std::chrono::steady_clock::now() - begin;
      log(LogLevel::info,
          fmt::format("compiled kernel {} for {} in {:.2f} s", entry.id, to_string(target), seconds.count()));
      return bytes;
    };
    const auto accept = [&](std::span<const std::byte> bytes) {
      try {
        const CompiledKernel k = decode(bytes, cache.file_of(file));
        return k.source_key == key && k.target == target;
      } catch (const Error&) {  // written by another version of this code
        return false;
      }
    };
    const std::vector<std::byte> bytes = cache.load_or_make(file, make, accept);
    auto image = std::make_shared<const CompiledKernel>(decode(bytes, cache.file_of(file)));
    count(compiled ? &Counts::compiled : &Counts::from_cache);
    return image;
  }

  Image get(const KernelEntry& entry, int compute_capability, bool use_packs) {
    std::vector<std::pair<Target, Key>> wanted;
    for (const Target t : targets_for(entry, compute_capability)) {
      wanted.emplace_back(t, source_key(translate(entry, t, sources)));
    }
    if (use_packs) {
      if (Image image = from_packs(entry, wanted)) return image;
    }
    std::string problems;
    for (const auto& [target, key] : wanted) {
      std::string problem;
      const auto make = [&, target = target, &key = key] { return from_compiler(entry, target, key, problem); };
      // An image that a pack gave and the driver refused sits in the slot of its key: go around it.
      const Image image = use_packs ? once(key, target, make) : make();
      if (image) return image;
      if (problems.find(problem) == std::string::npos) problems += (problems.empty() ? "" : "; ") + problem;
    }
    std::string searched;
    if (use_packs) {
      const std::lock_guard lock(mutex);
      for (const auto& pack : packs) searched += (searched.empty() ? "" : ", ") + pack->name();
    }
    fail(ErrorCode::unsupported,
         "kernel {} for compute capability {}.{}: in no pack (looked in: {}) and cannot be compiled: {}", entry.id,
         compute_capability / 10, compute_capability % 10, searched.empty() ? "none" : searched, problems);
  }
};

KernelStore::KernelStore(Options options) : impl_(std::make_unique<Impl>(std::move(options))) {}
KernelStore::~KernelStore() = default;

std::vector<std::string> installed_files(const std::string& name) {
  Dl_info info{};
  if (dladdr(reinterpret_cast<const void*>(&KernelStore::shared), &info) == 0 || !info.dli_fname) return {};
  std::error_code ec;
  const fs::path file = fs::weakly_canonical(info.dli_fname, ec);
  if (ec) return {};
  const fs::path here = file.parent_path();
  std::vector<std::string> out;
  for (const fs::path& root : {here, here.parent_path(), here.parent_path().parent_path()}) {
    out.push_back((root / "share/octomoe" / name).string());
  }
  out.push_back((here / name).string());
  return out;
}

std::vector<std::string> KernelStore::installed_packs() { return installed_files("kernels.pack"); }

KernelStore& KernelStore::shared() {
  // Never destroyed: kernels may still be asked for while static objects die.
  static KernelStore* store = [] {
    Options options{.cache_folder = DiskCache::default_folder()};
    const char* named = std::getenv("OCTOMOE_PACK");
    if (named && *named) {
      for (const std::string& path : split_paths(named)) options.packs.push_back(Pack::open(path));
      return new KernelStore(std::move(options));
    }
    for (const std::string& path : installed_packs()) {
      std::error_code ec;
      if (!fs::exists(path, ec)) continue;
      try {
        options.packs.push_back(Pack::open(path));
      } catch (const Error& e) {
        log(LogLevel::warning, fmt::format("installed kernel pack refused: {}", e.what()));
      }
      break;
    }
    return new KernelStore(std::move(options));
  }();
  return *store;
}

void KernelStore::add_pack(std::shared_ptr<const Pack> pack) {
  const std::lock_guard lock(impl_->mutex);
  impl_->packs.insert(impl_->packs.begin(), std::move(pack));
}

std::vector<std::shared_ptr<const Pack>> KernelStore::packs() const {
  const std::lock_guard lock(impl_->mutex);
  return impl_->packs;
}

const DiskCache& KernelStore::cache() const { return impl_->cache; }

std::shared_ptr<const CompiledKernel> KernelStore::get(const KernelEntry& entry, int compute_capability) {
  return impl_->get(entry, compute_capability, true);
}
std::shared_ptr<const CompiledKernel> KernelStore::compile_for(const KernelEntry& entry, int compute_capability) {
  return impl_->get(entry, compute_capability, false);
}

KernelStore::Counts KernelStore::counts() const {
  const std::lock_guard lock(impl_->mutex);
  return impl_->counts;
}

}  // namespace octomoe::jit
