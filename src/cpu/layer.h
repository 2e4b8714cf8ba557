// The CPU engine of a layer. One forward is a few parallel loops over tokens, rows or tasks:
//
//   sort routes by expert -> quantise x -> GEMM1 + activation -> h -> quantise h -> GEMM2 -> y -> combine
//
// Tokens beyond kChunkRows routes go in chunks: the workspace stays bounded, and rows do not depend on each other.
#pragma once

#include <optional>

#include "base/thread_pool.h"
#include "cpu/gemm.h"
#include "cpu/isa.h"
#include "layer/backend.h"

namespace octomoe::cpu {

// The two matrices of an expert, routed or shared.
struct Expert {
  PackedMatrix w13, w2;
  ActivationStep activation;
};

class CpuLayer final : public LayerBackend {
 public:
  CpuLayer(MoeWeights weights, const LayerOptions& options);
  void reserve(std::int64_t max_tokens, int top_k) override;
  std::size_t workspace_bytes(std::int64_t tokens, int top_k) const override;
  void forward(const ForwardArgs& args) override;

 private:
  struct Plan;     // sizes of a chunk
  struct Buffers;  // the workspace, cut for a plan
  struct Chunk;    // arguments of a chunk
  Plan plan(std::int64_t tokens, int top_k) const;
  std::size_t carve(const Plan& plan, std::uint8_t* base, Buffers* buffers) const;

  void sort_routes(const Plan& plan, const Chunk& chunk, Buffers& b) const;
  void quantize_inputs(const Plan& plan, const Chunk& chunk, Buffers& b);
  void quantize_hidden(const Plan& plan, Buffers& b);
  void multiply(bool second, const Plan& plan, Buffers& b);
  void combine_tokens(const Plan& plan, const Chunk& chunk, Buffers& b);

  // The scales of x differ from one expert to another: it is quantised for each route instead of each token.
  bool per_route() const;
  // The shared expert reads the same quantised x.
  bool shares_input() const;
  std::int64_t routed_rows(const Plan& plan, const Buffers& b) const;

  std::int64_t hidden_;
  bool weight_on_input_;
  DType between_;  // of h and y
  Expert routed_;
  std::optional<Expert> shared_;
  std::vector<float> shared_gate_;
  Tensor expert_map_;
  MoeWeights kept_;  // keep_weights: the natural layout
  ThreadPool pool_;
  HugeBuffer workspace_;
};

}  // namespace octomoe::cpu
