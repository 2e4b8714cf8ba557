// Arguments of the kernels for few tokens (sm90/few_tokens.cuh): at most kFewTokens tokens with kFewRoutes routes,
// int8_channel, swiglu. Shared by host and device.
#pragma once

#include "core/args.h"

namespace octomoe::kernels {

inline constexpr int kFewTokens = 4, kFewRoutes = 32;
inline constexpr int kFewThreads = 288;  // two groups of four warps, and the producer's warp
inline constexpr int kFewStageBytes = 16384, kFewStages = 6;
inline constexpr int kFewHeaderBytes = 1152;  // shared memory before the ring

struct FewRoutes {
  const void* topk_ids;  // [T, k] int32 or int64, row stride in elements
  int64_t ids_stride;
  int32_t ids_are_64;
  int32_t tokens, top_k;
  const int32_t* expert_map;  // global -> local, or null
  int32_t id_limit;
  const float* topk_weights;  // [T, k], row stride in elements
  int64_t weights_stride;
  int32_t weight_on_input;  // the router weight multiplies x, not y
};

// One of the two matrices of every expert.
struct FewMatrix {
  const int8_t* w;        // [E, n, k]
  const float* scale;     // [E, n]; per_tensor: [E]
  const float* bias;      // [E, n] or null
  const int32_t* column_sum;  // asymmetric: [E, n]; null: symmetric
  const float* static_scale;  // or null
  int32_t n, k, per_tensor;
};

struct FewGateUpArgs {
  FewRoutes routes;
  FewMatrix w13;
  RowView x;    // [T, H]
  uint16_t* h;  // [T * k, I] bf16, by route
  int32_t up_first;
  float limit;  // +Inf: none
};

struct FewDownArgs {
  FewRoutes routes;
  FewMatrix w2;
  const uint16_t* h;  // [T * k, I] bf16
  void* out;          // [T, H]
  int64_t out_stride;
  OutType out_type;
  int32_t accumulate;
  int32_t columns;  // of out that a CTA computes
};

}  // namespace octomoe::kernels
