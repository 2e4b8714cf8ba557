// GemmConfig: everything a grouped GEMM kernel is specialised by, and the arguments it takes. Shared by host and
// device. Never N, K, E, T or the number of SMs (docs/design.md).
#pragma once

#include "core/args.h"
#include "core/cache_hint.h"
#include "core/tensor_map.h"

namespace octomoe::kernels {

// How integer partial sums become v (docs/schemes.md section 3).
enum class Promotion : int {
  channel,       // one int32 sum over K (minus zero point times column sum), scale per weight row
  block,         // float step per K-block: fma(float(partial), s_w * s_a, v)
  hybrid,        // integer step per K-block: total += (Q_w * Q_a) * partial; one float step at the end
  hybrid_flush,  // the same with a float step per chunk, for weights whose int32 bound asks for it
};

// What happens to v.
enum class Epilogue : int {
  store,         // (+ bias) -> out [R, N]
  swiglu,        // (+ bias), gate and up -> h bf16 [R, I]; other activations: quant/activate_rows.cuh
  swiglu_block,  // the same, then h -> int8 with a scale per row and 128 columns, as quant/quantize_rows.cuh does
                 // (SM90)
  add,           // -> added to rows of out (GemmArgs::add_to), none of bias, row_factor and a_zero (SM90)
};
OCTOMOE_HD constexpr bool is_gated(Epilogue e) { return e == Epilogue::swiglu || e == Epilogue::swiglu_block; }

// The main loop's order inside a stage.
enum class Order : int {
  steps,  // k32 steps outside: fragments of one step at a time, sums of the whole warp tile in registers
  tiles,  // token tiles of 8 outside: the weight fragments of the whole stage in registers, partial sums of one tile
};

struct GemmConfig {
  Promotion promotion;
  Epilogue epilogue;
  int block_m;  // weight rows of a tile (swiglu: half of them gate, half up)
  int block_n;  // tokens of a tile
  int block_k;  // bytes of K a pipeline stage holds
  int stages;
  int warps_m, warps_n;  // those that multiply
  bool fine_groups;      // scale blocks of any multiple of 32 columns; otherwise of block_k
  int min_blocks;        // CTAs per SM that registers must allow
  Order order;

  OCTOMOE_HD constexpr bool gated() const { return is_gated(epilogue); }
  OCTOMOE_HD constexpr bool has_blocks() const { return promotion >= Promotion::block; }
  // Per stage and token: s_a (block) or Q_a (hybrid) of the K-blocks that the stage touches.
  OCTOMOE_HD constexpr int scales_per_stage() const { return !has_blocks() ? 0 : fine_groups ? block_k / 32 : 1; }
  // Besides those that multiply: registers are given to warps of a scheduler alike, and three of them get as many each
  // whether all four schedulers have three or one does.
  OCTOMOE_HD constexpr int copy_warps() const { return warps_m * warps_n / 2; }
  OCTOMOE_HD constexpr int threads() const { return (warps_m * warps_n + copy_warps()) * 32; }
  OCTOMOE_HD constexpr int warp_m() const { return block_m / warps_m; }
  OCTOMOE_HD constexpr int warp_n() const { return block_n / warps_n; }
  // Order::tiles: token tiles whose mma alternate, so that at least four chains of mma run side by side.
  OCTOMOE_HD constexpr int group() const { return warp_m() < 64 && warp_n() % 16 == 0 && warp_n() >= 32 ? 2 : 1; }
  // A tile is computed as wide as its rows need, in steps of so many tokens, two or one n8 tile a warp; one whose warps
  // have no more than that, or with fine groups, always whole.
  OCTOMOE_HD constexpr int step_n() const {
    if (fine_groups || warp_n() <= 16) return block_n;
    const bool pairs = warp_n() % 16 == 0 && (order == Order::steps || group() == 2);
    return (pairs ? 16 : 8) * warps_n;
  }
  OCTOMOE_HD constexpr int features() const { return gated() ? block_m / 2 : block_m; }  // output columns of a tile
  // 16 of them take 20 words (sm80/grouped_gemm.cuh, scale_place).
  OCTOMOE_HD constexpr int token_scale_bytes() const { return (block_n + 15) / 16 * 80; }
  OCTOMOE_HD constexpr int stage_bytes() const {
    const int scales =
        scales_per_stage() * token_scale_bytes() + (has_blocks() && order == Order::tiles ? block_m / 8 * 4 : 0);
    return (block_m + block_n) * block_k + (scales + 127) / 128 * 128;
  }
  // What the epilogue needs of a tile: where it lies, three words a token, a float a weight row.
  OCTOMOE_HD constexpr int table_bytes() const { return (16 + (3 * block_n + block_m) * 4 + 15) / 16 * 16; }
  // Scales of a chunk of K-blocks: a float a token and each 8 weight rows. Scale blocks of other widths load them.
  OCTOMOE_HD constexpr int chunk_bytes() const {
    return promotion == Promotion::hybrid_flush && !fine_groups ? (block_n + block_m / 8) * 4 : 0;
  }
  // Dynamic shared memory: the ring, tables and chunks' scales (copies can be as many of both ahead as there are
  // stages), barriers.
  OCTOMOE_HD constexpr int pipeline_bytes() const {
    return stages * (stage_bytes() + 16) + (stages + 1) * (table_bytes() + chunk_bytes());
  }
};

inline constexpr int kMaxExperts = 1024;

// The same for the wgmma kernels of SM90 with one sum over K (sm90/grouped_gemm.cuh): int8_channel. 128 weight rows a
// consumer by up to block_n tokens.
struct WgmmaConfig {
  Epilogue epilogue;  // all but swiglu_block
  int block_n;        // most tokens of a tile, a multiple of 16; a tile is computed as wide as its rows need
  int weight_stages;  // of each consumer's ring of weights
  int token_stages;   // of the ring of tokens, which the consumers share
  int cluster;        // 2: CTAs work in pairs on two token tiles of one expert and share the weights

