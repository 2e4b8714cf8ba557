// calibrate: static activation scales of a layer from hidden states that were captured in front of it.
#pragma once

#include "octomoe/export.h"
#include "octomoe/layer.h"
#include "octomoe/scheme.h"
#include "octomoe/tensor.h"

namespace octomoe OCTOMOE_API {

// WeightOptions takes them under these names: float32 [1] (int8_channel) or [E] (w4a8_fp8).
struct ActivationScales {
  Tensor x_scale, act_scale;
};

struct CalibrateOptions {
  Activation activation = Activation::swiglu;
  GateUpOrder gate_up_order = GateUpOrder::gate_up;
  TensorView b13;           // optional, float32, float16 or bfloat16 [E, 2I or I]
  LayerOptions layer;       // swiglu_alpha, swiglu_limit and router_weight_on_input count
  TensorView topk_weights;  // float32 [T, k]: needed with router_weight_on_input
  int threads = 0;          // 0 = all
};

// Largest magnitude of x and of act over the rows that each expert sees, divided by 127 (int8_channel: one scale for
// all experts) or 448 (w4a8_fp8: one an expert; an expert without rows gets that of all experts together). act is
// computed in float32 from the unquantised w13 [E, 2I or I, H] and rounded to bf16, as a layer does.
// x [T, H] float32, float16 or bfloat16; topk_ids [T, k] int32 or int64, local experts, -1 = skipped. The result is the
// same for any instruction set and thread count. Error(invalid_argument) names the argument: a scheme that is not
// static, x that is not finite, no row at all.
ActivationScales calibrate(const Scheme& scheme, TensorView w13, TensorView x, TensorView topk_ids,
                           const CalibrateOptions& options = {});

}  // namespace OCTOMOE_API
