// topk_ids -> rows sorted by expert, then token (stable).
//
// A CTA places a chunk of routes: each warp owns a run of them, counts the experts in it in order, and the counts of
// the warps before it, of the chunks before it and of lower experts say where its rows begin. Up to one chunk that is
// one launch; for more, count_routes counts each chunk's experts first (SM90: sm90/sort.cuh does it in one). No CTA
// waits for another, nothing goes through the host.
#pragma once

#include "core/args.h"
#include "core/gemm_config.h"
#include "core/routes.cuh"
#include "ptx/grid.cuh"

namespace octomoe::kernels {

inline constexpr int kSortWarps = kSortThreads / 32;
inline constexpr int kSortRun = kSortChunk / kSortWarps;  // routes of a warp

// The routes of a warp: a run of at most kSortRun, 32 side by side.
struct SortRun {
  static constexpr int kCount = kSortRun / 32;
  int32_t begin, end;  // routes
  int32_t expert[kCount], place[kCount];

  // Routes of each of `warps` warps, which share out at most as many as they can take.
  static __device__ __forceinline__ int32_t length(int32_t routes, int32_t warps) {
    return min((routes + 32 * warps - 1) / (32 * warps) * 32, kSortRun);
  }

  // count [E], which is the warp's own, for count().
  static __device__ __forceinline__ void clear(const SortArgs& args, int32_t* count) {
    for (int e = static_cast<int>(threadIdx.x) & 31; e < args.experts; e += 32) count[e] = 0;
    __syncwarp();
  }
  // Each route's place among those of its expert in the run, and how many of each there are.
  __device__ __forceinline__ void count(const SortArgs& args, int32_t* count) {
    const int lane = static_cast<int>(threadIdx.x) & 31;
    find_experts(args.routes, begin + lane, 32, end, expert);
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      if (begin + i * 32 >= end) break;
      const uint32_t same = __match_any_sync(0xffffffffu, expert[i]);
      const int32_t before = expert[i] >= 0 ? count[expert[i]] : 0;
      const int rank = __popc(same & ((1u << lane) - 1));
      place[i] = before + rank;
      __syncwarp();
      if (expert[i] >= 0 && rank == 0) count[expert[i]] = before + __popc(same);
      __syncwarp();
    }
  }

  // first_row(expert): where the run's rows of an expert begin.
  template <class FirstRow>
  __device__ __forceinline__ void write(const SortArgs& args, const FirstRow& first_row) const {
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      const int32_t r = begin + i * 32 + (static_cast<int>(threadIdx.x) & 31), token = r / args.routes.top_k;
      if (r >= end) break;
      if (expert[i] < 0) {
        args.route_row[r] = -1;
        continue;
      }
      const int32_t row = first_row(expert[i]) + place[i];
      args.row_token[row] = token;
      args.route_row[r] = row;
      if (args.row_factor != nullptr) {
        const int32_t slot = r - token * args.routes.top_k;
        args.row_factor[row] = args.routes.topk_weights[token * args.routes.weights_stride + slot];
      }
    }
  }
};

// Exclusive sum over the threads of a CTA; ends with a barrier. sums: a word for each warp.
template <int kThreads>
__device__ __forceinline__ int32_t sum_before(int32_t mine, int32_t* sums) {
  const int lane = static_cast<int>(threadIdx.x) & 31, warp = static_cast<int>(threadIdx.x) >> 5;
  int32_t sum = mine;
#pragma unroll
  for (int d = 1; d < 32; d *= 2) {
    const int32_t other = __shfl_up_sync(0xffffffffu, sum, d);
    if (lane >= d) sum += other;
  }
  if (lane == 31) sums[warp] = sum;
  __syncthreads();
  int32_t before = sum - mine;
  for (int w = 0; w < warp; ++w) before += sums[w];
  return before;
}

// What does not depend on the routes.
__device__ __forceinline__ void write_constants(const SortArgs& args) {
  if (blockIdx.x != 0 || threadIdx.x != 0) return;
  for (int i = 0; i < kTakenWords; ++i) args.expert_offsets[args.experts + 1 + i] = 0;
  if (args.token_offsets == nullptr) return;
  args.token_offsets[0] = 0;
  args.token_offsets[1] = args.routes.tokens;
  for (int i = 0; i < kTakenWords; ++i) args.token_offsets[2 + i] = 0;
}

