// INT8 grouped GEMM by wgmma, for SM90.
//
//   out[row, f] = epilogue( sum_k w[expert(row), f, k] * a[source(row), k] )
//
// Weights are wgmma's M operand in their natural layout [E, N, K], tokens its N operand. A persistent CTA has producer
// warpgroups and two consumer warpgroups; a tile is 128 weight rows a consumer by up to block_n tokens, and is computed
// as wide as its tokens need, in steps of 16: an expert's rows are shared out evenly over its tiles.
//
//   weights: a thread for each consumer, TMA boxes of 128 rows x 128 bytes ---------> [consumer][stage][128][128 bytes]
//   tokens:  128 threads, cp.async 16 B gathered by row_source, or TMA boxes of 16 --> [stage][block_n][128 bytes]
//            consumers: wgmma m64nNk32, two m64 blocks each, int32 sums in registers -> epilogue -> global
//
// The rings are independent (WgmmaConfig::own_rings): a consumer may run ahead of the other. With sums per K-block of
// wide tiles one thread copies all weights, and they arrive at the tokens' barrier.
//
// Shared rows of a consumer's 128 hold weight rows in an order that the 5-D tensor map makes out of the natural layout:
// shared row (b, w, h, g) = 64b + 16w + 8h + g holds output column 32w + 4g + 2b + h; gated, b = 0 holds the first half
// of w13 and b = 1 the second, both for column 16w + 2g + h. So one thread's sums are neighbouring output columns, and
// gate and up of one column are in one thread.
//
// Sums per K-block (block, hybrid, hybrid_flush): a consumer promotes one m64 block's partial sums while the other
// consumer's wgmma run. The products of the two scales are made by the producer, one per token and scale block, and travel
// with the stage.
#pragma once

#include "core/gemm_config.h"
#include "core/numerics.cuh"
#include "core/tile_list.cuh"
#include "ptx/grid.cuh"
#include "ptx/sm90.cuh"
#include "ptx/wgmma.cuh"

namespace octomoe::sm90 {

using kernels::Epilogue;
using kernels::GemmArgs;
using kernels::OutType;
using kernels::Promotion;
using kernels::Tile;
using kernels::TileList;
using kernels::WgmmaArgs;
using kernels::WgmmaConfig;

template <WgmmaConfig C>
struct GroupedGemm {
  static constexpr int kBlockN = C.block_n, kWeightStages = C.weight_stages, kTokenStages = C.token_stages;
  static constexpr bool kBlocks = C.has_blocks(), kFloatTotals = C.promotion == Promotion::block;
  static constexpr int kRows = 128;  // weight rows of a consumer
  static constexpr int kOutColumns = C.gated() ? 2 : 4;                         // neighbouring columns of a thread
  static constexpr int kGroup = C.gated() ? kRows / 2 : kRows;                  // output columns of a consumer
  static constexpr int kBoxBytes = kRows * WgmmaConfig::kBlockK;
  static constexpr int kTokenBytes = kBlockN * WgmmaConfig::kBlockK;
  static constexpr int kTokenBoxBytes = WgmmaConfig::kTokenBox * WgmmaConfig::kBlockK;
  static constexpr int kSums = kBlockN / 2;  // of a thread and m64 block
  static constexpr int kUnit = C.gated() ? 16 : 32;  // output columns of a step of the tensor map's dimension w
  static constexpr int kRaster = 8;                  // weight tiles that run side by side
  // 65536 registers over the multiprocessor's threads, in steps of 8.
  static constexpr int kWeightRegisters = 32, kTokenRegisters = kBlocks ? 72 : 48;
  static constexpr int kConsumerRegisters = kBlocks && C.own_rings() ? 200 : 216;

  static_assert(kBlockN % 16 == 0 && kBlockN <= 160 && (!kBlocks || kBlockN <= 128));
  // Chunks of K-blocks whose int32 sums enter float values: three sets of sums, so tiles are narrow.
  static constexpr bool kFlush = C.promotion == Promotion::hybrid_flush;
  static_assert(!kFlush || kBlockN <= 64);

  // ---- shared memory ----
  // What the epilogue needs of a tile. The producer may be as many tiles ahead as there are stages.
  static constexpr int kTables = kTokenStages + 1;
  static constexpr bool kScaled = C.promotion == Promotion::channel || C.promotion == Promotion::hybrid;
  struct alignas(16) Table {
    Tile tile;  // rows -1: there is no further tile
    float a_scale[kScaled ? kBlockN : 1];
    float w_scale[kScaled ? C.block_m() : 1];  // by consumer, half of a gated tile, column
  };
  // swiglu_block: the absmax over a warp's columns, as bf16, of tokens i and i + kBlockN / 2; what a token's values are
  // multiplied with.
  struct Rounding {
    uint32_t top[C.quantizes() ? 4 * C.kConsumers : 1][C.quantizes() ? kBlockN / 2 : 1];
    float inverse[C.quantizes() ? kBlockN : 1];
  };
  struct Shared {
    uint8_t weights[C.kConsumers][kWeightStages][kBoxBytes];
    uint8_t tokens[kTokenStages][kTokenBytes];
    alignas(8) int32_t products[kBlocks ? kTokenStages * 2 * kBlockN : 1];
    Table table[kTables];
    TileList list;
    bool plain;               // Consumer::finish; kept here because consumers have no register for it
    Rounding rounding;
    uint64_t weights_full[C.kConsumers][kWeightStages], weights_empty[C.kConsumers][kWeightStages];
    uint64_t tokens_full[kTokenStages], tokens_empty[kTokenStages];
    uint64_t next_full, next_empty;  // of next_tile: take_tiles
    int32_t next_tile;
  };
  static_assert(sizeof(Shared) <= C.pipeline_bytes());
  static_assert(C.own_rings() || (kWeightStages == kTokenStages && C.cluster == 1));

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

  struct Stage {
    Slot<kWeightStages> w;
    Slot<kTokenStages> t;
    __device__ __forceinline__ void advance() {
      w.advance();
      t.advance();
    }
  };

