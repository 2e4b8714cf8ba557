// A layer of a few tokens in two kernels: there, launches and the first bytes' way cost as much as the weights.
//
//   gate_up: quantise x (each CTA for itself) -> w13 -> SwiGLU -> h [routes, I] bf16
//   down:    quantise h (each CTA for itself) -> w2 -> y -> combine -> out
//
// No sort: a warp of each CTA groups the routes by expert, so that an expert's weights are read once whoever chose it.
//
// gate_up shares out all pairs of a gate and an up row evenly over the CTAs, and a CTA's over its warps. Weights go
// straight to registers, kFewDepth units ahead: a unit is 1 KB of each row of a pair, and as soon as one is
// multiplied its registers are loaded again. Results stay in lanes until a warp is full of them, so that the epilogue's
// latency is paid once.
//
// down gives a CTA some columns of out with all experts, so that it combines them alone. Its weights come by bulk copies
// into a ring as long as shared memory has room: the last of gate_up, the quantising of h and the streaming of w2 go on
// at once.
//
// The arithmetic is docs/schemes.md's, so results equal the other kernels' to the bit.
#pragma once

#include "core/few_args.h"
#include "core/load_row.cuh"
#include "core/numerics.cuh"
#include "core/routes.cuh"
#include "ptx/grid.cuh"
#include "ptx/sm90.cuh"

namespace octomoe::sm90 {

using kernels::FewDownArgs;
using kernels::FewGateUpArgs;
using kernels::FewMatrix;
using kernels::kFewDownWarps;
using kernels::kFewGateUpWarps;
using kernels::kFewHeaderBytes;
using kernels::kFewMaxHidden;
using kernels::kFewMaxStages;
using kernels::kFewRoutes;
using kernels::kFewTokens;
using kernels::kFewUnit;
using kernels::OutType;
using kernels::Routes;

inline constexpr int kFewDepth = 5;  // units of gate_up in flight: 80 KB a CTA
inline constexpr int kFewPieces = kFewUnit / 512;  // loads of a warp
inline constexpr int kFewPrefetchBytes = 8192;  // a warp's, ahead of the first loads
inline constexpr int kFewTogether = 4;          // routes that share a pass over their expert's weights
inline constexpr int kFewColumns = 256;         // values of a row that a warp quantises at once
inline constexpr unsigned kFewAll = 0xffffffffu;

// Up to kFewTogether routes of one expert.
struct alignas(16) FewEntry {
  int32_t expert, count;
  uint32_t routes, rows;  // of quantised activations: a byte each
};

struct FewShared {
  FewEntry entry[kFewRoutes];
  int32_t entries;
  int32_t expert[kFewRoutes];  // of a route; -1: none
  float weight[kFewRoutes];    // down: the router's, of a route
  // Of quantised rows.
  float scale[kFewRoutes];
  int32_t zero[kFewRoutes];
  union {
    uint32_t top[3][kFewTokens * kFewMaxHidden / kFewColumns];  // gate_up: maxima of kFewColumns values of a row
    uint64_t barrier[2][kFewMaxStages];                         // down: full, empty
  };
};
static_assert(sizeof(FewShared) <= kFewHeaderBytes);

__device__ __forceinline__ int few_lane() { return static_cast<int>(threadIdx.x) & 31; }
// By a shuffle: so the compiler knows that a warp agrees on what follows from it.
__device__ __forceinline__ int few_warp() { return __shfl_sync(kFewAll, static_cast<int>(threadIdx.x) >> 5, 0); }

// Makes the entries; one warp. Rows of activations are tokens in gate_up, routes in down.
__device__ __forceinline__ void few_group(FewShared& shared, const Routes& r, bool rows_are_tokens) {
  const int32_t lane = few_lane(), routes = r.tokens * r.top_k;
  int32_t e[2];
  uint64_t same[2];
  find_experts(r, lane, 32, routes, e);
#pragma unroll
  for (int i = 0; i < 2; ++i) shared.expert[lane + 32 * i] = e[i];
#pragma unroll
  for (int i = 0; i < 2; ++i) same[i] = static_cast<uint64_t>(__match_any_sync(kFewAll, e[i])) << (32 * i);
  if (routes > 32) {
    for (int i = 0; i < 32; ++i) {
      same[0] |= static_cast<uint64_t>(__shfl_sync(kFewAll, e[1], i) == e[0]) << (32 + i);
      same[1] |= static_cast<uint64_t>(__shfl_sync(kFewAll, e[0], i) == e[1]) << i;
    }
  }
  // Every kFewTogether-th route of an expert opens an entry for itself and those that follow it.
  bool opens[2];
  uint32_t opened[2];
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const uint64_t before = same[i] & ((uint64_t{1} << (lane + 32 * i)) - 1);
    opens[i] = e[i] >= 0 && __popcll(before) % kFewTogether == 0;
    opened[i] = __ballot_sync(kFewAll, opens[i]);
  }
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    if (!opens[i]) continue;
    const int32_t route = lane + 32 * i;
    uint64_t left = same[i] & ~((uint64_t{1} << route) - 1);
    FewEntry entry{e[i], 0, 0, 0};
#pragma unroll
    for (int j = 0; j < kFewTogether; ++j) {
      if (left == 0) continue;
      const auto member = static_cast<uint32_t>(__ffsll(static_cast<long long>(left)) - 1);
      left &= left - 1;
      entry.routes |= member << (8 * j);
      entry.rows |= (rows_are_tokens ? member / static_cast<uint32_t>(r.top_k) : member) << (8 * j);
      ++entry.count;
    }
    shared.entry[(i == 0 ? 0 : __popc(opened[0])) + __popc(opened[i] & ((1u << lane) - 1))] = entry;
  }
  if (lane == 0) shared.entries = __popc(opened[0]) + __popc(opened[1]);
}

