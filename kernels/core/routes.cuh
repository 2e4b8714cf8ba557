// Which expert a route goes to.
#pragma once

#include "core/args.h"

namespace octomoe::kernels {

// Local experts of routes first, first + step, ... below `end`; -1: skipped, or no such route. What does not differ
// between routes is decided outside of loops, so that all loads are under way at once.
template <int kCount>
__device__ __forceinline__ void find_experts(const Routes& routes, int32_t first, int32_t step, int32_t end,
                                             int32_t (&expert)[kCount]) {
  int64_t at[kCount];
#pragma unroll
  for (int i = 0; i < kCount; ++i) {
    const int32_t r = min(first + i * step, end - 1), token = r / routes.top_k;
    at[i] = token * routes.ids_stride + (r - token * routes.top_k);
  }
  const auto local = [&](int64_t id, int i) {
    return first + i * step < end && id >= 0 && id < routes.id_limit ? static_cast<int32_t>(id) : -1;
  };
  if (routes.ids_are_64) {
    int64_t id[kCount];
#pragma unroll
    for (int i = 0; i < kCount; ++i) id[i] = static_cast<const int64_t*>(routes.topk_ids)[at[i]];
#pragma unroll
    for (int i = 0; i < kCount; ++i) expert[i] = local(id[i], i);
  } else {
#pragma unroll
    for (int i = 0; i < kCount; ++i) expert[i] = static_cast<const int32_t*>(routes.topk_ids)[at[i]];
#pragma unroll
    for (int i = 0; i < kCount; ++i) expert[i] = local(expert[i], i);
  }
  if (routes.expert_map != nullptr) {
#pragma unroll
    for (int i = 0; i < kCount; ++i) expert[i] = expert[i] >= 0 ? routes.expert_map[expert[i]] : -1;
  }
}

}  // namespace octomoe::kernels
