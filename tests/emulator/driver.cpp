#include "emulator/driver.h"

#include <cstdlib>
#include <cstring>
#include <deque>
#include <string>

#include "cuda/driver.h"

namespace {

using namespace octomoe::cuda;  // NOLINT: its types

const octomoe::emulator::DriverHooks* hooks = nullptr;
char context;
std::deque<std::string> modules;
thread_local int pushed = 0;

constexpr CuResult kNotSupported = 801;

}  // namespace

#define CUDA extern "C" __attribute__((visibility("default")))

CUDA void emulated_cuda_hooks(const octomoe::emulator::DriverHooks* with) { hooks = with; }

CUDA CuResult cuInit(unsigned) { return 0; }
CUDA CuResult cuDriverGetVersion(int* v) { return *v = 12080, 0; }
CUDA CuResult cuGetErrorName(CuResult, const char** out) { return *out = "CUDA_ERROR", 0; }
CUDA CuResult cuGetErrorString(CuResult, const char** out) { return *out = "of the emulated driver", 0; }
CUDA CuResult cuDeviceGetCount(int* n) { return *n = 1, 0; }
CUDA CuResult cuDeviceGet(CuDevice* d, int i) { return *d = i, 0; }
CUDA CuResult cuDeviceGetName(char* out, int bytes, CuDevice) {
  return std::strncpy(out, "emulator", static_cast<std::size_t>(bytes)), 0;
}
CUDA CuResult cuDeviceGetAttribute(int* out, int which, CuDevice) {
  *out = which == kComputeCapabilityMajor       ? 9
         : which == kComputeCapabilityMinor     ? 0
         : which == kMultiprocessorCount        ? 3
         : which == kMaxSharedPerBlockOptin     ? 227 * 1024
         : which == kMaxSharedPerMultiprocessor ? 228 * 1024
         : which == kL2CacheBytes               ? 50 << 20
                                                : 1;
  return 0;
}
CUDA CuResult cuDeviceTotalMem_v2(std::size_t* n, CuDevice) { return *n = std::size_t{80} << 30, 0; }
CUDA CuResult cuDevicePrimaryCtxRetain(CuContext* c, CuDevice) { return *c = reinterpret_cast<CuContext>(&context), 0; }
CUDA CuResult cuCtxGetCurrent(CuContext* c) {
  return *c = pushed > 0 ? reinterpret_cast<CuContext>(&context) : nullptr, 0;
}
CUDA CuResult cuCtxPushCurrent_v2(CuContext) { return ++pushed, 0; }
CUDA CuResult cuCtxPopCurrent_v2(CuContext* c) {
  *c = reinterpret_cast<CuContext>(&context);
  return --pushed, 0;
}
CUDA CuResult cuCtxSynchronize() { return 0; }

CUDA CuResult cuModuleLoadData(CuModule* m, const void* image) {
  *m = reinterpret_cast<CuModule>(&modules.emplace_back(static_cast<const char*>(image)));
  return 0;
}
CUDA CuResult cuModuleGetFunction(CuFunction* f, CuModule m, const char*) {
  return *f = reinterpret_cast<CuFunction>(m), 0;
}
CUDA CuResult cuFuncGetAttribute(int* out, int, CuFunction) { return *out = 0, 0; }
CUDA CuResult cuFuncSetAttribute(CuFunction, int, int) { return 0; }
CUDA CuResult cuOccupancyMaxActiveBlocksPerMultiprocessor(int* n, CuFunction, int, std::size_t) { return *n = 1, 0; }
CUDA CuResult cuLaunchKernelEx(const CuLaunchConfig* c, CuFunction f, void** parameters, void**) {
  int cluster = 1;
  for (unsigned i = 0; i < c->attribute_count; ++i) {
    if (c->attributes[i].id == kLaunchCluster) cluster = static_cast<int>(c->attributes[i].value.cluster.x);
  }
  return hooks->launch(reinterpret_cast<const std::string*>(f)->c_str(), static_cast<int>(c->grid_x),
                       static_cast<int>(c->block_x), static_cast<int>(c->shared_bytes), cluster, parameters[0]);
}
CUDA CuResult cuTensorMapEncodeTiled(CuTensorMap* map, int, unsigned, void* base, const std::uint64_t* sizes,
                                     const std::uint64_t* strides, const std::uint32_t* box, const std::uint32_t*, int,
                                     int, int, int) {
  return hooks->encode_tensor_map(map, base, sizes, strides, box), 0;
}

