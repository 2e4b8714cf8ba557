// A libcuda.so.1 with one SM90 GPU of three multiprocessors, whose memory is the host's and whose kernels are the
// emulator's: a layer's launches run where there is no GPU. Each runs to its end before the next.
#pragma once

#include <cstddef>
#include <cstdint>

namespace octomoe::emulator {

// What the test program does for the driver. A module's image is its kernel's id.
struct DriverHooks {
  // 0, or a CUresult.
  int (*launch)(const char* id, int grid, int threads, int shared_bytes, int cluster, const void* args);
  void (*encode_tensor_map)(void* map, const void* base, const std::uint64_t* sizes, const std::uint64_t* strides,
                            const std::uint32_t* box);
};

}  // namespace octomoe::emulator

extern "C" void emulated_cuda_hooks(const octomoe::emulator::DriverHooks* hooks);
