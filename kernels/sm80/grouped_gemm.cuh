// INT8 grouped GEMM by mma.sync m16n8k32: SM80, SM86, SM89, and SM90 as well.
//
//   out[row, f] = epilogue( sum_k w[expert(row), f, k] * a[source(row), k] )
//
// Weights are the M operand in their natural layout [E, N, K], tokens the N operand: a tile of 8 tokens costs 8
// columns, not 128 padded rows. CTAs are persistent; each walks the tile list (core/tile_list.cuh) with two cursors:
// one that copies (stages - 1 ahead, also across tiles, so the next tile's data arrive during this tile's epilogue) and
// one that computes.
//
//   global --cp.async 16 B--> shared ring [stages][block_m + block_n rows][block_k bytes]
//          --ldmatrix.x4--> fragments (two k32 steps in registers) --mma.sync--> int32 sums
//
// Shared rows hold weight rows in fragment order: row mt*16 + h*8 + g of a warp's part holds weight row
// g*(2*MT) + 2*mt + h, so the thread that owns fragment rows g and g+8 of all MT m-tiles owns 2*MT neighbouring output
// columns and stores them in one instruction. 16-byte chunks of a row are swizzled by row & 7: ldmatrix and cp.async
// are free of bank conflicts.
#pragma once

#include "core/activation.cuh"
#include "core/gemm_config.h"
#include "core/numerics.cuh"
#include "core/tile_list.cuh"
#include "ptx/grid.cuh"
#include "ptx/sm80.cuh"

namespace octomoe::sm80 {

using kernels::Epilogue;
using kernels::GemmArgs;
using kernels::GemmConfig;
using kernels::OutType;
using kernels::Promotion;
using kernels::Tile;
using kernels::TileList;

template <GemmConfig C>
struct GroupedGemm {
  static constexpr int kThreads = C.threads();
  static constexpr int kChunks = C.block_k / 16;  // 16-byte chunks of a shared row
  // The threads that copy: a power of two of them, so that their rows follow a simple rule; of 384 threads, 256.
  static constexpr int kCopyThreads = kThreads >= 512 ? 512 : kThreads >= 256 ? 256 : kThreads >= 128 ? 128 : 64;
  static constexpr int kRowsPerPass = kCopyThreads / kChunks;  // rows that one cp.async of every such thread covers
  static constexpr int kPassesW = C.block_m / kRowsPerPass;
  static constexpr int kPassesA = (C.block_n + kRowsPerPass - 1) / kRowsPerPass;
  static constexpr int kMT = C.warp_m() / 16;    // m16 tiles of a warp
  static constexpr int kNT = C.warp_n() / 8;     // n8 tiles of a warp
  static constexpr int kSteps = C.block_k / 32;  // k32 steps of a stage
  static constexpr int kColumns = 2 * kMT;       // weight rows a thread owns
  static constexpr bool kBlocks = C.has_blocks();
  static constexpr int kOutColumns = C.gated ? kMT : kColumns;  // neighbouring output columns a thread owns

  static_assert(C.block_k == 64 || C.block_k == 128, "the swizzle is made for rows of 64 or 128 bytes");
  static_assert(C.warp_m() % (C.gated ? 32 : 16) == 0 && C.warp_n() % 8 == 0);
  static_assert(C.block_m % kRowsPerPass == 0 && C.stages >= 2);

  // For rows of 64 bytes two rows share a 128-byte line: the line's index takes the part of the row's.
  static __device__ __forceinline__ uint32_t swizzled(int row, int chunk) {
    if constexpr (kChunks == 8) {
      return static_cast<uint32_t>(row * 128 + ((chunk ^ (row & 7)) << 4));
    } else {
      return static_cast<uint32_t>(row * 64 + ((chunk ^ ((row >> 1) & 3)) << 4));
    }
  }

