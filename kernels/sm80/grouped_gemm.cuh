// INT8 grouped GEMM by mma.sync m16n8k32: SM80, SM86, SM89, and SM90 as well.
//
//   out[row, f] = epilogue( sum_k w[expert(row), f, k] * a[source(row), k] )
//
// Weights are the M operand in their natural layout [E, N, K], tokens the N operand: a tile of 8 tokens costs 8
// columns, not 128 padded rows. CTAs are persistent: a third of the warps copies, stage after stage and tile after
// tile, as far ahead as the ring allows, and the others multiply. So those spend no instruction on addresses, and the
// next tile's data arrive during this tile's epilogue.
//
//   copying warps:      global --cp.async 16 B--> shared ring [stages][block_m + block_n rows][block_k bytes]
//   multiplying warps:  ldmatrix.x4 --> fragments --mma.sync--> int32 sums --> epilogue
//
// Order::steps holds the sums of the whole warp tile and the fragments of two k32 steps. Order::tiles is for scales per
// K-block: it holds the promoted totals of the whole warp tile, the weight fragments of the whole stage (one K-block),
// and the partial sums of one token tile only; those enter the totals while the next token tile's mma run.
//
// Shared rows hold weight rows in fragment order: row mt*16 + h*8 + g of a warp's part holds weight row
// g*(2*MT) + 2*mt + h, so the thread that owns fragment rows g and g+8 of all MT m-tiles owns 2*MT neighbouring output
// columns and stores them in one instruction. 16-byte chunks of a row are swizzled by row & 7: ldmatrix and cp.async
// are free of bank conflicts.
//
// Rows past the end of an expert, and weight rows past N, are copies of others or old data: their results are not
// stored. Columns past K are zero.
#pragma once

#include "core/chunks.cuh"
#include "core/gemm_config.h"
#include "core/numerics.cuh"
#include "core/tile_list.cuh"
#include "ptx/grid.cuh"
#include "ptx/sm80.cuh"

namespace octomoe::sm80 {

using kernels::ChunkCount;
using kernels::Epilogue;
using kernels::GemmArgs;
using kernels::GemmConfig;
using kernels::NextTile;
using kernels::Order;
using kernels::OutType;
using kernels::Promotion;
using kernels::Tile;
using kernels::TileList;

template <GemmConfig C>
struct GroupedGemm {
  static constexpr int kThreads = C.threads(), kWarps = C.warps_m * C.warps_n;  // kWarps: those that multiply
  static constexpr int kCopyThreads = 32 * C.copy_warps();
  static constexpr int kChunks = C.block_k / 16;               // 16-byte chunks of a shared row
  static constexpr int kRowsPerPass = kCopyThreads / kChunks;  // rows that one cp.async of the copying warps covers
  static constexpr int kPassesW = C.block_m / kRowsPerPass, kPassesA = (C.block_n + kRowsPerPass - 1) / kRowsPerPass;
  static constexpr int kSources = (C.block_n + kCopyThreads - 1) / kCopyThreads;  // tokens that each of them looks up
  static constexpr bool kBlocks = C.has_blocks();
  static constexpr bool kFlush = C.promotion == Promotion::hybrid_flush;
  static constexpr bool kFloatTotals = C.promotion == Promotion::block;
  static constexpr int kMT = C.warp_m() / 16;                     // m16 tiles of a warp
  static constexpr int kNT = C.warp_n() / 8;                      // n8 tiles of a warp
  static constexpr int kSteps = C.block_k / 32;                   // k32 steps of a stage
  static constexpr int kColumns = 2 * kMT;                        // weight rows a thread owns
  static constexpr int kOutColumns = C.gated() ? kMT : kColumns;  // neighbouring output columns a thread owns
  static constexpr int kHalves = C.gated() ? 2 : 1;
  static constexpr int kTables = C.stages + 1;
  // SM90: tiles of so many tokens need more registers than each of twelve warps may have. Those that copy give up
  // theirs.
  static constexpr bool kMovesRegisters = kWarps == 8 && (C.block_n > 96 || (kFlush && C.block_n > 64));
  static constexpr int kRegisters = 208, kCopyRegisters = 88;  // 256 and 128 threads, of 168 each
  // Places of fragments stay in registers where there are enough of them: an exclusive or is an instruction beside mma.
  static constexpr bool kKeepsPlaces =
      kMovesRegisters || C.promotion == Promotion::hybrid || (C.block_n <= 64 && !kFlush);
  static constexpr int kGroup = C.group();
  // The later groups of a tile this wide are kept apart: of all together, too many partial sums would be in registers.
  static constexpr bool kSplits = kBlocks && C.order == Order::tiles && !C.gated() && C.block_n > 128;
  // Order::tiles: the scales of a stage's weights travel with the stage, one for each kScaleRows rows.
  static constexpr bool kStageScales = kBlocks && C.order == Order::tiles;
  static constexpr int kScaleRows = 8;  // neighbouring weight rows share a block row in multiples of this many
  // And so do a chunk's (hybrid_flush), with its last stage.
  static constexpr bool kChunkScales = kFlush && kStageScales;
  // Tables and chunks' scales have places that are used in turn: one more than stages, since a stage is released before
  // what lies beside it is read for the last time.
  static __device__ __forceinline__ int next_place(int place) { return place + 1 == kTables ? 0 : place + 1; }

  // A tile is computed as wide as its rows need: each warp takes kNT of its token tiles, or fewer by kWidthStep.
  static constexpr int kWidthStep = C.step_n() / (8 * C.warps_n), kLeastTiles = (kNT - 1) % kWidthStep + 1;

  // Whether tiles are taken (Queue): those of few tokens would gain less than the queue costs them.
  static constexpr bool kTakes = C.block_n >= 64;
  static constexpr int kShort = 8;  // stages; a longer tile's successor is asked for while it is under way

  static_assert(C.block_k == 128, "the swizzle is made for rows of 128 bytes");
  static_assert(C.warp_m() % (C.gated() ? 32 : 16) == 0 && C.warp_n() % 8 == 0);
  static_assert(C.block_m % kRowsPerPass == 0 && C.stages >= 2);
  static_assert((C.warp_m() & (C.warp_m() - 1)) == 0, "feature_of must be a sum over the bits of s");
  static_assert(C.block_m <= 32 * kScaleRows);
  static_assert(C.order == Order::steps ? !kBlocks || C.fine_groups : !C.fine_groups);

  static __device__ __forceinline__ uint32_t swizzled(int row, int chunk) {
    return static_cast<uint32_t>(row * 128 + ((chunk ^ (row & 7)) << 4));
  }

  // Shared row s of a tile holds output column feature_of(s) of the tile; gated tiles: of gate or, is_up(s), of up.
  static __device__ __forceinline__ constexpr int feature_of(int s) {
    const int warp = s / C.warp_m(), mt = s % C.warp_m() / 16, h = s % 16 / 8, g = s % 8;
    return C.gated() ? warp * (C.warp_m() / 2) + g * kMT + 2 * (mt % (kMT / 2)) + h
                     : warp * C.warp_m() + g * kColumns + 2 * mt + h;
  }
  static __device__ __forceinline__ constexpr bool is_up(int s) { return C.gated() && s % C.warp_m() / 16 >= kMT / 2; }
  // Both are sums of what the bits of s contribute, and is_up takes none of those below kRowsPerPass: the row of pass p
  // is the row of pass 0 plus a constant, and so is its place, swizzled.
  static_assert(kRowsPerPass % 8 == 0 && (kRowsPerPass & (kRowsPerPass - 1)) == 0);
  static_assert(!C.gated() || kRowsPerPass <= C.warp_m() / 2);

