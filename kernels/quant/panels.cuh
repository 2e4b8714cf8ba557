// Weights [E, N, K] -> panels [E, K/128, N, 128], once, when a layer is made.
#pragma once

#include "core/args.h"

namespace octomoe::kernels {

inline constexpr int kPanelThreads = 256;

// A thread copies 16 bytes: eight neighbours a row of a panel.
__device__ __forceinline__ void make_panels(const PanelArgs& args) {
  constexpr int32_t kChunks = 8;
  const int32_t panels = args.k / 128;
  const int64_t step = static_cast<int64_t>(gridDim.x) * kPanelThreads;
  for (int64_t i = static_cast<int64_t>(blockIdx.x) * kPanelThreads + threadIdx.x; i < args.rows * panels * kChunks;
       i += step) {
    const int64_t place = i / kChunks, stack = place / args.n;  // rows of panels; panels of all experts
    const int64_t expert = stack / panels, row = expert * args.n + place % args.n;
    const int64_t column = stack % panels * 128 + i % kChunks * 16;
    *reinterpret_cast<uint4*>(args.to + i * 16) = *reinterpret_cast<const uint4*>(args.from + row * args.k + column);
  }
}

}  // namespace octomoe::kernels
