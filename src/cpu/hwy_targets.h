// The Highway targets that row operations and float kernels are compiled for. SSE targets have no fused multiply-add
// and scalable vectors cannot be members of arrays: both take the baseline.
#pragma once

#include <hwy/detect_targets.h>
#undef HWY_DISABLED_TARGETS
#define HWY_DISABLED_TARGETS (HWY_SSSE3 | HWY_SSE4 | HWY_AVX3_DL | HWY_SVE | HWY_SVE2 | HWY_SVE_256 | HWY_SVE2_128)