  // ---- shared memory ----
  // A stage: weight rows, tokens, scales of tokens and of weights. It begins at a multiple of 128 bytes: a row's eight
  // copies are one line then (docs/kernels.md). Behind the ring, tables, chunks' scales, two barriers a stage. A tile's
  // table is what the epilogue needs, written with the tile's first stage.
  static constexpr int kRingBytes = C.stages * C.stage_bytes();
  static constexpr int kChunkScalesAt = kRingBytes + kTables * C.table_bytes();
  static constexpr int kBarriersAt = kChunkScalesAt + kTables * C.chunk_bytes();
  static_assert(C.stage_bytes() % 128 == 0 && kBarriersAt % 16 == 0);
  static_assert(kBarriersAt + 16 * C.stages <= C.pipeline_bytes());
  struct alignas(16) Table {
    Tile tile;                 // rows -1: there is no further tile
    float a_scale[C.block_n];  // block: unused
    float factor[C.block_n];   // row_factor
    int32_t zero[C.block_n];   // channel: a_zero; hybrid_flush with fine groups: rows of a
    // Of the tile's weight rows, gated: gate rows before up rows. channel: scales. Otherwise of each kScaleRows rows
    // the block row, and before those, hybrid: scales.
    float w_scale[C.block_m];
    __device__ __forceinline__ int32_t& block_row(int i) {
      return reinterpret_cast<int32_t*>(w_scale)[C.block_m / kScaleRows + i];
    }
    __device__ __forceinline__ int32_t block_row(int i) const {
      return reinterpret_cast<const int32_t*>(w_scale)[C.block_m / kScaleRows + i];
    }
    // kChunkScales: the place of its first chunk's scales.
    __device__ __forceinline__ int32_t& first_chunk() { return reinterpret_cast<int32_t*>(w_scale)[C.block_m - 1]; }
    __device__ __forceinline__ int32_t first_chunk() const {
      return reinterpret_cast<const int32_t*>(w_scale)[C.block_m - 1];
    }
  };
  static_assert(sizeof(Table) == C.table_bytes());
  static __device__ __forceinline__ Table* tables(uint8_t* shared) {
    return reinterpret_cast<Table*>(shared + kRingBytes);
  }

  static __device__ __forceinline__ int rows_of_half(const GemmArgs& args) { return C.gated() ? args.n / 2 : args.n; }
  // The weight row of output column `feature`; gated: of gate (half 0) or up (half 1).
  static __device__ __forceinline__ int weight_row(const GemmArgs& args, int feature, int half) {
    return feature + (C.gated() && half != args.up_first ? args.n / 2 : 0);
  }
  // The scale block of a weight row: the halves of a w13 restart at a block, also where its two halves are not gated
  // here.
  static __device__ __forceinline__ int32_t block_row(const GemmArgs& args, int expert, int feature, int half) {
    const int rows = args.n / args.segments, per_segment = (rows + args.block_n - 1) / args.block_n;
    const int row = min(feature, rows_of_half(args) - 1);
    const int segment = C.gated() ? half != args.up_first : row / rows;
    return expert * args.blocks_n + segment * per_segment + (C.gated() ? row : row - segment * rows) / args.block_n;
  }

  // The stage at `at` of the ring that begins at `begin`, and its barriers: "full", that the stage's copies have
  // landed, and behind it "empty", that all have read it. Addresses and no index: what follows from one is an
  // instruction.
  struct Slot {
    uint32_t begin, at, full, parity;
    __device__ __forceinline__ Slot(uint32_t begin, uint32_t parity)
        : begin(begin), at(begin), full(begin + kBarriersAt), parity(parity) {}

    __device__ __forceinline__ uint32_t empty() const { return full + 8; }
    __device__ __forceinline__ uint32_t chunk_scales(int32_t place) const {
      return begin + kChunkScalesAt + static_cast<uint32_t>(place) * C.chunk_bytes();
    }
    // The one behind it.
    __device__ __forceinline__ Slot next() const {
      Slot to = *this;
      const bool wraps = at == begin + (kRingBytes - C.stage_bytes());
      to.at = wraps ? begin : at + C.stage_bytes();
      to.full = wraps ? begin + kBarriersAt : full + 16;
      to.parity ^= wraps ? 1u : 0u;
      return to;
    }
  };

  // A CTA's tiles, as its copying warps see them. At first one of each gridDim in turn, and of those not always the
  // same one: otherwise a CTA would get the short last tile of every expert, and another none. After so many turns,
  // where there is a counter, whichever is next when this CTA is about to need one, so that none ends long before
  // another.
  struct Queue {
    const GemmArgs& args;
    NextTile& next;
    const int32_t total, turns;
    int32_t index = static_cast<int32_t>(blockIdx.x), turn = 0;
    int32_t before = 0;  // of the thread that takes tiles: how many had been asked for
    // Of those that copy, known to be that of a whole warp.
    const bool first_warp = __shfl_sync(0xffffffffu, static_cast<int>(threadIdx.x) / 32, 0) == kWarps;

    // Asking delays short tiles. Where sums per K-block are short, only those few are asked for that even out how long
    // CTAs take; of the shortest, none. Not with SwiGLU, whose K is the hidden size: a model's is longer, and a choice
    // at run time costs its main loop 1 % (docs/kernels.md).
    static __device__ __forceinline__ int32_t dealt_turns(int32_t total, int32_t k_tiles) {
      if (!kBlocks || C.gated() || k_tiles > kShort) return 1;
      return k_tiles > kShort / 2 ? max(total / static_cast<int32_t>(gridDim.x) * 3 / 4, 1) : total;
    }
    __device__ __forceinline__ Queue(const GemmArgs& args, NextTile& next, int32_t total, int32_t k_tiles)
        : args(args), next(next), total(total), turns(dealt_turns(total, k_tiles)) {}

    __device__ __forceinline__ bool ended() const { return index >= total; }
    // Whether this tile's successor is asked for.
    __device__ __forceinline__ bool asks() const { return kTakes && args.taken != nullptr && turn + 1 >= turns; }
    __device__ __forceinline__ uint32_t phase() const { return static_cast<uint32_t>(turn + 1 - turns) & 1; }
    // All copying warps, who have read what they were told last; it is a while before one needs the answer.
    __device__ __forceinline__ void ask(int thread) {
      if (!asks()) return;
      __syncwarp();  // all lanes have read it
      if (lane() == 0) ptx::barrier_arrive(ptx::shared_address(&next.empty));
      if (first_warp) {
        ptx::barrier_wait(ptx::shared_address(&next.empty), phase());
        if (thread == 0) before = atomicAdd(args.taken, 1);
      }
    }
    __device__ __forceinline__ void advance(int thread) {
      const auto ctas = static_cast<int32_t>(gridDim.x);
      if (!asks()) {
        const int32_t inside = index - turn * ctas;
        index += inside + 1 == ctas ? 1 : ctas + 1;
      } else {
        const uint32_t full = ptx::shared_address(&next.full);
        if (thread == 0) {
          const int32_t first = turns * ctas;
          // For each tile there it was asked, and once more by each CTA: so that was the last time.
          if (before == total - first + ctas - 1) *args.taken = 0;
          next.tile = first + before;
          ptx::barrier_arrive(full);
        }
        ptx::barrier_wait(full, phase());
        index = ptx::uniform(next.tile);
      }
      ++turn;
    }
  };

  // The copying warps. A thread copies one 16-byte chunk of the weight rows first(), first() + kRowsPerPass, ... and of
  // the tokens first(), ... Of those, the threads that copy the same rows look up the places in a by turns; who looks a
  // token up also brings its scales.
  struct Producer {
    const GemmArgs& args;
    const TileList& list;
    Table* tables;
    NextTile& told;
    int32_t m_tiles, total, k_tiles, thread;
    Slot at;

    __device__ __forceinline__ int first() const { return thread / kChunks; }
    __device__ __forceinline__ int chunk() const { return thread % kChunks; }
    __device__ __forceinline__ int token(int i) const { return first() + kRowsPerPass * (chunk() + kChunks * i); }
    static __device__ __forceinline__ bool in_tile(int token) {
      return C.block_n % kCopyThreads == 0 || token < C.block_n;
    }

