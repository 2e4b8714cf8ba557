// Every bad argument of the public calls: one clear error, nothing written.
#include <gtest/gtest.h>

#include <cmath>
#include <cstring>

#include "octomoe/layer.h"
#include "quant/matrix.h"
#include "support/errors.h"
#include "support/run.h"

namespace octomoe {
namespace {

using testing::expect_error;
using testing::GuardedOutput;
using testing::LayerCase;

class ForwardErrors : public ::testing::Test {
 protected:
  LayerCase c;
  MoeWeights weights = testing::make_weights(c, c.experts);
  MoeLayer layer{Device::cpu(), weights};
  testing::LayerInput in = testing::make_input(c);
  GuardedOutput out{DType::bfloat16, c.tokens, c.hidden};

  void expect(const std::string& text, TensorView x, TensorView ids, TensorView w, TensorView o) {
    expect_error(text, [&] { layer.forward(x, ids, w, o); });
    Tensor clean = out.dense();
    for (std::size_t i = 0; i < clean.bytes(); ++i)
      ASSERT_EQ(clean.as<std::uint8_t>()[i], GuardedOutput::kInside) << "written in spite of: " << text;
  }
};

TEST_F(ForwardErrors, NameTheArgument) {
  const Tensor f64 = Tensor::zeros(DType::int64, {c.tokens, c.hidden});
  expect("x: expected a tensor, got none", {}, in.ids, in.weights, out.view());
  expect("x: expected shape [*, 128], got [13, 3]", in.ids, in.ids, in.weights, out.view());
  expect("x: expected dtype float32 or float16 or bfloat16, got int64", f64, in.ids, in.weights, out.view());
  expect("topk_ids: expected shape [13, *], got [12, 3]", in.x, in.ids.view().slice(0, 12), in.weights, out.view());
  expect("topk_weights: expected shape [13, 3], got [12, 3]", in.x, in.ids, in.weights.view().slice(0, 12), out.view());
  expect("out: expected shape [13, 128], got [12, 128]", in.x, in.ids, in.weights, out.view().slice(0, 12));
  expect("topk_ids: expected dtype int32 or int64, got float32", in.x, in.weights, in.weights, out.view());
  expect("topk_weights: expected dtype float32, got int32", in.x, in.ids, in.ids, out.view());
  expect("topk_ids: expected a top_k in 1..8", in.x, Tensor::zeros(DType::int32, {c.tokens, 9}),
         Tensor::zeros(DType::float32, {c.tokens, 9}), out.view());
  expect("topk_ids: expected a top_k in 1..8", in.x, Tensor::zeros(DType::int32, {c.tokens, 0}),
         Tensor::zeros(DType::float32, {c.tokens, 0}), out.view());
}

TEST_F(ForwardErrors, StridesAlignmentDeviceOverlap) {
  const Tensor wide = Tensor::zeros(DType::bfloat16, {c.tokens, 2 * c.hidden});
  const TensorView skipping(wide.view().data(), DType::bfloat16, Shape{c.tokens, c.hidden}, Shape{2 * c.hidden, 2});
  expect("x: expected rows that are contiguous", skipping, in.ids, in.weights, out.view());
  const TensorView odd(wide.as<char>() + 1, DType::bfloat16, Shape{c.tokens, c.hidden});
  expect("x: expected data aligned to 2 bytes", odd, in.ids, in.weights, out.view());
  const TensorView on_gpu(in.x.view().data(), DType::bfloat16, in.x.shape(), Device::cuda(0));
  expect("x: expected a tensor on cpu, got one on cuda:0", on_gpu, in.ids, in.weights, out.view());
  const TensorView null(nullptr, DType::bfloat16, in.x.shape());
  expect("x: expected data, got a null pointer", null, in.ids, in.weights, out.view());
  expect("out: expected memory apart from x", in.x, in.ids, in.weights, in.x);
  const TensorView folded(wide.view().data(), DType::bfloat16, Shape{c.tokens, c.hidden}, Shape{0, 1});
  expect("out: expected rows at least 128 elements apart, got 0", in.x, in.ids, in.weights, folded);
}

TEST_F(ForwardErrors, IdsOutOfRangeNameTheirPlace) {
  for (const int bad : {8, -2, 1 << 30}) {
    Tensor ids = Tensor::copy_of(in.ids);
    ids.as<std::int32_t>()[7 * 3 + 2] = bad;
    expect("topk_ids: expected expert ids in -1..7, got " + std::to_string(bad) + " at token 7, slot 2", in.x, ids,
           in.weights, out.view());
  }
}

TEST_F(ForwardErrors, LayerIsUsableAfterwards) {
  expect("topk_weights: expected dtype float32, got int32", in.x, in.ids, in.ids, out.view());
  layer.forward(in.x, in.ids, in.weights, out.view());
  EXPECT_TRUE(out.intact());
}

TEST(LayerErrors, Construction) {
  LayerCase c;
  const MoeWeights w = testing::make_weights(c, c.experts);
  if (!testing::is_here(Device::cuda(0))) {
    try {
      MoeLayer(Device::cuda(0), w);
      FAIL() << "expected an error without a GPU";
    } catch (const Error& e) {
      EXPECT_EQ(e.code(), ErrorCode::unsupported) << e.what();
    }
  }
  const auto with = [&](auto change) {
    LayerOptions o;
    change(o);
    return o;
  };
  Tensor map = Tensor::zeros(DType::int32, {16});
  map.as<std::int32_t>()[5] = 8;
  expect_error("expert_map: expected -1 or a local expert below 8, got 8 for expert 5",
               [&] { MoeLayer(Device::cpu(), w, with([&](auto& o) { o.expert_map = map; })); });
  expect_error("shared_expert: expected one expert of hidden size 128",
               [&] { MoeLayer(Device::cpu(), w, with([&](auto& o) { o.shared_expert = w; })); });
  expect_error("shared_gate: expected none without a shared_expert", [&] {
    MoeLayer(Device::cpu(), w, with([&](auto& o) { o.shared_gate = Tensor::zeros(DType::float32, {128}); }));
  });
  expect_error("threads: expected 0..1024, got -1",
               [&] { MoeLayer(Device::cpu(), w, with([](auto& o) { o.threads = -1; })); });
  expect_error("swiglu_limit: expected a number above 0",
               [&] { MoeLayer(Device::cpu(), w, with([](auto& o) { o.swiglu_limit = 0.0f; })); });
  MoeWeights broken = w;
  broken.w2.scale = Tensor();
  expect_error("w2.scale: expected float32 [8, 128], got none", [&] { MoeLayer(Device::cpu(), broken); });
  broken = w;
  broken.w13.layout = WeightLayout::panels;  // values [8, 192, 128]
  expect_error("w13.values: expected shape [8, 1, 192, 128], got [8, 192, 128]",
               [&] { MoeLayer(Device::cpu(), broken); });
  broken = w;
  broken.w2.layout = WeightLayout::panels;  // K = 96
  expect_error(
      "w2.layout: expected natural (panels need an integer scheme and K a multiple of 128), got panels of K 96",
      [&] { MoeLayer(Device::cpu(), broken); });
  broken = w;
  broken.w13.values = to_panels(w.w13.values);
  expect_error("w13.values: expected shape [8, 192, 128], got [8, 1, 192, 128]",
               [&] { MoeLayer(Device::cpu(), broken); });
  broken.w13.layout = WeightLayout::panels;
  EXPECT_NO_THROW(MoeLayer(Device::cpu(), broken));
  MoeLayer layer(Device::cpu(), w);
  expect_error("top_k: expected 1..8 (the number of experts), got 9", [&] { layer.reserve(4, 9); });
  expect_error("tokens: expected at least 0, got -1", [&] { layer.reserve(-1, 1); });
}

TEST(GroupedGemmErrors, NameTheArgument) {
  const Tensor w = testing::random_tensor(DType::float32, {4, 32, 64}, 1);
  const PreparedMatrix b(Device::cpu(), quantize_matrix(Scheme::int8_channel(), w));
  const Tensor a = testing::random_tensor(DType::bfloat16, {10, 64}, 2), d = Tensor::zeros(DType::float32, {10, 32});
  const auto offsets = [](std::initializer_list<std::int32_t> v) {
    Tensor t = Tensor::empty(DType::int32, {static_cast<std::int64_t>(v.size())});
    std::copy(v.begin(), v.end(), t.as<std::int32_t>());
    return t;
  };
  const Tensor good = offsets({0, 3, 3, 7, 10});
  const auto run = [&](const Activations& act, const TensorView& out, const Groups& g, GemmOptions o = {}) {
    grouped_gemm(act, b, out, g, o);
  };
  run({a, {}, {}, {}}, d, Groups::offsets(good));
  expect_error("expert_offsets: expected 0 first, got 1", [&] {
    run({a, {}, {}, {}}, d, Groups::offsets(offsets({1, 3, 3, 7, 10})));
  });
  expect_error("expert_offsets: expected values that do not decrease, got 2 after 3 at 2", [&] {
    run({a, {}, {}, {}}, d, Groups::offsets(offsets({0, 3, 2, 7, 10})));
  });
  expect_error("expert_offsets: expected 10 (the rows of a) last, got 9", [&] {
    run({a, {}, {}, {}}, d, Groups::offsets(offsets({0, 3, 3, 7, 9})));
  });
  expect_error("expert_offsets: expected shape [5], got [3]", [&] {
    run({a, {}, {}, {}}, d, Groups::offsets(offsets({0, 3, 10})));
  });
  expect_error("a: expected shape [*, 64], got [10, 32]", [&] { run({d, {}, {}, {}}, d, Groups::offsets(good)); });
  expect_error("d: expected shape [10, 32], got [10, 64]", [&] { run({a, {}, {}, {}}, a, Groups::offsets(good)); });
  expect_error("rows_per_expert: expected counts in 0..3, got 4 for expert 1", [&] {
    run({testing::random_tensor(DType::bfloat16, {4, 3, 64}, 3), {}, {}, {}}, Tensor::zeros(DType::float32, {4, 3, 32}),
        Groups::masked(offsets({0, 4, 1, 1})));
  });
  const Tensor q = testing::random_int8({10, 64}, 5);
  expect_error("a.scale: expected a tensor, got none", [&] { run({q, {}, {}, {}}, d, Groups::offsets(good)); });
  expect_error("a.scale: expected shape [10], got [10, 32]", [&] { run({q, d, {}, {}}, d, Groups::offsets(good)); });
  Tensor scale = Tensor::zeros(DType::float32, {10});
  scale.as<float>()[2] = -0.5f;
  expect_error("a.scale: expected scales that are finite and at least 0, got -0.5 at element 2", [&] {
    run({q, scale, {}, {}}, d, Groups::offsets(good));
  });
  expect_error("a.scale: expected none with floating-point activations", [&] {
    run({a, scale, {}, {}}, d, Groups::offsets(good));
  });
  expect_error("bias: expected shape [4, 32], got [10]", [&] {
    run({a, {}, {}, {}}, d, Groups::offsets(good), {scale});
  });
  expect_error("d: expected memory apart from a", [&] {
    run({TensorView(d.view().data(), DType::float32, Shape{5, 64}), {}, {}, {}},
        TensorView(d.view().data(), DType::float32, Shape{5, 32}), Groups::offsets(offsets({0, 1, 2, 3, 5})));
  });
}

}  // namespace
}  // namespace octomoe
