// Stands for kernels/ptx/wgmma.cuh. The descriptor is as there; the emulator takes it apart.
#pragma once

#include "core/types.h"
#include "emulator/machine.h"

namespace octomoe::ptx {

inline void wgmma_fence() { emulator::exchange("wgmma.fence", ~0u, {}); }
inline void wgmma_commit() { emulator::wgmma_commit(); }
template <int kPending>
inline void wgmma_wait() {
  emulator::wgmma_wait(kPending);
}
template <int kN>
inline void wgmma_results(int32_t (&)[kN]) {}

inline uint64_t matrix_descriptor(uint32_t shared) {
  return (uint64_t{1} << 62) | (uint64_t{1024 / 16} << 32) | (uint64_t{1} << 16) | ((shared & 0x3ffffu) >> 4);
}

template <int kTokens>
struct Wgmma {
  template <int kSize>
  static void mma(int32_t (&d)[kSize], uint64_t a, uint64_t b, int accumulate) {
    static_assert(kSize >= kTokens / 2);
    for (int step = 0; step < 4; ++step) {
      emulator::wgmma(d, kTokens, a + 2 * step, b + 2 * step, accumulate != 0 || step > 0);
    }
  }
};

}  // namespace octomoe::ptx
