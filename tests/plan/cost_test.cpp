// The cost model: how much work a kernel has, and which one is taken.
#include "plan/cost.h"

#include <gtest/gtest.h>
#include <limits>

#include <algorithm>
#include <cmath>
#include <random>

#include "plan/catalogue.h"

namespace octomoe::plan {
namespace {

using kernels::Epilogue;
using kernels::Promotion;

// GEMM1 of Qwen3-30B-A3B on an H100, int8_channel.
TuneKey key(std::int64_t experts = 128, std::int64_t n = 1536, std::int64_t k = 2048) {
  return {.device = "GPU", .multiprocessors = 132, .epilogue = Epilogue::swiglu, .experts = experts, .n = n, .k = k};
}

GemmKernel kernel(int block_n, int cluster = 1) {
  return {.id = "k", .wgmma = true, .block_m = 256, .block_n = block_n, .features = 128, .cluster = cluster};
}

TEST(GemmKernels, AreTheCatalogues) {
  const auto ids = [](const std::vector<GemmKernel>& list) {
    std::vector<std::string> all;
    for (const GemmKernel& k : list) all.push_back(k.id);
    return all;
  };
  for (const Promotion p : {Promotion::channel, Promotion::block, Promotion::hybrid, Promotion::hybrid_flush}) {
    for (const Epilogue e : {Epilogue::store, Epilogue::swiglu}) {
      const int block_k = p == Promotion::channel ? 0 : 128;
      std::vector<std::string> expected;
      for (const auto& c : wgmma_configs()) {
        if (p == Promotion::channel && c.epilogue == e) expected.push_back(gemm_id(c));
      }
      for (const auto& c : token_major_configs()) {
        if (p == c.promotion && c.epilogue == e && c.block_stages == 1) expected.push_back(gemm_id(c));
      }
      EXPECT_EQ(ids(wgmma_kernels(p, e, block_k)), expected);
      EXPECT_FALSE(expected.empty());
      for (const int family : {80, 89, 90}) {
        expected.clear();
        for (const auto& c : gemm_configs(p, false, e, family)) expected.push_back(gemm_id(c));
        EXPECT_EQ(ids(mma_kernels(p, e, block_k, family)), expected);
      }
    }
  }
  EXPECT_TRUE(wgmma_kernels(Promotion::block, Epilogue::store, 64).empty());
  EXPECT_FALSE(wgmma_kernels(Promotion::block, Epilogue::store, 256).empty());
  EXPECT_NE(ids(mma_kernels(Promotion::block, Epilogue::store, 64, 90)),
            ids(mma_kernels(Promotion::block, Epilogue::store, 128, 90)));
}

// More rows, more tokens a tile.
TEST(Cost, MoreRowsTakeLargerTiles) {
  const auto chosen = [](double rows_of_an_expert) {
    const TuneKey k = key();
    const auto list = mma_kernels(Promotion::channel, Epilogue::swiglu, 0, 90);
    const auto cost_of = [&](const GemmKernel& kernel) {
      return cost(kernel, work_of(kernel, k, rows_of_an_expert * static_cast<double>(k.experts)));
    };
    return std::ranges::min_element(list, {}, cost_of)->block_n;
  };
  EXPECT_EQ(chosen(1), 8);
  EXPECT_EQ(chosen(24), 64);
  EXPECT_EQ(chosen(4096), 128);
}

// Against counting: tokens that choose experts at random.
TEST(Work, IsWhatRandomRoutingNeeds) {
  std::mt19937 random(1);
  for (const auto& [experts, rows, block] : std::vector<std::tuple<int, int, int>>{
           {128, 8, 128}, {128, 1024, 128}, {128, 16384, 128}, {64, 5000, 64}, {8, 4096, 160}, {256, 65536, 128}}) {
    const TuneKey k = key(experts);
    double rounds = 0, width = 0, mma_width = 0;
    GemmKernel mma = kernel(block);
    mma.wgmma = false;
    mma.step_n = 16;
    constexpr int kTrials = 200;
    for (int trial = 0; trial < kTrials; ++trial) {
      std::vector<int> of(static_cast<std::size_t>(experts));
      for (int r = 0; r < rows; ++r) ++of[random() % of.size()];
      double tiles = 0, tokens = 0, mma_tokens = 0;
      for (const int r : of) {
        const double parts = std::ceil(static_cast<double>(r) / block);
        tiles += parts;
        if (r > 0) tokens += parts * 16 * std::ceil(std::ceil(r / parts) / 16);
        mma_tokens += r / block * block + std::ceil(r % block / 16.0) * 16;
      }
      rounds += std::ceil(tiles * 6 / 132) / kTrials;
      width += tokens / tiles / kTrials;
      mma_width += mma_tokens / tiles / kTrials;
    }
    const GemmWork w = work_of(kernel(block), k, rows);
    EXPECT_NEAR(w.rounds, rounds, 0.04 * rounds + 0.05) << rows << " rows of " << experts;
    EXPECT_NEAR(w.width, width, 0.1 * width) << rows << " rows of " << experts;
    EXPECT_NEAR(work_of(mma, k, rows).width, mma_width, 0.02 * mma_width) << rows << " rows of " << experts;
    EXPECT_EQ(w.stages, 16);
  }
}

// Tokens as wgmma's M operand: a tile is computed in steps of 64, whatever it reads.
TEST(Work, IsReadInStepsOf16WhateverIsComputed) {
  GemmKernel k = kernel(128);
  k.min_n = k.step_n = 64;
  for (const double rows : {1.0, 40.0, 128 * 30.0, 128 * 100.0}) {
    const GemmWork narrow = work_of(kernel(128), key(), rows), wide = work_of(k, key(), rows);
    EXPECT_EQ(narrow.width, narrow.fed);
    EXPECT_EQ(wide.fed, narrow.fed);
    EXPECT_EQ(wide.rounds, narrow.rounds);
    EXPECT_GE(wide.width, 64);
    EXPECT_GE(wide.width, wide.fed);
    EXPECT_LE(wide.width, 128);
  }
  EXPECT_LT(work_of(k, key(), 1).fed, 32);
  EXPECT_LT(cost(k, work_of(k, key(), 1)), cost(k, work_of(k, key(), 128 * 60)));
}

TEST(Work, EndsAtWholeRounds) {
  // 22 experts x 6 weight tiles fill 132 multiprocessors once; tokens enough that none goes without rows.
  const double rows = 22 * 64;
  EXPECT_NEAR(work_of(kernel(128), key(22), rows).rounds, 1, 1e-3);
  EXPECT_NEAR(work_of(kernel(128), key(23), rows).rounds, 2, 1e-3);
  EXPECT_NEAR(work_of(kernel(128, 2), key(22), rows).rounds, 2, 1e-3);
  EXPECT_GT(work_of(kernel(128), key(), 0).rounds, -1e-9);  // no rows: no NaN
  EXPECT_LT(work_of(kernel(128), key(), 1e9).rounds, 1e9);
}

TEST(Cost, GrowsWithRows) {
  for (const GemmKernel& k : wgmma_kernels(Promotion::channel, Epilogue::swiglu, 0)) {
    double before = 0;
    for (double rows = 1; rows < 1e6; rows *= 2) {
      const double c = cost(k, work_of(k, key(), rows));
      EXPECT_TRUE(std::isfinite(c));
      EXPECT_GE(c, before * 0.999) << k.id << " " << rows;
      before = c;
    }
  }
}

std::string chosen(const std::vector<GemmKernel>& list, double rows, const TuneKey& k = key()) {
  return std::ranges::min_element(list, {}, [&](const GemmKernel& g) { return cost(g, work_of(g, k, rows)); })->id;
}

// An expert's 128 rows on average are rarely one tile of 128 tokens, nearly always one of 160.
TEST(Cost, TakesTheTileThatAnExpertsRowsFit) {
  const std::vector<GemmKernel> list = wgmma_kernels(Promotion::channel, Epilogue::swiglu, 0);
  const auto width = [&](double rows) {
    const std::string id = chosen(list, rows);
    return std::ranges::find(list, id, &GemmKernel::id)->block_n;
  };
  EXPECT_EQ(width(128 * 128), 160);
  EXPECT_EQ(width(128 * 16), 128);
}

TEST(Cost, NarrowMmaTilesForFewRows) {
  const std::vector<GemmKernel> list = mma_kernels(Promotion::channel, Epilogue::swiglu, 0, 90);
  const auto width = [&](double rows) {
    const std::string id = chosen(list, rows);
    return std::ranges::find(list, id, &GemmKernel::id)->block_n;
  };
  EXPECT_EQ(width(8), 8);
  EXPECT_LE(width(256), 32);
  EXPECT_GE(width(65536), 96);
}

double least(const std::vector<GemmKernel>& list, const TuneKey& k, double rows) {
  double cost_of_least = std::numeric_limits<double>::infinity();
  for (const GemmKernel& kernel : list) cost_of_least = std::min(cost_of_least, cost(kernel, work_of(kernel, k, rows)));
  return cost_of_least;
}
std::vector<GemmKernel> standing_in(Promotion promotion, Epilogue epilogue, int block_k) {
  std::vector<GemmKernel> list = mma_kernels(promotion, epilogue, block_k, 90);
  std::erase_if(list, [](const GemmKernel& k) { return !k.can_stand_in(); });
  for (GemmKernel& k : list) k.stands_in = true;
  return list;
}
// Where wgmma's tiles are few.
TEST(Cost, SmallTilesStandIn) {
  const std::vector<GemmKernel> others = standing_in(Promotion::channel, Epilogue::swiglu, 0);
  ASSERT_EQ(others.size(), 1u);
  const std::vector<GemmKernel> wide = wgmma_kernels(Promotion::channel, Epilogue::swiglu, 0);
  TuneKey k = key(32, 4096, 7168);
  EXPECT_LT(least(others, k, 2), least(wide, k, 2));
  EXPECT_EQ(least(others, k, 64), std::numeric_limits<double>::infinity());
  k.k = 512;  // too short to win back what it opens with
  EXPECT_GT(least(others, k, 2), least(wide, k, 2));
  EXPECT_EQ(standing_in(Promotion::hybrid, Epilogue::store, 128).size(), 1u);
  EXPECT_EQ(standing_in(Promotion::hybrid_flush, Epilogue::store, 128).size(), 1u);
  EXPECT_TRUE(standing_in(Promotion::hybrid, Epilogue::store, 256).empty());  // not tuned for anything
}
// With gate and up and whole-number scales, for up to three tiles a multiprocessor: here 2.6, 3.1 and 4.6.
TEST(Cost, SmallTilesOfGatedHybridStandInForMore) {
  const auto stand_in = [](Promotion promotion, Epilogue epilogue, double rows) {
    const std::vector<GemmKernel> wide = wgmma_kernels(promotion, epilogue, promotion == Promotion::channel ? 0 : 128);
    return least(standing_in(promotion, epilogue, 128), key(), rows) < least(wide, key(), rows);
  };
  for (const Promotion p : {Promotion::hybrid, Promotion::hybrid_flush}) {
    EXPECT_TRUE(stand_in(p, Epilogue::swiglu, 32));
    EXPECT_FALSE(stand_in(p, Epilogue::swiglu, 40));
    EXPECT_FALSE(stand_in(p, Epilogue::swiglu, 64));
    EXPECT_FALSE(stand_in(p, Epilogue::store, 32));
  }
  EXPECT_FALSE(stand_in(Promotion::channel, Epilogue::swiglu, 32));
  EXPECT_FALSE(stand_in(Promotion::block, Epilogue::swiglu, 32));
  const std::vector<GemmKernel> others = standing_in(Promotion::hybrid, Epilogue::swiglu, 128);
  EXPECT_LT(1.3 * least(others, key(), 8), least(others, key(), 32));  // three and a half times the tiles
}

}  // namespace
}  // namespace octomoe::plan
