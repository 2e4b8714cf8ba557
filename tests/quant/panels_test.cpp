// Values in panels against the same values in the natural layout.
#include <gtest/gtest.h>

#include <algorithm>
#include <cstring>

#include "octomoe/weights.h"
#include "quant/matrix.h"
#include "support/errors.h"
#include "support/panels.h"
#include "support/random.h"
#include "support/run.h"

namespace octomoe {
namespace {

using testing::expect_error;
using testing::random_int8;
using testing::random_tensor;
using testing::same_bits;

std::vector<Scheme> integer_schemes() {
  std::vector<Scheme> s;
  for (const char* text : {"int8_channel", "int8_channel:asymmetric", "int8_channel:per_tensor", "int8_block",
                           "int8_block:block_n=24,block_k=96", "int8_hybrid", "int8_hybrid:block=32,super=2",
                           "int8_hybrid:block_n=40,block_k=64,super=3,q_max=64"}) {
    s.push_back(Scheme::parse(text));
  }
  return s;
}

TEST(Panels, HoldEachValueWhereTheLayoutSays) {
  const std::int64_t experts = 3, n = 50, k = 384;
  const Tensor natural = random_int8({experts, n, k}, 1, -128, 127);
  for (const int threads : {1, 3}) {
    const Tensor panels = to_panels(natural, threads);
    ASSERT_EQ(panels.shape(), (Shape{experts, 3, n, 128}));
    for (std::int64_t e = 0; e < experts; ++e) {
      for (std::int64_t row = 0; row < n; ++row) {
        for (std::int64_t c = 0; c < k; ++c) {
          ASSERT_EQ(panels.as<std::int8_t>()[((e * 3 + c / 128) * n + row) * 128 + c % 128],
                    natural.as<std::int8_t>()[(e * n + row) * k + c]);
        }
      }
    }
    EXPECT_TRUE(same_bits(from_panels(panels, threads), natural));
  }
}

TEST(Panels, OneAloneIsTheNaturalOrder) {
  const Tensor natural = random_int8({2, 48, 128}, 2), panels = to_panels(natural);
  EXPECT_EQ(panels.shape(), (Shape{2, 1, 48, 128}));
  EXPECT_EQ(std::memcmp(panels.view().data(), natural.view().data(), natural.bytes()), 0);
}

TEST(Panels, OfOtherTensorsAreRefused) {
  expect_error("values: expected K a multiple of 128, got [2, 16, 192]", [] {
    to_panels(random_int8({2, 16, 192}, 1));
  });
  expect_error("values: expected shape [*, *, *], got [2, 1, 16, 128]", [] {
    to_panels(random_int8({2, 1, 16, 128}, 1));
  });
  expect_error("values: expected dtype int8, got float32", [] {
    to_panels(Tensor::zeros(DType::float32, {2, 16, 128}));
  });
  expect_error("values: expected shape [*, *, *, 128], got [2, 2, 16, 64]", [] {
    from_panels(random_int8({2, 2, 16, 64}, 1));
  });
  expect_error("values: expected dtype int8, got uint8", [] {
    from_panels(Tensor::zeros(DType::uint8, {2, 1, 16, 128}));
  });
}

TEST(Panels, AreAdoptedAndGiveTheSameMatrix) {
  for (const Scheme& s : integer_schemes()) {
    SCOPED_TRACE(to_string(s));
    for (const std::int64_t k : {128, 384}) {
      const QuantizedMatrix natural = quantize_matrix(s, random_tensor(DType::float32, {2, 96, k}, 3), 2);
      const Tensor values = to_panels(natural.values);
      const QuantizedMatrix panels = adopt_matrix(s, values, natural.scale, natural.q, 2);
      EXPECT_EQ(panels.layout, WeightLayout::panels);
      EXPECT_EQ(natural.layout, WeightLayout::natural);
      EXPECT_EQ(panels.values.view().data(), values.view().data()) << "copied";
      EXPECT_EQ(panels.experts, 2);
      EXPECT_EQ(panels.n, 96);
      EXPECT_EQ(panels.k, k);
      EXPECT_EQ(panels.bytes(), natural.bytes());
      EXPECT_EQ(panels.flush_blocks, natural.flush_blocks);
      EXPECT_TRUE(same_bits(panels.column_sum, natural.column_sum));
      EXPECT_TRUE(same_bits(dequantize(panels), dequantize(natural)));
    }
  }
}

// One row at the limit among rows of zeros: whoever takes panels for rows finds a quarter of it in each of four rows,
// and a longer chunk.
TEST(Panels, OverflowIsProvenByRows) {
  const std::int64_t n = 16, k = 4096;
  Tensor values = Tensor::zeros(DType::int8, {1, n, k});
  std::memset(values.as<std::int8_t>() + 5 * k, 127, static_cast<std::size_t>(k));
  Tensor scale = Tensor::zeros(DType::float32, {1, 1, 1}), q = Tensor::empty(DType::uint8, {1, 1, k / 128});
  std::fill_n(q.as<std::uint8_t>(), q.elems(), std::uint8_t{16});
  const Scheme s = Scheme::parse("int8_hybrid:super=64,q_max=16");
  const QuantizedMatrix natural = adopt_matrix(s, values, scale, q);
  const QuantizedMatrix panels = adopt_matrix(s, to_panels(values), scale, q);
  EXPECT_EQ(natural.flush_blocks, 4);
  EXPECT_EQ(panels.flush_blocks, 4);
}

TEST(Panels, OfEitherMatrixMakeALayer) {
  const Tensor w13 = random_int8({2, 256, 384}, 1), w2 = random_int8({2, 384, 128}, 2);
  const Tensor s13 = random_tensor(DType::float32, {2, 256}, 3), s2 = random_tensor(DType::float32, {2, 384}, 4);
  for (const Tensor& s : {s13, s2})
    for (std::int64_t i = 0; i < s.elems(); ++i) s.as<float>()[i] = std::abs(s.as<float>()[i]);
  const MoeWeights natural = MoeWeights::from_int8_channel(w13, s13, w2, s2);
  const MoeWeights first = MoeWeights::from_int8_channel(to_panels(w13), s13, w2, s2);
  const MoeWeights second = MoeWeights::from_int8_channel(w13, s13, to_panels(w2), s2);
  EXPECT_EQ(first.w13.layout, WeightLayout::panels);
  EXPECT_EQ(first.w2.layout, WeightLayout::natural);
  EXPECT_EQ(second.w13.layout, WeightLayout::natural);
  EXPECT_EQ(second.w2.layout, WeightLayout::panels);
  for (const MoeWeights* w : {&first, &second}) {
    EXPECT_EQ(w->hidden(), 384);
    EXPECT_EQ(w->intermediate(), 128);
    EXPECT_EQ(w->bytes(), natural.bytes());
  }
  const Tensor b13 = Tensor::zeros(DType::float32, {2, 2, 3}), b2 = Tensor::zeros(DType::float32, {2, 3, 1});
  EXPECT_EQ(MoeWeights::from_int8_block(to_panels(w13), b13, to_panels(w2), b2).w13.layout, WeightLayout::panels);
  const Tensor f13 = Tensor::zeros(DType::float32, {2, 2, 1}), f2 = Tensor::zeros(DType::float32, {2, 3, 1});
  Tensor q13 = Tensor::empty(DType::uint8, {2, 2, 3}), q2 = Tensor::empty(DType::uint8, {2, 3, 1});
  for (const Tensor& q : {q13, q2}) std::memset(q.as<std::uint8_t>(), 3, q.bytes());
  EXPECT_EQ(MoeWeights::from_int8_hybrid(to_panels(w13), f13, q13, to_panels(w2), f2, q2).w2.layout,
            WeightLayout::panels);
}

TEST(Panels, AdoptNamesWhatDoesNotFit) {
  const Tensor w13 = random_int8({2, 2, 256, 128}, 1), w2 = random_int8({2, 1, 256, 128}, 2);
  const Tensor s13 = Tensor::zeros(DType::float32, {2, 256}), s2 = Tensor::zeros(DType::float32, {2, 256});
  EXPECT_EQ(MoeWeights::from_int8_channel(w13, s13, w2, s2).intermediate(), 128);
  expect_error("w13: expected shape [E, K/128, N, 128], got [2, 4, 256, 64]", [&] {
    MoeWeights::from_int8_channel(random_int8({2, 4, 256, 64}, 1), s13, w2, s2);
  });
  expect_error("w2: expected shape [E, K/128, N, 128], got [2, 128, 1, 256]", [&] {
    MoeWeights::from_int8_channel(w13, s13, random_int8({2, 128, 1, 256}, 1), s2);
  });
  expect_error("w13: expected shape [E, N, K] or [E, K/128, N, 128], got [256, 128]", [&] {
    MoeWeights::from_int8_channel(random_int8({256, 128}, 1), s13, w2, s2);
  });
  expect_error("w13: expected shape [E, N, K] or [E, K/128, N, 128], got [2, 2, 256, 128, 1]", [&] {
    MoeWeights::from_int8_channel(random_int8({2, 2, 256, 128, 1}, 1), s13, w2, s2);
  });
  expect_error("w13: expected dtype int8, got uint8", [&] {
    MoeWeights::from_int8_channel(Tensor::zeros(DType::uint8, {2, 2, 256, 128}), s13, w2, s2);
  });
  expect_error("w2: expected [E, H, I] to fit w13 [E, 2I, H] = [2, 256, 256], got [2, 256, 256]",
               [&] { MoeWeights::from_int8_channel(w13, s13, w13, s13); });
  expect_error("w13_scale: expected shape [2, 256], got [2, 128]", [&] {
    MoeWeights::from_int8_channel(w13, Tensor::zeros(DType::float32, {2, 128}), w2, s2);
  });
  expect_error("w13: expected at least one expert, row and column, got [2, 256, 0]", [&] {
    MoeWeights::from_int8_channel(random_int8({2, 0, 256, 128}, 1), s13, w2, s2);
  });
  const Tensor wide = random_int8({2, 2, 256, 256}, 1);
  const TensorView strided(wide.view().data(), DType::int8, Shape{2, 2, 256, 128},
                           Shape{2 * 256 * 256, 256 * 256, 256, 1});
  expect_error("w13: expected a contiguous tensor of shape [2, 2, 256, 128], got strides",
               [&] { MoeWeights::from_int8_channel(Tensor::wrap(strided, nullptr), s13, w2, s2); });
  // Other schemes have no panels.
  const Tensor groups = Tensor::zeros(DType::float32, {2, 256, 2});
  expect_error("w13: expected shape [E, N, K/2], got [2, 2, 256, 128]",
               [&] { MoeWeights::from_w4a8_fp8(w13, groups, w2, groups); });
  expect_error("w13: expected shape [E, N, K], got [2, 2, 256, 128]", [&] {
    MoeWeights::from_float(Tensor::zeros(DType::bfloat16, {2, 2, 256, 128}),
                           Tensor::zeros(DType::bfloat16, {2, 256, 128}));
  });
}

TEST(Panels, FinishRefusesALayoutThatCannotBe) {
  QuantizedMatrix m = quantize_matrix(Scheme::int8_channel(), random_tensor(DType::float32, {2, 32, 192}, 1));
  m.layout = WeightLayout::panels;
  expect_error(
      "w.layout: expected natural (panels need an integer scheme and K a multiple of 128), got panels of K 192",
      [&] { finish_matrix(m, "w"); });
  m = quantize_matrix(Scheme::bf16(), random_tensor(DType::float32, {2, 32, 128}, 1));
  m.layout = WeightLayout::panels;
  expect_error("got panels of K 128 in bf16", [&] { finish_matrix(m, "w"); });
}

}  // namespace
}  // namespace octomoe
