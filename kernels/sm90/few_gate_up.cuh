// The first kernel of a layer of a few tokens (few_tokens.cuh): x -> int8 -> w13 -> SwiGLU -> h.
//
// All pairs of a gate and an up row are shared out evenly over the CTAs, and a CTA's over its warps in turn. One warp
// asks for them, by bulk copies into a ring, from when the routes are known, while the others quantise x; nothing that
// they do delays it, and no load of theirs comes behind weights. Results wait in lanes until a warp is full of them, so
// that the epilogue's latency is paid once.
#pragma once

#include "sm90/few_tokens.cuh"

namespace octomoe::sm90 {

inline constexpr int kFewPieces = kFewUnit / 512;  // 16 bytes a lane

template <Promotion P>
struct FewGateUp {
  static constexpr bool kBlocks = P != Promotion::channel;
  const FewGateUpArgs& args;
  const FewMatrix& m;
  FewShared& shared;
  uint8_t* ring;
  int8_t* rows;        // of x, quantised
  FewTerm* terms;      // of all warps
  uint32_t* a_scales;  // of each token
  uint32_t* w_scales;  // of each scale block of the CTA's columns, gate and up
  int32_t lane, warp, width, stride;
  int32_t first_block, blocks;  // that the CTA's columns meet

  // Pieces of x: each warp has some that follow one another; the first ones stay in registers.
  static constexpr int kKept = 4;
  using Kept = float[kKept][8];
  __device__ __forceinline__ int32_t pieces() const { return stride / kFewColumns; }
  __device__ __forceinline__ int32_t pieces_each() const {
    return (args.routes.tokens * pieces() + kFewGateUpWarps - 1) / kFewGateUpWarps;
  }

