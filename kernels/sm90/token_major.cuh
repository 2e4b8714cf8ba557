// INT8 grouped GEMM by wgmma with scales per K-block, for many rows of an expert, for SM90.
//
//   out[row, f] = epilogue( sum_b scale(row, f, b) * sum_{k in b} w[expert(row), f, k] * a[source(row), k] )
//
// Tokens are wgmma's M operand and weights its N operand, the other way round than in grouped_gemm.cuh: a thread's sums
// then belong to two tokens, so that a K-block's promotion needs two scales of tokens and one or two of weights, which
// stay in registers. With weights as M each sum pair has scales of its own, to be read from shared memory. The price is
// a tile whose tokens come in steps of 64.
//
//   tokens:  128 threads, cp.async 16 B gathered by row_source, or a TMA box a consumer -> [stage][128][128 bytes]
//   weights: a thread for each of two TMA boxes -----------------------------------> [stage][128 or 256][128 bytes]
//   scales:  a warp, cp.async 4 B -------------------------------------------------> [stage][128 + 2]
//            two consumers of 64 tokens: wgmma m64n128k32, a part of 128 weight rows after the other, int32 partial
//            sums -> promotion -> totals in registers -> epilogue -> global
//
// All copies of a stage arrive at one barrier. They are shared out over warps because their instructions are: one warp
// that asked for everything would take longer for a stage than the products do.
//
// Shared rows of 32 weight rows lie in an order that the tensor map makes out of the natural layout: shared row
// (j, q, e) = 8j + 2q + e holds row 8q + 2j + e, so that a thread's sums are eight neighbouring output columns.
#pragma once

#include "core/chunks.cuh"
#include "core/numerics.cuh"
#include "ptx/wgmma.cuh"
#include "sm90/tiles.cuh"

namespace octomoe::sm90 {

using kernels::ChunkCount;
using kernels::OutType;
using kernels::Promotion;
using kernels::TokenMajorConfig;

template <TokenMajorConfig C>
struct TokenMajor {
  static constexpr int kStages = C.stages, kParts = C.parts, kBlockN = C.kBlockN;
  static constexpr bool kFloatTotals = C.promotion == Promotion::block;
  static constexpr bool kFlush = C.promotion == Promotion::hybrid_flush;
  static constexpr bool kScaled = C.promotion == Promotion::hybrid;  // one float step, in the epilogue
  static constexpr int kStep = 64;                                   // tokens of a consumer
  static constexpr int kBoxBytes = C.box_rows() * C.kBlockK, kStepBytes = kStep * C.kBlockK;
  static constexpr int kSums = 64;  // of a thread and part
  // Scale blocks that a tile meets: gated, that of gate and that of up; otherwise a part's.
  static constexpr int kScales = 2;
  // 65536 registers over the multiprocessor's threads, in steps of 8.
  static constexpr int kTokenRegisters = 48, kWeightRegisters = 48, kConsumerRegisters = 208;
  static_assert(!kFlush || kParts == 1);                                    // three sets of sums
  static constexpr int32_t kMinusZero = static_cast<int32_t>(0x80000000u);  // fma(x, p, -0) is x * p, its sign included

  // ---- shared memory ----
  static constexpr int kTables = kStages + 1;  // producers may be as many tiles ahead as there are stages
  struct alignas(16) Table : AddTargets<C.adds() ? kBlockN : 0> {
    Tile tile;  // rows -1: there is no further tile
    float factor[kBlockN];
    float a_scale[kScaled ? kBlockN : 1];
    float w_scale[kScales];
    int32_t chunk;  // hybrid_flush: the place of its first chunk's scales
  };
  struct Shared {
    uint8_t weights[kStages][C.boxes()][kBoxBytes];
    uint8_t tokens[kStages][kBlockN / kStep][kStepBytes];
    int32_t a[kStages][kBlockN];  // block: s_a, hybrid: Q_a of the stage's K-block
    // scales_by_row: where in its word Q_a is.
    int32_t a_shift[C.has_shifts() ? kStages : 1][C.has_shifts() ? kBlockN : 1];
    // block: s_w of the scale blocks; hybrid: the words that hold Q_w, and by how much they are to be shifted.
    alignas(16) int32_t w[kStages][kFloatTotals ? kScales : 2 * kScales];
    Table table[kTables];
    // hybrid_flush: F of a chunk's tokens and scale blocks, copied with its last K-block. Places are used in turn, and
    // there is one more than stages, as of tables: a stage is released before its chunk's scales are read.
    float chunk_a[kFlush ? kTables : 1][kFlush ? kBlockN : 1];
    float chunk_w[kFlush ? kTables : 1][kScales];
    TileList list;
    Head head;
    bool plain;  // Consumer::finish; kept here because consumers have no register for it
    uint64_t full[kStages], empty[kStages];
    NextTile next;
  };
  static_assert(sizeof(Shared) <= C.pipeline_bytes());

