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
// down gives a CTA some columns of out with all experts, a column to each warp, so that the warp combines it alone. Its
// weights come by bulk copies into a ring as long as shared memory has room: the last of gate_up, the quantising of h
// and the streaming of w2 go on at once.
//
// The arithmetic is docs/schemes.md's, so results equal the other kernels' to the bit.
#pragma once

#include "core/few_args.h"
#include "core/load_row.cuh"
#include "core/numerics.cuh"
#include "ptx/grid.cuh"
#include "ptx/sm90.cuh"

namespace octomoe::sm90 {

using kernels::FewDownArgs;
using kernels::FewGateUpArgs;
using kernels::FewMatrix;
using kernels::FewRoutes;
using kernels::kFewDownWarps;
using kernels::kFewGateUpWarps;
using kernels::kFewHeaderBytes;
using kernels::kFewMaxHidden;
using kernels::kFewMaxStages;
using kernels::kFewRoutes;
using kernels::kFewTokens;
using kernels::kFewUnit;
using kernels::OutType;

inline constexpr int kFewDepth = 4;      // units of gate_up in flight: 64 KB a CTA
inline constexpr int kFewPieces = kFewUnit / 512;
inline constexpr int kFewTogether = 4;   // routes that share a pass over their expert's weights
inline constexpr int kFewColumns = 256;  // values of a row that a warp quantises at once
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
__device__ __forceinline__ int few_warp() { return static_cast<int>(threadIdx.x) >> 5; }

// ---- routes ----
__device__ __forceinline__ int32_t few_expert_of(const FewRoutes& r, int32_t route) {
  const int32_t token = route / r.top_k, slot = route - token * r.top_k;
  const int64_t at = token * r.ids_stride + slot;
  const int64_t id =
      r.ids_are_64 ? static_cast<const int64_t*>(r.topk_ids)[at] : static_cast<const int32_t*>(r.topk_ids)[at];
  if (id < 0 || id >= r.id_limit) return -1;
  return r.expert_map != nullptr ? r.expert_map[id] : static_cast<int32_t>(id);
}

// Makes the entries; one warp. Rows of activations are tokens in gate_up, routes in down.
__device__ __forceinline__ void few_group(FewShared& shared, const FewRoutes& r, bool rows_are_tokens) {
  const int32_t lane = few_lane(), routes = r.tokens * r.top_k;
  int32_t e[2];
  uint64_t same[2];
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const int32_t route = lane + 32 * i;
    e[i] = route < routes ? few_expert_of(r, route) : -1;
    shared.expert[route] = e[i];
  }
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
    uint32_t q[2] = {0, 0};
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      const float t = __fadd_rn(fminf(fmaxf(__fmul_rn(v[i], inverse), low), high), 12582912.0f);
      q[i / 4] |= (num::bits(t) + static_cast<uint32_t>(zero) & 0xffu) << (8 * (i % 4));
    }
    return make_uint2(q[0], q[1]);
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

  // The maxima of x's pieces of kFewColumns values.
  __device__ __forceinline__ void measure() const {
    const int32_t pieces = stride / kFewColumns;
    for (int32_t i = warp; i < args.routes.tokens * pieces; i += kFewGateUpWarps) {
      const int32_t token = i / pieces, column = (i - token * pieces) * kFewColumns + lane * 8;
      FewRange range;
      if (column < m.k) {
        float v[8];
        kernels::load_elems(args.x, token, column, v);
        range.add(v, m.column_sum != nullptr);
      }
      range.reduce(m.column_sum != nullptr);
      if (lane == 0) {
        shared.top[0][i] = range.top;
        shared.top[1][i] = range.low;
        shared.top[2][i] = range.high;
      }
    }
  }
  // Reads x again: it lies in L1.
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

  // Up to 32 pairs of this warp, from `first_pair` on. prepare() is called with the first loads under way.
  template <class Prepare>
  __device__ __forceinline__ void run(int32_t first_pair, int32_t pairs, bool last, const Prepare& prepare) const {
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
    prepare();

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
  bool quantized = false;
  do {
    const int32_t pairs = min(left, 32);
    left -= pairs;
    g.run(pair, pairs, left == 0, [&] {
      if (quantized) return;
      g.quantize();
      quantized = true;
      __syncthreads();
    });
    pair += pairs * kFewGateUpWarps;
  } while (left > 0);
}

// ---- down ----
struct FewDown {
  const FewDownArgs& args;
  const FewMatrix& m;
  FewShared& shared;
  uint8_t* ring;
  int8_t* rows;  // of h, quantised
  int32_t lane, warp, first, columns;

  __device__ __forceinline__ int32_t sets() const { return (columns + args.stage_columns - 1) / args.stage_columns; }
  __device__ __forceinline__ int32_t columns_of(int32_t set) const {
    return min(args.stage_columns, columns - set * args.stage_columns);
  }