  // Shared row s of a tile holds output column feature_of(s) of the tile; gated tiles: of gate or, is_up(s), of up.
  static __device__ __forceinline__ constexpr int feature_of(int s) {
    const int warp = s / C.warp_m(), mt = s % C.warp_m() / 16, h = s % 16 / 8, g = s % 8;
    return C.gated ? warp * (C.warp_m() / 2) + g * kMT + 2 * (mt % (kMT / 2)) + h
                   : warp * C.warp_m() + g * kColumns + 2 * mt + h;
  }
  static __device__ __forceinline__ constexpr bool is_up(int s) { return C.gated && s % C.warp_m() / 16 >= kMT / 2; }
  // Both are sums of what the bits of s contribute, and a thread's rows differ only in bits above kRowsPerPass: the row
  // of pass p is the row of pass 0 plus a constant.
  static_assert(kRowsPerPass % 8 == 0 && (kRowsPerPass & (kRowsPerPass - 1)) == 0);

  // The copy cursor: one stage after another, tile after tile.
  struct Loader {
    const GemmArgs& args;
    const TileList& list;
    uint32_t ring;  // shared address of the ring
    int32_t m_tiles, total, index, k_tiles;
    int32_t k_tile = 0, slot = 0;
    const int8_t* w = nullptr;      // the thread's weight row of pass 0
    uint32_t w_valid = 0;           // a bit per pass
    int32_t source[kPassesA] = {};  // rows of a
    uint32_t a_valid = 0;
    int64_t scale_source = 0;  // thread r < block_n copies the scales of token r
    bool scale_valid = false;

    __device__ __forceinline__ void open_tile() {
      const Tile t = kernels::find_tile<C.block_n>(list, args, index, m_tiles);
      const int first = static_cast<int>(threadIdx.x) / kChunks, chunk = static_cast<int>(threadIdx.x) % kChunks;
      const int width = C.gated ? args.n / 2 : args.n;
      const int feature = t.m_tile * C.features() + feature_of(first);
      const int row = feature + (is_up(first) != (args.up_first != 0 && C.gated) ? width : 0);
      w = args.w + (static_cast<int64_t>(t.expert) * args.n + row) * args.k + chunk * 16;
      w_valid = 0;
#pragma unroll
      for (int p = 0; p < kPassesW; ++p) {
        w_valid |= (feature + feature_of(p * kRowsPerPass) < width ? 1u : 0u) << p;
      }
      a_valid = 0;
#pragma unroll
      for (int p = 0; p < kPassesA; ++p) {
        const int r = first + p * kRowsPerPass;
        source[p] = static_cast<int32_t>(source_row(args, t, r));
        a_valid |= (r < t.rows ? 1u : 0u) << p;
      }
      if constexpr (kBlocks) {
        scale_valid = static_cast<int>(threadIdx.x) < t.rows;
        if (static_cast<int>(threadIdx.x) < C.block_n)
          scale_source = source_row(args, t, static_cast<int>(threadIdx.x));
      }
    }

    __device__ __forceinline__ void load_scales(uint32_t stage, int32_t column) {
      static_assert(!kBlocks || C.block_n <= kCopyThreads);
      if (static_cast<int>(threadIdx.x) >= C.block_n) return;
      const void* table = C.promotion == Promotion::block ? static_cast<const void*>(args.a_scale) : args.a_q;
#pragma unroll
      for (int i = 0; i < C.scales_per_stage(); ++i) {
        const int32_t block = (column + i * 32) / args.block_k;
        const bool valid = scale_valid && block < args.blocks_k;
        const int64_t at = valid ? block * args.a_rows + scale_source : 0;
        ptx::cp_async_4(
            stage + (C.block_m + C.block_n) * C.block_k + (i * C.block_n + static_cast<int>(threadIdx.x)) * 4,
            static_cast<const int32_t*>(table) + at, valid);
      }
    }

    // Copies the next stage, or nothing when all tiles are done; always commits, so that group counts stay regular.
    __device__ __forceinline__ void load_stage() {
      if (index < total) {
        if (kCopyThreads == kThreads || static_cast<int>(threadIdx.x) < kCopyThreads) copy_stage();
        if (++k_tile == k_tiles) {
          k_tile = 0;
          index += static_cast<int32_t>(gridDim.x);
        }
      }
      ptx::cp_async_commit();
      slot = slot + 1 == C.stages ? 0 : slot + 1;
    }

