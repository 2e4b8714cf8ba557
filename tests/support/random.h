// Data for tests: seeded, of several shapes of difficulty.
#pragma once

#include <cmath>
#include <cstdint>
#include <random>
#include <vector>

#include "octomoe/tensor.h"
#include "quant/reference.h"

namespace octomoe::testing {

// Normal values; every 17th row is 100 times larger and every 13th column 30 times, so that scales differ between
// groups.
inline Tensor random_tensor(DType dtype, Shape shape, std::uint32_t seed, float amplitude = 1.0f) {
  Tensor t = Tensor::empty(dtype, shape);
  std::mt19937 rng(seed);
  std::normal_distribution<float> normal(0.0f, amplitude);
  const std::int64_t columns = shape.rank() > 0 ? shape[shape.rank() - 1] : 1;
  for (std::int64_t i = 0; i < t.elems(); ++i) {
    float v = normal(rng);
    if (i / columns % 17 == 3) v *= 100.0f;
    if (i % columns / 8 % 13 == 5) v *= 30.0f;
    reference::store(t.as<char>() + i * static_cast<std::int64_t>(size_bytes(dtype)), dtype, v);
  }
  return t;
}

inline Tensor random_int8(Shape shape, std::uint32_t seed, int lo = -127, int hi = 127) {
  Tensor t = Tensor::empty(DType::int8, shape);
  std::mt19937 rng(seed);
  std::uniform_int_distribution<int> any(lo, hi);
  for (std::int64_t i = 0; i < t.elems(); ++i) t.as<std::int8_t>()[i] = static_cast<std::int8_t>(any(rng));
  return t;
}

// k distinct experts a token; with `holes`, about one id in eight is -1.
inline Tensor random_ids(std::int64_t tokens, int k, std::int64_t experts, std::uint32_t seed, bool holes = false) {
  Tensor t = Tensor::empty(DType::int32, {tokens, k});
  std::mt19937 rng(seed);
  std::vector<std::int32_t> order(static_cast<std::size_t>(experts));
  for (std::int64_t i = 0; i < tokens; ++i) {
    for (std::size_t e = 0; e < order.size(); ++e) order[e] = static_cast<std::int32_t>(e);
    for (int j = 0; j < k; ++j) {
      const std::size_t pick = static_cast<std::size_t>(j) + rng() % (order.size() - static_cast<std::size_t>(j));
      std::swap(order[static_cast<std::size_t>(j)], order[pick]);
      t.as<std::int32_t>()[i * k + j] = holes && rng() % 8 == 0 ? -1 : order[static_cast<std::size_t>(j)];
    }
  }
  return t;
}

inline Tensor random_topk_weights(std::int64_t tokens, int k, std::uint32_t seed) {
  Tensor t = Tensor::empty(DType::float32, {tokens, k});
  std::mt19937 rng(seed);
  std::uniform_real_distribution<float> any(0.05f, 1.0f);
  for (std::int64_t i = 0; i < t.elems(); ++i) t.as<float>()[i] = any(rng);
  return t;
}

}  // namespace octomoe::testing
