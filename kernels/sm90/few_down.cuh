// The second kernel of a layer of a few tokens (few_tokens.cuh): h -> int8 -> w2 -> y -> combine -> out.
//
// A CTA has some columns of out with all experts, so that it combines them alone. Its weights come by bulk copies into
// a ring as long as shared memory has room: the last of gate_up, the quantising of h and the streaming of w2 go on at
// once.
//
// Eight lanes multiply a column. With sums per K-block a lane has a piece of 128 bytes for itself, and they bring
// theirs together in order; short rows have four lanes. A warp has columns of one entry; the warps of an
// entry's columns are a stream; streams take turns.
#pragma once

#include "sm90/few_tokens.cuh"

namespace octomoe::sm90 {

template <Promotion P, int kLanes>
struct FewDown {
  static_assert(P != Promotion::channel || kLanes == 8);
  static constexpr bool kBlocks = P != Promotion::channel;
  const FewDownArgs& args;
  const FewMatrix& m;
  FewShared& shared;
  uint8_t* ring;
  int8_t* rows;        // of h, quantised
  FewTerm* terms;      // of all warps
  uint32_t* w_scales;  // channel: s_w [entry, column]; otherwise of [entry, scale block]
  float* y;            // [route, column]
  uint32_t* a_scales;  // of each route
  uint32_t* tops;      // of each route and K-block
  int32_t lane, warp, first, columns;

  __device__ __forceinline__ int32_t sets() const { return (columns + args.stage_columns - 1) / args.stage_columns; }
  __device__ __forceinline__ int32_t columns_of(int32_t set) const {
    return min(args.stage_columns, columns - set * args.stage_columns);
  }

  __device__ __forceinline__ uint32_t full(int32_t slot) const { return ptx::shared_address(&shared.barrier[0][slot]); }
  __device__ __forceinline__ uint32_t empty(int32_t slot) const {
    return ptx::shared_address(&shared.barrier[1][slot]);
  }
  __device__ __forceinline__ uint8_t* place(int32_t slot) const { return ring + slot * args.stage_columns * m.k; }

  // One thread: an entry's rows of a set's columns are one copy, or one for each panel.
  __device__ __forceinline__ void copy(int32_t slot, int32_t set, int32_t entry) const {
    const int32_t column = first + set * args.stage_columns;
    ptx::barrier_arrive_expect(full(slot), static_cast<uint32_t>(columns_of(set) * m.k));
    const int8_t* from =
        m.w + static_cast<int64_t>(shared.entry[entry].expert) * m.n * m.k + static_cast<int64_t>(column) * m.w_row;
    const auto bytes = static_cast<uint32_t>(columns_of(set) * m.w_row);
    uint32_t to = ptx::shared_address(place(slot));
#pragma unroll 1
    for (int32_t k = 0; k < m.k; k += m.w_row) {
      ptx::copy_bulk(to, from, bytes, full(slot), kernels::kEvictFirst);
      from += m.w_panel;
      to += static_cast<uint32_t>(args.layout.w_panel);
    }
  }

  // All threads: the scales of the CTA's weight rows.
  __device__ __forceinline__ void load_scales(int32_t entries) const {
    const auto thread = static_cast<int32_t>(threadIdx.x);
    constexpr int32_t kThreads = 32 * kFewDownWarps;
    if constexpr (kBlocks) {
      const int32_t words = args.layout.w_words, room = args.layout.blocks;
      const int32_t first_block = few_block_of_row(m, first);
      const int32_t blocks = few_block_of_row(m, first + columns - 1) + 1 - first_block;
#pragma unroll 1
      for (int32_t i = thread; i < entries * blocks * words; i += kThreads) {
        const int32_t part = i / words, entry = part / blocks, block = part - entry * blocks;
        few_copy_scale<P>(m, w_scales + (entry * room + block) * words,
                          shared.entry[entry].expert * m.blocks_n + first_block + block, i - part * words);
      }
    } else {
      for (int32_t i = thread; i < entries * columns; i += kThreads) {
        const int32_t entry = i / columns, expert = shared.entry[entry].expert;
        const int64_t from = m.per_tensor ? expert : static_cast<int64_t>(expert) * m.n + first + i - entry * columns;
        ptx::cp_async_4(ptx::shared_address(w_scales + i), m.scale + from, true);
      }
    }
  }