  static __device__ __forceinline__ int lane() { return static_cast<int>(threadIdx.x) & 31; }
  static __device__ __forceinline__ int rank() { return C.cluster > 1 ? static_cast<int>(ptx::cluster_rank()) : 0; }
  static __device__ __forceinline__ int32_t first_tile() { return static_cast<int32_t>(blockIdx.x) / C.cluster; }
  static __device__ __forceinline__ int32_t tile_step() { return static_cast<int32_t>(gridDim.x) / C.cluster; }
  static __device__ __forceinline__ int width(const GemmArgs& args) { return C.gated() ? args.n / 2 : args.n; }
  static __device__ __forceinline__ int padded(int rows) { return (rows + 15) & ~15; }

  // Tiles of an expert: its rows shared out in steps of 16, so that no tile is more than a step wider than another and
  // CTAs that meet the same tile of each expert have as much to do as others; weight tiles in groups of kRaster, so that
  // CTAs that run together share both weights and tokens in L2. A cluster's CTAs have neighbouring token tiles.
  static __device__ __forceinline__ Tile find_tile(const TileList& list, const GemmArgs& args, int32_t index,
                                                   int32_t m_tiles) {
    const int32_t lo = kernels::find_expert(list, args.experts, index / m_tiles);
    const int32_t first = list.first_tile[lo], count = list.first_tile[lo + 1] - first;
    const int32_t local = index - first * m_tiles, per_group = kRaster * count;
    const int32_t group = local / per_group, inside = local - group * per_group;
    const int32_t wide = min(kRaster, m_tiles - group * kRaster), n_tile = inside / wide;
    const int32_t begin = list.row_begin[lo];
    const int32_t rows = args.masked_rows > 0 ? args.expert_offsets[lo] : list.row_begin[lo + 1] - begin;
    const int32_t parts = count * C.cluster, part = n_tile * C.cluster + rank();
    const auto steps = static_cast<uint32_t>(padded(rows)) / 16;
    const auto each = static_cast<int32_t>(steps / static_cast<uint32_t>(parts));
    const int32_t wider = static_cast<int32_t>(steps) - each * parts;  // tiles of a step more
    const int32_t before = 16 * (part * each + min(part, wider));
    Tile t;
    t.expert = lo;
    t.m_tile = group * kRaster + inside - n_tile * wide;
    t.row_begin = begin + before;
    t.rows = min(16 * (each + (part < wider ? 1 : 0)), rows - before);
    if (C.cluster > 1 && t.rows <= 0) {  // nothing left for the second CTA: it works along and stores nothing
      t.row_begin = begin;
      t.rows = 0;
    }
    return t;
  }

  // The scale block of an output column: the halves of a w13 restart at a block, also where they are not gated here.
  static __device__ __forceinline__ int32_t block_row(const GemmArgs& args, int expert, int column, int half) {
    // Unsigned divisions take fewer registers, which the producer is short of.
    const auto block = static_cast<uint32_t>(args.block_n);
    const uint32_t rows = static_cast<uint32_t>(args.n) / static_cast<uint32_t>(args.segments);
    const uint32_t per_segment = (rows + block - 1) / block;
    const auto row = static_cast<uint32_t>(min(column, width(args) - 1));
    const uint32_t segment = C.gated() ? static_cast<uint32_t>(half) : row / rows;
    const uint32_t inside = (C.gated() ? row : row - segment * rows) / block;
    return expert * args.blocks_n + static_cast<int32_t>(segment * per_segment + inside);
  }

  // ---- which tiles ----
  // A CTA's tiles one after another: every gridDim-th, or, as take_tiles brings them, whichever is next when this CTA is
  // about to need one. Then no CTA ends long before others whose tiles are wider or whose memory is farther away.
  struct TileQueue {
    int32_t index = first_tile();
    uint32_t phase = 0;

    // Of one lane of each reader: from now on the next tile may be taken. A pair's first CTA does it for both.
    static __device__ __forceinline__ void ask(Shared& shared) {
      if constexpr (C.takes_tiles()) {
        const uint32_t barrier = ptx::shared_address(&shared.next_empty);
        if constexpr (C.cluster > 1) {
          ptx::barrier_arrive_at(barrier, 0);
        } else {
          ptx::barrier_arrive(barrier);
        }
      }
    }
    __device__ __forceinline__ void advance(Shared& shared, bool taken) {
      if (C.takes_tiles() && taken) {
        ptx::barrier_wait(ptx::shared_address(&shared.next_full), phase);
        index = shared.next_tile;
        phase ^= 1;
      } else {
        index += tile_step();
      }
    }
  };

  // One thread. It takes a tile when the token producer's warps and the weight producers have asked, and tells all.
  static __device__ __forceinline__ void take_tiles(int32_t* taken, Shared& shared, int32_t total) {
    if (first_tile() >= total) return;
    ptx::grid_dependency_wait();  // the counter may be zeroed as late as the offsets are written
    for (uint32_t phase = 0;; phase ^= 1) {
      ptx::barrier_wait(ptx::shared_address(&shared.next_empty), phase);
      const int32_t before = atomicAdd(taken, 1), next = before + tile_step();
      if (before == total - 1) *taken = 0;  // each tile's CTA asks once, so that was the last time
      const uint32_t to = ptx::shared_address(&shared.next_tile), full = ptx::shared_address(&shared.next_full);
      if constexpr (C.cluster > 1) {
        for (uint32_t r = 0; r < C.cluster; ++r) ptx::send_word(to, full, r, next);
      } else {
        shared.next_tile = next;
        ptx::barrier_arrive(full);
      }
      if (next >= total) return;
    }
  }

  // ---- producers ----
  // Where a tile's weights are.
  struct Boxes {
    int32_t unit, count;
    uint64_t hint;
  };
  static __device__ __forceinline__ Boxes boxes_of(const WgmmaArgs& all, const Tile& t) {
    const int column = t.m_tile * C.features();
    // Gated, a column has a row in each half; otherwise a column is a row.
    return {t.expert * (all.gemm.n / kUnit) + column / kUnit, column + kGroup < width(all.gemm) ? 2 : 1,
            all.evict_first != 0 ? ptx::kEvictFirst : ptx::kEvictNormal};
  }
  static __device__ __forceinline__ void copy_box(const WgmmaArgs& all, Shared& shared, const Boxes& boxes, int consumer,
                                                  int32_t k_tile, int32_t slot, uint32_t full) {
    const uint32_t to = ptx::shared_address(shared.weights[consumer][slot]);
    const int32_t unit = boxes.unit + consumer * (kGroup / kUnit);
    if constexpr (C.cluster > 1) {
      // Each CTA asks for one consumer's box, which both get.
      if (rank() == consumer) {
        ptx::copy_box_5d_multicast(to, &all.weights, k_tile * 128, 0, 0, unit, 0, full, boxes.hint, 3);
      }
    } else {
      ptx::copy_box_5d(to, &all.weights, k_tile * 128, 0, 0, unit, 0, full, boxes.hint);
    }
  }

