// What an engine implements. Arguments reach it checked (layer/check.h), so it only computes.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>

#include "octomoe/layer.h"

namespace octomoe {

struct ForwardArgs {
  TensorView x, topk_ids, topk_weights, out;
  bool accumulate = false;
  bool check_ids = false;
  TensorView workspace;
  Stream stream = nullptr;
};

class LayerBackend {
 public:
  virtual ~LayerBackend() = default;
  virtual void reserve(std::int64_t max_tokens, int top_k) = 0;
  virtual std::size_t workspace_bytes(std::int64_t tokens, int top_k) const = 0;
  virtual void forward(const ForwardArgs& args) = 0;
};

struct GemmArgs {
  Activations a;
  TensorView d;
  Groups groups;
  TensorView bias, workspace;
  Stream stream = nullptr;
};

class MatrixBackend {
 public:
  virtual ~MatrixBackend() = default;
  virtual std::size_t workspace_bytes(std::int64_t rows) const = 0;
  virtual void gemm(const GemmArgs& args) = 0;
};

namespace cpu {
// The weights are consumed: unless options.keep_weights, their natural layout is released once packed.
std::unique_ptr<LayerBackend> make_layer(MoeWeights weights, const LayerOptions& options);
std::unique_ptr<MatrixBackend> make_matrix(QuantizedMatrix matrix, int threads);
}  // namespace cpu

}  // namespace octomoe
