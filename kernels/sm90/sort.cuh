// route/sort.cuh in one launch for up to kClusterSortRoutes routes: a cluster of CTAs, which read each other's counts.
#pragma once

#include "ptx/sm90.cuh"
#include "route/sort.cuh"

namespace octomoe::sm90 {

// SortArgs::chunks and chunk_counts are not used. Dynamic shared memory: kernels::cluster_sort_bytes(experts).
template <int kCluster>
__device__ __forceinline__ void sort_routes(const kernels::SortArgs& args) {
  constexpr int kThreads = kernels::kClusterSortThreads, kWarps = kThreads / 32;
  static_assert(kernels::kMaxExperts <= kThreads);
  extern __shared__ __align__(1024) uint8_t memory[];
  __shared__ int32_t sums[kWarps];
  const int experts = args.experts, thread = static_cast<int>(threadIdx.x), warp = thread >> 5;
  auto* count = reinterpret_cast<int32_t*>(memory);  // [warps][E] rows in a warp's run, then: in those of warps before
  int32_t* const total = count + kWarps * experts;   // [E] this CTA's rows of the expert
  int32_t* const begin = total + experts;            // [E] where they begin

  kernels::SortRun run;
  run.clear(args, count + warp * experts);
  ptx::grid_dependency_wait();
  ptx::grid_dependency_launch();
  const auto rank = static_cast<int32_t>(ptx::cluster_rank());
  const int32_t routes = args.routes.tokens * args.routes.top_k, per_warp = run.length(routes, kCluster * kWarps);
  run.begin = min((rank * kWarps + warp) * per_warp, routes);
  run.end = min(run.begin + per_warp, routes);
  run.count(args, count + warp * experts);
  __syncthreads();
  if (thread < experts) {
    int32_t rows = 0;
#pragma unroll
    for (int w = 0; w < kWarps; ++w) {
      const int32_t n = count[w * experts + thread];
      count[w * experts + thread] = rows;
      rows += n;
    }
    total[thread] = rows;
  }
  const uint32_t mine = ptx::shared_address(total + thread);
  ptx::cluster_sync();
  int32_t all = 0, earlier = 0;
  if (thread < experts) {
#pragma unroll
    for (int r = 0; r < kCluster; ++r) {
      const int32_t n = ptx::load_remote(mine, static_cast<uint32_t>(r));
      all += n;
      if (r < rank) earlier += n;
    }
  }
  const int32_t offset = kernels::sum_before<kThreads>(all, sums);
  if (thread < experts) {
    begin[thread] = offset + earlier;
    if (rank == 0) args.expert_offsets[thread] = offset;
    if (rank == 0 && thread == experts - 1) args.expert_offsets[experts] = offset + all;
  }
  kernels::write_constants(args);
  __syncthreads();
  run.write(args, [&](int32_t e) { return begin[e] + count[warp * experts + e]; });
  ptx::cluster_sync();  // the others may still read this CTA's counts
}

}  // namespace octomoe::sm90
