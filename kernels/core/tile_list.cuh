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

// In shared memory: the tile that all readers of a CTA, or of a pair, are told of next (GemmArgs::taken), and its
// barriers.
struct NextTile {
  uint64_t full, empty;
  int32_t tile;
};

// In shared memory: exclusive prefix sums of the token tiles of each expert, and where its rows begin.
struct TileList {
  int4 scan[8];  // of each warp
  int32_t first_tile[kMaxExperts + 1];
  int32_t row_begin[kMaxExperts + 1];
};

// Rows of each expert -> list.row_begin. Ids that follow one another come 16 bytes at a time and before anything else
// is done: a kernel begins with this, its code comes from memory, and so do they.
template <int kThreads>
__device__ __forceinline__ void count_rows(TileList& list, int32_t experts, const Routes& routes) {
  constexpr int kVectors = 4;  // of a thread at once
  const int32_t thread = static_cast<int32_t>(threadIdx.x), end = routes.tokens * routes.top_k;
  const bool dense = routes.ids_stride == routes.top_k && reinterpret_cast<uint64_t>(routes.topk_ids) % 16 == 0;
  const int32_t each = routes.ids_are_64 ? 2 : 4, vectors = dense ? end / each : 0;
  uint4 ids[kVectors];
  const auto load = [&](int32_t first) {
#pragma unroll
    for (int i = 0; i < kVectors; ++i) {
      if (first + i * kThreads < vectors) ids[i] = static_cast<const uint4*>(routes.topk_ids)[first + i * kThreads];
    }
  };
  load(thread);
  for (int e = thread; e < experts; e += kThreads) list.row_begin[e] = 0;
  __syncthreads();
#pragma unroll 1
  for (int32_t first = thread; first < vectors;) {
    uint32_t expert[4 * kVectors];
#pragma unroll
    for (int i = 0; i < kVectors; ++i) {
      const bool exists = first + i * kThreads < vectors, wide = routes.ids_are_64 != 0;
      const uint32_t none = ~0u;
      expert[4 * i] = exists && !(wide && ids[i].y != 0) ? ids[i].x : none;
      expert[4 * i + 1] = exists && !wide ? ids[i].y : none;
      expert[4 * i + 2] = exists && !(wide && ids[i].w != 0) ? ids[i].z : none;
      expert[4 * i + 3] = exists && !wide ? ids[i].w : none;
    }
    first += kVectors * kThreads;
    load(first);
    const auto limit = static_cast<uint32_t>(routes.id_limit);
    if (routes.expert_map != nullptr) {
#pragma unroll
      for (uint32_t& e : expert) e = e < limit ? static_cast<uint32_t>(routes.expert_map[e]) : ~0u;
    }
#pragma unroll
    for (const uint32_t e : expert) {
      if (e < (routes.expert_map != nullptr ? static_cast<uint32_t>(experts) : limit)) atomicAdd(&list.row_begin[e], 1);
    }
  }
#pragma unroll 1
  for (int32_t route = vectors * each + thread; route < end; route += kThreads) {
    int32_t expert[1];
    find_experts(routes, route, 0, end, expert);
    if (expert[0] >= 0) atomicAdd(&list.row_begin[expert[0]], 1);
  }
  __syncthreads();
}

// Where expert e's rows begin, e = E: end. A caller's wrong offsets cost wrong rows, never one outside.
__device__ __forceinline__ int32_t offset_of(const GemmArgs& args, int32_t e) {
  // Of L2: a kernel may have read it before it was written.
  const int32_t offset = ptx::load_relaxed(args.expert_offsets + e);
  if (args.offsets_limit == 0) return offset;
  return e == 0 ? 0 : min(max(offset, 0), args.offsets_limit);
}

// All threads call it; ends with a barrier. Any number of threads that is a multiple of 32. With routes, at most
// kCountedRoutes, they are counted, and args.expert_offsets is not looked at.
template <int kBlockN, int kThreads>
__device__ __forceinline__ void build_tile_list(TileList& list, const GemmArgs& args, const Routes* routes = nullptr) {
  static_assert(kCountedRoutes < 1 << 15);
  constexpr int kWarps = kThreads / 32;
  const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5;
  auto* const scan = reinterpret_cast<int32_t*>(list.scan);
  if (routes != nullptr) count_rows<kThreads>(list, args.experts, *routes);
  int32_t carry = 0;  // tiles; with routes, in the upper half, and rows in the lower one
  for (int base = 0; base < args.experts; base += kThreads) {
    const int e = base + static_cast<int>(threadIdx.x);
    int32_t begin = 0, end = 0, count = 0;
    if (e < args.experts) {
      if (routes != nullptr) {
        count = list.row_begin[e];
      } else if (args.masked_rows > 0) {
        begin = e * args.masked_rows;
        count = args.expert_offsets[e];
      } else {
        begin = offset_of(args, e);
        end = offset_of(args, e + 1);
        count = max(end - begin, 0);
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
    if (base > 0) __syncthreads();  // the round before has been read
    if (lane == 31) scan[warp] = sum;
    __syncthreads();
    sum += carry;
#pragma unroll
    for (int i = 0; i < kWarps; i += 4) {
      const int4 of = list.scan[i / 4];
      const int32_t warps[4] = {of.x, of.y, of.z, of.w};
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        if (i + j >= kWarps) continue;
        if (i + j < warp) sum += warps[j];
        carry += warps[j];
      }
    }
    if (e >= args.experts) continue;
    const int32_t at = sum - mine;
    list.first_tile[e] = routes != nullptr ? at >> 16 : at;
    list.row_begin[e] = routes != nullptr ? at & 0xffff : begin;
    if (e == args.experts - 1) {
      list.first_tile[e + 1] = routes != nullptr ? sum >> 16 : sum;
      list.row_begin[e + 1] = routes != nullptr ? sum & 0xffff : end;
    }
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
