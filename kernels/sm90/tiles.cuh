// What the SM90 GEMM kernels' producers and consumers share: places in a ring, where a tile lies, whose it is.
#pragma once

#include "core/gemm_config.h"
#include "core/tile_list.cuh"
#include "ptx/grid.cuh"
#include "ptx/sm90.cuh"

namespace octomoe::sm90 {

using kernels::GemmArgs;
using kernels::NextTile;
using kernels::Tile;
using kernels::TileList;
using kernels::WgmmaArgs;

__device__ __forceinline__ int lane() { return static_cast<int>(threadIdx.x) & 31; }

template <int kSize>
struct Slot {
  int32_t index = 0;
  uint32_t phase = 0;
  __device__ __forceinline__ void advance() {
    if (++index == kSize) {
      index = 0;
      phase ^= 1;
    }
  }
};

// Of a tile, by its number among the `count` token tiles of an expert for each of m_tiles weight tiles: weight tiles in
// groups of 8, so that CTAs that run together share both weights and tokens in L2.
struct TilePlace {
  int32_t m_tile, n_tile;
  __device__ __forceinline__ TilePlace(int32_t local, int32_t count, int32_t m_tiles) {
    constexpr int kRaster = 8;
    const int32_t per_group = kRaster * count, group = local / per_group, inside = local - group * per_group;
    const int32_t wide = min(kRaster, m_tiles - group * kRaster);
    n_tile = inside / wide;
    m_tile = group * kRaster + inside - n_tile * wide;
  }
};

// Tiles of an expert: its rows shared out in steps of kStep, so that no tile is more than a step wider than another and
// CTAs that meet the same tile of each expert have as much to do as others. A cluster's CTAs have neighbouring token
// tiles.
template <int kStep, int kCluster>
__device__ __forceinline__ Tile find_tile(const TileList& list, const GemmArgs& args, int32_t index, int32_t m_tiles,
                                          int rank = 0) {
  const int32_t lo = kernels::find_expert(list, args.experts, index / m_tiles);
  const int32_t first = list.first_tile[lo], count = list.first_tile[lo + 1] - first;
  const TilePlace place(index - first * m_tiles, count, m_tiles);
  const int32_t begin = list.row_begin[lo];
  const int32_t rows = args.masked_rows > 0 ? args.expert_offsets[lo] : list.row_begin[lo + 1] - begin;
  const int32_t parts = count * kCluster, part = place.n_tile * kCluster + rank;
  const auto steps = static_cast<uint32_t>(rows + kStep - 1) / kStep;
  const auto each = static_cast<int32_t>(steps / static_cast<uint32_t>(parts));
  const int32_t wider = static_cast<int32_t>(steps) - each * parts;  // tiles of a step more
  const int32_t before = kStep * (part * each + min(part, wider));
  Tile t;
  t.expert = lo;
  t.m_tile = place.m_tile;
  t.row_begin = begin + before;
  t.rows = min(kStep * (each + (part < wider ? 1 : 0)), rows - before);
  if (kCluster > 1 && t.rows <= 0) {  // nothing left for the second CTA: it works along and stores nothing
    t.row_begin = begin;
    t.rows = 0;
  }
  return t;
}

// Of a tile's tokens: to which rows of out they are added, and times what (GemmArgs::add_to).
template <int kTokens>
struct AddTargets {
  int32_t add_to[kTokens];
  float add_weight[kTokens];