// ---- quantising ----
// What a row's scale is made of: the largest magnitude, and (asymmetric) those of the least and of the greatest value,
// as bits, which are ordered as the magnitudes are.
struct FewRange {
  uint32_t top = 0, low = 0, high = 0;

  __device__ __forceinline__ void add(const float (&v)[8], bool asymmetric) {
#pragma unroll
    for (int i = 0; i < 8; ++i) top = max(top, num::abs_bits(v[i]));
    if (asymmetric) {
#pragma unroll
      for (int i = 0; i < 8; ++i) {
        low = max(low, num::abs_bits(fminf(v[i], 0.0f)));
        high = max(high, num::abs_bits(fmaxf(v[i], 0.0f)));
      }
    }
  }
  __device__ __forceinline__ void reduce(bool asymmetric) {
    top = __reduce_max_sync(kFewAll, top);
    if (asymmetric) {
      low = __reduce_max_sync(kFewAll, low);
      high = __reduce_max_sync(kFewAll, high);
    }
  }
};

__device__ __forceinline__ uint32_t few_low_bytes(uint32_t a, uint32_t b, uint32_t c, uint32_t d) {
  return __byte_perm(__byte_perm(a, b, 0x0040), __byte_perm(c, d, 0x0040), 0x5410);
}

struct FewScale {
  float scale, inverse, low, high;
  int32_t zero;

  __device__ __forceinline__ FewScale(const FewMatrix& m, const FewRange& r) : zero(0) {
    const bool finite = r.top < num::kInfBits;
    if (m.column_sum != nullptr) {
      const num::RowScale s = num::asymmetric_scale(-num::from_bits(r.low), num::from_bits(r.high), finite);
      scale = s.scale;
      inverse = s.inverse;
      zero = s.zero;
    } else if (m.static_scale != nullptr) {
      inverse = finite ? __fdiv_rn(1.0f, *m.static_scale) : 0.0f;
      scale = finite ? *m.static_scale : num::nan();
    } else {
      const num::GroupScale s = num::symmetric_scale(r.top, num::kInt8Max);
      scale = s.scale;
      inverse = s.inverse;
    }
    low = (m.column_sum != nullptr ? -128.0f : -num::kInt8Max) - static_cast<float>(zero);
    high = num::kInt8Max - static_cast<float>(zero);
  }

