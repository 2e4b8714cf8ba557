// INT8 grouped GEMM by wgmma with one sum over K (int8_channel), for SM90. With scales per K-block: token_major.cuh.
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
// The rings are independent: a consumer may run ahead of the other.
//
// Shared rows of a consumer's 128 hold weight rows in an order that the 5-D tensor map makes out of the natural layout:
// shared row (b, w, h, g) = 64b + 16w + 8h + g holds output column 32w + 4g + 2b + h; gated, b = 0 holds the first half
// of w13 and b = 1 the second, both for column 16w + 2g + h. So one thread's sums are neighbouring output columns, and
// gate and up of one column are in one thread.
#pragma once

#include "core/gemm_config.h"
#include "core/numerics.cuh"
#include "ptx/wgmma.cuh"
#include "sm90/tiles.cuh"

namespace octomoe::sm90 {

using kernels::Epilogue;
using kernels::OutType;
using kernels::WgmmaConfig;

template <WgmmaConfig C>
struct GroupedGemm {
  static constexpr int kBlockN = C.block_n, kWeightStages = C.weight_stages, kTokenStages = C.token_stages;
  static constexpr int kRows = 128;                             // weight rows of a consumer
  static constexpr int kOutColumns = C.gated() ? 2 : 4;         // neighbouring columns of a thread
  static constexpr int kGroup = C.gated() ? kRows / 2 : kRows;  // output columns of a consumer
  static constexpr int kBoxBytes = kRows * WgmmaConfig::kBlockK;
  static constexpr int kTokenBytes = kBlockN * WgmmaConfig::kBlockK;
  static constexpr int kTokenBoxBytes = WgmmaConfig::kTokenBox * WgmmaConfig::kBlockK;
  static constexpr int kSums = kBlockN / 2;          // of a thread and m64 block
  static constexpr int kUnit = C.gated() ? 16 : 32;  // output columns of a step of the tensor map's dimension w
  // 65536 registers over the multiprocessor's threads, in steps of 8.
  static constexpr int kWeightRegisters = 32, kTokenRegisters = 48, kConsumerRegisters = 216;

  static_assert(kBlockN % 16 == 0 && kBlockN <= 160);

  // ---- shared memory ----
  // What the epilogue needs of a tile.
  static constexpr int kTables = C.tables();
  struct alignas(16) Table : AddTargets<C.adds() ? kBlockN : 0> {
    Tile tile;  // rows -1: there is no further tile
    float a_scale[kBlockN];
    float w_scale[C.block_m()];  // by consumer, half of a gated tile, column
  };
  struct Shared {
    uint8_t weights[C.kConsumers][kWeightStages][kBoxBytes];
    uint8_t tokens[kTokenStages][kTokenBytes];
    Table table[kTables];
    TileList list;
    Head head;
    bool plain;  // Consumer::finish; kept here because consumers have no register for it
    uint64_t weights_full[C.kConsumers][kWeightStages], weights_empty[C.kConsumers][kWeightStages];
    uint64_t tokens_full[kTokenStages], tokens_empty[kTokenStages];
    NextTile next;
  };
  static_assert(sizeof(Shared) <= C.pipeline_bytes());

  // Whether first weights are asked for before a caller's offsets are certain. Only grouped_gemm has such, and stores.
  static constexpr bool kReadsEarly = C.cluster == 1 && C.epilogue == Epilogue::store;

  struct Stage {
    Slot<kWeightStages> w;
    Slot<kTokenStages> t;
    __device__ __forceinline__ void advance() {
      w.advance();
      t.advance();
    }
  };

  static __device__ __forceinline__ int rank() { return C.cluster > 1 ? static_cast<int>(ptx::cluster_rank()) : 0; }
  static __device__ __forceinline__ int width(const GemmArgs& args) { return width_of<C.gated()>(args); }
  static __device__ __forceinline__ int32_t m_tiles_of(const GemmArgs& args) {
    return (width(args) + C.features() - 1) / C.features();
  }
  static __device__ __forceinline__ int32_t total_of(const Shared& shared, const GemmArgs& args) {
    return shared.list.first_tile[args.experts] * m_tiles_of(args);
  }
  // Columns past K arrive as zeros.
  static __device__ __forceinline__ int32_t k_tiles_of(const GemmArgs& args) {
    const int32_t tiles = (args.k + 127) / 128;
    // A maximum with 1 would change nothing but what the compiler makes of the main loop.
    if constexpr (C.least_stages() == 1) return tiles;
    return max(tiles, C.least_stages());
  }
  static __device__ __forceinline__ int padded(int rows) { return (rows + 15) & ~15; }

