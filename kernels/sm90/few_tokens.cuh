// A layer of a few tokens in two kernels: there, launches and the first bytes' way cost as much as the weights.
//
//   gate_up: quantise x (each CTA for itself) -> w13 -> SwiGLU -> h [routes, I] bf16      (few_gate_up.cuh)
//   down:    quantise h (each CTA for itself) -> w2 -> y -> combine -> out                 (few_down.cuh)
//
// No sort: a warp of each CTA groups the routes by expert, so that an expert's weights are read once whoever chose it.
// This file is what both kernels do. The arithmetic is docs/schemes.md's, so results equal the other kernels' to the
// bit. Promotion::hybrid stands for sums with and without float steps.
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
using kernels::kFewPiece;
using kernels::kFewRoutes;
using kernels::kFewTokens;
using kernels::kFewUnit;
using kernels::OutType;
using kernels::Promotion;
using kernels::Routes;

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
  // Of a route, what multiplies it: the router's weight in gate_up with weight_on_input and otherwise in down; else 1.
  float weight[kFewRoutes];
  // channel: of quantised rows.
  float scale[kFewRoutes];
  int32_t zero[kFewRoutes];
  uint64_t scales_full;                // gate_up, block and hybrid: the scales of its weight rows are there
  uint64_t barrier[2][kFewMaxStages];  // of the ring: full, empty
  // gate_up: largest magnitudes of kFewColumns values of a row (channel; asymmetric: of the negative and of the
  // positive ones too), or of each K-block.
  uint32_t top[3][kFewTokens * kFewMaxHidden / kFewColumns];
};
static_assert(sizeof(FewShared) <= kFewHeaderBytes);

__device__ __forceinline__ int few_lane() { return static_cast<int>(threadIdx.x) & 31; }
// n / divisor, of which `inverse` is few_inverse.
__device__ __forceinline__ int32_t few_divide(int32_t n, uint32_t inverse) {
  return static_cast<int32_t>(__umulhi(2 * static_cast<uint32_t>(n), inverse));
}
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

  FewScale() = default;
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

// Pieces of a row; the K-block of a piece or of a column, and whether it begins there. A K-block is one or two pieces.
__device__ __forceinline__ int32_t few_pieces(const FewMatrix& m) { return (m.k + kFewPiece - 1) / kFewPiece; }
__device__ __forceinline__ int32_t few_block_of_piece(const FewMatrix& m, int32_t piece) {
  return piece >> (m.block_k >> 8);
}
__device__ __forceinline__ int32_t few_block_of(const FewMatrix& m, int32_t column) {
  return few_block_of_piece(m, column / kFewPiece);
}
// The scale block of a weight row of [E, n]'s n; of w13's, among gate's or up's.
__device__ __forceinline__ int32_t few_block_of_row(const FewMatrix& m, int32_t row) {
  return few_divide(row, m.block_n_inverse);
}
__device__ __forceinline__ bool few_begins_block(const FewMatrix& m, int32_t column) {
  return column < m.k && (column & (m.block_k - 1)) == 0;
}

// How the values of a K-block are rounded, and what its row's scales become.
struct FewGroup {
  float inverse;
  uint32_t word;  // s_a, hybrid: Q_a

  __device__ __forceinline__ static FewGroup of_block(uint32_t top) {
    const num::GroupScale s = num::symmetric_scale(top, num::kInt8Max);
    return {s.inverse, num::bits(s.scale)};
  }
  __device__ __forceinline__ static FewGroup of_hybrid(const FewMatrix& m, const num::SuperScale& super, uint32_t top) {
    const num::BlockScale s = num::block_scale(super, top, m.q_max);
    return {s.inverse, static_cast<uint32_t>(s.q)};
  }
  // No value exceeds the maximum that the scale was made of: nothing to clamp.
  __device__ __forceinline__ uint2 quantize(const float (&v)[8]) const {
    if (inverse == 0.0f) return make_uint2(0, 0);
    uint32_t q[8];
#pragma unroll
    for (int i = 0; i < 8; ++i) q[i] = num::quantize_within(v[i], inverse);
    return make_uint2(few_low_bytes(q[0], q[1], q[2], q[3]), few_low_bytes(q[4], q[5], q[6], q[7]));
  }
};