    __device__ __forceinline__ void copy_stage() {
      if (k_tile == 0) open_tile();
      const uint32_t stage = ring + static_cast<uint32_t>(slot) * C.stage_bytes();
      const int first = static_cast<int>(threadIdx.x) / kChunks, chunk = static_cast<int>(threadIdx.x) % kChunks;
      const int32_t column = k_tile * C.block_k;
      const bool inside = column + chunk * 16 < args.k;
#pragma unroll
      for (int p = 0; p < kPassesW; ++p) {
        const int up_rows = is_up(p * kRowsPerPass) ? (args.up_first ? -args.n / 2 : args.n / 2) : 0;
        const int64_t offset = static_cast<int64_t>(feature_of(p * kRowsPerPass) + up_rows) * args.k + column;
        const bool valid = inside && (w_valid >> p & 1);
        ptx::cp_async_16(stage + swizzled(first + p * kRowsPerPass, chunk), valid ? w + offset : args.w, valid);
      }
#pragma unroll
      for (int p = 0; p < kPassesA; ++p) {
        const int r = first + p * kRowsPerPass;
        if (C.block_n % kRowsPerPass == 0 || r < C.block_n) {
          const int64_t offset = static_cast<int64_t>(source[p]) * args.k + column + chunk * 16;
          const bool valid = inside && (a_valid >> p & 1);
          ptx::cp_async_16(stage + swizzled(C.block_m + r, chunk), args.a + (valid ? offset : 0), valid);
        }
      }
      if constexpr (kBlocks) load_scales(stage, column);
    }
  };

  using Sums = int32_t[kMT][kNT][4];

  // Fragments of one k32 step of the stage at `stage`.
  struct Fragments {
    uint32_t w[kMT][4];
    uint32_t a[kNT][2];

    __device__ __forceinline__ void load(uint32_t stage, int step, int warp_m, int warp_n) {
      const int lane = threadIdx.x & 31;
#pragma unroll
      for (int mt = 0; mt < kMT; ++mt) {
        const int row = warp_m * C.warp_m() + mt * 16 + (lane & 15);
        ptx::ldmatrix_x4(w[mt], stage + swizzled(row, step * 2 + (lane >> 4)));
      }
#pragma unroll
      for (int nt = 0; nt + 1 < kNT; nt += 2) {
        uint32_t r[4];
        const int row = C.block_m + warp_n * C.warp_n() + nt * 8 + (lane >> 4) * 8 + (lane & 7);
        ptx::ldmatrix_x4(r, stage + swizzled(row, step * 2 + (lane >> 3 & 1)));
        a[nt][0] = r[0];
        a[nt][1] = r[1];
        a[nt + 1][0] = r[2];
        a[nt + 1][1] = r[3];
      }
      if constexpr (kNT % 2 == 1) {
        const int row = C.block_m + warp_n * C.warp_n() + (kNT - 1) * 8 + (lane & 7);
        ptx::ldmatrix_x2(a[kNT - 1][0], a[kNT - 1][1], stage + swizzled(row, step * 2 + (lane >> 3 & 1)));
      }
    }
  };

  static __device__ __forceinline__ void mma(Sums& sums, const Fragments& f) {
#pragma unroll
    for (int nt = 0; nt < kNT; ++nt) {
#pragma unroll
      for (int mt = 0; mt < kMT; ++mt) ptx::mma_s8(sums[mt][nt], f.w[mt], f.a[nt][0], f.a[nt][1]);
    }
  }

  // ---- where a thread's sums belong ----
  // Sum [mt][nt][2h + j] is weight row (mt, h) and token nt*8 + (lane%4)*2 + j of the warp's part.
  static __device__ __forceinline__ int token_of(int warp_n, int nt, int j) {
    return warp_n * C.warp_n() + nt * 8 + (static_cast<int>(threadIdx.x) & 3) * 2 + j;
  }
  // First of the thread's weight rows; gated: of gate (half 0) or up (half 1).
  static __device__ __forceinline__ int first_row(const GemmArgs& args, const Tile& t, int warp_m, int half_index) {
    const int g = (static_cast<int>(threadIdx.x) & 31) >> 2;
    if constexpr (C.gated) {
      return t.m_tile * C.features() + warp_m * (C.warp_m() / 2) + g * kMT +
             (half_index != args.up_first ? args.n / 2 : 0);
    } else {
      return t.m_tile * C.block_m + warp_m * C.warp_m() + g * kColumns;
    }
  }

  static __device__ __forceinline__ int64_t source_row(const GemmArgs& args, const Tile& t, int token) {
    const int64_t row = t.row_begin + min(token, t.rows - 1);
    return args.row_source != nullptr ? args.row_source[row] : row;
  }

