// act(g, u) of docs/schemes.md section 6. The switch is uniform over the grid; call it outside element loops.
#pragma once

#include "core/gemm_config.h"
#include "core/numerics.cuh"

namespace octomoe::kernels {

template <class Fn>
__device__ __forceinline__ void with_activation(const GemmArgs& args, const Fn& fn) {
  const float alpha = args.alpha, limit = args.limit;
  switch (args.act) {
    case Act::swiglu:
      if (limit == num::from_bits(num::kInfBits)) {
        fn([](float g, float u) { return __fmul_rn(num::silu(g), u); });
      } else {
        fn([=](float g, float u) {
          return __fmul_rn(num::silu(num::min_nan(g, limit)), num::clamp(u, -limit, limit));
        });
      }
      break;
    case Act::swigluoai:
      fn([=](float g, float u) {
        g = num::min_nan(g, limit);
        u = __fadd_rn(num::clamp(u, -limit, limit), 1.0f);
        return __fmul_rn(__fmul_rn(g, num::sigmoid(__fmul_rn(alpha, g))), u);
      });
      break;
    case Act::geglu_tanh:
      fn([](float g, float u) { return __fmul_rn(num::gelu_tanh(g), u); });
      break;
    case Act::geglu_erf:
      fn([](float g, float u) { return __fmul_rn(num::gelu_erf(g), u); });
      break;
    case Act::silu:
      fn([](float g, float) { return num::silu(g); });
      break;
    case Act::gelu_tanh:
      fn([](float g, float) { return num::gelu_tanh(g); });
      break;
    case Act::gelu_erf:
      fn([](float g, float) { return num::gelu_erf(g); });
      break;
    case Act::relu:
      fn([](float g, float) { return num::relu(g); });
      break;
    case Act::relu2:
      fn([](float g, float) { return __fmul_rn(num::relu(g), num::relu(g)); });
      break;
    case Act::none:
      fn([](float g, float) { return g; });
      break;
  }
}

}  // namespace octomoe::kernels