// Memory is not aligned to more than CUDA's is, and begins as garbage.
CUDA CuResult cuMemAlloc_v2(CuDevicePtr* p, std::size_t bytes) {
  void* memory = std::aligned_alloc(256, (bytes + 255) / 256 * 256);
  if (memory == nullptr) return kCudaOutOfMemory;
  std::memset(memory, 0xcd, bytes);
  *p = reinterpret_cast<std::uintptr_t>(memory);
  return 0;
}
CUDA CuResult cuMemFree_v2(CuDevicePtr p) { return std::free(reinterpret_cast<void*>(p)), 0; }
CUDA CuResult cuMemcpyHtoD_v2(CuDevicePtr to, const void* from, std::size_t bytes) {
  return std::memcpy(reinterpret_cast<void*>(to), from, bytes), 0;
}
CUDA CuResult cuMemcpyDtoH_v2(void* to, CuDevicePtr from, std::size_t bytes) {
  return std::memcpy(to, reinterpret_cast<const void*>(from), bytes), 0;
}
CUDA CuResult cuMemcpyDtoD_v2(CuDevicePtr to, CuDevicePtr from, std::size_t bytes) {
  return std::memcpy(reinterpret_cast<void*>(to), reinterpret_cast<const void*>(from), bytes), 0;
}
CUDA CuResult cuMemsetD8_v2(CuDevicePtr to, unsigned char value, std::size_t bytes) {
  return std::memset(reinterpret_cast<void*>(to), value, bytes), 0;
}
CUDA CuResult cuStreamCreate(CuStream* s, unsigned) { return *s = reinterpret_cast<CuStream>(&context), 0; }
CUDA CuResult cuStreamDestroy_v2(CuStream) { return 0; }
CUDA CuResult cuStreamSynchronize(CuStream) { return 0; }
CUDA CuResult cuStreamIsCapturing(CuStream, int* out) { return *out = 0, 0; }

// NVRTC looks for a driver too and asks it this without a check for null.
CUDA CuResult cuGetExportTable(const void** table, const void*) { return *table = nullptr, kNotSupported; }

// The rest is there so that the table is complete.
#define STUB(name) \
  CUDA CuResult name() { return kNotSupported; }
STUB(cuCtxSetCurrent)
STUB(cuModuleUnload)
STUB(cuOccupancyMaxActiveClusters)
STUB(cuMemGetInfo_v2)
STUB(cuMemHostAlloc)
STUB(cuMemFreeHost)
STUB(cuMemcpyAsync)
STUB(cuMemcpyHtoDAsync_v2)
STUB(cuMemcpyDtoHAsync_v2)
STUB(cuMemcpyDtoDAsync_v2)
STUB(cuMemsetD8Async)
STUB(cuMemsetD32Async)
STUB(cuPointerGetAttribute)
STUB(cuStreamQuery)
STUB(cuStreamGetCtx)
STUB(cuStreamWaitEvent)
STUB(cuStreamBeginCapture_v2)
STUB(cuStreamEndCapture)
STUB(cuThreadExchangeStreamCaptureMode)
STUB(cuGraphInstantiateWithFlags)
STUB(cuGraphGetNodes)
STUB(cuGraphKernelNodeGetParams_v2)
STUB(cuGraphExecKernelNodeSetParams_v2)
STUB(cuGraphLaunch)
STUB(cuGraphDestroy)
STUB(cuGraphExecDestroy)
STUB(cuEventCreate)
STUB(cuEventDestroy_v2)
STUB(cuEventRecord)
STUB(cuEventSynchronize)
STUB(cuEventElapsedTime)
