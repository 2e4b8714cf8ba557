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

#include "core/args.h"
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
  uint32_t used;  // routes that have an expert, as bits
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

  // What a weight row's sum becomes; asked for before its bytes are there.
  struct RowScale {
    float scale, bias;
    int32_t column_sum;
    __device__ __forceinline__ void load(const FewMatrix& m, int32_t expert, int32_t row) {
      const int64_t at = static_cast<int64_t>(expert) * m.n + row;
      scale = m.scale[m.per_tensor ? expert : at];
      bias = m.bias != nullptr ? m.bias[at] : 0.0f;
      column_sum = m.column_sum != nullptr ? m.column_sum[at] : 0;
    }
    __device__ __forceinline__ float value(const FewMatrix& m, int32_t sum, float a_scale, int32_t zero) const {
      const int32_t acc = m.column_sum != nullptr ? sum - zero * column_sum : sum;
      const float v = __fmul_rn(__int2float_rn(acc), __fmul_rn(scale, a_scale));
      return m.bias != nullptr ? __fadd_rn(v, bias) : v;
    }
  };
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
  const auto stage_pairs = [&](int32_t at) { return min(min(per_stage, end - at), width - at % width); };
  if (warp == 8) {
    if (lane != 0) return;
    FewTokens::Stage stage;
    for (int32_t at = begin; at < end; ++stage.number) {
      const int32_t n = stage_pairs(at), expert = shared.expert[at / width];
      const auto bytes = static_cast<uint32_t>(n * m.k);
      few.wait_empty(stage);
      const uint32_t full = ptx::shared_address(&shared.full[stage.slot()]);
      ptx::barrier_arrive_expect(full, 2 * bytes);
      const int8_t* from = m.w + (static_cast<int64_t>(expert) * m.n + at % width) * m.k;
      ptx::copy_bulk(few.place(stage), from, bytes, full, ptx::kEvictFirst);
      ptx::copy_bulk(few.place(stage) + bytes, from + static_cast<int64_t>(width) * m.k, bytes, full,
                     ptx::kEvictFirst);
      at += n;
    }
    return;
  }
  few.quantize(m, args.routes.tokens, ~0u,
               [&](int row, int column, float(&v)[8]) { kernels::load_elems(args.x, row, column, v); });

  const int group = warp / 4;
  FewTokens::Stage stage;
  for (int32_t at = begin; at < end; ++stage.number) {
    const int32_t n = stage_pairs(at), unit = at / width, column = at % width;
    if (stage.number % 2 == group) {
      const int32_t expert = shared.expert[unit];
      const uint8_t* bytes = few.ring + stage.slot() * kFewStageBytes;
      for (int32_t pair = warp % 4, first = 1; pair < n || first; pair += 4, first = 0) {
        FewTokens::RowScale gate{}, up{};
        if (pair < n) {
          gate.load(m, expert, column + pair + (args.up_first ? width : 0));
          up.load(m, expert, column + pair + (args.up_first ? 0 : width));
        }
        if (first) few.wait_full(stage);
        if (pair >= n) break;
        const uint8_t* row[2] = {bytes + static_cast<int64_t>(pair) * m.k, bytes + static_cast<int64_t>(n + pair) * m.k};
        // At most one route of a token: at most kFewTokens.
        int32_t sums[kFewTokens][2] = {};
        int32_t route[kFewTokens], count = 0;
        uint32_t left = shared.routes[unit];
#pragma unroll
        for (int i = 0; i < kFewTokens; ++i) {
          route[i] = left != 0 ? __ffs(static_cast<int>(left)) - 1 : 0;
          count += left != 0;
          left &= left - 1;
        }
        const bool more = left != 0;  // an expert twice in a token's list: the rest follows below
        for (int32_t c = lane * 16; c < m.k; c += 512) {
          const int4 w0 = *reinterpret_cast<const int4*>(row[0] + c), w1 = *reinterpret_cast<const int4*>(row[1] + c);
#pragma unroll
          for (int i = 0; i < kFewTokens; ++i) {
            if (i < count) {
              const int4 a = *reinterpret_cast<const int4*>(few.rows + (route[i] / args.routes.top_k) * m.k + c);
              sums[i][0] = FewTokens::dot(w0, a, sums[i][0]);
              sums[i][1] = FewTokens::dot(w1, a, sums[i][1]);
            }
          }
        }
        int32_t mine[2] = {}, my_route = -1;
#pragma unroll
        for (int i = 0; i < kFewTokens; ++i) {
          if (i < count) {
            const int32_t s0 = FewTokens::sum_lanes(sums[i][0]), s1 = FewTokens::sum_lanes(sums[i][1]);
            if (lane == i) {
              mine[0] = s0;
              mine[1] = s1;
              my_route = route[i];
            }
          }
        }
        const auto finish = [&](int32_t r, int32_t s0, int32_t s1) {
          const int32_t token = r / args.routes.top_k;
          float a_scale = shared.scale[token];
          if (args.routes.weight_on_input) {
            a_scale = __fmul_rn(a_scale, args.routes.topk_weights[token * args.routes.weights_stride + r -
                                                                  token * args.routes.top_k]);
          }
          const int32_t zero = shared.zero[token];
          const float g = num::min_nan(gate.value(m, args.up_first ? s1 : s0, a_scale, zero), args.limit);
          const float u = num::clamp(up.value(m, args.up_first ? s0 : s1, a_scale, zero), -args.limit, args.limit);
          args.h[static_cast<int64_t>(r) * width + column + pair] =
              static_cast<uint16_t>(num::pack_bf16(__fmul_rn(num::silu(g), u), 0.0f));
        };
        if (my_route >= 0) finish(my_route, mine[0], mine[1]);
        if (more) {
          for (uint32_t rest = left; rest != 0; rest &= rest - 1) {
            const int32_t r = __ffs(static_cast<int>(rest)) - 1;
            int32_t s0 = 0, s1 = 0;
            for (int32_t c = lane * 16; c < m.k; c += 512) {
              const int4 a = *reinterpret_cast<const int4*>(few.rows + (r / args.routes.top_k) * m.k + c);
              s0 = FewTokens::dot(*reinterpret_cast<const int4*>(row[0] + c), a, s0);
              s1 = FewTokens::dot(*reinterpret_cast<const int4*>(row[1] + c), a, s1);
            }
            s0 = FewTokens::sum_lanes(s0);
            s1 = FewTokens::sum_lanes(s1);
            if (lane == 0) finish(r, s0, s1);
          }
        }
      }
      few.release(stage);
    }
    at += n;
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
  const auto stage_rows = [&](int32_t at) { return min(per_stage, columns - at % columns); };
  if (warp == 8) {
    if (lane == 0) {
      FewTokens::Stage stage;
      for (int32_t at = 0; at < total; ++stage.number) {
        const int32_t n = stage_rows(at), expert = shared.expert[at / columns];
        const auto bytes = static_cast<uint32_t>(n * m.k);
        few.wait_empty(stage);
        const uint32_t full = ptx::shared_address(&shared.full[stage.slot()]);
        ptx::barrier_arrive_expect(full, bytes);
        ptx::copy_bulk(few.place(stage), m.w + (static_cast<int64_t>(expert) * m.n + first + at % columns) * m.k, bytes,
                       full, ptx::kEvictFirst);
        at += n;
      }
    }
    ptx::grid_dependency_wait();
    ptx::grid_dependency_launch();
  } else {
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
    const int group = warp / 4;
    FewTokens::Stage stage;
    for (int32_t at = 0; at < total; ++stage.number) {
      const int32_t n = stage_rows(at), unit = at / columns, column = at % columns;
      if (stage.number % 2 == group) {
        const int32_t expert = shared.expert[unit];
        const uint8_t* bytes = few.ring + stage.slot() * kFewStageBytes;
        for (int32_t i = warp % 4, begins = 1; i < n || begins; i += 4, begins = 0) {
          FewTokens::RowScale scale{};
          if (i < n) scale.load(m, expert, first + column + i);
          if (begins) few.wait_full(stage);
          if (i >= n) break;
          const uint8_t* row = bytes + static_cast<int64_t>(i) * m.k;
          for (uint32_t left = shared.routes[unit]; left != 0; left &= left - 1) {
            const int32_t r = __ffs(static_cast<int>(left)) - 1;
            int32_t sum = 0;
            for (int32_t c = lane * 16; c < m.k; c += 512) {
              sum = FewTokens::dot(*reinterpret_cast<const int4*>(row + c),
                                   *reinterpret_cast<const int4*>(few.rows + static_cast<int64_t>(r) * m.k + c), sum);
            }
            sum = FewTokens::sum_lanes(sum);
            if (lane == 0) {
              const float v = scale.value(m, sum, shared.scale[r], shared.zero[r]);
              y[r * columns + column + i] = num::bf16_low(num::pack_bf16(v, 0.0f));
            }
          }
        }
        few.release(stage);
      }
      at += n;
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