  // kRows rows of h, kFewDownWarps apart; one warp. Of longer rows, what registers cannot keep is read again.
  template <int kRows, int kKept>
  __device__ __forceinline__ void quantize(int32_t first_row, int32_t routes) const {
    const bool asymmetric = m.column_sum != nullptr;
    uint4 kept[kRows][kKept];
    float v[8];
    const auto wanted = [&](int r) {
      const int32_t row = first_row + r * kFewDownWarps;
      return row < routes && shared.expert[row] >= 0;
    };
    const auto load = [&](int r, int32_t column) {
      return *reinterpret_cast<const uint4*>(args.h + (first_row + r * kFewDownWarps) * m.k + column);
    };
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
#pragma unroll
      for (int i = 0; i < kKept; ++i) {
        const int32_t column = i * kFewColumns + lane * 8;
        kept[r][i] = wanted(r) && column < m.k ? load(r, column) : make_uint4(0, 0, 0, 0);
      }
    }
    // int8_hybrid's code is long: it stands here once, and registers are chosen at run time.
    constexpr bool kRolled = P == Promotion::hybrid;
#pragma unroll(kRolled ? 1 : kRows)
    for (int r = 0; r < kRows; ++r) {
      if (!wanted(r)) continue;
      const int32_t row = first_row + r * kFewDownWarps;
      const auto value = [&](int i) {
        if constexpr (!kRolled) return kept[r][i];
        uint4 found = kept[0][0];
#pragma unroll
        for (int n = 1; n < kRows * kKept; ++n) {  // word by word: otherwise the array would lie in memory
          const uint4& k = kept[n / kKept][n % kKept];
          const bool it = n == r * kKept + i;
          found = make_uint4(it ? k.x : found.x, it ? k.y : found.y, it ? k.z : found.z, it ? k.w : found.w);
        }
        return found;
      };
      // use(column, values) for all of the row; zeros behind its end.
      const auto for_all = [&](const auto& use) {
#pragma unroll(kRolled ? 1 : kKept)
        for (int i = 0; i < kKept; ++i) {
          if (kRolled && i * kFewColumns >= m.k) break;
          use(i * kFewColumns + lane * 8, value(i));
        }
#pragma unroll 1
        for (int32_t piece = kKept * kFewColumns; piece < m.k; piece += kFewColumns) {
          const int32_t column = piece + lane * 8;
          use(column, column < m.k ? load(r, column) : make_uint4(0, 0, 0, 0));
        }
      };
      const auto store = [&](int32_t column, uint2 q) { *reinterpret_cast<uint2*>(rows + row * m.k + column) = q; };
      if constexpr (kBlocks) {
        uint32_t* const a = a_scales + row * args.layout.a_words;
        uint32_t* const top = tops + row * m.blocks_k;
        num::SuperScale super{};
        const auto scale_and_store = [&](int32_t column, const uint4& raw, uint32_t most) {
          const FewGroup group = P == Promotion::block ? FewGroup::of_block(most) : FewGroup::of_hybrid(m, super, most);
          few_unpack(raw, v);
          store(column, group.quantize(v));
          if (few_begins_block(m, column)) few_store_scale<P>(m, a, few_block_of(m, column), group, super.f);
        };
        if constexpr (P == Promotion::hybrid) {
          for_all([&](int32_t column, const uint4& raw) {
            const uint32_t most = few_block_top(few_top_of(raw), m.block_k);
            if (few_begins_block(m, column)) top[few_block_of(m, column)] = most;
          });
          __syncwarp();
          if (m.super_groups > 1) {  // not what one meets: short code
#pragma unroll 1
            for (int32_t column = lane * 8; column < m.k; column += kFewColumns) {
              super = few_super(m, top, few_block_of(m, column));
              scale_and_store(column, load(r, column), top[few_block_of(m, column)]);
            }
            continue;
          }
          super = few_row_super(m, top);
        }
        for_all([&](int32_t column, const uint4& raw) {
          uint32_t most = 0;
          if constexpr (P == Promotion::block) most = few_block_top(few_top_of(raw), m.block_k);
          if (column < m.k) scale_and_store(column, raw, P == Promotion::block ? most : top[few_block_of(m, column)]);
        });
      } else {
        FewRange range;
        for_all([&](int32_t, const uint4& raw) {
          few_unpack(raw, v);
          range.add(v, asymmetric);
        });
        range.reduce(asymmetric);
        const FewScale s(m, range);
        for_all([&](int32_t column, const uint4& raw) {
          few_unpack(raw, v);
          if (column < m.k) store(column, s.quantize(v));
        });
        if (lane == 0) {
          shared.scale[row] = s.scale;
          shared.zero[row] = s.zero;
        }
      }
    }
  }