    __device__ __forceinline__ void load_sources(const Tile& t, int32_t (&source)[kSources]) const {
#pragma unroll
      for (int i = 0; i < kSources; ++i) {
        const int32_t row = t.row_begin + min(token(i), t.rows - 1);
        source[i] = args.row_source != nullptr ? args.row_source[row] : row;
      }
    }

    // What the epilogue needs of a tile, beside its first stage. Returns the block row of weight rows thread *
    // kScaleRows and behind.
    __device__ __forceinline__ int32_t fill_table(const Tile& t, Table& to, const int32_t (&source)[kSources]) const {
      if (thread == 0) to.tile = t;
#pragma unroll
      for (int i = 0; i < kSources; ++i) {
        const int r = token(i);
        if (!in_tile(r)) break;
        if (args.row_factor != nullptr) {
          const int32_t row = t.row_begin + min(r, t.rows - 1);
          ptx::cp_async_4(ptx::shared_address(&to.factor[r]), args.row_factor + row, true);
        } else if constexpr (!kFloatTotals) {  // block reads none then
          to.factor[r] = 1.0f;
        }
        if constexpr (C.promotion == Promotion::channel || C.promotion == Promotion::hybrid) {
          ptx::cp_async_4(ptx::shared_address(&to.a_scale[r]), args.a_scale + source[i], true);
        }
        if constexpr (C.promotion == Promotion::channel) {
          if (args.a_zero != nullptr) ptx::cp_async_4(ptx::shared_address(&to.zero[r]), args.a_zero + source[i], true);
        } else if constexpr (kFlush && !kChunkScales) {
          to.zero[r] = source[i];
        }
      }
      if constexpr (C.promotion == Promotion::channel) {
#pragma unroll
        for (int i = 0; i < C.block_m; i += kCopyThreads) {
          const int half = (i + thread) / C.features(), inside = (i + thread) % C.features();
          const int column = t.m_tile * C.features() + inside;
          const int64_t from = args.w_scale_per_tensor
                                   ? t.expert
                                   : static_cast<int64_t>(t.expert) * args.n + weight_row(args, column, half);
          ptx::cp_async_4_if(i + thread < C.block_m && column < rows_of_half(args),
                             ptx::shared_address(&to.w_scale[i + thread]), args.w_scale + from);
        }
        return 0;
      } else {
        const int column = thread * kScaleRows;
        if (column >= C.block_m) return 0;
        const int32_t row =
            block_row(args, t.expert, t.m_tile * C.features() + column % C.features(), column / C.features());
        to.block_row(thread) = row;
        if constexpr (C.promotion == Promotion::hybrid) {
          ptx::cp_async_4(ptx::shared_address(&to.w_scale[thread]), args.w_scale + static_cast<int64_t>(row), true);
        }
        return row;
      }
    }

    // Where a tile's scales of tokens and weights are, K-block after K-block.
    struct ScaleCursor {
      const int32_t* tokens;  // of the K-block
      uint32_t row[kSources];
      uint32_t place[kSources];  // in a stage's scales
      int64_t weights;           // index of that of weight rows thread * kScaleRows and behind
    };
    __device__ __forceinline__ void open(ScaleCursor& cursor, int32_t scale_row,
                                         const int32_t (&source)[kSources]) const {
      cursor.tokens = C.promotion == Promotion::block ? reinterpret_cast<const int32_t*>(args.a_scale) : args.a_q;
#pragma unroll
      for (int i = 0; i < kSources; ++i) {
        cursor.row[i] = static_cast<uint32_t>(source[i]);
        cursor.place[i] = static_cast<uint32_t>(ptx::here(static_cast<int32_t>(scale_place(token(i)))));
      }
      cursor.weights = static_cast<int64_t>(scale_row) * args.blocks_k;
    }
    // The scales of a stage's tokens and weights.
    __device__ __forceinline__ void copy_scales(uint32_t stage, int32_t k_tile, ScaleCursor& cursor) const {
#pragma unroll
      for (int g = 0; g < C.scales_per_stage(); ++g) {
        int64_t from = 0;
        if constexpr (C.fine_groups) {
          from = min((k_tile * C.block_k + g * 32) / args.block_k, args.blocks_k - 1) * args.a_rows;
        }
#pragma unroll
        for (int i = 0; i < kSources; ++i) {
          ptx::cp_async_4_if(in_tile(token(i)), scales_of(stage, g) + cursor.place[i],
                             cursor.tokens + from + cursor.row[i]);
        }
      }
      if constexpr (!C.fine_groups) cursor.tokens += args.a_rows;
      if constexpr (kStageScales) {
        const uint32_t to = weight_scales_of(stage) + static_cast<uint32_t>(thread) * 4;
        const bool has = thread < C.block_m / kScaleRows;
        if constexpr (C.promotion == Promotion::block) {
          ptx::cp_async_4_if(has, to, args.w_scale + cursor.weights);
        } else {  // a byte; its word
          ptx::cp_async_4_if(has, to, args.w_q + (cursor.weights & ~int64_t{3}));
        }
        ++cursor.weights;
      }
    }

    // Those of a chunk's tokens and weights, of one of the super groups.
    __device__ __forceinline__ void copy_chunk_scales(uint32_t to, int32_t group, int32_t scale_row,
                                                      const int32_t (&source)[kSources]) const {
#pragma unroll
      for (int i = 0; i < kSources; ++i) {
        const int r = token(i);
        ptx::cp_async_4_if(in_tile(r), to + r * 4, args.a_scale + (group * args.a_rows + source[i]));
      }
      ptx::cp_async_4_if(thread < C.block_m / kScaleRows, to + (C.block_n + thread) * 4,
                         args.w_scale + (static_cast<int64_t>(scale_row) * super_groups(args) + group));
    }

    // What a thread copies of a tile: its 16 bytes of each of its weight rows and tokens, from stage to stage. What
    // differs from row to row stays, what all have in common moves on: two additions a copy, and none between stages.
    struct Cursor {
      const int8_t* w;                // of the expert, at the stage's columns
      uint32_t row[kPassesW];         // from there
      const int8_t* token[kPassesA];  // at column 0
      int64_t column = 0;
      int32_t passes;  // of tokens
      ScaleCursor scales;
      ChunkCount count;
      int32_t group = 0, scale_row = 0;
    };
    __device__ __forceinline__ void open(Cursor& cursor, const Tile& t, const int32_t (&source)[kSources]) const {
      const int32_t feature = t.m_tile * C.features() + feature_of(first()), last_row = rows_of_half(args) - 1;
      const int32_t to_gate = weight_row(args, 0, 0), to_up = weight_row(args, 0, 1);
      cursor.w = args.w + static_cast<int64_t>(t.expert) * args.n * args.k;
#pragma unroll
      for (int p = 0; p < kPassesW; ++p) {
        const int32_t row =
            min(feature + feature_of(p * kRowsPerPass), last_row) + (is_up(p * kRowsPerPass) ? to_up : to_gate);
        cursor.row[p] =
            static_cast<uint32_t>(row) * static_cast<uint32_t>(args.w_row) + static_cast<uint32_t>(chunk() * 16);
      }
#pragma unroll
      for (int p = 0; p < kPassesA; ++p) {
        const int32_t from = __shfl_sync(0xffffffffu, source[p / kChunks], lane() / kChunks * kChunks + p % kChunks);
        cursor.token[p] = args.a + static_cast<int64_t>(from) * args.k + chunk() * 16;
      }
      cursor.passes = ptx::uniform((t.rows + kRowsPerPass - 1) / kRowsPerPass);
    }
    __device__ __forceinline__ void copy_columns(Cursor& cursor) const {
      const uint32_t to = at.at + swizzled(first(), chunk());
      const bool inside = cursor.column + chunk() * 16 < args.k;
#pragma unroll
      for (int p = 0; p < kPassesW; ++p) {
        ptx::cp_async_16(to + p * kRowsPerPass * C.block_k, cursor.w + cursor.row[p], inside);
      }
      const auto copy_token = [&](int p, bool exists) {
        ptx::cp_async_16_if(exists, to + (C.block_m + p * kRowsPerPass) * C.block_k, cursor.token[p] + cursor.column,
                            inside);
      };
      // Most tiles are full: then no copy costs a predicate.
      if (C.block_n % kRowsPerPass == 0 && cursor.passes == kPassesA) {
#pragma unroll
        for (int p = 0; p < kPassesA; ++p) copy_token(p, true);
      } else {
#pragma unroll
        for (int p = 0; p < kPassesA; ++p) {
          copy_token(p, p < cursor.passes && (C.block_n % kRowsPerPass == 0 || p * kRowsPerPass + first() < C.block_n));
        }
      }
      cursor.column += C.block_k;
      cursor.w += args.w_panel;
    }
    // kFirst: of the tile.
    template <bool kFirst>
    __device__ __forceinline__ void copy_stage(Cursor& cursor, const Tile& t, const int32_t (&source)[kSources],
                                               int32_t k_tile, int& table, int& chunk_place) {
      ptx::barrier_wait(at.empty(), at.parity);
      copy_columns(cursor);
      if constexpr (kFirst) {
        cursor.scale_row = fill_table(t, tables[table], source);
        if constexpr (kBlocks) open(cursor.scales, cursor.scale_row, source);
        if (kChunkScales && thread == 0) tables[table].first_chunk() = chunk_place;
        table = next_place(table);
        __syncwarp();
      }
      if constexpr (kBlocks) copy_scales(at.at, k_tile, cursor.scales);
      if constexpr (kChunkScales) {
        if (cursor.count.ends(args, k_tile + 1 == k_tiles)) {
          copy_chunk_scales(at.chunk_scales(chunk_place), cursor.group, cursor.scale_row, source);
          cursor.group += cursor.count.next(args);
          chunk_place = next_place(chunk_place);
        }
      }
      arrive();
    }

