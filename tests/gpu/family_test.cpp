// The kernel families (mma.sync, wgmma) compute the same bits as the CPU engine, each where it
// can run; random problems, and a case that a race would break run after run.
#include <gtest/gtest.h>

#include <algorithm>
#include <cstdlib>
#include <random>
#include <string>
#include <vector>

#include "quant/matrix.h"
#include "support/errors.h"
#include "support/run.h"
#include "support/stages.h"

namespace octomoe::testing {
namespace {

bool has_panels(const LayerCase& c) { return c.hidden % kPanelColumns == 0 && c.intermediate % kPanelColumns == 0; }

// Many tiles a CTA, several experts that end inside tiles: what a missing fence or an early release would break.
LayerCase many_tiles(const char* scheme) {
  LayerCase c;
  c.scheme = Scheme::parse(scheme);
  c.experts = 12;
  c.hidden = 512;
  c.intermediate = 384;
  c.tokens = 700;
  c.top_k = 3;
  return c;
}

class Family : public ::testing::Test {
 protected:
  void SetUp() override {
    if (!is_here(kGpu)) GTEST_SKIP() << "no GPU here";
    if (cuda::device_info(0).compute_capability != 90) GTEST_SKIP() << "no SM90 here";
  }

  // w: of the case; making them takes longer than all the rest, so cases that differ in their tokens share them.
  static void expect_same(const LayerCase& c, const MoeWeights& w, LayerOptions o = {}, DType out = DType::bfloat16) {
    SCOPED_TRACE(to_string(c.scheme) + " E" + std::to_string(c.experts) + " H" + std::to_string(c.hidden) + " I" +
                 std::to_string(c.intermediate) + " T" + std::to_string(c.tokens) + " k" + std::to_string(c.top_k) +
                 " " + to_string(c.activation) + " seed " + std::to_string(c.seed));
    const LayerInput in = make_input(c);
    const Tensor want = run_layer(Device::cpu(), w, o, in, out);
    for (const KernelFamily family : {KernelFamily::sm80, KernelFamily::sm90}) {
      o.family = family;
      for (const bool prepack : {false, true}) {
        if (prepack && !has_panels(c)) continue;
        o.prepack = prepack;
        EXPECT_TRUE(same_bits(run_layer(kGpu, w, o, in, out), want))
            << (family == KernelFamily::sm80 ? "sm80" : "sm90") << (prepack ? ", prepacked" : "");
      }
    }
  }
};

const char* const kSchemes[] = {
    "int8_channel",           "int8_channel:static", "int8_channel:asymmetric", "int8_channel:per_tensor", "int8_block",
    "int8_block:block_k=256", "int8_hybrid",         "int8_hybrid:block_k=256", "int8_hybrid:super=3"};

TEST_F(Family, AgreeOnModelShapes) {
  for (const char* scheme : kSchemes) {
    LayerCase c;
    c.scheme = Scheme::parse(scheme);
    c.experts = 16;
    c.hidden = 1024;
    c.intermediate = 768;
    c.top_k = 4;
    const MoeWeights w = make_weights(c, c.experts);
    for (const int tokens : {1, 2, 3, 4, 5, 33, 300, 900}) {
      c.tokens = tokens;
      expect_same(c, w);
    }
  }
}

// One expert with all rows, tiles of every width, K and N that end inside a tile.
TEST_F(Family, AgreeOnEveryTileWidth) {
  for (const char* scheme : {"int8_channel", "int8_hybrid"}) {
    LayerCase c;
    c.scheme = Scheme::parse(scheme);
    c.experts = 1;
    c.hidden = 352;
    c.intermediate = 448;
    c.top_k = 1;
    const MoeWeights w = make_weights(c, c.experts);
    for (int tokens = 7; tokens <= 1500; tokens += 23) {
      c.tokens = tokens;
      expect_same(c, w);
    }
  }
}

// Panels made by the layer, on the host and given; one matrix in panels, the other not; a matrix for grouped_gemm.
TEST_F(Family, PanelsAsTheyCome) {
  for (const char* scheme : {"int8_channel:asymmetric", "int8_block", "int8_hybrid"}) {
    SCOPED_TRACE(scheme);
    LayerCase c;
    c.scheme = Scheme::parse(scheme);
    c.hidden = 384;
    c.intermediate = 256;
    const MoeWeights natural = make_weights(c, c.experts);
    for (const int tokens : {1, 40, 300}) {
      c.tokens = tokens;
      const LayerInput in = make_input(c);
      const Tensor want = run_layer(Device::cpu(), natural, {}, in, DType::bfloat16);
      for (int which = 1; which < 8; ++which) {
        MoeWeights w = natural;
        for (QuantizedMatrix* m : {&w.w13, &w.w2}) {
          if ((which & (m == &w.w13 ? 1 : 2)) == 0) continue;
          m->values = to_panels(m->values);
          m->layout = WeightLayout::panels;
        }
        if ((which & 4) != 0) w.w13.values = on(kGpu, w.w13.values);
        EXPECT_TRUE(same_bits(run_layer(kGpu, w, {}, in, DType::bfloat16), want)) << tokens << " tokens, " << which;
        EXPECT_TRUE(same_bits(run_layer(Device::cpu(), which < 4 ? w : natural, {}, in, DType::bfloat16), want));
      }
    }
  }
  LayerCase odd;
  odd.hidden = 352;
  odd.intermediate = 256;
  LayerOptions o;
  o.prepack = true;
  expect_error(ErrorCode::invalid_argument, "w13: expected K of a multiple of 128 for prepack, got 352",
               [&] { MoeLayer(kGpu, make_weights(odd, odd.experts), o); });
}

TEST_F(Family, FewTokensWithEveryOption) {
  std::mt19937 random(5);
  const int schemes = static_cast<int>(std::size(kSchemes));
  for (int i = 0; i < 12 * schemes; ++i) {
    LayerCase c;
    c.scheme = Scheme::parse(kSchemes[i % schemes]);
    c.tokens = 1 + i / schemes;
    c.top_k = 1 + static_cast<int>(random() % 8);
    c.experts = c.top_k + static_cast<int>(random() % 4);
    c.hidden = 32 * (1 + static_cast<int>(random() % (i % 5 == 0 ? 70 : 16)));
    c.intermediate = 32 * (1 + static_cast<int>(random() % (i % 5 == 1 ? 50 : 16)));
    c.order = i % 3 == 0 ? GateUpOrder::up_gate : GateUpOrder::gate_up;
    c.biases = i % 2 == 0;
    c.seed = static_cast<std::uint32_t>(100 + i);
    LayerOptions o;
    o.router_weight_on_input = i % 5 == 2;
    if (i % 7 == 0) o.swiglu_limit = 1.0f;
    const DType outs[] = {DType::bfloat16, DType::float16, DType::float32};
    expect_same(c, make_weights(c, c.experts), o, outs[i % 3]);
  }
}

TEST_F(Family, WhatTheSm90FamilyRefuses) {
  LayerCase c;
  c.scheme = Scheme::parse("int8_block:block_n=64");
  c.hidden = 128;
  c.intermediate = 96;
  LayerOptions o;
  o.family = KernelFamily::sm90;
  expect_error(ErrorCode::unsupported, "w13: the sm90 family expects block_n of a multiple of 128, got 64",
               [&] { MoeLayer(kGpu, make_weights(c, c.experts), o); });
  c.scheme = Scheme::parse("int8_channel");
  c.hidden = 144;
  expect_error(ErrorCode::unsupported, "w2: the sm90 family expects a multiple of 32 output columns, got 144",
               [&] { MoeLayer(kGpu, make_weights(c, c.experts), o); });
}

// GEMM2's rows are added to out as they come: what is launched, and what becomes of outputs that allow it and of
// others.
TEST_F(Family, AnyOrderIsOneLaunchLess) {
  for (const char* scheme : kSchemes) {
    SCOPED_TRACE(scheme);
    LayerCase c;
    c.scheme = Scheme::parse(scheme);
    c.experts = 16;
    c.hidden = 1024;
    c.intermediate = 384;
    c.top_k = 4;
    LayerOptions o;
    o.family = KernelFamily::sm90;
    o.combine_order = CombineOrder::any;
    const MoeWeights w = make_weights(c, c.experts);
    MoeLayer layer(kGpu, w, o);
    for (const int tokens : {33, 900}) {
      c.tokens = tokens;
      const LayerInput in = make_input(c, DType::bfloat16, true, kSmall);
      const Tensor x = on(kGpu, in.x), ids = on(kGpu, in.ids), weights = on(kGpu, in.weights);
      for (const DType type : {DType::bfloat16, DType::float16, DType::float32}) {
        const Tensor out = nan_tensor(type, {c.tokens, c.hidden}, kGpu);
        Stages stages;
        {
          const cuda::Observe observe(stages);
          layer.forward(x, ids, weights, out);
        }
        const bool adds = type != DType::float32 && !c.scheme.asymmetric;
        EXPECT_EQ(stages.count("combine"), adds ? 0 : 1) << to_string(type);
        const Tensor got = Tensor::copy_of(out);
        if (adds) {
          expect_any_order(got, w, o, in);
        } else {
          EXPECT_TRUE(same_bits(got, run_layer(Device::cpu(), w, o, in, type)));
        }
      }
    }
  }
}

// Calls follow one another without a wait, into the same memory, some of them from the layer's graphs: outputs that are
// added to, and those for which the layer adds in the order of the slots, bit for bit.
TEST_F(Family, AnyOrderCallAfterCall) {
  for (const char* scheme : {"int8_channel", "int8_block", "int8_hybrid"}) {
    SCOPED_TRACE(scheme);
    const LayerCase c = many_tiles(scheme);
    LayerOptions o;
    o.combine_order = CombineOrder::any;
    const MoeWeights w = make_weights(c, c.experts);
    MoeLayer layer(kGpu, w, o);
    LayerInput in = make_input(c);
    const Tensor x = on(kGpu, in.x), ids = on(kGpu, in.ids), weights = on(kGpu, in.weights);
    const Tensor want = run_layer(Device::cpu(), w, o, in),
                 want_float = run_layer(Device::cpu(), w, o, in, DType::float32);
    const Tensor out = nan_tensor(DType::bfloat16, {c.tokens, c.hidden}, kGpu),
                 sum = nan_tensor(DType::bfloat16, {c.tokens, c.hidden}, kGpu);
    const Tensor exact = nan_tensor(DType::float32, {c.tokens, c.hidden}, kGpu);
    const Tensor wide = nan_tensor(DType::bfloat16, {c.tokens, c.hidden + 1}, kGpu);  // rows that begin anywhere
    const auto without_last = [&](const Tensor& t) {
      return TensorView(t.view().data(), DType::bfloat16, Shape{c.tokens, c.hidden}, Shape{c.hidden + 1, 1},
                        t.device());
    };
    for (int i = 0; i < 300; ++i) {
      layer.forward(x, ids, weights, out);
      if (i % 10 == 0) layer.forward(x, ids, weights, exact);
      if (i % 10 == 5) layer.forward(x, ids, weights, without_last(wide));
      if (i % 10 == 8) layer.forward(x, ids, weights, sum);
      if (i % 100 == 99 || i < 5) expect_any_order(Tensor::copy_of(out), w, o, in);
    }
    EXPECT_TRUE(same_bits(Tensor::copy_of(exact), want_float));
    const Tensor wide_here = Tensor::copy_of(wide);
    EXPECT_TRUE(same_bits(Tensor::copy_of(without_last(wide_here)), want));
    const Tensor before = Tensor::copy_of(sum);
    expect_any_order(before, w, o, in);
    layer.forward(x, ids, weights, sum, {.accumulate = true});
    expect_any_order(Tensor::copy_of(sum), w, o, in, before);

    for (std::int64_t i = 0; i < in.ids.elems(); ++i) in.ids.as<std::int32_t>()[i] = -1;
    const Tensor none = nan_tensor(DType::bfloat16, {c.tokens, c.hidden}, kGpu);
    layer.forward(x, on(kGpu, in.ids), weights, none);
    EXPECT_TRUE(same_bits(Tensor::copy_of(none), Tensor::zeros(DType::bfloat16, {c.tokens, c.hidden})));
  }
}

// What cannot be added, or is not: the bits of the slots' order.
TEST_F(Family, AnyOrderElsewhereIsThatOfTheSlots) {
  LayerCase c;
  c.scheme = Scheme::parse("int8_channel");
  c.hidden = 256;
  c.intermediate = 192;
  LayerOptions o;
  o.combine_order = CombineOrder::any;
  const auto expect_slots = [&](int tokens, bool biases, KernelFamily family) {
    c.tokens = tokens;
    c.biases = biases;
    o.family = family;
    const MoeWeights w = make_weights(c, c.experts);
    const LayerInput in = make_input(c);
    EXPECT_TRUE(same_bits(run_layer(kGpu, w, o, in), run_layer(Device::cpu(), w, o, in))) << tokens << biases;
  };
  expect_slots(2, false, KernelFamily::automatic);
  expect_slots(300, true, KernelFamily::sm90);
  expect_slots(300, false, KernelFamily::sm80);
}

TEST_F(Family, ThousandRunsAreOneResult) {
  for (const char* scheme : {"int8_channel", "int8_hybrid"}) {
    const LayerCase c = many_tiles(scheme);
    LayerOptions o;
    o.family = KernelFamily::sm90;
    MoeLayer layer(kGpu, make_weights(c, c.experts), o);
    const LayerInput in = make_input(c);
    const Tensor x = on(kGpu, in.x), ids = on(kGpu, in.ids), weights = on(kGpu, in.weights);
    const Tensor out = Tensor::empty(DType::bfloat16, {c.tokens, c.hidden}, kGpu);
    layer.forward(x, ids, weights, out);
    const Tensor want = Tensor::copy_of(out);
    for (int i = 0; i < 1000; ++i) {
      layer.forward(x, ids, weights, out);
      if (i % 100 == 99 || i < 3) {
        ASSERT_TRUE(same_bits(Tensor::copy_of(out), want)) << scheme << " run " << i;
      }
    }
  }
}

// OCTOMOE_FUZZ_PROBLEMS random layers (scripts/gpu.sh fuzz runs 100000), both families against the CPU engine.
TEST_F(Family, RandomProblems) {
  const char* text = std::getenv("OCTOMOE_FUZZ_PROBLEMS");
  const int problems = text != nullptr ? std::atoi(text) : 200;
  const char* seed_text = std::getenv("OCTOMOE_FUZZ_SEED");
  std::mt19937 random(seed_text != nullptr ? static_cast<unsigned>(std::atoi(seed_text)) : 1);
  const auto upto = [&](int n) { return static_cast<int>(random() % static_cast<unsigned>(n)); };
  Checked checked;
  for (int i = 0; i < problems && !HasFailure(); ++i) {
    LayerCase c;
    c.scheme = Scheme::parse(kSchemes[upto(static_cast<int>(std::size(kSchemes)))]);
    c.activation = upto(3) == 0 ? static_cast<Activation>(upto(10)) : Activation::swiglu;
    c.order = upto(2) ? GateUpOrder::up_gate : GateUpOrder::gate_up;
    c.biases = upto(3) == 0;
    c.top_k = 1 + upto(6);
    c.experts = c.top_k + upto(6);
    c.tokens = upto(3) == 0 ? 1 + upto(5) : 1 + upto(upto(4) == 0 ? 300 : 60);
    c.hidden = 32 * (1 + upto(upto(8) == 0 ? 32 : 8));
    c.intermediate = 32 * (1 + upto(upto(8) == 0 ? 32 : 8));
    if (upto(4) == 0) {  // whole panels
      c.hidden = (c.hidden + 127) / 128 * 128;
      c.intermediate = (c.intermediate + 127) / 128 * 128;
    }
    c.seed = random() % 1000003;
    LayerOptions o;
    o.router_weight_on_input = upto(6) == 0;
    if (c.activation == Activation::swiglu && upto(6) == 0) o.swiglu_limit = 0.5f;
    o.prepack = has_panels(c) && upto(2) == 0;
    o.fused_gather = upto(8) != 0;
    o.fused_activation = upto(8) != 0;
    o.fused_requantize = upto(4) != 0;
    const bool any_order = upto(4) == 0;
    const DType outs[] = {DType::bfloat16, DType::float16, DType::float32};
    const DType out = outs[upto(3)];
    const MoeWeights w = make_weights(c, c.experts);
    const LayerInput in = make_input(c, outs[upto(3)]);
    const Tensor want = run_layer(Device::cpu(), w, o, in, out);
    for (const KernelFamily family : {KernelFamily::sm80, KernelFamily::automatic}) {
      o.family = family;
      EXPECT_TRUE(same_bits(run_layer(kGpu, w, o, in, out), want))
          << "problem " << i << ": " << to_string(c.scheme) << " " << to_string(c.activation) << " E" << c.experts
          << " H" << c.hidden << " I" << c.intermediate << " T" << c.tokens << " k" << c.top_k << " seed " << c.seed
          << (family == KernelFamily::sm80 ? " sm80" : " automatic") << (o.prepack ? " prepacked" : "");
    }
    if (any_order && out != DType::float32) {
      SCOPED_TRACE(::testing::Message() << "problem " << i << ", in any order, " << to_string(c.scheme) << " seed "
                                        << c.seed);
      o.combine_order = CombineOrder::any;
      const LayerInput small = make_input(c, DType::bfloat16, true, kSmall);
      expect_any_order(run_layer(kGpu, w, o, small, out), w, o, small, {}, &checked);
    }
  }
  // Biases do not shrink with x: with them whole problems may leave fp16's range.
  EXPECT_GE(checked.values, checked.all / 2);
}

}  // namespace
}  // namespace octomoe::testing
