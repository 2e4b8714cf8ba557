// Quantises rows to INT8: x [T, H] once per token, h [R, I] between the GEMMs, a caller's activations.
// One CTA a row (many rows: grid-stride); a row stays in registers between the maximum and the rounding.
#pragma once

#include "core/numerics.cuh"
#include "core/types.h"
#include "ptx/grid.cuh"

namespace octomoe::kernels {

enum class RowScheme : int { channel, static_scale, asymmetric, block, hybrid };
enum class RowType : int { f32, fp16, bf16 };  // octomoe::DType's order

struct QuantizeArgs {
  const void* x;  // [rows, K], row stride in elements
  int64_t x_stride;
  int32_t rows;  // upper bound; with row_count the device knows how many
  const int32_t* row_count;
  int32_t k;
  int8_t* q;           // [rows, K]
  float* scale;        // [rows]; block: [KB, rows_total]; hybrid F: [SG, rows_total]
  int32_t* zero;       // asymmetric: [rows]
  int32_t* block_q;    // hybrid: [KB, rows_total]
  int64_t rows_total;  // leading dimension of scale and block_q
  const float* static_scale;
  int32_t block_k, super_group, q_max;
};

inline constexpr int kQuantizeThreads = 256;
inline constexpr int kRowElems = 8;  // per thread and pass: 16 bytes of bf16

template <RowType T>
__device__ __forceinline__ void load_elems(const void* x, int64_t at, float (&v)[kRowElems]) {
  if constexpr (T == RowType::f32) {
    const float4* p = reinterpret_cast<const float4*>(static_cast<const float*>(x) + at);
    const float4 a = p[0], b = p[1];
    v[0] = a.x;
    v[1] = a.y;
    v[2] = a.z;
    v[3] = a.w;
    v[4] = b.x;
    v[5] = b.y;
    v[6] = b.z;
    v[7] = b.w;
  } else {
    const uint4 p = *reinterpret_cast<const uint4*>(static_cast<const uint16_t*>(x) + at);
    const uint32_t w[4] = {p.x, p.y, p.z, p.w};
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      if constexpr (T == RowType::bf16) {
        v[2 * i] = num::bf16_low(w[i]);
        v[2 * i + 1] = num::bf16_high(w[i]);
      } else {
        v[2 * i] = num::fp16_to_float(static_cast<uint16_t>(w[i] & 0xffffu));
        v[2 * i + 1] = num::fp16_to_float(static_cast<uint16_t>(w[i] >> 16));
      }
    }
  }
}

__device__ __forceinline__ void store_int8(int8_t* q, const float (&v)[kRowElems], float inverse, int32_t zero,
                                           float lo, float hi) {
  uint32_t w[2] = {0, 0};
#pragma unroll
  for (int i = 0; i < kRowElems; ++i) {
    w[i / 4] |= (static_cast<uint32_t>(num::quantize(v[i], inverse, zero, lo, hi)) & 0xffu) << (8 * (i % 4));
  }
  *reinterpret_cast<uint2*>(q) = make_uint2(w[0], w[1]);
}