  // By `threads` threads; what they write here must be waited for as well as their copies.
  __device__ __forceinline__ void copy(const GemmArgs& args, const Tile& t, int thread, int threads) {
#pragma unroll 1
    for (int i = thread; i < kTokens; i += threads) {
      const int32_t r = t.row_begin + min(i, max(t.rows, 1) - 1);
      if (args.add_to != nullptr) {
        ptx::cp_async_4(ptx::shared_address(&add_to[i]), args.add_to + r, true);
      } else {
        add_to[i] = r;
      }
      if (args.add_weight != nullptr) {
        ptx::cp_async_4(ptx::shared_address(&add_weight[i]), args.add_weight + r, true);
      } else {
        add_weight[i] = 1.0f;
      }
    }
  }
};
template <>
struct AddTargets<0> {};

// How a tensor map's coordinates lead from a stage's weights to the next one's: in panels the tensor is one of E *
// K/128 stacks of N rows of 128 columns, so that the next 128 columns are N rows further on.
struct WeightSteps {
  int32_t column, unit;  // of the map's first dimension, and of that which counts units of rows
  int32_t expert;        // units from an expert to the next
  __device__ __forceinline__ WeightSteps(const GemmArgs& args, int rows_of_unit) {
    const bool panels = args.w_panel != 128;
    const int32_t units = args.n / rows_of_unit;
    column = panels ? 0 : 128;
    unit = panels ? units : 0;
    expert = panels ? units * (args.k / 128) : units;
  }
};

template <bool kGated>
__device__ __forceinline__ int width_of(const GemmArgs& args) {
  return kGated ? args.n / 2 : args.n;
}

// The scale block of an output column: the halves of a w13 restart at a block, also where they are not gated here.
template <bool kGated>
__device__ __forceinline__ int32_t block_row(const GemmArgs& args, int expert, int column, int half) {
  // Unsigned divisions take fewer registers, which the producer is short of.
  const auto block = static_cast<uint32_t>(args.block_n);
  const uint32_t rows = static_cast<uint32_t>(args.n) / static_cast<uint32_t>(args.segments);
  const uint32_t per_segment = (rows + block - 1) / block;
  const auto row = static_cast<uint32_t>(min(column, width_of<kGated>(args) - 1));
  const uint32_t segment = kGated ? static_cast<uint32_t>(half) : row / rows;
  const uint32_t inside = (kGated ? row : row - segment * rows) / block;
  return expert * args.blocks_n + static_cast<int32_t>(segment * per_segment + inside);
}

// A tile's rows that one of 128 threads gathers 16 bytes of: the chunk-th 16 bytes of every 16th row.
template <int kRows>
struct RowCopies {
  static constexpr int kSources = (kRows + 127) / 128;  // rows whose place each thread knows: token, token + 128
  int32_t passes;
  uint32_t offset[kRows / 16];  // in units of 16 bytes

  // Each of the 8 lanes that copy a row knows the source of one of the 8 rows that they copy in turn.
  __device__ __forceinline__ RowCopies(const GemmArgs& args, const Tile& t, const int32_t (&source)[kSources],
                                       int chunk)
      : passes((t.rows + 15) / 16) {
#pragma unroll
    for (int p = 0; p < kRows / 16; ++p) {
      const int32_t from = __shfl_sync(0xffffffffu, source[p / 8], (lane() & 24) + p % 8);
      offset[p] = static_cast<uint32_t>(from) * (static_cast<uint32_t>(args.k) / 16) + static_cast<uint32_t>(chunk);
    }
  }
  // 128 columns from `a` on, of which `inside` says whether this thread's exist.
  __device__ __forceinline__ void copy(uint32_t to, const int8_t* a, bool inside) const {
#pragma unroll
    for (int p = 0; p < kRows / 16; ++p) {
      if (p < passes) ptx::cp_async_16(to + p * 2048, a + static_cast<uint64_t>(offset[p]) * 16, inside);
    }
  }
};

// A CTA's tiles one after another: every gridDim-th, or, with kTakes, as take_tiles brings them: whichever is next when
// this CTA is about to need one. Then no CTA ends long before others whose tiles are wider or whose memory is farther
// away.
template <bool kTakes, int kCluster>
struct TileQueue {
  int32_t index = first();
  uint32_t phase = 0;

  static __device__ __forceinline__ int32_t first() { return static_cast<int32_t>(blockIdx.x) / kCluster; }
  static __device__ __forceinline__ int32_t step() { return static_cast<int32_t>(gridDim.x) / kCluster; }

  // Of one lane of each reader: from now on the next tile may be taken. A pair's first CTA does it for both.
  static __device__ __forceinline__ void ask(NextTile& next) {
    if constexpr (kTakes) {
      const uint32_t barrier = ptx::shared_address(&next.empty);
      if constexpr (kCluster > 1) {
        ptx::barrier_arrive_at(barrier, 0);
      } else {
        ptx::barrier_arrive(barrier);
      }
    }
  }
  __device__ __forceinline__ void advance(NextTile& next, bool taken) {
    if (kTakes && taken) {
      ptx::barrier_wait(ptx::shared_address(&next.full), phase);
      index = next.tile;
      phase ^= 1;
    } else {
      index += step();
    }
  }

