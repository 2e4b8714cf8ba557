// The first kernel of a layer of a few tokens (few_tokens.cuh): x -> int8 -> w13 -> SwiGLU -> h.
//
// All pairs of a gate and an up row are shared out evenly over the CTAs, and a CTA's over its warps. Weights go straight
// to registers, kFewDepth units ahead: a unit is 1 KB of each row of a pair, and as soon as one is multiplied its
// registers are loaded again. Results wait until a warp is full of them, so that the epilogue's latency is paid once: in
// lanes, or, with sums per K-block, in shared memory, where a lane promotes those of its result one after the other.
#pragma once

#include "sm90/few_tokens.cuh"

namespace octomoe::sm90 {

inline constexpr int kFewDepth = 5;                // units in flight: 80 KB a CTA
inline constexpr int kFewPieces = kFewUnit / 512;  // loads of a warp
inline constexpr int kFewPrefetchBytes = 8192;     // a warp's, ahead of the first loads

template <Promotion P>
struct FewGateUp {
  static constexpr bool kBlocks = P != Promotion::channel;
  const FewGateUpArgs& args;
  const FewMatrix& m;
  FewShared& shared;
  int8_t* rows;        // of x, quantised
  uint32_t* a_scales;  // of each token
  uint32_t* w_scales;  // of each scale block of the CTA's columns, gate and up
  int32_t* sums;       // of this warp's results, per piece of K: gate's, then up's
  int32_t lane, warp, width, stride;
  int32_t first_block, blocks;  // that the CTA's columns meet

  // The maxima of x's pieces of kFewColumns values; the loads of some pieces at once.
  __device__ __forceinline__ void measure() const {
    constexpr int kAtOnce = 4;
    const int32_t pieces = stride / kFewColumns, all = args.routes.tokens * pieces;
    for (int32_t first = warp; first < all; first += kAtOnce * kFewGateUpWarps) {
      float v[kAtOnce][8] = {};
#pragma unroll
      for (int j = 0; j < kAtOnce; ++j) {
        const int32_t i = first + j * kFewGateUpWarps, token = i / pieces;
        const int32_t column = (i - token * pieces) * kFewColumns + lane * 8;
        if (i < all && column < m.k) kernels::load_elems(args.x, token, column, v[j]);
      }
#pragma unroll
      for (int j = 0; j < kAtOnce; ++j) {
        const int32_t i = first + j * kFewGateUpWarps;
        if (i >= all) break;
        if constexpr (kBlocks) {
          const int32_t token = i / pieces, column = (i - token * pieces) * kFewColumns + lane * 8;
          FewRange range;
          range.add(v[j], false);
          const uint32_t top = few_block_top(range.top, m.block_k);
          if (few_begins_block(m, column)) shared.top[0][token * m.blocks_k + few_block_of(m, column)] = top;
        } else {
          FewRange range;
          range.add(v[j], m.column_sum != nullptr);
          range.reduce(m.column_sum != nullptr);
          if (lane == 0) {
            shared.top[0][i] = range.top;
            shared.top[1][i] = range.low;
            shared.top[2][i] = range.high;
          }
        }
      }
    }
  }
  // Reads x again, from L1. No weights are under way to registers yet: loads return in their order, also those that hit.
  __device__ __forceinline__ void quantize() const {
    const int32_t pieces = stride / kFewColumns;
    for (int32_t i = warp; i < args.routes.tokens * pieces; i += kFewGateUpWarps) {
      const int32_t token = i / pieces, piece = i - token * pieces, column = piece * kFewColumns + lane * 8;
      uint2 q = make_uint2(0, 0);
      float v[8];
      if constexpr (kBlocks) {
        const uint32_t* const tops = shared.top[0] + token * m.blocks_k;
        num::SuperScale super{};
        if (P == Promotion::hybrid && m.super_groups == 1) super = few_row_super(m, tops);
        if (column < m.k) {
          const int32_t block = few_block_of(m, column);
          if (P == Promotion::hybrid && m.super_groups > 1) super = few_super(m, tops, block);
          const FewGroup group =
              P == Promotion::block ? FewGroup::of_block(tops[block]) : FewGroup::of_hybrid(m, super, tops[block]);
          kernels::load_elems(args.x, token, column, v);
          q = group.quantize(v);
          if (few_begins_block(m, column)) {
            few_store_scale<P>(m, a_scales + token * args.layout.a_words, block, group, super.f);
          }
        }
      } else {
        FewRange range;
        if (lane < pieces) {
          const int32_t at = token * pieces + lane;
          range.top = shared.top[0][at];
          range.low = shared.top[1][at];
          range.high = shared.top[2][at];
        }
        range.reduce(m.column_sum != nullptr);
        const FewScale s(m, range);
        if (column < m.k) {
          kernels::load_elems(args.x, token, column, v);
          q = s.quantize(v);
        }
        if (piece == 0 && lane == 0) {
          shared.scale[token] = s.scale;
          shared.zero[token] = s.zero;
        }
      }
      *reinterpret_cast<uint2*>(rows + token * stride + column) = q;
    }
  }