  // num::quantize of eight values without conversions, which run at a quarter of the rate: clamping to integers and
  // rounding commute, and 1.5 * 2^23 added leaves the rounded value in the low bits.
  __device__ __forceinline__ uint2 quantize(const float (&v)[8]) const {
    if (inverse == 0.0f) return make_uint2(0, 0);
    uint32_t q[8];
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      const float t = fminf(fmaxf(__fmul_rn(v[i], inverse), low), high);
      q[i] = num::bits(__fadd_rn(t, 12582912.0f)) + static_cast<uint32_t>(zero);
    }
    return make_uint2(few_low_bytes(q[0], q[1], q[2], q[3]), few_low_bytes(q[4], q[5], q[6], q[7]));
  }
};

__device__ __forceinline__ void few_unpack(const uint4& p, float (&v)[8]) {
  const uint32_t w[4] = {p.x, p.y, p.z, p.w};
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    v[2 * i] = num::bf16_low(w[i]);
    v[2 * i + 1] = num::bf16_high(w[i]);
  }
}

// ---- products ----
// acc += 16 bytes of a weight row times 16 of activations.
__device__ __forceinline__ int32_t few_dot(const int4& w, const int4& a, int32_t acc) {
  acc = __dp4a(w.x, a.x, acc);
  acc = __dp4a(w.y, a.y, acc);
  acc = __dp4a(w.z, a.z, acc);
  return __dp4a(w.w, a.w, acc);
}
__device__ __forceinline__ int32_t few_sum(int32_t v) {
  return static_cast<int32_t>(__reduce_add_sync(kFewAll, static_cast<unsigned>(v)));
}
__device__ __forceinline__ int32_t few_byte(uint32_t bytes, int i) { return static_cast<int32_t>(bytes >> (8 * i) & 0xffu); }

// v of a sum; scale: of the weight row.
__device__ __forceinline__ float few_value(const FewMatrix& m, int64_t row, int32_t sum, float scale, float a_scale,
                                           int32_t zero) {
  const int32_t acc = m.column_sum != nullptr ? sum - zero * m.column_sum[row] : sum;
  const float v = __fmul_rn(__int2float_rn(acc), __fmul_rn(scale, a_scale));
  return m.bias != nullptr ? __fadd_rn(v, m.bias[row]) : v;
}