  using Queue = TileQueue<true, 1>;
  // As in grouped_gemm.cuh.
  static constexpr bool kReadsEarly = C.epilogue == kernels::Epilogue::store;
  // At a stage: the tokens' threads, the weights' boxes, the scales' lanes and what their warp writes.
  static constexpr int kArrivals = 128 + C.boxes() + 32 + 1;
  // Of the queue: warps of the tokens, of the weights, of the scales.
  static constexpr int kReaders = 4 + C.boxes() + 1;

  static __device__ __forceinline__ int width(const GemmArgs& args) { return width_of<C.gated()>(args); }
  // Each role computes these itself: handed to all of them they would need registers, or local memory, in all.
  static __device__ __forceinline__ int32_t m_tiles(const GemmArgs& args) {
    return (width(args) + C.features() - 1) / C.features();
  }
  static __device__ __forceinline__ int32_t total(const Shared& shared, const GemmArgs& args) {
    return shared.list.first_tile[args.experts] * m_tiles(args);
  }
  // Stages of a tile, whole K-blocks: columns past K arrive as zeros.
  static __device__ __forceinline__ int32_t stages_of(const GemmArgs& args) {
    constexpr int kColumns = C.kBlockK * C.block_stages;
    return (args.k + kColumns - 1) / kColumns * C.block_stages;
  }
  static __device__ __forceinline__ Tile tile_at(const Shared& shared, const GemmArgs& args, int32_t index) {
    return find_tile<kStep, 1>(shared.list, args, index, m_tiles(args));
  }
  // Row of the scales of scale block i of a tile: [E, NB].
  static __device__ __forceinline__ int32_t scale_row(const GemmArgs& args, const Tile& t, int i) {
    return block_row<C.gated()>(args, t.expert, t.m_tile * C.features() + (C.gated() ? 0 : min(i, kParts - 1) * 128),
                                C.gated() ? i ^ args.up_first : 0);
  }

  static __device__ __forceinline__ int next_place(int place) { return place + 1 == kTables ? 0 : place + 1; }

  struct Producer {
    const WgmmaArgs& all;
    const GemmArgs& args;
    Shared& shared;

    __device__ __forceinline__ void wait_empty(const Slot<kStages>& s) const {
      ptx::barrier_wait(ptx::shared_address(&shared.empty[s.index]), s.phase);
    }
    __device__ __forceinline__ uint32_t full(const Slot<kStages>& s) const {
      return ptx::shared_address(&shared.full[s.index]);
    }

    // A tile's boxes of weights: where the first stage's lie, and how to come to the next one's.
    struct Boxes {
      int32_t column, unit;
      WeightSteps step;
      uint64_t hint;
      __device__ __forceinline__ Boxes(const WgmmaArgs& all, const Tile& t, int box)
          : column(0), step(all.gemm, 32), hint(all.evict_first != 0 ? kernels::kEvictFirst : kernels::kEvictNormal) {
        const int half = C.gated() ? box ^ all.gemm.up_first : 0;
        const int32_t inside = C.gated() ? half * width(all.gemm) : box * C.box_rows();
        unit = t.expert * step.expert + (t.m_tile * C.features() + inside) / 32;
      }
    };
    __device__ __forceinline__ void ask_for_box(Boxes& boxes, int box, const Slot<kStages>& slot) const {
      ptx::barrier_arrive_expect(full(slot), kBoxBytes);
      ptx::copy_box_5d(ptx::shared_address(shared.weights[slot.index][box]), &all.weights, boxes.column, 0, 0, 0,
                       boxes.unit, full(slot), boxes.hint);
      boxes.column += boxes.step.column;
      boxes.unit += boxes.step.unit;
    }

    // One thread of a box of weights. Nothing here depends on the kernel before.
    __device__ __forceinline__ void run_weights(int box) const {
      Slot<kStages> slot;
      slot.phase = 1;  // the ring is empty
      const int32_t k_tiles = stages_of(args);
      int32_t ahead = kReadsEarly ? shared.head.stages : 0;  // stages of the first tile that have been asked for
      pass_early(slot, ahead, 1, Queue::first() >= total(shared, args));
      if (kReadsEarly && shared.head.misses(shared.list)) ahead = 0;
      for (Queue queue; total(shared, args) > queue.index; queue.advance(shared.next, args.taken != nullptr)) {
        queue.ask(shared.next);
        Boxes boxes(all, tile_at(shared, args, queue.index), box);
#pragma unroll 1  // registers
        for (int32_t k_tile = 0; k_tile < k_tiles; ++k_tile) {
          if (ahead > 0) {
            --ahead;
            boxes.column += boxes.step.column;
            boxes.unit += boxes.step.unit;
            slot.advance();
            continue;
          }
          if (all.weights_in_pairs != 0 && k_tile % 2 == 0 && k_tile + 1 < k_tiles) {
            Slot<kStages> second = slot;
            second.advance();
            wait_empty(second);
          }
          wait_empty(slot);
          ask_for_box(boxes, box, slot);
          slot.advance();
        }
      }
      if (Queue::first() >= total(shared, args)) return;
      wait_empty(slot);
      ptx::barrier_arrive(full(slot));
    }

