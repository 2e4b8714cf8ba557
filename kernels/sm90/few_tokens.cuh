// A layer of a few tokens in two kernels: there, launches and the first bytes' way cost as much as the weights.
//
//   gate_up: quantise x (each CTA for itself) -> w13 -> SwiGLU -> h [routes, I] bf16
//   down:    quantise h (each CTA for itself) -> w2 -> y -> combine -> out
//
// No sort: a CTA groups the routes by expert itself, so that an expert's weights are read once whoever chose it. gate_up
// shares out all (expert, column) pairs evenly; down gives a CTA some columns of out with all experts, so that it can
// combine them alone. One producer thread streams weight rows by bulk copies of up to 16 KB into a ring, two groups of
// four warps take turns: a warp multiplies a row (gate_up: a gate and an up row) with dp4a, whatever tokens it has.
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
using kernels::kFewRoutes;
using kernels::kFewTokens;
using kernels::OutType;

using kernels::kFewHeaderBytes;
using kernels::kFewStageBytes;
using kernels::kFewStages;
using kernels::kFewThreads;

inline constexpr int kFewWorkers = kFewThreads - 32;

struct FewShared {
  uint64_t full[kFewStages], empty[kFewStages];
  // Experts in use, in order of their first route, and the routes of each as bits.
  int32_t experts, expert[kFewRoutes];
  uint32_t routes[kFewRoutes];
  // Of quantised rows.
  uint32_t top[kFewRoutes], low[kFewRoutes], high[kFewRoutes];
  float scale[kFewRoutes];
  int32_t zero[kFewRoutes];
  uint8_t token[kFewRoutes];  // of a route
  uint32_t used;              // routes that have an expert, as bits
};
static_assert(sizeof(FewShared) <= kFewHeaderBytes);

struct FewTokens {
  FewShared& shared;
  uint8_t* ring;
  int8_t* rows;  // quantised, one after another

  static __device__ __forceinline__ int lane() { return static_cast<int>(threadIdx.x) & 31; }
  static __device__ __forceinline__ int warp() { return static_cast<int>(threadIdx.x) >> 5; }

  __device__ __forceinline__ void init() const {
    if (threadIdx.x == 0) {
      for (int i = 0; i < kFewStages; ++i) {
        ptx::barrier_init(ptx::shared_address(&shared.full[i]), 1);
        ptx::barrier_init(ptx::shared_address(&shared.empty[i]), 4);
      }
      ptx::barrier_init_fence();
    }
    if (threadIdx.x < kFewRoutes) {
      shared.top[threadIdx.x] = 0;
      shared.low[threadIdx.x] = 0;
      shared.high[threadIdx.x] = 0;
    }
  }

  static __device__ __forceinline__ int32_t expert_of(const FewRoutes& r, int32_t route) {
    const int32_t token = route / r.top_k, slot = route - token * r.top_k;
    const int64_t at = token * r.ids_stride + slot;
    const int64_t id = r.ids_are_64 ? static_cast<const int64_t*>(r.topk_ids)[at]
                                    : static_cast<const int32_t*>(r.topk_ids)[at];
    if (id < 0 || id >= r.id_limit) return -1;
    return r.expert_map != nullptr ? r.expert_map[id] : static_cast<int32_t>(id);
  }

  // One warp.
  __device__ __forceinline__ void group_routes(const FewRoutes& r) const {
    const int32_t e = lane() < r.tokens * r.top_k ? expert_of(r, lane()) : -1;
    const uint32_t same = __match_any_sync(0xffffffffu, e);
    const bool leads = e >= 0 && lane() == __ffs(static_cast<int>(same)) - 1;
    const uint32_t leaders = __ballot_sync(0xffffffffu, leads);
    if (leads) {
      const int at = __popc(leaders & ((1u << lane()) - 1));
      shared.expert[at] = e;
      shared.routes[at] = same;
    }
    shared.token[lane()] = static_cast<uint8_t>(lane() / r.top_k);
    const uint32_t used = __ballot_sync(0xffffffffu, e >= 0);
    if (lane() == 0) {
      shared.experts = __popc(leaders);
      shared.used = used;
    }
  }

