// The CUDA driver API, opened at run time. The declarations below are the part of cuda.h that we use, so the tree
// builds without CUDA's headers; tests/cuda/driver_test.cpp compares them with cuda.h where there is one.
#pragma once

#include <cstddef>
#include <cstdint>
#include <source_location>
#include <string>

namespace octomoe::cuda {

using CuResult = int;  // 0 is success
using CuDevice = int;
using CuDevicePtr = std::uint64_t;
using CuContext = struct CuContextOpaque*;
using CuModule = struct CuModuleOpaque*;
using CuFunction = struct CuFunctionOpaque*;
using CuStream = struct CuStreamOpaque*;
using CuEvent = struct CuEventOpaque*;
using CuGraph = struct CuGraphOpaque*;
using CuGraphExec = struct CuGraphExecOpaque*;
using CuGraphNode = struct CuGraphNodeOpaque*;

// Result codes that we tell apart.
inline constexpr CuResult kCudaInvalidValue = 1, kCudaOutOfMemory = 2, kCudaNotReady = 600;
// Why a cubin or PTX does not suit this driver and device: another source may.
inline constexpr CuResult kCudaInvalidImage = 200, kCudaNoBinaryForGpu = 209, kCudaInvalidPtx = 218,
                          kCudaUnsupportedPtxVersion = 222, kCudaJitCompilerNotFound = 221;

struct alignas(128) CuTensorMap {  // 64 before CUDA 13
  std::uint64_t opaque[16];
};

enum CuDeviceAttribute : int {
  kWarpSize = 10,
  kMaxThreadsPerBlock = 1,
  kClockRateKhz = 13,
  kMultiprocessorCount = 16,
  kMemoryClockRateKhz = 36,
  kMemoryBusWidthBits = 37,
  kL2CacheBytes = 38,
  kMaxThreadsPerMultiprocessor = 39,
  kComputeCapabilityMajor = 75,
  kComputeCapabilityMinor = 76,
  kMaxSharedPerMultiprocessor = 81,
  kMaxRegistersPerMultiprocessor = 82,
  kMaxSharedPerBlockOptin = 97,
  kCooperativeLaunch = 95,
  kMaxPersistingL2Bytes = 108,
  kClusterLaunch = 120,
};

enum CuFunctionAttribute : int {
  kFunctionSharedBytes = 1,
  kFunctionLocalBytes = 3,
  kFunctionRegisters = 4,
  kFunctionMaxDynamicShared = 8,
  kFunctionSharedCarveout = 9,  // percent of L1
  kFunctionNonPortableCluster = 14,
};

enum CuLaunchAttributeId : int {
  kLaunchCooperative = 2,
  kLaunchCluster = 4,
  kLaunchProgrammaticStreamSerialization = 6,
};
union CuLaunchAttributeValue {
  char pad[64];
  int cooperative;
  struct {
    unsigned x, y, z;
  } cluster;
  int programmatic_stream_serialization;
};
struct CuLaunchAttribute {
  CuLaunchAttributeId id;
  char pad[4];
  CuLaunchAttributeValue value;
};
struct CuLaunchConfig {
  unsigned grid_x, grid_y, grid_z;
  unsigned block_x, block_y, block_z;
  unsigned shared_bytes;
  CuStream stream;
  CuLaunchAttribute* attributes;
  unsigned attribute_count;
};

enum CuEventFlags : unsigned { kEventDefault = 0, kEventNoTiming = 2 };
enum CuStreamFlags : unsigned { kStreamDefault = 0, kStreamNonBlocking = 1 };
enum CuCaptureMode : int { kCaptureGlobal = 0, kCaptureThreadLocal = 1, kCaptureRelaxed = 2 };
enum CuCaptureStatus : int { kCaptureNone = 0, kCaptureActive = 1, kCaptureInvalidated = 2 };
enum CuPointerAttribute : int { kPointerContext = 1, kPointerMemoryType = 2, kPointerDeviceOrdinal = 9 };
enum CuMemoryType : int { kMemoryHost = 1, kMemoryDevice = 2 };

// name, exported symbol, parameters. Required ones are in every driver of CUDA 12.0 and later.
#define OCTOMOE_CUDA_DRIVER_FUNCTIONS(REQUIRED, OPTIONAL)                                                         \
  REQUIRED(cuInit, cuInit, (unsigned))                                                                            \
  REQUIRED(cuDriverGetVersion, cuDriverGetVersion, (int*))                                                        \
  REQUIRED(cuGetErrorName, cuGetErrorName, (CuResult, const char**))                                              \
  REQUIRED(cuGetErrorString, cuGetErrorString, (CuResult, const char**))                                          \
  REQUIRED(cuDeviceGetCount, cuDeviceGetCount, (int*))                                                            \
  REQUIRED(cuDeviceGet, cuDeviceGet, (CuDevice*, int))                                                            \
  REQUIRED(cuDeviceGetName, cuDeviceGetName, (char*, int, CuDevice))                                              \
  REQUIRED(cuDeviceGetAttribute, cuDeviceGetAttribute, (int*, int, CuDevice))                                     \
  REQUIRED(cuDeviceTotalMem, cuDeviceTotalMem_v2, (std::size_t*, CuDevice))                                       \
  REQUIRED(cuDevicePrimaryCtxRetain, cuDevicePrimaryCtxRetain, (CuContext*, CuDevice))                            \
  REQUIRED(cuCtxGetCurrent, cuCtxGetCurrent, (CuContext*))                                                        \
  REQUIRED(cuCtxSetCurrent, cuCtxSetCurrent, (CuContext))                                                         \
  REQUIRED(cuCtxPushCurrent, cuCtxPushCurrent_v2, (CuContext))                                                    \
  REQUIRED(cuCtxPopCurrent, cuCtxPopCurrent_v2, (CuContext*))                                                     \
  REQUIRED(cuCtxSynchronize, cuCtxSynchronize, ())                                                                \
  REQUIRED(cuModuleLoadData, cuModuleLoadData, (CuModule*, const void*))                                          \
  REQUIRED(cuModuleUnload, cuModuleUnload, (CuModule))                                                            \
  REQUIRED(cuModuleGetFunction, cuModuleGetFunction, (CuFunction*, CuModule, const char*))                        \
  REQUIRED(cuFuncGetAttribute, cuFuncGetAttribute, (int*, int, CuFunction))                                       \
  REQUIRED(cuFuncSetAttribute, cuFuncSetAttribute, (CuFunction, int, int))                                        \
  REQUIRED(cuLaunchKernelEx, cuLaunchKernelEx, (const CuLaunchConfig*, CuFunction, void**, void**))               \
  REQUIRED(cuOccupancyMaxActiveBlocksPerMultiprocessor, cuOccupancyMaxActiveBlocksPerMultiprocessor,              \
           (int*, CuFunction, int, std::size_t))                                                                  \
  REQUIRED(cuOccupancyMaxActiveClusters, cuOccupancyMaxActiveClusters, (int*, CuFunction, const CuLaunchConfig*)) \
  REQUIRED(cuMemAlloc, cuMemAlloc_v2, (CuDevicePtr*, std::size_t))                                                \
  REQUIRED(cuMemFree, cuMemFree_v2, (CuDevicePtr))                                                                \
  REQUIRED(cuMemGetInfo, cuMemGetInfo_v2, (std::size_t*, std::size_t*))                                           \
  REQUIRED(cuMemHostAlloc, cuMemHostAlloc, (void**, std::size_t, unsigned))                                       \
  REQUIRED(cuMemFreeHost, cuMemFreeHost, (void*))                                                                 \
  REQUIRED(cuMemcpyHtoD, cuMemcpyHtoD_v2, (CuDevicePtr, const void*, std::size_t))                                \
  REQUIRED(cuMemcpyDtoH, cuMemcpyDtoH_v2, (void*, CuDevicePtr, std::size_t))                                      \
  REQUIRED(cuMemcpyDtoD, cuMemcpyDtoD_v2, (CuDevicePtr, CuDevicePtr, std::size_t))                                \
  REQUIRED(cuMemcpyAsync, cuMemcpyAsync, (CuDevicePtr, CuDevicePtr, std::size_t, CuStream))                       \
  REQUIRED(cuMemcpyHtoDAsync, cuMemcpyHtoDAsync_v2, (CuDevicePtr, const void*, std::size_t, CuStream))            \
  REQUIRED(cuMemcpyDtoHAsync, cuMemcpyDtoHAsync_v2, (void*, CuDevicePtr, std::size_t, CuStream))                  \
  REQUIRED(cuMemcpyDtoDAsync, cuMemcpyDtoDAsync_v2, (CuDevicePtr, CuDevicePtr, std::size_t, CuStream))            \
  REQUIRED(cuMemsetD8, cuMemsetD8_v2, (CuDevicePtr, unsigned char, std::size_t))                                  \
  REQUIRED(cuMemsetD8Async, cuMemsetD8Async, (CuDevicePtr, unsigned char, std::size_t, CuStream))                 \
  REQUIRED(cuMemsetD32Async, cuMemsetD32Async, (CuDevicePtr, unsigned, std::size_t, CuStream))                    \
  REQUIRED(cuPointerGetAttribute, cuPointerGetAttribute, (void*, int, CuDevicePtr))                               \
  REQUIRED(cuStreamCreate, cuStreamCreate, (CuStream*, unsigned))                                                 \
  REQUIRED(cuStreamDestroy, cuStreamDestroy_v2, (CuStream))                                                       \
  REQUIRED(cuStreamSynchronize, cuStreamSynchronize, (CuStream))                                                  \
  REQUIRED(cuStreamQuery, cuStreamQuery, (CuStream))                                                              \
  REQUIRED(cuStreamGetCtx, cuStreamGetCtx, (CuStream, CuContext*))                                                \
  REQUIRED(cuStreamWaitEvent, cuStreamWaitEvent, (CuStream, CuEvent, unsigned))                                   \
  REQUIRED(cuStreamBeginCapture, cuStreamBeginCapture_v2, (CuStream, int))                                        \
  REQUIRED(cuStreamEndCapture, cuStreamEndCapture, (CuStream, CuGraph*))                                          \
  REQUIRED(cuStreamIsCapturing, cuStreamIsCapturing, (CuStream, int*))                                            \
  REQUIRED(cuThreadExchangeStreamCaptureMode, cuThreadExchangeStreamCaptureMode, (int*))                          \
  REQUIRED(cuGraphInstantiate, cuGraphInstantiateWithFlags, (CuGraphExec*, CuGraph, unsigned long long))          \
  REQUIRED(cuGraphGetNodes, cuGraphGetNodes, (CuGraph, CuGraphNode*, std::size_t*))                               \
  REQUIRED(cuGraphLaunch, cuGraphLaunch, (CuGraphExec, CuStream))                                                 \
  REQUIRED(cuGraphDestroy, cuGraphDestroy, (CuGraph))                                                             \
  REQUIRED(cuGraphExecDestroy, cuGraphExecDestroy, (CuGraphExec))                                                 \
  REQUIRED(cuEventCreate, cuEventCreate, (CuEvent*, unsigned))                                                    \
  REQUIRED(cuEventDestroy, cuEventDestroy_v2, (CuEvent))                                                          \
  REQUIRED(cuEventRecord, cuEventRecord, (CuEvent, CuStream))                                                     \
  REQUIRED(cuEventSynchronize, cuEventSynchronize, (CuEvent))                                                     \
  REQUIRED(cuEventElapsedTime, cuEventElapsedTime, (float*, CuEvent, CuEvent))                                    \
  OPTIONAL(cuFuncGetParamInfo, cuFuncGetParamInfo, (CuFunction, std::size_t, std::size_t*, std::size_t*))         \
  OPTIONAL(cuProfilerStart, cuProfilerStart, ())                                                                  \
  OPTIONAL(cuProfilerStop, cuProfilerStop, ())                                                                    \
  OPTIONAL(cuTensorMapEncodeTiled, cuTensorMapEncodeTiled,                                                        \
           (CuTensorMap*, int, unsigned, void*, const std::uint64_t*, const std::uint64_t*, const std::uint32_t*, \
            const std::uint32_t*, int, int, int, int))

struct Driver {
#define OCTOMOE_CUDA_MEMBER(name, symbol, parameters) CuResult(*name) parameters = nullptr;
  OCTOMOE_CUDA_DRIVER_FUNCTIONS(OCTOMOE_CUDA_MEMBER, OCTOMOE_CUDA_MEMBER)
#undef OCTOMOE_CUDA_MEMBER
  int version = 0;  // 13000 is CUDA 13.0
  int device_count = 0;
};

// The driver, initialised. Error(unsupported) saying what was tried and how to fix it. Cheap after the first call.
const Driver& driver();
bool driver_available();  // false: driver() would throw

// Throws Error(cuda) (Error(out_of_memory) where the driver says so):
// "src/cuda/module.cpp:70: cuModuleLoadData: CUDA_ERROR_INVALID_IMAGE (200): device kernel image is invalid".
[[noreturn]] void throw_cuda_error(CuResult result, const char* call, const std::source_location& where);
inline void check(CuResult result, const char* call,
                  const std::source_location& where = std::source_location::current()) {
  if (result != 0) [[unlikely]]
    throw_cuda_error(result, call, where);
}
std::string error_text(CuResult result);  // "CUDA_ERROR_INVALID_IMAGE (200): device kernel image is invalid"

// OCTOMOE_CUDA(cuMemFree, p) calls driver().cuMemFree(p) and checks it.
#define OCTOMOE_CUDA(name, ...) ::octomoe::cuda::check(::octomoe::cuda::driver().name(__VA_ARGS__), #name)

struct DeviceInfo {
  int index = 0;
  CuDevice device = 0;
  CuContext primary = nullptr;  // retained for the life of the process
  std::string name;
  int compute_capability = 0;  // 80, 86, 89, 90, 100, ...
  int multiprocessors = 0;
  int max_shared_bytes = 0;  // a block's limit with opt-in
  int shared_per_multiprocessor = 0;
  int l2_bytes = 0;
  std::size_t memory_bytes = 0;
  bool has_pdl() const { return compute_capability >= 90; }  // programmatic dependent launch
};
// Error(invalid_argument) for an index that is not there, Error(unsupported) without a driver or below SM80.
const DeviceInfo& device_info(int index);

// "sm_75" is too old for us: every kernel needs SM80's asynchronous copies.
inline constexpr int kOldestComputeCapability = 80;
void check_compute_capability(int compute_capability, const std::string& device_name);

}  // namespace octomoe::cuda