  // One thread. It takes a tile when all readers have asked, and tells them.
  static __device__ __forceinline__ void take_tiles(int32_t* taken, NextTile& next, int32_t total) {
    if (first() >= total) return;
    ptx::grid_dependency_wait();  // the counter may be zeroed as late as the offsets are written
    for (uint32_t phase = 0;; phase ^= 1) {
      ptx::barrier_wait(ptx::shared_address(&next.empty), phase);
      const int32_t before = atomicAdd(taken, 1), tile = before + step();
      if (before == total - 1) *taken = 0;  // each tile's CTA asks once, so that was the last time
      const uint32_t to = ptx::shared_address(&next.tile), full = ptx::shared_address(&next.full);
      if constexpr (kCluster > 1) {
        for (uint32_t r = 0; r < kCluster; ++r) ptx::send_word(to, full, r, tile);
      } else {
        next.tile = tile;
        ptx::barrier_arrive(full);
      }
      if (tile >= total) return;
    }
  }
};

// In shared memory: the stages of a CTA's first tile whose weights were asked for before its offsets were certain, and
// the places of that tile's expert in the list that they were to become.
struct Head {
  int32_t stages, expert, first_tile, next_tile;
  // They are another's: the ring's first turn is for nothing, and everyone passes over it.
  __device__ __forceinline__ bool misses(const TileList& list) const {
    return stages > 0 && (list.first_tile[expert] != first_tile || list.first_tile[expert + 1] != next_tile);
  }
};

// Launches before this one may still be writing a caller's offsets, but most often they are long there. So what they
// are before the wait for these launches tells which weights the CTA is likely to begin with, and these are asked for
// meanwhile: a warp finds the `index`-th tile, `ask(tile)` asks for stages of its weights and returns how many. Only
// the tile's expert and weight tile are set.
template <int kBlockN, class Ask>
__device__ __forceinline__ void read_early(Head& head, const GemmArgs& args, int32_t index, int32_t m_tiles,
                                           const Ask& ask) {
  constexpr int kEach = 8;  // experts of a lane, neighbours: all loads are under way before the first is waited for
  const int32_t token_tile = index / m_tiles;
  int32_t before = 0;
  for (int32_t base = 0; base < args.experts; base += 32 * kEach) {
    int32_t offset[kEach + 1], all = 0;
#pragma unroll
    for (int i = 0; i <= kEach; ++i) offset[i] = kernels::offset_of(args, min(base + kEach * lane() + i, args.experts));
#pragma unroll
    for (int i = 0; i < kEach; ++i) {
      offset[i] = (max(offset[i + 1] - offset[i], 0) + kBlockN - 1) / kBlockN;  // tiles, from here on
      all += offset[i];
    }
    int32_t end = all;  // of the lane's experts
#pragma unroll
    for (int d = 1; d < 32; d *= 2) {
      const int32_t other = __shfl_up_sync(0xffffffffu, end, d);
      if (lane() >= d) end += other;
    }
    end += before;
    before = __shfl_sync(0xffffffffu, end, 31);
    const unsigned behind = __ballot_sync(0xffffffffu, token_tile < end);
    if (behind == 0) continue;
    // Among the experts of the first lane whose tiles end behind this one.
    const int found = __ffs(static_cast<int>(behind)) - 1;
    int32_t expert = base + kEach * lane(), first = end - all, tiles = offset[0];
#pragma unroll
    for (int i = 1; i < kEach; ++i) {
      if (token_tile < first + tiles) break;
      first += tiles;
      tiles = offset[i];
      ++expert;
    }
    expert = __shfl_sync(0xffffffffu, expert, found);
    first = __shfl_sync(0xffffffffu, first, found);
    tiles = __shfl_sync(0xffffffffu, tiles, found);
    if (lane() == 0) {
      Tile t{};
      t.expert = expert;
      t.m_tile = TilePlace(index - first * m_tiles, tiles, m_tiles).m_tile;
      head = {ask(t), expert, first, first + tiles};
    }
    return;
  }
}

// The thread that prepares barriers: one that has no part in what the list is made of, if there are few, except where
// its warp uses barriers before all others do (read_early).
template <bool kReadsEarly, int kThreads>
__device__ __forceinline__ int32_t setup_thread(const WgmmaArgs& all) {
  return kReadsEarly && all.offsets_late != 0 && all.routes.topk_ids == nullptr ? 0 : kThreads - 32;
}

// Where launches before this one may still be writing the offsets that the tile list is made of, waits for them.
// kReadsEarly: asks for first weights meanwhile if the offsets are a caller's.
template <int kBlockN, bool kReadsEarly, class Ask>
__device__ __forceinline__ void wait_for_offsets(const WgmmaArgs& all, Head& head, int32_t index, int32_t m_tiles,
                                                 const Ask& ask) {
  if (all.offsets_late == 0 || all.routes.topk_ids != nullptr) return;
  if constexpr (kReadsEarly) {
    const GemmArgs& args = all.gemm;
    // Known to the compiler as the same in a warp's lanes: otherwise all roles would lose their uniform registers.
    const int warp = __shfl_sync(0xffffffffu, static_cast<int>(threadIdx.x) / 32, 0);
    if (args.offsets_limit != 0 && args.masked_rows == 0 && warp == 0) {
      read_early<kBlockN>(head, args, index, m_tiles, ask);
    }
  }
  ptx::grid_dependency_wait();
}

}  // namespace octomoe::sm90