// hybrid: the scale of a super group, from the largest magnitudes of the row's K-blocks: of a row that is one, by a
// warp, or of the one that a K-block is in.
__device__ __forceinline__ num::SuperScale few_row_super(const FewMatrix& m, const uint32_t* tops) {
  uint32_t top = 0;
#pragma unroll 1
  for (int32_t i = few_lane(); i < m.blocks_k; i += 32) top = max(top, tops[i]);
  return num::super_scale(__reduce_max_sync(kFewAll, top), m.q_max);
}
__device__ __forceinline__ num::SuperScale few_super(const FewMatrix& m, const uint32_t* tops, int32_t block) {
  const int32_t begin = block / m.super_group * m.super_group;
  uint32_t top = 0;
#pragma unroll 1
  for (int32_t i = begin; i < min(begin + m.super_group, m.blocks_k); ++i) top = max(top, tops[i]);
  return num::super_scale(top, m.q_max);
}
// Of a K-block, or of the super group that it begins, into the row's scales (FewDownLayout).
template <Promotion P>
__device__ __forceinline__ void few_store_scale(const FewMatrix& m, uint32_t* a, int32_t block, const FewGroup& g,
                                                float super) {
  if constexpr (P == Promotion::block) {
    a[block] = g.word;
  } else {
    a[m.super_groups + block] = g.word;
    const int32_t group = m.super_groups > 1 ? block / m.super_group : 0;
    if (block == group * m.super_group) a[group] = num::bits(super);
  }
}

// The largest magnitude of a lane's K-block of 128 or 256 columns, of which each lane has eight; a warp.
__device__ __forceinline__ uint32_t few_block_top(uint32_t top, int32_t block_k) {
#pragma unroll
  for (int by = 1; by < kFewPiece / 8; by *= 2) top = max(top, __shfl_xor_sync(kFewAll, top, by));
  return block_k > kFewPiece ? max(top, __shfl_xor_sync(kFewAll, top, kFewPiece / 8)) : top;
}
// The largest of eight bf16 values' magnitudes, as a float's bits: of which a bf16's are the first.
__device__ __forceinline__ uint32_t few_top_of(const uint4& p) {
  const uint32_t most = ptx::max_u16x2(ptx::max_u16x2(p.x & 0x7fff7fffu, p.y & 0x7fff7fffu),
                                       ptx::max_u16x2(p.z & 0x7fff7fffu, p.w & 0x7fff7fffu));
  return max(most << 16, most & 0xffff0000u);
}

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
__device__ __forceinline__ int32_t few_byte(uint32_t bytes, int i) {
  return static_cast<int32_t>(bytes >> (8 * i) & 0xffu);
}

__device__ __forceinline__ float few_biased(const FewMatrix& m, int64_t row, float v) {
  return m.bias != nullptr ? __fadd_rn(v, m.bias[row]) : v;
}
// channel: v of a sum; scale: of the weight row.
__device__ __forceinline__ float few_value(const FewMatrix& m, int64_t row, int32_t sum, float scale, float a_scale,
                                           int32_t zero) {
  const int32_t acc = m.column_sum != nullptr ? sum - zero * m.column_sum[row] : sum;
  return few_biased(m, row, __fmul_rn(__int2float_rn(acc), __fmul_rn(scale, a_scale)));
}

