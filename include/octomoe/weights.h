// MoeWeights: the quantised weights of one MoE layer, and how to make them.
#pragma once

#include <cstdint>
#include <functional>
#include <optional>
#include <string>

#include "octomoe/export.h"
#include "octomoe/scheme.h"
#include "octomoe/tensor.h"

namespace octomoe OCTOMOE_API {

// How the values of an integer matrix lie.
enum class WeightLayout : std::uint8_t {
  natural,  // int8 [E, N, K]
  panels,   // int8 [E, K/128, N, 128]: columns 128p ... 128p + 127 of all rows of an expert lie together
};
inline constexpr std::int64_t kPanelColumns = 128;

// E matrices [N, K], K-major, in one scheme. `values`:
//   int8_*    int8 by `layout`        w4a8_fp8  int4x2 [E, N, K/2]       bf16/fp16  [E, N, K]
// `scale`, float32:
//   int8_channel  [E, N], per_tensor [E]      int8_block  [E, NB, KB]     int8_hybrid (F) [E, NB, SG]
//   w4a8_fp8      [E, N, ceil(K/group)]       bf16/fp16   undefined
// with NB = segments * ceil((N/segments)/block_n), KB = ceil(K/block_k), SG = ceil(KB/super_group).
struct QuantizedMatrix {
  Scheme scheme;
  std::int64_t experts = 0, n = 0, k = 0;
  int segments = 1;  // 2 for a gated w13: scale blocks restart at row N/2
  WeightLayout layout = WeightLayout::natural;
  Tensor values;
  Tensor scale;
  Tensor q;                 // int8_hybrid: uint8 [E, NB, KB], integer scales 1..q_max
  Tensor column_sum;        // asymmetric: int32 [E, N] = sum over k of w
  Tensor activation_scale;  // static: float32 [1] (int8_channel) or [E] (w4a8_fp8) of the matrix's input
  int flush_blocks = 0;     // int8_hybrid: K-blocks summed in int32 before a float step (docs/schemes.md 5)

  std::int64_t blocks_n() const;      // NB
  std::int64_t blocks_k() const;      // KB
  std::int64_t super_groups() const;  // SG
  std::int64_t block_of_row(std::int64_t row) const;
  std::size_t bytes() const;  // values and scales
};

struct WeightOptions {
  Activation activation = Activation::swiglu;
  GateUpOrder gate_up_order = GateUpOrder::gate_up;
  TensorView b13, b2;  // optional biases, float32, float16 or bfloat16 [E, N]
  // A scheme with static activation scales needs them: of x and of act, float32 [1] (int8_channel) or [E] (w4a8_fp8).
  TensorView x_scale, act_scale;
  int threads = 0;  // 0 = all
};
using QuantizeOptions = WeightOptions;

struct MoeWeights {
  Scheme scheme;
  Activation activation = Activation::swiglu;
  GateUpOrder gate_up_order = GateUpOrder::gate_up;
  QuantizedMatrix w13;  // [E, 2I, H] (gated) or [E, I, H]
  QuantizedMatrix w2;   // [E, H, I]
  Tensor b13, b2;       // optional biases, float32 [E, N]

  std::int64_t experts() const { return w2.experts; }
  std::int64_t hidden() const { return w2.n; }
  std::int64_t intermediate() const { return w2.k; }
  std::size_t bytes() const { return w13.bytes() + w2.bytes() + b13.bytes() + b2.bytes(); }

  using Options = WeightOptions;

  // Adopt integers and scales that a checkpoint or an engine holds. Values are used where they lie (kept alive by the
  // Tensor), scales become float32. Every scale must be finite and at least 0. Error names the argument.
  static MoeWeights from_int8_channel(Tensor w13, TensorView w13_scale, Tensor w2, TensorView w2_scale,
                                      const Options& options = {}, const Scheme& scheme = Scheme::int8_channel());
  static MoeWeights from_int8_block(Tensor w13, TensorView w13_scale, Tensor w2, TensorView w2_scale,
                                    const Options& options = {}, const Scheme& scheme = Scheme::int8_block());
  static MoeWeights from_w4a8_fp8(Tensor w13, TensorView w13_scale, Tensor w2, TensorView w2_scale,
                                  const Options& options = {}, const Scheme& scheme = Scheme::w4a8_fp8());
  // w13_q, w2_q: the integer scales, uint8 [E, NB, KB]; *_scale: F, [E, NB, SG].
  static MoeWeights from_int8_hybrid(Tensor w13, TensorView w13_scale, TensorView w13_q, Tensor w2, TensorView w2_scale,
                                     TensorView w2_q, const Options& options = {},
                                     const Scheme& scheme = Scheme::int8_hybrid());
  // bfloat16 or float16 weights as they are.
  static MoeWeights from_float(Tensor w13, Tensor w2, const Options& options = {});
};

// Quantise float32, float16 or bfloat16 weights w13 [E, 2I or I, H] and w2 [E, H, I] (CPU, rows contiguous) to
// `scheme`. Deterministic for any thread count. Error(invalid_argument) names expert and row of an Inf or NaN.
MoeWeights quantize(const Scheme& scheme, TensorView w13, TensorView w2, const QuantizeOptions& options = {});

// One matrix stack [E, N, K], for grouped_gemm and for streaming one expert at a time.
QuantizedMatrix quantize_matrix(const Scheme& scheme, TensorView w, int segments = 1, int threads = 0,
                                const std::string& name = "w");
// Adopts integers (or bf16/fp16 values) and scales of one matrix stack; q: int8_hybrid only. Error names `name`.
QuantizedMatrix adopt_matrix(const Scheme& scheme, Tensor values, TensorView scale = {}, TensorView q = {},
                             int segments = 1, const std::string& name = "w", int threads = 0);
// Completes and checks a matrix whose values, scale and q are set: column sums, overflow bound, flush_blocks.
void finish_matrix(QuantizedMatrix& m, const std::string& name, int threads = 0);

// float32 [E, N, K] that the quantised matrix stands for.
Tensor dequantize(const QuantizedMatrix& m, int threads = 0);

}  // namespace OCTOMOE_API