  // A place in the sequence of (entry, column), kFewGateUpWarps columns from pair to pair.
  struct Place {
    int32_t entry, column;
    __device__ __forceinline__ void advance(int32_t width) {
      for (column += kFewGateUpWarps; column >= width; column -= width) ++entry;
    }
  };
  __device__ __forceinline__ Place place(int32_t pair) const {
    const int32_t entry = pair / width;
    return {entry, pair - entry * width};
  }

  // All threads: the scales of the CTA's weight rows.
  __device__ __forceinline__ void copy_scales() const {
    const int32_t words = args.layout.w_words, half = args.layout.half_blocks;
#pragma unroll 1
    for (auto i = static_cast<int32_t>(threadIdx.x); i < blocks * 2 * words; i += 32 * kFewGateUpWarps) {
      const int32_t part = i / words, block = first_block + part / 2, entry = block / half;
      const int32_t row = shared.entry[entry].expert * m.blocks_n + part % 2 * half + block - entry * half;
      few_copy_scale<P>(m, w_scales + part * words, row, i - part * words);
    }
    ptx::cp_async_arrive(ptx::shared_address(&shared.scales_full));
  }
  // Scale blocks are counted through all entries.
  __device__ __forceinline__ int32_t block_of(const Place& p) const {
    return p.entry * args.layout.half_blocks + p.column / m.block_n;
  }

  // Of a result of this warp, counted from its first: half 0: of gate, 1: of up. Slots are used in turn.
  __device__ __forceinline__ int32_t* sums_of(int32_t result, int32_t half) const {
    return sums + (result & (args.layout.slots - 1)) * args.layout.slot_words + half * few_pieces(m);
  }
  // d[j][half]: of the lane's 16 bytes of each load and row; eight lanes have a piece. Exchanging instead of adding up
  // everywhere, four shuffles do for four sums.
  __device__ __forceinline__ void keep_pieces(int32_t result, int32_t column, const int32_t (&d)[kFewPieces][2]) const {
    static_assert(kFewPieces == 2);
    const bool load = (lane & 1) != 0, half = (lane & 2) != 0;
    int32_t mine[2];
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      mine[i] = (load ? d[1][i] : d[0][i]) + __shfl_xor_sync(kFewAll, load ? d[0][i] : d[1][i], 1);
    }
    int32_t sum = (half ? mine[1] : mine[0]) + __shfl_xor_sync(kFewAll, half ? mine[0] : mine[1], 2);
    sum += __shfl_xor_sync(kFewAll, sum, 4);
    const int32_t piece = column / kFewPiece + (load ? 4 : 0) + lane / 8;
    if ((lane & 4) == 0 && piece < few_pieces(m)) sums_of(result, half ? 1 : 0)[piece] = sum;
  }
  // Sums per piece -> v, without bias. row: of [E, NB]; factor: multiplies the token's scales.
  __device__ __forceinline__ float promote(const int32_t* sum, const uint32_t* w, int32_t row, const uint32_t* a,
                                           float factor) const {
    const int32_t pieces = few_pieces(m), each = m.block_k / kFewPiece;
    const auto sum_of = [&](int32_t block) {
      int32_t total = sum[block * each];
      if (each == 2 && 2 * block + 1 < pieces) total += sum[2 * block + 1];
      return total;
    };
    float v = -0.0f;  // fma(x, p, -0) is x * p, its sign included
    if constexpr (P == Promotion::block) {
#pragma unroll 4
      for (int32_t b = 0; b < m.blocks_k; ++b) {
        const float scale = __fmul_rn(num::from_bits(w[b]), __fmul_rn(num::from_bits(a[b]), factor));
        v = __fmaf_rn(__int2float_rn(sum_of(b)), scale, v);
      }
    } else {
      const uint8_t* w_q = few_w_q(m, w, row);
      const uint32_t* a_q = a + m.super_groups;
      for (int32_t b = 0; b < m.blocks_k;) {
        const FewChunk chunk(m, b);
        int32_t total = 0;
#pragma unroll 4
        for (; b < chunk.end; ++b) total += static_cast<int32_t>(w_q[b] * a_q[b]) * sum_of(b);
        const float by = __fmul_rn(num::from_bits(a[chunk.group]), factor);
        v = __fmaf_rn(__int2float_rn(total), __fmul_rn(num::from_bits(w[chunk.group]), by), v);
      }
    }
    return v;
  }