  using Queue = TileQueue<true, C.cluster>;
  static __device__ __forceinline__ Tile tile_at(const Shared& shared, const GemmArgs& args, int32_t index,
                                                 int32_t m_tiles) {
    return find_tile<16, C.cluster>(shared.list, args, index, m_tiles, rank());
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
    return {t.expert * WeightSteps(all.gemm, kUnit).expert + column / kUnit, column + kGroup < width(all.gemm) ? 2 : 1,
            all.evict_first != 0 ? kernels::kEvictFirst : kernels::kEvictNormal};
  }
  // A stage's weights of a consumer.
  static __device__ __forceinline__ void ask_for_box(const WgmmaArgs& all, Shared& shared, const Boxes& boxes,
                                                     int consumer, int32_t k_tile, int32_t slot) {
    const uint32_t full = ptx::shared_address(&shared.weights_full[consumer][slot]);
    const bool exists = consumer < boxes.count;
    ptx::barrier_arrive_expect(full, exists ? kBoxBytes : 0);
    if (!exists) return;
    const uint32_t to = ptx::shared_address(shared.weights[consumer][slot]);
    const WeightSteps step(all.gemm, kUnit);
    const int32_t unit = boxes.unit + consumer * (kGroup / kUnit) + k_tile * step.unit;
    if constexpr (C.cluster > 1) {
      // Each CTA asks for one consumer's box, which both get.
      if (rank() == consumer) {
        ptx::copy_box_5d_multicast(to, &all.weights, k_tile * step.column, 0, 0, unit, 0, full, boxes.hint, 3);
      }
    } else {
      ptx::copy_box_5d(to, &all.weights, k_tile * step.column, 0, 0, unit, 0, full, boxes.hint);
    }
  }

  // One thread for each consumer's weights. Nothing here depends on the kernel before.
  struct WeightProducer {
    const WgmmaArgs& all;
    const GemmArgs& args;
    Shared& shared;
    int32_t m_tiles, total, k_tiles;

    // One thread, for all consumers: see read_early.
    static __device__ __forceinline__ int32_t ask_early(const WgmmaArgs& all, Shared& shared, const Tile& t) {
      const int32_t stages = min(kWeightStages, k_tiles_of(all.gemm));
      const Boxes boxes = boxes_of(all, t);
#pragma unroll 1
      for (int32_t i = 0; i < stages; ++i) {
        for (int c = 0; c < C.kConsumers; ++c) ask_for_box(all, shared, boxes, c, i, i);
      }
      return stages;
    }

    __device__ __forceinline__ void run(int consumer) const {
      Slot<kWeightStages> slot;
      slot.phase = 1;                                        // the ring is empty
      int32_t ahead = kReadsEarly ? shared.head.stages : 0;  // stages of the first tile that have been asked for
      if (kReadsEarly && shared.head.misses(shared.list)) {
        for (int32_t i = 0; i < kWeightStages; ++i) {
          const uint32_t full = ptx::shared_address(&shared.weights_full[consumer][i]);
          if (i >= ahead) ptx::barrier_arrive(full);
          if (Queue::first() >= total) ptx::barrier_wait(full, 0);  // no CTA ends before its copies
        }
        ahead = 0;
        slot.phase = 0;
      }
      for (int32_t i = 0; i < ahead; ++i) slot.advance();
      for (Queue queue; total > queue.index; queue.advance(shared.next, args.taken != nullptr)) {
        queue.ask(shared.next);
        const Boxes boxes = boxes_of(all, tile_at(shared, args, queue.index, m_tiles));
        int32_t k_tile = ahead;
        ahead = 0;
        for (; k_tile < k_tiles; ++k_tile) {
          if (all.weights_in_pairs != 0 && k_tile % 2 == 0 && k_tile + 1 < k_tiles) {
            Slot<kWeightStages> second = slot;
            second.advance();
            ptx::barrier_wait(ptx::shared_address(&shared.weights_empty[consumer][second.index]), second.phase);
          }
          ptx::barrier_wait(ptx::shared_address(&shared.weights_empty[consumer][slot.index]), slot.phase);
          ask_for_box(all, shared, boxes, consumer, k_tile, slot.index);
          slot.advance();
        }
      }
    }
  };

