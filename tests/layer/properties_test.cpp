// What every engine promises, scheme by scheme: the reference's bits, no influence of neighbours, permutation, NaN
// rows.
#include <gtest/gtest.h>

#include <cmath>
#include <cstring>
#include <numeric>
#include <tuple>
#include <vector>

#include "octomoe/layer.h"
#include "support/run.h"

namespace octomoe {
namespace {

using testing::LayerCase;
using testing::run_layer;
using testing::same_bits;

class Properties : public ::testing::TestWithParam<std::tuple<std::string, Device>> {
 protected:
  Scheme scheme = Scheme::parse(std::get<0>(GetParam()));
  Device device = std::get<1>(GetParam());

  void SetUp() override {
    if (!testing::is_here(device)) GTEST_SKIP() << "no GPU here";
    if (device.type == DeviceType::cuda && !scheme.is_integer()) GTEST_SKIP() << "CUDA runs the integer schemes";
  }

  // Integer schemes: every bit. Float schemes: the order of additions is free, and h may then round to the next bf16.
  void expect_reference(const Tensor& got, const Tensor& want, const std::string& what) {
    if (scheme.is_integer()) {
      EXPECT_TRUE(same_bits(got, want)) << what;
    } else {
      EXPECT_LT(reference::relative_error(got, want), 1e-3) << what;
    }
  }

  void check_case(const LayerCase& c, LayerOptions options, DType x_dtype, DType out_dtype) {
    const MoeWeights w = testing::make_weights(c, c.experts);
    const testing::LayerInput in = testing::make_input(c, x_dtype);
    Tensor want = Tensor::zeros(out_dtype, {c.tokens, c.hidden});
    reference::moe_forward(w, options, in.x, in.ids, in.weights, want);
    expect_reference(run_layer(device, w, options, in, out_dtype), want, fmt_case(c, x_dtype, out_dtype));
  }