  // One result: v of the first and of the second half of w13, in this order.
  __device__ __forceinline__ void store(const Place& p, int32_t route, float first, float second) const {
    const float g = args.up_first ? second : first, u = args.up_first ? first : second;
    const float act = __fmul_rn(num::silu(num::min_nan(g, args.limit)), num::clamp(u, -args.limit, args.limit));
    args.h[static_cast<int64_t>(route) * width + p.column] = static_cast<uint16_t>(num::pack_bf16(act, 0.0f));
  }
  __device__ __forceinline__ float factor_of(int32_t token, int32_t route) const {
    const Routes& r = args.routes;
    return r.weight_on_input ? r.topk_weights[token * r.weights_stride + route - token * r.top_k] : 1.0f;
  }

  // Lane i < `filled` finishes a result: tag = pair * kFewTogether + number of the route in its entry; sum: its sums;
  // scale: lane j has those of pair j's rows.
  __device__ __forceinline__ void finish_sums(int32_t filled, const int32_t (&sum)[2], int32_t tag, int32_t first_pair,
                                              const float (&scale)[2]) const {
    const int32_t pair = tag / kFewTogether;
    const float s0 = __shfl_sync(kFewAll, scale[0], pair), s1 = __shfl_sync(kFewAll, scale[1], pair);
    if (lane >= filled) return;
    const Place p = place(first_pair + pair * kFewGateUpWarps);
    const FewEntry entry = shared.entry[p.entry];
    const int32_t token = few_byte(entry.rows, tag % kFewTogether), route = few_byte(entry.routes, tag % kFewTogether);
    const float a_scale = __fmul_rn(shared.scale[token], factor_of(token, route));
    const int64_t row = static_cast<int64_t>(entry.expert) * m.n + p.column;
    store(p, route, few_value(m, row, sum[0], s0, a_scale, shared.zero[token]),
          few_value(m, row + width, sum[1], s1, a_scale, shared.zero[token]));
  }
  // The same with sums per K-block, behind `done` results that are finished already: two lanes, 16 apart, for each.
  __device__ __forceinline__ void finish_blocks(int32_t done, int32_t filled, int32_t tags, int32_t first_pair) const {
    ptx::barrier_wait(ptx::shared_address(&shared.scales_full), 0);
    __syncwarp();  // other lanes wrote the sums
    const int32_t half = lane / 16, words = args.layout.w_words;
#pragma unroll 1
    for (int32_t result = lane % 16; result - lane % 16 < filled; result += 16) {
      const int32_t tag = __shfl_sync(kFewAll, tags, result);
      const bool exists = result < filled;
      const Place p = place(first_pair + (exists ? tag / kFewTogether * kFewGateUpWarps : 0));
      const FewEntry entry = shared.entry[p.entry];
      const int32_t token = few_byte(entry.rows, tag % kFewTogether), route = few_byte(entry.routes, tag % kFewTogether);
      float v = 0.0f;
      if (exists) {
        const int32_t block = block_of(p);
        const int32_t w_row =
            entry.expert * m.blocks_n + block - p.entry * args.layout.half_blocks + half * args.layout.half_blocks;
        v = promote(sums_of(done + result, half), w_scales + ((block - first_block) * 2 + half) * words, w_row,
                    a_scales + token * args.layout.a_words, factor_of(token, route));
        v = few_biased(m, static_cast<int64_t>(entry.expert) * m.n + p.column + half * width, v);
      }
      const float other = __shfl_xor_sync(kFewAll, v, 16);
      if (exists && half == 0) store(p, route, v, other);
    }
    __syncwarp();  // the slots may be written again
  }