  // Quantises those of `count` rows of k columns that `wanted` has a bit for, into shared memory; all worker threads, and
  // two of their barriers. load(row, column, v): eight values.
  template <class Load>
  __device__ __forceinline__ void quantize(const FewMatrix& m, int count, uint32_t wanted, const Load& load) const {
    const int per_row = m.k / 8;
    for (int i = static_cast<int>(threadIdx.x); i < count * per_row; i += kFewWorkers) {
      const int row = i / per_row, column = (i - row * per_row) * 8;
      if ((wanted >> row & 1) == 0) continue;
      float v[8];
      load(row, column, v);
      uint32_t top = 0;
      float low = 0.0f, high = 0.0f;
#pragma unroll
      for (int j = 0; j < 8; ++j) {
        top = max(top, num::abs_bits(v[j]));
        low = fminf(low, v[j]);
        high = fmaxf(high, v[j]);
      }
      atomicMax(&shared.top[row], top);
      if (m.column_sum != nullptr) {  // neither is negative: their bits are ordered as they are
        atomicMax(&shared.low[row], num::abs_bits(low));
        atomicMax(&shared.high[row], num::abs_bits(high));
      }
    }
    ptx::named_barrier(1, kFewWorkers);
    for (int i = static_cast<int>(threadIdx.x); i < count * per_row; i += kFewWorkers) {
      const int row = i / per_row, column = (i - row * per_row) * 8;
      if ((wanted >> row & 1) == 0) continue;
      float inverse, scale, limit = -num::kInt8Max;
      int32_t zero = 0;
      const uint32_t top = shared.top[row];
      if (m.column_sum != nullptr) {
        const num::RowScale g = num::asymmetric_scale(-num::from_bits(shared.low[row]),
                                                      num::from_bits(shared.high[row]), top < num::kInfBits);
        inverse = g.inverse;
        scale = g.scale;
        zero = g.zero;
        limit = -128.0f;
      } else if (m.static_scale != nullptr) {
        inverse = top < num::kInfBits ? __fdiv_rn(1.0f, *m.static_scale) : 0.0f;
        scale = top < num::kInfBits ? *m.static_scale : num::nan();
      } else {
        const num::GroupScale g = num::symmetric_scale(top, num::kInt8Max);
        inverse = g.inverse;
        scale = g.scale;
      }
      if (column == 0) {
        shared.scale[row] = scale;
        shared.zero[row] = zero;
      }
      float v[8];
      load(row, column, v);
      uint32_t packed[2] = {0, 0};
#pragma unroll
      for (int j = 0; j < 8; ++j) {
        packed[j / 4] |= (static_cast<uint32_t>(num::quantize(v[j], inverse, zero, limit, num::kInt8Max)) & 0xffu)
                         << (8 * (j % 4));
      }
      *reinterpret_cast<uint2*>(rows + static_cast<int64_t>(row) * m.k + column) = make_uint2(packed[0], packed[1]);
    }
    ptx::named_barrier(1, kFewWorkers);
  }

  // ---- the ring: stage s belongs to group s % 2 ----
  struct Stage {
    int32_t number = 0;
    __device__ __forceinline__ int slot() const { return number % kFewStages; }
    __device__ __forceinline__ uint32_t phase() const { return static_cast<uint32_t>(number / kFewStages) & 1u; }
  };
  __device__ __forceinline__ uint32_t place(const Stage& s) const {
    return ptx::shared_address(ring) + static_cast<uint32_t>(s.slot() * kFewStageBytes);
  }
  __device__ __forceinline__ void wait_full(const Stage& s) const {
    ptx::barrier_wait(ptx::shared_address(&shared.full[s.slot()]), s.phase());
  }
  __device__ __forceinline__ void wait_empty(const Stage& s) const {
    ptx::barrier_wait(ptx::shared_address(&shared.empty[s.slot()]), s.phase() ^ 1u);
  }
  __device__ __forceinline__ void release(const Stage& s) const {
    __syncwarp();
    if (lane() == 0) ptx::barrier_arrive(ptx::shared_address(&shared.empty[s.slot()]));
  }