  // Tiles of fewer tokens are computed so wide: for few rows an expert there are other kernels, and each width is code.
  OCTOMOE_HD constexpr int min_n() const { return block_n > 128 ? 96 : 16; }

  static constexpr int kBlockK = 128;
  static constexpr int kConsumers = 2;  // warpgroups
  static constexpr int kTokenBox = 16;  // rows of a box of the tokens' map
  OCTOMOE_HD constexpr int block_m() const { return 128 * kConsumers; }
  OCTOMOE_HD constexpr int threads() const { return 128 * (kConsumers + 2); }
  OCTOMOE_HD constexpr bool gated() const { return is_gated(epilogue); }
  OCTOMOE_HD constexpr bool adds() const { return epilogue == Epilogue::add; }
  OCTOMOE_HD constexpr int features() const { return gated() ? block_m() / 2 : block_m(); }  // output columns of a tile
  // Stages that a tile has at least, K being filled up with zeros: adding takes larger tables, of which tiles of one
  // stage would need six, and shared memory has room for four with 128 tokens.
  OCTOMOE_HD constexpr int least_stages() const { return adds() ? 2 : 1; }
  // Tiles whose tables may be in use at once. The producer writes one with a tile's first stage, before which the
  // consumers have left the stage token_stages back, and so finished all tiles before that stage's.
  OCTOMOE_HD constexpr int tables() const { return (token_stages + least_stages() - 1) / least_stages() + 1; }
  // The rings; tables: where a tile lies, the scales of its tokens and weight rows, and to add two words for each
  // token; the tile list; barriers and the next tile. Rounded up for what alignment takes.
  OCTOMOE_HD constexpr int pipeline_bytes() const {
    return (weight_stages * block_m() + token_stages * block_n) * kBlockK +
           tables() * (16 + ((adds() ? 3 : 1) * block_n + block_m()) * 4) + ((kMaxExperts + 1) * 8 + 128) +
           token_stages * 16 + weight_stages * 32 + 24 + 64;
  }
};

// The same for those with sums per K-block (sm90/token_major.cuh), whose M operand are tokens: tiles of 128 tokens,
// which two consumers share, by 128 or 256 weight rows.
struct TokenMajorConfig {
  Promotion promotion;
  Epilogue epilogue;
  int parts;         // of 128 weight rows, one after the other
  int stages;        // of the ring
  int block_stages;  // stages of a K-block of the scales

