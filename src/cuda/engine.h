// The CUDA engine: what layer/backend.h asks for, on one device.
#pragma once

#include <memory>

#include "layer/backend.h"

namespace octomoe::cuda {

std::unique_ptr<LayerBackend> make_layer(Device device, MoeWeights weights, const LayerOptions& options);
std::unique_ptr<MatrixBackend> make_matrix(Device device, QuantizedMatrix matrix, KernelFamily family, bool prepack);
void route(const TensorView& logits, const TensorView& topk_weights, const TensorView& topk_ids,
           const RouteOptions& options, Stream stream);

}  // namespace octomoe::cuda