// Rows of each expert in a chunk -> args.chunk_counts [chunks, E].
__device__ __forceinline__ void count_routes(const SortArgs& args) {
  __shared__ int32_t count[kMaxExperts];
  const int thread = static_cast<int>(threadIdx.x);
  ptx::grid_dependency_wait();
  ptx::grid_dependency_launch();
  for (int e = thread; e < args.experts; e += kSortThreads) count[e] = 0;
  __syncthreads();
  const int32_t begin = static_cast<int32_t>(blockIdx.x) * kSortChunk;
  const int32_t end = min(begin + kSortChunk, args.routes.tokens * args.routes.top_k);
  int32_t expert[kSortChunk / kSortThreads];
  find_experts(args.routes, begin + thread, kSortThreads, end, expert);
  for (const int32_t e : expert) {
    if (e >= 0) atomicAdd(&count[e], 1);
  }
  __syncthreads();
  int32_t* out = args.chunk_counts + static_cast<int64_t>(blockIdx.x) * args.experts;
  for (int e = thread; e < args.experts; e += kSortThreads) out[e] = count[e];
}

__device__ __forceinline__ void sort_routes(const SortArgs& args) {
  constexpr int kPerThread = kMaxExperts / kSortThreads;  // experts of a thread: neighbours
  __shared__ int32_t count[kSortWarps][kMaxExperts];      // then: where a warp's next row of the expert is
  __shared__ int32_t sums[kSortWarps];
  const int thread = static_cast<int>(threadIdx.x), warp = thread >> 5;
  SortRun run;
  run.clear(args, count[warp]);
  ptx::grid_dependency_wait();
  ptx::grid_dependency_launch();
  // Few routes are shared out over all warps.
  const int32_t routes = args.routes.tokens * args.routes.top_k, per_warp = SortRun::length(routes, kSortWarps);
  run.begin = min(static_cast<int32_t>(blockIdx.x) * kSortChunk + warp * per_warp, routes);
  run.end = min(run.begin + per_warp, routes);
  run.count(args, count[warp]);
  __syncthreads();

  // Rows of each expert in all chunks, and in those before this one.
  const int per_thread = (args.experts + kSortThreads - 1) / kSortThreads, first = thread * per_thread;
  int32_t total[kPerThread], earlier[kPerThread], mine = 0;
#pragma unroll
  for (int i = 0; i < kPerThread; ++i) {
    total[i] = 0;
    earlier[i] = 0;
    const int e = first + i;
    if (i >= per_thread || e >= args.experts) continue;
    if (args.chunks == 1) {
#pragma unroll
      for (int w = 0; w < kSortWarps; ++w) total[i] += count[w][e];
    } else {
#pragma unroll 8
      for (int32_t c = 0; c < args.chunks; ++c) {
        const int32_t n = args.chunk_counts[static_cast<int64_t>(c) * args.experts + e];
        total[i] += n;
        if (c < static_cast<int32_t>(blockIdx.x)) earlier[i] += n;
      }
    }
    mine += total[i];
  }
  int32_t offset = sum_before<kSortThreads>(mine, sums);
#pragma unroll
  for (int i = 0; i < kPerThread; ++i) {
    const int e = first + i;
    if (i >= per_thread || e >= args.experts) continue;
    if (blockIdx.x == 0) args.expert_offsets[e] = offset;
    int32_t row = offset + earlier[i];
#pragma unroll
    for (int w = 0; w < kSortWarps; ++w) {
      const int32_t n = count[w][e];
      count[w][e] = row;
      row += n;
    }
    offset += total[i];
    if (blockIdx.x == 0 && e == args.experts - 1) args.expert_offsets[args.experts] = offset;
  }
  write_constants(args);
  __syncthreads();
  run.write(args, [&](int32_t e) { return count[warp][e]; });
}

}  // namespace octomoe::kernels