    // One thread: see read_early.
    __device__ __forceinline__ int32_t ask_early(const Tile& t) const {
      const int32_t stages = min(kStages, stages_of(args));
#pragma unroll 1
      for (int box = 0; box < C.boxes(); ++box) {
        Boxes boxes(all, t, box);
        Slot<kStages> slot;
#pragma unroll 1
        for (int32_t i = 0; i < stages; ++i, slot.advance()) ask_for_box(boxes, box, slot);
      }
      return stages;
    }
    // What each thread that arrives at stages does first of all: if early weights are not the first tile's, it passes
    // over the ring's first turn. has_arrived: at the first so many stages this thread has. no_tile: it will not wait
    // again.
    __device__ __forceinline__ void pass_early(Slot<kStages>& slot, int32_t has_arrived, int arrivals,
                                               bool no_tile) const {
      if (!kReadsEarly || !shared.head.misses(shared.list)) return;
#pragma unroll 1
      for (int32_t i = 0; i < kStages; ++i) {
        const uint32_t barrier = ptx::shared_address(&shared.full[i]);
        for (int j = 0; i >= has_arrived && j < arrivals; ++j) ptx::barrier_arrive(barrier);
        if (no_tile) ptx::barrier_wait(barrier, 0);  // no CTA ends before its copies
      }
      slot.phase = 0;
    }

