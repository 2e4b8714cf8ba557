// Arguments of the kernels for few tokens (sm90/few_tokens.cuh): at most kFewTokens tokens with kFewRoutes routes,
// int8_channel, swiglu. Shared by host and device.
#pragma once

#include "core/args.h"

namespace octomoe::kernels {

inline constexpr int kFewTokens = 8, kFewRoutes = 64;
// A multiprocessor is to hold one CTA of either kernel, not two of one, so that `down` loads weights beside the end of
// gate_up: 8 warps of 136 or 144 registers and 16 of 56 fit its four register files, 16 of 136 do not; two of `down`
// have no room in shared memory.
inline constexpr int kFewGateUpWarps = 8, kFewDownWarps = 16;
inline constexpr int kFewGateUpThreads = 32 * kFewGateUpWarps, kFewDownThreads = 32 * kFewDownWarps;
inline constexpr int kFewDownBound = kFewDownThreads + 32;  // two CTAs of so many threads: 56 registers each
// Of down's ring: enough to keep the memory busy while gate_up ends and h is quantised; more gains nothing.
inline constexpr int kFewRingBytes = 112 * 1024;
inline constexpr int kFewDownMinSharedBytes = 115 * 1024;
inline constexpr int kFewHeaderBytes = 6144;  // shared memory before anything whose size depends on the shape
inline constexpr int kFewMaxHidden = 8192;
inline constexpr int kFewMaxStages = 24;
// Columns of out that lie in one stage of down's ring: four for each warp of a stream, but no more than this many
// bytes.
inline constexpr int kFewMaxStageBytes = 49152, kFewMaxStageColumns = 4 * kFewDownWarps;

// A row of x in shared memory ends with zeros up to a multiple of what a warp multiplies at once.
inline constexpr int kFewUnit = 1024;
constexpr int few_x_stride(int hidden) { return (hidden + kFewUnit - 1) / kFewUnit * kFewUnit; }

// Four columns to a warp: how many stages down's warps work on at once.
constexpr int few_streams(int stage_columns, int stages) {
  const int streams = kFewDownWarps / ((stage_columns + 3) / 4);
  return streams < stages ? streams : stages;
}

// One of the two matrices of every expert.
struct FewMatrix {
  const int8_t* w;            // [E, n, k]
  const float* scale;         // [E, n]; per_tensor: [E]
  const float* bias;          // [E, n] or null
  const int32_t* column_sum;  // asymmetric: [E, n]; null: symmetric
  const float* static_scale;  // or null
  int32_t n, k, per_tensor;
};

struct FewGateUpArgs {
  Routes routes;
  FewMatrix w13;
  RowView x;    // [T, H]
  uint16_t* h;  // [T * k, I] bf16, by route
  int32_t up_first;
  float limit;  // +Inf: none
};

struct FewDownArgs {
  Routes routes;
  FewMatrix w2;
  const uint16_t* h;  // [T * k, I] bf16
  void* out;          // [T, H]
  int64_t out_stride;
  OutType out_type;
  int32_t accumulate;
  int32_t columns;        // of out that a CTA computes
  int32_t stage_columns;  // of them in a stage of the ring: at most kFewDownWarps
  int32_t stages;         // at most kFewMaxStages; a multiple of few_streams
};

}  // namespace octomoe::kernels
