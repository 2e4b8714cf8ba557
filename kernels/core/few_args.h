// Arguments of the kernels for few tokens (sm90/few_tokens.cuh): at most kFewTokens tokens with kFewRoutes routes,
// swiglu. Shared by host and device, as is where things lie in their shared memory.
#pragma once

#include "core/gemm_config.h"

namespace octomoe::kernels {

inline constexpr int kFewTokens = 8, kFewRoutes = 64;
// A multiprocessor is to hold one CTA of either kernel, not two of one, so that `down` loads weights beside the end of
// gate_up: of its four register files of 512 registers a lane, each holds four warps of 65 to 72 and four of 56, but
// not eight of 65; two of `down` have no room in shared memory.
inline constexpr int kFewGateUpWarps = 15, kFewDownWarps = 16;  // that multiply; gate_up has one more, which copies
inline constexpr int kFewGateUpThreads = 32 * (kFewGateUpWarps + 1), kFewDownThreads = 32 * kFewDownWarps;
inline constexpr int kFewGateUpRegisters = 72, kFewDownRegisters = 56;  // at most
// Of down's ring: enough to keep the memory busy while gate_up ends and h is quantised; more gains nothing.
inline constexpr int kFewRingBytes = 112 * 1024;
inline constexpr int kFewDownMinSharedBytes = 115 * 1024;
inline constexpr int kFewHeaderBytes = 6144;  // shared memory before anything whose size depends on the shape
inline constexpr int kFewMaxHidden = 8192;
inline constexpr int kFewGateUpSharedBytes = 111 * 1024;  // at most: what `down` leaves
// What a multiprocessor gives is whole ones of these: what both kernels ask for has to fit as that.
inline constexpr int kFewSharedUnit = 128;
constexpr int few_shared(int bytes) { return (bytes + kFewSharedUnit - 1) / kFewSharedUnit * kFewSharedUnit; }
// Of the gate rows in a stage of gate_up's ring, and of the up rows: no more than this, or one row. In panels more,
// since a copy has 128 bytes of each row only, and its size decides.
inline constexpr int kFewGateUpStageBytes = 8192, kFewGateUpPanelStageBytes = 24576;
// What a CTA of gate_up has not asked for when it lets `down` start, whose first copies follow its last ones then.
inline constexpr int kFewEarlyBytes = 64 * 1024;
// Of its part of w2 that a CTA of gate_up fetches into L2 for `down` (few_gate_up.cuh), at most.
inline constexpr int kFewFetchBytes = 192 * 1024;
inline constexpr int kFewMaxStages = 24;
inline constexpr int kFewManyStages = 6;  // of gate_up: one more than its copies need
// In panels, with fewer pairs in a stage, copies are so short that other kernels are faster.
inline constexpr int kFewMinPanelPairs = 4;
// Columns of out that lie in one stage of down's ring, no more than all warps multiply and no more than this many
// bytes. Where two such stages have no room, fewer, but no fewer than the last, since most warps would rest.
inline constexpr int kFewMaxStageBytes = 49152, kFewMaxStageColumns = 32 / 8 * kFewDownWarps, kFewMinStageColumns = 12;

// A row of x in shared memory ends with zeros up to a multiple of what a warp multiplies at once.
inline constexpr int kFewUnit = 1024;
constexpr int few_x_stride(int hidden) { return (hidden + kFewUnit - 1) / kFewUnit * kFewUnit; }

// So many lanes multiply a column in down: how many warps work on a stage, and on how many stages at once.
constexpr int few_stream_warps(int stage_columns, int lanes) { return (stage_columns * lanes + 31) / 32; }
constexpr int few_streams(int stage_columns, int lanes, int stages) {
  const int all = kFewDownWarps / few_stream_warps(stage_columns, lanes), most = all < stages ? all : stages;
  // With one slot each, nothing is under way to a stream while it multiplies: then rather three quarters of the streams
  // with two, if there are as many.
  const int fewer = most - most / 4;
  return stages < 2 * most && stages >= 2 * fewer ? fewer : most;  // stages may be 0
}

// 2^31 / divisor, rounded up: the upper half of its product with 2n is n / divisor while n * divisor < 2^31.
constexpr uint32_t few_inverse(int divisor) {
  return static_cast<uint32_t>((uint64_t{1} << 31) / static_cast<uint32_t>(divisor) + 1);
}

// One of the two matrices of every expert.
struct FewMatrix {
  const int8_t* w;            // [E, n, k], or in panels: [E, k/128, n, 128]
  const float* scale;         // channel: [E, n] (per_tensor: [E]); block: [E, NB, KB]; hybrid: [E, NB, SG]
  const float* bias;          // [E, n] or null
  const int32_t* column_sum;  // asymmetric: [E, n]; null: symmetric
  const float* static_scale;  // or null
  const uint8_t* q;           // hybrid: [E, NB, KB], 4-byte aligned
  int32_t n, k, per_tensor;
  int32_t w_row, w_panel;                    // as in GemmArgs
  int32_t block_n, block_k;                  // scale blocks: weight rows; columns, 128 or 256
  uint32_t block_n_inverse;                  // few_inverse(block_n)
  int32_t blocks_n, blocks_k, super_groups;  // NB, KB, SG
  int32_t super_group, flush_blocks, q_max;  // hybrid: as in GemmArgs
};

// Columns that are summed up before any scale is applied: a scale block is one or two of them.
inline constexpr int kFewPiece = 128;
// Lanes of down for each column. With sums per K-block they have pieces: where two of eight would rest, four do it.
constexpr int few_column_lanes(Promotion p, int k) { return p == Promotion::channel || k > 6 * kFewPiece ? 8 : 4; }

// With sums per K-block: of each warp, what its lanes know of a piece, for those that add up (FewTerm).
inline constexpr int kFewTermsBytes = 32 * 8;

// Dynamic shared memory of gate_up, offsets: the header, the ring, x's quantised rows, then (not with
// Promotion::channel) their scales, those of the scale blocks that a CTA's columns meet, and each warp's terms. The
// host makes it, so that kernels have all of it as constants.
struct FewGateUpLayout {
  int32_t rows, terms, a, w, bytes;
  int32_t stage_pairs, stages;  // pairs of a gate and an up row in a stage of the ring: gate rows, then up rows
  int32_t w_row, w_panel;       // of a stage's gate or up rows in the ring, as in GemmArgs
  // Words of the scales of a row of x: s_a; hybrid: F_a, then Q_a. Of a block of weight rows: s_w; hybrid: F_w, then
  // the words that hold Q_w.
  int32_t a_words, w_words;
  int32_t half_blocks;                            // scale blocks of gate, or up
  uint32_t w_words_inverse, half_blocks_inverse;  // few_inverse
};
// Of down: the header, the ring, h's quantised rows, each warp's terms, the scales of the CTA's weight rows for each
// entry (channel: of each column), y, the scales of h's rows and the largest magnitude of each of their K-blocks.
struct FewDownLayout {
  int32_t rows, terms, w, y, a, top, bytes;
  int32_t a_words, w_words;  // as in FewGateUpLayout
  int32_t blocks;            // scale blocks that a CTA's columns meet at most
  int32_t stream_warps, streams;
  int32_t w_row, w_panel;  // of a stage's weights in the ring, as in GemmArgs
};

constexpr int few_min(int a, int b) { return a < b ? a : b; }
constexpr int few_max(int a, int b) { return a > b ? a : b; }
constexpr int few_a_words(Promotion p, const FewMatrix& m) {
  return p == Promotion::channel ? 0 : p == Promotion::block ? m.blocks_k : m.super_groups + m.blocks_k;
}
constexpr int few_w_words(Promotion p, const FewMatrix& m) {
  return p == Promotion::channel ? 0 : p == Promotion::block ? m.blocks_k : m.super_groups + (m.blocks_k + 6) / 4;
}
// most_bytes: that it may have; stages < 2: they do not suffice.
constexpr FewGateUpLayout few_gate_up_layout(Promotion p, const FewMatrix& w13, int tokens, int top_k, int ctas,
                                             int most_bytes = kFewGateUpSharedBytes) {
  FewGateUpLayout l{};
  const int x_bytes = tokens * few_x_stride(w13.k);
  int a_bytes = 0, w_bytes = 0, terms_bytes = 0;
  if (p != Promotion::channel) {
    l.a_words = few_a_words(p, w13);
    l.w_words = few_w_words(p, w13);
    l.half_blocks = w13.blocks_n / 2;
    l.w_words_inverse = few_inverse(l.w_words);
    l.half_blocks_inverse = few_inverse(l.half_blocks);
    // Scale blocks that a CTA's columns meet: an expert's last one may be short, and both ends lie inside of one.
    const int width = w13.n / 2, columns = (tokens * top_k * width + ctas - 1) / ctas;
    const int blocks = columns * l.half_blocks / width + 3;
    a_bytes = tokens * l.a_words * 4;
    w_bytes = blocks * 2 * l.w_words * 4;
    terms_bytes = kFewGateUpWarps * kFewTermsBytes;
  }
  const int beside = kFewHeaderBytes + x_bytes + terms_bytes + a_bytes + w_bytes;
  const bool panels = w13.w_panel != kFewPiece;
  const int pairs = (panels ? kFewGateUpPanelStageBytes : kFewGateUpStageBytes) / w13.k;
  const int of_two_stages = (most_bytes - beside) / 2 / (2 * w13.k);
  l.stage_pairs = few_max(few_min(few_min(pairs, of_two_stages), kFewGateUpWarps), 1);
  l.w_row = w13.w_row;
  l.w_panel = panels ? l.stage_pairs * kFewPiece : kFewPiece;
  const int stage = 2 * l.stage_pairs * w13.k;
  l.stages = few_min((most_bytes - beside) / stage, kFewMaxStages);
  l.rows = kFewHeaderBytes + l.stages * stage;
  l.terms = l.rows + x_bytes;
  l.a = l.terms + terms_bytes;
  l.w = l.a + a_bytes;
  l.bytes = few_shared(l.w + w_bytes);
  return l;
}
constexpr FewDownLayout few_down_layout(Promotion p, const FewMatrix& w2, int routes, int columns, int stage_columns,
                                        int stages) {
  FewDownLayout l{};
  const int lanes = few_column_lanes(p, w2.k);
  l.stream_warps = few_stream_warps(stage_columns, lanes);
  l.streams = few_streams(stage_columns, lanes, stages);
  l.w_row = w2.w_row;
  l.w_panel = w2.w_panel == kFewPiece ? kFewPiece : stage_columns * kFewPiece;
  l.a_words = few_a_words(p, w2);
  l.w_words = few_w_words(p, w2);
  l.blocks = p == Promotion::channel ? 0 : (columns - 1) / w2.block_n + 2;
  l.rows = kFewHeaderBytes + stages * stage_columns * w2.k;
  l.terms = l.rows + routes * w2.k;
  l.w = l.terms + (p == Promotion::channel ? 0 : kFewDownWarps * kFewTermsBytes);
  l.y = l.w + routes * (p == Promotion::channel ? columns : l.blocks * l.w_words) * 4;
  l.a = l.y + routes * columns * 4;
  l.top = l.a + routes * l.a_words * 4;
  l.bytes = few_shared(l.top + (p == Promotion::channel ? 0 : routes * w2.blocks_k * 4));
  return l;
}

struct FewGateUpArgs {
  Routes routes;
  FewMatrix w13;
  RowView x;    // [T, H]
  uint16_t* h;  // [T * k, I] bf16, by route
  int32_t up_first;
  float limit;  // +Inf: none
  FewGateUpLayout layout;
  // What `down` begins with: as in FewDownArgs.
  FewMatrix w2;
  int32_t columns, stage_columns;
};

struct FewDownArgs {
  Routes routes;
  FewMatrix w2;
  const uint16_t* h;  // [T * k, I] bf16
  void* out;          // [T, H]
  int64_t out_stride;
  OutType out_type;
  int32_t accumulate;
  int32_t columns;        // of out that a CTA computes
  int32_t stage_columns;  // of them in a stage of the ring: at most kFewDownWarps
  int32_t stages;         // at most kFewMaxStages; a multiple of few_streams
  FewDownLayout layout;
};

}  // namespace octomoe::kernels