  // One thread for each consumer's weights. Nothing here depends on the kernel before.
  struct WeightProducer {
    const WgmmaArgs& all;
    const GemmArgs& args;
    Shared& shared;
    int32_t m_tiles, total, k_tiles;

    __device__ __forceinline__ void run(int consumer) const {
      Slot<kWeightStages> slot;
      slot.phase = 1;  // the ring is empty
      for (TileQueue queue; total > queue.index; queue.advance(shared, all.taken != nullptr)) {
        queue.ask(shared);
        const Boxes boxes = boxes_of(all, find_tile(shared.list, args, queue.index, m_tiles));
        const bool exists = consumer < boxes.count;
        for (int32_t k_tile = 0; k_tile < k_tiles; ++k_tile) {
          ptx::barrier_wait(ptx::shared_address(&shared.weights_empty[consumer][slot.index]), slot.phase);
          const uint32_t full = ptx::shared_address(&shared.weights_full[consumer][slot.index]);
          ptx::barrier_arrive_expect(full, exists ? kBoxBytes : 0);
          if (exists) copy_box(all, shared, boxes, consumer, k_tile, slot.index, full);
          slot.advance();
        }
      }
    }
  };

  struct TokenProducer {
    const WgmmaArgs& all;
    const GemmArgs& args;
    Shared& shared;
    int32_t m_tiles, total, k_tiles;

    // One ring for all: the weights of both consumers arrive at the tokens' barrier.
    __device__ __forceinline__ void copy_weights(const Boxes& boxes, int32_t k_tile, int32_t slot) const {
      const uint32_t full = ptx::shared_address(&shared.tokens_full[slot]);
      ptx::barrier_arrive_expect(full, static_cast<uint32_t>(boxes.count * kBoxBytes));
      for (int i = 0; i < boxes.count; ++i) copy_box(all, shared, boxes, i, k_tile, slot, full);
    }

    // The scales of a tile, beside its first stage. source: of tokens token and token + 128.
    __device__ __forceinline__ void copy_scales(const Tile& t, Table& table, int thread, int token,
                                                const int32_t (&source)[2]) const {
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        if (token + 128 * i < kBlockN) {
          ptx::cp_async_4(ptx::shared_address(&table.a_scale[token + 128 * i]), args.a_scale + source[i], true);
        }
      }
#pragma unroll 1  // side by side they would need more registers than the producer has
      for (int i = 0; i < C.kConsumers; ++i) {
        const int half = C.gated() ? thread / kGroup : 0, begin = t.m_tile * C.features() + i * kGroup;
        int64_t at;
        if constexpr (C.promotion == Promotion::hybrid) {
          at = block_row(args, t.expert, begin, half);  // a consumer's columns lie in one block
        } else {
          const int column = min(begin + thread % kGroup, width(args) - 1);
          at = args.w_scale_per_tensor ? t.expert
                                       : static_cast<int64_t>(t.expert) * args.n + column + half * width(args);
        }
        ptx::cp_async_4(ptx::shared_address(&table.w_scale[i * kRows + thread]), args.w_scale + at, true);
      }
    }

    // Each of the 8 lanes that copy a row knows the sources of two of the 12 rows that they copy in turn: of tokens
    // token and token + 128 of the tile.
    __device__ __forceinline__ void load_sources(const Tile& t, int token, int32_t (&source)[2]) const {
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const int32_t r = t.row_begin + min(token + 128 * i, max(t.rows, 1) - 1);
        source[i] = args.row_source != nullptr ? args.row_source[r] : r;
      }
    }

    // The scales that one token meets in one K-block, and where the next ones are.
    struct BlockScales {
      struct Values {
        int32_t a, w[2];
        float factor;
        bool active;
      };
      int32_t source = 0, w_at[2] = {};  // places, not pointers: the producer has few registers
      Values values{};