  // Has L2 fetch the first rows of all warps, of the CTA's `pairs` from `first_pair` on, while x is quantised: a thread
  // asks for a row, or for the rows' piece of a panel.
  __device__ __forceinline__ void prefetch(int32_t first_pair, int32_t pairs) const {
    const auto thread = static_cast<int32_t>(threadIdx.x), half = thread % 2;
    const int32_t rows = min(pairs, kFewGateUpWarps * max(1, kFewPrefetchBytes / (2 * m.k)));
    const bool by_panels = m.w_row != m.k;
    if (rows <= 0 || thread / 2 >= (by_panels ? m.k / m.w_row : rows)) return;
    const Place p = place(first_pair + (by_panels ? 0 : thread / 2));
    const int8_t* const from = m.w + static_cast<int64_t>(shared.entry[p.entry].expert) * m.n * m.k +
                               static_cast<int64_t>(p.column + half * width) * m.w_row +
                               (by_panels ? thread / 2 * static_cast<int64_t>(m.w_panel) : 0);
    ptx::prefetch_bulk(from, static_cast<uint32_t>((by_panels ? min(rows, width - p.column) : 1) * m.w_row));
  }

  // Up to 32 pairs of this warp, from `first_pair` on.
  __device__ __forceinline__ void run(int32_t first_pair, int32_t pairs, bool first, bool last) const {
    const int64_t up = static_cast<int64_t>(width) * m.w_row;
    int4 w[kFewDepth][kFewPieces][2] = {};
    // What is loaded next, and what is multiplied next.
    Place to_load = place(first_pair), at = to_load;
    int32_t loads = pairs, load_column = lane * 16, column = 0;
    const int8_t* from = nullptr;
    const auto open = [&] {
      from = m.w + static_cast<int64_t>(shared.entry[to_load.entry].expert) * m.n * m.k +
             static_cast<int64_t>(to_load.column) * m.w_row + lane / 8 * static_cast<int64_t>(m.w_panel) + lane % 8 * 16;
    };
    const auto load = [&](int4(&unit)[kFewPieces][2]) {
      if (loads == 0) return;
#pragma unroll
      for (int i = 0; i < kFewPieces; ++i) {
        const int32_t c = load_column + 512 * i;
        const int8_t* const piece = from + i * 4 * static_cast<int64_t>(m.w_panel);
        ptx::load_once(unit[i][0], piece, c < m.k);
        ptx::load_once(unit[i][1], piece + up, c < m.k);
      }
      from += kFewUnit / 128 * static_cast<int64_t>(m.w_panel);
      load_column += kFewUnit;
      if (load_column - lane * 16 < m.k) return;
      load_column = lane * 16;
      to_load.advance(width);
      if (--loads != 0) open();
    };
    if (pairs > 0) open();
#pragma unroll
    for (int i = 0; i < kFewDepth; ++i) load(w[i]);
    if (kBlocks && first) copy_scales();
    float scale[2] = {};  // channel: lane i: of pair i
    if (!kBlocks && lane < pairs) {
      const Place p = place(first_pair + lane * kFewGateUpWarps);
      const int32_t expert = shared.entry[p.entry].expert;
      const int64_t row = static_cast<int64_t>(expert) * m.n + p.column;
      scale[0] = m.scale[m.per_tensor ? expert : row];
      scale[1] = m.scale[m.per_tensor ? expert : row + width];
    }
    int32_t acc[kFewTogether][2] = {}, sum[2] = {}, tag = 0, done = 0, filled = 0, pair = 0;
    int32_t count = 0;
    uint32_t entry_rows = 0;
    const auto enter = [&] {
      count = shared.entry[at.entry].count;
      entry_rows = shared.entry[at.entry].rows;
    };
    const auto multiply = [&](const int4(&unit)[kFewPieces][2]) {
      const auto dots = [&](int i, const auto& use) {
        const int8_t* a = rows + few_byte(entry_rows, i) * stride + column + lane * 16;
#pragma unroll
        for (int j = 0; j < kFewPieces; ++j) {
          const int4 v = *reinterpret_cast<const int4*>(a + 512 * j);
#pragma unroll
          for (int half = 0; half < 2; ++half) use(j, half, v);
        }
      };
      if constexpr (kBlocks) {
#pragma unroll 1
        for (int i = 0; i < count; ++i) {
          int32_t d[kFewPieces][2];
          dots(i, [&](int j, int half, const int4& v) { d[j][half] = few_dot(unit[j][half], v, 0); });
          keep_pieces(done + filled + i, column, d);
        }
      } else {
#pragma unroll
        for (int i = 0; i < kFewTogether; ++i) {
          if (i > 0 && i >= count) break;
          dots(i, [&](int j, int half, const int4& v) { acc[i][half] = few_dot(unit[j][half], v, acc[i][half]); });
        }
      }
      column += kFewUnit;
      if (column < m.k) return;
#pragma unroll
      for (int i = 0; i < kFewTogether; ++i) {
        if (i > 0 && i >= count) break;
        if (lane == filled + i) tag = pair * kFewTogether + i;
        if constexpr (!kBlocks) {
#pragma unroll
          for (int half = 0; half < 2; ++half) {
            const int32_t total = few_sum(acc[i][half]);
            if (lane == filled + i) sum[half] = total;
            acc[i][half] = 0;
          }
        }
      }
      filled += count;
      column = 0;
      ++pair;
      at.advance(width);
      if (pair < pairs) enter();
    };
    if (pairs > 0) enter();
    // Room must be for the results that kFewDepth units may end or begin: five of them; of rows of three or more units,
    // three.
    const int32_t most = kBlocks && args.layout.slots < 32 ? 16 - 3 * kFewTogether
                                                                      : 32 - kFewDepth * kFewTogether;
    while (pair < pairs) {
#pragma unroll
      for (int i = 0; i < kFewDepth; ++i) {
        if (pair < pairs) {
          multiply(w[i]);
          load(w[i]);
        }
      }
      // The last weights are under way: from here on `down` may load beside this kernel.
      if (last && loads == 0) ptx::grid_dependency_launch();
      if (filled > most || pair == pairs) {
        if constexpr (kBlocks) {
          finish_blocks(done, filled, tag, first_pair);
        } else {
          finish_sums(filled, sum, tag, first_pair, scale);
        }
        done += filled;
        filled = 0;
      }
    }
  }
};

