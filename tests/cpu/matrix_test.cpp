// grouped_gemm on the CPU engine against the plain reference: layouts, given and quantised activations, odd sizes.
#include <gtest/gtest.h>

#include <cstring>

#include "cpu/isa.h"
#include "support/isa.h"
#include "support/panels.h"
#include "support/run.h"

namespace octomoe::testing {
namespace {

constexpr std::int64_t kExperts = 4;

struct Case {
  std::string scheme;
  std::int64_t n = 80, k = 192;
  std::vector<std::int32_t> rows{5, 0, 23, 1};
  bool given = false, masked = false, bias = false, wide_offsets = false;
  DType out = DType::float32;
};

Tensor positive(Shape shape, std::uint32_t seed) {
  Tensor t = random_tensor(DType::float32, shape, seed, 0.01f);
  for (std::int64_t i = 0; i < t.elems(); ++i) t.as<float>()[i] = std::abs(t.as<float>()[i]) + 1e-3f;
  return t;
}

// Activations for `rows` flat rows, as a caller brings them; -128 included.
struct Given {
  Tensor values, scale, q, zero;
};
Given make_given(const QuantizedMatrix& m, std::int64_t rows) {
  const Scheme& s = m.scheme;
  Given g;
  if (s.kind == SchemeKind::w4a8_fp8) {
    g.values = Tensor::empty(DType::float8_e4m3, {rows, m.k});
    for (std::int64_t i = 0; i < g.values.elems(); ++i)
      g.values.as<std::uint8_t>()[i] = static_cast<std::uint8_t>(i * 37 % 0x70);
  } else {
    g.values = random_int8({rows, m.k}, 5, -128, 127);
  }
  const std::int64_t per_row =
      s.kind == SchemeKind::int8_block ? m.blocks_k() : (s.kind == SchemeKind::int8_hybrid ? m.super_groups() : 1);
  if (s.activation_scale == ActivationScale::static_)
    g.scale = positive({s.is_integer() ? 1 : kExperts}, 6);
  else if (s.activation_scale == ActivationScale::dynamic)
    g.scale = per_row == 1 && !s.has_blocks() ? positive({rows}, 6) : positive({rows, per_row}, 6);
  if (s.kind == SchemeKind::int8_hybrid) {
    g.q = Tensor::empty(DType::uint8, {rows, m.blocks_k()});
    for (std::int64_t i = 0; i < g.q.elems(); ++i)
      g.q.as<std::uint8_t>()[i] = static_cast<std::uint8_t>(1 + i % s.q_max);
  }
  if (s.asymmetric) {
    g.zero = Tensor::empty(DType::int32, {rows});
    for (std::int64_t i = 0; i < rows; ++i)
      g.zero.as<std::int32_t>()[i] = static_cast<std::int32_t>(i * 11 % 255) - 128;
  }
  return g;
}

TensorView three_d(const Tensor& t) {
  if (!t.defined()) return {};
  Shape shape =
      t.shape().rank() == 1 ? Shape{kExperts, t.dim(0) / kExperts} : Shape{kExperts, t.dim(0) / kExperts, t.dim(1)};
  return TensorView(t.view().data(), t.dtype(), shape);
}

void expect_gemm(const Case& c) {
  SCOPED_TRACE(c.scheme + " N " + std::to_string(c.n) + " K " + std::to_string(c.k) + (c.given ? " given" : "") +
               (c.masked ? " masked" : ""));
  const Scheme scheme = Scheme::parse(c.scheme);
  QuantizedMatrix m = quantize_matrix(scheme, random_tensor(DType::float32, {kExperts, c.n, c.k}, 1, 0.05f));
  if (scheme.activation_scale == ActivationScale::static_)
    m.activation_scale = positive({scheme.is_integer() ? 1 : kExperts}, 2);

  std::int64_t total = 0, most = 0;
  for (const std::int32_t r : c.rows) total += r, most = std::max<std::int64_t>(most, r + 2);
  const std::int64_t flat = c.masked ? kExperts * most : total;
  Tensor index = Tensor::zeros(c.wide_offsets ? DType::int64 : DType::int32, {c.masked ? kExperts : kExperts + 1});
  for (std::size_t e = 0; e < kExperts; ++e) {
    if (c.masked)
      index.as<std::int32_t>()[e] = c.rows[e];
    else if (c.wide_offsets)
      index.as<std::int64_t>()[e + 1] = index.as<std::int64_t>()[e] + c.rows[e];
    else
      index.as<std::int32_t>()[e + 1] = index.as<std::int32_t>()[e] + c.rows[e];
  }
  Given g;
  if (c.given)
    g = make_given(m, flat);
  else
    g.values = random_tensor(scheme.kind == SchemeKind::fp16 ? DType::float16 : DType::bfloat16, {flat, c.k}, 3);
  const bool fixed = scheme.activation_scale == ActivationScale::static_;
  Activations a{g.values, g.scale, g.q, g.zero};
  if (c.masked) a = {three_d(g.values), fixed ? TensorView(g.scale) : three_d(g.scale), three_d(g.q), three_d(g.zero)};
  const Tensor bias = c.bias ? random_tensor(DType::float32, {kExperts, c.n}, 4) : Tensor();

  const auto output = [&] {
    Tensor d = Tensor::empty(c.out, c.masked ? Shape{kExperts, most, c.n} : Shape{flat, c.n});
    std::memset(d.as<char>(), 0x5a, d.bytes());
    return d;
  };
  Tensor want = output(), got = output();
  const Groups groups = c.masked ? Groups::masked(index) : Groups::offsets(index);
  reference::grouped_gemm(m, a, want, groups, bias);
  const PreparedMatrix prepared(Device::cpu(), m);
  grouped_gemm(a, prepared, got, groups, {bias});
  if (scheme.is_integer()) {
    EXPECT_TRUE(same_bits(want, got));
    if (c.k % kPanelColumns != 0) return;
    const QuantizedMatrix panels = in_panels(m);
    Tensor of_reference = output(), of_engine = output();
    reference::grouped_gemm(panels, a, of_reference, groups, bias);
    grouped_gemm(a, PreparedMatrix(Device::cpu(), panels), of_engine, groups, {bias});
    EXPECT_TRUE(same_bits(want, of_reference)) << "panels";
    EXPECT_TRUE(same_bits(want, of_engine)) << "panels";
    return;
  }
  // Untouched rows are equal; the rest within the order of float additions.
  for (std::int64_t i = 0; i < want.elems(); ++i) {
    const float w = reference::load(want.as<char>() + i * static_cast<std::int64_t>(size_bytes(c.out)), c.out);
    const float v = reference::load(got.as<char>() + i * static_cast<std::int64_t>(size_bytes(c.out)), c.out);
    ASSERT_NEAR(v, w, 1e-4f * (std::abs(w) + 100.0f)) << i;
  }
}

const char* const kSchemes[] = {"int8_channel",
                                "int8_channel:static",
                                "int8_channel:asymmetric",
                                "int8_channel:per_tensor",
                                "int8_block",
                                "int8_block:block_n=24,block_k=96",
                                "int8_hybrid:block=32,super=2",
                                "int8_hybrid:block_k=64,q_max=8",
                                "w4a8_fp8",
                                "w4a8_fp8:static",
                                "w4a8_fp8:none",
                                "bf16",
                                "fp16"};

TEST(CpuMatrix, LayoutsAndGivenActivations) {
  for (const char* scheme : kSchemes) {
    const bool floats =
        std::string(scheme).substr(1) == "f16" || std::string(scheme) == "bf16" || std::string(scheme) == "fp16";
    for (const bool given : {false, true}) {
      if (given && floats) continue;
      for (const bool masked : {false, true}) {
        Case c;
        c.scheme = scheme;
        c.given = given;
        c.masked = masked;
        c.bias = masked != given;
        c.wide_offsets = !masked;
        expect_gemm(c);
      }
    }
  }
}

// expect_gemm runs them in panels too, where K is whole panels.
TEST(CpuMatrix, WeightsInPanels) {
  for (const char* scheme : kSchemes) {
    if (!Scheme::parse(scheme).is_integer()) continue;
    for (const std::int64_t k : {128, 640}) {
      for (const bool masked : {false, true}) {
        Case c;
        c.scheme = scheme;
        c.n = 72;
        c.k = k;
        c.given = masked;
        c.masked = masked;
        expect_gemm(c);
      }
    }
  }
}

TEST(CpuMatrix, OddColumnsAndTails) {
  for (const std::int64_t n : {1, 7, 16, 33, 95}) {
    for (const std::int64_t k : {32, 96, 160, 1056}) {
      for (const char* scheme : {"int8_channel", "int8_block", "int8_hybrid", "w4a8_fp8", "bf16", "fp16"}) {
        Case c;
        c.scheme = scheme;
        c.n = n;
        c.k = k;
        c.bias = n % 2 == 1;
        c.rows = {2, 9, 0, 4};
        expect_gemm(c);
      }
    }
  }
}

class MatrixOnIsa : public ::testing::TestWithParam<cpu::Isa> {
 protected:
  ForcedIsa force_{GetParam()};
};

// Every number of rows that makes different tiles.
TEST_P(MatrixOnIsa, EveryRowCount) {
  for (std::int32_t rows = 1; rows <= 40; ++rows) {
    for (const char* scheme : {"int8_channel", "int8_block:block=32", "int8_hybrid:block=64,super=2", "bf16"}) {
      Case c;
      c.scheme = scheme;
      c.given = std::string(scheme) != "bf16";
      c.k = 96;
      c.n = 48;
      c.rows = {rows, 0, 0, 0};
      expect_gemm(c);
    }
  }
}

// Slices of K: longer than one, and not a multiple of it.
TEST_P(MatrixOnIsa, LongRows) {
  for (const std::int64_t k : {1008, 2080}) {
    for (const char* scheme : {"int8_channel", "int8_block", "int8_hybrid:super=3"}) {
      Case c;
      c.scheme = scheme;
      c.given = true;
      c.k = k;
      c.rows = {3, 14, 100, 1};
      expect_gemm(c);
    }
  }
}

INSTANTIATE_TEST_SUITE_P(Cpu, MatrixOnIsa, ::testing::ValuesIn(cpu::available_isas()),
                         [](const auto& info) { return std::string(cpu::to_string(info.param)); });

}  // namespace
}  // namespace octomoe::testing