  // y of an entry's routes in this lane's column, of a stage at w.
  __device__ __forceinline__ void multiply_sums(const uint8_t* w, int32_t set, int32_t at, int32_t column) const {
    const FewEntry entry = shared.entry[at];
    const bool works = column < columns_of(set);
    int32_t acc[kFewTogether] = {}, offset[kFewTogether];
#pragma unroll
    for (int i = 0; i < kFewTogether; ++i) offset[i] = few_byte(entry.rows, i) * m.k;
    const uint8_t* from = w + column * args.layout.w_row + lane % 8 * 16;
    const auto dot = [&](int32_t c, int i) {
      const int4 v = *reinterpret_cast<const int4*>(from);
      acc[i] = few_dot(v, *reinterpret_cast<const int4*>(rows + offset[i] + c), acc[i]);
    };
    if (works) {
      if (entry.count == 1) {
#pragma unroll 3
        for (int32_t c = lane % 8 * 16; c < m.k; c += 128, from += args.layout.w_panel) dot(c, 0);
      } else {
        for (int32_t c = lane % 8 * 16; c < m.k; c += 128, from += args.layout.w_panel) {
#pragma unroll
          for (int i = 0; i < kFewTogether; ++i) {
            if (i < entry.count) dot(c, i);
          }
        }
      }
    }
    __syncwarp();
    int32_t sum = 0;  // of the route that this lane finishes
#pragma unroll
    for (int i = 0; i < kFewTogether; ++i) {
      if (i > 0 && i >= entry.count) break;
      int32_t total = acc[i];
#pragma unroll
      for (int by = 1; by < 8; by *= 2) total += __shfl_xor_sync(kFewAll, total, by);
      if (lane % 8 == i) sum = total;
    }
    if (!works || lane % 8 >= entry.count) return;
    const int32_t route = few_byte(entry.routes, lane % 8), c = set * args.stage_columns + column;
    const float v = few_value(m, static_cast<int64_t>(entry.expert) * m.n + first + c, sum,
                              num::from_bits(w_scales[at * columns + c]), shared.scale[route], shared.zero[route]);
    y[route * columns + c] = num::bf16_low(num::pack_bf16(v, 0.0f));
  }

  // The same with sums per K-block.
  __device__ __forceinline__ void multiply_blocks(const uint8_t* w, int32_t set, int32_t at, int32_t column) const {
    const FewEntry& entry = shared.entry[at];  // read again where it is needed: registers
    const bool works = column < columns_of(set);
    const int32_t c = set * args.stage_columns + (works ? column : 0), place = lane % kLanes;
    const int32_t block = few_block_of_row(m, first + c), number = block - few_block_of_row(m, first);
    const float v = few_multiply_blocks<P, kLanes>(
        m, works, entry, w + column * args.layout.w_row, args.layout.w_panel,
        w_scales + (at * args.layout.blocks + number) * args.layout.w_words, entry.expert * m.blocks_n + block, rows,
        m.k, a_scales, args.layout.a_words, terms + (threadIdx.x & ~31u), [](int) { return 1.0f; });
    if (!works || place >= entry.count) return;
    y[few_byte(entry.routes, place) * columns + c] =
        num::bf16_low(num::pack_bf16(few_biased(m, static_cast<int64_t>(entry.expert) * m.n + first + c, v), 0.0f));
  }

  // In slot order (docs/schemes.md section 4).
  __device__ __forceinline__ void combine() const {
    for (int32_t i = static_cast<int32_t>(threadIdx.x); i < args.routes.tokens * columns; i += 32 * kFewDownWarps) {
      const int32_t token = i / columns, column = i - token * columns;
      float o = 0.0f;
      bool begun = false;
#pragma unroll 4
      for (int32_t slot = 0; slot < args.routes.top_k; ++slot) {
        const int32_t route = token * args.routes.top_k + slot;
        const float weight = shared.weight[route], v = y[route * columns + column];
        if (shared.expert[route] < 0) continue;
        o = begun ? __fmaf_rn(weight, v, o) : __fmul_rn(weight, v);
        begun = true;
      }
      const int64_t at = token * args.out_stride + first + column;
      if (args.out_type == OutType::f32) {
        float* to = static_cast<float*>(args.out) + at;
        *to = num::canonical(args.accumulate ? __fadd_rn(*to, o) : o);
      } else {
        uint16_t* to = static_cast<uint16_t*>(args.out) + at;
        if (args.accumulate) {
          o = __fadd_rn(args.out_type == OutType::bf16 ? num::bf16_low(*to) : num::fp16_to_float(*to), o);
        }
        *to = static_cast<uint16_t>(args.out_type == OutType::bf16 ? num::pack_bf16(o, 0.0f) : num::pack_fp16(o, 0.0f));
      }
    }
  }
};