template <Promotion P>
__device__ __forceinline__ void few_gate_up(const FewGateUpArgs& args) {
  extern __shared__ __align__(128) uint8_t memory[];
  FewShared& shared = *reinterpret_cast<FewShared*>(memory);
  using Gate = FewGateUp<P>;
  const FewMatrix& m = args.w13;
  // Whoever wrote x and the routes has ended from here on. It has for `down` as well, since no CTA lets that start
  // before its own wait is over.
  ptx::grid_dependency_wait();
  const int warp = few_warp();
  if (warp == kFewGateUpWarps - 1) few_group(shared, args.routes, true);
  if (Gate::kBlocks && threadIdx.x == 0) {
    ptx::barrier_init(ptx::shared_address(&shared.scales_full), 32 * kFewGateUpWarps);
    ptx::barrier_init_fence();
  }
  Gate g{args,
         m,
         shared,
         reinterpret_cast<int8_t*>(memory + kFewHeaderBytes),
         reinterpret_cast<uint32_t*>(memory + args.layout.a),
         reinterpret_cast<uint32_t*>(memory + args.layout.w),
         reinterpret_cast<int32_t*>(memory + args.layout.sums) +
             warp * args.layout.slots * args.layout.slot_words,
         few_lane(),
         warp,
         m.n / 2,
         kernels::few_x_stride(m.k),
         0,
         0};
  g.measure();
  __syncthreads();
  const int64_t all = static_cast<int64_t>(shared.entries) * g.width;
  const auto begin = static_cast<int32_t>(all * blockIdx.x / gridDim.x);
  const auto end = static_cast<int32_t>(all * (blockIdx.x + 1) / gridDim.x);
  int32_t pair = begin + g.warp, left = max(0, (end - pair + kFewGateUpWarps - 1) / kFewGateUpWarps);
  g.prefetch(begin, end - begin);
  g.quantize();
  __syncthreads();
  if constexpr (Gate::kBlocks) {
    g.first_block = g.block_of(g.place(begin));
    g.blocks = begin < end ? g.block_of(g.place(end - 1)) - g.first_block + 1 : 0;
  }
  bool first = true;
  do {
    const int32_t pairs = min(left, 32);
    left -= pairs;
    g.run(pair, pairs, first, left == 0);
    pair += pairs * kFewGateUpWarps;
    first = false;
  } while (left > 0);
}

}  // namespace octomoe::sm90