// ---- gate_up ----
struct FewGateUp {
  const FewGateUpArgs& args;
  const FewMatrix& m;
  FewShared& shared;
  int8_t* rows;  // of x, quantised
  int32_t lane, warp, width, stride;

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
  // Reads x again, from L1. No weights are under way to registers yet: loads return in their order, also those that hit.
  __device__ __forceinline__ void quantize() const {
    const int32_t pieces = stride / kFewColumns;
    for (int32_t i = warp; i < args.routes.tokens * pieces; i += kFewGateUpWarps) {
      const int32_t token = i / pieces, piece = i - token * pieces, column = piece * kFewColumns + lane * 8;
      FewRange range;
      if (lane < pieces) {
        const int32_t at = token * pieces + lane;
        range.top = shared.top[0][at];
        range.low = shared.top[1][at];
        range.high = shared.top[2][at];
      }
      range.reduce(m.column_sum != nullptr);
      const FewScale s(m, range);
      uint2 q = make_uint2(0, 0);
      if (column < m.k) {
        float v[8];
        kernels::load_elems(args.x, token, column, v);
        q = s.quantize(v);
      }
      *reinterpret_cast<uint2*>(rows + token * stride + column) = q;
      if (piece == 0 && lane == 0) {
        shared.scale[token] = s.scale;
        shared.zero[token] = s.zero;
      }
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

  // Lane i < `filled` finishes a result: its sums, and tag = pair * kFewTogether + number of the route in its entry.
  __device__ __forceinline__ void finish(int32_t filled, const int32_t (&sum)[2], int32_t tag, int32_t first_pair,
                                         const float (&scale)[2]) const {
    const int32_t pair = tag / kFewTogether;
    const float s0 = __shfl_sync(kFewAll, scale[0], pair), s1 = __shfl_sync(kFewAll, scale[1], pair);
    if (lane >= filled) return;
    const Place p = place(first_pair + pair * kFewGateUpWarps);
    const FewEntry entry = shared.entry[p.entry];
    const int32_t token = few_byte(entry.rows, tag % kFewTogether), route = few_byte(entry.routes, tag % kFewTogether);
    float a_scale = shared.scale[token];
    if (args.routes.weight_on_input) {
      a_scale = __fmul_rn(a_scale, args.routes.topk_weights[token * args.routes.weights_stride + route -
                                                            token * args.routes.top_k]);
    }
    const int64_t row = static_cast<int64_t>(entry.expert) * m.n + p.column;
    float g = few_value(m, row, sum[0], s0, a_scale, shared.zero[token]);
    float u = few_value(m, row + width, sum[1], s1, a_scale, shared.zero[token]);
    if (args.up_first) {
      const float first = g;
      g = u;
      u = first;
    }
    const float act = __fmul_rn(num::silu(num::min_nan(g, args.limit)), num::clamp(u, -args.limit, args.limit));
    args.h[static_cast<int64_t>(route) * width + p.column] = static_cast<uint16_t>(num::pack_bf16(act, 0.0f));
  }

  // Has L2 fetch this warp's first rows, while x is quantised: a lane asks for a row.
  __device__ __forceinline__ void prefetch(int32_t first_pair, int32_t pairs) const {
    const int32_t pair = lane / 2;
    if (pair >= min(pairs, max(1, kFewPrefetchBytes / (2 * m.k)))) return;
    const Place p = place(first_pair + pair * kFewGateUpWarps);
    const int64_t row = static_cast<int64_t>(shared.entry[p.entry].expert) * m.n + p.column + lane % 2 * width;
    ptx::prefetch_bulk(m.w + row * m.k, static_cast<uint32_t>(m.k));
  }

  // Up to 32 pairs of this warp, from `first_pair` on.
  __device__ __forceinline__ void run(int32_t first_pair, int32_t pairs, bool last) const {
    const int64_t up = static_cast<int64_t>(width) * m.k;
    int4 w[kFewDepth][kFewPieces][2] = {};
    // What is loaded next, and what is multiplied next.
    Place to_load = place(first_pair), at = to_load;
    int32_t loads = pairs, load_column = lane * 16, column = 0;
    const int8_t* from = nullptr;
    const auto open = [&] {
      from = m.w + (static_cast<int64_t>(shared.entry[to_load.entry].expert) * m.n + to_load.column) * m.k;
    };
    const auto load = [&](int4(&unit)[kFewPieces][2]) {
      if (loads == 0) return;
#pragma unroll
      for (int i = 0; i < kFewPieces; ++i) {
        const int32_t c = load_column + 512 * i;
        ptx::load_once(unit[i][0], from + c, c < m.k);
        ptx::load_once(unit[i][1], from + up + c, c < m.k);
      }
      load_column += kFewUnit;
      if (load_column - lane * 16 < m.k) return;
      load_column = lane * 16;
      to_load.advance(width);
      if (--loads != 0) open();
    };
    if (pairs > 0) open();
#pragma unroll
    for (int i = 0; i < kFewDepth; ++i) load(w[i]);
    float scale[2] = {};  // lane i: of pair i
    if (lane < pairs) {
      const Place p = place(first_pair + lane * kFewGateUpWarps);
      const int32_t expert = shared.entry[p.entry].expert;
      const int64_t row = static_cast<int64_t>(expert) * m.n + p.column;
      scale[0] = m.scale[m.per_tensor ? expert : row];
      scale[1] = m.scale[m.per_tensor ? expert : row + width];
    }
    int32_t acc[kFewTogether][2] = {}, sum[2] = {}, tag = 0, filled = 0, pair = 0;
    int32_t count = 0;
    uint32_t entry_rows = 0;
    const auto enter = [&] {
      count = shared.entry[at.entry].count;
      entry_rows = shared.entry[at.entry].rows;
    };
    const auto multiply = [&](const int4(&unit)[kFewPieces][2]) {
#pragma unroll
      for (int i = 0; i < kFewTogether; ++i) {
        if (i > 0 && i >= count) break;
        const int8_t* a = rows + few_byte(entry_rows, i) * stride + column + lane * 16;
#pragma unroll
        for (int j = 0; j < kFewPieces; ++j) {
          const int4 v = *reinterpret_cast<const int4*>(a + 512 * j);
          acc[i][0] = few_dot(unit[j][0], v, acc[i][0]);
          acc[i][1] = few_dot(unit[j][1], v, acc[i][1]);
        }
      }
      column += kFewUnit;
      if (column < m.k) return;
#pragma unroll
      for (int i = 0; i < kFewTogether; ++i) {
        if (i > 0 && i >= count) break;
        const int32_t first = few_sum(acc[i][0]), second = few_sum(acc[i][1]);
        if (lane == filled + i) {
          sum[0] = first;
          sum[1] = second;
          tag = pair * kFewTogether + i;
        }
        acc[i][0] = 0;
        acc[i][1] = 0;
      }
      filled += count;
      column = 0;
      ++pair;
      at.advance(width);
      if (pair < pairs) enter();
    };
    if (pairs > 0) enter();
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
      if (filled > 32 - kFewDepth * kFewTogether) {
        finish(filled, sum, tag, first_pair, scale);
        filled = 0;
      }
    }
    finish(filled, sum, tag, first_pair, scale);
  }
};

__device__ __forceinline__ void few_gate_up(const FewGateUpArgs& args) {
  extern __shared__ __align__(128) uint8_t memory[];
  FewShared& shared = *reinterpret_cast<FewShared*>(memory);
  const FewGateUp g{args,
                    args.w13,
                    shared,
                    reinterpret_cast<int8_t*>(memory + kFewHeaderBytes),
                    few_lane(),
                    few_warp(),
                    args.w13.n / 2,
                    kernels::few_x_stride(args.w13.k)};
  // Whoever wrote x and the routes has ended from here on. It has for `down` as well, since no CTA lets that start
  // before its own wait is over.
  ptx::grid_dependency_wait();
  if (g.warp == kFewGateUpWarps - 1) few_group(shared, args.routes, true);
  g.measure();
  __syncthreads();
  const int64_t all = static_cast<int64_t>(shared.entries) * g.width;
  const auto begin = static_cast<int32_t>(all * blockIdx.x / gridDim.x);
  const auto end = static_cast<int32_t>(all * (blockIdx.x + 1) / gridDim.x);
  int32_t pair = begin + g.warp, left = max(0, (end - pair + kFewGateUpWarps - 1) / kFewGateUpWarps);
  g.prefetch(pair, left);
  g.quantize();
  __syncthreads();
  do {
    const int32_t pairs = min(left, 32);
    left -= pairs;
    g.run(pair, pairs, left == 0);
    pair += pairs * kFewGateUpWarps;
  } while (left > 0);
}

// ---- down ----
// Eight lanes multiply a column: a warp has four of them, of one entry. The warps of an entry's columns are a stream;
// streams take turns.
struct FewDown {
  const FewDownArgs& args;
  const FewMatrix& m;
  FewShared& shared;
  uint8_t* ring;
  int8_t* rows;    // of h, quantised
  float* scales;   // of the weight rows, [entry, column]
  float* y;        // [route, column]
  int32_t lane, warp, first, columns;