// ---- scales of K-blocks ----
// Scale blocks of weight rows, copied to shared memory (FewDownLayout); row: of [E, NB].
template <Promotion P>
__device__ __forceinline__ void few_copy_scale(const FewMatrix& m, uint32_t* to, int32_t row, int32_t word) {
  const uint32_t at = ptx::shared_address(to + word);
  if constexpr (P == Promotion::block) {
    ptx::cp_async_4(at, m.scale + static_cast<int64_t>(row) * m.blocks_k + word, true);
  } else if (word < m.super_groups) {
    ptx::cp_async_4(at, m.scale + static_cast<int64_t>(row) * m.super_groups + word, true);
  } else {
    const int64_t first = static_cast<int64_t>(row) * m.blocks_k;
    const int32_t byte = (word - m.super_groups) * 4;
    if (byte < (first & 3) + m.blocks_k) ptx::cp_async_4(at, m.q + (first & ~int64_t{3}) + byte, true);
  }
}
// Its Q_w.
__device__ __forceinline__ const uint8_t* few_w_q(const FewMatrix& m, const uint32_t* w, int32_t row) {
  return reinterpret_cast<const uint8_t*>(w + m.super_groups) + (static_cast<int64_t>(row) * m.blocks_k & 3);
}

// hybrid: K-blocks of one super group whose sum becomes a float.
struct FewChunk {
  int32_t group, end;  // end: the first K-block behind it
  __device__ __forceinline__ FewChunk(const FewMatrix& m, int32_t begin)
      : group(m.super_groups > 1 ? begin / m.super_group : 0),
        end(min(min((group + 1) * m.super_group, begin + m.flush_blocks), m.blocks_k)) {}
};

// Of a K-block, for int8_block's chain: its sum, and the product of its scales. {-0, 0} changes no value.
struct alignas(8) FewTerm {
  float sum, scale;
};
static_assert(32 * sizeof(FewTerm) == kernels::kFewTermsBytes);