  // A stage of the ring.
  struct Stage {
    int32_t slot = 0;
    uint32_t phase = 0;
    __device__ __forceinline__ void advance(int32_t stages) {
      if (++slot == stages) {
        slot = 0;
        phase ^= 1u;
      }
    }
  };
  __device__ __forceinline__ uint32_t full(const Stage& s) const { return ptx::shared_address(&shared.barrier[0][s.slot]); }
  __device__ __forceinline__ uint32_t empty(const Stage& s) const { return ptx::shared_address(&shared.barrier[1][s.slot]); }
  __device__ __forceinline__ uint8_t* place(const Stage& s) const {
    return ring + s.slot * args.stage_columns * m.k;
  }

  // One thread: an entry's rows of a set's columns are one copy.
  __device__ __forceinline__ void copy() const {
    Stage stage;
    for (int32_t set = 0; set < sets(); ++set) {
      const int32_t column = first + set * args.stage_columns;
      const auto bytes = static_cast<uint32_t>(columns_of(set) * m.k);
      for (int32_t i = 0; i < shared.entries; ++i, stage.advance(args.stages)) {
        ptx::barrier_wait(empty(stage), stage.phase ^ 1u);
        ptx::barrier_arrive_expect(full(stage), bytes);
        ptx::copy_bulk(ptx::shared_address(place(stage)),
                       m.w + (static_cast<int64_t>(shared.entry[i].expert) * m.n + column) * m.k, bytes, full(stage),
                       ptx::kEvictFirst);
      }
    }
  }

  // A row of h; one warp. Of a longer row, what registers cannot keep is read again.
  __device__ __forceinline__ void quantize(int32_t row) const {
    constexpr int kKept = 6;
    const uint16_t* h = args.h + static_cast<int64_t>(row) * m.k;
    uint4 kept[kKept];
    float v[8];
    FewRange range;
    const auto load = [&](int32_t column) { return *reinterpret_cast<const uint4*>(h + column); };
#pragma unroll
    for (int i = 0; i < kKept; ++i) {
      const int32_t column = i * kFewColumns + lane * 8;
      kept[i] = column < m.k ? load(column) : make_uint4(0, 0, 0, 0);
    }
#pragma unroll
    for (int i = 0; i < kKept; ++i) {
      few_unpack(kept[i], v);
      range.add(v, m.column_sum != nullptr);
    }
    for (int32_t column = kKept * kFewColumns + lane * 8; column < m.k; column += kFewColumns) {
      few_unpack(load(column), v);
      range.add(v, m.column_sum != nullptr);
    }
    range.reduce(m.column_sum != nullptr);
    const FewScale s(m, range);
    const auto store = [&](int32_t column, const uint4& p) {
      few_unpack(p, v);
      *reinterpret_cast<uint2*>(rows + row * m.k + column) = s.quantize(v);
    };
#pragma unroll
    for (int i = 0; i < kKept; ++i) {
      const int32_t column = i * kFewColumns + lane * 8;
      if (column < m.k) store(column, kept[i]);
    }
    for (int32_t column = kKept * kFewColumns + lane * 8; column < m.k; column += kFewColumns) {
      store(column, load(column));
    }
    if (lane == 0) {
      shared.scale[row] = s.scale;
      shared.zero[row] = s.zero;
    }
  }

  // Adds this warp's row of a stage times the rows of an entry's routes; lane r keeps the sums of routes r and r + 32.
  __device__ __forceinline__ void multiply(const uint8_t* w, const FewEntry& entry, int32_t (&sum)[2]) const {
    int32_t acc[kFewTogether] = {};
#pragma unroll 2
    for (int32_t base = 0; base < m.k; base += 512) {
      const int32_t column = base + lane * 16;
      const bool inside = column < m.k;
      const int4 v = inside ? *reinterpret_cast<const int4*>(w + column) : int4{};
#pragma unroll
      for (int i = 0; i < kFewTogether; ++i) {
        if (i > 0 && i >= entry.count) break;
        const int4 a =
            inside ? *reinterpret_cast<const int4*>(rows + few_byte(entry.rows, i) * m.k + column) : int4{};
        acc[i] = few_dot(v, a, acc[i]);
      }
    }
#pragma unroll
    for (int i = 0; i < kFewTogether; ++i) {
      if (i > 0 && i >= entry.count) break;
      const int32_t total = few_sum(acc[i]), route = few_byte(entry.routes, i);
      if (lane == route) sum[0] = total;
      if (lane + 32 == route) sum[1] = total;
    }
  }

