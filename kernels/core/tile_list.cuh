// Which tile a persistent CTA works on next. Tiles of all experts are numbered one after another: expert, then weight
// tile groups, then token tiles inside a group, so that CTAs that run together share weights and tokens in L2.
#pragma once

#include "core/gemm_config.h"
#include "core/routes.cuh"
#include "ptx/sm80.cuh"

namespace octomoe::kernels {

struct Tile {
  int32_t expert;
  int32_t row_begin;  // first row of the tile, in the row order of out (offsets layout: also of the gather list)
  int32_t rows;       // 1 .. block_n
  int32_t m_tile;     // weight tile
};

// In shared memory: the tile that all readers of a CTA, or of a pair, are told of next (GemmArgs::taken), and its barriers.
struct NextTile {
  uint64_t full, empty;
  int32_t tile;
};

// In shared memory: exclusive prefix sums of the token tiles of each expert, and where its rows begin.
struct TileList {
  int32_t first_tile[kMaxExperts + 1];
  int32_t row_begin[kMaxExperts + 1];
  int32_t scan[32];
};

// Rows of each expert -> list.row_begin.
template <int kThreads>
__device__ __forceinline__ void count_rows(TileList& list, int32_t experts, const Routes& routes) {
  const int thread = static_cast<int>(threadIdx.x);
  for (int e = thread; e < experts; e += kThreads) list.row_begin[e] = 0;
  __syncthreads();
  constexpr int kCount = 8;
  const int32_t end = routes.tokens * routes.top_k;
  for (int32_t first = thread; first < end; first += kCount * kThreads) {
    int32_t expert[kCount];
    find_experts(routes, first, kThreads, end, expert);
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      if (expert[i] >= 0) atomicAdd(&list.row_begin[expert[i]], 1);
    }
  }
  __syncthreads();
}

// Where expert e's rows begin, e = E: end. A caller's wrong offsets cost wrong rows, never one outside.
__device__ __forceinline__ int32_t offset_of(const GemmArgs& args, int32_t e) {
  const int32_t offset = ptx::load_relaxed(args.expert_offsets + e);  // of L2: a kernel may have read it before it was written
  if (args.offsets_limit == 0) return offset;
  return e == 0 ? 0 : min(max(offset, 0), args.offsets_limit);
}

// All threads call it; ends with a barrier. Any number of threads that is a multiple of 32. With routes, at most
// kCountedRoutes, they are counted, and args.expert_offsets is not looked at.
template <int kBlockN, int kThreads>
__device__ __forceinline__ void build_tile_list(TileList& list, const GemmArgs& args, const Routes* routes = nullptr) {
  static_assert(kCountedRoutes < 1 << 15);
  const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5;
  if (routes != nullptr) count_rows<kThreads>(list, args.experts, *routes);
  int32_t carry = 0;  // tiles; with routes, in the upper half, and rows in the lower one
  for (int base = 0; base < args.experts; base += kThreads) {
    const int e = base + static_cast<int>(threadIdx.x);
    int32_t begin = 0, count = 0;
    if (e < args.experts) {
      if (routes != nullptr) {
        count = list.row_begin[e];
      } else if (args.masked_rows > 0) {
        begin = e * args.masked_rows;
        count = args.expert_offsets[e];
      } else {
        begin = offset_of(args, e);
        count = max(offset_of(args, e + 1) - begin, 0);
      }
    }
    const int32_t tiles = (count + kBlockN - 1) / kBlockN;
    const int32_t mine = routes != nullptr ? tiles << 16 | count : tiles;
    int32_t sum = mine;
#pragma unroll
    for (int d = 1; d < 32; d *= 2) {
      const int32_t other = __shfl_up_sync(0xffffffffu, sum, d);
      if (lane >= d) sum += other;
    }
    if (lane == 31) list.scan[warp] = sum;
    __syncthreads();
    int32_t before = carry, total = carry;
    for (int i = 0; i < kThreads / 32; ++i) {
      if (i < warp) before += list.scan[i];
      total += list.scan[i];
    }
    if (e < args.experts) {
      const int32_t at = before + sum - mine;
      list.first_tile[e] = routes != nullptr ? at >> 16 : at;
      list.row_begin[e] = routes != nullptr ? at & 0xffff : begin;
    }
    carry = total;
    __syncthreads();
  }
  if (threadIdx.x == 0) {
    list.first_tile[args.experts] = routes != nullptr ? carry >> 16 : carry;
    list.row_begin[args.experts] = routes != nullptr      ? carry & 0xffff
                                   : args.masked_rows > 0 ? 0
                                                          : offset_of(args, args.experts);
  }
  __syncthreads();
}

// The expert that a token tile belongs to.
__device__ __forceinline__ int32_t find_expert(const TileList& list, int32_t experts, int32_t token_tile) {
  int32_t lo = 0, hi = experts;  // first_tile[lo] <= token_tile < first_tile[hi]
  while (hi - lo > 1) {
    const int32_t mid = (lo + hi) >> 1;
    if (list.first_tile[mid] <= token_tile) {
      lo = mid;
    } else {
      hi = mid;
    }
  }
  return lo;
}

template <int kBlockN>
__device__ __forceinline__ Tile find_tile(const TileList& list, const GemmArgs& args, int32_t index, int32_t m_tiles) {
  // Tiles are grouped by expert: expert e owns [first_tile[e], first_tile[e+1]) * m_tiles.
  const int32_t lo = find_expert(list, args.experts, index / m_tiles);
  const int32_t first = list.first_tile[lo], count = list.first_tile[lo + 1] - first;
  const int32_t local = index - first * m_tiles;
  // Weight tiles outside, token tiles inside: the token tiles of one weight tile run side by side.
  Tile t;
  t.expert = lo;
  t.m_tile = local / count;
  const int32_t n_tile = local % count;
  const int32_t begin = list.row_begin[lo];
  const int32_t end = args.masked_rows > 0 ? begin + args.expert_offsets[lo] : list.row_begin[lo + 1];
  t.row_begin = begin + n_tile * kBlockN;
  t.rows = min(kBlockN, end - t.row_begin);
  return t;
}

}  // namespace octomoe::kernels