  struct TokenProducer {
    static constexpr int kSources = RowCopies<kBlockN>::kSources;
    const WgmmaArgs& all;
    const GemmArgs& args;
    Shared& shared;
    int32_t m_tiles, total, k_tiles;

    // The scales of a tile, beside its first stage. source: of tokens token and token + 128.
    __device__ __forceinline__ void copy_scales(const Tile& t, Table& table, int thread, int token,
                                                const int32_t (&source)[kSources]) const {
#pragma unroll
      for (int i = 0; i < kSources; ++i) {
        if (token + 128 * i < kBlockN) {
          ptx::cp_async_4(ptx::shared_address(&table.a_scale[token + 128 * i]), args.a_scale + source[i], true);
        }
      }
#pragma unroll 1  // side by side they would need more registers than the producer has
      for (int i = 0; i < C.kConsumers; ++i) {
        const int half = C.gated() ? thread / kGroup : 0, begin = t.m_tile * C.features() + i * kGroup;
        const int column = min(begin + thread % kGroup, width(args) - 1);
        const int64_t at =
            args.w_scale_per_tensor ? t.expert : static_cast<int64_t>(t.expert) * args.n + column + half * width(args);
        ptx::cp_async_4(ptx::shared_address(&table.w_scale[i * kRows + thread]), args.w_scale + at, true);
      }
    }

    // Of tokens token and token + 128 of the tile.
    __device__ __forceinline__ void load_sources(const Tile& t, int token, int32_t (&source)[kSources]) const {
#pragma unroll
      for (int i = 0; i < kSources; ++i) {
        const int32_t r = t.row_begin + min(token + 128 * i, max(t.rows, 1) - 1);
        source[i] = args.row_source != nullptr ? args.row_source[r] : r;
      }
    }