  // ---- promotion: what a K-block's partial sums do ----
  // The block scheme starts its partial sums at 1.5 * 2^23 as float bits: |partial| <= 128 * 128 * 256 = 2^22, so the
  // bits read as a float are 12582912 + partial exactly, and a subtraction replaces the four times slower int-to-float
  // conversion.
  static constexpr int32_t kMagic = 0x4b400000;
  static __device__ __forceinline__ int32_t initial_sum() { return C.promotion == Promotion::block ? kMagic : 0; }
  static __device__ __forceinline__ float partial_to_float(int32_t sum) {
    return __fsub_rn(__int_as_float(sum), 12582912.0f);
  }

  static __device__ __forceinline__ void fill(Sums& sums, int32_t value) {
#pragma unroll
    for (int mt = 0; mt < kMT; ++mt) {
#pragma unroll
      for (int nt = 0; nt < kNT; ++nt) {
#pragma unroll
        for (int i = 0; i < 4; ++i) sums[mt][nt][i] = value;
      }
    }
  }

  static constexpr int kHalves = C.gated ? 2 : 1;
  // The scale block row of the thread's weight rows (they share one: block_n is a multiple of 16).
  static __device__ __forceinline__ int64_t block_row(const GemmArgs& args, const Tile& t, int warp_m, int half_index) {
    int row = first_row(args, t, warp_m, half_index);
    const int segment_rows = C.gated ? args.n / 2 : args.n;
    row = min(row, (C.gated ? (half_index != args.up_first ? 2 : 1) : 1) * segment_rows - 1);
    const int per_segment = (segment_rows + args.block_n - 1) / args.block_n;
    return static_cast<int64_t>(t.expert) * args.blocks_n + row / segment_rows * per_segment +
           row % segment_rows / args.block_n;
  }

  // Weight scales of the thread for one K-block: s_w (block) or Q_w as bits (hybrid).
  struct WeightScales {
    int32_t value[kHalves];
    __device__ __forceinline__ void load(const GemmArgs& args, const int64_t (&rows)[kHalves], int32_t block) {
      block = min(block, args.blocks_k - 1);
#pragma unroll
      for (int h = 0; h < kHalves; ++h) {
        const int64_t at = rows[h] * args.blocks_k + block;
        value[h] =
            C.promotion == Promotion::block ? __float_as_int(args.w_scale[at]) : static_cast<int32_t>(args.w_q[at]);
      }
    }
  };

  // Scales of the K-block whose partial sums wait for their promotion: s_w and s_a, or Q_w and Q_a.
  struct PendingScales {
    int32_t weight[kHalves];
    int32_t token[kNT][2];

    // Before the barrier that frees the stage.
    __device__ __forceinline__ void read_tokens(const int32_t* stage_scales, int warp_n,
                                                const float (&factor)[kNT][2]) {
#pragma unroll
      for (int nt = 0; nt < kNT; ++nt) {
#pragma unroll
        for (int j = 0; j < 2; ++j) {
          const int32_t s = stage_scales[token_of(warp_n, nt, j)];
          token[nt][j] =
              C.promotion == Promotion::block ? __float_as_int(__fmul_rn(__int_as_float(s), factor[nt][j])) : s;
        }
      }
    }
  };

  // What the promoted sums start from. Block: -0.0f, so that the first fma gives the product itself, its sign included.
  static constexpr int32_t kEmptyTotal = C.promotion == Promotion::block ? static_cast<int32_t>(0x80000000u) : 0;

  // The partial sums of token tile nt enter the totals.
  static __device__ __forceinline__ void promote(Sums& total, const Sums& sums, const PendingScales& s, int nt) {
#pragma unroll
    for (int j = 0; j < 2; ++j) {
#pragma unroll
      for (int half = 0; half < kHalves; ++half) {
        const int32_t w = s.weight[half], a = s.token[nt][j];
        const int32_t scale =
            C.promotion == Promotion::block ? __float_as_int(__fmul_rn(__int_as_float(w), __int_as_float(a))) : w * a;
#pragma unroll
        for (int mt = half * kMT / kHalves; mt < (half + 1) * kMT / kHalves; ++mt) {
#pragma unroll
          for (int h = 0; h < 2; ++h) {
            int32_t& t = total[mt][nt][2 * h + j];
            const int32_t p = sums[mt][nt][2 * h + j];
            if constexpr (C.promotion == Promotion::block) {
              t = __float_as_int(__fmaf_rn(partial_to_float(p), __int_as_float(scale), __int_as_float(t)));
            } else {
              t += scale * p;
            }
          }
        }
      }
    }
  }