      __device__ __forceinline__ void open(const GemmArgs& args, const Tile& t, int token, int32_t from) {
        values.active = token < padded(t.rows);
        if (!values.active) return;
        source = from;
        values.factor = 1.0f;
        if (kFloatTotals && args.row_factor != nullptr) {
          values.factor = args.row_factor[t.row_begin + min(token, max(t.rows, 1) - 1)];
        }
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          const int32_t b = block_row(args, t.expert, t.m_tile * C.features() + (C.gated() ? 0 : i * kRows), i);
          w_at[i] = b * args.blocks_k;
        }
      }
      __device__ __forceinline__ void load(const GemmArgs& args, int32_t block) {
        if (!values.active) return;
        const int64_t at = block * args.a_rows + source;
        values.a = kFloatTotals ? __float_as_int(args.a_scale[at]) : args.a_q[at];
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          const int32_t w = w_at[i] + block;
          values.w[i] = kFloatTotals ? __float_as_int(args.w_scale[w]) : args.w_q[w];
        }
      }
    };
    // Products of the token's scale and those of the two scale blocks.
    static __device__ __forceinline__ void store_products(const typename BlockScales::Values& v, int32_t* products) {
      if (!v.active) return;
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        products[i * kBlockN] =
            kFloatTotals ? __float_as_int(__fmul_rn(__int_as_float(v.w[i]), __fmul_rn(__int_as_float(v.a), v.factor)))
                         : v.w[i] * v.a;
      }
    }

    __device__ __forceinline__ void run() {
      const int thread = static_cast<int>(threadIdx.x), chunk = thread & 7, row = thread >> 3;
      const int token = row + 16 * chunk;
      TileQueue queue;
      int32_t ahead = 0;
      if (queue.index >= total) return;  // in all CTAs of a cluster
      // Stages before a tile's end at which the next one is asked for, and looked up: as late as can be, so that the tile
      // goes to who needs it first, and early enough that neither the answer nor its rows' places are waited for.
      constexpr int32_t kAsk = 6, kLook = 3;
      const int32_t ask_at = max(k_tiles - kAsk, 0), look_at = C.takes_tiles() ? max(k_tiles - kLook, 0) : 0;
      Tile t = find_tile(shared.list, args, queue.index, m_tiles), next = t;
      Boxes boxes{};
      if constexpr (!C.own_rings()) {
        boxes = boxes_of(all, t);
        // The weights of the first tile do not depend on the kernel before.
        if (thread == 0) {
          for (; ahead < min(kWeightStages, k_tiles); ++ahead) copy_weights(boxes, ahead, ahead);
        }
      }
      ptx::grid_dependency_wait();
      ptx::grid_dependency_launch();

      const uint32_t ring =
          ptx::shared_address(shared.tokens) + static_cast<uint32_t>(row * 128 + ((chunk ^ (row & 7)) << 4));
      Slot<kTokenStages> slot;
      slot.phase = 1;  // the ring is empty
      int table = 0;
      int32_t source[2], next_source[2] = {};
      load_sources(t, token, source);
      BlockScales scales;
      if constexpr (kBlocks) {
        scales.open(args, t, token, source[0]);
        scales.load(args, 0);
      }
      for (;;) {
        if constexpr (!C.takes_tiles()) queue.advance(shared, false);
        // Of the rows that this thread copies 16 bytes of, in units of 16 bytes.
        const int32_t passes = (t.rows + 15) / 16;
        uint32_t offset[kBlockN / 16];
#pragma unroll
        for (int p = 0; p < kBlockN / 16; ++p) {
          const int32_t from = __shfl_sync(0xffffffffu, source[p / 8], (lane() & 24) + p % 8);
          offset[p] = static_cast<uint32_t>(from) * (static_cast<uint32_t>(args.k) / 16) + static_cast<uint32_t>(chunk);
        }
        for (int32_t k_tile = 0; k_tile < k_tiles; ++k_tile) {
          ptx::barrier_wait(ptx::shared_address(&shared.tokens_empty[slot.index]), slot.phase);
          if (thread == 0) {
            if (k_tile == 0) shared.table[table].tile = t;
            if constexpr (!C.own_rings()) {
              if (ahead > 0) {
                --ahead;  // its bytes are under way
              } else {
                copy_weights(boxes, k_tile, slot.index);
              }
            }
          }
          // The scales of the next K-block are asked for before this stage's copies, which would delay them.
          typename BlockScales::Values now{};
          const bool opens_block = kBlocks && k_tile % C.block_stages == 0;
          if constexpr (kBlocks) {
            if (opens_block) {
              now = scales.values;
              if (k_tile + C.block_stages < k_tiles) {
                scales.load(args, k_tile / C.block_stages + 1);
              } else if (k_tile > 0 && queue.index < total) {
                scales.open(args, next, token, next_source[0]);
                scales.load(args, 0);
              }
            }
          }
          const uint32_t to = ring + static_cast<uint32_t>(slot.index * kTokenBytes);
          const bool inside = k_tile * 128 + chunk * 16 < args.k;
          const int8_t* a = args.a + k_tile * 128;
          if (C.takes_token_map() && all.tokens_by_map != 0) {
            // Rows that follow one another come in boxes; those behind the tile's last are another's and stay unused.
            if (thread == 0) {
              const uint32_t full = ptx::shared_address(&shared.tokens_full[slot.index]);
              ptx::barrier_expect(full, static_cast<uint32_t>(passes * kTokenBoxBytes));
              const uint32_t base = ptx::shared_address(shared.tokens[slot.index]);
#pragma unroll 1
              for (int p = 0; p < passes; ++p) {
                ptx::copy_box_2d(base + static_cast<uint32_t>(p * kTokenBoxBytes), &all.tokens, k_tile * 128,
                                 t.row_begin + p * WgmmaConfig::kTokenBox, full);
              }
            }
          } else {
#pragma unroll
            for (int p = 0; p < kBlockN / 16; ++p) {
              if (p < passes) ptx::cp_async_16(to + p * 2048, a + static_cast<uint64_t>(offset[p]) * 16, inside);
            }
          }
          if constexpr (kBlocks) {
            if (opens_block) store_products(now, shared.products + slot.index * 2 * kBlockN + token);
          }
          if (k_tile == 0) {
            if constexpr (kScaled) copy_scales(t, shared.table[table], thread, token, source);
            table = table + 1 == kTables ? 0 : table + 1;
          }
          // Each thread arrives when its copies land; a warp once more for what it wrote itself.
          const uint32_t full = ptx::shared_address(&shared.tokens_full[slot.index]);
          ptx::cp_async_arrive(full);
          __syncwarp();
          if (lane() == 0) ptx::barrier_arrive(full);
          slot.advance();
          if (C.takes_tiles() && k_tile == ask_at && lane() == 0) queue.ask(shared);
          // The next tile's rows are looked up while this one's copies are under way.
          if (k_tile == look_at) {
            if constexpr (C.takes_tiles()) queue.advance(shared, all.taken != nullptr);
            if (queue.index < total) {
              next = find_tile(shared.list, args, queue.index, m_tiles);
              load_sources(next, token, next_source);
            }
          }
        }
        if (queue.index >= total) break;
        if constexpr (kBlocks) {
          if (k_tiles <= C.block_stages) {  // too short to have known the next tile in time
            scales.open(args, next, token, next_source[0]);
            scales.load(args, 0);
          }
        }
        t = next;
        if constexpr (!C.own_rings()) boxes = boxes_of(all, t);
        source[0] = next_source[0];
        source[1] = next_source[1];
      }
      if constexpr (C.takes_tiles()) {  // a stage that says that there is no further tile
        ptx::barrier_wait(ptx::shared_address(&shared.tokens_empty[slot.index]), slot.phase);
        if (thread == 0) shared.table[table].tile.rows = -1;
        const uint32_t full = ptx::shared_address(&shared.tokens_full[slot.index]);
        ptx::cp_async_arrive(full);
        __syncwarp();
        if (lane() == 0) ptx::barrier_arrive(full);
      }
      ptx::cp_async_wait<0>();
    }
  };

  // ---- consumer ----
  struct Consumer {
    const GemmArgs& args;
    Shared& shared;
    int32_t k_tiles;
    int warpgroup;
    bool by_map;
    Stage at;

    __device__ __forceinline__ void wait_full(const Stage& s) const {
      if constexpr (C.own_rings()) {
        ptx::barrier_wait(ptx::shared_address(&shared.weights_full[warpgroup][s.w.index]), s.w.phase);
      }
      ptx::barrier_wait(ptx::shared_address(&shared.tokens_full[s.t.index]), s.t.phase);
      if (!by_map) ptx::fence_proxy_async();  // tokens were written by cp.async
    }
    __device__ __forceinline__ void release(int32_t w, int32_t t) const {
      __syncwarp();  // all lanes have read what they need of the stage
      if constexpr (C.own_rings()) {
        const uint32_t weights = ptx::shared_address(&shared.weights_empty[warpgroup][w]);
        if constexpr (C.cluster > 1) {
          if (lane() < C.cluster) ptx::barrier_arrive_at(weights, static_cast<uint32_t>(lane()));
        } else {
          if (lane() == 0) ptx::barrier_arrive(weights);
        }
      }
      if (lane() == (C.own_rings() ? 2 : 0)) ptx::barrier_arrive(ptx::shared_address(&shared.tokens_empty[t]));
    }
    // Half of w13 that m64 block `block` is: the first block is always the gate.
    __device__ __forceinline__ int half_of(int block) const { return C.gated() ? block ^ args.up_first : 0; }
    __device__ __forceinline__ uint64_t weights(const Stage& s, int block) const {
      const int place = C.gated() ? half_of(block) : block;
      return ptx::matrix_descriptor(ptx::shared_address(shared.weights[warpgroup][s.w.index]) + place * 8192);
    }
    __device__ __forceinline__ uint64_t tokens(const Stage& s) const {
      return ptx::matrix_descriptor(ptx::shared_address(shared.tokens[s.t.index]));
    }

    // Sums over the whole of K.
    template <int kTokens>
    __device__ __forceinline__ void multiply(int32_t (&sums)[2][kSums]) {
      int32_t previous_w = 0, previous_t = 0;
      for (int32_t k_tile = 0; k_tile < k_tiles; ++k_tile) {
        wait_full(at);
        ptx::wgmma_fence();
#pragma unroll
        for (int b = 0; b < 2; ++b) ptx::Wgmma<kTokens>::mma(sums[b], weights(at, b), tokens(at), k_tile);
        ptx::wgmma_commit();
        ptx::wgmma_wait<1>();
        if (k_tile > 0) release(previous_w, previous_t);
        previous_w = at.w.index;
        previous_t = at.t.index;
        at.advance();
      }
      ptx::wgmma_wait<0>();
      release(previous_w, previous_t);
      ptx::wgmma_results(sums[0]);
      ptx::wgmma_results(sums[1]);
    }

    // Partial sums per K-block, promoted into totals; with chunks, those into values.
    template <int kTokens>
    __device__ __forceinline__ void multiply_blocks(const Tile& t, int32_t (&totals)[2][kSums],
                                                    int32_t (&values)[2][kFlush ? kSums : 1]) {
      constexpr int32_t kMinusZero = static_cast<int32_t>(0x80000000u);  // fma(x, p, -0) is x * p, its sign included
#pragma unroll
      for (int b = 0; b < 2; ++b) {
#pragma unroll
        for (int i = 0; i < kTokens / 2; ++i) {
          totals[b][i] = kFloatTotals ? kMinusZero : 0;
          if constexpr (kFlush) values[b][i] = kMinusZero;
        }
      }
      int32_t group = 0, in_group = 0, in_chunk = 0;
      constexpr bool kBoth = kBlockN <= 96 && !kFlush;  // there are registers for both blocks' partial sums
      // One m64 block's products run while the other's partial sums are promoted. All are waited for inside an
      // iteration: ptxas serialises wgmma whose sums cross a loop's end and are read on the other side (C7514).
      int32_t partial[kBoth ? 2 : 1][kTokens / 2];
      for (int32_t k_tile = 0; k_tile < k_tiles; k_tile += C.block_stages) {
        const Stage begin = at;
        multiply_block<kTokens>(partial[0], 0, begin, true);
        if constexpr (kBoth) multiply_block<kTokens>(partial[1], 1, begin, false);
        ptx::wgmma_wait<kBoth ? 1 : 0>();
        promote_block<kTokens>(totals[0], partial[0], 0, begin);
        if constexpr (!kBoth) multiply_block<kTokens>(partial[0], 1, begin, false);
        ptx::wgmma_wait<0>();
        promote_block<kTokens>(totals[1], partial[kBoth ? 1 : 0], 1, begin);
#pragma unroll
        for (int i = 0; i < C.block_stages; ++i) {
          release(at.w.index, at.t.index);
          at.advance();
        }
        if constexpr (kFlush) {
          ++in_group;
          ++in_chunk;
          if (k_tile + C.block_stages >= k_tiles || in_group == args.super_group || in_chunk == args.flush_blocks) {
            flush<kTokens>(t, group, totals, values);
            in_chunk = 0;
            if (in_group == args.super_group) {
              in_group = 0;
              ++group;
            }
          }
        }
      }
    }

    // The end of a chunk of K-blocks in super group `group`.
    template <int kTokens>
    __device__ __forceinline__ void flush(const Tile& t, int32_t group, int32_t (&totals)[2][kSums],
                                          int32_t (&values)[2][kFlush ? kSums : 1]) const {
      const int32_t groups = (args.blocks_k + args.super_group - 1) / args.super_group;
      float w[2];
#pragma unroll
      for (int b = 0; b < 2; ++b) {
        const int32_t row = block_row(args, t.expert, t.m_tile * C.features() + (C.gated() ? 0 : warpgroup * kRows),
                                      half_of(b));
        w[b] = args.w_scale[static_cast<int64_t>(row) * groups + group];
      }
#pragma unroll
      for (int j = 0; j < kTokens / 8; ++j) {
#pragma unroll
        for (int e = 0; e < 2; ++e) {
          const int32_t row = t.row_begin + min(8 * j + 2 * (lane() & 3) + e, max(t.rows, 1) - 1);
          const int32_t from = args.row_source != nullptr ? args.row_source[row] : row;
          float a = args.a_scale[group * args.a_rows + from];
          if (args.row_factor != nullptr) a = __fmul_rn(a, args.row_factor[row]);
#pragma unroll
          for (int b = 0; b < 2; ++b) {
            const float p = __fmul_rn(w[b], a);
#pragma unroll
            for (int h = 0; h < 2; ++h) {
              const int i = 4 * j + 2 * h + e;
              values[b][i] =
                  __float_as_int(__fmaf_rn(__int2float_rn(totals[b][i]), p, __int_as_float(values[b][i])));
              totals[b][i] = 0;
            }
          }
        }
      }
    }

    // The partial sums of one K-block, from stage s on.
    template <int kTokens>
    __device__ __forceinline__ void multiply_block(int32_t (&partial)[kTokens / 2], int block, Stage s, bool wait) const {
#pragma unroll
      for (int i = 0; i < C.block_stages; ++i) {
        if (wait) wait_full(s);
        ptx::wgmma_fence();
        ptx::Wgmma<kTokens>::mma(partial, weights(s, block), tokens(s), i);
        s.advance();
      }
      ptx::wgmma_commit();
    }

    template <int kTokens>
    __device__ __forceinline__ void promote_block(int32_t (&totals)[kSums], int32_t (&partial)[kTokens / 2], int block,
                                                  Stage s) const {
      ptx::wgmma_results(partial);
      promote<kTokens>(totals, partial, shared.products + (s.t.index * 2 + (C.gated() ? half_of(block) : warpgroup)) * kBlockN);
    }

    template <int kTokens>
    __device__ __forceinline__ void promote(int32_t (&totals)[kSums], const int32_t (&partial)[kTokens / 2],
                                            const int32_t* products) const {
      const uint32_t at = ptx::shared_address(products) + (lane() & 3) * 8;
#pragma unroll
      for (int j = 0; j < kTokens / 8; ++j) {
        const int2 p = ptx::load_shared_2(at + j * 32);
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const int32_t scale = i % 2 ? p.y : p.x;
          int32_t& total = totals[4 * j + i];
          if constexpr (kFloatTotals) {
            total = __float_as_int(
                __fmaf_rn(__int2float_rn(partial[4 * j + i]), __int_as_float(scale), __int_as_float(total)));
          } else {
            total += scale * partial[4 * j + i];
          }
        }
      }
    }

    // One width of tile after another, until one is wide enough.
    template <int kTokens>
    __device__ __forceinline__ void multiply_tile(const Tile& t, int32_t (&sums)[2][kSums]) {
      if constexpr (kTokens < kBlockN) {
        if (t.rows > kTokens) {
          multiply_tile<kTokens + 16>(t, sums);
          return;
        }
      }
      if constexpr (kFlush) {
        int32_t totals[2][kSums];
        multiply_blocks<kTokens>(t, totals, sums);
      } else if constexpr (kBlocks) {
        int32_t none[2][1];
        multiply_blocks<kTokens>(t, sums, none);
      } else {
        multiply<kTokens>(sums);
      }
    }

    // Of the tile: the first of the neighbouring output columns that this thread has.
    __device__ __forceinline__ int column_inside() const {
      const int warp = (static_cast<int>(threadIdx.x) >> 5) & 3;
      return warp * (kGroup / 4) + (lane() >> 2) * kOutColumns;
    }
    __device__ __forceinline__ int column_of(const Tile& t) const {
      return t.m_tile * C.features() + warpgroup * kGroup + column_inside();
    }

    // Sums -> out; with swiglu_block two columns of SwiGLU as bf16 -> sums[0][4j + e]. kPlain: bf16 or quantised out,
    // and none of bias, zero points, row factors and limit.
    template <bool kPlain>
    __device__ __forceinline__ void finish(const Tile& t, int32_t (&sums)[2][kSums], const Table& table) const {
      const int inside = column_inside(), column = column_of(t);
      if (column >= width(args)) return;
      const bool asymmetric = !kPlain && C.promotion == Promotion::channel && args.a_zero != nullptr;
      const OutType type = C.gated() || kPlain ? OutType::bf16 : args.out_type;
      // [b][h]: ungated, columns 2b + h; gated, column h of gate and up.
      float w_scale[2][2], bias[2][2];
      int32_t column_sum[2][2];
#pragma unroll
      for (int b = 0; b < 2; ++b) {
#pragma unroll
        for (int h = 0; h < 2; ++h) {
          const int offset = C.gated() ? h : 2 * b + h, half = half_of(b);
          const int64_t at = static_cast<int64_t>(t.expert) * args.n + column + offset + half * width(args);
          w_scale[b][h] = kScaled ? table.w_scale[warpgroup * kRows + half * kGroup + inside + offset] : 0.0f;
          column_sum[b][h] = asymmetric ? args.column_sum[at] : 0;
          bias[b][h] = !kPlain && args.bias != nullptr ? args.bias[at] : 0.0f;
        }
      }
      const int first = 2 * (lane() & 3), left = t.rows - first, size = type == OutType::f32 ? 4 : 2;
      const int64_t stride = args.out_stride * size;
      uint8_t* to = static_cast<uint8_t*>(args.out) + (t.row_begin + first) * stride + static_cast<int64_t>(column) * size;
#pragma unroll
      for (int j = 0; j < kBlockN / 8; ++j) {
        if (8 * j >= t.rows) break;
        float a_scale[2] = {};
        if constexpr (kScaled) {
          const float2 pair = *reinterpret_cast<const float2*>(&table.a_scale[8 * j + first]);
          a_scale[0] = pair.x;
          a_scale[1] = pair.y;
        }
        // Both tokens' values before either's store: their chains are long, and a scheduler has one or two warps.
        float out[2][4];  // of a token; gated: gate of two columns, then up
#pragma unroll
        for (int e = 0; e < 2; ++e) {
          int32_t zero = 0;
          if constexpr (!kPlain) {
            const int32_t row = t.row_begin + min(8 * j + first + e, t.rows - 1);
            if (kScaled && args.row_factor != nullptr) a_scale[e] = __fmul_rn(a_scale[e], args.row_factor[row]);
            if (asymmetric) zero = args.a_zero[args.row_source != nullptr ? args.row_source[row] : row];
          }
#pragma unroll
          for (int c = 0; c < 4; ++c) {
            const int b = c / 2, h = c % 2, sum = sums[b][4 * j + 2 * h + e];
            float x = __int_as_float(sum);
            if constexpr (kScaled) {
              const int32_t acc = asymmetric ? sum - zero * column_sum[b][h] : sum;
              x = __fmul_rn(__int2float_rn(acc), __fmul_rn(w_scale[b][h], a_scale[e]));
            }
            if (!kPlain && args.bias != nullptr) x = __fadd_rn(x, bias[b][h]);
            if constexpr (C.gated() && !kPlain) {
              x = b == 0 ? num::min_nan(x, args.limit) : num::clamp(x, -args.limit, args.limit);
            }
            out[e][c] = x;
          }
        }
        if constexpr (C.gated()) {
#pragma unroll
          for (int i = 0; i < 4; ++i) {
            out[i / 2][i % 2] = __fmul_rn(num::silu(out[i / 2][i % 2]), out[i / 2][2 + i % 2]);
          }
        }
#pragma unroll
        for (int e = 0; e < 2; ++e) {
          if constexpr (C.quantizes()) {
            sums[0][4 * j + e] = static_cast<int32_t>(num::pack_bf16(out[e][0], out[e][1]));
          } else {
            store(to + e * stride, type, out[e], 8 * j + e < left);
          }
        }
        to += 8 * stride;
      }
    }

    // The tile's 128 columns of h -> int8 and a scale for each token: what quant/quantize_rows.cuh makes of a K-block
    // of its rows. h[4j + e]: two columns of token 8j + 2 * (lane % 4) + e, as bf16; where there is no such token or
    // column, anything.
    __device__ __forceinline__ void quantize(const Tile& t, const int32_t (&h)[kSums]) const {
      static_assert((kBlockN == 64 || kBlockN == 128) && C.features() == 128);
      constexpr int kPairs = kBlockN / 8, kKept = kPairs / 8, kHalf = kBlockN / 2;
      Rounding& rounding = shared.rounding;
      const int thread = static_cast<int>(threadIdx.x), warp = (thread >> 5) & 3, group = lane() >> 2;
      const bool odd = (group & 1) != 0;
      const int column = column_of(t) - odd * kOutColumns;
      const bool exists = column < width(args);
      // Two columns of two tokens become four columns of one: a lane trades with the one that has the other two
      // columns. All lanes take part in all shuffles, outside of branches: inside, the compiler gives up uniform
      // registers in the main loop.
      const int first = 2 * (lane() & 3) + odd;
      uint32_t v[kPairs][2], top[kPairs / 2];
#pragma unroll
      for (int j = 0; j < kPairs; ++j) {
        const auto a = static_cast<uint32_t>(h[4 * j]), b = static_cast<uint32_t>(h[4 * j + 1]);
        const uint32_t other = __shfl_xor_sync(0xffffffffu, odd ? a : b, 4);
        v[j][0] = odd ? other : a;
        v[j][1] = odd ? b : other;
      }
      // Absmax bits of tokens 8j + first and kHalf more, as the halves of a word. A lane keeps half of its words and
      // sends the others to the one that keeps those, until it has kKept, of all the warp's columns.
      const auto most = [&](int j) {
        const uint32_t mask = exists ? 0x7fff7fffu : 0u;
        return ptx::max_u16x2(v[j][0] & mask, v[j][1] & mask);
      };
#pragma unroll
      for (int j = 0; j < kPairs / 2; ++j) {
        const uint32_t a = most(j), b = most(j + kPairs / 2);
        top[j] = ptx::max_u16x2(__byte_perm(a, b, 0x5410), __byte_perm(a, b, 0x7632));
      }
      keep_half<2 * kKept>(top, 16);
      keep_half<kKept>(top, 8);
#pragma unroll
      for (int i = 0; i < kKept; ++i) {
        rounding.top[4 * warpgroup + warp][8 * (kKept * (group >> 1) + i) + first] = top[i];
      }
      ptx::named_barrier(1, 128 * C.kConsumers);
      const int token = thread & (kBlockN - 1);
      uint32_t absmax = 0;
#pragma unroll
      for (int i = 0; i < 4 * C.kConsumers; ++i) absmax = ptx::max_u16x2(absmax, rounding.top[i][token & (kHalf - 1)]);
      absmax = token < kHalf ? absmax << 16 : absmax & 0xffff0000u;  // a bf16's bits are the first of a float's
      const num::GroupScale scale = num::symmetric_scale(absmax, num::kInt8Max);
      if (warpgroup == 0) {
        rounding.inverse[token] = scale.inverse;
      } else if (token < t.rows) {
        args.out_scale[t.m_tile * args.out_rows + t.row_begin + token] = scale.scale;
      }
      ptx::named_barrier(1, 128 * C.kConsumers);
      if (!exists) return;
      uint8_t* to = static_cast<uint8_t*>(args.out) + (t.row_begin + first) * args.out_stride + column;
#pragma unroll
      for (int j = 0; j < kPairs; ++j) {
        if (8 * j + first >= t.rows) break;
        const float inverse = rounding.inverse[8 * j + first];
        const auto q = [&](int i) {
          return __byte_perm(num::quantize_within(num::bf16_low(v[j][i]), inverse),
                             num::quantize_within(num::bf16_high(v[j][i]), inverse), 0x0040);
        };
        // 0: of a group that is not finite.
        *reinterpret_cast<uint32_t*>(to) = inverse == 0.0f ? 0u : __byte_perm(q(0), q(1), 0x5410);
        to += 8 * args.out_stride;
      }
    }
    // The first kLeft of top, or the others, whichever are this lane's to keep; the lane `by` away keeps those that go.
    template <int kLeft, int kSize>
    static __device__ __forceinline__ void keep_half(uint32_t (&top)[kSize], int by) {
      const bool upper = (lane() & by) != 0;
#pragma unroll
      for (int i = 0; i < kLeft; ++i) {
        const uint32_t sent = upper ? top[i] : top[i + kLeft], kept = upper ? top[i + kLeft] : top[i];
        top[i] = ptx::max_u16x2(kept, __shfl_xor_sync(0xffffffffu, sent, by));
      }
    }

    static __device__ __forceinline__ void store(uint8_t* to, OutType type, const float (&v)[4], bool exists) {
      if (type == OutType::f32) {
        if (!exists) return;
#pragma unroll
        for (int c = 0; c < kOutColumns; c += 2) {
          *reinterpret_cast<float2*>(to + 4 * c) = make_float2(num::canonical(v[c]), num::canonical(v[c + 1]));
        }
        return;
      }
      uint32_t packed[kOutColumns / 2];
#pragma unroll
      for (int c = 0; c < kOutColumns; c += 2) {
        packed[c / 2] = type == OutType::bf16 ? num::pack_bf16(v[c], v[c + 1]) : num::pack_fp16(v[c], v[c + 1]);
      }
      // Without a branch, into which the compiler would move all that leads to the value.
      ptx::store_if(exists, to, packed);
    }

    __device__ __forceinline__ void run(int32_t total) {
      ptx::grid_dependency_wait();
      int table = 0;
      if (first_tile() >= total) return;
      for (int32_t index = first_tile(); C.takes_tiles() || index < total; index += tile_step()) {
        ptx::barrier_wait(ptx::shared_address(&shared.tokens_full[at.t.index]), at.t.phase);
        const Table& tile = shared.table[table];
        if (C.takes_tiles() && tile.tile.rows < 0) return;
        int32_t sums[2][kSums];
        multiply_tile<C.min_n()>(tile.tile, sums);
        const Tile t = tile.tile;  // read again: there are no registers to keep it in
        if (shared.plain) {
          finish<true>(t, sums, tile);
        } else {
          finish<false>(t, sums, tile);
        }
        if constexpr (C.quantizes()) quantize(t, sums[0]);
        table = table + 1 == kTables ? 0 : table + 1;
      }
    }
  };

  static __device__ __forceinline__ void run(const WgmmaArgs& all) {
    extern __shared__ __align__(1024) uint8_t memory[];
    Shared& shared = *reinterpret_cast<Shared*>(memory);
    const GemmArgs& args = all.gemm;
    if (threadIdx.x == 0) {
      ptx::prefetch_tensor_map(&all.weights);
      shared.plain = args.bias == nullptr && args.row_factor == nullptr && args.a_zero == nullptr &&
                     (C.gated() ? args.limit == num::from_bits(num::kInfBits) : args.out_type == OutType::bf16);
      for (int c = 0; c < C.kConsumers; ++c) {
        for (int i = 0; i < kWeightStages; ++i) {
          ptx::barrier_init(ptx::shared_address(&shared.weights_full[c][i]), 1);
          ptx::barrier_init(ptx::shared_address(&shared.weights_empty[c][i]), 4 * C.cluster);
        }
      }
      for (int i = 0; i < kTokenStages; ++i) {
        // The producer's threads (their copies) and warps (their writes); the weights' bytes.
        ptx::barrier_init(ptx::shared_address(&shared.tokens_full[i]), 128 + 4 + (C.own_rings() ? 0 : 1));
        ptx::barrier_init(ptx::shared_address(&shared.tokens_empty[i]), 4 * C.kConsumers);
      }
      ptx::barrier_init(ptx::shared_address(&shared.next_full), 1);
      ptx::barrier_init(ptx::shared_address(&shared.next_empty), (C.kConsumers + 4) * C.cluster);
      ptx::barrier_init_fence();
    }
    const kernels::Routes* const routes = all.routes.topk_ids != nullptr ? &all.routes : nullptr;
    if (all.offsets_late != 0 && routes == nullptr) ptx::grid_dependency_wait();
    kernels::build_tile_list<kBlockN * C.cluster, C.threads()>(shared.list, args, routes);
    // Before anything is sent to the other CTA, its barriers must stand.
    if constexpr (C.cluster > 1) ptx::cluster_sync();
    const int32_t m_tiles = (width(args) + C.features() - 1) / C.features();
    const int32_t total = shared.list.first_tile[args.experts] * m_tiles;
    // The same in a warp's lanes, which the compiler cannot know: addresses of shared memory may be uniform.
    const int warpgroup = __shfl_sync(0xffffffffu, static_cast<int>(threadIdx.x) / 128, 0);
    // Whole K-blocks: columns past K arrive as zeros.
    constexpr int kStep = 128 * C.block_stages;
    const int32_t k_tiles = (args.k + kStep - 1) / kStep * C.block_stages;
    if (warpgroup == 0) {
      ptx::lower_registers<kTokenRegisters>();
      TokenProducer{all, args, shared, m_tiles, total, k_tiles}.run();
    } else if (C.own_rings() && warpgroup == 1) {
      ptx::lower_registers<kWeightRegisters>();
      const int warp = static_cast<int>(threadIdx.x) / 32 - 4;
      if (warp < C.kConsumers && lane() == 0) WeightProducer{all, args, shared, m_tiles, total, k_tiles}.run(warp);
      if (C.takes_tiles() && warp == C.kConsumers && lane() == 0 && all.taken != nullptr && rank() == 0) {
        take_tiles(all.taken, shared, total);
      }
      __syncwarp();  // whole warps meet the cluster's barrier
    } else {
      ptx::raise_registers<kConsumerRegisters>();
      const bool by_map = C.takes_token_map() && all.tokens_by_map != 0;
      Consumer{args, shared, k_tiles, warpgroup - (C.own_rings() ? 2 : 1), by_map, {}}.run(total);
    }
    // The other CTA may still send weights or arrive here.
    if constexpr (C.cluster > 1) ptx::cluster_sync();
  }
};

template <WgmmaConfig C>
__device__ __forceinline__ void grouped_gemm(const WgmmaArgs& args) {
  GroupedGemm<C>::run(args);
}

}  // namespace octomoe::sm90