  __device__ __forceinline__ int32_t sets() const { return (columns + args.stage_columns - 1) / args.stage_columns; }
  __device__ __forceinline__ int32_t columns_of(int32_t set) const {
    return min(args.stage_columns, columns - set * args.stage_columns);
  }
  __device__ __forceinline__ int32_t warps_of_stream() const { return (args.stage_columns + 3) / 4; }

  __device__ __forceinline__ uint32_t full(int32_t slot) const { return ptx::shared_address(&shared.barrier[0][slot]); }
  __device__ __forceinline__ uint32_t empty(int32_t slot) const { return ptx::shared_address(&shared.barrier[1][slot]); }
  __device__ __forceinline__ uint8_t* place(int32_t slot) const { return ring + slot * args.stage_columns * m.k; }

  // One thread: an entry's rows of a set's columns are one copy.
  __device__ __forceinline__ void copy(int32_t slot, int32_t set, int32_t entry) const {
    const int32_t column = first + set * args.stage_columns;
    const auto bytes = static_cast<uint32_t>(columns_of(set) * m.k);
    ptx::barrier_arrive_expect(full(slot), bytes);
    ptx::copy_bulk(ptx::shared_address(place(slot)),
                   m.w + (static_cast<int64_t>(shared.entry[entry].expert) * m.n + column) * m.k, bytes, full(slot),
                   ptx::kEvictFirst);
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
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      if (!wanted(r)) continue;
      const int32_t row = first_row + r * kFewDownWarps;
      FewRange range;
#pragma unroll
      for (int i = 0; i < kKept; ++i) {
        few_unpack(kept[r][i], v);
        range.add(v, asymmetric);
      }
      for (int32_t column = kKept * kFewColumns + lane * 8; column < m.k; column += kFewColumns) {
        few_unpack(load(r, column), v);
        range.add(v, asymmetric);
      }
      range.reduce(asymmetric);
      const FewScale s(m, range);
      const auto store = [&](int32_t column, const uint4& p) {
        few_unpack(p, v);
        *reinterpret_cast<uint2*>(rows + row * m.k + column) = s.quantize(v);
      };
#pragma unroll
      for (int i = 0; i < kKept; ++i) {
        const int32_t column = i * kFewColumns + lane * 8;
        if (column < m.k) store(column, kept[r][i]);
      }
      for (int32_t column = kKept * kFewColumns + lane * 8; column < m.k; column += kFewColumns) {
        store(column, load(r, column));
      }
      if (lane == 0) {
        shared.scale[row] = s.scale;
        shared.zero[row] = s.zero;
      }
    }
  }