    // A warp: the scales of each K-block, and what the consumers need of a tile.
    __device__ __forceinline__ void run_scales() const {
      Slot<kStages> slot;
      slot.phase = 1;  // the ring is empty
      pass_early(slot, 0, lane() == 0 ? 2 : 1, false);
      if (Queue::first() >= total(shared, args)) return;
      ptx::grid_dependency_wait();
      constexpr int kTokens = kBlockN / 32;  // of a lane
      const int32_t* const a_scale = kFloatTotals ? reinterpret_cast<const int32_t*>(args.a_scale) : args.a_q;
      const bool scales = lane() < kScales;
      const int32_t k_tiles = stages_of(args);
      int table = 0, chunk = 0;
      for (Queue queue; total(shared, args) > queue.index; queue.advance(shared.next, args.taken != nullptr)) {
        if (lane() == 0) queue.ask(shared.next);
        const Tile t = tile_at(shared, args, queue.index);
        int32_t row[kTokens];  // of a
#pragma unroll
        for (int i = 0; i < kTokens; ++i) {
          row[i] = t.row_begin + min(lane() + 32 * i, t.rows - 1);
          if (args.row_source != nullptr) row[i] = args.row_source[row[i]];
        }
        const int32_t w_row = scales ? scale_row(args, t, lane()) : 0;
        wait_empty(slot);
        open(t, shared.table[table], w_row, chunk);
        const int32_t* from = a_scale;
        const float* a_chunk = args.a_scale;
        const float* w_chunk = args.w_scale;
        const int32_t groups = kFlush ? (args.blocks_k + args.super_group - 1) / args.super_group : 1;
        if constexpr (kFlush) {
          w_chunk += static_cast<int64_t>(w_row) * groups;
        }
        ChunkCount count;
#pragma unroll 1  // registers
        for (int32_t k_tile = 0; k_tile < k_tiles; ++k_tile) {
          wait_empty(slot);
          if (C.block_stages == 1 || k_tile % C.block_stages == 0) {
#pragma unroll
            for (int i = 0; i < kTokens; ++i) {
              const uint32_t to = ptx::shared_address(&shared.a[slot.index][lane() + 32 * i]);
              const int32_t at = row[i] * args.blocks_k + k_tile / C.block_stages;
              if (!C.by_row() || args.scales_by_row == 0) {
                ptx::cp_async_4(to, from + row[i], true);
              } else if constexpr (kFloatTotals) {
                ptx::cp_async_4(to, a_scale + at, true);
              } else {  // a byte; its word
                ptx::cp_async_4(to, reinterpret_cast<const uint8_t*>(a_scale) + (at & ~3), true);
                shared.a_shift[slot.index][lane() + 32 * i] = 8 * (at & 3);
              }
            }
            from += args.a_rows;
            if (scales) {
              const int32_t at = w_row * args.blocks_k + k_tile / C.block_stages;
              const uint32_t to = ptx::shared_address(&shared.w[slot.index][lane()]);
              if constexpr (kFloatTotals) {
                ptx::cp_async_4(to, args.w_scale + at, true);
              } else {
                ptx::cp_async_4(to, args.w_q + (at & ~3), true);
                shared.w[slot.index][kScales + lane()] = 8 * (at & 3);
              }
            }
            if (kFlush && count.ends(args, k_tile + C.block_stages == k_tiles)) {
#pragma unroll
              for (int i = 0; i < kTokens; ++i) {
                const int32_t at = C.by_row() && args.scales_by_row != 0 ? row[i] * groups : row[i];
                ptx::cp_async_4(ptx::shared_address(&shared.chunk_a[chunk][lane() + 32 * i]), a_chunk + at, true);
              }
              if (scales) ptx::cp_async_4(ptx::shared_address(&shared.chunk_w[chunk][lane()]), w_chunk, true);
              if (count.next(args)) {
                a_chunk += C.by_row() && args.scales_by_row != 0 ? 1 : args.a_rows;
                ++w_chunk;
              }
              chunk = next_place(chunk);
            }
          }
          arrive(slot);
          slot.advance();
        }
        table = next_place(table);
      }
      wait_empty(slot);
      if (lane() == 0) shared.table[table].tile.rows = -1;
      arrive(slot);
      ptx::cp_async_wait<0>();
    }
    // Each lane arrives when its copies land; the warp once more for what it wrote itself.
    __device__ __forceinline__ void arrive(const Slot<kStages>& slot) const {
      ptx::cp_async_arrive(full(slot));
      __syncwarp();
      if (lane() == 0) ptx::barrier_arrive(full(slot));
    }
    __device__ __forceinline__ void open(const Tile& t, Table& table, int32_t w_row, int chunk) const {
      if (lane() == 0) {
        table.tile = t;
        table.chunk = chunk;
      }
#pragma unroll
      for (int token = lane(); token < kBlockN; token += 32) {
        if (args.row_factor != nullptr) {
          ptx::cp_async_4(ptx::shared_address(&table.factor[token]),
                          args.row_factor + t.row_begin + min(token, t.rows - 1), true);
        } else {
          table.factor[token] = 1.0f;
        }
      }
      if constexpr (C.adds()) table.copy(args, t, lane(), 32);
      if (kScaled && lane() < kScales) {
        ptx::cp_async_4(ptx::shared_address(&table.w_scale[lane()]), args.w_scale + w_row, true);
      }
    }

    __device__ __forceinline__ int32_t source_of(const Tile& t, int token) const {
      const int32_t r = t.row_begin + min(token, t.rows - 1);
      return args.row_source != nullptr ? args.row_source[r] : r;
    }

    // 128 threads.
    __device__ __forceinline__ void run_tokens() const {
      Slot<kStages> slot;
      slot.phase = 1;  // the ring is empty
      pass_early(slot, 0, 1, false);
      const int thread = static_cast<int>(threadIdx.x), chunk = thread & 7, row = thread >> 3;
      const int token = row + 16 * chunk;
      Queue queue;
      if (queue.index >= total(shared, args)) return;
      // Stages before a tile's end at which the next one is asked for, and looked up: as late as can be, so that the
      // tile goes to who needs it first, and early enough that neither the answer nor its rows' places are waited for.
      constexpr int32_t kAsk = 6, kLook = 3;
      const int32_t k_tiles = stages_of(args);
      const int32_t ask_at = max(k_tiles - kAsk, 0), look_at = max(k_tiles - kLook, 0);
      Tile t = tile_at(shared, args, queue.index), next = t;
      ptx::grid_dependency_wait();
      ptx::grid_dependency_launch();
      const uint32_t ring =
          ptx::shared_address(shared.tokens) + static_cast<uint32_t>(row * 128 + ((chunk ^ (row & 7)) << 4));
      const int box = thread / 32;  // by map: of the first two warps
      int table = 0;
      int32_t source[] = {source_of(t, token)}, next_source = 0;
      for (;;) {
        const RowCopies<kBlockN> rows(args, t, source, chunk);
#pragma unroll 1  // registers
        for (int32_t k_tile = 0; k_tile < k_tiles; ++k_tile) {
          wait_empty(slot);
          if (all.tokens_by_map != 0) {
            // Rows behind the tile's last are another's and stay unused.
            if (lane() == 0 && box * kStep < t.rows) {
              ptx::barrier_expect(full(slot), kStepBytes);
              ptx::copy_box_2d(ptx::shared_address(shared.tokens[slot.index]) + static_cast<uint32_t>(box * kStepBytes),
                               &all.tokens, k_tile * 128, t.row_begin + box * kStep, full(slot));
            }
          } else {
            const uint32_t to = ring + static_cast<uint32_t>(slot.index * kBlockN * 128);
            const bool inside = k_tile * 128 + chunk * 16 < args.k;
            rows.copy(to, args.a + k_tile * 128, inside);
          }
          if (kScaled && k_tile == 0) {
            ptx::cp_async_4(ptx::shared_address(&shared.table[table].a_scale[token]), args.a_scale + source[0], true);
            table = next_place(table);
          }
          ptx::cp_async_arrive(full(slot));
          slot.advance();
          if (k_tile == ask_at && lane() == 0) queue.ask(shared.next);
          // The next tile's rows are looked up while this one's copies are under way.
          if (k_tile == look_at) {
            queue.advance(shared.next, args.taken != nullptr);
            if (queue.index < total(shared, args)) {
              next = tile_at(shared, args, queue.index);
              next_source = source_of(next, token);
            }
          }
        }
        if (queue.index >= total(shared, args)) break;
        t = next;
        source[0] = next_source;
      }
      wait_empty(slot);  // of the stage that says that there is no further tile
      ptx::cp_async_arrive(full(slot));
      ptx::cp_async_wait<0>();
    }
  };

