// kernels/sm80/grouped_gemm.cuh against docs/schemes.md section 3 as plain loops, bit for bit: tiles of every shape
// that the catalogue has, and every way in which a warp learns that a stage has landed.
#include "emulator/problem.h"

namespace octomoe::emulator {
namespace {

using kernels::Epilogue;
using kernels::GemmArgs;
using kernels::GemmConfig;
using kernels::Order;
using kernels::OutType;
using kernels::Promotion;

struct Tile {
  int m, n, k, stages, warps_m, warps_n;
  Order order;
  bool fine = false;
};

template <Promotion kPromotion, Epilogue kEpilogue, Tile kTile>
void check(GemmCase c, int ctas = 2) {
  constexpr GemmConfig kConfig{kPromotion,    kEpilogue,     kTile.m,    kTile.n, kTile.k,    kTile.stages,
                               kTile.warps_m, kTile.warps_n, kTile.fine, 1,       kTile.order};
  c.promotion = kPromotion;
  c.gated = kConfig.gated();
  if (c.gated) c.segments = 2;
  GemmProblem problem(c);
  problem.check([&](const GemmArgs& args, const Schedule& schedule) {
    launch({ctas, kConfig.threads(), kConfig.pipeline_bytes(), 1, schedule},
           [&] { sm80::grouped_gemm<kConfig>(args); });
  });
}
constexpr auto kStore = Epilogue::store, kSwiglu = Epilogue::swiglu;

template <Tile kTile>
void check_channel() {
  check<Promotion::channel, kStore, kTile>({.rows = {5, 0, 37, 1}, .n = 136, .k = 272});
  check<Promotion::channel, kStore, kTile>({.rows = {20, 3},
                                            .n = 96,
                                            .k = 144,
                                            .out = OutType::f32,
                                            .gather = true,
                                            .zero_points = true,
                                            .bias = true,
                                            .row_factor = true,
                                            .seed = 2});
  check<Promotion::channel, kStore, kTile>(
      {.rows = {90, 7, 3, 40}, .n = 136, .k = 48, .gather = true, .zero_points = true, .row_factor = true, .seed = 12},
      1);
  check<Promotion::channel, kSwiglu, kTile>({.rows = {9, 20},
                                             .n = 2 * 72,
                                             .k = 400,
                                             .gather = true,
                                             .zero_points = true,
                                             .bias = true,
                                             .limit = 2.5f,
                                             .seed = 3});
}
TEST(Sm80Gemm, Channel8Tokens) { check_channel<Tile{128, 8, 128, 5, 4, 1, Order::steps}>(); }
TEST(Sm80Gemm, Channel16Tokens) { check_channel<Tile{128, 16, 128, 4, 4, 1, Order::steps}>(); }
TEST(Sm80Gemm, Channel64Tokens) { check_channel<Tile{128, 64, 128, 4, 2, 2, Order::steps}>(); }
TEST(Sm80Gemm, Channel64TokensThreeStages) { check_channel<Tile{256, 64, 128, 3, 4, 2, Order::steps}>(); }
TEST(Sm80Gemm, Channel96Tokens) { check_channel<Tile{256, 96, 128, 4, 4, 2, Order::steps}>(); }
TEST(Sm80Gemm, Channel128Tokens) { check_channel<Tile{256, 128, 128, 4, 4, 2, Order::steps}>(); }
TEST(Sm80Gemm, Channel96TokensThreeStages) { check_channel<Tile{128, 96, 128, 3, 4, 2, Order::steps}>(); }
// A caller's offsets that nobody has checked: below zero, beyond the rows, decreasing.
TEST(Sm80Gemm, WrongOffsetsStayInside) {
  check<Promotion::channel, kStore, Tile{128, 16, 128, 4, 4, 1, Order::steps}>(
      {.rows = {9, 20, 3, 4}, .n = 128, .k = 128, .wrong_offsets = {7, -5, 1 << 30, 30, 1 << 30}, .seed = 2});
}
TEST(Sm80Gemm, ChannelOutputsAndLayouts) {
  constexpr Tile kTile{128, 32, 128, 4, 4, 1, Order::steps};
  check<Promotion::channel, kStore, kTile>({.rows = {20, 0, 3, 40},
                                            .n = 136,
                                            .k = 144,
                                            .out = OutType::fp16,
                                            .masked = true,
                                            .per_tensor = true,
                                            .seed = 4});
  check<Promotion::channel, kStore, kTile>({.rows = {0, 0}, .n = 64, .k = 48, .seed = 5});
  check<Promotion::channel, kStore, kTile>({.rows = {0, 3}, .n = 64, .k = 48, .seed = 6}, 5);
  check<Promotion::channel, kSwiglu, kTile>({.rows = {40, 1}, .n = 2 * 136, .k = 272, .up_first = true, .seed = 7});
}

TEST(Sm80Gemm, Panels) {
  for (const int k : {128, 384}) {
    const auto seed = static_cast<std::uint32_t>(90 + k / 128);
    const GemmCase plain{.rows = {20, 0, 3, 40}, .n = 136, .k = k, .gather = true, .panels = true, .seed = seed};
    const GemmCase gated{.rows = {40, 1}, .n = 2 * 136, .k = k, .up_first = true, .panels = true, .seed = seed};
    check<Promotion::channel, kStore, Tile{128, 32, 128, 4, 4, 1, Order::steps}>(plain);
    check<Promotion::channel, kSwiglu, Tile{128, 32, 128, 4, 4, 1, Order::steps}>(gated);
    check<Promotion::hybrid, kSwiglu, Tile{128, 96, 128, 6, 4, 2, Order::tiles}>(gated);
  }
}

// Several tiles an expert, the last ones of every length; more CTAs than tiles, as many, and one.
TEST(Sm80Gemm, ShortLastTiles) {
  constexpr Tile kTile{128, 32, 128, 3, 2, 2, Order::steps};
  for (const int ctas : {1, 2, 4, 7, 40}) {
    check<Promotion::channel, kStore, kTile>(
        {.rows = {33, 64, 47, 96, 1}, .n = 264, .k = 144, .gather = true, .seed = 13}, ctas);
  }
}

// A tile is computed as wide as its rows need. Of sums per K-block tiles of up to four stages are dealt out, of up to
// eight first dealt out and then taken, others taken.
template <Promotion kPromotion, Tile kTile>
void check_widths() {
  for (const int ctas : {1, 3}) {
    for (const int k : {128, 400, 784, 1168}) {
      const bool is_long = k > 400;
      if (is_long && ctas == 1) continue;
      const GemmCase c{.rows = {130, 33, 1, 64, 97, 17, 128},
                       .n = 144,
                       .k = k,
                       .super_group = kPromotion == Promotion::hybrid_flush ? 2 : 256,
                       .gather = true,
                       .row_factor = true,
                       .seed = static_cast<std::uint32_t>(14 + k)};
      check<kPromotion, kStore, kTile>(c, ctas);
      if (!is_long) check<kPromotion, kSwiglu, kTile>(c, ctas);
    }
  }
}
TEST(Sm80Gemm, WidthsOfChannel) {
  check_widths<Promotion::channel, Tile{256, 128, 128, 4, 4, 2, Order::steps}>();
  check_widths<Promotion::channel, Tile{256, 96, 128, 3, 4, 2, Order::steps}>();
  check_widths<Promotion::channel, Tile{128, 64, 128, 4, 2, 2, Order::steps}>();
}
TEST(Sm80Gemm, WidthsOfBlock) {
  check_widths<Promotion::block, Tile{128, 128, 128, 6, 4, 2, Order::tiles}>();
  check_widths<Promotion::block, Tile{128, 80, 128, 3, 4, 2, Order::tiles}>();
}
TEST(Sm80Gemm, WidthsOfHybrid) {
  check_widths<Promotion::hybrid, Tile{128, 128, 128, 6, 2, 4, Order::tiles}>();
  check_widths<Promotion::hybrid, Tile{128, 160, 128, 5, 2, 4, Order::tiles}>();
}
TEST(Sm80Gemm, WidthsOfHybridFlush) {
  check_widths<Promotion::hybrid_flush, Tile{128, 96, 128, 6, 4, 2, Order::tiles}>();
  check_widths<Promotion::hybrid_flush, Tile{128, 64, 128, 5, 4, 2, Order::tiles}>();
}

template <Promotion kPromotion, Tile kTile>
void check_blocks(int block_k, int super_group = 256, int flush_blocks = 256) {
  const auto with = [&](GemmCase c) {
    c.block_k = block_k;
    c.super_group = super_group;
    c.flush_blocks = flush_blocks;
    return c;
  };
  check<kPromotion, kStore, kTile>(with({.rows = {5, 0, 37, 1}, .n = 136, .k = 784, .seed = 8}));
  check<kPromotion, kStore, kTile>(with({.rows = {20, 3},
                                         .n = 2 * 80,
                                         .k = 400,
                                         .segments = 2,
                                         .block_n = 32,
                                         .out = OutType::f32,
                                         .gather = true,
                                         .bias = true,
                                         .row_factor = true,
                                         .seed = 9}));
  check<kPromotion, kSwiglu, kTile>(with({.rows = {9, 66},
                                          .n = 2 * 72,
                                          .k = 272,
                                          .block_n = 48,
                                          .gather = true,
                                          .bias = true,
                                          .row_factor = true,
                                          .up_first = true,
                                          .limit = 2.5f,
                                          .seed = 10}));
  check<kPromotion, kSwiglu, kTile>(with({.rows = {4, 20}, .n = 2 * 136, .k = 80, .seed = 11}));
}
TEST(Sm80Gemm, Block8Tokens) { check_blocks<Promotion::block, Tile{128, 8, 128, 5, 4, 1, Order::tiles}>(128); }
TEST(Sm80Gemm, Block96Tokens) { check_blocks<Promotion::block, Tile{128, 96, 128, 6, 4, 2, Order::tiles}>(128); }
TEST(Sm80Gemm, Block80TokensThreeStages) {
  check_blocks<Promotion::block, Tile{128, 80, 128, 3, 4, 2, Order::tiles}>(128);
}
TEST(Sm80Gemm, BlockOfAnyWidth) {
  constexpr Tile kTile{128, 32, 128, 4, 4, 1, Order::steps, true};
  for (const int block_k : {32, 96, 256}) check_blocks<Promotion::block, kTile>(block_k);
}
TEST(Sm80Gemm, Hybrid16Tokens) { check_blocks<Promotion::hybrid, Tile{128, 16, 128, 5, 4, 1, Order::tiles}>(128); }
TEST(Sm80Gemm, Hybrid32Tokens) { check_blocks<Promotion::hybrid, Tile{128, 32, 128, 4, 4, 1, Order::tiles}>(128); }
TEST(Sm80Gemm, Block128Tokens) { check_blocks<Promotion::block, Tile{128, 128, 128, 6, 4, 2, Order::tiles}>(128); }
TEST(Sm80Gemm, Hybrid128Tokens) { check_blocks<Promotion::hybrid, Tile{128, 128, 128, 6, 2, 4, Order::tiles}>(128); }
TEST(Sm80Gemm, Hybrid160Tokens) { check_blocks<Promotion::hybrid, Tile{128, 160, 128, 5, 2, 4, Order::tiles}>(128); }
TEST(Sm80Gemm, Hybrid96Tokens) { check_blocks<Promotion::hybrid, Tile{128, 96, 128, 5, 4, 2, Order::tiles}>(128); }
TEST(Sm80Gemm, HybridOfAnyWidth) {
  check_blocks<Promotion::hybrid, Tile{128, 8, 128, 4, 4, 1, Order::steps, true}>(64);
  check_blocks<Promotion::hybrid, Tile{128, 32, 128, 4, 4, 1, Order::steps, true}>(96);
}
TEST(Sm80Gemm, HybridFloatSteps) {
  constexpr Tile kTiles{128, 64, 128, 3, 4, 2, Order::tiles};
  check_blocks<Promotion::hybrid_flush, kTiles>(128, 4, 2);
  check_blocks<Promotion::hybrid_flush, kTiles>(128, 3, 3);
  check_blocks<Promotion::hybrid_flush, Tile{128, 96, 128, 6, 4, 2, Order::tiles}>(128, 1, 1);
  check_blocks<Promotion::hybrid_flush, Tile{128, 8, 128, 5, 4, 1, Order::tiles}>(128, 2, 1);
  check_blocks<Promotion::hybrid_flush, Tile{128, 8, 128, 4, 4, 1, Order::steps, true}>(64, 5, 2);
  check_blocks<Promotion::hybrid_flush, Tile{128, 32, 128, 4, 4, 1, Order::steps, true}>(64, 5, 2);
}

}  // namespace
}  // namespace octomoe::emulator
