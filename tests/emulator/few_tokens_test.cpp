// kernels/sm90/few_tokens.cuh: both kernels after another against the CPU engine's layer, bit for bit.
#include "emulator/kernel_table.h"
#include "emulator/kernels.h"
#include "plan/catalogue.h"
#include "quant/matrix.h"
#include "support/run.h"

namespace octomoe::emulator {
namespace {

using kernels::FewMatrix;
using kernels::Promotion;
using kernels::Routes;
using testing::LayerCase;
using testing::LayerInput;

struct Options {
  DType x = DType::bfloat16, out = DType::bfloat16;
  bool weight_on_input = false, accumulate = false, map = false, wide_ids = false;
  float limit = 0;  // 0: none
  int ctas = 5;     // stand for the GPU's multiprocessors
  int stage_columns = kernels::kFewMaxStageColumns, stages = 3;
  bool ones = false;  // x and weights: sums as large as they can be
  bool panels = false;
  bool small_ring = false;  // gate_up's: two stages
};

// values: of m, or in panels.
FewMatrix matrix(const QuantizedMatrix& m, const Tensor& bias, const Tensor& values) {
  const auto i32 = [](std::int64_t v) { return static_cast<std::int32_t>(v); };
  return {.w = values.as<std::int8_t>(),
          .scale = m.scale.as<float>(),
          .bias = bias.as<float>(),
          .column_sum = m.scheme.asymmetric ? m.column_sum.as<std::int32_t>() : nullptr,
          .static_scale = m.activation_scale.as<float>(),
          .q = m.q.as<std::uint8_t>(),
          .n = i32(m.n),
          .k = i32(m.k),
          .per_tensor = m.scheme.per_tensor,
          .w_row = values.view().rank() == 4 ? 128 : i32(m.k),
          .w_panel = values.view().rank() == 4 ? i32(m.n) * 128 : 128,
          .block_n = m.scheme.block_n,
          .block_k = m.scheme.block_k,
          .block_n_inverse = kernels::few_inverse(m.scheme.block_n),
          .blocks_n = i32(m.blocks_n()),
          .blocks_k = i32(m.blocks_k()),
          .super_groups = i32(m.super_groups()),
          .super_group = m.scheme.super_group,
          .flush_blocks = i32(m.flush_blocks),
          .q_max = m.scheme.q_max};
}

Promotion promotion(const QuantizedMatrix& m) {
  return m.scheme.kind == SchemeKind::int8_channel ? Promotion::channel
         : m.scheme.kind == SchemeKind::int8_block ? Promotion::block
                                                   : Promotion::hybrid;
}

void gate_up_kernel(Promotion p, const kernels::FewGateUpArgs& args) {
  p == Promotion::channel ? sm90::few_gate_up<Promotion::channel>(args)
  : p == Promotion::block ? sm90::few_gate_up<Promotion::block>(args)
                          : sm90::few_gate_up<Promotion::hybrid>(args);
}
template <Promotion P>
void down_kernel(const kernels::FewDownArgs& args) {
  kernels::few_column_lanes(P, args.w2.k) == 4 ? sm90::few_down<P, 4>(args) : sm90::few_down<P, 8>(args);
}
void down_kernel(Promotion p, const kernels::FewDownArgs& args) {
  p == Promotion::channel ? sm90::few_down<Promotion::channel, 8>(args)
  : p == Promotion::block ? down_kernel<Promotion::block>(args)
                          : down_kernel<Promotion::hybrid>(args);
}

Tensor ones(Shape shape) {
  const Tensor t = Tensor::empty(DType::float32, shape);
  std::fill_n(t.as<float>(), t.elems(), 1.0f / 64);
  return t;
}

void check(LayerCase c, const Options& o, const LayerInput* given = nullptr) {
  const LayerInput in = given != nullptr ? *given : testing::make_input(c, o.x);
  const std::int64_t experts = o.map ? c.experts / 2 : c.experts;
  const MoeWeights weights = o.ones ? quantize(c.scheme, ones({experts, 2 * c.intermediate, c.hidden}),
                                               ones({experts, c.hidden, c.intermediate}))
                                    : testing::make_weights(c, experts);
  if (o.ones) {
    std::fill_n(in.x.as<std::uint16_t>(), in.x.elems(), std::uint16_t{0x3f80});
    EXPECT_LT(weights.w13.flush_blocks, weights.w13.blocks_k());
    EXPECT_LT(weights.w2.flush_blocks, weights.w2.blocks_k());
  }
  LayerOptions options;
  options.router_weight_on_input = o.weight_on_input;
  if (o.limit > 0) options.swiglu_limit = o.limit;
  if (o.map) {  // every second expert is elsewhere, the others in reverse
    options.expert_map = Tensor::empty(DType::int32, {c.experts});
    for (int e = 0; e < c.experts; ++e) {
      options.expert_map.as<std::int32_t>()[e] = e % 2 != 0 ? -1 : static_cast<int>(c.experts) / 2 - 1 - e / 2;
    }
  }
  const Tensor before = testing::random_tensor(o.out, {c.tokens, c.hidden}, 77);
  const Tensor want = Tensor::copy_of(before);
  MoeLayer(Device::cpu(), weights, options).forward(in.x, in.ids, in.weights, want, {.accumulate = o.accumulate});

  const auto tokens = static_cast<std::int32_t>(c.tokens);
  std::vector<std::int64_t> wide;
  for (std::int64_t i = 0; i < in.ids.elems(); ++i) wide.push_back(in.ids.as<std::int32_t>()[i]);
  const Routes routes{.topk_ids = o.wide_ids ? static_cast<const void*>(wide.data()) : in.ids.as<std::int32_t>(),
                      .ids_stride = c.top_k,
                      .ids_are_64 = o.wide_ids,
                      .tokens = tokens,
                      .top_k = c.top_k,
                      .expert_map = options.expert_map.as<std::int32_t>(),
                      .id_limit = static_cast<std::int32_t>(c.experts),
                      .topk_weights = in.weights.as<float>(),
                      .weights_stride = c.top_k,
                      .weight_on_input = o.weight_on_input};
  const std::int64_t count = c.tokens * c.top_k, columns = (c.hidden + o.ctas - 1) / o.ctas;
  const std::int64_t stage_columns = std::min<std::int64_t>(columns, o.stage_columns);
  const int lanes = kernels::few_column_lanes(promotion(weights.w2), static_cast<int>(c.intermediate));
  const int streams = kernels::few_streams(static_cast<int>(stage_columns), lanes, o.stages);
  const int stages = o.stages / streams * streams;
  const Tensor values13 = o.panels ? to_panels(weights.w13.values) : weights.w13.values;
  const Tensor values2 = o.panels ? to_panels(weights.w2.values) : weights.w2.values;
  const FewMatrix w13 = matrix(weights.w13, weights.b13, values13), w2 = matrix(weights.w2, weights.b2, values2);
  const Promotion first = promotion(weights.w13), second = promotion(weights.w2);
  const auto layout = [&](int most_bytes) {
    return kernels::few_gate_up_layout(first, w13, tokens, c.top_k, o.ctas, most_bytes);
  };
  kernels::FewGateUpLayout gate_up_layout = layout(kernels::kFewGateUpSharedBytes);
  ASSERT_GE(gate_up_layout.stages, 2);
  if (o.small_ring) {
    const int stage = 2 * gate_up_layout.stage_pairs * w13.k;
    gate_up_layout = layout(gate_up_layout.bytes - (gate_up_layout.stages - 2) * stage);
    ASSERT_EQ(gate_up_layout.stages, 2);
  }
  for (const Schedule& schedule : {Schedule{true, true, 0}, Schedule{false, true, 2 * c.seed},
                                   Schedule{true, true, 2 * c.seed + 1}, Schedule{false, true, 2 * c.seed + 3}}) {
    SCOPED_TRACE(std::string(schedule.late_copies ? "late" : "early") + " copies, seed " +
                 std::to_string(schedule.seed));
    const Tensor out = Tensor::copy_of(before);
    std::vector<std::uint16_t> h(static_cast<std::size_t>(count * c.intermediate), 0xa5a5);
    const kernels::FewGateUpArgs gate_up{.routes = routes,
                                         .w13 = w13,
                                         .x = {in.x.view().data(), c.hidden,
                                               o.x == DType::float32   ? kernels::RowType::f32
                                               : o.x == DType::float16 ? kernels::RowType::fp16
                                                                       : kernels::RowType::bf16,
                                               1},
                                         .h = h.data(),
                                         .up_first = c.order == GateUpOrder::up_gate,
                                         .limit = o.limit > 0 ? o.limit : std::bit_cast<float>(0x7f800000u),
                                         .layout = gate_up_layout,
                                         .w2 = w2,
                                         .columns = static_cast<std::int32_t>(columns),
                                         .stage_columns = static_cast<std::int32_t>(stage_columns)};
    const kernels::FewDownArgs down{
        .routes = routes,
        .w2 = w2,
        .h = h.data(),
        .out = out.view().data(),
        .out_stride = c.hidden,
        .out_type = o.out == DType::float32   ? kernels::OutType::f32
                    : o.out == DType::float16 ? kernels::OutType::fp16
                                              : kernels::OutType::bf16,
        .accumulate = o.accumulate,
        .columns = static_cast<std::int32_t>(columns),
        .stage_columns = static_cast<std::int32_t>(stage_columns),
        .stages = stages,
        .layout = kernels::few_down_layout(second, w2, static_cast<int>(count), static_cast<int>(columns),
                                           static_cast<int>(stage_columns), stages)};
    EXPECT_EQ(gate_up.layout.bytes % kernels::kFewSharedUnit + down.layout.bytes % kernels::kFewSharedUnit, 0);
    try {
      launch({.grid = o.ctas,
              .threads = kernels::kFewGateUpThreads,
              .shared_bytes = gate_up.layout.bytes,
              .schedule = schedule},
             [&] { gate_up_kernel(first, gate_up); });
      launch({.grid = static_cast<int>((c.hidden + columns - 1) / columns),
              .threads = kernels::kFewDownThreads,
              .shared_bytes = down.layout.bytes,
              .schedule = schedule},
             [&] { down_kernel(second, down); });
    } catch (const Fault& fault) {
      FAIL() << fault.what();
    }
    ASSERT_TRUE(testing::same_bits(out, want));
  }
}

TEST(FewTokens, EveryNumberOfTokens) {
  for (int tokens = 1; tokens <= kernels::kFewTokens; ++tokens) {
    check({.tokens = tokens, .scheme = {}, .seed = static_cast<std::uint32_t>(tokens)}, {});
  }
}
// More than 32 pairs a warp, and experts with routes of both halves of a warp's lanes.
TEST(FewTokens, MostRoutes) {
  check({.experts = 40, .tokens = 8, .top_k = 8, .scheme = {}, .seed = 5}, {});
  check({.experts = 9, .tokens = 8, .top_k = 8, .scheme = {}, .seed = 41}, {.ctas = 2});
  check({.experts = 11, .tokens = 7, .top_k = 5, .scheme = {}, .seed = 42}, {.ctas = 3, .stages = 2});
}
// down's streams of four columns a warp: as many as there are warps for, three quarters of them if each has two slots
// then.
constexpr int streams_of_8(int stage_columns, int stages) { return kernels::few_streams(stage_columns, 8, stages); }
static_assert(streams_of_8(16, 0) == 0 && streams_of_8(16, 2) == 2 && streams_of_8(16, 4) == 4);
static_assert(streams_of_8(16, 5) == 4 && streams_of_8(16, 6) == 3 && streams_of_8(16, 7) == 3);
static_assert(streams_of_8(16, 8) == 4 && streams_of_8(20, 3) == 3 && streams_of_8(64, 9) == 1);
static_assert(kernels::few_streams(16, 4, 16) == 8);

// The ring's slots are used again and again, and stages lie in two experts.
TEST(FewTokens, SmallRing) {
  std::uint32_t seed = 170;
  for (const char* scheme : {"int8_channel", "int8_block", "int8_hybrid"}) {
    SCOPED_TRACE(scheme);
    for (const bool panels : {false, true}) {
      check({.experts = 6,
             .hidden = panels ? 256 : 1040,
             .intermediate = panels ? 128 : 112,
             .tokens = 3,
             .top_k = 4,
             .scheme = Scheme::parse(scheme),
             .seed = seed++},
            {.ctas = 2, .panels = panels, .small_ring = true});
    }
  }
}
// Rows of several units with a short last one; longer than registers keep; more stages than the ring has.
TEST(FewTokens, LongRows) {
  check({.experts = 3, .hidden = 8192, .intermediate = 48, .tokens = 2, .top_k = 2, .scheme = {}, .seed = 6},
        {.ctas = 3});
  check({.experts = 3, .hidden = 2576, .intermediate = 48, .tokens = 2, .top_k = 2, .scheme = {}, .seed = 43},
        {.ctas = 3});
  check({.experts = 3, .hidden = 64, .intermediate = 8192, .tokens = 2, .top_k = 2, .scheme = {}, .seed = 7},
        {.ctas = 2, .stage_columns = 5, .stages = 2});
  check({.experts = 5, .hidden = 64, .intermediate = 1552, .tokens = 3, .top_k = 2, .scheme = {}, .seed = 44},
        {.ctas = 2, .stage_columns = 7});
}
// A stage's columns divide the CTA's, or not; a CTA has fewer columns than others.
TEST(FewTokens, SetsOfColumns) {
  for (int stage_columns : {1, 4, 13, 19, 42}) {
    check({.hidden = 208, .tokens = 4, .scheme = {}, .seed = static_cast<std::uint32_t>(45 + stage_columns)},
          {.ctas = 5, .stage_columns = stage_columns, .stages = 2});
  }
}
TEST(FewTokens, MoreCtasThanColumns) {
  check({.experts = 4, .hidden = 32, .intermediate = 16, .tokens = 1, .top_k = 1, .scheme = {}, .seed = 8},
        {.ctas = 40});
}
TEST(FewTokens, NoRoutes) {
  const LayerCase c{.tokens = 2, .scheme = {}, .seed = 9};
  const LayerInput in = testing::make_input(c);
  for (std::int64_t i = 0; i < in.ids.elems(); ++i) in.ids.as<std::int32_t>()[i] = -1;
  check(c, {}, &in);
  check(c, {.accumulate = true}, &in);
}
TEST(FewTokens, OneExpertForAll) {
  for (int tokens : {4, 7}) {
    const LayerCase c{.tokens = tokens, .top_k = tokens == 7 ? 8 : 3, .scheme = {}, .seed = 10};
    const LayerInput in = testing::make_input(c);
    for (std::int64_t i = 0; i < in.ids.elems(); ++i) in.ids.as<std::int32_t>()[i] = 5;
    check(c, {}, &in);
  }
}
// An expert that a token names twice, with routes that are elsewhere in between.
TEST(FewTokens, RepeatedIds) {
  const LayerCase c{.tokens = 8, .top_k = 7, .scheme = {}, .seed = 60};
  const LayerInput in = testing::make_input(c);
  auto* ids = in.ids.as<std::int32_t>();
  for (std::int64_t i = 0; i < in.ids.elems(); ++i) ids[i] = i % 5 == 3 ? -1 : static_cast<std::int32_t>(i * i % 7);
  check(c, {}, &in);
  check(c, {.weight_on_input = true}, &in);
}
TEST(FewTokens, Schemes) {
  std::uint32_t seed = 11;
  for (const char* scheme : {"int8_channel:asymmetric", "int8_channel:static", "int8_channel:per_tensor",
                             "int8_channel:asymmetric,per_tensor", "int8_block", "int8_hybrid"}) {
    SCOPED_TRACE(scheme);
    check({.tokens = 3, .scheme = Scheme::parse(scheme), .seed = seed++}, {});
  }
}
// Scale blocks that end inside a piece, inside a CTA's columns, in short blocks of rows; chunks of every kind.
TEST(FewTokens, BlocksOfEveryKind) {
  std::uint32_t seed = 100;
  int number = 0;
  for (const char* scheme :
       {"int8_block", "int8_hybrid", "int8_block:block_k=256", "int8_hybrid:block_k=256", "int8_block:block_n=16",
        "int8_hybrid:block_n=48", "int8_hybrid:super=2", "int8_hybrid:super=1,q_max=3",
        "int8_hybrid:super=3,block_k=256", "int8_hybrid:q_max=64"}) {
    SCOPED_TRACE(scheme);
    ++number;
    for (const int tokens : {1, 3, 8}) {
      if (number > 2 && tokens != std::array{1, 3, 8}[static_cast<std::size_t>(number % 3)]) continue;
      check({.experts = 9,
             .hidden = tokens == 1 ? 2064 : 528,
             .intermediate = tokens == 1   ? 144
                             : tokens == 3 ? 304
                                           : 720,
             .tokens = tokens,
             .top_k = tokens == 8 ? 8 : 3,
             .scheme = Scheme::parse(scheme),
             .biases = tokens == 3,
             .seed = seed},
            {.ctas = 4 + static_cast<int>(seed % 2), .stage_columns = tokens == 3 ? 13 : 24});
      ++seed;
    }
  }
}
// Rows longer than registers keep, and more results than a warp has lanes; the largest q_max makes chunks of a few
// blocks.
TEST(FewTokens, LongRowsInBlocks) {
  for (const char* scheme : {"int8_block", "int8_hybrid", "int8_hybrid:q_max=64", "int8_hybrid:super=5,q_max=32"}) {
    SCOPED_TRACE(scheme);
    check({.experts = 3,
           .hidden = 7168,
           .intermediate = 64,
           .tokens = 2,
           .top_k = 3,
           .scheme = Scheme::parse(scheme),
           .seed = 130},
          {.ctas = 3});
    check({.experts = 5,
           .hidden = 64,
           .intermediate = 2320,
           .tokens = 3,
           .top_k = 2,
           .scheme = Scheme::parse(scheme),
           .seed = 131},
          {.ctas = 2, .stage_columns = 7});
    check({.experts = 2,
           .hidden = 3088,
           .intermediate = 96,
           .tokens = 5,
           .top_k = 2,
           .scheme = Scheme::parse(scheme),
           .seed = 132},
          {.ctas = 1});
    check({.experts = 2,
           .hidden = 1040,
           .intermediate = 512,
           .tokens = 8,
           .top_k = 2,
           .scheme = Scheme::parse(scheme),
           .seed = 133},
          {.ctas = 1});
  }
}
// Sums that would not fit int32 without chunks; blocks of which chunks are no multiple.
TEST(FewTokens, ChunksKeepSumsSmall) {
  for (const char* scheme : {"int8_hybrid", "int8_hybrid:block_k=256", "int8_hybrid:super=6"}) {
    SCOPED_TRACE(scheme);
    check({.experts = 3,
           .hidden = 1424,
           .intermediate = 1680,
           .tokens = 3,
           .top_k = 2,
           .scheme = Scheme::parse(scheme),
           .seed = 140},
          {.ctas = 40, .ones = true});
  }
}
// One, a few and many panels of either matrix; sets of columns that end early.
TEST(FewTokens, Panels) {
  std::uint32_t seed = 150;
  for (const char* scheme :
       {"int8_channel", "int8_channel:asymmetric", "int8_block", "int8_hybrid", "int8_hybrid:super=3,block_k=256"}) {
    SCOPED_TRACE(scheme);
    for (const int tokens : {1, 3, 8}) {
      check({.experts = 5,
             .hidden = tokens == 1   ? 2176
                       : tokens == 3 ? 128
                                     : 512,
             .intermediate = tokens == 1   ? 128
                             : tokens == 3 ? 1152
                                           : 384,
             .tokens = tokens,
             .top_k = 3,
             .scheme = Scheme::parse(scheme),
             .seed = seed},
            {.ctas = 3, .stage_columns = tokens == 3 ? 13 : 64, .stages = 2, .panels = true});
      ++seed;
    }
  }
}
TEST(FewTokens, Options) {
  std::uint32_t seed = 20;
  for (const bool up_first : {false, true}) {
    for (const Options& o : {Options{.weight_on_input = true}, Options{.accumulate = true}, Options{.map = true},
                             Options{.wide_ids = true}, Options{.limit = 0.5f},
                             Options{.x = DType::float32, .out = DType::float32, .accumulate = true},
                             Options{.x = DType::float16, .out = DType::float16, .accumulate = true}}) {
      SCOPED_TRACE(seed);
      LayerCase c{.tokens = 1 + seed % kernels::kFewTokens,
                  .scheme = Scheme::parse(seed % 3 == 0   ? "int8_block"
                                          : seed % 3 == 1 ? "int8_channel"
                                                          : "int8_hybrid"),
                  .biases = seed % 2 == 0,
                  .seed = seed};
      c.order = up_first ? GateUpOrder::up_gate : GateUpOrder::gate_up;
      check(c, o);
      ++seed;
    }
  }
}
// An Inf in one token's x poisons that token alone.
TEST(FewTokens, NonFiniteRow) {
  for (const char* scheme :
       {"int8_channel", "int8_channel:asymmetric", "int8_channel:static", "int8_block", "int8_hybrid"}) {
    SCOPED_TRACE(scheme);
    const LayerCase c{.tokens = 3, .scheme = Scheme::parse(scheme), .seed = 40};
    const LayerInput in = testing::make_input(c, DType::bfloat16, false);
    in.x.as<std::uint16_t>()[c.hidden + 17] = 0x7f80;
    check(c, {}, &in);
  }
}

template <Promotion kPromotion>
void add_to(KernelTable& table) {
  table[plan::few_gate_up_id(kPromotion)] = [](const void* args) {
    gate_up_kernel(kPromotion, *static_cast<const kernels::FewGateUpArgs*>(args));
  };
  for (const int lanes : {4, 8}) {
    table[plan::few_down_id(kPromotion, lanes)] = [](const void* args) {
      down_kernel(kPromotion, *static_cast<const kernels::FewDownArgs*>(args));
    };
  }
}

}  // namespace

const KernelTable& few_tokens_kernels() {
  static const KernelTable table = [] {
    KernelTable t;
    add_to<Promotion::channel>(t);
    add_to<Promotion::block>(t);
    add_to<Promotion::hybrid>(t);
    return t;
  }();
  return table;
}

}  // namespace octomoe::emulator
