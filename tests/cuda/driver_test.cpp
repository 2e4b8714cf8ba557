// Our declarations of the driver API against CUDA's own, where a cuda.h is installed; and what a machine without a
// driver is told.
#include "cuda/driver.h"

#include <gmock/gmock.h>

#include <cstddef>

#include "cuda/library_search.h"
#include "jit/catalogue.h"
#include "support/errors.h"

#if __has_include(<cuda.h>)
#include <cuda.h>

#include <type_traits>

namespace octomoe::cuda {

static_assert(sizeof(CuDevicePtr) == sizeof(CUdeviceptr) && sizeof(CuDevice) == sizeof(CUdevice));
static_assert(sizeof(CuTensorMap) == sizeof(CUtensorMap) && alignof(CuTensorMap) >= alignof(CUtensorMap));
static_assert(sizeof(CuLaunchAttribute) == sizeof(CUlaunchAttribute));
static_assert(offsetof(CuLaunchAttribute, value) == offsetof(CUlaunchAttribute, value));
static_assert(sizeof(CuLaunchAttributeValue) == sizeof(CUlaunchAttributeValue));
static_assert(sizeof(CuLaunchConfig) == sizeof(CUlaunchConfig));
static_assert(offsetof(CuLaunchConfig, shared_bytes) == offsetof(CUlaunchConfig, sharedMemBytes));
static_assert(offsetof(CuLaunchConfig, stream) == offsetof(CUlaunchConfig, hStream));
static_assert(offsetof(CuLaunchConfig, attributes) == offsetof(CUlaunchConfig, attrs));
static_assert(offsetof(CuLaunchConfig, attribute_count) == offsetof(CUlaunchConfig, numAttrs));
static_assert(sizeof(CuKernelNodeParams) == sizeof(CUDA_KERNEL_NODE_PARAMS_v2));
static_assert(offsetof(CuKernelNodeParams, grid_x) == offsetof(CUDA_KERNEL_NODE_PARAMS_v2, gridDimX));
static_assert(offsetof(CuKernelNodeParams, shared_bytes) == offsetof(CUDA_KERNEL_NODE_PARAMS_v2, sharedMemBytes));
static_assert(offsetof(CuKernelNodeParams, parameters) == offsetof(CUDA_KERNEL_NODE_PARAMS_v2, kernelParams));
static_assert(offsetof(CuKernelNodeParams, kernel) == offsetof(CUDA_KERNEL_NODE_PARAMS_v2, kern));
static_assert(offsetof(CuKernelNodeParams, context) == offsetof(CUDA_KERNEL_NODE_PARAMS_v2, ctx));

#define OCTOMOE_SAME(ours, theirs) static_assert(static_cast<int>(ours) == static_cast<int>(theirs))
OCTOMOE_SAME(kLaunchCooperative, CU_LAUNCH_ATTRIBUTE_COOPERATIVE);
OCTOMOE_SAME(kLaunchCluster, CU_LAUNCH_ATTRIBUTE_CLUSTER_DIMENSION);
OCTOMOE_SAME(kLaunchProgrammaticStreamSerialization, CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION);
OCTOMOE_SAME(kWarpSize, CU_DEVICE_ATTRIBUTE_WARP_SIZE);
OCTOMOE_SAME(kMaxThreadsPerBlock, CU_DEVICE_ATTRIBUTE_MAX_THREADS_PER_BLOCK);
OCTOMOE_SAME(kClockRateKhz, CU_DEVICE_ATTRIBUTE_CLOCK_RATE);
OCTOMOE_SAME(kMultiprocessorCount, CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT);
OCTOMOE_SAME(kMemoryClockRateKhz, CU_DEVICE_ATTRIBUTE_MEMORY_CLOCK_RATE);
OCTOMOE_SAME(kMemoryBusWidthBits, CU_DEVICE_ATTRIBUTE_GLOBAL_MEMORY_BUS_WIDTH);
OCTOMOE_SAME(kL2CacheBytes, CU_DEVICE_ATTRIBUTE_L2_CACHE_SIZE);
OCTOMOE_SAME(kMaxThreadsPerMultiprocessor, CU_DEVICE_ATTRIBUTE_MAX_THREADS_PER_MULTIPROCESSOR);
OCTOMOE_SAME(kComputeCapabilityMajor, CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR);
OCTOMOE_SAME(kComputeCapabilityMinor, CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR);
OCTOMOE_SAME(kMaxSharedPerMultiprocessor, CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_MULTIPROCESSOR);
OCTOMOE_SAME(kMaxRegistersPerMultiprocessor, CU_DEVICE_ATTRIBUTE_MAX_REGISTERS_PER_MULTIPROCESSOR);
OCTOMOE_SAME(kMaxSharedPerBlockOptin, CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN);
OCTOMOE_SAME(kCooperativeLaunch, CU_DEVICE_ATTRIBUTE_COOPERATIVE_LAUNCH);
OCTOMOE_SAME(kMaxPersistingL2Bytes, CU_DEVICE_ATTRIBUTE_MAX_PERSISTING_L2_CACHE_SIZE);
OCTOMOE_SAME(kClusterLaunch, CU_DEVICE_ATTRIBUTE_CLUSTER_LAUNCH);
OCTOMOE_SAME(kFunctionSharedBytes, CU_FUNC_ATTRIBUTE_SHARED_SIZE_BYTES);
OCTOMOE_SAME(kFunctionLocalBytes, CU_FUNC_ATTRIBUTE_LOCAL_SIZE_BYTES);
OCTOMOE_SAME(kFunctionRegisters, CU_FUNC_ATTRIBUTE_NUM_REGS);
OCTOMOE_SAME(kFunctionMaxDynamicShared, CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES);
OCTOMOE_SAME(kFunctionNonPortableCluster, CU_FUNC_ATTRIBUTE_NON_PORTABLE_CLUSTER_SIZE_ALLOWED);
OCTOMOE_SAME(kCudaInvalidValue, CUDA_ERROR_INVALID_VALUE);
OCTOMOE_SAME(kCudaOutOfMemory, CUDA_ERROR_OUT_OF_MEMORY);
OCTOMOE_SAME(kCudaNotReady, CUDA_ERROR_NOT_READY);
OCTOMOE_SAME(kCudaInvalidImage, CUDA_ERROR_INVALID_IMAGE);
OCTOMOE_SAME(kCudaNoBinaryForGpu, CUDA_ERROR_NO_BINARY_FOR_GPU);
OCTOMOE_SAME(kCudaInvalidPtx, CUDA_ERROR_INVALID_PTX);
OCTOMOE_SAME(kCudaUnsupportedPtxVersion, CUDA_ERROR_UNSUPPORTED_PTX_VERSION);
OCTOMOE_SAME(kCudaJitCompilerNotFound, CUDA_ERROR_JIT_COMPILER_NOT_FOUND);
OCTOMOE_SAME(kEventNoTiming, CU_EVENT_DISABLE_TIMING);
OCTOMOE_SAME(kStreamNonBlocking, CU_STREAM_NON_BLOCKING);
OCTOMOE_SAME(kCaptureThreadLocal, CU_STREAM_CAPTURE_MODE_THREAD_LOCAL);
OCTOMOE_SAME(kCaptureRelaxed, CU_STREAM_CAPTURE_MODE_RELAXED);
OCTOMOE_SAME(kCaptureActive, CU_STREAM_CAPTURE_STATUS_ACTIVE);
OCTOMOE_SAME(kPointerContext, CU_POINTER_ATTRIBUTE_CONTEXT);
OCTOMOE_SAME(kPointerMemoryType, CU_POINTER_ATTRIBUTE_MEMORY_TYPE);
OCTOMOE_SAME(kPointerDeviceOrdinal, CU_POINTER_ATTRIBUTE_DEVICE_ORDINAL);
OCTOMOE_SAME(kMemoryHost, CU_MEMORYTYPE_HOST);
OCTOMOE_SAME(kMemoryDevice, CU_MEMORYTYPE_DEVICE);

// As many parameters of the same sizes as in cuda.h, function by function: what the calling convention sees.
template <class A, class B>
constexpr bool kSameParameter = sizeof(A) == sizeof(B) && std::is_pointer_v<A> == std::is_pointer_v<B>;
template <class Ours, class Theirs>
struct SameCall : std::false_type {};
template <class... A, class... B>
requires(sizeof...(A) == sizeof...(B)) struct SameCall<CuResult (*)(A...), CUresult (*)(B...)>
    : std::bool_constant<(kSameParameter<A, B> && ...)> {
};

#define OCTOMOE_SAME_CALL(name, symbol, parameters) \
  static_assert(SameCall<CuResult(*) parameters, decltype(&::symbol)>::value, #symbol);
// cuda.h renames some functions by macros: only the exported names count here.
#undef cuGraphInstantiate
#define OCTOMOE_DRIVER_SKIP(name, symbol, parameters)
#if CUDA_VERSION >= 12040
OCTOMOE_CUDA_DRIVER_FUNCTIONS(OCTOMOE_SAME_CALL, OCTOMOE_DRIVER_SKIP)
#endif

}  // namespace octomoe::cuda
#endif

namespace octomoe::cuda {
namespace {

using octomoe::testing::expect_error;
using ::testing::HasSubstr;

TEST(Driver, MissingIsAnErrorWithTheFix) {
  if (driver_available()) GTEST_SKIP() << "there is a driver";
  expect_error(ErrorCode::unsupported, "no usable GPU: CUDA driver", [] { driver(); });
  EXPECT_THAT(find_library(Library::driver).describe(),
              ::testing::AnyOf(HasSubstr("fix: "), HasSubstr("cannot be used")));
}

TEST(Driver, DevicesDescribeThemselves) {
  if (!driver_available()) GTEST_SKIP() << "no driver here";
  for (int i = 0; i < driver().device_count; ++i) {
    const DeviceInfo& d = device_info(i);
    EXPECT_GE(d.compute_capability, 80);
    EXPECT_GT(d.multiprocessors, 0);
    EXPECT_GT(d.max_shared_bytes, 48 * 1024);
    EXPECT_NE(d.primary, nullptr);
    EXPECT_EQ(&device_info(i), &d);
  }
  expect_error("device: expected cuda:0 to", [] { device_info(driver().device_count); });
}

TEST(Driver, ErrorsNameCallAndPlace) {
  if (!driver_available()) GTEST_SKIP() << "no driver here";
  expect_error(ErrorCode::cuda, "tests/cuda/driver_test.cpp:", [] { check(kCudaInvalidValue, "cuNothing"); });
  expect_error(ErrorCode::cuda, "cuNothing: CUDA_ERROR_INVALID_VALUE (1)",
               [] { check(kCudaInvalidValue, "cuNothing"); });
}

}  // namespace
}  // namespace octomoe::cuda