  // ---- consumer ----
  struct Consumer {
    const GemmArgs& args;
    Shared& shared;
    int consumer;
    bool by_map;
    Slot<kStages> at;

    // Of the tile: the token of this thread's sums 4j + 2h + e.
    __device__ __forceinline__ int row_inside(int h) const {
      const int warp = (static_cast<int>(threadIdx.x) >> 5) & 3;
      return kStep * consumer + 16 * warp + 8 * h + (lane() >> 2);
    }
    __device__ __forceinline__ void wait_full(const Slot<kStages>& s) const {
      ptx::barrier_wait(ptx::shared_address(&shared.full[s.index]), s.phase);
    }
    __device__ __forceinline__ void release() {
      __syncwarp();  // all lanes have read what they need of the stage
      if (lane() == 0) ptx::barrier_arrive(ptx::shared_address(&shared.empty[at.index]));
      at.advance();
    }

    // The partial sums of a K-block, from stage s on, whose first stage has been waited for.
    __device__ __forceinline__ void multiply(int32_t (&partial)[kSums], int part, Slot<kStages> s) const {
#pragma unroll
      for (int i = 0; i < C.block_stages; ++i) {
        if (part == 0) {
          if (i > 0) wait_full(s);
          if (!by_map) ptx::fence_proxy_async();  // tokens were written by cp.async
        }
        ptx::wgmma_fence();
        ptx::Wgmma<128>::mma(partial, ptx::matrix_descriptor(ptx::shared_address(shared.tokens[s.index][consumer])),
                             ptx::matrix_descriptor(ptx::shared_address(shared.weights[s.index]) + part * 128 * 128),
                             i);
        s.advance();
      }
      ptx::wgmma_commit();
    }

    // p[i][h]: the product of weight scale block i's scale and token h's in the K-block that begins in stage s.
    __device__ __forceinline__ void load_scales(const Table& table, int32_t (&p)[kScales][2],
                                                const Slot<kStages>& s) const {
      int32_t w[kFloatTotals ? kScales : 2 * kScales];
      ptx::load_shared_n(w, ptx::shared_address(shared.w[s.index]));
      if constexpr (!kFloatTotals) {
#pragma unroll
        for (int i = 0; i < kScales; ++i) w[i] = w[i] >> w[kScales + i] & 0xff;
      }
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        int32_t a = ptx::load_shared(ptx::shared_address(&shared.a[s.index][row_inside(h)]));
        if (C.has_shifts() && args.scales_by_row != 0) {
          a = a >> ptx::load_shared(ptx::shared_address(&shared.a_shift[s.index][row_inside(h)])) & 0xff;
        }
        const float by = kFloatTotals ? __fmul_rn(__int_as_float(a), table.factor[row_inside(h)]) : 0.0f;
#pragma unroll
        for (int i = 0; i < kScales; ++i) {
          p[i][h] = kFloatTotals ? __float_as_int(__fmul_rn(__int_as_float(w[i]), by)) : w[i] * a;
        }
      }
    }
    // The scale block of a thread's sum.
    static __device__ __forceinline__ constexpr int scale_of(int part, int sum) {
      return C.gated() && kParts == 1 ? sum / (kSums / 2) : part;
    }

