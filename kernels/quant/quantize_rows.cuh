// Quantises rows to INT8: x [T, H] once per token, h [R, I] between the GEMMs, a caller's activations.
// A row of bf16 or fp16 stays in registers between its maximum and the rounding; others, and very long ones, are read
// twice.
#pragma once

#include "core/load_row.cuh"
#include "core/numerics.cuh"
#include "ptx/grid.cuh"
#include "ptx/sm80.cuh"

namespace octomoe::kernels {

enum class RowScheme : int { channel, static_scale, asymmetric, block, hybrid };

inline constexpr int kQuantizeThreads = 256;

// kWithin: the scale comes from the values themselves, so that none needs a clamp (num::quantize_within).
template <bool kWithin>
__device__ __forceinline__ void store_int8(int8_t* q, const float (&v)[kRowElems], float inverse, int32_t zero,
                                           float lo, float hi) {
  uint32_t w[2];
#pragma unroll
  for (int i = 0; i < kRowElems; i += 4) {
    uint32_t byte[4];
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      byte[j] = kWithin ? num::quantize_within(v[i + j], inverse)
                        : static_cast<uint32_t>(num::quantize(v[i + j], inverse, zero, lo, hi));
    }
    w[i / 4] = __byte_perm(__byte_perm(byte[0], byte[1], 0x0040), __byte_perm(byte[2], byte[3], 0x0040), 0x5410);
    if (kWithin && inverse == 0.0f) w[i / 4] = 0;  // of a group that is not finite
  }
  *reinterpret_cast<uint2*>(q) = make_uint2(w[0], w[1]);
}

// kRowThreads: threads that share a row: 32 (8 rows a CTA) or all 256. kPasses: a row has at most
// kRowThreads * 8 * kPasses columns; 0: any length.
template <RowScheme S, int kRowThreads, int kPasses>
struct RowQuantizer {
  static constexpr bool kBlocks = S == RowScheme::block || S == RowScheme::hybrid;
  static constexpr bool kWithin = kBlocks || S == RowScheme::channel;
  static constexpr int kSpan = kRowThreads * kRowElems;
  static constexpr int kRows = kQuantizeThreads / kRowThreads;
  static constexpr int kWarps = kRowThreads / 32;
  // Blocks have at least 32 columns.
  static constexpr int kMaxBlocks = kPasses == 0 ? 65536 / 32 : kSpan * kPasses / 32;
  static_assert(kRowThreads == 32 || kRowThreads == kQuantizeThreads);

  struct Shared {
    uint32_t block_top[kBlocks ? kRows * kMaxBlocks : 1];  // absmax bits of each K-block
    float block_inverse[kBlocks ? kRows * kMaxBlocks : 1];
    uint32_t top[kWarps];
    float low[kWarps], high[kWarps];
  };

  static __device__ __forceinline__ void sync() {
    if constexpr (kRowThreads == 32) {
      __syncwarp();
    } else {
      __syncthreads();
    }
  }

  struct Range {
    uint32_t absmax = 0;
    float lo = 0.0f, hi = 0.0f;
  };

  static __device__ __forceinline__ int32_t blocks_of(const QuantizeArgs& args) {
    return (args.k + args.block_k - 1) / args.block_k;
  }
  // c / block_k, by 2^32 / block_k, rounded up: exact since columns and block_k are at most 65536.
  struct BlockOf {
    uint32_t inverse;
    explicit __device__ __forceinline__ BlockOf(const QuantizeArgs& args)
        : inverse(kBlocks ? 0xffffffffu / static_cast<uint32_t>(args.block_k) + 1 : 0) {}
    __device__ __forceinline__ uint32_t operator()(int32_t c) const {
      return static_cast<uint32_t>(static_cast<uint64_t>(inverse) * static_cast<uint32_t>(c) >> 32);
    }
  };

  static __device__ __forceinline__ void widen(Range& range, BlockOf block_of, uint32_t* block_top, int32_t c,
                                               const float (&v)[kRowElems]) {
    uint32_t m = 0;
#pragma unroll
    for (int i = 0; i < kRowElems; ++i) {
      m = max(m, num::abs_bits(v[i]));
      if constexpr (S == RowScheme::asymmetric) {
        range.lo = fminf(range.lo, v[i]);
        range.hi = fmaxf(range.hi, v[i]);
      }
    }
    // Blocks are multiples of 32 columns: a thread's 8 lie in one.
    if constexpr (kBlocks) atomicMax(&block_top[block_of(c)], m);
    range.absmax = max(range.absmax, m);
  }