  // y of an entry's routes in this lane's column, of a stage at w.
  __device__ __forceinline__ void multiply(const uint8_t* w, int32_t set, int32_t at, int32_t column) const {
    const FewEntry entry = shared.entry[at];
    const bool works = column < columns_of(set);
    int32_t acc[kFewTogether] = {}, offset[kFewTogether];
#pragma unroll
    for (int i = 0; i < kFewTogether; ++i) offset[i] = few_byte(entry.rows, i) * m.k;
    const auto dot = [&](int32_t c, int i) {
      const int4 v = *reinterpret_cast<const int4*>(w + column * m.k + c);
      acc[i] = few_dot(v, *reinterpret_cast<const int4*>(rows + offset[i] + c), acc[i]);
    };
    if (works) {
      if (entry.count == 1) {
#pragma unroll 3
        for (int32_t c = lane % 8 * 16; c < m.k; c += 128) dot(c, 0);
      } else {
        for (int32_t c = lane % 8 * 16; c < m.k; c += 128) {
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
    const float v = few_value(m, static_cast<int64_t>(entry.expert) * m.n + first + c, sum, scales[at * columns + c],
                              shared.scale[route], shared.zero[route]);
    y[route * columns + c] = num::bf16_low(num::pack_bf16(v, 0.0f));
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

__device__ __forceinline__ void few_down(const FewDownArgs& args) {
  extern __shared__ __align__(128) uint8_t memory[];
  FewShared& shared = *reinterpret_cast<FewShared*>(memory);
  const FewMatrix& m = args.w2;
  const int32_t routes = args.routes.tokens * args.routes.top_k;
  const int32_t begin = static_cast<int32_t>(blockIdx.x) * args.columns;
  uint8_t* const ring = memory + kFewHeaderBytes;
  auto* const rows = reinterpret_cast<int8_t*>(ring + args.stages * args.stage_columns * m.k);
  auto* const scales = reinterpret_cast<float*>(rows + routes * m.k);
  const FewDown d{args,
                  m,
                  shared,
                  ring,
                  rows,
                  scales,
                  scales + routes * args.columns,
                  few_lane(),
                  few_warp(),
                  begin,
                  min(args.columns, m.n - begin)};
  if (threadIdx.x == 0) {
    for (int32_t i = 0; i < args.stages; ++i) {
      ptx::barrier_init(d.full(i), 1);
      ptx::barrier_init(d.empty(i), d.warps_of_stream());
    }
    ptx::barrier_init_fence();
  }
  // The routes were there before gate_up let this kernel start (few_gate_up), and weights always are.
  if (d.warp == 1) few_group(shared, args.routes, false);
  __syncthreads();
  const int32_t entries = shared.entries, all = d.sets() * entries;
  if (threadIdx.x == 0) {
    for (int32_t i = 0; i < min(all, args.stages); ++i) d.copy(i, i / entries, i % entries);
  }
  for (int32_t i = static_cast<int32_t>(threadIdx.x); i < entries * d.columns; i += 32 * kFewDownWarps) {
    const int32_t entry = i / d.columns, expert = shared.entry[entry].expert;
    scales[i] = m.scale[m.per_tensor ? expert : static_cast<int64_t>(expert) * m.n + d.first + i - entry * d.columns];
  }
  if (threadIdx.x < routes) {
    const auto route = static_cast<int32_t>(threadIdx.x), token = route / args.routes.top_k;
    shared.weight[route] =
        args.routes.weight_on_input
            ? 1.0f
            : args.routes.topk_weights[token * args.routes.weights_stride + route - token * args.routes.top_k];
  }
  ptx::grid_dependency_wait();
  ptx::grid_dependency_launch();
  if (m.k <= 3 * kFewColumns) {
    for (int32_t row = d.warp; row < routes; row += 2 * kFewDownWarps) d.quantize<2, 3>(row, routes);
  } else {
    for (int32_t row = d.warp; row < routes; row += kFewDownWarps) d.quantize<1, 4>(row, routes);
  }
  __syncthreads();

  // A slot of the ring serves one stream (args.stages): none may wait for a slot's next content but one.
  const int32_t warps = d.warps_of_stream(), streams = kernels::few_streams(args.stage_columns, args.stages);
  const int32_t stream = d.warp / warps;
  const int32_t quarter = d.warp - stream * warps, column = quarter * 4 + d.lane / 8;
  if (stream < streams) {
    int32_t set = 0, entry = stream, slot = stream;
    uint32_t phase = 0;
    for (int32_t i = stream; i < all; i += streams) {
      for (; entry >= entries; entry -= entries) ++set;
      ptx::barrier_wait(d.full(slot), phase);
      d.multiply(d.place(slot), set, entry, column);
      // The stage's next content, once all its warps have read this one.
      if (const int32_t next = i + args.stages; next < all) {
        __syncwarp();
        if (d.lane == 0) {
          ptx::barrier_arrive(d.empty(slot));
          if (quarter == 0) {
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
