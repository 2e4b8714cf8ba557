// What happens to a unit's sums before they leave the first-level cache: scales, bias, activation, rounding.
#pragma once

#include <cstdint>
#include <limits>

#include "octomoe/scheme.h"
#include "octomoe/tensor.h"

namespace octomoe::cpu {

struct ActivationStep {
  Activation kind = Activation::none;
  float alpha = 0.0f;                                    // swigluoai
  float limit = std::numeric_limits<float>::infinity();  // swiglu, swigluoai
};

struct FinishArgs {
  const void* c = nullptr;  // [2 panels][rows][16]: int32 where `integers`, else float32
  int rows = 0;
  bool integers = false;
  // integers: v = float(c - zero * column_sum) * (sw * sa)
  const float* sw = nullptr;                 // [32]
  const float* sa = nullptr;                 // [rows]
  const std::int32_t* zero = nullptr;        // [rows] or null
  const std::int32_t* column_sum = nullptr;  // [32]
  const float* factor = nullptr;             // [rows] or null: v = v * factor
  const float* bias = nullptr;               // [32] or null
  bool gated = false;                        // panel 0 is the gate and panel 1 the up value of the same columns
  ActivationStep activation;
  std::int64_t columns = 0;            // of the output, at most 16 (gated) or 32
  std::uint8_t* const* out = nullptr;  // [rows]: where the unit's first column goes
  DType out_dtype = DType::bfloat16;
};
void finish(const FinishArgs& args);

}  // namespace octomoe::cpu