  static constexpr int kBlockK = 128, kBlockN = 128, kConsumers = 2;
  static constexpr int kTokenBox = 64;  // rows of a box of the tokens' map
  OCTOMOE_HD constexpr int block_m() const { return 128 * parts; }
  OCTOMOE_HD constexpr bool gated() const { return is_gated(epilogue); }
  OCTOMOE_HD constexpr bool adds() const { return epilogue == Epilogue::add; }
  OCTOMOE_HD constexpr bool quantizes() const { return epilogue == Epilogue::swiglu_block; }
  // Whether it can read scales by row (GemmArgs::scales_by_row): callers' own, which only grouped_gemm gets.
  OCTOMOE_HD constexpr bool by_row() const { return epilogue == Epilogue::store; }
  OCTOMOE_HD constexpr bool has_shifts() const { return by_row() && promotion != Promotion::block; }
  OCTOMOE_HD constexpr int features() const { return gated() ? block_m() / 2 : block_m(); }  // output columns of a tile
  // Boxes of weights a stage: gated, one of each half.
  OCTOMOE_HD constexpr int boxes() const { return gated() ? 2 : parts; }
  OCTOMOE_HD constexpr int box_rows() const { return block_m() / boxes(); }
  OCTOMOE_HD constexpr int threads() const { return 128 * (2 + kConsumers); }
  // The ring; per stage a scale of each token (has_shifts: and a shift) and two words of each of two scale blocks; for
  // each of stages + 1 tiles where it lies, a factor and a scale of its tokens, and the scale blocks, to add two words
  // for each token, and as many chunks' scales (hybrid_flush); the tile list; barriers and the next tile. Rounded up
  // for what alignment takes.
  OCTOMOE_HD constexpr int pipeline_bytes() const {
    return stages * ((block_m() + kBlockN) * kBlockK + ((has_shifts() ? 2 : 1) * kBlockN + 4) * 4) +
           (stages + 1) * (16 + (promotion == Promotion::hybrid ? 2 * kBlockN : kBlockN + 4) * 4 + 16) +
           (adds() ? (stages + 1) * 2 * kBlockN * 4 : 0) +
           (promotion == Promotion::hybrid_flush ? (stages + 1) * (kBlockN + 2) * 4 : 0) +
           ((kMaxExperts + 1) * 8 + 128) + stages * 16 + 24 + 64;
  }
};

struct GemmArgs {
  const int8_t* a;       // [rows of a, K]
  const int8_t* w;       // [E, N, K], or in panels: [E, K/128, N, 128]
  int64_t a_rows;        // rows of a: the leading dimension of the transposed scales
  const float* a_scale;  // channel: [rows of a]; block: [KB, rows of a]; hybrid: [SG, rows of a]
  const float* w_scale;  // channel: [E, N] (per_tensor: [E]); block: [E, NB, KB]; hybrid: [E, NB, SG]
  const int32_t* a_q;    // hybrid: [KB, rows of a]
  // sm90/token_major.cuh, as callers have them. block: a_scale is [rows of a, KB]; hybrid: a_scale is [rows of a, SG]
  // and a_q uint8 [rows of a, KB], 4-byte aligned, in whole words.
  int32_t scales_by_row;
  const uint8_t* w_q;             // hybrid: [E, NB, KB], 4-byte aligned
  const int32_t* a_zero;          // asymmetric: [rows of a]; null: symmetric
  const int32_t* column_sum;      // asymmetric: [E, N]
  const int32_t* expert_offsets;  // [E + 1]; masked: rows used of each expert, [E]
  int32_t offsets_limit;          // they are a caller's, to be taken as at most so many rows; 0: as they are
  // How many tiles have been asked for, 0 before and after: CTAs take them as they get to them (some kernels only the
  // last ones, or none). null: every gridDim-th.
  int32_t* taken;
  const int32_t* row_source;  // row -> row of a; null: the row itself
  const float* row_factor;    // multiplies a's scales, indexed like rows; null: 1
  const float* bias;          // [E, N] or null
  void* out;                  // store: [R, N]; swiglu: h bf16 [R, I], swiglu_block: int8; 16-byte aligned rows
  int64_t out_stride;         // elements between rows of out
  OutType out_type;
  int32_t experts;
  int32_t n;                   // weight rows of an expert (gated: 2I)
  int32_t k;                   // bytes of a row, a multiple of 16
  int32_t w_row, w_panel;      // bytes from a row of w to the next, and from 128 columns of it to the next
  int32_t masked_rows;         // masked layout: rows per expert in a and out; 0 = offsets layout
  int32_t w_scale_per_tensor;  // channel: 1 = [E]
  int32_t block_n, block_k;    // scale blocks: weight rows, columns
  int32_t blocks_n, blocks_k;  // NB, KB
  int32_t segments;            // w's parts in which scale blocks restart: 2 for gate and up
  int32_t super_group;         // hybrid: K-blocks per float
  int32_t flush_blocks;        // hybrid: K-blocks per chunk
  int32_t up_first;            // gated: the first half of w is up
  float limit;                 // swiglu: clamps gate and up; +Inf: none
  int64_t out_rows;            // swiglu_block: the leading dimension of out_scale
  float* out_scale;            // [I / 128, rounded up, out_rows]
  uint64_t out_hint;           // SM90, bf16 and fp16 out: of its lines in L2 (core/cache_hint.h)
  // add, bf16 or fp16 out: row r times add_weight[r] (null: 1) is added to row add_to[r] (null: r), by L2, in whatever
  // order rows come.
  const int32_t* add_to;
  const float* add_weight;
};

struct WgmmaArgs {
  TensorMap weights;  // src/cuda/tensor_map.h
  GemmArgs gemm;
  int32_t evict_first;  // weights pass through L2: their lines are the first to go
  // Weights of two stages are asked for together: 256 bytes of a row, which is what L2 fetches of it.
  int32_t weights_in_pairs;
  int32_t tokens_by_map;  // gemm.row_source is null, and `tokens` is a's map
  // The launches before this kernel's may still be writing gemm.expert_offsets. Otherwise it reads them, and asks for
  // its first weights, before it waits for its predecessor; which it also does if it has the routes that the rows come
  // from, at most kCountedRoutes, and counts them itself. routes.topk_ids null: none. A caller's offsets
  // (offsets_limit) are read before the wait in any case: what they are then says which weights to ask for
  // (sm90/tiles.cuh, read_early), so that nobody may write the weights on the stream any more.
  int32_t offsets_late;
  Routes routes;
  TensorMap tokens;  // src/cuda/tensor_map.h
};

}  // namespace octomoe::kernels
