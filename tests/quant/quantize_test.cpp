// Quantisers against plain statements of their rules.
#include <gtest/gtest.h>

#include <cmath>
#include <cstring>

#include "octomoe/weights.h"
#include "quant/matrix.h"
#include "quant/numerics.h"
#include "quant/reference.h"
#include "support/errors.h"
#include "support/random.h"
#include "support/run.h"

namespace octomoe {
namespace {

using testing::random_tensor;
using testing::same_bits;

std::vector<float> floats(const Tensor& w) {
  std::vector<float> out(static_cast<std::size_t>(w.elems()));
  for (std::size_t i = 0; i < out.size(); ++i)
    out[i] = reference::load(w.as<char>() + i * size_bytes(w.dtype()), w.dtype());
  return out;
}

// A weight row is quantised by the same rule as an activation row; the reference states that rule for one row.
TEST(Quantize, ChannelRowsFollowTheRowRule) {
  const Tensor w = random_tensor(DType::bfloat16, {3, 50, 208}, 1);
  const QuantizedMatrix m = quantize_matrix(Scheme::int8_channel(), w);
  const std::vector<float> x = floats(w);
  for (std::int64_t r = 0; r < 150; ++r) {
    const reference::Row row = reference::quantize_row(m.scheme, x.data() + r * 208, 208, 0);
    ASSERT_EQ(row.scale[0], m.scale.as<float>()[r]);
    ASSERT_EQ(std::memcmp(row.q.data(), m.values.as<std::int8_t>() + r * 208, 208), 0) << r;
  }
}

TEST(Quantize, EveryValueIsWithinHalfAStep) {
  for (const char* text : {"int8_channel", "int8_channel:per_tensor", "int8_block", "int8_block:block_n=32,block_k=64",
                           "int8_hybrid", "int8_hybrid:block=64,super=2,q_max=8", "w4a8_fp8", "w4a8_fp8:group=0"}) {
    const Scheme s = Scheme::parse(text);
    for (const int segments : {1, 2}) {
      const Tensor w = random_tensor(DType::float32, {2, 2 * 96, 352}, 7);
      const QuantizedMatrix m = quantize_matrix(s, w, segments);
      const MatrixLayout l = layout_of(s, 2, 192, 352, segments);
      const Tensor back = dequantize(m);
      for (std::int64_t e = 0; e < 2; ++e) {
        for (std::int64_t n = 0; n < 192; ++n) {
          const std::int64_t block = s.has_blocks() ? e * l.blocks_n + m.block_of_row(n) : 0;
          for (std::int64_t c = 0; c < 352; ++c) {
            const std::int64_t g = c / group_columns(s, 352), row = e * 192 + n, i = row * 352 + c;
            float step = 0;
            if (s.kind == SchemeKind::int8_channel) step = m.scale.as<float>()[s.per_tensor ? e : row];
            if (s.kind == SchemeKind::int8_block) step = m.scale.as<float>()[block * l.blocks_k + g];
            if (s.kind == SchemeKind::w4a8_fp8) step = m.scale.as<float>()[row * l.groups_k + g];
            if (s.kind == SchemeKind::int8_hybrid) {
              step = m.scale.as<float>()[block * l.super_groups + g / s.super_group] *
                     static_cast<float>(m.q.as<std::uint8_t>()[block * l.blocks_k + g]);
            }
            ASSERT_LE(std::fabs(back.as<float>()[i] - w.as<float>()[i]), 0.5001f * step)
                << text << " " << e << " " << n << " " << c;
          }
        }
      }
    }
  }
}

// Q is the smallest integer whose effective scale reaches the block's largest value.
TEST(Quantize, HybridRoundsQUp) {
  const Scheme s = Scheme::parse("int8_hybrid:block=32,super=4,q_max=16");
  const Tensor w = random_tensor(DType::float32, {1, 64, 320}, 3);
  const QuantizedMatrix m = quantize_matrix(s, w);
  const MatrixLayout l = layout_of(s, 1, 64, 320, 1);
  EXPECT_EQ(l.super_groups, 3);
  for (std::int64_t nb = 0; nb < l.blocks_n; ++nb) {
    for (std::int64_t b = 0; b < l.blocks_k; ++b) {
      float top = 0;
      for (std::int64_t n = nb * 32; n < nb * 32 + 32; ++n) {
        for (std::int64_t c = b * 32; c < b * 32 + 32; ++c) top = std::max(top, std::fabs(w.as<float>()[n * 320 + c]));
      }
      const int q = m.q.as<std::uint8_t>()[nb * l.blocks_k + b];
      const double f = m.scale.as<float>()[nb * l.super_groups + b / 4];
      EXPECT_GE(q * f * 127.0 * 1.000001, top);
      if (q > 1) {
        EXPECT_LT((q - 1) * f * 127.0, top * 1.000001);
      }
    }
  }
}

TEST(Quantize, SameForEveryThreadCountAndStride) {
  const Tensor w = random_tensor(DType::float16, {3, 130, 96}, 5);
  Tensor wide = Tensor::zeros(DType::float16, {3, 130, 128});
  for (std::int64_t r = 0; r < 390; ++r)
    std::memcpy(wide.as<std::uint16_t>() + r * 128, w.as<std::uint16_t>() + r * 96, 192);
  const TensorView strided(wide.view().data(), DType::float16, Shape{3, 130, 96}, Shape{130 * 128, 128, 1});
  for (const Scheme& s : all_schemes()) {
    const QuantizedMatrix a = quantize_matrix(s, w, 2, 1), b = quantize_matrix(s, w, 2, 3),
                          c = quantize_matrix(s, strided, 2, 2);
    EXPECT_TRUE(same_bits(a.values, b.values) && same_bits(a.scale, b.scale) && same_bits(a.q, b.q)) << to_string(s);
    EXPECT_TRUE(same_bits(a.values, c.values) && same_bits(a.scale, c.scale) && same_bits(a.q, c.q)) << to_string(s);
  }
}

TEST(Quantize, ZeroAndSubnormalRows) {
  Tensor w = Tensor::zeros(DType::float32, {1, 16, 32});
  w.as<float>()[32] = 1e-42f;
  for (const Scheme& s : all_schemes()) {
    const QuantizedMatrix m = quantize_matrix(s, w);
    const Tensor back = dequantize(m);
    for (std::int64_t i = 0; i < back.elems(); ++i)
      ASSERT_TRUE(std::fabs(back.as<float>()[i]) <= 1e-30f) << to_string(s);
  }
}

TEST(Quantize, InfAndNanNameTheirPlace) {
  for (const Scheme& s : all_schemes()) {
    Tensor w = random_tensor(DType::float32, {3, 32, 64}, 2);
    w.as<float>()[(2 * 32 + 5) * 64 + 7] = std::numeric_limits<float>::infinity();
    testing::expect_error("w2: expected finite weights, got inf at expert 2, row 5, column 7",
                          [&] { quantize_matrix(s, w, 1, 0, "w2"); });
    w.as<float>()[(2 * 32 + 5) * 64 + 7] = std::nanf("");
    testing::expect_error("at expert 2, row 5, column 7", [&] { quantize_matrix(s, w, 1, 0, "w2"); });
  }
  Tensor w = Tensor::zeros(DType::float32, {1, 16, 32});
  w.as<float>()[40] = 70000.0f;
  testing::expect_error("within fp16's range", [&] { quantize_matrix(Scheme::fp16(), w); });
}

TEST(Quantize, HybridOverflowIsProven) {
  // All weights at the limit: Q = q_max everywhere, the worst there is.
  const std::int64_t k = 8192;
  Tensor w = Tensor::empty(DType::float32, {1, 16, k});
  for (std::int64_t i = 0; i < w.elems(); ++i) w.as<float>()[i] = i % 3 ? 1.0f : -1.0f;
  const Scheme s = Scheme::int8_hybrid();
  const QuantizedMatrix m = quantize_matrix(s, w);
  // 128 * 16 (Q_a) * 16 (Q_w) * 127 * 128 per block = 5.3e8: four blocks fit below 2^31, five do not; 64 blocks are 16
  // chunks of four.
  EXPECT_EQ(m.flush_blocks, 4);
  // 56 blocks of half that: at most eight fit, so that seven chunks of eight are the fewest; halving would end at
  // seven.
  Tensor half = Tensor::empty(DType::float32, {1, 16, 7168});
  for (std::int64_t i = 0; i < half.elems(); ++i) half.as<float>()[i] = i % 2 ? 1.0f : 0.0f;
  EXPECT_EQ(quantize_matrix(s, half).flush_blocks, 8);
  // Ordinary weights need no flush at all.
  const QuantizedMatrix usual = quantize_matrix(s, random_tensor(DType::float32, {1, 64, 2048}, 1));
  EXPECT_EQ(usual.flush_blocks, 16);
  Scheme large = s;
  large.q_max = 64;
  testing::expect_error("choose a smaller one", [&] { quantize_matrix(large, w); });
}

TEST(Quantize, AdoptChecksEveryPart) {
  using testing::expect_error;
  const Tensor w13 = testing::random_int8({2, 64, 48}, 1), w2 = testing::random_int8({2, 48, 32}, 2);
  Tensor s13 = Tensor::zeros(DType::float32, {2, 64}), s2 = Tensor::zeros(DType::float32, {2, 48, 1});
  EXPECT_EQ(MoeWeights::from_int8_channel(w13, s13, w2, s2).intermediate(), 32);
  expect_error("w13_scale: expected shape [2, 64], got [2, 48, 1]",
               [&] { MoeWeights::from_int8_channel(w13, s2, w2, s2); });
  expect_error("w2: expected [E, H, I] to fit", [&] { MoeWeights::from_int8_channel(w13, s13, w13, s13); });
  s13.as<float>()[3] = -1;
  expect_error("w13_scale: expected finite scales of at least 0, got -1 at element 3",
               [&] { MoeWeights::from_int8_channel(w13, s13, w2, s2); });
  s13.as<float>()[3] = std::nanf("");
  expect_error("w13_scale: expected finite scales", [&] { MoeWeights::from_int8_channel(w13, s13, w2, s2); });
  s13.as<float>()[3] = 1;
  expect_error("w13: expected dtype int8, got float32", [&] {
    MoeWeights::from_int8_channel(Tensor::zeros(DType::float32, {2, 64, 48}), s13, w2, s2);
  });
  expect_error("w13: expected rows of a multiple of 16 bytes", [&] {
    MoeWeights::from_int8_channel(Tensor::zeros(DType::int8, {2, 64, 40}), s13, w2, s2);
  });
  expect_error("w13: expected a tensor, got none", [&] { MoeWeights::from_int8_channel(Tensor(), s13, w2, s2); });
  expect_error("x_scale: expected a static activation scale",
               [&] { MoeWeights::from_int8_channel(w13, s13, w2, s2, {}, Scheme::parse("int8_channel:static")); });
  expect_error("scheme: expected int8_block, got int8_channel",
               [&] { MoeWeights::from_int8_block(w13, s13, w2, s2, {}, Scheme::int8_channel()); });
  // Gate and up halves have their own blocks: 2 * ceil(32/128) = 2, not ceil(64/128) = 1.
  const Tensor b13 = Tensor::zeros(DType::float32, {2, 2, 1}), b2 = Tensor::zeros(DType::float32, {2, 1, 1});
  EXPECT_EQ(MoeWeights::from_int8_block(w13, b13, w2, b2).w13.blocks_n(), 2);
  expect_error("w13_scale: expected shape [2, 2, 1], got [2, 1, 1]",
               [&] { MoeWeights::from_int8_block(w13, b2, w2, b2); });
}

TEST(Quantize, ErrorOfEachSchemeOnGaussianWeights) {
  // Known sizes of the rounding error for Gaussian data: they would double with a wrong scale.
  Tensor w = Tensor::empty(DType::float32, {1, 256, 512});
  std::mt19937 rng(1);
  std::normal_distribution<float> normal;
  for (std::int64_t i = 0; i < w.elems(); ++i) w.as<float>()[i] = normal(rng);
  const auto error = [&](const char* text) {
    const Tensor back = dequantize(quantize_matrix(Scheme::parse(text), w));
    return reference::relative_error(back.view().at(0), w.view().at(0));
  };
  EXPECT_NEAR(error("int8_channel"), 0.0072, 0.0008);
  EXPECT_NEAR(error("int8_block"), 0.0093, 0.0008);
  EXPECT_NEAR(error("int8_hybrid"), 0.0095, 0.0008);
  EXPECT_NEAR(error("w4a8_fp8"), 0.11, 0.015);
  EXPECT_NEAR(error("bf16"), 0.0017, 0.0002);
}

}  // namespace
}  // namespace octomoe
