#include "cpu/kernel.h"

#include "cpu/target.h"

namespace octomoe::cpu {

Kernels kernels_for(Isa isa) {
  switch (isa) {
    case Isa::portable:
      return {int_kernel_portable, float_kernel_portable, RowFormat::int16, 6, 1};
    case Isa::avx2:
      return {int_kernel_avx2, float_kernel, RowFormat::int16, 6, 1};
    case Isa::vnni:
      return {int_kernel_vnni, float_kernel, RowFormat::int8, 8, 1};
    case Isa::amx:
      return {int_kernel_amx, float_kernel, RowFormat::int8, 32, 64};
  }
  return {};
}

FloatKernel amx_bf16_kernel(Isa isa, std::int64_t k) {
  constexpr std::int64_t kTileColumns =
      32;  // of bf16 in 64 bytes: a shorter tile would multiply foreign weights, maybe Inf, by 0
  return isa == Isa::amx && k % kTileColumns == 0 ? float_kernel_amx : nullptr;
}

}  // namespace octomoe::cpu
