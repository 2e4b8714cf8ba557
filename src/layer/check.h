// Every check of the public calls, shared by all engines: nothing is computed or written before they pass.
#pragma once

#include "layer/backend.h"
#include "octomoe/layer.h"
#include "octomoe/weights.h"

namespace octomoe {

// The values lie on the CPU, or on `device`.
void check_matrix(const QuantizedMatrix& matrix, const char* name, Device device);
void check_layer(Device device, const MoeWeights& weights, const LayerOptions& options);

struct LayerShape {
  Device device;
  std::int64_t experts, hidden;
  std::int64_t id_limit;  // ids are below it: experts, or the size of the expert map
};
void check_forward(const LayerShape& layer, const ForwardArgs& args);

struct MatrixShape {
  Device device;
  Scheme scheme;
  std::int64_t experts, n, k;
  bool has_static_scale;
};
void check_gemm(const MatrixShape& matrix, const GemmArgs& args);

void check_route(const TensorView& logits, const TensorView& topk_weights, const TensorView& topk_ids,
                 const RouteOptions& options);

}  // namespace octomoe
