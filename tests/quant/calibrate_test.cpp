// calibrate() against plain statements of its rule.
#include "octomoe/calibrate.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <vector>

#include "octomoe/weights.h"
#include "quant/numerics.h"
#include "quant/reference.h"
#include "support/errors.h"
#include "support/random.h"

namespace octomoe {
namespace {

using testing::expect_error;
using testing::random_ids;
using testing::random_tensor;

constexpr std::int64_t kExperts = 5, kHidden = 96, kInter = 24, kTokens = 19;
constexpr int kTopK = 2;

float at(const Tensor& t, std::int64_t i) {
  return reference::load(t.as<char>() + i * static_cast<std::int64_t>(size_bytes(t.dtype())), t.dtype());
}
std::vector<float> values(const Tensor& t) { return {t.as<float>(), t.as<float>() + t.elems()}; }

// Tokens go to experts 0..3 only.
struct Problem {
  Tensor x = random_tensor(DType::bfloat16, {kTokens, kHidden}, 1);
  Tensor ids = random_ids(kTokens, kTopK, kExperts - 1, 2, true);
  Tensor w13, b13;
  CalibrateOptions options;

  explicit Problem(Activation activation, GateUpOrder order = GateUpOrder::gate_up) {
    const std::int64_t n = is_gated(activation) ? 2 * kInter : kInter;
    w13 = random_tensor(DType::bfloat16, {kExperts, n, kHidden}, 3, 0.02f);
    b13 = random_tensor(DType::float32, {kExperts, n}, 4, 0.1f);
    options.activation = activation;
    options.gate_up_order = order;
    options.b13 = b13;
  }