  // The first k32 step of a K-block. The previous block's sums leave each token tile right before its first mma, so
  // that the arithmetic of one token tile runs beside the tensor work of the others.
  template <bool kPending>
  static __device__ __forceinline__ void mma_first(Sums& total, Sums& sums, const Fragments& f,
                                                   const PendingScales& s) {
#pragma unroll
    for (int nt = 0; nt < kNT; ++nt) {
      if constexpr (kPending) promote(total, sums, s, nt);
#pragma unroll
      for (int mt = 0; mt < kMT; ++mt) ptx::mma_s8_from(sums[mt][nt], f.w[mt], f.a[nt][0], f.a[nt][1], initial_sum());
    }
  }

  // ---- epilogue ----
  static __device__ __forceinline__ int row_of(const int (&first)[kHalves], int mt, int h) {
    if constexpr (C.gated) {
      return first[mt >= kMT / 2] + 2 * (mt % (kMT / 2)) + h;
    } else {
      return first[0] + 2 * mt + h;
    }
  }

  // v of one sum (docs/schemes.md section 3), bias included.
  static __device__ __forceinline__ float value(const GemmArgs& args, int32_t sum, int32_t zero_times_column,
                                                float w_scale, float a_scale, float bias) {
    float v;
    if constexpr (C.promotion == Promotion::block || C.promotion == Promotion::hybrid_flush) {
      v = __int_as_float(sum);
    } else {
      const int32_t acc = C.promotion == Promotion::asymmetric ? sum - zero_times_column : sum;
      v = __fmul_rn(__int2float_rn(acc), __fmul_rn(w_scale, a_scale));
    }
    return args.bias != nullptr ? __fadd_rn(v, bias) : v;
  }

  template <class Act>
  static __device__ __forceinline__ void finish_tile(const GemmArgs& args, const Tile& t, const Sums& sums, int warp_m,
                                                     int warp_n, const Act& act) {
    int first[kHalves];
#pragma unroll
    for (int h = 0; h < kHalves; ++h) first[h] = first_row(args, t, warp_m, h);
    const int width = C.gated ? args.n / 2 : args.n;  // output columns
    const int column = first[0] - (C.gated && args.up_first ? width : 0);
    if (column >= width) return;

    float w_scale[kMT][2], bias[kMT][2];
    int32_t column_sum[kMT][2];
#pragma unroll
    for (int mt = 0; mt < kMT; ++mt) {
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        const int row = row_of(first, mt, h);
        const int64_t at = static_cast<int64_t>(t.expert) * args.n + row;
        if constexpr (C.promotion == Promotion::channel || C.promotion == Promotion::asymmetric) {
          w_scale[mt][h] = args.w_scale[args.w_scale_per_tensor ? t.expert : at];
        } else if constexpr (C.promotion == Promotion::hybrid) {
          w_scale[mt][h] = args.w_scale[block_row(args, t, warp_m, C.gated && mt >= kMT / 2)];
        } else {
          w_scale[mt][h] = 0.0f;
        }
        column_sum[mt][h] = C.promotion == Promotion::asymmetric ? args.column_sum[at] : 0;
        bias[mt][h] = args.bias != nullptr ? args.bias[at] : 0.0f;
      }
    }

#pragma unroll
    for (int nt = 0; nt < kNT; ++nt) {
#pragma unroll
      for (int j = 0; j < 2; ++j) {
        const int token = token_of(warp_n, nt, j);
        if (token >= t.rows) continue;
        const int64_t row = t.row_begin + token, source = source_row(args, t, token);
        float a_scale = 0.0f;
        if constexpr (C.promotion != Promotion::block && C.promotion != Promotion::hybrid_flush) {
          a_scale = args.a_scale[source];
          if (args.row_factor != nullptr) a_scale = __fmul_rn(a_scale, args.row_factor[row]);
        }
        const int32_t zero = C.promotion == Promotion::asymmetric ? args.a_zero[source] : 0;
        const auto v = [&](int mt, int h) {
          return value(args, sums[mt][nt][2 * h + j], zero * column_sum[mt][h], w_scale[mt][h], a_scale, bias[mt][h]);
        };
        float out[kOutColumns];
#pragma unroll
        for (int c = 0; c < kOutColumns; ++c) {
          if constexpr (C.epilogue == Epilogue::activate) {
            out[c] = C.gated ? act(v(c / 2, c % 2), v(kMT / 2 + c / 2, c % 2)) : act(v(c / 2, c % 2), 0.0f);
          } else {
            out[c] = v(c / 2, c % 2);
          }
        }
        store(args, row, column, width, out);
      }
    }
  }

