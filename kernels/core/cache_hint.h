// What L2 shall do with a line that SM90's copies and stores bring there, as the hardware takes it: what
// createpolicy.fractional returns for a fraction of 1. Shared by host and device.
#pragma once

#include "core/types.h"

namespace octomoe::kernels {

inline constexpr uint64_t kEvictNormal = 0x1000000000000000, kEvictFirst = 0x12f0000000000000,
                          kEvictLast = 0x14f0000000000000;

}  // namespace octomoe::kernels