  // Lane t: token t's value of a column, from y of all routes in slot order (docs/schemes.md section 4).
  __device__ __forceinline__ float combine(const float (&y)[2], const float (&weight)[2]) const {
    const int32_t top_k = args.routes.top_k, token = min(lane, args.routes.tokens - 1);
    float o = 0.0f;
    bool begun = false;
#pragma unroll 4
    for (int32_t slot = 0; slot < top_k; ++slot) {
      const int32_t route = token * top_k + slot;
      const auto of_route = [&](const float(&v)[2]) {
        const float low = __shfl_sync(kFewAll, v[0], route & 31), high = __shfl_sync(kFewAll, v[1], route & 31);
        return route < 32 ? low : high;
      };
      const float w = of_route(weight), v = of_route(y);
      if (shared.expert[route] < 0) continue;
      o = begun ? __fmaf_rn(w, v, o) : __fmul_rn(w, v);
      begun = true;
    }
    return o;
  }
  __device__ __forceinline__ void store(int32_t column, float o) const {
    if (lane >= args.routes.tokens) return;
    const int64_t at = lane * args.out_stride + column;
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
};

__device__ __forceinline__ void few_down(const FewDownArgs& args) {
  extern __shared__ __align__(128) uint8_t memory[];
  FewShared& shared = *reinterpret_cast<FewShared*>(memory);
  const FewMatrix& m = args.w2;
  const int32_t begin = static_cast<int32_t>(blockIdx.x) * args.columns;
  const FewDown d{args,
                  m,
                  shared,
                  memory + kFewHeaderBytes,
                  reinterpret_cast<int8_t*>(memory + kFewHeaderBytes + args.stages * args.stage_columns * m.k),
                  few_lane(),
                  few_warp(),
                  begin,
                  min(args.columns, m.n - begin)};
  const int32_t routes = args.routes.tokens * args.routes.top_k;
  if (threadIdx.x == 0) {
    for (int32_t i = 0; i < args.stages; ++i) {
      ptx::barrier_init(ptx::shared_address(&shared.barrier[0][i]), 1);
      ptx::barrier_init(ptx::shared_address(&shared.barrier[1][i]), kFewDownWarps);
    }
    ptx::barrier_init_fence();
  }
  // The routes were there before gate_up let this kernel start (few_gate_up), and weights always are.
  if (d.warp == kFewDownWarps) few_group(shared, args.routes, false);
  __syncthreads();
  if (d.warp == kFewDownWarps) {
    if (d.lane == 0) d.copy();
    ptx::grid_dependency_wait();
    ptx::grid_dependency_launch();
    return;
  }
  // Lane r, of routes r and r + 32: router weights, and scales of the weight rows of this warp's column of a set.
  float weight[2] = {1.0f, 1.0f}, scale[2];
  int32_t expert[2];
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const int32_t route = d.lane + 32 * i;
    expert[i] = shared.expert[route];
    if (expert[i] >= 0 && !args.routes.weight_on_input) {
      const int32_t token = route / args.routes.top_k;
      weight[i] = args.routes.topk_weights[token * args.routes.weights_stride + route - token * args.routes.top_k];
    }
  }
  const auto row_of = [&](int i, int32_t set) {
    return static_cast<int64_t>(expert[i]) * m.n + d.first + set * args.stage_columns + d.warp;
  };
  const auto load_scales = [&](int32_t set) {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      scale[i] = 0.0f;
      if (expert[i] >= 0 && set < d.sets() && d.warp < d.columns_of(set)) {
        scale[i] = m.scale[m.per_tensor ? expert[i] : row_of(i, set)];
      }
    }
  };
  load_scales(0);
  ptx::grid_dependency_wait();
  ptx::grid_dependency_launch();
  for (int32_t row = d.warp; row < routes; row += kFewDownWarps) {
    if (shared.expert[row] >= 0) d.quantize(row);
  }
  ptx::named_barrier(1, 32 * kFewDownWarps);

  FewDown::Stage stage;
  for (int32_t set = 0; set < d.sets(); ++set) {
    const bool works = d.warp < d.columns_of(set);
    int32_t sum[2] = {};
    for (int32_t i = 0; i < shared.entries; ++i, stage.advance(args.stages)) {
      ptx::barrier_wait(d.full(stage), stage.phase);
      if (works) d.multiply(d.place(stage) + d.warp * m.k, shared.entry[i], sum);
      __syncwarp();
      if (d.lane == 0) ptx::barrier_arrive(d.empty(stage));
    }
    if (!works) continue;
    float y[2] = {};
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int32_t route = d.lane + 32 * i;
      if (expert[i] < 0) continue;
      const float v = few_value(m, row_of(i, set), sum[i], scale[i], shared.scale[route], shared.zero[route]);
      y[i] = num::bf16_low(num::pack_bf16(v, 0.0f));
    }
    load_scales(set + 1);
    d.store(d.first + set * args.stage_columns + d.warp, d.combine(y, weight));
  }
}

}  // namespace octomoe::sm90
