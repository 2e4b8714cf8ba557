// A random MoE layer to time: weights straight in their scheme (quantising gigabytes of random floats would take longer
// than timing them), activations, and routes of a given distribution. Deterministic in the seed for any thread count.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "octomoe/tensor.h"
#include "octomoe/weights.h"

namespace octomoe::cli {

struct ProblemShape {
  std::int64_t experts = 0;        // that the router knows
  std::int64_t experts_local = 0;  // that this layer holds: ids 0..experts_local-1; an expert map hides the others
  std::int64_t hidden = 0, intermediate = 0;
  int top_k = 0;

  double weight_bytes(const Scheme& scheme) const;  // of the local experts, values and scales
  Tensor expert_map() const;                        // for LayerOptions; undefined when every expert is local
};

// Gaussian values with the spread that quantising Gaussian weights gives, scales that keep outputs of order one.
MoeWeights random_weights(const Scheme& scheme, const ProblemShape& shape, std::uint64_t seed, int threads);

// One stack [E, N, K] of them.
QuantizedMatrix random_matrix(const Scheme& scheme, Shape shape, int segments, std::uint64_t seed, int threads);

// bf16 [rows, columns], standard normal.
Tensor random_activations(std::int64_t rows, std::int64_t columns, std::uint64_t seed);

// How tokens choose experts.
struct Routing {
  enum class Kind { uniform, zipf, single, from_file };
  Kind kind = Kind::uniform;
  double exponent = 1.0;  // zipf: the r-th most popular expert (a random one) has weight 1 / r^exponent
  std::string file;       // topk_ids [T, k] or router_logits [T, E], also as layers.L.router_logits

  static Routing parse(const std::string& text);  // uniform, zipf:S, single, from-file:F; UsageError
};

struct Routes {
  Tensor ids, weights;               // int32 (global ids, distinct within a token) and float32 (of sum 1) [T, k]
  std::int64_t local = 0;            // routes to local experts
  std::int64_t touched_experts = 0;  // local experts with at least one route

  void mark(std::vector<bool>& touched) const;  // sets those of the local experts that have a route
};
Routes make_routes(const Routing& routing, const ProblemShape& shape, std::int64_t tokens, std::uint64_t seed);

}  // namespace octomoe::cli