template <Promotion P, int kLanes>
__device__ __forceinline__ void few_down(const FewDownArgs& args) {
  extern __shared__ __align__(128) uint8_t memory[];
  FewShared& shared = *reinterpret_cast<FewShared*>(memory);
  const FewMatrix& m = args.w2;
  const int32_t routes = args.routes.tokens * args.routes.top_k;
  const int32_t begin = static_cast<int32_t>(blockIdx.x) * args.columns;
  const FewDown<P, kLanes> d{args,
                             m,
                             shared,
                             memory + kFewHeaderBytes,
                             reinterpret_cast<int8_t*>(memory + args.layout.rows),
                             reinterpret_cast<FewTerm*>(memory + args.layout.terms),
                             reinterpret_cast<uint32_t*>(memory + args.layout.w),
                             reinterpret_cast<float*>(memory + args.layout.y),
                             reinterpret_cast<uint32_t*>(memory + args.layout.a),
                             reinterpret_cast<uint32_t*>(memory + args.layout.top),
                             few_lane(),
                             few_warp(),
                             begin,
                             min(args.columns, m.n - begin)};
  if (threadIdx.x == 0) {
    for (int32_t i = 0; i < args.stages; ++i) {
      ptx::barrier_init(d.full(i), 1);
      ptx::barrier_init(d.empty(i), args.layout.stream_warps);
    }
    ptx::barrier_init_fence();
  }
  // The routes were there before gate_up let this kernel start (few_gate_up), and weights always are.
  if (d.warp == 1) few_group(shared, args.routes, false);
  __syncthreads();
  if (threadIdx.x == 0) {
    const int32_t count = shared.entries;
    for (int32_t i = 0; i < min(d.sets() * count, args.stages); ++i) d.copy(i, i / count, i % count);
  }
  // Copied, not loaded: loads would be waited for, and come behind all weights that are under way.
  d.load_scales(shared.entries);
  if (threadIdx.x < routes) {
    const auto route = static_cast<int32_t>(threadIdx.x), token = route / args.routes.top_k;
    const float* const from =
        args.routes.topk_weights + token * args.routes.weights_stride + route - token * args.routes.top_k;
    if (args.routes.weight_on_input) shared.weight[route] = 1.0f;
    ptx::cp_async_4_if(!args.routes.weight_on_input, ptx::shared_address(shared.weight + route), from);
  }
  ptx::cp_async_commit();
  ptx::grid_dependency_wait();
  ptx::grid_dependency_launch();
  if (m.k <= 3 * kFewColumns) {
    for (int32_t row = d.warp; row < routes; row += 2 * kFewDownWarps) d.template quantize<2, 3>(row, routes);
  } else {
    for (int32_t row = d.warp; row < routes; row += kFewDownWarps) d.template quantize<1, 4>(row, routes);
  }
  ptx::cp_async_wait<0>();
  __syncthreads();

  // A slot of the ring serves one stream (args.stages): none may wait for a slot's next content but one.
  const int32_t warps = args.layout.stream_warps, streams = args.layout.streams;
  // Read and computed again: there are no registers to keep what was known before h was quantised.
  const int32_t entries = shared.entries, all = d.sets() * entries, warp = few_warp();
  const int32_t stream = warp / warps, column = ((warp - stream * warps) * 32 + d.lane) / kLanes;
  if (stream < streams) {
    int32_t set = 0, entry = stream, slot = stream;
    uint32_t phase = 0;
    for (int32_t i = stream; i < all; i += streams) {
      for (; entry >= entries; entry -= entries) ++set;
      ptx::barrier_wait(d.full(slot), phase);
      if constexpr (P != Promotion::channel) {
        d.multiply_blocks(d.place(slot), set, entry, column);
      } else {
        d.multiply_sums(d.place(slot), set, entry, column);
      }
      // The stage's next content, once all its warps have read this one.
      if (const int32_t next = i + args.stages; next < all) {
        __syncwarp();
        if (d.lane == 0) {
          ptx::barrier_arrive(d.empty(slot));
          if (column == 0) {
            ptx::barrier_wait(d.empty(slot), phase);
            d.copy(slot, next / entries, next % entries);
          }
        }
      }
      entry += streams;
      slot += streams;
      if (slot >= args.stages) {
        slot = stream;
        phase ^= 1u;
      }
    }
  }
  __syncthreads();
  d.combine();
}

}  // namespace octomoe::sm90