  // Their maxima; the loads of kKept pieces at once.
  __device__ __forceinline__ void measure(Kept& v) const {
    const int32_t all = args.routes.tokens * pieces(), each = pieces_each(), first = warp * each;
#pragma unroll 1
    for (int32_t from = (each - 1) / kKept * kKept; from >= 0; from -= kKept) {  // the first ones last
      const int32_t end = min(first + each, all);
#pragma unroll
      for (int j = 0; j < kKept; ++j) {
        const int32_t i = first + from + j, token = i / pieces();
        const int32_t column = (i - token * pieces()) * kFewColumns + lane * 8;
#pragma unroll
        for (int e = 0; e < 8; ++e) v[j][e] = 0.0f;
        if (i < end && column < m.k) kernels::load_elems(args.x, token, column, v[j]);
      }
#pragma unroll
      for (int j = 0; j < kKept; ++j) {
        const int32_t i = first + from + j;
        if (i >= end) break;
        if constexpr (kBlocks) {
          const int32_t token = i / pieces(), column = (i - token * pieces()) * kFewColumns + lane * 8;
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
  __device__ __forceinline__ void quantize(const Kept& kept) const {
    const int32_t each = pieces_each(), first = warp * each, end = min(first + each, args.routes.tokens * pieces());
    int32_t known = -1;  // the token whose scale is
    FewScale s{};
#pragma unroll 1
    for (int32_t i = first; i < end; ++i) {
      const int32_t token = i / pieces(), piece = i - token * pieces(), column = piece * kFewColumns + lane * 8;
      uint2 q = make_uint2(0, 0);
      float v[8];
      if (i - first < kKept) {
#pragma unroll
        for (int e = 0; e < 8; ++e) {
          v[e] = kept[0][e];
#pragma unroll
          for (int j = 1; j < kKept; ++j) v[e] = i - first == j ? kept[j][e] : v[e];
        }
      } else if (column < m.k) {
        kernels::load_elems(args.x, token, column, v);
      }
      if constexpr (kBlocks) {
        const uint32_t* const tops = shared.top[0] + token * m.blocks_k;
        num::SuperScale super{};
        if (P == Promotion::hybrid && m.super_groups == 1) super = few_row_super(m, tops);
        if (column < m.k) {
          const int32_t block = few_block_of(m, column);
          if (P == Promotion::hybrid && m.super_groups > 1) super = few_super(m, tops, block);
          const FewGroup group =
              P == Promotion::block ? FewGroup::of_block(tops[block]) : FewGroup::of_hybrid(m, super, tops[block]);
          q = group.quantize(v);
          if (few_begins_block(m, column)) {
            few_store_scale<P>(m, a_scales + token * args.layout.a_words, block, group, super.f);
          }
        }
      } else {
        if (token != known) {
          known = token;
          FewRange range;
          if (lane < pieces()) {
            const int32_t at = token * pieces() + lane;
            range.top = shared.top[0][at];
            range.low = shared.top[1][at];
            range.high = shared.top[2][at];
          }
          range.reduce(m.column_sum != nullptr);
          s = FewScale(m, range);
        }
        if (column < m.k) q = s.quantize(v);
        if (piece == 0 && lane == 0) {
          shared.scale[token] = s.scale;
          shared.zero[token] = s.zero;
        }
      }
      *reinterpret_cast<uint2*>(rows + token * stride + column) = q;
    }
  }

  // A place in the sequence of (entry, column); a warp's pairs are kFewGateUpWarps columns apart.
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

  // The warp that copies: the scales of the CTA's weight rows, before any weights, behind which they would come.
  __device__ __forceinline__ void copy_scales() const {
    const int32_t words = args.layout.w_words, half = args.layout.half_blocks;
#pragma unroll 1
    for (int32_t i = lane; i < blocks * 2 * words; i += 32) {
      const int32_t part = few_divide(i, args.layout.w_words_inverse), block = first_block + part / 2;
      const int32_t entry = few_divide(block, args.layout.half_blocks_inverse);
      const int32_t row = shared.entry[entry].expert * m.blocks_n + part % 2 * half + block - entry * half;
      few_copy_scale<P>(m, w_scales + part * words, row, i - part * words);
    }
    ptx::cp_async_arrive(ptx::shared_address(&shared.scales_full));
  }
  // Scale blocks are counted through all entries.
  __device__ __forceinline__ int32_t block_of(const Place& p) const {
    return p.entry * args.layout.half_blocks + few_block_of_row(m, p.column);
  }

  // One result: v of the first and of the second half of w13, in this order.
  __device__ __forceinline__ void store(const Place& p, int32_t route, float first, float second) const {
    const float g = args.up_first ? second : first, u = args.up_first ? first : second;
    const float act = __fmul_rn(num::silu(num::min_nan(g, args.limit)), num::clamp(u, -args.limit, args.limit));
    args.h[static_cast<int64_t>(route) * width + p.column] = static_cast<uint16_t>(num::pack_bf16(act, 0.0f));
  }
  // What is known of a result before its epilogue: sums; with sums per K-block, values without bias.
  using Value = kernels::Either<kBlocks, float, int32_t>;

  // Lane i < `filled` finishes a result: tag = pair * kFewTogether + number of the route in its entry; value: of gate
  // and up; scale (channel): lane j has those of pair j's rows.
  __device__ __forceinline__ void finish(int32_t filled, const Value (&value)[2], int32_t tag, int32_t first_pair,
                                         const float (&scale)[2]) const {
    const int32_t pair = tag / kFewTogether;
    float s[2];
    if constexpr (!kBlocks) {
#pragma unroll
      for (int half = 0; half < 2; ++half) s[half] = __shfl_sync(kFewAll, scale[half], pair);
    }
    if (lane >= filled) return;
    const Place p = place(first_pair + pair * kFewGateUpWarps);
    const FewEntry entry = shared.entry[p.entry];
    const int32_t token = few_byte(entry.rows, tag % kFewTogether), route = few_byte(entry.routes, tag % kFewTogether);
    const int64_t row = static_cast<int64_t>(entry.expert) * m.n + p.column;
    float v[2];
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      if constexpr (kBlocks) {
        v[half] = few_biased(m, row + half * width, value[half]);
      } else {
        const float a_scale = __fmul_rn(shared.scale[token], shared.weight[route]);
        v[half] = few_value(m, row + half * width, value[half], s[half], a_scale, shared.zero[token]);
      }
    }
    store(p, route, v[0], v[1]);
  }

  // ---- the ring ----
  __device__ __forceinline__ uint32_t full(int32_t slot) const { return ptx::shared_address(&shared.barrier[0][slot]); }
  __device__ __forceinline__ uint32_t empty(int32_t slot) const {
    return ptx::shared_address(&shared.barrier[1][slot]);
  }
  __device__ __forceinline__ int32_t half_bytes() const { return args.layout.stage_pairs * m.k; }
  __device__ __forceinline__ uint8_t* stage(int32_t slot) const { return ring + slot * 2 * half_bytes(); }

  // Where the warp that copies is; left: the CTA's pairs that it has not asked for.
  struct Copier {
    Place at{};
    int32_t left = 0, slot = 0;
    uint32_t parity = 1;  // the ring is empty
  };
  // The next stage: of its pairs, those of one entry are a copy of gate rows and one of up rows, or two for each panel.
  __device__ __forceinline__ void copy_stage(Copier& c) const {
    ptx::barrier_wait(empty(c.slot), c.parity);
    int32_t pairs = min(args.layout.stage_pairs, c.left);
    c.left -= pairs;
    if (lane == 0) ptx::barrier_arrive_expect(full(c.slot), static_cast<uint32_t>(2 * pairs * m.k));
    __syncwarp();
    uint32_t to = ptx::shared_address(stage(c.slot));
    while (pairs > 0) {
      const int32_t together = min(pairs, width - c.at.column);
      const int8_t* const from = m.w + static_cast<int64_t>(shared.entry[c.at.entry].expert) * m.n * m.k +
                                 static_cast<int64_t>(c.at.column) * m.w_row;
#pragma unroll 1
      for (int32_t i = lane; i * m.w_row < 2 * m.k; i += 32) {
        const int32_t half = i % 2, panel = i / 2;
        ptx::copy_bulk(to + static_cast<uint32_t>(half * half_bytes() + panel * args.layout.w_panel),
                       from + static_cast<int64_t>(half) * width * m.w_row + panel * static_cast<int64_t>(m.w_panel),
                       static_cast<uint32_t>(together * m.w_row), full(c.slot), kernels::kEvictFirst);
      }
      to += static_cast<uint32_t>(together * m.w_row);
      pairs -= together;
      c.at.column += together;
      if (c.at.column == width) {
        c.at.column = 0;
        ++c.at.entry;
      }
    }
    if (++c.slot == args.layout.stages) {
      c.slot = 0;
      c.parity ^= 1u;
    }
  }

  // The warp that copies: half of the weights that this CTA's number of `down` will ask for, from the first on, is
  // fetched into L2. From when the last of w13 is asked for until `down` asks, nothing else would be.
  __device__ __forceinline__ void fetch_down() const {
    const FewMatrix& w2 = args.w2;
    const int32_t begin = static_cast<int32_t>(blockIdx.x) * args.columns, columns = min(args.columns, w2.n - begin);
    if (columns <= 0) return;
    const int32_t entries = shared.entries, sets = (columns + args.stage_columns - 1) / args.stage_columns;
    const int32_t stages = min(sets * entries / 2, kernels::kFewFetchBytes / (args.stage_columns * w2.k));
#pragma unroll 1
    for (int32_t i = lane; i < stages; i += 32) {
      const int32_t first = i / entries * args.stage_columns;
      const auto bytes = static_cast<uint32_t>(min(args.stage_columns, columns - first) * w2.w_row);
      const int8_t* from = w2.w + static_cast<int64_t>(shared.entry[i % entries].expert) * w2.n * w2.k +
                           static_cast<int64_t>(begin + first) * w2.w_row;
#pragma unroll 1
      for (int32_t k = 0; k < w2.k; k += w2.w_row, from += w2.w_panel) ptx::prefetch_bulk(from, bytes);
    }
  }

  // The sums of a pair's rows with those of an entry's routes; a warp.
  __device__ __forceinline__ void multiply_sums(const uint8_t* from, const FewEntry& entry,
                                                int32_t (&sum)[kFewTogether][2]) const {
    const int32_t count = entry.count;
    const uint32_t entry_rows = entry.rows;
    from += lane / 8 * args.layout.w_panel + lane % 8 * 16;
#pragma unroll 1
    for (int32_t column = 0; column < m.k; column += kFewUnit) {
      int4 unit[kFewPieces][2];
#pragma unroll
      for (int j = 0; j < kFewPieces; ++j) {
        const bool exists = column + 512 * j + lane * 16 < m.k;
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          unit[j][half] = exists
                              ? *reinterpret_cast<const int4*>(from + j * 4 * args.layout.w_panel + half * half_bytes())
                              : int4{};
        }
      }
      from += kFewUnit / 128 * args.layout.w_panel;
#pragma unroll
      for (int i = 0; i < kFewTogether; ++i) {
        if (i > 0 && i >= count) break;
        const int8_t* a = rows + few_byte(entry_rows, i) * stride + column + lane * 16;
#pragma unroll
        for (int j = 0; j < kFewPieces; ++j) {
          const int4 v = *reinterpret_cast<const int4*>(a + 512 * j);
#pragma unroll
          for (int half = 0; half < 2; ++half) sum[i][half] = few_dot(unit[j][half], v, sum[i][half]);
        }
      }
    }
  }
  // The same with sums per K-block: lanes 0 and 16 have the first route's values of gate and up, those behind them the
  // others'.
  __device__ __forceinline__ float multiply_blocks(const uint8_t* from, const FewEntry& entry, const Place& p) const {
    const int32_t half = lane / 16, block = block_of(p);
    const int32_t row =
        entry.expert * m.blocks_n + block - p.entry * args.layout.half_blocks + half * args.layout.half_blocks;
    return few_multiply_blocks<P, 16>(m, true, entry, from + half * half_bytes(), args.layout.w_panel,
                                      w_scales + ((block - first_block) * 2 + half) * args.layout.w_words, row, rows,
                                      stride, a_scales, args.layout.a_words, terms + (threadIdx.x & ~31u),
                                      [&](int i) { return shared.weight[few_byte(entry.routes, i)]; });
  }

  // A warp that multiplies: of the CTA's `all` pairs, the first of which is `begin`, its own. All warps follow all
  // stages, so that a barrier's parity tells them of its turn.
  __device__ __forceinline__ void run(int32_t begin, int32_t all) const {
    const int32_t stage_pairs = args.layout.stage_pairs;
    int32_t first_pair = begin + warp;  // that `pair` counts from
    float scale[2] = {};                // channel: lane i: of pair i
    const auto load_scales = [&] {
      if (first_pair + lane * kFewGateUpWarps >= begin + all) return;
      const Place p = place(first_pair + lane * kFewGateUpWarps);
      const int32_t expert = shared.entry[p.entry].expert;
      const int64_t row = static_cast<int64_t>(expert) * m.n + p.column;
      scale[0] = m.scale[m.per_tensor ? expert : row];
      scale[1] = m.scale[m.per_tensor ? expert : row + width];
    };
    if constexpr (kBlocks) {
      ptx::barrier_wait(ptx::shared_address(&shared.scales_full), 0);
    } else {
      load_scales();
    }
    Value value[2] = {};
    int32_t tag = 0, filled = 0, pair = 0, slot = 0, mine = warp;
    uint32_t parity = 0;
    Place at = place(first_pair);
#pragma unroll 1
    for (int32_t first = 0; first < all; first += stage_pairs) {
      ptx::barrier_wait(full(slot), parity);
      const bool works = mine < min(first + stage_pairs, all);
      if (works) {
        const FewEntry& entry = shared.entry[at.entry];
        const int32_t count = entry.count;
        const uint8_t* const from = stage(slot) + (mine - first) * args.layout.w_row;
        const auto keep = [&](int i, Value gate, Value up) {
          if (lane != filled + i) return;
          tag = pair * kFewTogether + i;
          value[0] = gate;
          value[1] = up;
        };
        if constexpr (kBlocks) {
          const float v = multiply_blocks(from, entry, at);
#pragma unroll 1
          for (int i = 0; i < count; ++i) {
            keep(i, __shfl_sync(kFewAll, v, i), __shfl_sync(kFewAll, v, 16 + i));
          }
        } else {
          int32_t sum[kFewTogether][2] = {};
          multiply_sums(from, entry, sum);
#pragma unroll
          for (int i = 0; i < kFewTogether; ++i) {
            if (i > 0 && i >= count) break;
            keep(i, few_sum(sum[i][0]), few_sum(sum[i][1]));
          }
        }
        filled += count;
      }
      __syncwarp();
      if (lane == 0) ptx::barrier_arrive(empty(slot));
      if (++slot == args.layout.stages) {
        slot = 0;
        parity ^= 1u;
      }
      if (!works) continue;
      ++pair;
      mine += kFewGateUpWarps;
      at.advance(width);
      if (filled > 32 - kFewTogether || pair == 32) {
        finish(filled, value, tag, first_pair, scale);
        filled = 0;
      }
      if (pair == 32) {  // lanes have scales of so many
        first_pair += 32 * kFewGateUpWarps;
        pair = 0;
        if constexpr (!kBlocks) load_scales();
      }
    }
    finish(filled, value, tag, first_pair, scale);
  }
};

template <Promotion P>
__device__ __forceinline__ void few_gate_up(const FewGateUpArgs& args) {
  extern __shared__ __align__(128) uint8_t memory[];
  FewShared& shared = *reinterpret_cast<FewShared*>(memory);
  using Gate = FewGateUp<P>;
  const FewMatrix& m = args.w13;
  const int warp = few_warp();
  Gate g{args,
         m,
         shared,
         memory + kFewHeaderBytes,
         reinterpret_cast<int8_t*>(memory + args.layout.rows),
         reinterpret_cast<FewTerm*>(memory + args.layout.terms),
         reinterpret_cast<uint32_t*>(memory + args.layout.a),
         reinterpret_cast<uint32_t*>(memory + args.layout.w),
         few_lane(),
         warp,
         m.n / 2,
         kernels::few_x_stride(m.k),
         0,
         0};
  const bool copies = warp == kFewGateUpWarps;
  if (copies && g.lane == 0) {
    for (int32_t i = 0; i < args.layout.stages; ++i) {
      ptx::barrier_init(g.full(i), 1);
      ptx::barrier_init(g.empty(i), kFewGateUpWarps);
    }
    if (Gate::kBlocks) ptx::barrier_init(ptx::shared_address(&shared.scales_full), 32);
    ptx::barrier_init_fence();
  }
  // Whoever wrote x and the routes has ended from here on. It has for `down` as well, since no CTA lets that start
  // before its own wait is over.
  ptx::grid_dependency_wait();
  // The CTA's pairs.
  int32_t begin = 0, pairs = 0;
  const auto share = [&] {
    const auto all = static_cast<uint32_t>(shared.entries * g.width), each = all / gridDim.x, rest = all % gridDim.x;
    begin = static_cast<int32_t>(each * blockIdx.x + min(blockIdx.x, rest));
    pairs = static_cast<int32_t>(each + (blockIdx.x < rest ? 1u : 0u));
  };
  typename Gate::Copier copier;
  typename Gate::Kept kept;
  if (copies) {
    few_group(shared, args.routes, true);
    __syncwarp();
    share();
    copier.at = g.place(begin);
    copier.left = pairs;
    if constexpr (Gate::kBlocks) {
      g.first_block = g.block_of(copier.at);
      g.blocks = pairs > 0 ? g.block_of(g.place(begin + pairs - 1)) - g.first_block + 1 : 0;
      g.copy_scales();
    }
    for (int32_t i = 0; i < args.layout.stages && copier.left > 0; ++i) g.copy_stage(copier);
  } else {
    if (threadIdx.x < args.routes.tokens * args.routes.top_k) {
      const auto route = static_cast<int32_t>(threadIdx.x), token = route / args.routes.top_k;
      if (!args.routes.weight_on_input) shared.weight[route] = 1.0f;
      ptx::cp_async_4_if(
          args.routes.weight_on_input, ptx::shared_address(shared.weight + route),
          args.routes.topk_weights + token * args.routes.weights_stride + route - token * args.routes.top_k);
    }
    ptx::cp_async_commit();
    g.measure(kept);
    ptx::cp_async_wait<0>();
  }
  __syncthreads();
  if (!copies) g.quantize(kept);
  __syncthreads();
  if (copies) {
    while (copier.left > kernels::kFewEarlyBytes / (2 * m.k)) g.copy_stage(copier);
    ptx::grid_dependency_launch();
    while (copier.left > 0) g.copy_stage(copier);
    g.fetch_down();
    return;
  }
  share();  // not before: registers
  if constexpr (Gate::kBlocks) g.first_block = g.block_of(g.place(begin));
  g.run(begin, pairs);
}

}  // namespace octomoe::sm90
