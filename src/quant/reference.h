// The judge of every engine: docs/schemes.md as plain loops over one row at a time, slow and meant to be checked by
// eye. Arguments are taken as checked.
#pragma once

#include <cstdint>
#include <vector>

#include "octomoe/layer.h"
#include "octomoe/weights.h"

namespace octomoe::reference {

// A quantised activation row. Groups: K-blocks (block, hybrid) or one for the whole row.
struct Row {
  std::vector<std::int8_t> q;       // integer schemes
  std::vector<float> value;         // float schemes: the value that enters the product (E4M3, bf16 or fp16 as float)
  std::vector<float> scale;         // s_a per row, per K-block (block) or F per super group (hybrid)
  std::vector<std::int32_t> block;  // hybrid: Q per K-block
  std::int32_t zero = 0;            // asymmetric
};

// x: k float values. static_scale: used if the scheme is static.
Row quantize_row(const Scheme& scheme, const float* x, std::int64_t k, float static_scale);

// v[n] = a . w[expert, n] without bias, for all n. `factor` multiplies the row's scales (integer schemes) or the
// result.
void product(const QuantizedMatrix& m, std::int64_t expert, const Row& a, float factor, float* v);

// The activation of one gate (g) and up (u) value; u counts only if `kind` is gated.
float activate(Activation kind, float g, float u, const LayerOptions& options);

// Whole layer; x, ids, weights, out as MoeLayer::forward takes them.
void moe_forward(const MoeWeights& weights, const LayerOptions& options, TensorView x, TensorView topk_ids,
                 TensorView topk_weights, TensorView out, bool accumulate = false);

void grouped_gemm(const QuantizedMatrix& b, const Activations& a, TensorView d, const Groups& groups,
                  TensorView bias = {});

// The same layer on unquantised weights in float64, nothing rounded in between: out [T, H] float64, row after row.
// w13, w2: float32, fp16 or bf16 [E, N, K]; shared_w13/w2 likewise, E = 1.
struct FloatWeights {
  TensorView w13, w2, b13, b2;
  Activation activation = Activation::swiglu;
  GateUpOrder gate_up_order = GateUpOrder::gate_up;
};
std::vector<double> moe_forward_float64(const FloatWeights& weights, const LayerOptions& options,
                                        const FloatWeights* shared, TensorView x, TensorView topk_ids,
                                        TensorView topk_weights);

// ||a - b|| / ||b|| in float64 over the finite values of b; Inf if a differs where b is Inf or NaN.
// a: float32/fp16/bf16 tensor [T, H].
double relative_error(TensorView a, const std::vector<double>& b);
double relative_error(TensorView a, TensorView b);

// One value of a float32, fp16 or bf16 tensor at a byte address, and back.
float load(const void* p, DType dtype);
void store(void* p, DType dtype, float v);  // nearest even, canonical NaN

}  // namespace octomoe::reference