  // acc += 16 bytes of a weight row times 16 of a token's.
  static __device__ __forceinline__ int32_t dot(const int4& w, const int4& a, int32_t acc) {
    acc = __dp4a(w.x, a.x, acc);
    acc = __dp4a(w.y, a.y, acc);
    acc = __dp4a(w.z, a.z, acc);
    return __dp4a(w.w, a.w, acc);
  }
  static __device__ __forceinline__ int32_t sum_lanes(int32_t v) {
    return static_cast<int32_t>(__reduce_add_sync(0xffffffffu, static_cast<unsigned>(v)));
  }

  // A row of weights times one of tokens; every lane has the sum.
  static __device__ __forceinline__ int32_t multiply(const uint8_t* w, const int8_t* a, int32_t k) {
    int32_t sum = 0;
#pragma unroll 4
    for (int32_t c = lane() * 16; c < k; c += 512) {
      sum = dot(*reinterpret_cast<const int4*>(w + c), *reinterpret_cast<const int4*>(a + c), sum);
    }
    return sum_lanes(sum);
  }

  // v of a sum; scale: of the weight row.
  static __device__ __forceinline__ float value(const FewMatrix& m, int32_t expert, int32_t row, int32_t sum,
                                                float scale, float a_scale, int32_t zero) {
    const int64_t at = static_cast<int64_t>(expert) * m.n + row;
    const int32_t acc = m.column_sum != nullptr ? sum - zero * m.column_sum[at] : sum;
    const float v = __fmul_rn(__int2float_rn(acc), __fmul_rn(scale, a_scale));
    return m.bias != nullptr ? __fadd_rn(v, m.bias[at]) : v;
  }
};

__device__ __forceinline__ FewTokens open_few(uint8_t* memory) {
  return {*reinterpret_cast<FewShared*>(memory), memory + kFewHeaderBytes,
          reinterpret_cast<int8_t*>(memory + kFewHeaderBytes + kFewStages * kFewStageBytes)};
}

