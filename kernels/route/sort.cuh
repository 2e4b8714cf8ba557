// topk_ids -> rows sorted by expert, then token (stable), in one launch.
//
// CTA e finds the rows of expert e by itself: it scans all ids, counts those of lower experts (where its rows begin)
// and numbers its own in order. No CTA waits for another and nothing goes through the host; 256 CTAs scanning 256 KB of
// ids each read them from L2. CTA `experts` (one more) marks skipped routes.
#pragma once

#include "core/args.h"
#include "ptx/grid.cuh"

namespace octomoe::kernels {

inline constexpr int kSortThreads = 1024;

// Local expert of a route, -1 = skipped.
__device__ __forceinline__ int32_t expert_of(const SortArgs& args, int32_t route) {
  const int32_t token = route / args.top_k, slot = route - token * args.top_k;
  const int64_t at = token * args.ids_stride + slot;
  const int64_t id =
      args.ids_are_64 ? static_cast<const int64_t*>(args.topk_ids)[at] : static_cast<const int32_t*>(args.topk_ids)[at];
  if (id < 0 || id >= args.id_limit) return -1;
  return args.expert_map != nullptr ? args.expert_map[id] : static_cast<int32_t>(id);
}

__device__ __forceinline__ void sort_routes(const SortArgs& args) {
  __shared__ int32_t own[32], lower[32];
  const int32_t expert = static_cast<int32_t>(blockIdx.x);
  const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5;
  const int32_t routes = args.tokens * args.top_k;
  // A warp owns one run of routes, so that order inside a run is lane order and runs follow warps.
  const int32_t run = (routes + 32 * 32 - 1) / (32 * 32) * 32;
  const int32_t begin = warp * run, end = min(begin + run, routes);

  ptx::grid_dependency_wait();
  ptx::grid_dependency_launch();
  if (expert == args.experts) {
    for (int32_t r = static_cast<int32_t>(threadIdx.x); r < routes; r += kSortThreads) {
      if (expert_of(args, r) < 0) args.route_row[r] = -1;
    }
    if (args.token_offsets != nullptr && threadIdx.x == 0) {
      args.token_offsets[0] = 0;
      args.token_offsets[1] = args.tokens;
    }
    return;
  }
  int32_t mine = 0, before = 0;
  for (int32_t r = begin + lane; r < end; r += 32) {
    const int32_t e = expert_of(args, r);
    mine += e == expert;
    before += e >= 0 && e < expert;
  }
  mine = static_cast<int32_t>(__reduce_add_sync(0xffffffffu, static_cast<unsigned>(mine)));
  before = static_cast<int32_t>(__reduce_add_sync(0xffffffffu, static_cast<unsigned>(before)));
  if (lane == 0) {
    own[warp] = mine;
    lower[warp] = before;
  }
  __syncthreads();
  int32_t row = static_cast<int32_t>(__reduce_add_sync(0xffffffffu, static_cast<unsigned>(lower[lane])));
  const int32_t total = static_cast<int32_t>(__reduce_add_sync(0xffffffffu, static_cast<unsigned>(own[lane])));
  if (threadIdx.x == 0) {
    args.expert_offsets[expert] = row;
    if (expert == args.experts - 1) args.expert_offsets[args.experts] = row + total;
  }
  row += static_cast<int32_t>(__reduce_add_sync(0xffffffffu, static_cast<unsigned>(lane < warp ? own[lane] : 0)));
  for (int32_t base = begin; base < end; base += 32) {
    const int32_t r = base + lane;
    const bool hit = r < end && expert_of(args, r) == expert;
    const unsigned mask = __ballot_sync(0xffffffffu, hit);
    if (hit) {
      const int32_t at = row + __popc(mask & ((1u << lane) - 1));
      const int32_t token = r / args.top_k;
      args.row_token[at] = token;
      args.route_row[r] = at;
      if (args.row_factor != nullptr)
        args.row_factor[at] = args.topk_weights[token * args.weights_stride + (r - token * args.top_k)];
    }
    row += __popc(mask);
  }
}

}  // namespace octomoe::kernels