    __device__ __forceinline__ void promote(int32_t (&totals)[kSums], int32_t (&partial)[kSums], int part,
                                            const int32_t (&p)[kScales][2]) const {
      ptx::wgmma_results(partial);
#pragma unroll
      for (int i = 0; i < kSums; ++i) {
        const int32_t scale = p[scale_of(part, i)][i / 2 % 2];
        if constexpr (kFloatTotals) {
          totals[i] =
              __float_as_int(__fmaf_rn(__int2float_rn(partial[i]), __int_as_float(scale), __int_as_float(totals[i])));
        } else {
          totals[i] += scale * partial[i];
        }
      }
    }

    __device__ __forceinline__ void multiply_tile(const Table& table, int32_t (&totals)[kParts][kSums]) {
      int32_t values[kFlush ? kSums : 1];  // beside the sums of a chunk
#pragma unroll
      for (int i = 0; i < kSums; ++i) {
#pragma unroll
        for (int b = 0; b < kParts; ++b) totals[b][i] = kFloatTotals ? kMinusZero : 0;
        if constexpr (kFlush) values[i] = kMinusZero;
      }
      [[maybe_unused]] ChunkCount count;
      [[maybe_unused]] int chunk = table.chunk;
      wait_full(at);
      for (int32_t left = stages_of(args) - C.block_stages; left >= 0; left -= C.block_stages) {
        const Slot<kStages> begin = at;
        Slot<kStages> end = at;
#pragma unroll
        for (int i = 0; i < C.block_stages; ++i) end.advance();
        int32_t partial[kSums];
        multiply(partial, 0, begin);
        int32_t p[kScales][2];
        load_scales(table, p, begin);
#pragma unroll
        for (int b = 0; b < kParts; ++b) {
          // The next stage's arrival is waited for beside this one's products.
          if (b == kParts - 1 && left > 0) wait_full(end);
          ptx::wgmma_wait<0>();
          if (b == kParts - 1) {
#pragma unroll
            for (int i = 0; i < C.block_stages; ++i) release();
          }
          promote(totals[b], partial, b, p);
          if (b + 1 < kParts) multiply(partial, b + 1, begin);
        }
        if constexpr (kFlush) {
          if (count.ends(args, left == 0)) {
            flush(table, chunk, totals[0], values);
            count.next(args);
            chunk = next_place(chunk);
          }
        }
      }
      if constexpr (kFlush) {
#pragma unroll
        for (int i = 0; i < kSums; ++i) totals[0][i] = values[i];
      }
    }

    // The end of a chunk of K-blocks.
    __device__ __forceinline__ void flush(const Table& table, int chunk, int32_t (&sums)[kSums],
                                          int32_t (&values)[kSums]) const {
      float p[kScales][2];
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        const float a = __fmul_rn(shared.chunk_a[chunk][row_inside(h)], table.factor[row_inside(h)]);
#pragma unroll
        for (int i = 0; i < kScales; ++i) p[i][h] = __fmul_rn(shared.chunk_w[chunk][i], a);
      }
#pragma unroll
      for (int i = 0; i < kSums; ++i) {
        values[i] =
            __float_as_int(__fmaf_rn(__int2float_rn(sums[i]), p[scale_of(0, i)][i / 2 % 2], __int_as_float(values[i])));
        sums[i] = 0;
      }
    }