  // Largest |x| and |act| of each expert, products in float64.
  void peaks(std::vector<double>& x_peak, std::vector<double>& act_peak) const {
    x_peak.assign(kExperts, 0.0);
    act_peak.assign(kExperts, 0.0);
    for (std::int64_t r = 0; r < kTokens * kTopK; ++r) {
      const std::int64_t e = ids.as<std::int32_t>()[r], t = r / kTopK;
      if (e < 0) continue;
      const auto i = static_cast<std::size_t>(e);
      for (std::int64_t c = 0; c < kHidden; ++c)
        x_peak[i] = std::max(x_peak[i], std::fabs(static_cast<double>(at(x, t * kHidden + c))));
      const std::int64_t n = w13.dim(1);
      const auto product = [&](std::int64_t row) {
        double sum = at(b13, e * n + row);
        for (std::int64_t c = 0; c < kHidden; ++c)
          sum +=
              static_cast<double>(at(x, t * kHidden + c)) * static_cast<double>(at(w13, (e * n + row) * kHidden + c));
        return static_cast<float>(sum);
      };
      for (std::int64_t j = 0; j < kInter; ++j) {
        const bool up_first = options.gate_up_order == GateUpOrder::up_gate;
        const float first = product(j), second = is_gated(options.activation) ? product(kInter + j) : 0.0f;
        const float act = reference::activate(options.activation, up_first ? second : first, up_first ? first : second,
                                              options.layer);
        act_peak[i] = std::max(act_peak[i], std::fabs(static_cast<double>(act)));
      }
    }
  }
};

TEST(Calibrate, ScalesAreTheLargestMagnitudes) {
  for (const auto& [activation, order] :
       {std::pair(Activation::swiglu, GateUpOrder::gate_up), std::pair(Activation::swiglu, GateUpOrder::up_gate),
        std::pair(Activation::swigluoai, GateUpOrder::gate_up),
        std::pair(Activation::gelu_erf, GateUpOrder::gate_up)}) {
    SCOPED_TRACE(to_string(activation));
    const Problem p(activation, order);
    std::vector<double> x_peak, act_peak;
    p.peaks(x_peak, act_peak);
    const double x_top = *std::max_element(x_peak.begin(), x_peak.end());
    const double act_top = *std::max_element(act_peak.begin(), act_peak.end());
    constexpr double kBf16 = 1.0 / 128;  // act passes through bf16, and sums round

    const ActivationScales one = calibrate(Scheme::parse("int8_channel:static"), p.w13, p.x, p.ids, p.options);
    ASSERT_EQ(one.x_scale.shape(), Shape({1}));
    ASSERT_EQ(one.act_scale.shape(), Shape({1}));
    EXPECT_EQ(one.x_scale.as<float>()[0], static_cast<float>(x_top) / 127.0f);
    EXPECT_NEAR(one.act_scale.as<float>()[0] * 127.0 / act_top, 1.0, kBf16);

    const ActivationScales each = calibrate(Scheme::parse("w4a8_fp8:static"), p.w13, p.x, p.ids, p.options);
    ASSERT_EQ(each.x_scale.shape(), Shape({kExperts}));
    for (std::size_t e = 0; e < kExperts - 1; ++e) {
      EXPECT_EQ(each.x_scale.as<float>()[e], static_cast<float>(x_peak[e]) / 448.0f) << e;
      EXPECT_NEAR(each.act_scale.as<float>()[e] * 448.0 / act_peak[e], 1.0, kBf16) << e;
    }
    // The last expert saw no row.
    const std::vector<float> x = values(each.x_scale), act = values(each.act_scale);
    EXPECT_EQ(x.back(), *std::max_element(x.begin(), x.end() - 1));
    EXPECT_EQ(act.back(), *std::max_element(act.begin(), act.end() - 1));
  }
}

TEST(Calibrate, ThreadsAndIdTypesChangeNothing) {
  Problem p(Activation::swiglu);
  const Scheme scheme = Scheme::parse("w4a8_fp8:static");
  const ActivationScales want = calibrate(scheme, p.w13, p.x, p.ids, p.options);
  Tensor wide = Tensor::empty(DType::int64, p.ids.shape());
  for (std::int64_t i = 0; i < wide.elems(); ++i) wide.as<std::int64_t>()[i] = p.ids.as<std::int32_t>()[i];
  for (const int threads : {1, 3}) {
    p.options.threads = threads;
    const ActivationScales got = calibrate(scheme, p.w13, p.x, wide, p.options);
    EXPECT_EQ(values(got.x_scale), values(want.x_scale));
    EXPECT_EQ(values(got.act_scale), values(want.act_scale));
  }
}

TEST(Calibrate, RouterWeightsOnInputCount) {
  Problem p(Activation::none);  // act = weight * (x . w)
  p.options.b13 = {};
  const Scheme scheme = Scheme::parse("int8_channel:static");
  const float plain = calibrate(scheme, p.w13, p.x, p.ids, p.options).act_scale.as<float>()[0];
  const Tensor weights = Tensor::empty(DType::float32, p.ids.shape());
  std::fill_n(weights.as<float>(), weights.elems(), 0.25f);
  p.options.topk_weights = weights;
  EXPECT_EQ(calibrate(scheme, p.w13, p.x, p.ids, p.options).act_scale.as<float>()[0], plain);
  p.options.layer.router_weight_on_input = true;
  EXPECT_EQ(calibrate(scheme, p.w13, p.x, p.ids, p.options).act_scale.as<float>()[0], plain / 4);
}

// What it gives is what quantize() takes, zeros too.
TEST(Calibrate, ScalesFitQuantize) {
  for (const char* text : {"int8_channel:static", "int8_channel:per_tensor,static", "w4a8_fp8:group=0,static"}) {
    Problem p(Activation::swiglu);
    p.w13 = random_tensor(DType::bfloat16, {kExperts, 64, kHidden}, 5);
    const Tensor w2 = random_tensor(DType::bfloat16, {kExperts, kHidden, 32}, 6);
    p.options.b13 = {};
    for (const bool zero : {false, true}) {
      if (zero) std::memset(p.x.view().data(), 0, p.x.bytes());
      const ActivationScales s = calibrate(Scheme::parse(text), p.w13, p.x, p.ids, p.options);
      QuantizeOptions options;
      options.x_scale = s.x_scale;
      options.act_scale = s.act_scale;
      EXPECT_NO_THROW(quantize(Scheme::parse(text), p.w13, w2, options)) << text;
    }
  }
}

TEST(Calibrate, ErrorsNameTheArgument) {
  Problem p(Activation::swiglu);
  const Scheme scheme = Scheme::parse("int8_channel:static");
  const auto run = [&](const Scheme& s) { return [&p, s] { calibrate(s, p.w13, p.x, p.ids, p.options); }; };
  expect_error("scheme: expected static activation scales, got int8_channel", run(Scheme::int8_channel()));
  {
    Problem bad = p;
    bad.x = Tensor::copy_of(p.x);
    bad.x.as<std::uint16_t>()[3 * kHidden + 7] = 0x7f80;
    expect_error("x: expected finite values, got inf at row 3, column 7",
                 [&] { calibrate(scheme, bad.w13, bad.x, bad.ids, bad.options); });
  }
  expect_error("x: expected shape", [&] {
    calibrate(scheme, p.w13, random_tensor(DType::float32, {kTokens, kHidden + 1}, 1), p.ids, p.options);
  });
  expect_error("topk_ids: expected shape",
               [&] { calibrate(scheme, p.w13, p.x, random_ids(kTokens + 1, kTopK, kExperts, 1), p.options); });
  Tensor ids = Tensor::copy_of(p.ids);
  ids.as<std::int32_t>()[2 * kTopK + 1] = kExperts;
  expect_error("topk_ids: expected -1 to 4, got 5 at token 2, slot 1",
               [&] { calibrate(scheme, p.w13, p.x, ids, p.options); });
  std::fill_n(ids.as<std::int32_t>(), ids.elems(), -1);
  expect_error("topk_ids: expected at least one row", [&] { calibrate(scheme, p.w13, p.x, ids, p.options); });
  p.options.layer.router_weight_on_input = true;
  expect_error("topk_weights", run(scheme));
}

}  // namespace
}  // namespace octomoe