    __device__ __forceinline__ void run() {
      Queue queue(args, told, total, k_tiles);
      if (queue.ended()) return;
      // Stages before a tile's end at which the next one is asked for, and looked up. A tile that is too short for an
      // answer to come in time is asked for when the one before it is looked up.
      constexpr int32_t kAsk = 4, kLook = 2;
      const int32_t look_at = max(k_tiles - kLook, 0), ask_at = k_tiles > kShort ? k_tiles - kAsk : look_at;
      const bool is_short = ask_at == look_at;
      if (is_short) queue.ask(thread);
      Tile t = kernels::find_tile<C.block_n>(list, args, queue.index, m_tiles), next = t;
      int32_t source[kSources], next_source[kSources] = {};
      load_sources(t, source);
      int table = 0, chunk_place = 0;
      for (;;) {
        Cursor cursor;
        open(cursor, t, source);
        copy_stage<true>(cursor, t, source, 0, table, chunk_place);
        int32_t k_tile = 1;
        for (int event = 0; event < 3; ++event) {
          const int32_t last = event == 0 ? ask_at : event == 1 ? look_at : k_tiles - 1;
#pragma unroll 1
          for (; k_tile <= last; ++k_tile) copy_stage<false>(cursor, t, source, k_tile, table, chunk_place);
          // The next tile and its rows are looked up while this one's copies are under way.
          if (event == 1) {
            queue.advance(thread);
            if (!queue.ended()) {
              next = kernels::find_tile<C.block_n>(list, args, queue.index, m_tiles);
              load_sources(next, next_source);
            }
          }
          if (event == (is_short ? 1 : 0) && !queue.ended()) queue.ask(thread);
        }
        if (queue.ended()) break;
        t = next;
#pragma unroll
        for (int i = 0; i < kSources; ++i) source[i] = next_source[i];
      }
      // A stage that says that there is no further tile.
      ptx::barrier_wait(at.empty(), at.parity);
      if (thread == 0) tables[table].tile.rows = -1;
      __syncwarp();
      arrive();
      ptx::cp_async_wait<0>();
    }
    // Of a stage: each thread arrives when its copies land; a warp once more for what it stored, behind a __syncwarp.
    // By a shuffle the compiler knows that all lanes name the same barrier: otherwise it makes a loop over those that
    // differ.
    __device__ __forceinline__ void arrive() {
      const auto full = static_cast<uint32_t>(__shfl_sync(0xffffffffu, static_cast<int>(at.full), 0));
      ptx::cp_async_arrive(full);
      if (lane() == 0) ptx::barrier_arrive(full);
      at = at.next();
    }
  };

  static __device__ __forceinline__ int32_t super_groups(const GemmArgs& args) {
    return (args.blocks_k + args.super_group - 1) / args.super_group;
  }

  using Sums = int32_t[kMT][kNT][4];
  static __device__ __forceinline__ int lane() { return static_cast<int>(threadIdx.x) & 31; }

  // ---- fragments ----
  // The swizzle leaves 16-byte chunk c of a lane's row at (place of chunk 0) ^ c*16, whatever the row. The places of
  // all steps are made before the main loop, where registers allow it.
  static __device__ __forceinline__ uint32_t place_of_chunk(uint32_t first, int chunk) {
    const uint32_t place = first ^ static_cast<uint32_t>(chunk * 16);
    return kKeepsPlaces ? static_cast<uint32_t>(ptx::here(static_cast<int32_t>(place))) : place;
  }
  struct WeightPlaces {
    uint32_t of_step[kSteps];
    __device__ __forceinline__ explicit WeightPlaces(int warp_m) {
      const uint32_t first = swizzled(warp_m * C.warp_m() + (lane() & 15), lane() >> 4);
#pragma unroll
      for (int step = 0; step < kSteps; ++step) of_step[step] = place_of_chunk(first, step * 2);
    }
  };
  static __device__ __forceinline__ void load_weights(uint32_t (&w)[kMT][4], uint32_t stage, const WeightPlaces& places,
                                                      int step) {
#pragma unroll
    for (int mt = 0; mt < kMT; ++mt) ptx::ldmatrix_x4(w[mt], stage + places.of_step[step] + mt * 16 * C.block_k);
  }

  // Order::steps: fragments of one k32 step.
  template <int kN>
  struct Fragments {
    uint32_t w[kMT][4];
    uint32_t a[kN][2];

    struct TokenPlaces {
      uint32_t of_step[kSteps];
      __device__ __forceinline__ explicit TokenPlaces(int first_token) {
        const uint32_t first = swizzled(C.block_m + first_token + (lane() >> 4) * 8 + (lane() & 7), lane() >> 3 & 1);
#pragma unroll
        for (int step = 0; step < kSteps; ++step) of_step[step] = place_of_chunk(first, step * 2);
      }
    };
    __device__ __forceinline__ void load(uint32_t stage, const WeightPlaces& weights, const TokenPlaces& places,
                                         int step) {
      load_weights(w, stage, weights, step);
      const uint32_t tokens = stage + places.of_step[step];
#pragma unroll
      for (int nt = 0; nt + 1 < kN; nt += 2) {
        uint32_t r[4];
        ptx::ldmatrix_x4(r, tokens + nt * 8 * C.block_k);
        a[nt][0] = r[0];
        a[nt][1] = r[1];
        a[nt + 1][0] = r[2];
        a[nt + 1][1] = r[3];
      }
      if constexpr (kN % 2 == 1) {  // lanes 16 to 31 give no address
        ptx::ldmatrix_x2(a[kN - 1][0], a[kN - 1][1],
                         (lane() >= 16 ? tokens - 8 * C.block_k : tokens) + (kN - 1) * 8 * C.block_k);
      }
    }
  };

  // Order::tiles: the four k32 steps of one token tile.
  struct TokenFragment {
    uint32_t r[4][2];
    struct Places {
      uint32_t of_half[2];
      __device__ __forceinline__ explicit Places(int first_token) {
        const uint32_t first = swizzled(C.block_m + first_token + (lane() & 7), lane() >> 3);
#pragma unroll
        for (int h = 0; h < 2; ++h) of_half[h] = place_of_chunk(first, h * 4);
      }
    };
    __device__ __forceinline__ void load_half(uint32_t stage, const Places& places, int nt, int h) {
      uint32_t x[4];
      ptx::ldmatrix_x4(x, stage + places.of_half[h] + nt * 8 * C.block_k);
      r[2 * h][0] = x[0];
      r[2 * h][1] = x[1];
      r[2 * h + 1][0] = x[2];
      r[2 * h + 1][1] = x[3];
    }
  };

