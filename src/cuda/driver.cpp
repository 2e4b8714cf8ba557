#include "cuda/driver.h"

#include <dlfcn.h>

#include <array>
#include <atomic>
#include <deque>
#include <mutex>
#include <string_view>

#include "cuda/library_search.h"
#include "tensor/check.h"

namespace octomoe::cuda {
namespace {

// Paths in messages start at src/, wherever the tree was built.
std::string_view short_file(std::string_view file) {
  for (const std::string_view root : {"src/", "tests/", "bench/"}) {
    const std::size_t at = file.rfind(std::string("/").append(root));
    if (at != std::string_view::npos) return file.substr(at + 1);
  }
  return file;
}

struct Loaded {
  Driver driver;
  std::string problem;  // empty: usable
};

Loaded load_driver() {
  const LibraryStatus& library = find_library(Library::driver);
  Loaded out;
  if (!library.usable) {
    out.problem = library.describe();
    return out;
  }
  std::string missing;
  const auto find = [&](const char* name, bool required) {
    void* address = dlsym(library.handle, name);
    if (!address && required) missing += std::string(missing.empty() ? "" : ", ") + name;
    return address;
  };
#define OCTOMOE_CUDA_REQUIRED(name, symbol, parameters) \
  out.driver.name = reinterpret_cast<CuResult(*) parameters>(find(#symbol, true));
#define OCTOMOE_CUDA_OPTIONAL(name, symbol, parameters) \
  out.driver.name = reinterpret_cast<CuResult(*) parameters>(find(#symbol, false));
  OCTOMOE_CUDA_DRIVER_FUNCTIONS(OCTOMOE_CUDA_REQUIRED, OCTOMOE_CUDA_OPTIONAL)
#undef OCTOMOE_CUDA_REQUIRED
#undef OCTOMOE_CUDA_OPTIONAL
  if (!missing.empty()) {
    out.problem = fmt::format("CUDA driver {} ({}) lacks {}: install a driver of CUDA 12 or later", library.version,
                              library.path, missing);
    return out;
  }
  if (const CuResult rc = out.driver.cuInit(0); rc != 0) out.problem = fmt::format("cuInit failed with code {}", rc);
  out.driver.cuDriverGetVersion(&out.driver.version);
  out.driver.cuDeviceGetCount(&out.driver.device_count);
  return out;
}

const Loaded& loaded() {
  static const Loaded* l = new Loaded(load_driver());
  return *l;
}

}  // namespace

const Driver& driver() {
  const Loaded& l = loaded();
  if (!l.problem.empty()) [[unlikely]]
    fail(ErrorCode::unsupported, "no usable GPU: {}", l.problem);
  return l.driver;
}

bool driver_available() { return loaded().problem.empty(); }

std::string error_text(CuResult result) {
  const char *name = nullptr, *text = nullptr;
  const Driver& d = loaded().driver;
  if (d.cuGetErrorName) d.cuGetErrorName(result, &name);
  if (d.cuGetErrorString) d.cuGetErrorString(result, &text);
  return fmt::format("{} ({}): {}", name ? name : "unknown CUDA error", result, text ? text : "no description");
}

void throw_cuda_error(CuResult result, const char* call, const std::source_location& where) {
  const ErrorCode code = result == kCudaOutOfMemory ? ErrorCode::out_of_memory : ErrorCode::cuda;
  fail(code, "{}:{}: {}: {}", short_file(where.file_name()), where.line(), call, error_text(result));
}

void check_compute_capability(int cc, const std::string& device_name) {
  if (cc >= kOldestComputeCapability) return;
  fail(ErrorCode::unsupported, "{}: expected compute capability 8.0 (Ampere) or newer, got {}.{}", device_name, cc / 10,
       cc % 10);
}

const DeviceInfo& device_info(int index) {
  constexpr int kMost = 64;
  static std::array<std::atomic<const DeviceInfo*>, kMost> known{};
  const Driver& d = driver();
  if (index < 0 || index >= d.device_count || index >= kMost) {
    bad_argument("device: expected cuda:0 to cuda:{}, got cuda:{}", d.device_count - 1, index);
  }
  std::atomic<const DeviceInfo*>& slot = known[static_cast<std::size_t>(index)];
  if (const DeviceInfo* info = slot.load(std::memory_order_acquire)) return *info;

  static std::mutex mutex;
  static auto* all = new std::deque<DeviceInfo>;
  const std::lock_guard lock(mutex);
  if (const DeviceInfo* info = slot.load(std::memory_order_acquire)) return *info;
  DeviceInfo info;
  info.index = index;
  OCTOMOE_CUDA(cuDeviceGet, &info.device, index);
  char name[256] = "";
  OCTOMOE_CUDA(cuDeviceGetName, name, sizeof(name) - 1, info.device);
  info.name = name;
  const auto attribute = [&](CuDeviceAttribute which) {
    int value = 0;
    OCTOMOE_CUDA(cuDeviceGetAttribute, &value, which, info.device);
    return value;
  };
  info.compute_capability = 10 * attribute(kComputeCapabilityMajor) + attribute(kComputeCapabilityMinor);
  check_compute_capability(info.compute_capability, fmt::format("cuda:{} ({})", index, info.name));
  info.multiprocessors = attribute(kMultiprocessorCount);
  info.max_shared_bytes = attribute(kMaxSharedPerBlockOptin);
  info.shared_per_multiprocessor = attribute(kMaxSharedPerMultiprocessor);
  info.l2_bytes = attribute(kL2CacheBytes);
  OCTOMOE_CUDA(cuDeviceTotalMem, &info.memory_bytes, info.device);
  OCTOMOE_CUDA(cuDevicePrimaryCtxRetain, &info.primary, info.device);
  slot.store(&all->emplace_back(std::move(info)), std::memory_order_release);
  return *slot.load();
}

}  // namespace octomoe::cuda