__device__ __forceinline__ void few_gate_up(const FewGateUpArgs& args) {
  extern __shared__ __align__(128) uint8_t memory[];
  const FewTokens few = open_few(memory);
  FewShared& shared = few.shared;
  const FewMatrix& m = args.w13;
  const int32_t width = m.n / 2, lane = FewTokens::lane(), warp = FewTokens::warp();
  few.init();
  ptx::grid_dependency_wait();
  ptx::grid_dependency_launch();
  if (warp == 8) few.group_routes(args.routes);
  __syncthreads();
  // This CTA's pairs of a gate and an up row, in stages that end with an expert.
  const int64_t pairs = static_cast<int64_t>(shared.experts) * width;
  const auto begin = static_cast<int32_t>(pairs * blockIdx.x / gridDim.x);
  const auto end = static_cast<int32_t>(pairs * (blockIdx.x + 1) / gridDim.x);
  const int32_t per_stage = kFewStageBytes / (2 * m.k);
  int32_t unit = begin / width, column = begin - unit * width, n = 0;
  const auto next = [&](int32_t& at) {
    at += n;
    column += n;
    if (column == width) {
      column = 0;
      ++unit;
    }
    n = min(min(per_stage, end - at), width - column);
  };
  n = min(min(per_stage, end - begin), width - column);
  if (warp == 8) {
    if (lane != 0) return;
    FewTokens::Stage stage;
    for (int32_t at = begin; at < end; next(at), ++stage.number) {
      const auto bytes = static_cast<uint32_t>(n * m.k);
      few.wait_empty(stage);
      const uint32_t full = ptx::shared_address(&shared.full[stage.slot()]);
      ptx::barrier_arrive_expect(full, 2 * bytes);
      const int8_t* from = m.w + (static_cast<int64_t>(shared.expert[unit]) * m.n + column) * m.k;
      ptx::copy_bulk(few.place(stage), from, bytes, full, ptx::kEvictFirst);
      ptx::copy_bulk(few.place(stage) + bytes, from + static_cast<int64_t>(width) * m.k, bytes, full,
                     ptx::kEvictFirst);
    }
    return;
  }
  // Scales of the pairs' rows, first half and second half of w13: once, or each stage would wait for its own.
  auto* scales = reinterpret_cast<float2*>(few.rows + static_cast<int64_t>(args.routes.tokens) * m.k);
  for (int32_t at = begin + static_cast<int32_t>(threadIdx.x); at < end; at += kFewWorkers) {
    const int32_t expert = shared.expert[at / width];
    const int64_t row = static_cast<int64_t>(expert) * m.n + at % width;
    scales[at - begin] = m.per_tensor ? make_float2(m.scale[expert], m.scale[expert])
                                      : make_float2(m.scale[row], m.scale[row + width]);
  }
  few.quantize(m, args.routes.tokens, ~0u,
               [&](int row, int column, float(&v)[8]) { kernels::load_elems(args.x, row, column, v); });

  FewTokens::Stage stage;
  for (int32_t at = begin; at < end; next(at), ++stage.number) {
    if (stage.number % 2 != warp / 4) continue;
    const uint8_t* bytes = few.ring + stage.slot() * kFewStageBytes;
    const int32_t expert = shared.expert[unit];
    few.wait_full(stage);
    for (int32_t pair = warp % 4; pair < n; pair += 4) {
      // Lane i finishes the expert's i-th route.
      int32_t sums[2] = {}, route = -1, i = 0;
      for (uint32_t left = shared.routes[unit]; left != 0; left &= left - 1, ++i) {
        const int32_t r = __ffs(static_cast<int>(left)) - 1;
        const int8_t* a = few.rows + shared.token[r] * m.k;
        const int32_t first = FewTokens::multiply(bytes + static_cast<int64_t>(pair) * m.k, a, m.k);
        const int32_t second = FewTokens::multiply(bytes + static_cast<int64_t>(n + pair) * m.k, a, m.k);
        if (lane == i) {
          sums[0] = first;
          sums[1] = second;
          route = r;
        }
      }
      if (route >= 0) {
        const int32_t token = shared.token[route];
        float a_scale = shared.scale[token];
        if (args.routes.weight_on_input) {
          a_scale = __fmul_rn(a_scale, args.routes.topk_weights[token * args.routes.weights_stride + route -
                                                                token * args.routes.top_k]);
        }
        const float2 scale = scales[at - begin + pair];
        float g = FewTokens::value(m, expert, column + pair, sums[0], scale.x, a_scale, shared.zero[token]);
        float u = FewTokens::value(m, expert, column + pair + width, sums[1], scale.y, a_scale, shared.zero[token]);
        if (args.up_first) {
          const float first = g;
          g = u;
          u = first;
        }
        const float act = __fmul_rn(num::silu(num::min_nan(g, args.limit)), num::clamp(u, -args.limit, args.limit));
        args.h[static_cast<int64_t>(route) * width + column + pair] =
            static_cast<uint16_t>(num::pack_bf16(act, 0.0f));
      }
    }
    few.release(stage);
  }
}