  // ---- where a thread's sums belong ----
  // Sum [mt][nt][2h + j] is weight row (mt, h) and token nt*8 + (lane%4)*2 + j of the warp's part.
  struct Part {
    int32_t tiles;       // n8 tiles that are computed
    int32_t first, end;  // tokens of the tile; first >= end: none
    __device__ __forceinline__ Part(const Table& table, int warp_n) {
      const int32_t rows = ptx::uniform(table.tile.rows);
      tiles = kNT;
#pragma unroll
      for (int n = kNT - kWidthStep; n >= kLeastTiles; n -= kWidthStep) {
        if (rows <= n * 8 * C.warps_n) tiles = n;
      }
      first = warp_n * tiles * 8;
      end = min(first + tiles * 8, rows);
    }
    __device__ __forceinline__ int token(int nt) const { return first + nt * 8 + (lane() & 3) * 2; }
  };
  // First of the thread's output columns inside the tile.
  static __device__ __forceinline__ int feature_in_tile(int warp_m) {
    return warp_m * (C.features() / C.warps_m) + (lane() >> 2) * kOutColumns;
  }

  // ---- promotion: what a K-block's partial sums do ----
  // The block scheme starts its partial sums at 1.5 * 2^23 as float bits: |partial| <= 128 * 128 * 256 = 2^22, so the
  // bits read as a float are 12582912 + partial exactly, and a subtraction replaces the four times slower int-to-float
  // conversion.
  static constexpr int32_t kMagic = 0x4b400000;
  static constexpr int32_t kInitialSum = kFloatTotals ? kMagic : 0;
  static __device__ __forceinline__ float partial_to_float(int32_t sum) {
    return __fsub_rn(__int_as_float(sum), 12582912.0f);
  }
  // What the totals start from. Float: -0, so that the first fma gives the product itself, its sign included.
  static constexpr int32_t kMinusZero = static_cast<int32_t>(0x80000000u);
  static constexpr int32_t kEmptyTotal = kFloatTotals ? kMinusZero : 0;

  // Those of the first kN token tiles.
  template <int kN>
  static __device__ __forceinline__ void fill(Sums& sums, int32_t value) {
#pragma unroll
    for (int mt = 0; mt < kMT; ++mt) {
#pragma unroll
      for (int nt = 0; nt < kN; ++nt) {
#pragma unroll
        for (int i = 0; i < 4; ++i) sums[mt][nt][i] = value;
      }
    }
  }

  // Scales of a thread's weight rows for one K-block: s_w (block) or Q_w (hybrid). They share one block row, or two in
  // a gated tile: block_n is a multiple of 16.
  struct WeightScales {
    int32_t value[kHalves];
  };
  // Order::tiles: those of a stage. Q_w is a byte of the word there; which one depends on the row, and on K.
  struct StageScales {
    uint32_t word[kHalves], byte[kHalves] = {};
    __device__ __forceinline__ void open(const GemmArgs& args, const Table& table, int warp_m) {
#pragma unroll
      for (int h = 0; h < kHalves; ++h) {
        const int rows = (h * C.features() + feature_in_tile(warp_m)) / kScaleRows;
        word[h] = static_cast<uint32_t>(ptx::here(rows * 4));
        if constexpr (!kFloatTotals) {
          byte[h] = static_cast<uint32_t>(table.block_row(rows)) * static_cast<uint32_t>(args.blocks_k);
        }
      }
    }
    // One stage after another.
    __device__ __forceinline__ void load(WeightScales& to, uint32_t stage) {
#pragma unroll
      for (int h = 0; h < kHalves; ++h) {
        if constexpr (kFloatTotals) {
          to.value[h] = ptx::load_shared(weight_scales_of(stage) + word[h]);
        } else {
          to.value[h] = ptx::load_shared_byte(weight_scales_of(stage) + (word[h] | (byte[h]++ & 3u)));
        }
      }
    }
  };
  // Walks along K.
  struct WeightScaleCursor {
    using Element = kernels::Either<kFloatTotals, float, uint8_t>;
    const Element* at[kHalves];
    __device__ __forceinline__ void open(const GemmArgs& args, const int32_t (&rows)[kHalves]) {
#pragma unroll
      for (int h = 0; h < kHalves; ++h) {
        if constexpr (kFloatTotals) {
          at[h] = args.w_scale + static_cast<int64_t>(rows[h]) * args.blocks_k;
        } else {
          at[h] = args.w_q + static_cast<int64_t>(rows[h]) * args.blocks_k;
        }
      }
    }
    __device__ __forceinline__ void load(WeightScales& to) {
#pragma unroll
      for (int h = 0; h < kHalves; ++h) {
        if constexpr (kFloatTotals) {
          to.value[h] = __float_as_int(*at[h]++);
        } else {
          to.value[h] = *at[h]++;
        }
      }
    }
  };

  // s_a of two tokens or Q_a.
  struct TokenScales {
    int32_t value[2];
  };
  // Where those of a warp's token tiles are in a stage's scales.
  struct ScalePlaces {
    uint32_t even, odd;
    __device__ __forceinline__ explicit ScalePlaces(const Part& part)
        : even(scale_place(part.token(0))), odd(scale_place(part.token(1))) {}
    __device__ __forceinline__ uint32_t of(int nt) const {
      return (nt % 2 == 0 ? even : odd) + static_cast<uint32_t>(nt / 2) * 80;
    }
  };
  // Of kCount neighbouring token tiles; two: the first one even, and so is the first of its warp. kFactors: of block,
  // with row_factor.
  template <bool kFactors, int kCount>
  static __device__ __forceinline__ void load_token_scales(TokenScales (&to)[kCount], uint32_t scales,
                                                           const ScalePlaces& places, int nt, const Table& table,
                                                           const Part& part) {
    static_assert(kCount == 1 || kCount == 2);
    int32_t values[2 * kCount];
    ptx::load_shared_n(values, scales + places.of(nt));
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      to[i].value[0] = values[2 * i];
      to[i].value[1] = values[2 * i + 1];
      if constexpr (kFactors) {
        const int2 f = ptx::load_shared_2(ptx::shared_address(table.factor + part.token(nt + i)));
        to[i].value[0] = __float_as_int(__fmul_rn(__int_as_float(to[i].value[0]), __int_as_float(f.x)));
        to[i].value[1] = __float_as_int(__fmul_rn(__int_as_float(to[i].value[1]), __int_as_float(f.y)));
      }
    }
  }

  // What a partial sum is multiplied by.
  struct Products {
    int32_t value[kHalves][2];
    __device__ __forceinline__ void set(const WeightScales& w, const TokenScales& a) {
#pragma unroll
      for (int h = 0; h < kHalves; ++h) {
#pragma unroll
        for (int j = 0; j < 2; ++j) {
          value[h][j] = kFloatTotals ? __float_as_int(__fmul_rn(__int_as_float(w.value[h]), __int_as_float(a.value[j])))
                                     : w.value[h] * a.value[j];
        }
      }
    }
  };

  static __device__ __forceinline__ void promote_one(int32_t (&total)[4], const int32_t (&sums)[4], const Products& p,
                                                     int mt, int i) {
    const int32_t scale = p.value[C.gated() && mt >= kMT / 2][i % 2];
    if constexpr (kFloatTotals) {
      total[i] = __float_as_int(__fmaf_rn(partial_to_float(sums[i]), __int_as_float(scale), __int_as_float(total[i])));
    } else {
      total[i] += scale * sums[i];
    }
  }
  static __device__ __forceinline__ void promote(int32_t (&total)[4], const int32_t (&sums)[4], const Products& p,
                                                 int mt) {
#pragma unroll
    for (int i = 0; i < 4; ++i) promote_one(total, sums, p, mt, i);
  }