    // Totals -> out. kPlain: bf16, quantised or added, and none of bias, row factors and limit.
    template <bool kPlain>
    __device__ __forceinline__ void finish(const Tile& t, int32_t (&totals)[kParts][kSums], const Table& table) const {
      constexpr int kRuns = C.features() / 32;  // runs of 8 output columns of a thread and token
      const OutType type = C.gated() || (kPlain && !C.adds()) ? OutType::bf16 : args.out_type;
      const uint64_t hint = C.quantizes() ? 0 : ptx::here(args.out_hint);  // the main loop has no register for it
      const int size = C.quantizes()          ? 1
                       : type == OutType::f32 ? 4
                                              : 2,
                begin = t.m_tile * C.features() + 8 * (lane() & 3);
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        const int row = row_inside(h);
        const bool row_exists = row < t.rows;
        float p[kScales] = {};
        if constexpr (kScaled) {
          float a = table.a_scale[row];
          if constexpr (!kPlain) a = __fmul_rn(a, table.factor[row]);
#pragma unroll
          for (int i = 0; i < kScales; ++i) p[i] = __fmul_rn(table.w_scale[i], a);
        }
        int32_t out_row = t.row_begin + row;
        [[maybe_unused]] float weight = 1.0f;
        if constexpr (C.adds()) {
          out_row = table.add_to[row];
          weight = table.add_weight[row];
        }
        uint8_t* const to = static_cast<uint8_t*>(args.out) + (out_row * args.out_stride + begin) * size;
        uint32_t most = 0;  // bits of the absmax of bf16 values, in two halves
        // Where few rows are, most warps have none. What follows the loop, with its shuffles, stands outside of
        // branches: inside, the compiler gives up uniform registers in the main loop.
        const int runs = row - (lane() >> 2) < t.rows ? kRuns : 0;
#pragma unroll
        for (int run = 0; run < kRuns; ++run) {
          if (run >= runs) break;
          const bool exists = begin + 32 * run < width(args);
          float v[2][8];  // gated: of gate, then up
#pragma unroll
          for (int b = 0; b < (C.gated() ? 2 : 1); ++b) {
#pragma unroll
            for (int c = 0; c < 8; ++c) {
              const int place = 4 * (kRuns * b + run) + c / 2, part = place / (kSums / 4);  // in units of j
              const int i = 4 * (place % (kSums / 4)) + 2 * h + c % 2, sum = totals[part][i];
              float x = __int_as_float(sum);
              if constexpr (kScaled) x = __fmul_rn(__int2float_rn(sum), p[C.gated() ? b : part]);
              if constexpr (!kPlain) {
                if (args.bias != nullptr && exists) {
                  const int half = C.gated() ? b ^ args.up_first : 0;
                  x = __fadd_rn(
                      x,
                      args.bias[static_cast<int64_t>(t.expert) * args.n + half * width(args) + begin + 32 * run + c]);
                }
                if constexpr (C.gated()) {
                  x = b == 0 ? num::min_nan(x, args.limit) : num::clamp(x, -args.limit, args.limit);
                }
              }
              v[b][c] = x;
            }
          }
          if constexpr (C.gated()) {
#pragma unroll
            for (int c = 0; c < 8; ++c) v[0][c] = __fmul_rn(num::silu(v[0][c]), v[1][c]);
          }
          if constexpr (C.adds()) {
#pragma unroll
            for (int c = 0; c < 8; ++c) v[0][c] = __fmul_rn(weight, v[0][c]);
          }
          if (!C.adds() && type == OutType::f32) {
            if (row_exists && exists) {
#pragma unroll
              for (int c = 0; c < 8; c += 4) {
                *reinterpret_cast<float4*>(to + (32 * run + c) * 4) =
                    make_float4(num::canonical(v[0][c]), num::canonical(v[0][c + 1]), num::canonical(v[0][c + 2]),
                                num::canonical(v[0][c + 3]));
              }
            }
            continue;
          }
          uint32_t packed[4];
#pragma unroll
          for (int c = 0; c < 4; ++c) {
            packed[c] = type == OutType::bf16 ? num::pack_bf16(v[0][2 * c], v[0][2 * c + 1])
                                              : num::pack_fp16(v[0][2 * c], v[0][2 * c + 1]);
            if constexpr (C.quantizes()) {
              totals[0][16 * run + 4 * c + 2 * h] = static_cast<int32_t>(packed[c]);
              most = ptx::max_u16x2(most, packed[c] & (exists ? 0x7fff7fffu : 0u));
            }
          }
          if constexpr (C.adds()) {
            ptx::add_bf16_if(row_exists && exists && type == OutType::bf16, to + 32 * run * 2, packed, hint);
            ptx::add_fp16_if(row_exists && exists && type == OutType::fp16, to + 32 * run * 2, packed, hint);
          } else if constexpr (!C.quantizes()) {
            ptx::store_if(row_exists && exists, to + 32 * run * 2, packed, hint);
          }
        }
        if constexpr (C.quantizes()) quantize(t, totals[0], h, most, row_exists, to);
      }
    }

    // A token's 128 columns of h -> int8 and a scale: what quant/quantize_rows.cuh makes of a K-block of its rows.
    // h[16 * run + 4c + 2h]: two columns as bf16; four lanes have a token.
    __device__ __forceinline__ void quantize(const Tile& t, const int32_t (&values)[kSums], int h, uint32_t most,
                                             bool row_exists, uint8_t* to) const {
      static_assert(!C.quantizes() || C.features() == 128);
      most = ptx::max_u16x2(most, __shfl_xor_sync(0xffffffffu, most, 1));
      most = ptx::max_u16x2(most, __shfl_xor_sync(0xffffffffu, most, 2));
      // A bf16's bits are the first of a float's.
      const num::GroupScale s = num::symmetric_scale(max(most << 16, most & 0xffff0000u), num::kInt8Max);
      if (row_exists && (lane() & 3) == 0) {
        args.out_scale[t.m_tile * args.out_rows + t.row_begin + row_inside(h)] = s.scale;
      }
#pragma unroll
      for (int run = 0; run < C.features() / 32; ++run) {
        const auto q = [&](int i) {
          const auto word = static_cast<uint32_t>(values[16 * run + 4 * i + 2 * h]);
          return __byte_perm(num::quantize_within(num::bf16_low(word), s.inverse),
                             num::quantize_within(num::bf16_high(word), s.inverse), 0x0040);
        };
        uint32_t packed[2];
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          // 0: of a group that is not finite.
          packed[i] = s.inverse == 0.0f ? 0u : __byte_perm(q(2 * i), q(2 * i + 1), 0x5410);
        }
        const bool exists = t.m_tile * C.features() + 8 * (lane() & 3) + 32 * run < width(args);
        ptx::store_if(row_exists && exists, to + 32 * run, packed);
      }
    }

    __device__ __forceinline__ void run() {
      ptx::grid_dependency_wait();
      if (Queue::first() >= total(shared, args)) return;
      if (kReadsEarly && shared.head.misses(shared.list)) {
        for (int32_t i = 0; i < kStages; ++i) {
          wait_full(at);
          release();
        }
      }
      for (int table = 0;; table = next_place(table)) {
        wait_full(at);
        const Table& tile = shared.table[table];
        const int32_t rows = tile.tile.rows;
        if (rows < 0) return;
        if (rows <= kStep * consumer) {  // all of them are the other consumer's
          for (int32_t left = stages_of(args); left > 0; --left) {
            wait_full(at);
            release();
          }
          continue;
        }
        int32_t totals[kParts][kSums];
        multiply_tile(tile, totals);
        const Tile t = tile.tile;
        if constexpr (C.adds()) {
          finish<true>(t, totals, tile);
        } else if (shared.plain) {
          finish<true>(t, totals, tile);
        } else {
          finish<false>(t, totals, tile);
        }
      }
    }
  };

  static __device__ __forceinline__ void run(const WgmmaArgs& all) {
    extern __shared__ __align__(1024) uint8_t memory[];
    Shared& shared = *reinterpret_cast<Shared*>(memory);
    const GemmArgs& args = all.gemm;
    if (threadIdx.x == setup_thread<kReadsEarly, C.threads()>(all)) {
      ptx::prefetch_tensor_map(&all.weights);
      shared.head.stages = 0;
      shared.plain = args.bias == nullptr && args.row_factor == nullptr &&
                     (C.gated() ? args.limit == num::from_bits(num::kInfBits) : args.out_type == OutType::bf16);
      for (int i = 0; i < kStages; ++i) {
        ptx::barrier_init(ptx::shared_address(&shared.full[i]), kArrivals);
        ptx::barrier_init(ptx::shared_address(&shared.empty[i]), 4 * C.kConsumers);
      }
      ptx::barrier_init(ptx::shared_address(&shared.next.full), 1);
      ptx::barrier_init(ptx::shared_address(&shared.next.empty), kReaders);
      ptx::barrier_init_fence();
    }
    const Producer producer{all, args, shared};
    const kernels::Routes* const routes = all.routes.topk_ids != nullptr ? &all.routes : nullptr;
    wait_for_offsets<kBlockN, kReadsEarly>(all, shared.head, Queue::first(), m_tiles(args),
                                           [&](const Tile& t) { return producer.ask_early(t); });
    kernels::build_tile_list<kBlockN, C.threads()>(shared.list, args, routes);
    // The same in a warp's lanes, which the compiler cannot know: addresses of shared memory may be uniform.
    const int warpgroup = __shfl_sync(0xffffffffu, static_cast<int>(threadIdx.x) / 128, 0);
    if (warpgroup == 0) {
      ptx::lower_registers<kTokenRegisters>();
      producer.run_tokens();
    } else if (warpgroup == 1) {
      ptx::lower_registers<kWeightRegisters>();
      const int warp = static_cast<int>(threadIdx.x) / 32 - 4;
      if (warp < C.boxes()) {
        if (lane() == 0) producer.run_weights(warp);
      } else if (warp == 2) {
        producer.run_scales();
      } else if (warp == 3) {
        if (lane() == 0 && args.taken != nullptr) Queue::take_tiles(args.taken, shared.next, total(shared, args));
      }
    } else {
      ptx::raise_registers<kConsumerRegisters>();
      Consumer{args, shared, warpgroup - 2, all.tokens_by_map != 0, {}}.run();
    }
  }
};

template <TokenMajorConfig C>
__device__ __forceinline__ void token_major_gemm(const WgmmaArgs& args) {
  TokenMajor<C>::run(args);
}

}  // namespace octomoe::sm90