  // Over the threads of the row.
  static __device__ __forceinline__ void reduce(Range& range, Shared& shared) {
    range.absmax = __reduce_max_sync(0xffffffffu, range.absmax);
    if constexpr (S == RowScheme::asymmetric) {
#pragma unroll
      for (int d = 16; d > 0; d /= 2) {
        range.lo = fminf(range.lo, __shfl_xor_sync(0xffffffffu, range.lo, d));
        range.hi = fmaxf(range.hi, __shfl_xor_sync(0xffffffffu, range.hi, d));
      }
    }
    if constexpr (kWarps > 1) {
      const int warp = threadIdx.x >> 5;
      if ((threadIdx.x & 31) == 0) {
        shared.top[warp] = range.absmax;
        shared.low[warp] = range.lo;
        shared.high[warp] = range.hi;
      }
      __syncthreads();
#pragma unroll
      for (int i = 0; i < kWarps; ++i) {
        range.absmax = max(range.absmax, shared.top[i]);
        if constexpr (S == RowScheme::asymmetric) {
          range.lo = fminf(range.lo, shared.low[i]);
          range.hi = fmaxf(range.hi, shared.high[i]);
        }
      }
    }
  }

  // The scales of a row's K-blocks, a thread for each.
  static __device__ __forceinline__ void scale_blocks(const QuantizeArgs& args, int32_t row, int lane,
                                                      const uint32_t* top, float* inverse) {
    const int32_t blocks = blocks_of(args);
    for (int32_t b = lane; b < blocks; b += kRowThreads) {
      if constexpr (S == RowScheme::block) {
        const num::GroupScale g = num::symmetric_scale(top[b], num::kInt8Max);
        inverse[b] = g.inverse;
        args.scale[b * args.rows_total + row] = g.scale;
      } else {
        const int32_t group = b / args.super_group, begin = group * args.super_group;
        const int32_t end = min(begin + args.super_group, blocks);
        uint32_t m = 0;
#pragma unroll 8
        for (int32_t i = begin; i < end; ++i) m = max(m, top[i]);
        const num::SuperScale super = num::super_scale(m, args.q_max);
        const num::BlockScale q = num::block_scale(super, top[b], args.q_max);
        inverse[b] = q.inverse;
        args.block_q[b * args.rows_total + row] = q.q;
        if (b == begin) args.scale[group * args.rows_total + row] = super.f;
      }
    }
  }

  // How values are rounded.
  struct Rounding {
    float inverse = 0.0f;
    int32_t zero = 0;
    float lo = -num::kInt8Max;

    __device__ __forceinline__ void set_row(const QuantizeArgs& args, int32_t row, const Range& range, bool writes) {
      if constexpr (S == RowScheme::channel) {
        const num::GroupScale g = num::symmetric_scale(range.absmax, num::kInt8Max);
        inverse = g.inverse;
        if (writes) args.scale[row] = g.scale;
      } else if constexpr (S == RowScheme::static_scale) {
        const bool finite = range.absmax < num::kInfBits;
        inverse = finite ? __fdiv_rn(1.0f, *args.static_scale) : 0.0f;
        if (writes) args.scale[row] = finite ? *args.static_scale : num::nan();
      } else if constexpr (S == RowScheme::asymmetric) {
        const num::RowScale g = num::asymmetric_scale(range.lo, range.hi, range.absmax < num::kInfBits);
        inverse = g.inverse;
        zero = g.zero;
        lo = -128.0f;
        if (writes) {
          args.scale[row] = g.scale;
          args.zero[row] = g.zero;
        }
      }
    }
  };

