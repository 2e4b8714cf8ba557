// The public calls: check -> engine.
#include "octomoe/layer.h"

#include <mutex>
#include <utility>

#include "cuda/engine.h"
#include "layer/backend.h"
#include "layer/check.h"
#include "tensor/check.h"

namespace octomoe {

struct MoeLayer::Impl {
  LayerShape shape;
  std::int64_t intermediate;
  Scheme scheme;
  std::size_t weight_bytes;
  std::unique_ptr<LayerBackend> backend;
  std::mutex mutex;
};

MoeLayer::MoeLayer(Device device, MoeWeights weights, LayerOptions options) {
  check_layer(device, weights, options);
  impl_ = std::make_unique<Impl>();
  const std::int64_t limit = options.expert_map.defined() ? options.expert_map.elems() : weights.experts();
  impl_->shape = {device, weights.experts(), weights.hidden(), limit};
  impl_->intermediate = weights.intermediate();
  impl_->scheme = weights.scheme;
  impl_->weight_bytes = weights.bytes() + (options.shared_expert ? options.shared_expert->bytes() : 0);
  impl_->backend = device.type == DeviceType::cpu ? cpu::make_layer(std::move(weights), options)
                                                  : cuda::make_layer(device, std::move(weights), options);
}
MoeLayer::~MoeLayer() = default;
MoeLayer::MoeLayer(MoeLayer&&) noexcept = default;
MoeLayer& MoeLayer::operator=(MoeLayer&&) noexcept = default;

namespace {

void check_capacity(std::int64_t tokens, int top_k, std::int64_t experts) {
  if (tokens < 0) bad_argument("tokens: expected at least 0, got {}", tokens);
  if (top_k < 1 || top_k > experts)
    bad_argument("top_k: expected 1..{} (the number of experts), got {}", experts, top_k);
}

}  // namespace

void MoeLayer::reserve(std::int64_t max_tokens, int top_k) {
  check_capacity(max_tokens, top_k, impl_->shape.id_limit);
  const std::lock_guard lock(impl_->mutex);
  impl_->backend->reserve(max_tokens, top_k);
}

std::size_t MoeLayer::workspace_bytes(std::int64_t tokens, int top_k) const {
  check_capacity(tokens, top_k, impl_->shape.id_limit);
  const std::lock_guard lock(impl_->mutex);  // backends remember what they chose last
  return impl_->backend->workspace_bytes(tokens, top_k);
}

void MoeLayer::forward(TensorView x, TensorView topk_ids, TensorView topk_weights, TensorView out,
                       const ForwardOptions& options, Stream stream) {
  const ForwardArgs args{x,     topk_ids, topk_weights, out, options.accumulate, options.check_ids, options.workspace,
                         stream};
  check_forward(impl_->shape, args);
  const std::lock_guard lock(impl_->mutex);
  impl_->backend->forward(args);
}

std::int64_t MoeLayer::experts() const { return impl_->shape.experts; }
std::int64_t MoeLayer::hidden() const { return impl_->shape.hidden; }
std::int64_t MoeLayer::intermediate() const { return impl_->intermediate; }
const Scheme& MoeLayer::scheme() const { return impl_->scheme; }
Device MoeLayer::device() const { return impl_->shape.device; }
std::size_t MoeLayer::weight_bytes() const { return impl_->weight_bytes; }

struct PreparedMatrix::Impl {
  MatrixShape shape;
  std::unique_ptr<MatrixBackend> backend;
  mutable std::mutex mutex;
};

CombineOrder parse_combine_order(const std::string& text) {
  if (text == "slots") return CombineOrder::slots;
  if (text == "any") return CombineOrder::any;
  bad_argument("combine_order: expected slots or any, got \"{}\"", text);
}

KernelFamily parse_kernel_family(const std::string& text) {
  if (text == "automatic") return KernelFamily::automatic;
  if (text == "sm80") return KernelFamily::sm80;
  if (text == "sm90") return KernelFamily::sm90;
  bad_argument("family: expected automatic, sm80 or sm90, got \"{}\"", text);
}

PreparedMatrix::PreparedMatrix(Device device, QuantizedMatrix matrix, int threads, KernelFamily family, bool prepack) {
  if (threads < 0 || threads > 1024) bad_argument("threads: expected 0..1024, got {}", threads);
  check_matrix(matrix, "b", device);
  impl_ = std::make_unique<Impl>();
  impl_->shape = {device, matrix.scheme, matrix.experts, matrix.n, matrix.k, matrix.activation_scale.defined()};
  impl_->backend = device.type == DeviceType::cpu ? cpu::make_matrix(std::move(matrix), threads)
                                                  : cuda::make_matrix(device, std::move(matrix), family, prepack);
}
PreparedMatrix::~PreparedMatrix() = default;
PreparedMatrix::PreparedMatrix(PreparedMatrix&&) noexcept = default;
PreparedMatrix& PreparedMatrix::operator=(PreparedMatrix&&) noexcept = default;

std::size_t PreparedMatrix::workspace_bytes(std::int64_t rows) const {
  if (rows < 0) bad_argument("rows: expected at least 0, got {}", rows);
  const std::lock_guard lock(impl_->mutex);
  return impl_->backend->workspace_bytes(rows);
}

void grouped_gemm(const Activations& a, const PreparedMatrix& b, TensorView d, const Groups& groups,
                  const GemmOptions& options, Stream stream) {
  const GemmArgs args{a, d, groups, options.bias, options.workspace, stream};
  check_gemm(b.impl().shape, args);
  const std::lock_guard lock(b.impl().mutex);
  b.impl().backend->gemm(args);
}

}  // namespace octomoe