  // kOutColumns neighbouring values of one row; a row's width is a multiple of 8, and so is the first column.
  static __device__ __forceinline__ void store(const GemmArgs& args, int64_t row, int column, int width,
                                               const float (&v)[kOutColumns]) {
    const int64_t at = row * args.out_stride + column;
    if constexpr (C.out == OutType::f32) {
#pragma unroll
      for (int c = 0; c < kOutColumns; c += 2) {
        if (column + c < width) {
          float2 pair = make_float2(num::canonical(v[c]), num::canonical(v[c + 1]));
          *reinterpret_cast<float2*>(static_cast<float*>(args.out) + at + c) = pair;
        }
      }
    } else {
      uint32_t packed[kOutColumns / 2];
#pragma unroll
      for (int c = 0; c < kOutColumns; c += 2) {
        packed[c / 2] = C.out == OutType::bf16 ? num::pack_bf16(v[c], v[c + 1]) : num::pack_fp16(v[c], v[c + 1]);
      }
      uint16_t* dst = static_cast<uint16_t*>(args.out) + at;
      if constexpr (kOutColumns == 8) {
        *reinterpret_cast<uint4*>(dst) = make_uint4(packed[0], packed[1], packed[2], packed[3]);
      } else if constexpr (kOutColumns == 4) {
        *reinterpret_cast<uint2*>(dst) = make_uint2(packed[0], packed[1]);
      } else {
        static_assert(kOutColumns == 2);
        *reinterpret_cast<uint32_t*>(dst) = packed[0];
      }
    }
  }

