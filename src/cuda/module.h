// Kernels on a device: load an entry once per device, then launch it.
#pragma once

#include <cstddef>
#include <cstdint>

#include "cuda/driver.h"
#include "jit/catalogue.h"
#include "jit/kernel_store.h"
#include "octomoe/layer.h"

namespace octomoe::cuda {

struct LoadedKernel {
  CuFunction function = nullptr;
  const DeviceInfo* device = nullptr;
  int threads = 0;       // the entry's
  int shared_bytes = 0;  // dynamic, the entry's: what the function may take at most
  int registers = 0;
  int local_bytes = 0;
  int blocks_per_multiprocessor = 0;  // at `threads` and `shared_bytes`
  std::size_t args_bytes = 0;         // 0: the driver does not tell (before CUDA 12.4)
  KernelEntry entry;
};

// Loads the kernel into the device's primary context, at the first call of this process for this entry's id and device;
// the reference stays valid. From any thread, with any or no current context, which is left as it was. Keep the
// reference: the look-up takes a lock. Error(unsupported) if no image can be had or the device has too little shared
// memory; Error(cuda).
const LoadedKernel& load(const KernelEntry& entry, int device);

// The same with another store and bookkeeping, for tests.
class ModuleCache {
 public:
  explicit ModuleCache(jit::KernelStore& store);
  ~ModuleCache();  // unloads nothing: modules live as long as their context
  ModuleCache(const ModuleCache&) = delete;
  ModuleCache& operator=(const ModuleCache&) = delete;
  const LoadedKernel& load(const KernelEntry& entry, int device);

 private:
  struct Impl;
  Impl* impl_;
};

struct Dim3 {
  unsigned x = 1, y = 1, z = 1;
};

struct Launch {
  Dim3 grid;
  int threads = 0;        // of a block; 0: the entry's
  int shared_bytes = -1;  // dynamic; -1: the entry's
  Stream stream = nullptr;
  bool pdl = false;      // may start before its predecessor has ended (it must wait itself); ignored below SM90
  unsigned cluster = 1;  // blocks of a cluster, along x
};

void launch_raw(const LoadedKernel& kernel, const Launch& launch, const void* args, std::size_t args_bytes);

// Starts the kernel. No allocation, synchronisation or environment read. A kernel's primary context should be current
// (ContextGuard): with no stream given, the driver takes the current context's. An empty grid starts nothing.
// Error(cuda); Error(internal) if Args is not the kernel's argument struct.
template <class Args>
void launch(const LoadedKernel& kernel, const Launch& launch, const Args& args) {
  launch_raw(kernel, launch, &args, sizeof(Args));
}

}  // namespace octomoe::cuda
