// Logits -> top-k experts and weights (docs/schemes.md section 7), a warp a token, the same additions in the same order
// as src/route/route.cpp.
#pragma once

#include "core/load_row.cuh"
#include "ptx/grid.cuh"

namespace octomoe::kernels {

inline constexpr int kRouteThreads = 128;
inline constexpr int kRouteTokens = kRouteThreads / 32;  // of a CTA

struct Best {
  float value;
  int32_t index;
};
// The larger value, the lower index of equals, over the warp.
__device__ __forceinline__ Best warp_best(Best b) {
#pragma unroll
  for (int d = 16; d > 0; d /= 2) {
    const float value = __shfl_xor_sync(0xffffffffu, b.value, d);
    const int32_t index = __shfl_xor_sync(0xffffffffu, b.index, d);
    if (value > b.value || (value == b.value && index < b.index)) b = {value, index};
  }
  return b;
}
__device__ __forceinline__ Best best_of(const float* values, int32_t count, int lane) {
  Best b{-num::from_bits(num::kInfBits), 0x7fffffff};
  for (int32_t i = lane; i < count; i += 32) {
    if (values[i] > b.value || b.index == 0x7fffffff) b = {values[i], i};
  }
  return warp_best(b);
}

// Dynamic shared memory: for each warp score [E], choice [E] and, with groups, group scores and whether kept [2
// groups].
__device__ __forceinline__ void route_token(const RouteArgs& args, int64_t token, float* score, float* choice,
                                            float* group, float* kept, int lane) {
  const int32_t experts = args.experts;
  const float lowest = -num::from_bits(num::kInfBits);
  float top = lowest;
  bool poisoned = false;
  for (int32_t i = lane; i < experts; i += 32) {
    const float v = load_elem(args.logits, token * args.logits.stride + i);
    score[i] = v;
    top = fmaxf(top, v);
    poisoned |= num::is_nan(v);
  }
  if (args.scoring == Scoring::softmax) {
#pragma unroll
    for (int d = 16; d > 0; d /= 2) top = fmaxf(top, __shfl_xor_sync(0xffffffffu, top, d));
    float sum = 0.0f;
    for (int32_t i = lane; i < experts; i += 32) {
      score[i] = num::exp(__fsub_rn(score[i], top));
      sum = __fadd_rn(sum, score[i]);
    }
#pragma unroll
    for (int d = 16; d > 0; d /= 2) sum = __fadd_rn(sum, __shfl_xor_sync(0xffffffffu, sum, d));
    for (int32_t i = lane; i < experts; i += 32) score[i] = __fdiv_rn(score[i], sum);
  } else {
    for (int32_t i = lane; i < experts; i += 32) score[i] = num::sigmoid(score[i]);
  }
  for (int32_t i = lane; i < experts; i += 32) {
    choice[i] = args.bias != nullptr ? __fadd_rn(score[i], args.bias[i]) : score[i];
    poisoned |= !num::is_finite(choice[i]);
  }
  float* weights = args.weights + token * args.weights_stride;
  int32_t* ids = args.ids + token * args.ids_stride;
  if (__any_sync(0xffffffffu, poisoned)) {
    for (int32_t j = lane; j < args.top_k; j += 32) {
      weights[j] = num::nan();
      ids[j] = j;
    }
    return;
  }
  __syncwarp();
  if (args.groups > 1) {
    const int32_t size = experts / args.groups;
    for (int32_t g = lane; g < args.groups; g += 32) {
      float first = lowest, second = lowest;
      for (int32_t i = g * size; i < (g + 1) * size; ++i) {
        const float v = choice[i];
        if (v > first) {
          second = first;
          first = v;
        } else if (v > second) {
          second = v;
        }
      }
      group[g] = args.bias != nullptr && size > 1 ? __fadd_rn(first, second) : first;
      kept[g] = 0.0f;
    }
    __syncwarp();
    for (int32_t n = 0; n < args.topk_groups; ++n) {
      // Only groups that are not kept yet take part; a score of -Inf still counts.
      Best b{lowest, 0x7fffffff};
      for (int32_t g = lane; g < args.groups; g += 32) {
        if (kept[g] == 0.0f && (b.index == 0x7fffffff || group[g] > b.value)) b = {group[g], g};
      }
      b = warp_best(b);
      if (lane == 0) kept[b.index] = 1.0f;
      __syncwarp();
    }
    for (int32_t i = lane; i < experts; i += 32) {
      if (kept[i / size] == 0.0f) choice[i] = lowest;
    }
    __syncwarp();
  }
  float sum = 0.0f;
  for (int32_t j = 0; j < args.top_k; ++j) {
    const Best b = best_of(choice, experts, lane);
    const float w = score[b.index];
    sum = __fadd_rn(sum, w);
    __syncwarp();
    if (lane == 0) {
      choice[b.index] = lowest;
      ids[j] = b.index;
      weights[j] = w;
    }
    __syncwarp();
  }
  for (int32_t j = lane; j < args.top_k; j += 32) {
    float w = weights[j];
    if (args.renormalize == Renormalize::divide) w = __fdiv_rn(w, fmaxf(sum, args.renormalize_min));
    if (args.renormalize == Renormalize::add_eps) w = __fdiv_rn(w, __fadd_rn(sum, args.renormalize_min));
    weights[j] = __fmul_rn(w, args.scaling_factor);
  }
}

__device__ __forceinline__ void route(const RouteArgs& args) {
  extern __shared__ float shared_floats[];
  const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5;
  float* score = shared_floats + warp * (2 * args.experts + 2 * args.groups);
  float* choice = score + args.experts;
  ptx::grid_dependency_wait();
  ptx::grid_dependency_launch();
  for (int64_t token = static_cast<int64_t>(blockIdx.x) * kRouteTokens + warp; token < args.tokens;
       token += static_cast<int64_t>(gridDim.x) * kRouteTokens) {
    route_token(args, token, score, choice, choice + args.experts, choice + args.experts + args.groups, lane);
    __syncwarp();
  }
}

}  // namespace octomoe::kernels
