// Each model's routing rule, written out plainly in float64, against route().
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <numeric>

#include "octomoe/layer.h"
#include "support/errors.h"
#include "support/random.h"

namespace octomoe {
namespace {

struct Routed {
  Tensor weights, ids;
};
Routed run(const Tensor& logits, int k, const RouteOptions& o) {
  Routed r{Tensor::zeros(DType::float32, {logits.dim(0), k}), Tensor::zeros(DType::int32, {logits.dim(0), k})};
  route(logits, r.weights, r.ids, o);
  return r;
}

using Row = std::vector<double>;

Row softmax(const float* l, std::size_t n) {
  Row s(n);
  const double m = *std::max_element(l, l + n);
  double sum = 0;
  for (std::size_t i = 0; i < n; ++i) sum += s[i] = std::exp(l[i] - m);
  for (double& v : s) v /= sum;
  return s;
}
Row sigmoid(const float* l, std::size_t n) {
  Row s(n);
  for (std::size_t i = 0; i < n; ++i) s[i] = 1.0 / (1.0 + std::exp(-static_cast<double>(l[i])));
  return s;
}
std::vector<int> top(const Row& s, int k) {
  std::vector<int> order(s.size());
  std::iota(order.begin(), order.end(), 0);
  std::stable_sort(order.begin(), order.end(),
                   [&](int a, int b) { return s[static_cast<std::size_t>(a)] > s[static_cast<std::size_t>(b)]; });
  order.resize(static_cast<std::size_t>(k));
  return order;
}

void expect_routed(const Routed& got, std::int64_t t, int k, const std::vector<int>& ids, const Row& weights) {
  for (int j = 0; j < k; ++j) {
    ASSERT_EQ(got.ids.as<std::int32_t>()[t * k + j], ids[static_cast<std::size_t>(j)])
        << "token " << t << " slot " << j;
    ASSERT_NEAR(got.weights.as<float>()[t * k + j], weights[static_cast<std::size_t>(j)],
                2e-6 * std::fabs(weights[static_cast<std::size_t>(j)]) + 1e-12);
  }
}

TEST(Route, Qwen3AndMixtral) {
  for (const auto& [experts, k] : {std::pair{128, 8}, {256, 8}, {8, 2}, {3, 3}, {1, 1}}) {
    const Tensor logits = testing::random_tensor(DType::float32, {50, experts}, 3);
    const Routed got = run(logits, k, RouteOptions::qwen3());
    for (std::int64_t t = 0; t < 50; ++t) {
      const Row s = softmax(logits.as<float>() + t * experts, static_cast<std::size_t>(experts));
      const std::vector<int> ids = top(s, k);
      double sum = 0;
      for (const int e : ids) sum += s[static_cast<std::size_t>(e)];
      Row w;
      for (const int e : ids) w.push_back(s[static_cast<std::size_t>(e)] / sum);
      // Weights below float32's softmax range are ties at 2^-126 / sum; the rule has no opinion there.
      if (w.back() < 1e-30) continue;
      expect_routed(got, t, k, ids, w);
    }
  }
}

TEST(Route, Ernie45BiasSelectsOnly) {
  const int experts = 64, k = 6;
  const Tensor logits = testing::random_tensor(DType::float32, {100, experts}, 5, 0.7f);
  const Tensor bias = testing::random_tensor(DType::float32, {experts}, 6, 0.02f);
  const Routed got = run(logits, k, RouteOptions::ernie45(bias));
  for (std::int64_t t = 0; t < 100; ++t) {
    if (t % 17 == 3) continue;  // logits of +-100: softmax is one-hot, all others tie
    const Row s = softmax(logits.as<float>() + t * experts, experts);
    Row choice = s;
    for (int e = 0; e < experts; ++e) choice[static_cast<std::size_t>(e)] += bias.as<float>()[e];
    const std::vector<int> ids = top(choice, k);
    double sum = 0;
    for (const int e : ids) sum += s[static_cast<std::size_t>(e)];
    Row w;
    for (const int e : ids) w.push_back(s[static_cast<std::size_t>(e)] / std::max(sum, 1e-12));
    expect_routed(got, t, k, ids, w);
  }
}

TEST(Route, DeepSeekV3GroupedTopK) {
  const int experts = 256, k = 8, groups = 8, kept = 4, size = experts / groups;
  const Tensor logits = testing::random_tensor(DType::float32, {100, experts}, 8, 0.5f);
  const Tensor bias = testing::random_tensor(DType::float32, {experts}, 9, 0.05f);
  const Routed got = run(logits, k, RouteOptions::deepseek_v3(bias));
  for (std::int64_t t = 0; t < 100; ++t) {
    if (t % 17 == 3) continue;  // saturated sigmoids tie
    const Row s = sigmoid(logits.as<float>() + t * experts, experts);
    Row choice = s;
    for (int e = 0; e < experts; ++e) choice[static_cast<std::size_t>(e)] += bias.as<float>()[e];
    Row group(groups);
    for (int g = 0; g < groups; ++g) {
      Row members(choice.begin() + g * size, choice.begin() + (g + 1) * size);
      std::sort(members.rbegin(), members.rend());
      group[static_cast<std::size_t>(g)] = members[0] + members[1];
    }
    const std::vector<int> best = top(group, kept);
    for (int e = 0; e < experts; ++e) {
      if (std::find(best.begin(), best.end(), e / size) == best.end()) choice[static_cast<std::size_t>(e)] = -1e30;
    }
    const std::vector<int> ids = top(choice, k);
    double sum = 1e-20;
    for (const int e : ids) sum += s[static_cast<std::size_t>(e)];
    Row w;
    for (const int e : ids) w.push_back(s[static_cast<std::size_t>(e)] / sum * 2.5);
    expect_routed(got, t, k, ids, w);
  }
}

TEST(Route, TiesGoToTheLowerId) {
  const Tensor logits = Tensor::zeros(DType::float32, {1, 16});
  const Routed got = run(logits, 4, {});
  for (int j = 0; j < 4; ++j) {
    EXPECT_EQ(got.ids.as<std::int32_t>()[j], j);
    EXPECT_EQ(got.weights.as<float>()[j], 0.25f);
  }
}

TEST(Route, NanPoisonsItsTokenOnly) {
  for (const float bad : {std::nanf(""), std::numeric_limits<float>::infinity()}) {
    Tensor logits = testing::random_tensor(DType::float32, {3, 16}, 1, 0.1f);
    const Routed clean = run(logits, 4, {});
    logits.as<float>()[16 + 9] = bad;
    const Routed got = run(logits, 4, {});
    for (int j = 0; j < 4; ++j) {
      EXPECT_TRUE(std::isnan(got.weights.as<float>()[4 + j]));
      EXPECT_EQ(got.ids.as<std::int32_t>()[4 + j], j);
    }
    EXPECT_EQ(std::memcmp(got.weights.as<float>(), clean.weights.as<float>(), 16), 0);
    EXPECT_EQ(std::memcmp(got.ids.as<float>() + 8, clean.ids.as<float>() + 8, 16), 0);
  }
}

TEST(Route, HalfLogitsAndStrides) {
  for (const DType dtype : {DType::bfloat16, DType::float16}) {
    const Tensor half = testing::random_tensor(dtype, {9, 32}, 4, 0.3f);
    Tensor full = Tensor::zeros(DType::float32, {9, 40});
    for (std::int64_t t = 0; t < 9; ++t) {
      for (std::int64_t e = 0; e < 32; ++e)
        full.as<float>()[t * 40 + e] = reference::load(half.as<std::uint16_t>() + t * 32 + e, dtype);
    }
    const TensorView strided(full.view().data(), DType::float32, Shape{9, 32}, Shape{40, 1});
    const Routed a = run(half, 5, {});
    Routed b{Tensor::zeros(DType::float32, {9, 5}), Tensor::zeros(DType::int32, {9, 5})};
    route(strided, b.weights, b.ids);
    EXPECT_EQ(std::memcmp(a.weights.as<float>(), b.weights.as<float>(), a.weights.bytes()), 0);
    EXPECT_EQ(std::memcmp(a.ids.as<float>(), b.ids.as<float>(), a.ids.bytes()), 0);
  }
}

TEST(Route, BadArguments) {
  using testing::expect_error;
  const Tensor logits = Tensor::zeros(DType::float32, {4, 16}), w = Tensor::zeros(DType::float32, {4, 3}),
               ids = Tensor::zeros(DType::int32, {4, 3});
  const auto with = [&](auto change) {
    RouteOptions o;
    change(o);
    return o;
  };
  expect_error("logits: expected dtype float32 or float16 or bfloat16, got int32", [&] { route(ids, w, ids); });
  expect_error("topk_weights: expected shape [4, 3], got [4, 16]", [&] { route(logits, logits, ids); });
  expect_error("topk_ids: expected dtype int32, got float32", [&] {
    route(logits, w, Tensor::zeros(DType::float32, {4, 3}));
  });
  expect_error("topk_ids: expected a top_k in 1..16", [&] {
    route(logits, Tensor::zeros(DType::float32, {4, 17}), Tensor::zeros(DType::int32, {4, 17}));
  });
  expect_error("groups: expected a divisor of 16 experts, got 3",
               [&] { route(logits, w, ids, with([](auto& o) { o.groups = 3; })); });
  expect_error("topk_groups: expected 1..4, got 5", [&] {
    route(logits, w, ids, with([](auto& o) {
            o.groups = 4;
            o.topk_groups = 5;
          }));
  });
  expect_error("topk_groups: expected groups with at least top_k = 3", [&] {
    route(logits, w, ids, with([](auto& o) {
            o.groups = 8;
            o.topk_groups = 1;
          }));
  });
  expect_error("renormalize_min", [&] { route(logits, w, ids, with([](auto& o) { o.renormalize_min = -1; })); });
  expect_error("scaling_factor",
               [&] { route(logits, w, ids, with([](auto& o) { o.scaling_factor = std::nanf(""); })); });
  expect_error("correction_bias: expected shape [16], got [4, 3]",
               [&] { route(logits, w, ids, with([&](auto& o) { o.correction_bias = w; })); });
}

}  // namespace
}  // namespace octomoe
