// topk_ids -> rows sorted by expert, then token (stable).
//
// A CTA places a chunk of routes: each warp owns a run of them, counts the experts in it in order, and the counts of the
// warps before it, of the chunks before it and of lower experts say where its rows begin. Up to one chunk that is one
// launch; for more, count_routes counts each chunk's experts first. No CTA waits for another, nothing goes through the
// host.
#pragma once

#include "core/args.h"
#include "core/gemm_config.h"
#include "ptx/grid.cuh"

namespace octomoe::kernels {

inline constexpr int kSortWarps = kSortThreads / 32;
inline constexpr int kSortRun = kSortChunk / kSortWarps;  // routes of a warp

// Local expert of a route, -1 = skipped.
__device__ __forceinline__ int32_t expert_of(const SortArgs& args, int32_t route, int32_t token) {
  const int64_t at = token * args.ids_stride + (route - token * args.top_k);
  const int64_t id =
      args.ids_are_64 ? static_cast<const int64_t*>(args.topk_ids)[at] : static_cast<const int32_t*>(args.topk_ids)[at];
  if (id < 0 || id >= args.id_limit) return -1;
  return args.expert_map != nullptr ? args.expert_map[id] : static_cast<int32_t>(id);
}

// Rows of each expert in a chunk -> args.chunk_counts [chunks, E].
__device__ __forceinline__ void count_routes(const SortArgs& args) {
  __shared__ int32_t count[kMaxExperts];
  const int thread = static_cast<int>(threadIdx.x);
  ptx::grid_dependency_wait();
  ptx::grid_dependency_launch();
  for (int e = thread; e < args.experts; e += kSortThreads) count[e] = 0;
  __syncthreads();
  const int32_t routes = args.tokens * args.top_k, begin = static_cast<int32_t>(blockIdx.x) * kSortChunk;
  const int32_t end = min(begin + kSortChunk, routes);
  for (int32_t r = begin + thread; r < end; r += kSortThreads) {
    const int32_t e = expert_of(args, r, r / args.top_k);
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
  const int thread = static_cast<int>(threadIdx.x), lane = thread & 31, warp = thread >> 5;
  const int32_t routes = args.tokens * args.top_k;
  const int32_t begin = static_cast<int32_t>(blockIdx.x) * kSortChunk + warp * kSortRun;

  ptx::grid_dependency_wait();
  ptx::grid_dependency_launch();
  for (int i = thread; i < kSortWarps * args.experts; i += kSortThreads) {
    count[i / args.experts][i % args.experts] = 0;
  }
  __syncthreads();

  // Each route's place among those of its expert in the run.
  int32_t expert[kSortRun / 32], token[kSortRun / 32], place[kSortRun / 32];
#pragma unroll
  for (int i = 0; i < kSortRun / 32; ++i) {
    const int32_t r = begin + i * 32 + lane;
    token[i] = r / args.top_k;
    expert[i] = r < routes ? expert_of(args, r, token[i]) : -1;
  }
#pragma unroll
  for (int i = 0; i < kSortRun / 32; ++i) {
    if (begin + i * 32 >= routes) break;
    const uint32_t same = __match_any_sync(0xffffffffu, expert[i]);
    const int32_t before = expert[i] >= 0 ? count[warp][expert[i]] : 0;
    const int rank = __popc(same & ((1u << lane) - 1));
    place[i] = before + rank;
    __syncwarp();
    if (expert[i] >= 0 && rank == 0) count[warp][expert[i]] = before + __popc(same);
    __syncwarp();
  }
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
  // Exclusive sum over the threads.
  int32_t sum = mine;
#pragma unroll
  for (int d = 1; d < 32; d *= 2) {
    const int32_t other = __shfl_up_sync(0xffffffffu, sum, d);
    if (lane >= d) sum += other;
  }
  if (lane == 31) sums[warp] = sum;
  __syncthreads();
  int32_t offset = sum - mine;
  for (int w = 0; w < warp; ++w) offset += sums[w];
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
  if (blockIdx.x == 0 && thread == 0 && args.token_offsets != nullptr) {
    args.token_offsets[0] = 0;
    args.token_offsets[1] = args.tokens;
  }
  __syncthreads();

#pragma unroll
  for (int i = 0; i < kSortRun / 32; ++i) {
    const int32_t r = begin + i * 32 + lane;
    if (r >= routes) break;
    if (expert[i] < 0) {
      args.route_row[r] = -1;
      continue;
    }
    const int32_t row = count[warp][expert[i]] + place[i];
    args.row_token[row] = token[i];
    args.route_row[r] = row;
    if (args.row_factor != nullptr) {
      args.row_factor[row] = args.topk_weights[token[i] * args.weights_stride + (r - token[i] * args.top_k)];
    }
  }
}

}  // namespace octomoe::kernels
