// The arguments of every kernel but the GEMMs (core/gemm_config.h). Shared by host and device: plain structs.
#pragma once

#include "core/types.h"

namespace octomoe::kernels {

enum class OutType : int { bf16, fp16, f32 };
enum class RowType : int { f32, fp16, bf16 };  // octomoe::DType's order

// Values of octomoe::Activation.
enum class Act : int { swiglu, geglu_tanh, geglu_erf, swigluoai, silu, gelu_tanh, gelu_erf, relu, relu2, none };

// Rows of floating-point values in any of the three types.
struct RowView {
  const void* data;
  int64_t stride;  // elements between rows
  RowType type;
  int32_t aligned;  // every row begins at a multiple of 16 bytes
};

// Behind offsets: GemmArgs::taken of the GEMMs that go by them.
inline constexpr int kTakenWords = 2;

// A call's tokens and the experts that they go to.
struct Routes {
  const void* topk_ids;  // [T, k] int32 or int64, row stride in elements
  int64_t ids_stride;
  int32_t ids_are_64;
  int32_t tokens, top_k;
  const int32_t* expert_map;  // global -> local, or null
  int32_t id_limit;           // ids outside [0, id_limit) count as -1
  const float* topk_weights;  // [T, k], row stride in elements
  int64_t weights_stride;
  int32_t weight_on_input;  // the router weight multiplies x, not y
};

// Up to so many routes a GEMM counts its experts' rows itself (WgmmaArgs::routes).
inline constexpr int kCountedRoutes = 8192;

inline constexpr int kSortThreads = 256, kSortChunk = 2048;  // a CTA's threads and routes
// sm90/sort.cuh
inline constexpr int kSortCluster = 8, kClusterSortThreads = 1024, kClusterSortRoutes = 65536;
constexpr int cluster_sort_bytes(int experts) { return (kClusterSortThreads / 32 + 2) * experts * 4; }

struct SortArgs {
  Routes routes;
  int32_t experts;
  int32_t* expert_offsets;  // [E + 1], and kTakenWords zeros
  int32_t* row_token;       // [R] row -> token
  int32_t* route_row;       // [T * k] -> row, -1 = skipped
  float* row_factor;        // [R] each row's router weight; or null
  int32_t* token_offsets;   // [2] = 0, T: the rows of a shared expert, and kTakenWords zeros; or null
  int32_t chunks;           // of kSortChunk routes
  int32_t* chunk_counts;    // [chunks, E]; one chunk, or sm90/sort.cuh: unused
};

struct QuantizeArgs {
  RowView x;                 // [rows, K]
  int32_t rows;              // upper bound; with row_count the device knows how many
  const int32_t* row_count;  // null: rows; not a matter of the launch before
  int32_t k;                 // a multiple of 16
  int8_t* q;                 // [rows, K]
  float* scale;              // [rows]; block: [KB, rows_total]; hybrid F: [SG, rows_total]
  int32_t* zero;             // asymmetric: [rows]
  int32_t* block_q;          // hybrid: [KB, rows_total]
  int64_t rows_total;        // leading dimension of scale and block_q
  const float* static_scale;
  int32_t block_k, super_group, q_max;
  // Among the launches of a stream (SM90): beside_last: neither x nor what is written here is a matter of the launch
  // before, which is waited for only at the end. next_early: the launch that follows may begin at once, because until
  // its own wait it needs nothing of launches that may still run.
  int32_t beside_last, next_early;
  // Nobody reads x again, whose rows are whole lines of 128 bytes (k and the stride multiples of 64): it need not reach
  // memory.
  int32_t read_once;
  // Rows of as many, of clear_bytes each, to which a GEMM is to add (GemmArgs::adds): they become zeros. 16-byte
  // aligned; null: none.
  uint8_t* clear;
  int64_t clear_stride;  // bytes between them
  int32_t clear_bytes;   // a multiple of 16
};

struct PanelArgs {
  const int8_t* from;  // [E, N, K], 16-byte aligned, K a multiple of 128
  int8_t* to;          // [E, K/128, N, 128], 16-byte aligned
  int64_t rows;        // E * N
  int32_t n, k;
};

struct ActivateArgs {
  const float* v;            // [R, 2I] or [R, I]
  uint16_t* h;               // [R, I] bf16
  const int32_t* row_count;  // on the device
  int32_t rows;              // upper bound
  int32_t width;             // I, a multiple of 16
  int32_t gated, up_first;
  Act act;
  float alpha, limit;  // swigluoai, swiglu; limit = +Inf: none
};

struct CombineArgs {
  const uint16_t* y;  // [R, H] bf16
  // Neither is a matter of the launch before.
  const int32_t* route_row;   // [T, k], -1 = skipped
  const float* topk_weights;  // [T, k], row stride in elements; null: 1 each
  int64_t weights_stride;
  const uint16_t* shared_y;    // [T, H] bf16 or null
  const float* shared_weight;  // [T] or null: 1
  void* out;                   // [T, H]
  int64_t out_stride;
  OutType out_type;
  int32_t out_aligned;  // every row of out begins at a multiple of 16 bytes
  int32_t accumulate;
  int32_t tokens, top_k, hidden;
  int32_t read_once;  // nobody reads y again, whose rows begin at multiples of 128 bytes; hidden a multiple of 256
};

// sigmoid(x . gate) of every token: the shared expert's weight.
struct SharedGateArgs {
  RowView x;          // [T, H]
  const float* gate;  // [H]
  float* weight;      // [T]
  int32_t tokens, hidden;
};

// A caller's offsets or counts, int32 or int64, made int32 and safe: within the rows there are, not decreasing.
struct GroupIndexArgs {
  const void* index;  // offsets [E + 1]; masked: counts [E]
  int32_t is_64, masked;
  int32_t experts;
  int32_t rows;      // of a; masked: rows of an expert
  int32_t* offsets;  // [E + 1], masked: counts [E] and a word; and kTakenWords zeros
};

// A caller's row scales [rows, columns] -> [columns, rows], as GEMMs read them; bytes become int32.
struct TransposeScalesArgs {
  const float* scale;  // [rows, columns] or null
  const uint8_t* q;    // [rows, q_columns] or null
  float* scale_out;    // [columns, rows]
  int32_t* q_out;      // [q_columns, rows]
  int64_t rows;
  int32_t columns, q_columns;
  int32_t broadcast;  // scale holds one value for all rows
};

// Quantised tokens copied to row order: what a GEMM without a gather reads.
struct GatherRowsArgs {
  const int8_t* q;           // [T, K]
  const float* scale;        // [columns, T] or null
  const int32_t* block_q;    // [q_columns, T] or null
  const int32_t* zero;       // [T] or null
  const int32_t* row_token;  // [R]
  const int32_t* row_count;
  int8_t* q_out;         // [R, K]
  float* scale_out;      // [columns, rows]
  int32_t* block_q_out;  // [q_columns, rows]
  int32_t* zero_out;     // [R]
  int64_t tokens;
  int32_t rows, k, columns, q_columns;
};

enum class Scoring : int { softmax, sigmoid };           // octomoe::Scoring's order
enum class Renormalize : int { none, divide, add_eps };  // octomoe::Renormalize's order

struct RouteArgs {
  RowView logits;  // [T, E]
  float* weights;  // [T, k], row strides in elements
  int32_t* ids;
  int64_t weights_stride, ids_stride;
  const float* bias;  // [E] or null
  int32_t tokens, experts, top_k, groups, topk_groups;
  Scoring scoring;
  Renormalize renormalize;
  float renormalize_min, scaling_factor;
};

// What a GPU can do at most, measured by kernels that do nothing else (kernels/bench/ceilings.cuh).
struct CeilingArgs {
  const void* data;    // read: 16-byte aligned
  int64_t bytes;       // read: a multiple of 16
  int32_t iterations;  // multiply: of 16 mma each; clock: of a short loop
  uint32_t* sink;      // written only by a result that does not occur
  uint64_t* clock;     // clock: cycles and nanoseconds that the loop took
};

}  // namespace octomoe::kernels