// The rows' type; rows whose address or stride does not allow 16-byte loads are copied first by the host's plan.
// kPasses * kQuantizeThreads * kRowElems columns stay in registers; longer rows are read again from L2.
template <RowScheme S, RowType T, int kPasses>
__device__ __forceinline__ void quantize_rows(const QuantizeArgs& args) {
  constexpr int kSpan = kQuantizeThreads * kRowElems;
  __shared__ uint32_t top[32];
  __shared__ float low[32], high[32];
  extern __shared__ uint32_t block_top[];  // block, hybrid: absmax bits per K-block
  const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5;
  const int32_t blocks = (args.k + args.block_k - 1) / args.block_k;

  ptx::grid_dependency_wait();
  ptx::grid_dependency_launch();
  const int32_t rows = args.row_count != nullptr ? *args.row_count : args.rows;
  for (int32_t row = static_cast<int32_t>(blockIdx.x); row < rows; row += static_cast<int32_t>(gridDim.x)) {
    float v[kPasses][kRowElems];
    const int64_t begin = row * args.x_stride;
    uint32_t absmax = 0;
    float lo = 0.0f, hi = 0.0f;
    if constexpr (S == RowScheme::block || S == RowScheme::hybrid) {
      for (int32_t b = static_cast<int32_t>(threadIdx.x); b < blocks; b += kQuantizeThreads) block_top[b] = 0;
      __syncthreads();
    }
#pragma unroll
    for (int p = 0; p < kPasses; ++p) {
      const int32_t c = p * kSpan + static_cast<int32_t>(threadIdx.x) * kRowElems;
      if (c >= args.k) continue;
      load_elems<T>(args.x, begin + c, v[p]);
      uint32_t m = 0;
#pragma unroll
      for (int i = 0; i < kRowElems; ++i) {
        m = max(m, num::abs_bits(v[p][i]));
        if constexpr (S == RowScheme::asymmetric) {
          lo = fminf(lo, v[p][i]);
          hi = fmaxf(hi, v[p][i]);
        }
      }
      // Blocks are multiples of 32 columns: a thread's 8 lie in one.
      if constexpr (S == RowScheme::block || S == RowScheme::hybrid) atomicMax(&block_top[c / args.block_k], m);
      absmax = max(absmax, m);
    }
    if constexpr (S == RowScheme::block || S == RowScheme::hybrid) {
      __syncthreads();
    } else {
      absmax = __reduce_max_sync(0xffffffffu, absmax);
      if constexpr (S == RowScheme::asymmetric) {
#pragma unroll
        for (int d = 16; d > 0; d /= 2) {
          lo = fminf(lo, __shfl_xor_sync(0xffffffffu, lo, d));
          hi = fmaxf(hi, __shfl_xor_sync(0xffffffffu, hi, d));
        }
      }
      if (lane == 0) {
        top[warp] = absmax;
        low[warp] = lo;
        high[warp] = hi;
      }
      __syncthreads();
      constexpr int kWarps = kQuantizeThreads / 32;
      for (int i = 0; i < kWarps; ++i) {
        absmax = max(absmax, top[i]);
        lo = fminf(lo, low[i]);
        hi = fmaxf(hi, high[i]);
      }
    }

    // Scales, then values.
    float inverse = 0.0f;
    int32_t zero = 0;
    float q_lo = -num::kInt8Max;
    num::SuperScale super{};
    if constexpr (S == RowScheme::channel) {
      const num::GroupScale g = num::symmetric_scale(absmax, num::kInt8Max);
      inverse = g.inverse;
      if (threadIdx.x == 0) args.scale[row] = g.scale;
    } else if constexpr (S == RowScheme::static_scale) {
      const bool finite = absmax < num::kInfBits;
      inverse = finite ? __fdiv_rn(1.0f, *args.static_scale) : 0.0f;
      if (threadIdx.x == 0) args.scale[row] = finite ? *args.static_scale : num::nan();
    } else if constexpr (S == RowScheme::asymmetric) {
      const num::RowScale g = num::asymmetric_scale(lo, hi, absmax < num::kInfBits);
      inverse = g.inverse;
      zero = g.zero;
      q_lo = -128.0f;
      if (threadIdx.x == 0) {
        args.scale[row] = g.scale;
        args.zero[row] = g.zero;
      }
    }
    int32_t last_super = -1;
#pragma unroll
    for (int p = 0; p < kPasses; ++p) {
      const int32_t c = p * kSpan + static_cast<int32_t>(threadIdx.x) * kRowElems;
      if (c >= args.k) continue;
      if constexpr (S == RowScheme::block) {
        const int32_t b = c / args.block_k;
        const num::GroupScale g = num::symmetric_scale(block_top[b], num::kInt8Max);
        inverse = g.inverse;
        if (c == b * args.block_k) args.scale[b * args.rows_total + row] = g.scale;
      } else if constexpr (S == RowScheme::hybrid) {
        const int32_t b = c / args.block_k, sg = b / args.super_group;
        if (sg != last_super) {
          uint32_t m = 0;
          for (int32_t i = sg * args.super_group; i < min((sg + 1) * args.super_group, blocks); ++i)
            m = max(m, block_top[i]);
          super = num::super_scale(m, args.q_max);
          last_super = sg;
        }
        const num::BlockScale q = num::block_scale(super, block_top[b], args.q_max);
        inverse = q.inverse;
        if (c == b * args.block_k) {
          args.block_q[b * args.rows_total + row] = q.q;
          if (b == sg * args.super_group) args.scale[sg * args.rows_total + row] = super.f;
        }
      }
      store_int8(args.q + static_cast<int64_t>(row) * args.k + c, v[p], inverse, zero, q_lo, num::kInt8Max);
    }
    __syncthreads();
  }
}

}  // namespace octomoe::kernels