__device__ __forceinline__ void few_down(const FewDownArgs& args) {
  extern __shared__ __align__(128) uint8_t memory[];
  const FewTokens few = open_few(memory);
  FewShared& shared = few.shared;
  const FewMatrix& m = args.w2;
  const int32_t routes = args.routes.tokens * args.routes.top_k;
  const int32_t lane = FewTokens::lane(), warp = FewTokens::warp();
  const int32_t first = static_cast<int32_t>(blockIdx.x) * args.columns, columns = min(args.columns, m.n - first);
  // y [routes, columns] behind the quantised rows.
  float* y = reinterpret_cast<float*>(few.rows + static_cast<int64_t>(routes) * m.k);
  few.init();
  // The routes were there before gate_up began, so the weights need not wait for it.
  if (warp == 8) few.group_routes(args.routes);
  __syncthreads();
  const int32_t per_stage = kFewStageBytes / m.k, total = shared.experts * columns;
  int32_t unit = 0, column = 0, n = min(per_stage, columns);
  const auto next = [&](int32_t& at) {
    at += n;
    column += n;
    if (column == columns) {
      column = 0;
      ++unit;
    }
    n = min(per_stage, columns - column);
  };
  if (warp == 8) {
    if (lane == 0) {
      FewTokens::Stage stage;
      for (int32_t at = 0; at < total; next(at), ++stage.number) {
        const auto bytes = static_cast<uint32_t>(n * m.k);
        few.wait_empty(stage);
        const uint32_t full = ptx::shared_address(&shared.full[stage.slot()]);
        ptx::barrier_arrive_expect(full, bytes);
        ptx::copy_bulk(few.place(stage),
                       m.w + (static_cast<int64_t>(shared.expert[unit]) * m.n + first + column) * m.k, bytes, full,
                       ptx::kEvictFirst);
      }
    }
    ptx::grid_dependency_wait();
    ptx::grid_dependency_launch();
  } else {
    float* scales = y + routes * columns;  // of the weight rows, by expert
    for (int32_t at = static_cast<int32_t>(threadIdx.x); at < total; at += kFewWorkers) {
      const int32_t expert = shared.expert[at / columns];
      scales[at] = m.scale[m.per_tensor ? expert : static_cast<int64_t>(expert) * m.n + first + at % columns];
    }
    ptx::grid_dependency_wait();
    ptx::grid_dependency_launch();
    few.quantize(m, routes, shared.used, [&](int row, int column, float(&v)[8]) {
      const uint4 p = *reinterpret_cast<const uint4*>(args.h + static_cast<int64_t>(row) * m.k + column);
      const uint32_t w[4] = {p.x, p.y, p.z, p.w};
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        v[2 * i] = num::bf16_low(w[i]);
        v[2 * i + 1] = num::bf16_high(w[i]);
      }
    });
    FewTokens::Stage stage;
    for (int32_t at = 0; at < total; next(at), ++stage.number) {
      if (stage.number % 2 != warp / 4) continue;
      const uint8_t* bytes = few.ring + stage.slot() * kFewStageBytes;
      const int32_t expert = shared.expert[unit];
      few.wait_full(stage);
      for (int32_t i = warp % 4; i < n; i += 4) {
        int32_t sum = 0, route = -1, j = 0;
        for (uint32_t left = shared.routes[unit]; left != 0; left &= left - 1, ++j) {
          const int32_t r = __ffs(static_cast<int>(left)) - 1;
          const int32_t s =
              FewTokens::multiply(bytes + static_cast<int64_t>(i) * m.k, few.rows + static_cast<int64_t>(r) * m.k, m.k);
          if (lane == j) {
            sum = s;
            route = r;
          }
        }
        if (route >= 0) {
          const float v = FewTokens::value(m, expert, first + column + i, sum, scales[at + i], shared.scale[route],
                                           shared.zero[route]);
          y[route * columns + column + i] = num::bf16_low(num::pack_bf16(v, 0.0f));
        }
      }
      few.release(stage);
    }
  }
  __syncthreads();
  // Combine in slot order (docs/schemes.md section 4).
  for (int32_t i = static_cast<int32_t>(threadIdx.x); i < args.routes.tokens * columns; i += kFewThreads) {
    const int32_t token = i / columns, column = i - token * columns;
    float o = 0.0f;
    bool begun = false;
    for (int32_t slot = 0; slot < args.routes.top_k; ++slot) {
      const int32_t r = token * args.routes.top_k + slot;
      if ((shared.used >> r & 1) == 0) continue;
      const float weight =
          args.routes.weight_on_input ? 1.0f : args.routes.topk_weights[token * args.routes.weights_stride + slot];
      const float v = y[r * columns + column];
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

}  // namespace octomoe::sm90
