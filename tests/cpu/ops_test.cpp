// Row operations and epilogues against the scalar steps of quant/numerics.h, bit for bit, for every length of tail.
#include "cpu/ops.h"

#include <gtest/gtest.h>

#include <cstring>
#include <limits>
#include <random>
#include <vector>

#include "cpu/finish.h"
#include "cpu/kernel.h"
#include "quant/numerics.h"
#include "quant/reference.h"

namespace octomoe::cpu {
namespace {

constexpr DType kFloats[] = {DType::float32, DType::float16, DType::bfloat16};

// Any bit pattern: subnormals, infinities, NaNs, ties.
std::vector<float> any_floats(std::size_t n, std::uint32_t seed) {
  std::mt19937 rng(seed);
  std::vector<float> x(n);
  for (std::size_t i = 0; i < n; ++i) {
    switch (i % 4) {
      case 0:
        x[i] = num::from_bits(rng());
        break;
      case 1:
        x[i] = static_cast<float>(static_cast<int>(rng() % 4001) - 2000) / 8.0f;
        break;  // ties
      case 2:
        x[i] = std::ldexp(static_cast<float>(static_cast<int>(rng() % 2048) - 1024), -static_cast<int>(rng() % 40));
        break;
      default:
        x[i] = std::normal_distribution<float>(0, 3)(rng);
        break;
    }
  }
  const float special[] = {0.0f,
                           -0.0f,
                           448.0f,
                           464.0f,
                           -463.9f,
                           65504.0f,
                           65519.0f,
                           65520.0f,
                           0x1p-14f,
                           0x1p-25f,
                           0x1p-6f,
                           0x1p-10f,
                           std::numeric_limits<float>::infinity(),
                           -std::numeric_limits<float>::infinity(),
                           std::numeric_limits<float>::quiet_NaN(),
                           num::from_bits(0xff812345u)};
  for (std::size_t i = 0; i < std::size(special) && i * 3 < n; ++i) x[i * 3] = special[i];
  return x;
}

std::vector<float> finite_floats(std::size_t n, std::uint32_t seed) {
  std::vector<float> x = any_floats(n, seed);
  for (float& v : x) v = num::is_finite(v) ? v : 1.5f;
  return x;
}

TEST(CpuOps, ConversionsEqualTheScalarSteps) {
  const std::vector<float> x = any_floats(4099, 1);
  for (const DType dtype : kFloats) {
    std::vector<std::uint8_t> got(x.size() * 4), want(x.size() * 4);
    for (const std::size_t n : {std::size_t{0}, std::size_t{1}, std::size_t{7}, std::size_t{33}, x.size()}) {
      from_float(x.data(), static_cast<std::int64_t>(n), dtype, got.data());
      for (std::size_t i = 0; i < n; ++i) reference::store(want.data() + i * size_bytes(dtype), dtype, x[i]);
      EXPECT_EQ(std::memcmp(got.data(), want.data(), n * size_bytes(dtype)), 0) << to_string(dtype) << " " << n;
    }
  }
}

TEST(CpuOps, EveryHalfBecomesItsFloat) {
  std::vector<std::uint16_t> h(65536);
  for (std::size_t i = 0; i < h.size(); ++i) h[i] = static_cast<std::uint16_t>(i);
  std::vector<float> got(h.size());
  for (const DType dtype : {DType::float16, DType::bfloat16}) {
    to_float(h.data(), dtype, 65536, got.data());
    for (std::size_t i = 0; i < h.size(); ++i) {
      const float want = reference::load(&h[i], dtype);
      if (num::is_nan(want))
        EXPECT_TRUE(num::is_nan(got[i])) << i;
      else
        ASSERT_EQ(num::bits(want), num::bits(got[i])) << to_string(dtype) << " " << i;
    }
  }
}

TEST(CpuOps, E4m3BothWays) {
  std::vector<std::uint8_t> all(256);
  for (std::size_t i = 0; i < 256; ++i) all[i] = static_cast<std::uint8_t>(i);
  std::vector<float> f(256);
  e4m3_to_float(all.data(), 256, f.data());
  for (std::size_t i = 0; i < 256; ++i) EXPECT_EQ(num::bits(f[i]), num::bits(num::e4m3_to_float(all[i]))) << i;

  const std::vector<float> x = any_floats(4099, 2);
  std::vector<std::uint8_t> q(x.size());
  for (const float inverse : {1.0f, 0.37f, 448.0f / 3.0f, 0.0f}) {
    quantize_e4m3(x.data(), static_cast<std::int64_t>(x.size()), inverse, q.data());
    for (std::size_t i = 0; i < x.size(); ++i) {
      ASSERT_EQ(q[i], inverse == 0.0f ? 0 : num::float_to_e4m3(x[i] * inverse)) << x[i] << " " << inverse;
    }
  }
}

TEST(CpuOps, ExtremaOfEveryLength) {
  const std::vector<float> x = any_floats(300, 3), y = finite_floats(300, 4);
  for (std::size_t n = 0; n < x.size(); ++n) {
    std::uint32_t top = 0;
    float lo = 0, hi = 0;
    for (std::size_t i = 0; i < n; ++i) {
      top = std::max(top, num::abs_bits(x[i]));
      lo = y[i] < lo ? y[i] : lo;
      hi = y[i] > hi ? y[i] : hi;
    }
    EXPECT_EQ(absmax_bits(x.data(), static_cast<std::int64_t>(n)), top);
    float got_lo = 1, got_hi = -1;
    min_max(y.data(), static_cast<std::int64_t>(n), &got_lo, &got_hi);
    EXPECT_EQ(got_lo, lo);
    EXPECT_EQ(got_hi, hi);
  }
}

TEST(CpuOps, Int8EqualsTheScalarStep) {
  const std::vector<float> x = finite_floats(2051, 5);
  std::vector<std::int8_t> q(x.size());
  for (const float inverse : {127.0f / 250.0f, 1.0f, 8.0f, 0x1p60f, 0.0f}) {
    for (const int zero : {0, -128, 57}) {
      const float lo = zero == 0 ? -127.0f : -128.0f;
      quantize_int8(x.data(), static_cast<std::int64_t>(x.size()), inverse, zero, lo, 127.0f, q.data());
      for (std::size_t i = 0; i < x.size(); ++i) {
        ASSERT_EQ(q[i], num::quantize(x[i], inverse, zero, lo, 127.0f)) << x[i] << " " << inverse << " " << zero;
      }
    }
  }
}

TEST(CpuOps, GateDotKeepsItsOrder) {
  for (const std::int64_t n : {16, 256, 272, 1000, 2048}) {
    const std::vector<float> x = finite_floats(static_cast<std::size_t>(n), 6),
                             g = finite_floats(static_cast<std::size_t>(n), 7);
    std::vector<float> s(256, 0.0f);
    for (std::int64_t i = 0; i < n; ++i) {
      float& v = s[static_cast<std::size_t>(i % 256)];
      v = std::fma(x[static_cast<std::size_t>(i)], g[static_cast<std::size_t>(i)], v);
    }
    for (std::size_t w = 128; w >= 1; w /= 2) {
      for (std::size_t j = 0; j < w; ++j) s[j] += s[j + w];
    }
    EXPECT_EQ(num::bits(num::canonical(gate_dot(x.data(), g.data(), n))), num::bits(num::canonical(s[0]))) << n;
  }
}

float scalar_activation(Activation kind, float g, float u) {
  switch (kind) {
    case Activation::swiglu:
      return num::silu(g) * u;
    case Activation::geglu_tanh:
      return num::gelu_tanh(g) * u;
    case Activation::geglu_erf:
      return num::gelu_erf(g) * u;
    case Activation::silu:
      return num::silu(g);
    case Activation::gelu_tanh:
      return num::gelu_tanh(g);
    case Activation::gelu_erf:
      return num::gelu_erf(g);
    case Activation::relu:
      return num::relu(g);
    case Activation::relu2:
      return num::relu(g) * num::relu(g);
    default:
      return g;
  }
}

// 2^18 values of every magnitude through each activation, in float32: the polynomials agree to the last bit.
TEST(CpuOps, ActivationsEqualTheScalarSteps) {
  constexpr int kRows = 64;
  for (const Activation kind : {Activation::swiglu, Activation::geglu_tanh, Activation::geglu_erf, Activation::silu,
                                Activation::gelu_tanh, Activation::gelu_erf, Activation::relu, Activation::relu2}) {
    for (std::uint32_t seed = 0; seed < 128; ++seed) {
      const std::vector<float> c = any_floats(2 * kRows * kPanel, seed);
      std::vector<float> out(kRows * kUnit, -7.0f);
      std::vector<std::uint8_t*> rows;
      for (int m = 0; m < kRows; ++m) rows.push_back(reinterpret_cast<std::uint8_t*>(out.data() + m * kUnit));
      FinishArgs a;
      a.c = c.data();
      a.rows = kRows;
      a.gated = is_gated(kind);
      a.activation.kind = kind;
      a.columns = a.gated ? 13 : 29;  // the last columns of a matrix
      a.out = rows.data();
      a.out_dtype = DType::float32;
      finish(a);
      for (int m = 0; m < kRows; ++m) {
        for (int n = 0; n < kUnit; ++n) {
          const auto at = [&](int p) { return c[static_cast<std::size_t>((p * kRows + m) * kPanel + n % kPanel)]; };
          const float want = n >= a.columns ? -7.0f
                             : a.gated      ? num::canonical(scalar_activation(kind, at(0), at(1)))
                                            : num::canonical(scalar_activation(kind, at(n / kPanel), 0));
          ASSERT_EQ(num::bits(out[static_cast<std::size_t>(m * kUnit + n)]), num::bits(want))
              << to_string(kind) << " of " << at(n / kPanel);
        }
      }
    }
  }
}

}  // namespace
}  // namespace octomoe::cpu
