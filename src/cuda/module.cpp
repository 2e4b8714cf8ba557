#include "cuda/module.h"

#include <map>
#include <memory>
#include <mutex>
#include <string>

#include "base/log.h"
#include "cuda/stream.h"
#include "jit/compile.h"
#include "tensor/check.h"

namespace octomoe::cuda {
namespace {

// Results that mean "another image may work".
bool is_image_refused(CuResult rc) {
  return rc == kCudaInvalidImage || rc == kCudaNoBinaryForGpu || rc == kCudaInvalidPtx ||
         rc == kCudaUnsupportedPtxVersion || rc == kCudaJitCompilerNotFound;
}

CuModule load_module(jit::KernelStore& store, const KernelEntry& entry, const DeviceInfo& device) {
  const auto image = store.get(entry, device.compute_capability);
  CuModule module = nullptr;
  CuResult rc = driver().cuModuleLoadData(&module, image->image.data());
  if (rc == 0) return module;
  const std::string why =
      fmt::format("the driver (CUDA {}.{}) refuses kernel {} for {} that NVRTC {}.{} made: {}", driver().version / 1000,
                  driver().version % 1000 / 10, entry.id, jit::to_string(image->target), image->nvrtc_version / 1000,
                  image->nvrtc_version % 1000 / 10, error_text(rc));
  if (!is_image_refused(rc)) check(rc, "cuModuleLoadData");
  // A pack from a newer CUDA than the driver's: this machine's NVRTC may suit it better.
  std::shared_ptr<const jit::CompiledKernel> again;
  try {
    again = store.compile_for(entry, device.compute_capability);
  } catch (const Error& e) {
    fail(ErrorCode::cuda, "{}; {}", why, e.what());
  }
  log(LogLevel::warning, why + "; compiled it here instead");
  rc = driver().cuModuleLoadData(&module, again->image.data());
  if (rc != 0) {
    fail(ErrorCode::cuda, "{}; the same of NVRTC {}.{}: {}. An older CUDA's NVRTC or a newer driver is needed", why,
         again->nvrtc_version / 1000, again->nvrtc_version % 1000 / 10, error_text(rc));
  }
  return module;
}

std::unique_ptr<LoadedKernel> load_kernel(jit::KernelStore& store, const KernelEntry& entry, int index) {
  const DeviceInfo& device = device_info(index);
  auto kernel = std::make_unique<LoadedKernel>();
  kernel->entry = entry;
  kernel->device = &device;
  kernel->threads = entry.threads;
  kernel->shared_bytes = entry.shared_bytes;
  const ContextGuard context(device);
  const CuModule module = load_module(store, entry, device);
  OCTOMOE_CUDA(cuModuleGetFunction, &kernel->function, module, jit::kKernelName);
  const auto attribute = [&](CuFunctionAttribute which) {
    int value = 0;
    OCTOMOE_CUDA(cuFuncGetAttribute, &value, which, kernel->function);
    return value;
  };
  kernel->registers = attribute(kFunctionRegisters);
  kernel->local_bytes = attribute(kFunctionLocalBytes);
  const int needed = entry.shared_bytes + attribute(kFunctionSharedBytes);
  if (needed > device.max_shared_bytes) {
    fail(ErrorCode::unsupported, "kernel {}: needs {} bytes of shared memory, cuda:{} ({}) has {} for a block",
         entry.id, needed, index, device.name, device.max_shared_bytes);
  }
  OCTOMOE_CUDA(cuFuncSetAttribute, kernel->function, kFunctionMaxDynamicShared, entry.shared_bytes);
  OCTOMOE_CUDA(cuOccupancyMaxActiveBlocksPerMultiprocessor, &kernel->blocks_per_multiprocessor, kernel->function,
               entry.threads, static_cast<std::size_t>(entry.shared_bytes));
  if (driver().cuFuncGetParamInfo) {
    std::size_t offset = 0;
    if (driver().cuFuncGetParamInfo(kernel->function, 0, &offset, &kernel->args_bytes) != 0) kernel->args_bytes = 0;
  }
  return kernel;
}

}  // namespace

struct ModuleCache::Impl {
  jit::KernelStore& store;
  struct Slot {
    std::mutex mutex;
    std::unique_ptr<LoadedKernel> kernel;
  };
  std::mutex mutex;
  std::map<std::pair<std::string, int>, std::unique_ptr<Slot>> slots;
};

ModuleCache::ModuleCache(jit::KernelStore& store) : impl_(new Impl{store, {}, {}}) {}
ModuleCache::~ModuleCache() { delete impl_; }

const LoadedKernel& ModuleCache::load(const KernelEntry& entry, int device) {
  Impl::Slot* slot = nullptr;
  {
    const std::lock_guard lock(impl_->mutex);
    auto& s = impl_->slots[{entry.id, device}];
    if (!s) s = std::make_unique<Impl::Slot>();
    slot = s.get();
  }
  const std::lock_guard lock(slot->mutex);  // different kernels load side by side
  if (!slot->kernel) slot->kernel = load_kernel(impl_->store, entry, device);
  return *slot->kernel;
}

const LoadedKernel& load(const KernelEntry& entry, int device) {
  driver();  // the reason before any other: no GPU
  static ModuleCache* cache = new ModuleCache(jit::KernelStore::shared());
  return cache->load(entry, device);
}

void launch_raw(const LoadedKernel& kernel, const Launch& launch, const void* args, std::size_t args_bytes) {
  if (launch.grid.x == 0 || launch.grid.y == 0 || launch.grid.z == 0) return;
  if (kernel.args_bytes != 0 && kernel.args_bytes != args_bytes) [[unlikely]] {
    fail(ErrorCode::internal, "kernel {}: expected arguments of {} bytes, got {}", kernel.entry.id, kernel.args_bytes,
         args_bytes);
  }
  CuLaunchAttribute attributes[2] = {};
  unsigned count = 0;
  if (launch.cluster > 1) {
    attributes[count].id = kLaunchCluster;
    attributes[count].value.cluster = {launch.cluster, 1, 1};
    ++count;
  }
  if (launch.pdl && kernel.device->has_pdl()) {
    attributes[count].id = kLaunchProgrammaticStreamSerialization;
    attributes[count].value.programmatic_stream_serialization = 1;
    ++count;
  }
  const CuLaunchConfig config{
      .grid_x = launch.grid.x,
      .grid_y = launch.grid.y,
      .grid_z = launch.grid.z,
      .block_x = static_cast<unsigned>(launch.threads > 0 ? launch.threads : kernel.threads),
      .block_y = 1,
      .block_z = 1,
      .shared_bytes = static_cast<unsigned>(launch.shared_bytes >= 0 ? launch.shared_bytes : kernel.shared_bytes),
      .stream = static_cast<CuStream>(launch.stream),
      .attributes = count > 0 ? attributes : nullptr,
      .attribute_count = count,
  };
  void* parameters[] = {const_cast<void*>(args)};
  const CuResult rc = driver().cuLaunchKernelEx(&config, kernel.function, parameters, nullptr);
  if (rc != 0) [[unlikely]] {
    fail(rc == kCudaOutOfMemory ? ErrorCode::out_of_memory : ErrorCode::cuda,
         "{}:{}: cuLaunchKernelEx: kernel {}, grid {}x{}x{}, {} threads, {} bytes of shared memory, cluster {}: {}",
         "src/cuda/module.cpp", __LINE__, kernel.entry.id, config.grid_x, config.grid_y, config.grid_z, config.block_x,
         config.shared_bytes, launch.cluster, error_text(rc));
  }
}

}  // namespace octomoe::cuda