  // ---- the kernel ----
  static __device__ __forceinline__ void run(const GemmArgs& args) {
    extern __shared__ __align__(128) uint8_t shared[];
    __shared__ TileList list;
    const uint32_t ring = ptx::shared_address(shared);
    const int warp = static_cast<int>(threadIdx.x) >> 5;
    const int warp_m = warp % C.warps_m, warp_n = warp / C.warps_m;

    ptx::grid_dependency_wait();
    ptx::grid_dependency_launch();
    kernels::build_tile_list<C.block_n, kThreads>(list, args);
    const int32_t width = C.gated ? args.n / 2 : args.n;
    const int32_t m_tiles = (width + C.features() - 1) / C.features();
    const int32_t total = list.first_tile[args.experts] * m_tiles;
    const int32_t k_tiles = (args.k + C.block_k - 1) / C.block_k;

    Loader loader{args, list, ring, m_tiles, total, static_cast<int32_t>(blockIdx.x), k_tiles};
#pragma unroll
    for (int i = 0; i < C.stages - 1; ++i) loader.load_stage();

    Fragments fragments[C.buffers];
    int32_t slot = 0;
    if constexpr (C.buffers == 2) {
      ptx::cp_async_wait<C.stages - 2>();
      __syncthreads();
      fragments[0].load(ring, 0, warp_m, warp_n);
    }

    for (int32_t index = static_cast<int32_t>(blockIdx.x); index < total; index += static_cast<int32_t>(gridDim.x)) {
      const Tile t = kernels::find_tile<C.block_n>(list, args, index, m_tiles);
      Sums sums, promoted;
      if constexpr (kBlocks) {
        fill(promoted, kEmptyTotal);
      } else {
        fill(sums, 0);
      }
      int64_t scale_rows[kHalves];
      float factor[kNT][2];
      if constexpr (kBlocks) {
#pragma unroll
        for (int h = 0; h < kHalves; ++h) scale_rows[h] = block_row(args, t, warp_m, h);
        if constexpr (C.promotion == Promotion::block) {
#pragma unroll
          for (int nt = 0; nt < kNT; ++nt) {
#pragma unroll
            for (int j = 0; j < 2; ++j) {
              const int token = min(token_of(warp_n, nt, j), t.rows - 1);
              factor[nt][j] = args.row_factor != nullptr ? args.row_factor[t.row_begin + token] : 1.0f;
            }
          }
        }
      }
      PendingScales scales;
      WeightScales next;  // weight scales of the block in work: loaded at its last stage's start, needed after it
      int32_t block = 0, column_in_block = 0;

      for (int32_t k_tile = 0; k_tile < k_tiles; ++k_tile) {
        if constexpr (C.buffers == 1) {
          ptx::cp_async_wait<C.stages - 2>();
          __syncthreads();
          loader.load_stage();
        }
        const uint32_t stage = ring + static_cast<uint32_t>(slot) * C.stage_bytes();
        const auto* stage_scales =
            reinterpret_cast<const int32_t*>(shared + slot * C.stage_bytes() + (C.block_m + C.block_n) * C.block_k);
        slot = slot + 1 == C.stages ? 0 : slot + 1;
#pragma unroll
        for (int step = 0; step < kSteps; ++step) {
          const Fragments& now = fragments[step % C.buffers];
          if constexpr (C.buffers == 1) {
            fragments[0].load(stage, step, warp_m, warp_n);
          } else if (step < kSteps - 1) {
            fragments[(step + 1) % C.buffers].load(stage, step + 1, warp_m, warp_n);
          }
          const bool block_ends_here = C.fine_groups || step == kSteps - 1;
          const bool block_starts_here = C.fine_groups || step == 0;
          // The last block may be short: it ends with K.
          const bool at_end = k_tile == k_tiles - 1 && step == kSteps - 1;
          const int32_t after = at_end ? args.block_k : column_in_block + (C.fine_groups ? 32 : C.block_k);
          if constexpr (kBlocks) {
            if (block_starts_here && block < args.blocks_k) {
              next.load(args, scale_rows, block);
            }
          }
          // The first step of a block consumes the previous block's sums and scales.
          if (kBlocks && block_starts_here && column_in_block == 0) {
            if (block > 0 && block <= args.blocks_k) {
              mma_first<true>(promoted, sums, now, scales);
            } else {
              mma_first<false>(promoted, sums, now, scales);
            }
          }
          if (kBlocks && block_ends_here && after >= args.block_k) {
            // (all warps still hold the stage)
            scales.read_tokens(stage_scales + (C.fine_groups ? step * C.block_n : 0), warp_n, factor);
          }
          if constexpr (C.buffers == 2) {
            if (step == kSteps - 1) {
              // All warps have read this stage; the next one has arrived.
              ptx::cp_async_wait<C.stages - 2>();
              __syncthreads();
              fragments[(step + 1) % C.buffers].load(ring + static_cast<uint32_t>(slot) * C.stage_bytes(), 0, warp_m,
                                                     warp_n);
            }
            if (step == 0) loader.load_stage();
          }
          if (!(kBlocks && block_starts_here && column_in_block == 0)) mma(sums, now);
          if constexpr (kBlocks) {
            if (block_ends_here) {
              column_in_block = after;
              if (after >= args.block_k) {
#pragma unroll
                for (int h = 0; h < kHalves; ++h) scales.weight[h] = next.value[h];
                column_in_block = 0;
                ++block;
              }
            }
          }
        }
      }
      if constexpr (kBlocks) {
        if (block <= args.blocks_k) {  // otherwise the last one lay past K and all of it was zero
#pragma unroll
          for (int nt = 0; nt < kNT; ++nt) promote(promoted, sums, scales, nt);
        }
      }
      const Sums& result = kBlocks ? promoted : sums;
      if constexpr (C.epilogue == Epilogue::activate) {
        kernels::with_activation(args, [&](const auto& act) { finish_tile(args, t, result, warp_m, warp_n, act); });
      } else {
        finish_tile(args, t, result, warp_m, warp_n, 0);
      }
    }
    ptx::cp_async_wait<0>();
  }
};

template <GemmConfig C>
__device__ __forceinline__ void grouped_gemm(const GemmArgs& args) {
  GroupedGemm<C>::run(args);
}

}  // namespace octomoe::sm80