  static std::string fmt_case(const LayerCase& c, DType x, DType out) {
    return to_string(c.scheme) + " " + to_string(c.activation) + " E" + std::to_string(c.experts) + " H" +
           std::to_string(c.hidden) + " I" + std::to_string(c.intermediate) + " T" + std::to_string(c.tokens) + " k" +
           std::to_string(c.top_k) + " " + to_string(x) + " -> " + to_string(out);
  }
};

TEST_P(Properties, EqualsTheReferenceOverShapes) {
  const std::tuple<int, int, int, int, int> shapes[] = {
      {8, 128, 64, 13, 3}, {4, 160, 96, 33, 4},  {16, 256, 192, 1, 2}, {3, 288, 352, 50, 1},
      {5, 96, 448, 3, 5},  {64, 64, 704, 20, 8}, {1, 320, 32, 40, 1},  {6, 512, 128, 200, 2}};
  std::uint32_t seed = 1;
  for (const auto& [e, h, i, t, k] : shapes) {
    LayerCase c;
    c.experts = e;
    c.hidden = h;
    c.intermediate = i;
    c.tokens = t;
    c.top_k = k;
    c.scheme = scheme;
    c.seed = ++seed;
    check_case(c, {}, DType::bfloat16, DType::bfloat16);
  }
}

TEST_P(Properties, EqualsTheReferenceOverOptions) {
  for (int i = 0; i < 10; ++i) {
    LayerCase c;
    c.scheme = scheme;
    c.activation = static_cast<Activation>(i);
    c.order = i % 2 ? GateUpOrder::up_gate : GateUpOrder::gate_up;
    c.biases = i % 3 != 0;
    c.seed = static_cast<std::uint32_t>(20 + i);
    LayerOptions o;
    if (c.activation == Activation::swigluoai || i == 0) o.swiglu_limit = 1.5f;
    o.router_weight_on_input = i % 4 == 1;
    if (i % 2 == 0) {
      LayerCase shared = c;
      shared.intermediate = 160;
      shared.seed = 77;
      o.shared_expert = testing::make_weights(shared, 1);
      if (i % 4 == 0) o.shared_gate = testing::random_tensor(DType::bfloat16, {c.hidden}, 5, 0.1f);
    }
    check_case(c, o, static_cast<DType>(i % 3), static_cast<DType>((i + 1) % 3));
  }
}

TEST_P(Properties, ExpertMapAndAccumulate) {
  LayerCase c;
  c.scheme = scheme;
  const MoeWeights w = testing::make_weights(c, c.experts);
  LayerOptions o;
  o.expert_map = Tensor::empty(DType::int32, {20});
  for (int e = 0; e < 20; ++e) o.expert_map.as<std::int32_t>()[e] = e % 3 == 0 ? -1 : (e * 5) % 8;
  testing::LayerInput in = testing::make_input(c);
  in.ids = testing::random_ids(c.tokens, c.top_k, 20, 3, true);
  Tensor want = testing::random_tensor(DType::float32, {c.tokens, c.hidden}, 9);
  Tensor got = Tensor::copy_of(want);
  reference::moe_forward(w, o, in.x, in.ids, in.weights, want, true);
  MoeLayer layer(device, w, o);
  testing::forward(device, layer, in.x, in.ids, in.weights, got, {.accumulate = true});
  expect_reference(got, want, "accumulate");
}

// CombineOrder::any may round otherwise, by no more than its bound; the CPU always adds in the order of the slots.
TEST_P(Properties, AnyOrderStaysWithinItsBound) {
  LayerCase c;
  c.scheme = scheme;
  c.experts = 6;
  c.hidden = 256;
  c.intermediate = 160;
  c.top_k = 4;
  const MoeWeights w = testing::make_weights(c, c.experts);
  LayerCase other = c;
  other.intermediate = 96;
  for (int i = 0; i < 6; ++i) {
    SCOPED_TRACE(i);
    c.tokens = i == 0 ? 40 : 300;
    LayerOptions o;
    o.combine_order = CombineOrder::any;
    o.router_weight_on_input = i == 2;
    if (i >= 3) o.shared_expert = testing::make_weights(other, 1);
    if (i >= 4) o.shared_gate = testing::random_tensor(DType::bfloat16, {c.hidden}, 5, 0.1f);
    const DType type = i % 2 == 0 ? DType::bfloat16 : DType::float16;
    if (i == 1) {
      o.expert_map = Tensor::empty(DType::int32, {10});
      for (int e = 0; e < 10; ++e) o.expert_map.as<std::int32_t>()[e] = e % 3 == 0 ? -1 : e % 6;
    }
    testing::LayerInput in =
        testing::make_input(c, DType::bfloat16, true, type == DType::float16 ? testing::kSmall : 1.0f);
    if (i == 1) in.ids = testing::random_ids(c.tokens, c.top_k, 10, 3, true);
    const Tensor got = run_layer(device, w, o, in, type);
    if (device.type == DeviceType::cpu) {
      LayerOptions slots = o;
      slots.combine_order = CombineOrder::slots;
      EXPECT_TRUE(same_bits(got, run_layer(device, w, slots, in, type)));
      continue;
    }
    testing::expect_any_order(got, w, o, in);
    const Tensor before = testing::random_tensor(type, {c.tokens, c.hidden}, 9), sum = Tensor::copy_of(before);
    MoeLayer layer(device, w, o);
    testing::forward(device, layer, in.x, in.ids, in.weights, sum, {.accumulate = true});
    testing::expect_any_order(sum, w, o, in, before);
  }
}

TEST_P(Properties, NeighboursDoNotMatter) {
  LayerCase c;
  c.scheme = scheme;
  c.tokens = 37;
  const MoeWeights w = testing::make_weights(c, c.experts);
  const testing::LayerInput in = testing::make_input(c);
  const Tensor all = run_layer(device, w, {}, in);
  MoeLayer layer(device, w);
  for (const std::int64_t count : {1, 2, 5, 16}) {
    for (std::int64_t t = 0; t + count <= c.tokens; t += 7) {
      Tensor part = Tensor::empty(DType::bfloat16, {count, c.hidden});
      testing::forward(device, layer, in.x.view().slice(t, count), in.ids.view().slice(t, count),
                       in.weights.view().slice(t, count), part);
      ASSERT_EQ(std::memcmp(part.as<char>(), all.as<char>() + static_cast<std::size_t>(t * c.hidden) * 2, part.bytes()),
                0)
          << "tokens " << t << "+" << count;
    }
  }
}

TEST_P(Properties, PermutingTokensPermutesOutputs) {
  LayerCase c;
  c.scheme = scheme;
  c.tokens = 29;
  const MoeWeights w = testing::make_weights(c, c.experts);
  const testing::LayerInput in = testing::make_input(c);
  const Tensor plain = run_layer(device, w, {}, in);
  testing::LayerInput moved{Tensor::empty(DType::bfloat16, in.x.shape()), Tensor::empty(DType::int32, in.ids.shape()),
                            Tensor::empty(DType::float32, in.weights.shape())};
  const auto to = [&](std::int64_t t) { return (t * 12 + 5) % c.tokens; };
  for (std::int64_t t = 0; t < c.tokens; ++t) {
    std::memcpy(moved.x.view().at(to(t)).data(), in.x.view().at(t).data(), static_cast<std::size_t>(c.hidden) * 2);
    std::memcpy(moved.ids.view().at(to(t)).data(), in.ids.view().at(t).data(), static_cast<std::size_t>(c.top_k) * 4);
    std::memcpy(moved.weights.view().at(to(t)).data(), in.weights.view().at(t).data(),
                static_cast<std::size_t>(c.top_k) * 4);
  }
  const Tensor got = run_layer(device, w, {}, moved);
  for (std::int64_t t = 0; t < c.tokens; ++t) {
    ASSERT_EQ(
        std::memcmp(got.view().at(to(t)).data(), plain.view().at(t).data(), static_cast<std::size_t>(c.hidden) * 2), 0)
        << t;
  }
}

TEST_P(Properties, NanAndInfStayInTheirRow) {
  LayerCase c;
  c.scheme = scheme;
  c.tokens = 24;
  const MoeWeights w = testing::make_weights(c, c.experts);
  testing::LayerInput in = testing::make_input(c, DType::bfloat16, false);
  const Tensor clean = run_layer(device, w, {}, in);
  const bool saturating = scheme.kind == SchemeKind::w4a8_fp8 && scheme.activation_scale == ActivationScale::none;
  in.x.as<std::uint16_t>()[5 * c.hidden + 77] = 0x7fc1;                   // NaN
  if (!saturating) in.x.as<std::uint16_t>()[11 * c.hidden + 1] = 0xff80;  // -Inf
  const Tensor got = run_layer(device, w, {}, in);
  for (std::int64_t t = 0; t < c.tokens; ++t) {
    if (t == 5 || (t == 11 && !saturating)) {
      for (std::int64_t n = 0; n < c.hidden; ++n) {
        const std::uint16_t v = got.as<std::uint16_t>()[t * c.hidden + n];
        if (scheme.is_integer() || t == 5)
          ASSERT_EQ(v, 0x7fff) << t << " " << n;
        else
          ASSERT_GE(v & 0x7fff, 0x7f80) << t << " " << n;  // a float product may keep Inf
      }
    } else {
      ASSERT_EQ(std::memcmp(got.view().at(t).data(), clean.view().at(t).data(), static_cast<std::size_t>(c.hidden) * 2),
                0)
          << t;
    }
  }
}

TEST_P(Properties, SkewedSingleAndEmptyRoutings) {
  LayerCase c;
  c.scheme = scheme;
  c.experts = 32;
  c.tokens = 70;
  const MoeWeights w = testing::make_weights(c, c.experts);
  for (int kind = 0; kind < 3; ++kind) {
    testing::LayerInput in = testing::make_input(c);
    for (std::int64_t i = 0; i < c.tokens * c.top_k; ++i) {
      auto& id = in.ids.as<std::int32_t>()[i];
      if (kind == 0) id = -1;                                                              // nobody
      if (kind == 1) id = i % c.top_k == 0 ? 31 : -1;                                      // one expert takes all
      if (kind == 2 && i % c.top_k != 0) id = i < 150 ? 2 + static_cast<int>(i % 2) : id;  // a few take most
    }
    Tensor want = Tensor::zeros(DType::bfloat16, {c.tokens, c.hidden});
    reference::moe_forward(w, {}, in.x, in.ids, in.weights, want);
    expect_reference(run_layer(device, w, {}, in), want, "routing " + std::to_string(kind));
  }
}

TEST_P(Properties, NoTokens) {
  LayerCase c;
  c.scheme = scheme;
  c.tokens = 0;
  const MoeWeights w = testing::make_weights(c, c.experts);
  EXPECT_EQ(run_layer(device, w, {}, testing::make_input(c)).bytes(), 0u);
}

TEST_P(Properties, GroupedGemmOffsetsAndMasked) {
  const std::int64_t experts = 5, n = 112, k = 224, max_rows = 9;
  const Tensor w = testing::random_tensor(DType::float32, {experts, n, k}, 4, 0.1f);
  QuantizedMatrix m = quantize_matrix(scheme, w);
  if (scheme.activation_scale == ActivationScale::static_) {
    m.activation_scale = Tensor::empty(DType::float32, {scheme.is_integer() ? 1 : experts});
    for (std::int64_t i = 0; i < m.activation_scale.elems(); ++i)
      m.activation_scale.as<float>()[i] = 0.04f + 0.01f * static_cast<float>(i);
  }
  const PreparedMatrix b(device, m);
  const Tensor bias = testing::random_tensor(DType::float32, {experts, n}, 6);
  Tensor offsets = Tensor::empty(DType::int32, {experts + 1}), counts = Tensor::empty(DType::int32, {experts});
  const std::int32_t rows[] = {3, 0, 9, 1, 7};
  offsets.as<std::int32_t>()[0] = 0;
  for (int e = 0; e < experts; ++e) {
    counts.as<std::int32_t>()[e] = rows[e];
    offsets.as<std::int32_t>()[e + 1] = offsets.as<std::int32_t>()[e] + rows[e];
  }
  for (const bool with_bias : {false, true}) {
    const GemmOptions o{with_bias ? bias.view() : TensorView(), {}};
    const Tensor a = testing::random_tensor(DType::float32, {20, k}, 5);
    testing::GuardedOutput got(DType::float32, 20, n, device);
    Tensor want = Tensor::zeros(DType::float32, {20, n});
    grouped_gemm({testing::on(device, a), {}, {}, {}}, b, got.view(), Groups::offsets(testing::on(device, offsets)),
                 {testing::on(device, o.bias), {}});
    reference::grouped_gemm(m, {a, {}, {}, {}}, want, Groups::offsets(offsets), o.bias);
    EXPECT_TRUE(got.intact());
    expect_reference(got.dense(), want, "offsets");

    const Tensor a3 = testing::random_tensor(DType::bfloat16, {experts, max_rows, k}, 8);
    Tensor got3 = testing::random_tensor(DType::float32, {experts, max_rows, n}, 9);
    Tensor want3 = Tensor::copy_of(got3);
    testing::gemm(device, {a3, {}, {}, {}}, b, got3, Groups::masked(counts), o);
    reference::grouped_gemm(m, {a3, {}, {}, {}}, want3, Groups::masked(counts), o.bias);
    for (int e = 0; e < experts; ++e) {
      expect_reference(Tensor::copy_of(got3.view().at(e)), Tensor::copy_of(want3.view().at(e)),
                       "masked " + std::to_string(e));
      const std::int64_t rest = (max_rows - rows[e]) * n * 4;
      EXPECT_EQ(std::memcmp(got3.view().at(e).as<float>() + rows[e] * n, want3.view().at(e).as<float>() + rows[e] * n,
                            static_cast<std::size_t>(rest)),
                0)
          << "rows past the count were written";
    }
  }
}

// Integers at both ends of their range, on both sides, the caller's own activations.
void given_activations(const Scheme& scheme, Device device, std::int64_t n, std::int64_t k, std::int64_t rows) {
  const std::int64_t experts = 3;
  QuantizedMatrix m = quantize_matrix(scheme, testing::random_tensor(DType::float32, {experts, n, k}, 4));
  auto* w = m.values.as<std::int8_t>();
  for (std::int64_t i = 0; i < m.values.elems(); ++i) w[i] = i % 5 == 0 ? -128 : (i % 7 == 0 ? 127 : w[i]);
  finish_matrix(m, "b");
  const Tensor a = testing::random_int8({rows, k}, 3, -128, 127);
  for (std::int64_t i = 0; i < a.elems(); ++i) {
    if (i % 3 == 0) a.as<std::int8_t>()[i] = -128;
  }
  const std::int64_t groups = scheme.kind == SchemeKind::int8_block ? m.blocks_k() : m.super_groups();
  Activations act{a, {}, {}, {}};
  Tensor scale = scheme.has_blocks()
                     ? Tensor::empty(DType::float32, {rows, groups})
                     : Tensor::empty(DType::float32, {scheme.activation_scale == ActivationScale::static_ ? 1 : rows});
  for (std::int64_t i = 0; i < scale.elems(); ++i) scale.as<float>()[i] = 0.01f * static_cast<float>(i % 9 + 1);
  act.scale = scale;
  Tensor q, zero;
  if (scheme.kind == SchemeKind::int8_hybrid) {
    q = Tensor::empty(DType::uint8, {rows, m.blocks_k()});
    for (std::int64_t i = 0; i < q.elems(); ++i)
      q.as<std::uint8_t>()[i] = static_cast<std::uint8_t>(1 + i % scheme.q_max);
    act.q = q;
  }
  if (scheme.asymmetric) {
    zero = Tensor::empty(DType::int32, {rows});
    for (std::int64_t i = 0; i < rows; ++i)
      zero.as<std::int32_t>()[i] = static_cast<std::int32_t>(i % 2 ? 127 - i : -128 + i);
    act.zero = zero;
  }
  // Other offsets from call to call, whose workspace may be the same.
  const PreparedMatrix b(device, m);
  for (const std::int64_t split : {std::int64_t{2}, rows - 3}) {
    for (const DType type : {DType::int64, DType::int32}) {
      SCOPED_TRACE(to_string(type));
      Tensor offsets = Tensor::empty(type, {experts + 1});
      const std::int64_t at[] = {0, split, split, rows};
      for (std::int64_t e = 0; e <= experts; ++e) {
        if (type == DType::int64) {
          offsets.as<std::int64_t>()[e] = at[e];
        } else {
          offsets.as<std::int32_t>()[e] = static_cast<std::int32_t>(at[e]);
        }
      }
      Tensor got = Tensor::zeros(DType::float32, {rows, n}), want = Tensor::zeros(DType::float32, {rows, n});
      testing::gemm(device, act, b, got, Groups::offsets(offsets));
      reference::grouped_gemm(m, act, want, Groups::offsets(offsets));
      EXPECT_TRUE(same_bits(got, want));
    }
  }
}
TEST_P(Properties, GivenActivationsIncludingMinus128) {
  if (!scheme.is_integer()) GTEST_SKIP() << "integer schemes";
  // Widths for one GPU family and for both; scales that end inside a word and with one.
  for (const auto& [n, k, rows] : std::vector<std::tuple<std::int64_t, std::int64_t, std::int64_t>>{
           {80, 304, 11}, {96, 272, 12}, {288, 784, 68}}) {
    SCOPED_TRACE(n);
    given_activations(scheme, device, n, k, rows);
  }
}

INSTANTIATE_TEST_SUITE_P(
    Schemes, Properties,
    ::testing::Combine(::testing::Values("int8_channel", "int8_channel:static", "int8_channel:asymmetric",
                                         "int8_channel:per_tensor", "int8_block", "int8_block:block_n=64,block_k=32",
                                         "int8_block:block_k=256", "int8_hybrid",
                                         "int8_hybrid:block=32,super=3,q_max=8",
                                         "int8_hybrid:block=64,super=64,q_max=32", "w4a8_fp8", "w4a8_fp8:group=0",
                                         "w4a8_fp8:static", "w4a8_fp8:none", "bf16", "fp16"),
                       ::testing::ValuesIn(testing::devices())),
    [](const auto& info) {
      std::string name = std::get<0>(info.param) + "_" + to_string(std::get<1>(info.param));
      for (char& c : name) {
        if (!std::isalnum(static_cast<unsigned char>(c))) c = '_';
      }
      return name;
    });

}  // namespace
}  // namespace octomoe