  static __device__ __forceinline__ void run(const QuantizeArgs& args) {
    __shared__ Shared shared;
    if (args.next_early != 0) ptx::grid_dependency_launch();
    const int32_t rows = args.row_count != nullptr ? min(*args.row_count, args.rows) : args.rows;
    if (args.beside_last == 0) {
      ptx::grid_dependency_wait();
      ptx::grid_dependency_launch();
    }
    const int part = static_cast<int>(threadIdx.x) / kRowThreads, step = static_cast<int>(gridDim.x) * kRows;
    for (int32_t row = static_cast<int32_t>(blockIdx.x) * kRows + part; row < rows; row += step) {
      if constexpr (kPasses > 0) {
        if (args.x.aligned != 0 && args.x.type != RowType::f32) {
          quantize_row<true>(args, shared, row);
          continue;
        }
      }
      quantize_row<false>(args, shared, row);
    }
    // One CTA waits for all: the others leave their multiprocessors to the launch that follows.
    if (args.beside_last != 0 && blockIdx.x == gridDim.x - 1) ptx::grid_dependency_wait();
  }

  // kHeld: a row of aligned bf16 or fp16 stays in registers, as it came; otherwise it is read twice.
  template <bool kHeld>
  static __device__ __forceinline__ void quantize_row(const QuantizeArgs& args, Shared& shared, int32_t row) {
    const int lane = static_cast<int>(threadIdx.x) % kRowThreads, part = static_cast<int>(threadIdx.x) / kRowThreads;
    uint32_t* const block_top = shared.block_top + (kBlocks ? part * kMaxBlocks : 0);
    float* const block_inverse = shared.block_inverse + (kBlocks ? part * kMaxBlocks : 0);
    if constexpr (kBlocks) {
      for (int32_t b = lane; b < blocks_of(args); b += kRowThreads) block_top[b] = 0;
      sync();
    }
    uint4 held[kHeld ? kPasses : 1];
    if constexpr (kHeld) {
      const uint16_t* from = static_cast<const uint16_t*>(args.x.data) + row * args.x.stride + lane * kRowElems;
#pragma unroll
      for (int p = 0; p < kPasses; ++p) {
        if (p * kSpan + lane * kRowElems < args.k) held[p] = *reinterpret_cast<const uint4*>(from + p * kSpan);
      }
    }
    // use(column, its eight elements) for all of this thread's.
    const auto for_all = [&](const auto& use) {
      float v[kRowElems];
      if constexpr (kHeld) {
#pragma unroll
        for (int p = 0; p < kPasses; ++p) {
          const int32_t c = p * kSpan + lane * kRowElems;
          if (c >= args.k) continue;
          unpack_elems(args.x.type, held[p], v);
          use(c, v);
        }
      } else {
        for (int32_t c = lane * kRowElems; c < args.k; c += kSpan) {
          load_elems(args.x, row, c, v);
          use(c, v);
        }
      }
    };
    Range range;
    const BlockOf block_of(args);
    for_all([&](int32_t c, const float(&v)[kRowElems]) { widen(range, block_of, block_top, c, v); });
    if constexpr (kBlocks) {
      sync();
      scale_blocks(args, row, lane, block_top, block_inverse);
      sync();
    } else {
      reduce(range, shared);
    }
    Rounding rounding;
    if constexpr (!kBlocks) rounding.set_row(args, row, range, lane == 0);
    int8_t* q = args.q + static_cast<int64_t>(row) * args.k;
    for_all([&](int32_t c, const float(&v)[kRowElems]) {
      if constexpr (kBlocks) rounding.inverse = block_inverse[block_of(c)];
      store_int8<kWithin>(q + c, v, rounding.inverse, rounding.zero, rounding.lo, num::kInt8Max);
    });
    if (args.clear != nullptr) {
      uint8_t* const to = args.clear + row * args.clear_stride;
      for (int32_t i = lane * 16; i < args.clear_bytes; i += kRowThreads * 16) {
        *reinterpret_cast<uint4*>(to + i) = make_uint4(0, 0, 0, 0);
      }
    }
    sync();
    if (kHeld && args.read_once != 0 && lane % 8 == 0) {
      const auto* from = static_cast<const uint16_t*>(args.x.data) + row * args.x.stride + lane * kRowElems;
#pragma unroll
      for (int p = 0; p < kPasses; ++p) {
        ptx::discard_line(p * kSpan + lane * kRowElems < args.k, from + p * kSpan);
      }
    }
  }
};

template <RowScheme S, int kRowThreads, int kPasses>
__device__ __forceinline__ void quantize_rows(const QuantizeArgs& args) {
  RowQuantizer<S, kRowThreads, kPasses>::run(args);
}

}  // namespace octomoe::kernels
