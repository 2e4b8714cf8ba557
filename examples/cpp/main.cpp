// Quantises random weights, builds a layer, routes and computes some tokens, and prints the error against bf16.
// How to build it: CMakeLists.txt.
#include <octomoe/octomoe.h>
#include <cmath>
#include <cstdio>
#include <random>
#include <utility>

using namespace octomoe;

Tensor random_tensor(Shape shape, float sigma, unsigned seed) {
  Tensor t = Tensor::empty(DType::float32, shape);
  std::mt19937 generator(seed);
  std::normal_distribution<float> normal(0.0f, sigma);
  for (std::int64_t i = 0; i < t.elems(); ++i) t.as<float>()[i] = normal(generator);
  return t;
}

int main() try {
  constexpr std::int64_t kTokens = 32, kExperts = 16, kHidden = 512, kIntermediate = 256;
  constexpr int kTopK = 4;
  const Tensor w13 = random_tensor({kExperts, 2 * kIntermediate, kHidden}, 1 / std::sqrt(float(kHidden)), 1);
  const Tensor w2 = random_tensor({kExperts, kHidden, kIntermediate}, 1 / std::sqrt(float(kIntermediate)), 2);
  const Tensor x = random_tensor({kTokens, kHidden}, 1.0f, 3);
  const Tensor logits = random_tensor({kTokens, kExperts}, 1.0f, 4);

  Tensor ids = Tensor::empty(DType::int32, {kTokens, kTopK}), weights = Tensor::empty(DType::float32, {kTokens, kTopK});
  route(logits, weights, ids, RouteOptions::qwen3());

  const auto compute = [&](const Scheme& scheme) {
    MoeLayer layer(Device::cpu(), quantize(scheme, w13, w2));
    layer.reserve(kTokens, kTopK);  // forward does not allocate after this
    Tensor out = Tensor::empty(DType::float32, {kTokens, kHidden});
    layer.forward(x, ids, weights, out);
    return std::pair(out, layer.weight_bytes());
  };
  const auto [expected, bf16_bytes] = compute(Scheme::bf16());
  for (const Scheme& scheme : all_schemes()) {
    const auto [out, bytes] = compute(scheme);
    double difference = 0, norm = 0;
    for (std::int64_t i = 0; i < out.elems(); ++i) {
      difference += std::pow(out.as<float>()[i] - expected.as<float>()[i], 2.0);
      norm += std::pow(expected.as<float>()[i], 2.0);
    }
    std::printf("%-13s %5.2f %% from bf16, weights %5.1f %%\n", to_string(scheme).c_str(),
                100 * std::sqrt(difference / norm), 100.0 * double(bytes) / double(bf16_bytes));
  }
  return 0;
} catch (const Error& e) {
  std::fprintf(stderr, "%s: %s\n", to_string(e.code()), e.what());
  return 1;
}