  // hybrid_flush: the float step at a chunk's end, with the scales of the thread's weight rows, and of two tokens.
  template <int kN, class TokenScales>
  static __device__ __forceinline__ void flush(const Table& table, const Part& part, const float (&w)[kHalves],
                                               const TokenScales& scales_of_tokens, Sums& total, Sums& v) {
#pragma unroll
    for (int nt = 0; nt < kN; ++nt) {
      const int token = part.token(nt);
      const float2 scales = scales_of_tokens(token), factor = *reinterpret_cast<const float2*>(table.factor + token);
#pragma unroll
      for (int j = 0; j < 2; ++j) {
        const float a = __fmul_rn(j == 0 ? scales.x : scales.y, j == 0 ? factor.x : factor.y);
#pragma unroll
        for (int mt = 0; mt < kMT; ++mt) {
          const float p = __fmul_rn(w[C.gated() && mt >= kMT / 2], a);
#pragma unroll
          for (int i = j; i < 4; i += 2) {
            v[mt][nt][i] = __float_as_int(__fmaf_rn(__int2float_rn(total[mt][nt][i]), p, __int_as_float(v[mt][nt][i])));
            total[mt][nt][i] = 0;
          }
        }
      }
    }
  }

  // ---- epilogue ----
  // docs/schemes.md section 3: v of the sums, bias included; section 6: swiglu.
  static __device__ __forceinline__ void finish_tile(const GemmArgs& args, const Table& table, const Sums& sums,
                                                     int warp_m, const Part& part) {
    if (args.bias == nullptr && args.a_zero == nullptr && num::bits(args.limit) == num::kInfBits &&
        (C.epilogue == Epilogue::swiglu || args.out_type == OutType::bf16)) {
      finish_tile<true>(args, table, sums, warp_m, part);
    } else {
      finish_tile<false>(args, table, sums, warp_m, part);
    }
  }
  // kPlain: no bias, no zero point, no limit, bf16: half the instructions.
  template <bool kPlain>
  static __device__ __forceinline__ void finish_tile(const GemmArgs& args, const Table& table, const Sums& sums,
                                                     int warp_m, const Part& part) {
    const Tile t = table.tile;
    const int width = rows_of_half(args), inside = feature_in_tile(warp_m), column = t.m_tile * C.features() + inside;
    if (column >= width) return;

    constexpr bool kScaled = C.promotion == Promotion::channel || C.promotion == Promotion::hybrid;
    const bool asymmetric = !kPlain && C.promotion == Promotion::channel && args.a_zero != nullptr;
    const bool has_bias = !kPlain && args.bias != nullptr;
    float w_scale[kMT][2], bias[kMT][2];
    int32_t column_sum[kMT][2];
#pragma unroll
    for (int mt = 0; mt < kMT; ++mt) {
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        const int half = C.gated() && mt >= kMT / 2, feature = 2 * (C.gated() ? mt % (kMT / 2) : mt) + h;
        const int64_t at = static_cast<int64_t>(t.expert) * args.n + weight_row(args, column + feature, half);
        w_scale[mt][h] = 0.0f;
        if constexpr (C.promotion == Promotion::channel)
          w_scale[mt][h] = table.w_scale[half * C.features() + inside + feature];
        if constexpr (C.promotion == Promotion::hybrid)
          w_scale[mt][h] = table.w_scale[(half * C.features() + inside) / kScaleRows];
        column_sum[mt][h] = asymmetric ? args.column_sum[at] : 0;
        bias[mt][h] = has_bias ? args.bias[at] : 0.0f;
      }
    }