    __device__ __forceinline__ void run() {
      const int thread = static_cast<int>(threadIdx.x), chunk = thread & 7, row = thread >> 3;
      const int token = row + 16 * chunk;
      Queue queue;
      if (queue.index >= total) return;  // in all CTAs of a cluster
      // Stages before a tile's end at which the next one is asked for, and looked up: as late as can be, so that the
      // tile goes to who needs it first, and early enough that neither the answer nor its rows' places are waited for.
      constexpr int32_t kAsk = 6, kLook = 3;
      const int32_t ask_at = max(k_tiles - kAsk, 0), look_at = max(k_tiles - kLook, 0);
      Tile t = tile_at(shared, args, queue.index, m_tiles), next = t;
      ptx::grid_dependency_wait();
      ptx::grid_dependency_launch();

      const uint32_t ring =
          ptx::shared_address(shared.tokens) + static_cast<uint32_t>(row * 128 + ((chunk ^ (row & 7)) << 4));
      Slot<kTokenStages> slot;
      slot.phase = 1;  // the ring is empty
      int table = 0;
      int32_t source[kSources], next_source[kSources] = {};
      load_sources(t, token, source);
      for (;;) {
        const RowCopies<kBlockN> rows(args, t, source, chunk);
        for (int32_t k_tile = 0; k_tile < k_tiles; ++k_tile) {
          ptx::barrier_wait(ptx::shared_address(&shared.tokens_empty[slot.index]), slot.phase);
          if (thread == 0 && k_tile == 0) shared.table[table].tile = t;
          const uint32_t to = ring + static_cast<uint32_t>(slot.index * kTokenBytes);
          const bool inside = k_tile * 128 + chunk * 16 < args.k;
          const int8_t* a = args.a + k_tile * 128;
          if (all.tokens_by_map != 0) {
            // Rows that follow one another come in boxes; those behind the tile's last are another's and stay unused.
            // Each warp asks for a quarter: one that asked for all would be slower than the products.
            if (lane() == 0) {
              const uint32_t full = ptx::shared_address(&shared.tokens_full[slot.index]);
              const uint32_t base = ptx::shared_address(shared.tokens[slot.index]);
#pragma unroll 1
              for (int p = thread / 32; p < rows.passes; p += 4) {
                ptx::barrier_expect(full, kTokenBoxBytes);
                ptx::copy_box_2d(base + static_cast<uint32_t>(p * kTokenBoxBytes), &all.tokens, k_tile * 128,
                                 t.row_begin + p * WgmmaConfig::kTokenBox, full);
              }
            }
          } else {
            rows.copy(to, a, inside);
          }
          if (k_tile == 0) {
            copy_scales(t, shared.table[table], thread, token, source);
            if constexpr (C.adds()) shared.table[table].copy(args, t, thread, 128);
            table = table + 1 == kTables ? 0 : table + 1;
          }
          // Each thread arrives when its copies land; a warp once more for what it wrote itself.
          const uint32_t full = ptx::shared_address(&shared.tokens_full[slot.index]);
          ptx::cp_async_arrive(full);
          __syncwarp();
          if (lane() == 0) ptx::barrier_arrive(full);
          slot.advance();
          if (k_tile == ask_at && lane() == 0) queue.ask(shared.next);
          // The next tile's rows are looked up while this one's copies are under way.
          if (k_tile == look_at) {
            queue.advance(shared.next, args.taken != nullptr);
            if (queue.index < total) {
              next = tile_at(shared, args, queue.index, m_tiles);
              load_sources(next, token, next_source);
            }
          }
        }
        if (queue.index >= total) break;
        t = next;
#pragma unroll
        for (int i = 0; i < kSources; ++i) source[i] = next_source[i];
      }
      // A stage that says that there is no further tile.
      ptx::barrier_wait(ptx::shared_address(&shared.tokens_empty[slot.index]), slot.phase);
      if (thread == 0) shared.table[table].tile.rows = -1;
      const uint32_t full = ptx::shared_address(&shared.tokens_full[slot.index]);
      ptx::cp_async_arrive(full);
      __syncwarp();
      if (lane() == 0) ptx::barrier_arrive(full);
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
      ptx::barrier_wait(ptx::shared_address(&shared.weights_full[warpgroup][s.w.index]), s.w.phase);
      ptx::barrier_wait(ptx::shared_address(&shared.tokens_full[s.t.index]), s.t.phase);
      if (!by_map) ptx::fence_proxy_async();  // tokens were written by cp.async
    }
    __device__ __forceinline__ void release(int32_t w, int32_t t) const {
      __syncwarp();  // all lanes have read what they need of the stage
      const uint32_t weights = ptx::shared_address(&shared.weights_empty[warpgroup][w]);
      if constexpr (C.cluster > 1) {
        if (lane() < C.cluster) ptx::barrier_arrive_at(weights, static_cast<uint32_t>(lane()));
      } else {
        if (lane() == 0) ptx::barrier_arrive(weights);
      }
      if (lane() == 2) ptx::barrier_arrive(ptx::shared_address(&shared.tokens_empty[t]));
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

    // One width of tile after another, until one is wide enough.
    template <int kTokens>
    __device__ __forceinline__ void multiply_tile(int32_t rows, int32_t (&sums)[2][kSums]) {
      if constexpr (kTokens < kBlockN) {
        if (rows > kTokens) {
          multiply_tile<kTokens + 16>(rows, sums);
          return;
        }
      }
      multiply<kTokens>(sums);
    }

    // Of the tile: the first of the neighbouring output columns that this thread has.
    __device__ __forceinline__ int column_inside() const {
      const int warp = (static_cast<int>(threadIdx.x) >> 5) & 3;
      return warp * (kGroup / 4) + (lane() >> 2) * kOutColumns;
    }
    __device__ __forceinline__ int column_of(const Tile& t) const {
      return t.m_tile * C.features() + warpgroup * kGroup + column_inside();
    }

    // Sums -> out. kPlain: bf16, or added, and none of bias, zero points, row factors and limit.
    template <bool kPlain>
    __device__ __forceinline__ void finish(const Tile& t, const int32_t (&sums)[2][kSums], const Table& table) const {
      const int inside = column_inside(), column = column_of(t);
      if (column >= width(args)) return;
      const bool asymmetric = !kPlain && args.a_zero != nullptr;
      const OutType type = C.gated() || (kPlain && !C.adds()) ? OutType::bf16 : args.out_type;
      // [b][h]: ungated, columns 2b + h; gated, column h of gate and up.
      float w_scale[2][2], bias[2][2];
      int32_t column_sum[2][2];
#pragma unroll
      for (int b = 0; b < 2; ++b) {
#pragma unroll
        for (int h = 0; h < 2; ++h) {
          const int offset = C.gated() ? h : 2 * b + h, half = half_of(b);
          const int64_t at = static_cast<int64_t>(t.expert) * args.n + column + offset + half * width(args);
          w_scale[b][h] = table.w_scale[warpgroup * kRows + half * kGroup + inside + offset];
          column_sum[b][h] = asymmetric ? args.column_sum[at] : 0;
          bias[b][h] = !kPlain && args.bias != nullptr ? args.bias[at] : 0.0f;
        }
      }
      const int first = 2 * (lane() & 3), left = t.rows - first, size = type == OutType::f32 ? 4 : 2;
      const int64_t stride = args.out_stride * size;
      uint8_t* to = static_cast<uint8_t*>(args.out) + (C.adds() ? 0 : (t.row_begin + first) * stride) +
                    static_cast<int64_t>(column) * size;
#pragma unroll
      for (int j = 0; j < kBlockN / 8; ++j) {
        if (8 * j >= t.rows) break;
        const float2 pair = *reinterpret_cast<const float2*>(&table.a_scale[8 * j + first]);
        float a_scale[2] = {pair.x, pair.y};
        // Both tokens' values before either's store: their chains are long, and a scheduler has one or two warps.
        float out[2][4];  // of a token; gated: gate of two columns, then up
#pragma unroll
        for (int e = 0; e < 2; ++e) {
          int32_t zero = 0;
          if constexpr (!kPlain) {
            const int32_t row = t.row_begin + min(8 * j + first + e, t.rows - 1);
            if (args.row_factor != nullptr) a_scale[e] = __fmul_rn(a_scale[e], args.row_factor[row]);
            if (asymmetric) zero = args.a_zero[args.row_source != nullptr ? args.row_source[row] : row];
          }
#pragma unroll
          for (int c = 0; c < 4; ++c) {
            const int b = c / 2, h = c % 2, sum = sums[b][4 * j + 2 * h + e];
            const int32_t acc = asymmetric ? sum - zero * column_sum[b][h] : sum;
            float x = __fmul_rn(__int2float_rn(acc), __fmul_rn(w_scale[b][h], a_scale[e]));
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
        if constexpr (C.adds()) {
          const int2 rows = *reinterpret_cast<const int2*>(&table.add_to[8 * j + first]);
          const float2 weights = *reinterpret_cast<const float2*>(&table.add_weight[8 * j + first]);
#pragma unroll
          for (int e = 0; e < 2; ++e) {
            add(to + (e == 0 ? rows.x : rows.y) * stride, type, out[e], e == 0 ? weights.x : weights.y,
                8 * j + e < left, args.out_hint);
          }
        } else {
#pragma unroll
          for (int e = 0; e < 2; ++e) store(to + e * stride, type, out[e], 8 * j + e < left, args.out_hint);
          to += 8 * stride;
        }
      }
    }

    static __device__ __forceinline__ void store(uint8_t* to, OutType type, const float (&v)[4], bool exists,
                                                 uint64_t hint) {
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
      ptx::store_if(exists, to, packed, hint);
    }

    static __device__ __forceinline__ void add(uint8_t* to, OutType type, const float (&v)[4], float weight,
                                               bool exists, uint64_t hint) {
      uint32_t packed[2];
#pragma unroll
      for (int c = 0; c < 4; c += 2) {
        const float x = __fmul_rn(weight, v[c]), y = __fmul_rn(weight, v[c + 1]);
        packed[c / 2] = type == OutType::bf16 ? num::pack_bf16(x, y) : num::pack_fp16(x, y);
      }
      ptx::add_bf16_if(exists && type == OutType::bf16, to, packed, hint);
      ptx::add_fp16_if(exists && type == OutType::fp16, to, packed, hint);
    }

    __device__ __forceinline__ void run(int32_t total) {
      ptx::grid_dependency_wait();
      int table = 0;
      if (Queue::first() >= total) return;
      if (kReadsEarly && shared.head.misses(shared.list)) {
        for (int32_t i = 0; i < kWeightStages; ++i) {
          ptx::barrier_wait(ptx::shared_address(&shared.weights_full[warpgroup][i]), 0);
          __syncwarp();  // no lane may miss this turn
          if (lane() == 0) ptx::barrier_arrive(ptx::shared_address(&shared.weights_empty[warpgroup][i]));
        }
        at.w.phase = 1;
      }
      for (;;) {
        ptx::barrier_wait(ptx::shared_address(&shared.tokens_full[at.t.index]), at.t.phase);
        const Table& tile = shared.table[table];
        if (tile.tile.rows < 0) return;
        int32_t sums[2][kSums];
        multiply_tile<C.min_n()>(tile.tile.rows, sums);
        const Tile t = tile.tile;  // read again: there are no registers to keep it in
        if constexpr (C.adds()) {
          finish<true>(t, sums, tile);
        } else if (shared.plain) {
          finish<true>(t, sums, tile);
        } else {
          finish<false>(t, sums, tile);
        }
        table = table + 1 == kTables ? 0 : table + 1;
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
      shared.plain = args.bias == nullptr && args.row_factor == nullptr && args.a_zero == nullptr &&
                     (C.gated() ? args.limit == num::from_bits(num::kInfBits) : args.out_type == OutType::bf16);
      for (int c = 0; c < C.kConsumers; ++c) {
        for (int i = 0; i < kWeightStages; ++i) {
          ptx::barrier_init(ptx::shared_address(&shared.weights_full[c][i]), 1);
          ptx::barrier_init(ptx::shared_address(&shared.weights_empty[c][i]), 4 * C.cluster);
        }
      }
      for (int i = 0; i < kTokenStages; ++i) {
        // The producer's threads (their copies) and warps (their writes).
        ptx::barrier_init(ptx::shared_address(&shared.tokens_full[i]), 128 + 4);
        ptx::barrier_init(ptx::shared_address(&shared.tokens_empty[i]), 4 * C.kConsumers);
      }
      ptx::barrier_init(ptx::shared_address(&shared.next.full), 1);
      ptx::barrier_init(ptx::shared_address(&shared.next.empty), (C.kConsumers + 4) * C.cluster);
      ptx::barrier_init_fence();
    }
    const kernels::Routes* const routes = all.routes.topk_ids != nullptr ? &all.routes : nullptr;
    wait_for_offsets<kBlockN, kReadsEarly>(all, shared.head, Queue::first(), m_tiles_of(args),
                                           [&](const Tile& t) { return WeightProducer::ask_early(all, shared, t); });
    kernels::build_tile_list<kBlockN * C.cluster, C.threads()>(shared.list, args, routes);
    // Before anything is sent to the other CTA, its barriers must stand.
    if constexpr (C.cluster > 1) ptx::cluster_sync();
    // The same in a warp's lanes, which the compiler cannot know: addresses of shared memory may be uniform.
    const int warpgroup = __shfl_sync(0xffffffffu, static_cast<int>(threadIdx.x) / 128, 0);
    if (warpgroup == 0) {
      ptx::lower_registers<kTokenRegisters>();
      TokenProducer{all, args, shared, m_tiles_of(args), total_of(shared, args), k_tiles_of(args)}.run();
    } else if (warpgroup == 1) {
      ptx::lower_registers<kWeightRegisters>();
      const int warp = static_cast<int>(threadIdx.x) / 32 - 4;
      if (warp < C.kConsumers && lane() == 0) {
        WeightProducer{all, args, shared, m_tiles_of(args), total_of(shared, args), k_tiles_of(args)}.run(warp);
      }
      if (warp == C.kConsumers && lane() == 0 && args.taken != nullptr && rank() == 0) {
        Queue::take_tiles(args.taken, shared.next, total_of(shared, args));
      }
      __syncwarp();  // whole warps meet the cluster's barrier
    } else {
      ptx::raise_registers<kConsumerRegisters>();
      Consumer{args, shared, k_tiles_of(args), warpgroup - 2, all.tokens_by_map != 0, {}}.run(total_of(shared, args));
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
