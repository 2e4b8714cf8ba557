// Whole layers on the CPU engine against the plain reference: bit for bit for the integer schemes.
#include <gtest/gtest.h>

#include <cmath>
#include <cstring>
#include <limits>
#include <memory>
#include <utility>

#include "cpu/isa.h"
#include "quant/numerics.h"
#include "support/isa.h"
#include "support/panels.h"
#include "support/run.h"

namespace octomoe::testing {
namespace {

std::vector<Scheme> integer_schemes() {
  std::vector<Scheme> s;
  for (const char* text : {"int8_channel", "int8_channel:static", "int8_channel:asymmetric", "int8_channel:per_tensor",
                           "int8_block", "int8_block:block=32", "int8_block:block_n=24,block_k=96", "int8_hybrid",
                           "int8_hybrid:block=32,super=2", "int8_hybrid:block_n=40,block_k=64,super=3,q_max=64"}) {
    s.push_back(Scheme::parse(text));
  }
  return s;
}

std::vector<Scheme> float_schemes() {
  std::vector<Scheme> s;
  for (const char* text :
       {"w4a8_fp8", "w4a8_fp8:group=0", "w4a8_fp8:static", "w4a8_fp8:none,group=32", "bf16", "fp16"}) {
    s.push_back(Scheme::parse(text));
  }
  return s;
}

Tensor reference_layer(const MoeWeights& w, const LayerOptions& o, const LayerInput& in, DType out_dtype) {
  Tensor out = Tensor::empty(out_dtype, {in.x.dim(0), w.hidden()});
  reference::moe_forward(w, o, in.x, in.ids, in.weights, out);
  return out;
}

// The engine's order of additions may move one rounding to bf16 or fp16 of h or y, and with it a quantised value.
double bound_of(const Scheme& s) { return s.kind == SchemeKind::w4a8_fp8 ? 1e-2 : 3e-3; }

// fp16 overflows at 65504, where the reference's infinities say nothing about errors: smaller values for it.
MoeWeights weights_for(const LayerCase& c, std::int64_t experts) {
  MoeWeights w = make_weights(c, experts);
  if (c.scheme.kind != SchemeKind::fp16) return w;
  for (const Tensor& t : {w.w13.values, w.w2.values}) {
    for (std::int64_t i = 0; i < t.elems(); ++i) {
      auto& v = t.as<std::uint16_t>()[i];
      v = num::float_to_fp16(num::fp16_to_float(v) / 64);
    }
  }
  return w;
}
LayerInput input_for(const LayerCase& c, DType x, bool holes = true) {
  LayerInput in = make_input(c, x, holes);
  if (c.scheme.kind == SchemeKind::fp16) in.x = random_tensor(x, {c.tokens, c.hidden}, c.seed * 10 + 5, 0x1p-12f);
  return in;
}

void expect_layer(const LayerCase& c, LayerOptions o, const LayerInput& in, DType out_dtype) {
  const MoeWeights w = weights_for(c, c.experts);
  const Tensor want = reference_layer(w, o, in, out_dtype);
  const Tensor got = run_layer(Device::cpu(), w, std::move(o), in, out_dtype);
  if (c.scheme.is_integer()) {
    EXPECT_TRUE(same_bits(want, got)) << reference::relative_error(got, want);
  } else {
    EXPECT_LT(reference::relative_error(got, want), bound_of(c.scheme));
  }
}

void expect_layer(const LayerCase& c, LayerOptions o = {}, DType x = DType::bfloat16, DType out = DType::bfloat16) {
  expect_layer(c, std::move(o), input_for(c, x), out);
}

class OnIsa : public ::testing::TestWithParam<cpu::Isa> {
 protected:
  ForcedIsa force_{GetParam()};
};

TEST_P(OnIsa, EverySchemeAndShape) {
  const struct {
    std::int64_t hidden, intermediate, tokens;
  } shapes[] = {{128, 96, 13}, {64, 64, 1}, {192, 352, 5}, {448, 192, 40}, {96, 704, 2}};
  std::uint32_t seed = 1;
  std::vector<Scheme> all = integer_schemes();
  for (const Scheme& s : float_schemes()) all.push_back(s);
  for (const Scheme& s : all) {
    for (const auto& shape : shapes) {
      SCOPED_TRACE(to_string(s) + " H " + std::to_string(shape.hidden) + " I " + std::to_string(shape.intermediate));
      LayerCase c;
      c.scheme = s;
      c.hidden = shape.hidden;
      c.intermediate = shape.intermediate;
      c.tokens = shape.tokens;
      c.experts = 5;
      c.seed = seed++;
      expect_layer(c);
    }
  }
}

// Few experts: many rows each, several tiles and row blocks.
TEST_P(OnIsa, ManyRowsOfOneExpert) {
  for (const char* scheme :
       {"int8_channel:asymmetric", "int8_block", "int8_hybrid:block=32,super=2", "w4a8_fp8", "bf16"}) {
    SCOPED_TRACE(scheme);
    LayerCase c;
    c.scheme = Scheme::parse(scheme);
    c.experts = 2;
    c.top_k = 2;
    c.hidden = 128;
    c.intermediate = 64;
    c.tokens = 131;
    expect_layer(c);
  }
}

// The extreme integers everywhere: a saturating instruction is found out.
TEST_P(OnIsa, MinusOneHundredAndTwentyEight) {
  for (const int value : {-128, 127}) {
    const std::int64_t experts = 2, hidden = 256, inter = 64;
    const auto full = [&](Shape shape) {
      Tensor t = Tensor::empty(DType::int8, shape);
      std::memset(t.as<std::int8_t>(), value, t.bytes());
      return t;
    };
    const auto ones = [&](Shape shape) {
      Tensor t = Tensor::empty(DType::float32, shape);
      for (std::int64_t i = 0; i < t.elems(); ++i) t.as<float>()[i] = 0x1p-10f;
      return t;
    };
    const MoeWeights w = MoeWeights::from_int8_channel(full({experts, 2 * inter, hidden}), ones({experts, 2 * inter}),
                                                       full({experts, hidden, inter}), ones({experts, hidden}));
    LayerCase c;
    c.experts = experts;
    c.hidden = hidden;
    c.intermediate = inter;
    c.top_k = 2;
    LayerInput in = make_input(c, DType::float32);
    for (std::int64_t i = 0; i < in.x.elems(); ++i) in.x.as<float>()[i] = i % 7 == 0 ? -1.0f : 1.0f;
    EXPECT_TRUE(
        same_bits(reference_layer(w, {}, in, DType::float32), run_layer(Device::cpu(), w, {}, in, DType::float32)));
  }
}

// The layout in which weights come changes no bit.
TEST_P(OnIsa, WeightsInPanels) {
  std::uint32_t seed = 50;
  for (const Scheme& s : integer_schemes()) {
    SCOPED_TRACE(to_string(s));
    LayerCase c;
    c.scheme = s;
    c.hidden = 384;
    c.intermediate = 256;
    c.experts = 3;
    c.top_k = 2;
    c.seed = seed++;
    const MoeWeights w = make_weights(c, c.experts);
    const LayerInput in = make_input(c);
    const Tensor want = reference_layer(w, {}, in, DType::bfloat16);
    EXPECT_TRUE(same_bits(want, reference_layer(in_panels(w), {}, in, DType::bfloat16)));
    for (const auto& [w13, w2] : {std::pair{true, true}, std::pair{true, false}, std::pair{false, true}}) {
      EXPECT_TRUE(same_bits(want, run_layer(Device::cpu(), in_panels(w, w13, w2), {}, in))) << w13 << w2;
    }
  }
}

INSTANTIATE_TEST_SUITE_P(Cpu, OnIsa, ::testing::ValuesIn(cpu::available_isas()),
                         [](const auto& info) { return std::string(cpu::to_string(info.param)); });

TEST(CpuLayer, EveryActivation) {
  for (int a = 0; a <= static_cast<int>(Activation::none); ++a) {
    for (const GateUpOrder order : {GateUpOrder::gate_up, GateUpOrder::up_gate}) {
      for (const bool biases : {false, true}) {
        SCOPED_TRACE(std::string(to_string(static_cast<Activation>(a))) + " " + to_string(order));
        LayerCase c;
        c.activation = static_cast<Activation>(a);
        c.order = order;
        c.biases = biases;
        c.seed = 20 + static_cast<std::uint32_t>(a);
        expect_layer(c);
        LayerOptions limited;
        if (c.activation == Activation::swiglu || c.activation == Activation::swigluoai) limited.swiglu_limit = 0.5f;
        limited.swiglu_alpha = 1.3f;
        expect_layer(c, limited);
        c.scheme = Scheme::int8_hybrid();
        expect_layer(c, {}, DType::float32, DType::float16);
      }
    }
  }
}

TEST(CpuLayer, EveryDtypeAndThreadCount) {
  for (const DType x : {DType::float32, DType::float16, DType::bfloat16}) {
    for (const DType out : {DType::float32, DType::float16, DType::bfloat16}) {
      for (const int threads : {1, 2, 3, 5}) {
        LayerCase c;
        c.tokens = 37;
        LayerOptions o;
        o.threads = threads;
        expect_layer(c, o, x, out);
        c.scheme = Scheme::int8_block();
        expect_layer(c, o, x, out);
      }
    }
  }
}

// Float schemes: the same bits for every thread count, and for a token alone or among others.
TEST(CpuLayer, ThreadsAndNeighboursDoNotMatter) {
  for (const char* scheme : {"bf16", "fp16", "w4a8_fp8", "int8_channel", "int8_hybrid"}) {
    SCOPED_TRACE(scheme);
    LayerCase c;
    c.scheme = Scheme::parse(scheme);
    c.tokens = 50;
    c.experts = 4;
    c.hidden = 1088;  // more than one slice of K
    const MoeWeights w = make_weights(c, c.experts);
    const LayerInput in = make_input(c);
    LayerOptions one;
    one.threads = 1;
    const Tensor all = run_layer(Device::cpu(), w, one, in);
    for (const int threads : {2, 5}) {
      LayerOptions o;
      o.threads = threads;
      EXPECT_TRUE(same_bits(all, run_layer(Device::cpu(), w, o, in)));
    }
    for (const std::int64_t t : {std::int64_t{0}, std::int64_t{7}, c.tokens - 1}) {
      const LayerInput single{Tensor::copy_of(in.x.view().slice(t, 1)), Tensor::copy_of(in.ids.view().slice(t, 1)),
                              Tensor::copy_of(in.weights.view().slice(t, 1))};
      EXPECT_TRUE(same_bits(Tensor::copy_of(all.view().slice(t, 1)), run_layer(Device::cpu(), w, {}, single)));
    }
  }
}

TEST(CpuLayer, Options) {
  std::vector<Scheme> all = integer_schemes();
  for (const Scheme& s : float_schemes()) all.push_back(s);
  for (const Scheme& s : all) {
    SCOPED_TRACE(to_string(s));
    LayerCase c;
    c.scheme = s;
    c.biases = s.kind != SchemeKind::fp16;  // the test's biases, 100 times larger in some rows, overflow there
    LayerOptions on_input;
    on_input.router_weight_on_input = true;
    expect_layer(c, on_input);

    LayerOptions with_shared;
    LayerCase shared = c;
    shared.experts = 1;
    shared.intermediate = 160;
    shared.seed = 9;
    with_shared.shared_expert = weights_for(shared, 1);
    with_shared.shared_gate = random_tensor(DType::bfloat16, {c.hidden}, 77, 0.1f);
    expect_layer(c, with_shared);
    with_shared.shared_gate = {};
    with_shared.router_weight_on_input = true;
    expect_layer(c, with_shared, DType::float16, DType::float32);
  }
}

TEST(CpuLayer, PanelsOfASharedExpertAndOfASingleHalf) {
  for (const Activation activation : {Activation::swiglu, Activation::relu2}) {
    LayerCase c;
    c.hidden = 256;
    c.intermediate = 128;
    c.activation = activation;
    c.order = GateUpOrder::up_gate;
    c.biases = true;
    LayerCase shared = c;
    shared.intermediate = 384;
    const MoeWeights w = make_weights(c, c.experts);
    const LayerInput in = make_input(c);
    LayerOptions natural, panels;
    natural.shared_expert = make_weights(shared, 1);
    panels.shared_expert = in_panels(*natural.shared_expert);
    panels.threads = 3;
    EXPECT_TRUE(
        same_bits(run_layer(Device::cpu(), w, natural, in), run_layer(Device::cpu(), in_panels(w), panels, in)));
  }
}

// As the natural layout: gone once packed, unless the layer is to keep it.
TEST(CpuLayer, PanelsAreReleasedOncePacked) {
  LayerCase c;
  c.intermediate = 128;
  for (const bool keep : {false, true}) {
    MoeWeights w = in_panels(make_weights(c, c.experts));
    const auto first = std::make_shared<Tensor>(w.w13.values), second = std::make_shared<Tensor>(w.w2.values);
    w.w13.values = Tensor::wrap(first->view(), first);
    w.w2.values = Tensor::wrap(second->view(), second);
    LayerOptions o;
    o.keep_weights = keep;
    const MoeLayer layer(Device::cpu(), std::move(w), o);
    EXPECT_EQ(first.use_count(), keep ? 2 : 1);
    EXPECT_EQ(second.use_count(), keep ? 2 : 1);
  }
}

TEST(CpuLayer, ExpertMapAndWideIds) {
  LayerCase c;
  c.experts = 4;
  LayerOptions o;
  o.expert_map = Tensor::empty(DType::int32, {12});
  for (int i = 0; i < 12; ++i) o.expert_map.as<std::int32_t>()[i] = i % 3 == 0 ? i / 3 : -1;
  LayerInput in = make_input(c);
  const Tensor narrow = random_ids(c.tokens, c.top_k, 12, 5, true);
  in.ids = Tensor::empty(DType::int64, {c.tokens, c.top_k});
  for (std::int64_t i = 0; i < in.ids.elems(); ++i) in.ids.as<std::int64_t>()[i] = narrow.as<std::int32_t>()[i];
  expect_layer(c, o, in, DType::bfloat16);
  for (std::int64_t i = 0; i < in.ids.elems(); ++i) in.ids.as<std::int64_t>()[i] = -1;  // nothing here: zeros
  expect_layer(c, o, in, DType::float32);
}

TEST(CpuLayer, Accumulates) {
  for (const DType out : {DType::float32, DType::bfloat16}) {
    LayerCase c;
    const MoeWeights w = make_weights(c, c.experts);
    const LayerInput in = make_input(c);
    Tensor want = random_tensor(out, {c.tokens, c.hidden}, 3), got = Tensor::copy_of(want);
    reference::moe_forward(w, {}, in.x, in.ids, in.weights, want, true);
    MoeLayer(Device::cpu(), w).forward(in.x, in.ids, in.weights, got, {.accumulate = true});
    EXPECT_TRUE(same_bits(want, got));
  }
}

TEST(CpuLayer, NanAndInfPoisonTheirOwnRowOnly) {
  std::vector<Scheme> all = integer_schemes();
  for (const Scheme& s : float_schemes()) all.push_back(s);
  for (const Scheme& s : all) {
    SCOPED_TRACE(to_string(s));
    LayerCase c;
    c.scheme = s;
    c.tokens = 24;
    c.experts = 3;
    const MoeWeights w = weights_for(c, c.experts);
    LayerInput in = input_for(c, DType::float32, false);
    const Tensor clean = run_layer(Device::cpu(), w, {}, in);
    in.x.as<float>()[5 * c.hidden + 17] = std::numeric_limits<float>::quiet_NaN();
    in.x.as<float>()[11 * c.hidden + 3] = std::numeric_limits<float>::infinity();
    const Tensor got = run_layer(Device::cpu(), w, {}, in);
    if (s.is_integer()) {
      EXPECT_TRUE(same_bits(reference_layer(w, {}, in, DType::bfloat16), got));
    }
    for (std::int64_t t = 0; t < c.tokens; ++t) {
      if (t == 5) {
        for (std::int64_t i = 0; i < c.hidden; ++i) EXPECT_EQ(got.as<std::uint16_t>()[t * c.hidden + i], 0x7fff);
      } else if (t != 11) {
        EXPECT_EQ(std::memcmp(got.as<std::uint16_t>() + t * c.hidden, clean.as<std::uint16_t>() + t * c.hidden,
                              static_cast<std::size_t>(c.hidden) * 2),
                  0)
            << "row " << t;
      }
    }
  }
}

// More routes than one chunk of the workspace.
TEST(CpuLayer, ManyTokensGoInChunks) {
  LayerCase c;
  c.hidden = 32;
  c.intermediate = 16;
  c.experts = 4;
  c.top_k = 4;
  c.tokens = 9001;
  expect_layer(c);
  const MoeWeights w = make_weights(c, c.experts);
  const MoeLayer layer(Device::cpu(), w);
  EXPECT_EQ(layer.workspace_bytes(8192, 4), layer.workspace_bytes(65536, 4));
  EXPECT_EQ(layer.workspace_bytes(0, 4), 0u);
}

TEST(CpuLayer, NoTokens) {
  LayerCase c;
  c.tokens = 0;
  expect_layer(c);
}

}  // namespace
}  // namespace octomoe::testing
