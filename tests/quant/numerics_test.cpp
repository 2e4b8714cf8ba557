#include "quant/numerics.h"

#include <gtest/gtest.h>

#include <cmath>
#include <cstring>

namespace octomoe {
namespace {

double relative(double got, double want) { return std::fabs(got - want) / std::fabs(want); }

TEST(Numerics, Fp16MatchesTheCompilersType) {
#if defined(__clang__) && __clang_major__ < 15
  GTEST_SKIP() << "this clang has _Float16 only where the target has instructions for it";
#else
  for (std::uint32_t h = 0; h < 0x10000; ++h) {
    _Float16 native;
    const auto half = static_cast<std::uint16_t>(h);
    std::memcpy(&native, &half, 2);
    const float f = num::fp16_to_float(half);
    if (std::isnan(static_cast<float>(native))) {
      EXPECT_TRUE(num::is_nan(f));
      EXPECT_EQ(num::float_to_fp16(f), 0x7fff);
    } else {
      ASSERT_EQ(f, static_cast<float>(native)) << h;
      ASSERT_EQ(num::float_to_fp16(f), half);
    }
  }
  for (std::uint64_t b = 0; b < 0x100000000ull; b += 9973) {
    const float f = num::from_bits(static_cast<std::uint32_t>(b));
    if (num::is_nan(f)) continue;
    const auto native = static_cast<_Float16>(f);
    std::uint16_t want;
    std::memcpy(&want, &native, 2);
    ASSERT_EQ(num::float_to_fp16(f), want) << f;
  }
#endif
}

TEST(Numerics, Bf16RoundsToNearestEven) {
  EXPECT_EQ(num::float_to_bf16(1.0f), 0x3f80);
  EXPECT_EQ(num::float_to_bf16(num::from_bits(0x3f808000)), 0x3f80);  // tie to even
  EXPECT_EQ(num::float_to_bf16(num::from_bits(0x3f818000)), 0x3f82);
  EXPECT_EQ(num::float_to_bf16(num::from_bits(0x3f808001)), 0x3f81);
  EXPECT_EQ(num::float_to_bf16(num::from_bits(0x7f7fffff)), 0x7f80);  // rounds to Inf
  EXPECT_EQ(num::float_to_bf16(-num::nan()), 0x7fff);
  EXPECT_EQ(num::float_to_bf16(num::from_bits(0x7f800001)), 0x7fff);  // a NaN whose payload would be rounded away
}

TEST(Numerics, E4m3IsTheNearestOfAllCodes) {
  for (int c = 0; c < 256; ++c) {
    const float f = num::e4m3_to_float(static_cast<std::uint8_t>(c));
    if ((c & 0x7f) == 0x7f)
      EXPECT_TRUE(num::is_nan(f));
    else
      EXPECT_EQ(num::float_to_e4m3(f), c);
  }
  EXPECT_EQ(num::e4m3_to_float(0x7e), 448.0f);
  EXPECT_EQ(num::float_to_e4m3(1e30f), 0x7e);
  EXPECT_EQ(num::float_to_e4m3(-1e30f), 0xfe);
  EXPECT_EQ(num::float_to_e4m3(num::nan()), 0x7f);
  for (float x = 0.0001f; x < 500.0f; x *= 1.0013f) {
    float best = 0, second = -1;
    for (int c = 0; c < 0x7f; ++c) {
      const float f = num::e4m3_to_float(static_cast<std::uint8_t>(c));
      if (std::fabs(f - x) < std::fabs(best - x)) second = best, best = f;
    }
    (void)second;
    ASSERT_EQ(std::fabs(num::e4m3_to_float(num::float_to_e4m3(x)) - x), std::fabs(best - x)) << x;
  }
}

TEST(Numerics, ExpReciprocalSigmoid) {
  for (double x = -86.0; x < 86.0; x += 0.00737) {
    const auto f = static_cast<float>(x);
    // 2.5e-7 of the polynomial and its roundings plus the rounding of x * log2e.
    ASSERT_LT(relative(num::exp(f), std::exp(static_cast<double>(f))), 2.5e-7 + std::fabs(x) * 1.0e-7) << x;
  }
  // From 2^125 on the result nears the subnormals and has fewer bits.
  for (float d = 1.0f; d < 0x1p125f; d = num::from_bits(num::bits(d) + 10007)) {
    ASSERT_LT(relative(num::rcp(d), 1.0 / static_cast<double>(d)), 1.1e-7) << d;
  }
  EXPECT_TRUE(num::is_nan(num::sigmoid(num::nan())));
  EXPECT_EQ(num::sigmoid(1000.0f), 1.0f);
  EXPECT_LT(num::sigmoid(-1000.0f), 1e-37f);
  EXPECT_EQ(num::sigmoid(0.0f), 0.5f);
  EXPECT_EQ(num::exp(num::from_bits(num::kInfBits)), num::exp(200.0f));
}

TEST(Numerics, Activations) {
  for (double x = -9.0; x < 9.0; x += 0.00391) {
    const auto f = static_cast<float>(x);
    const double d = f;
    EXPECT_NEAR(num::silu(f), d / (1 + std::exp(-d)), 3e-7 * std::max(1.0, std::fabs(d)));
    EXPECT_NEAR(num::gelu_erf(f), 0.5 * d * (1 + std::erf(d / std::sqrt(2.0))), 4e-7 * std::max(1.0, std::fabs(d)));
    EXPECT_NEAR(num::gelu_tanh(f), 0.5 * d * (1 + std::tanh(std::sqrt(2 / M_PI) * (d + 0.044715 * d * d * d))),
                5e-7 * std::max(1.0, std::fabs(d)));
  }
  EXPECT_EQ(num::relu(-3.0f), 0.0f);
  EXPECT_TRUE(num::is_nan(num::relu(num::nan())));
}

TEST(Numerics, ScalesOfSpecialGroups) {
  const num::GroupScale zero = num::symmetric_scale(0, 127.0f);
  EXPECT_TRUE(num::is_finite(zero.scale) && zero.scale > 0 && num::is_finite(zero.inverse));
  EXPECT_EQ(num::quantize(0.0f, zero.inverse, 0, -127, 127), 0);
  const num::GroupScale subnormal = num::symmetric_scale(1, 127.0f);
  EXPECT_TRUE(num::is_finite(subnormal.inverse));
  for (const std::uint32_t bad : {0x7f800000u, 0x7f800001u, 0x7fffffffu}) {
    EXPECT_EQ(num::bits(num::symmetric_scale(bad, 127.0f).scale), num::kNanBits);
    EXPECT_EQ(num::bits(num::super_scale(bad, 16).f), num::kNanBits);
  }
  const num::GroupScale largest = num::symmetric_scale(0x7f7fffff, 127.0f);
  EXPECT_EQ(num::quantize(num::from_bits(0x7f7fffff), largest.inverse, 0, -127, 127), 127);
}

}  // namespace
}  // namespace octomoe