// The results, without bias, of up to kFewTogether routes of one expert with one weight row, by kLanes lanes of a warp,
// 4, 8 or 16: each has every kLanes-th piece for itself, so that within one nothing need be brought together; the 16
// bytes that eight lanes read are of different banks because each begins elsewhere in its piece. Returns the i-th
// route's in lane i of them.
// w: the weight row, panels w_panel apart; w_scale: of its scale block, the w_row-th of [E, NB], as few_copy_scale left
// it; a_scales: of all rows; factor(i) multiplies those of the i-th route; terms: this warp's.
template <Promotion P, int kLanes, typename Factor>
__device__ __forceinline__ float few_multiply_blocks(const FewMatrix& m, bool works, const FewEntry& entry,
                                                     const uint8_t* w, int32_t w_panel, const uint32_t* w_scale,
                                                     int32_t w_row, const int8_t* rows, int32_t stride,
                                                     const uint32_t* a_scales, int32_t a_words, FewTerm* terms,
                                                     const Factor& factor) {
  static_assert(kLanes >= kFewTogether);
  const int32_t lane = few_lane(), place = lane % kLanes, turn = lane % 8 * 16;
  const int32_t pieces = few_pieces(m), two = m.block_k >> 8;  // whether a K-block is two pieces
  const auto load = [](const void* from) { return *static_cast<const int4*>(from); };
  float v = -0.0f;                   // of this lane's route; fma(x, p, -0) is x * p, its sign included
  int32_t total[kFewTogether] = {};  // hybrid: this lane's of the chunk
  int32_t chunk_begin = 0;
#pragma unroll 1
  for (int32_t begin = 0; begin < pieces; begin += kLanes) {
    const int32_t piece = begin + place, block = few_block_of_piece(m, min(piece, pieces - 1));
    const bool exists = works && piece < pieces;
    int32_t acc[kFewTogether] = {};
    if (exists) {
      const uint8_t* const w_piece = w + piece * w_panel;
      const int8_t* const a_piece = rows + piece * kFewPiece;
      const int32_t bytes = m.k - piece * kFewPiece;
      if (entry.count == 1 && bytes >= kFewPiece) {
        const int8_t* const a = a_piece + few_byte(entry.rows, 0) * stride;
        int32_t odd = 0;
#pragma unroll 2  // registers
        for (int j = 0; j < kFewPiece / 16; j += 2) {
          const int32_t at = turn ^ (j * 16), next = turn ^ (j * 16 + 16);
          const int4 w0 = load(w_piece + at), a0 = load(a + at), w1 = load(w_piece + next), a1 = load(a + next);
          acc[0] = few_dot(w0, a0, acc[0]);
          odd = few_dot(w1, a1, odd);
        }
        acc[0] += odd;
      } else {
#pragma unroll
        for (int i = 0; i < kFewTogether; i += 2) {  // two routes at a time, or one twice
          if (i > 0 && i >= entry.count) break;
          const int8_t* const a0 = a_piece + few_byte(entry.rows, i) * stride;
          const int8_t* const a1 = a_piece + few_byte(entry.rows, min(i + 1, entry.count - 1)) * stride;
#pragma unroll 2
          for (int j = 0; j < kFewPiece / 16; ++j) {
            const int32_t at = turn ^ (j * 16);
            if (at >= bytes) continue;
            const int4 weights = load(w_piece + at);
            acc[i] = few_dot(weights, load(a0 + at), acc[i]);
            acc[i + 1] = few_dot(weights, load(a1 + at), acc[i + 1]);
          }
        }
      }
    }
    __syncwarp();
    if constexpr (P == Promotion::block) {
      const float w_s = num::from_bits(w_scale[block]);
#pragma unroll
      for (int i = 0; i < kFewTogether; ++i) {
        if (i > 0 && i >= entry.count) break;
        if (two != 0) acc[i] += __shfl_xor_sync(kFewAll, acc[i], 1);
        const float a_s = num::from_bits(a_scales[few_byte(entry.rows, i) * a_words + block]);
        const float scale = __fmul_rn(w_s, __fmul_rn(a_s, factor(i)));
        // Those of K-blocks first, in order.
        const int32_t at = two != 0 ? place / 2 + place % 2 * (kLanes / 2) : place;
        const bool first = exists && (two == 0 || place % 2 == 0);
        __syncwarp();  // the terms before were read
        terms[lane - place + at] = first ? FewTerm{__int2float_rn(acc[i]), scale} : FewTerm{-0.0f, 0.0f};
        __syncwarp();
        if (place != i) continue;
        const auto* pair = reinterpret_cast<const float4*>(terms + lane - place);
#pragma unroll
        for (int n = 0; n < kLanes / 2; ++n) {
          const float4 t = pair[n];
          v = __fmaf_rn(t.z, t.w, __fmaf_rn(t.x, t.y, v));
        }
      }
    } else {
      const auto w_q = static_cast<int32_t>(few_w_q(m, w_scale, w_row)[block]);
#pragma unroll
      for (int i = 0; i < kFewTogether; ++i) {
        if (i > 0 && i >= entry.count) break;
        acc[i] *= w_q * static_cast<int32_t>(a_scales[few_byte(entry.rows, i) * a_words + m.super_groups + block]);
      }
      for (bool more = true; more;) {
        const FewChunk chunk(m, chunk_begin);
        const int32_t end = min(chunk.end << two, pieces);  // a last K-block may have one piece of two
        const bool ends = end <= begin + kLanes;
#pragma unroll
        for (int i = 0; i < kFewTogether; ++i) {
          if (i > 0 && i >= entry.count) break;
          if (piece >= chunk_begin << two && piece < end) total[i] += acc[i];
          if (!ends) continue;
#pragma unroll
          for (int by = 1; by < kLanes; by *= 2) total[i] += __shfl_xor_sync(kFewAll, total[i], by);
          const float a_f = num::from_bits(a_scales[few_byte(entry.rows, i) * a_words + chunk.group]);
          const float scale = __fmul_rn(num::from_bits(w_scale[chunk.group]), __fmul_rn(a_f, factor(i)));
          if (place == i) v = __fmaf_rn(__int2float_rn(total[i]), scale, v);
          total[i] = 0;
        }
        if (ends) chunk_begin = chunk.end;
        more = ends && end < min(begin + kLanes, pieces);
      }
    }
  }
  return v;
}

}  // namespace octomoe::sm90
