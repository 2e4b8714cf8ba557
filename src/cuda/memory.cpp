#include "cuda/memory.h"

#include <algorithm>
#include <cstdint>
#include <functional>

#include "cuda/driver.h"
#include "cuda/stream.h"
#include "tensor/check.h"

namespace octomoe::cuda {
namespace {

CuDevicePtr address(const void* p) { return static_cast<CuDevicePtr>(reinterpret_cast<std::uintptr_t>(p)); }

void wait_for(Device device) {
  if (device.type != DeviceType::cuda) return;
  const ContextGuard context(device_info(device.index));
  OCTOMOE_CUDA(cuCtxSynchronize);
}

}  // namespace

std::shared_ptr<const void> allocate(int device, std::size_t bytes) {
  const DeviceInfo& info = device_info(device);
  const ContextGuard context(info);
  CuDevicePtr p = 0;
  const CuResult rc = driver().cuMemAlloc(&p, std::max<std::size_t>(bytes, 16));
  if (rc == kCudaOutOfMemory) return nullptr;
  check(rc, "cuMemAlloc");
  return std::shared_ptr<const void>(reinterpret_cast<const void*>(static_cast<std::uintptr_t>(p)),
                                     // At the end of the process the driver may be gone already: no check, no throw.
                                     [&info](const void* memory) {
                                       if (driver().cuCtxPushCurrent(info.primary) != 0) return;
                                       driver().cuMemFree(address(memory));
                                       CuContext popped = nullptr;
                                       driver().cuCtxPopCurrent(&popped);
                                     });
}

void fill_zero(void* data, std::size_t bytes, int device) {
  if (bytes == 0) return;
  const ContextGuard context(device_info(device));
  OCTOMOE_CUDA(cuMemsetD8, address(data), 0, bytes);
  OCTOMOE_CUDA(cuCtxSynchronize);
}

void copy(const TensorView& from, const TensorView& to) {
  if (from.elems() == 0) return;
  wait_for(from.device());
  wait_for(to.device());
  // Unified addresses: the driver sees where each side lies.
  const Device active = to.device().type == DeviceType::cuda ? to.device() : from.device();
  const ContextGuard context(device_info(active.index));
  const auto size = static_cast<std::int64_t>(size_bytes(from.dtype()));
  const auto move = [&](char* dst, const char* src, std::size_t bytes) {
    if (from.device().type == DeviceType::cpu) {
      OCTOMOE_CUDA(cuMemcpyHtoD, address(dst), src, bytes);
    } else if (to.device().type == DeviceType::cpu) {
      OCTOMOE_CUDA(cuMemcpyDtoH, dst, address(src), bytes);
    } else {
      OCTOMOE_CUDA(cuMemcpyDtoD, address(dst), address(src), bytes);
    }
  };
  if (from.is_contiguous() && to.is_contiguous()) {
    move(to.as<char>(), from.as<char>(), from.bytes());
  } else {
    const int last = from.rank() - 1;
    const std::function<void(int, std::int64_t, std::int64_t)> walk = [&](int d, std::int64_t src, std::int64_t dst) {
      if (d == last) {
        if (from.strides()[last] != 1 || to.strides()[last] != 1) {
          bad_argument("copy: expected rows of neighbouring elements, got strides {}", to_string(from.strides()));
        }
        move(to.as<char>() + dst * size, from.as<char>() + src * size, static_cast<std::size_t>(from.dim(last) * size));
        return;
      }
      for (std::int64_t i = 0; i < from.dim(d); ++i)
        walk(d + 1, src + i * from.strides()[d], dst + i * to.strides()[d]);
    };
    walk(0, 0, 0);
  }
  OCTOMOE_CUDA(cuCtxSynchronize);
}

}  // namespace octomoe::cuda