    const int64_t element = C.epilogue != Epilogue::swiglu && args.out_type == OutType::f32 ? 4 : 2;
    const int64_t row_bytes = args.out_stride * element;
    uint8_t* to = static_cast<uint8_t*>(args.out) + (t.row_begin + part.token(0)) * row_bytes + column * element;
#pragma unroll
    for (int nt = 0; nt < kNT; ++nt) {
      const int token = part.token(nt);
      if (part.first + nt * 8 >= part.end) break;
      float a_scale[2] = {};
      int32_t zero[2] = {};
      if constexpr (kScaled) {
        const float2 a = *reinterpret_cast<const float2*>(table.a_scale + token);
        const float2 f = *reinterpret_cast<const float2*>(table.factor + token);
        a_scale[0] = __fmul_rn(a.x, f.x);
        a_scale[1] = __fmul_rn(a.y, f.y);
        if (asymmetric) {
          zero[0] = table.zero[token];
          zero[1] = table.zero[token + 1];
        }
      }
#pragma unroll
      for (int j = 0; j < 2; ++j) {
        const auto v = [&](int mt, int h) {
          const int32_t sum = sums[mt][nt][2 * h + j];
          float x = __int_as_float(sum);
          if constexpr (kScaled) {
            const int32_t acc = C.promotion == Promotion::channel && !kPlain ? sum - zero[j] * column_sum[mt][h] : sum;
            x = __fmul_rn(__int2float_rn(acc), __fmul_rn(w_scale[mt][h], a_scale[j]));
          }
          return has_bias ? __fadd_rn(x, bias[mt][h]) : x;
        };
        float out[kOutColumns];
#pragma unroll
        for (int c = 0; c < kOutColumns; ++c) {
          if constexpr (C.epilogue == Epilogue::swiglu) {
            float g = v(c / 2, c % 2), u = v(kMT / 2 + c / 2, c % 2);
            if constexpr (!kPlain) {
              g = num::min_nan(g, args.limit);
              u = num::clamp(u, -args.limit, args.limit);
            }
            out[c] = __fmul_rn(num::silu(g), u);
          } else {
            out[c] = v(c / 2, c % 2);
          }
        }
        store<kPlain>(args, token + j < part.end, to + j * row_bytes, width - column, out);
      }
      to += 8 * row_bytes;
    }
  }

  // kOutColumns neighbouring values of one row; a row's width is a multiple of 8, and so is the first column.
  template <bool kBf16>
  static __device__ __forceinline__ void store(const GemmArgs& args, bool wanted, uint8_t* to, int room,
                                               const float (&v)[kOutColumns]) {
    const OutType type = kBf16 || C.epilogue == Epilogue::swiglu ? OutType::bf16 : args.out_type;
    if (type == OutType::f32) {
#pragma unroll
      for (int c = 0; c < kOutColumns; c += 2) {
        const uint32_t pair[2] = {num::bits(num::canonical(v[c])), num::bits(num::canonical(v[c + 1]))};
        ptx::store_if(wanted && c < room, to + c * 4, pair);
      }
      return;
    }
    uint32_t packed[kOutColumns / 2];
    if (type == OutType::bf16) {
#pragma unroll
      for (int c = 0; c < kOutColumns; c += 2) packed[c / 2] = num::pack_bf16(v[c], v[c + 1]);
    } else {
#pragma unroll
      for (int c = 0; c < kOutColumns; c += 2) packed[c / 2] = num::pack_fp16(v[c], v[c + 1]);
    }
    ptx::store_if(wanted, to, packed);
  }

  // ---- the kernel ----
  static __device__ __forceinline__ void run(const GemmArgs& args) {
    extern __shared__ __align__(128) uint8_t shared[];
    __shared__ TileList list;
    __shared__ NextTile told;
    ptx::grid_dependency_wait();
    ptx::grid_dependency_launch();
    kernels::build_tile_list<C.block_n, kThreads>(list, args);
    const int32_t m_tiles = (rows_of_half(args) + C.features() - 1) / C.features();
    const int32_t total = ptx::uniform(list.first_tile[args.experts] * m_tiles);
    const int32_t k_tiles = ptx::uniform((args.k + C.block_k - 1) / C.block_k);
    const uint32_t begin = ptx::shared_address(shared);
    if (threadIdx.x == 0) {
      Slot slot(begin, 0);
      for (int i = 0; i < C.stages; ++i, slot = slot.next()) {
        ptx::barrier_init(slot.full, kCopyThreads + C.copy_warps());
        ptx::barrier_init(slot.empty(), kWarps);
      }
      ptx::barrier_init(ptx::shared_address(&told.full), 1);
      ptx::barrier_init(ptx::shared_address(&told.empty), C.copy_warps());
    }
    __syncthreads();
    // By a shuffle: so the compiler knows that a warp agrees on what follows from it, and keeps that in uniform
    // registers.
    const int warp = __shfl_sync(0xffffffffu, static_cast<int>(threadIdx.x) / 32, 0);
    if constexpr (kMovesRegisters) {
      warp >= kWarps ? ptx::lower_registers<kCopyRegisters>() : ptx::raise_registers<kRegisters>();
    }
    if (warp >= kWarps) {
      const int thread = static_cast<int>(threadIdx.x) - 32 * kWarps;
      Producer{args, list, tables(shared), told, m_tiles, total, k_tiles, thread, Slot(begin, 1)}.run();  // it is empty
      return;
    }
    if (static_cast<int32_t>(blockIdx.x) >= total) return;
    Ring ring(Slot(begin, 0));
    ptx::barrier_wait(ring.here.full, 0);
    multiply_tiles(args, ring, shared, warp, k_tiles);
  }

  // Scales of a stage's tokens (with fine groups: of each k32 step): 16 of them in 20 words, so that the copying warps,
  // whose lanes bring those of tokens 16 apart, store without bank conflicts. Among 16, the pairs of tokens j and j + 8
  // that a thread needs for two token tiles are neighbours.
  static __device__ __forceinline__ uint32_t scales_of(uint32_t stage, int group = 0) {
    return stage + (C.block_m + C.block_n) * C.block_k + static_cast<uint32_t>(group) * C.token_scale_bytes();
  }
  static __device__ __forceinline__ uint32_t scale_place(int token) {
    return static_cast<uint32_t>(token / 16 * 80 + token % 8 / 2 * 16 + token / 8 % 2 * 8 + token % 2 * 4);
  }
  static __device__ __forceinline__ uint32_t weight_scales_of(uint32_t stage) {
    return scales_of(stage, C.scales_per_stage());
  }

  // Where a warp that multiplies is in the ring.
  struct Ring {
    Slot here, next;
    __device__ __forceinline__ explicit Ring(const Slot& first) : here(first), next(first.next()) {}
    // When the stage's last fragments are in registers; afterwards the next stage may be read. There always is one, if
    // only that which says that there is no further tile; but `more`, of which the compiler does not know that it is
    // true, keeps the products of two stages apart (docs/kernels.md).
    __device__ __forceinline__ void stage_read(bool more) const {
      __syncwarp();
      if (lane() == 0) ptx::barrier_arrive(here.empty());
      if (more) ptx::barrier_wait(next.full, next.parity);
    }
    // Does nothing. But the compiler does not know that `never` is false, and keeps what stands before and behind
    // apart.
    __device__ __forceinline__ void split(bool never) const {
      if (never) ptx::barrier_wait(here.full, here.parity);
    }
    __device__ __forceinline__ void advance() {
      here = next;
      next = here.next();
    }
  };

  // A tile without rows for this warp leaves the tensor cores to others.
  static __device__ __forceinline__ void rest(Ring& ring, int32_t k_tiles) {
#pragma unroll 1
    for (int32_t k_tile = 0; k_tile < k_tiles; ++k_tile) {
      ring.stage_read(true);
      ring.advance();
    }
  }

  // The tiles of a CTA, by one of the warps that multiply.
  static __device__ __forceinline__ void multiply_tiles(const GemmArgs& args, Ring& ring, uint8_t* shared, int warp,
                                                        int32_t k_tiles) {
    const int warp_m = warp % C.warps_m, warp_n = warp / C.warps_m;
    // Not by next_place: a table's number would occupy a register beside its address.
    for (int at = 0;; at = at + C.table_bytes() == kTables * C.table_bytes() ? 0 : at + C.table_bytes()) {
      const Table& table = *reinterpret_cast<const Table*>(shared + kRingBytes + at);
      if (ptx::uniform(table.tile.rows) < 0) return;
      const Part part(table, warp_n);
      if (C.warps_n > 1 && part.first >= part.end) {
        rest(ring, k_tiles);
        continue;
      }
      Sums sums;
      if (kFloatTotals && args.row_factor != nullptr) {
        multiply_tile<kNT, kFloatTotals>(args, ring, table, warp_m, part, k_tiles, sums);
      } else {
        multiply_tile<kNT, false>(args, ring, table, warp_m, part, k_tiles, sums);
      }
      // Found anew: it would occupy a register beside the products.
      const int finishing = ptx::here(static_cast<int>(threadIdx.x)) / 32 % C.warps_m;
      finish_tile(args, table, sums, finishing, part);
    }
  }
  // kFactors: int8_block's scales of tokens are multiplied by row_factor.
  template <int kN, bool kFactors>
  static __device__ __forceinline__ void multiply_tile(const GemmArgs& args, Ring& ring, const Table& table, int warp_m,
                                                       const Part& part, int32_t k_tiles, Sums& sums) {
    if constexpr (kN > kLeastTiles) {
      if (part.tiles < kN) {
        return multiply_tile<kN - kWidthStep, kFactors>(args, ring, table, warp_m, part, k_tiles, sums);
      }
    }
    if constexpr (C.order == Order::steps) {
      multiply_steps<kN, kFactors>(args, ring, table, warp_m, part, k_tiles, sums);
    } else {
      multiply_stages<kN, kFactors>(args, ring, table, warp_m, part, k_tiles, sums);
    }
  }

  template <int kN>
  static __device__ __forceinline__ void promote_last(Sums& totals, const int32_t (&sums)[kMT][kGroup][4],
                                                      const Products (&products)[kGroup]) {
#pragma unroll
    for (int c = 0; c < kMT * kGroup; ++c) {
      promote(totals[c % kMT][kN - kGroup + c / kMT], sums[c % kMT][c / kMT], products[c / kMT], c % kMT);
    }
  }

  // Order::tiles.
  template <int kN, bool kFactors>
  static __device__ __forceinline__ void multiply_stages(const GemmArgs& args, Ring& ring, const Table& table,
                                                         int warp_m, const Part& part, int32_t k_tiles, Sums& sums) {
    const WeightPlaces weight_places(warp_m);
    const typename TokenFragment::Places token_places(part.first);
    [[maybe_unused]] const ScalePlaces scale_places(part);
    // The promotion of a group of token tiles starts this many mma after its last one and is spread over the others.
    constexpr int kValues = 4 * kMT * kGroup, kMma = kSteps * kMT * kGroup, kLag = kMT * kGroup >= 4 ? 3 : 2;
    Sums chunk;  // hybrid_flush
    Sums& totals = kFlush ? chunk : sums;
    fill<kN>(totals, kEmptyTotal);
    int32_t partial[2][kMT][kGroup][4];
    [[maybe_unused]] ChunkCount count;
    [[maybe_unused]] int chunk_place = kFlush ? table.first_chunk() : 0;
    if constexpr (kFlush) fill<kN>(sums, kMinusZero);
    Products pending[kGroup];
    WeightScales scales;
    StageScales stage_scales;
    if constexpr (kBlocks) stage_scales.open(args, table, warp_m);

    uint32_t w[kSteps][kMT][4];
    TokenFragment tokens[kGroup];
    TokenScales token_scales[kGroup];
#pragma unroll
    for (int step = 0; step < kSteps; ++step) load_weights(w[step], ring.here.at, weight_places, step);
#pragma unroll
    for (int i = 0; i < kGroup; ++i) {
      tokens[i].load_half(ring.here.at, token_places, i, 0);
      tokens[i].load_half(ring.here.at, token_places, i, 1);
    }
    if constexpr (kBlocks) {
      load_token_scales<kFactors>(token_scales, scales_of(ring.here.at), scale_places, 0, table, part);
      stage_scales.load(scales, ring.here.at);
    }

    for (int32_t k_tile = 0; k_tile < k_tiles; ++k_tile) {
      [[maybe_unused]] const bool last = k_tile + 1 == k_tiles;
      const uint32_t stage = ring.here.at, next = ring.next.at;
#pragma unroll
      for (int group = 0; group < kN / kGroup; ++group) {
        // What is loaded beside this group's mma is the next one's; after the tile's last stage nobody looks at it.
        const bool leaving = group == kN / kGroup - 1;
        const uint32_t from = leaving ? next : stage;
        const int first = leaving ? 0 : (group + 1) * kGroup;
        if (leaving) {
          ring.stage_read(args.k > 0);
        } else if (kSplits && 2 * group + 1 >= kN / kGroup) {
          ring.split(args.n < 0);
        }
#pragma unroll
        for (int step = 0; step < kSteps; ++step) {
#pragma unroll
          for (int chain = 0; chain < kGroup * kMT; ++chain) {
            const int member = chain / kMT, mt = chain % kMT;
            const uint32_t b0 = tokens[member].r[step][0], b1 = tokens[member].r[step][1];
            if constexpr (!kBlocks) {
              ptx::mma_s8(totals[mt][group * kGroup + member], w[step][mt], b0, b1);
            } else {
              int32_t(&sums)[4] = partial[group % 2][mt][member];
              if (step == 0) {
                ptx::mma_s8_from(sums, w[step][mt], b0, b1, kInitialSum);
              } else {
                ptx::mma_s8(sums, w[step][mt], b0, b1);
              }
              // The partial sums of the group before.
              const int at = step * kGroup * kMT + chain - kLag;
#pragma unroll
              for (int i = 0; i < kValues; ++i) {
                const int c = i / 4;
                if (group > 0 && at >= 0 && i * (kMma - kLag) / kValues == at) {
                  promote_one(totals[c % kMT][(group - 1) * kGroup + c / kMT],
                              partial[(group + 1) % 2][c % kMT][c / kMT], pending[c / kMT], c % kMT, i % 4);
                }
              }
            }
          }
          if (step % 2 == 1) {
#pragma unroll
            for (int i = 0; i < kGroup; ++i) tokens[i].load_half(from, token_places, first + i, step / 2);
          }
          if (leaving) load_weights(w[step], next, weight_places, step);
        }
        if constexpr (kBlocks) {
#pragma unroll
          for (int i = 0; i < kGroup; ++i) pending[i].set(scales, token_scales[i]);
          load_token_scales<kFactors>(token_scales, scales_of(from), scale_places, first, table, part);
          if (leaving) stage_scales.load(scales, next);
        }
      }
      // Not beside the next stage's: where one ends and the next begins, fragments of both need registers.
      if constexpr (kBlocks) promote_last<kN>(totals, partial[(kN / kGroup - 1) % 2], pending);
      if constexpr (kFlush) {
        if (count.ends(args, last)) {
          const uint32_t from = ring.here.chunk_scales(chunk_place);
          float scales_of_weights[kHalves];
#pragma unroll
          for (int h = 0; h < kHalves; ++h) {
            const int row = (h * C.features() + feature_in_tile(warp_m)) / kScaleRows;
            scales_of_weights[h] = __int_as_float(ptx::load_shared(from + (C.block_n + row) * 4));
          }
          const auto scales_of_tokens = [&](int token) {
            const int2 s = ptx::load_shared_2(from + token * 4);
            return make_float2(__int_as_float(s.x), __int_as_float(s.y));
          };
          flush<kN>(table, part, scales_of_weights, scales_of_tokens, chunk, sums);
          count.next(args);
          chunk_place = next_place(chunk_place);
        }
      }
      ring.advance();
    }
  }

  // Order::steps.
  template <int kN, bool kFactors>
  static __device__ __forceinline__ void multiply_steps(const GemmArgs& args, Ring& ring, const Table& table,
                                                        int warp_m, const Part& part, int32_t k_tiles, Sums& sums) {
    const WeightPlaces weight_places(warp_m);
    const typename Fragments<kN>::TokenPlaces token_places(part.first);
    [[maybe_unused]] const ScalePlaces scale_places(part);
    Sums block_sums, chunk;  // with scale blocks; hybrid_flush
    Sums& partial = kBlocks ? block_sums : sums;
    Sums& totals = kFlush ? chunk : sums;
    fill<kN>(partial, kInitialSum);
    if constexpr (kBlocks) fill<kN>(totals, kEmptyTotal);
    if constexpr (kFlush) fill<kN>(sums, kMinusZero);
    [[maybe_unused]] ChunkCount count;
    [[maybe_unused]] int32_t group = 0;
    int32_t rows[kHalves], block = 0, column_in_block = 0;
    WeightScaleCursor cursor;
    if constexpr (kBlocks) {
#pragma unroll
      for (int h = 0; h < kHalves; ++h) {
        rows[h] = table.block_row((h * C.features() + feature_in_tile(warp_m)) / kScaleRows);
      }
      cursor.open(args, rows);
    }
    Fragments<kN> fragments[2];
    fragments[0].load(ring.here.at, weight_places, token_places, 0);

    for (int32_t k_tile = 0; k_tile < k_tiles; ++k_tile) {
      const bool last = k_tile + 1 == k_tiles;
      const uint32_t stage = ring.here.at, next = ring.next.at;
#pragma unroll
      for (int step = 0; step < kSteps; ++step) {
        const Fragments<kN>& now = fragments[step % 2];
        // Scales per K-block: a block may end with any step, and the last one with K.
        bool ends = false;
        WeightScales weight_scales;
        TokenScales token_scales[kN][1];
        if constexpr (kBlocks) {
          column_in_block += 32;
          ends = block < args.blocks_k &&
                 (column_in_block == args.block_k || (k_tile * C.block_k + step * 32 + 32 >= args.k));
          if (ends) {
            cursor.load(weight_scales);
#pragma unroll
            for (int nt = 0; nt < kN; ++nt) {
              load_token_scales<kFactors>(token_scales[nt], scales_of(stage, step), scale_places, nt, table, part);
            }
          }
        }
        if (step == kSteps - 1) {
          ring.stage_read(args.k > 0);
          if (!last) fragments[0].load(next, weight_places, token_places, 0);
        } else {
          fragments[(step + 1) % 2].load(stage, weight_places, token_places, step + 1);
        }
#pragma unroll
        for (int nt = 0; nt < kN; ++nt) {
#pragma unroll
          for (int mt = 0; mt < kMT; ++mt) ptx::mma_s8(partial[mt][nt], now.w[mt], now.a[nt][0], now.a[nt][1]);
        }
        if constexpr (kBlocks) {
          if (ends) {
#pragma unroll
            for (int nt = 0; nt < kN; ++nt) {
              Products p;
              p.set(weight_scales, token_scales[nt][0]);
#pragma unroll
              for (int mt = 0; mt < kMT; ++mt) promote(totals[mt][nt], partial[mt][nt], p, mt);
            }
            fill<kN>(partial, kInitialSum);
            column_in_block = 0;
            ++block;
            if constexpr (kFlush) {
              if (count.ends(args, block == args.blocks_k)) {
                float scales_of_weights[kHalves];
#pragma unroll
                for (int h = 0; h < kHalves; ++h) {
                  scales_of_weights[h] = args.w_scale[static_cast<int64_t>(rows[h]) * super_groups(args) + group];
                }
                const float* const a_scale = args.a_scale + group * args.a_rows;
                const auto scales_of_tokens = [&](int token) {
                  return make_float2(a_scale[table.zero[token]], a_scale[table.zero[token + 1]]);
                };
                flush<kN>(table, part, scales_of_weights, scales_of_tokens, chunk, sums);
                group += count.next(args);
              }
            }
          }
        }
      }
      ring.advance();
    }
  }
};

template <GemmConfig C>
__device__ __forceinline__ void grouped_gemm(const GemmArgs& args) {
  GroupedGemm<C>::run(args);
}

}  // namespace octomoe::sm80
