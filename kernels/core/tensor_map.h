// A tensor map as the driver encodes it (cuTensorMapEncodeTiled): kernels take it inside their argument struct.
#pragma once

#include "core/types.h"

namespace octomoe::kernels {

struct alignas(64) TensorMap {
  uint64_t words[16];
};

}  // namespace octomoe::kernels
