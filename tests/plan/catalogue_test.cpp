// A tile that a device's blocks have no shared memory for could never be loaded there.
#include "plan/catalogue.h"

#include <gtest/gtest.h>

#include "plan/cost.h"

namespace octomoe::plan {
namespace {

TEST(Catalogue, TilesFitTheirDevicesSharedMemory) {
  const struct { int family, limit; } devices[] = {{90, 227 * 1024}, {80, 163 * 1024}, {89, 99 * 1024}};
  constexpr int kTileList = (2 * (kernels::kMaxExperts + 1) + 32 + 2) * 4;  // a multiple of 16
  for (const auto& [family, limit] : devices) {
    EXPECT_EQ(tile_family(limit), family);
    for (int p = 0; p < 4; ++p) {
      for (int e = 0; e < 2; ++e) {
        for (const bool fine : {false, true}) {
          const auto promotion = static_cast<kernels::Promotion>(p);
          for (const auto& c : gemm_configs(promotion, fine, static_cast<kernels::Epilogue>(e), family)) {
            EXPECT_LE(c.pipeline_bytes() + kTileList, limit) << family << " " << gemm_id(c);
            // As many as registers allow: a block takes 1 KB of its own.
            EXPECT_LE((c.pipeline_bytes() + kTileList + 1024) * c.min_blocks, limit + 1024)
                << family << " " << gemm_id(c);
          }
        }
      }
    }
  }
}

TEST(Catalogue, WgmmaKernelsFitSm90AndStandInIt) {
  const auto check = [](const auto& configs) {
    for (const auto& c : configs) {
      EXPECT_LE(c.pipeline_bytes(), 227 * 1024) << gemm_id(c);
      EXPECT_EQ(entry(gemm_id(c)).archs, std::vector<int>{90});
    }
    EXPECT_GE(configs.size(), 5u);
  };
  check(wgmma_configs());
  check(token_major_configs());
}

// LayerOptions::combine_order: whichever of SM90's kernels is chosen, there is one with the same tiles that adds.
TEST(Catalogue, WhatStoresOnSm90CanAdd) {
  for (int p = 0; p < 4; ++p) {
    for (const int block_k : {0, 128, 256}) {
      for (const GemmKernel& k : wgmma_kernels(static_cast<kernels::Promotion>(p), kernels::Epilogue::store, block_k)) {
        EXPECT_GT(entry(k.adding).shared_bytes, 0) << k.id;
        EXPECT_EQ(entry(k.adding).cluster, entry(k.id).cluster) << k.id;
        EXPECT_EQ(entry(k.adding).threads, entry(k.id).threads) << k.id;
      }
      for (const GemmKernel& k :
           wgmma_kernels(static_cast<kernels::Promotion>(p), kernels::Epilogue::swiglu, block_k)) {
        EXPECT_EQ(k.adding, "") << k.id;
      }
    }
  }
}

}  // namespace
}  // namespace octomoe::plan
