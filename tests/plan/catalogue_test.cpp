// A tile that a device's blocks have no shared memory for could never be loaded there.
#include "plan/catalogue.h"

#include <gtest/gtest.h>

namespace octomoe::plan {
namespace {

TEST(Catalogue, TilesFitTheirDevicesSharedMemory) {
  const struct { int family, limit; } devices[] = {{90, 227 * 1024}, {80, 163 * 1024}, {89, 99 * 1024}};
  constexpr int kTileList = (2 * (kernels::kMaxExperts + 1) + 32) * 4;
  for (const auto& [family, limit] : devices) {
    EXPECT_EQ(tile_family(limit), family);
    for (int p = 0; p < 4; ++p) {
      for (int e = 0; e < 2; ++e) {
        for (const bool fine : {false, true}) {
          const auto promotion = static_cast<kernels::Promotion>(p);
          for (const auto& c : gemm_configs(promotion, fine, static_cast<kernels::Epilogue>(e), family)) {
            EXPECT_LE(c.pipeline_bytes() + kTileList, limit) << family << " " << gemm_id(c);
          }
        }
      }
    }
  }
}

TEST(Catalogue, WgmmaKernelsFitSm90AndStandInIt) {
  int kernels = 0;
  for (int p = 0; p < 4; ++p) {
    for (int e = 0; e < 3; ++e) {
      for (const int stages : {1, 2}) {
        for (const auto& c :
             wgmma_configs(static_cast<kernels::Promotion>(p), static_cast<kernels::Epilogue>(e), stages)) {
          EXPECT_LE(c.pipeline_bytes(), 227 * 1024) << gemm_id(c);
          EXPECT_EQ(entry(gemm_id(c)).archs, std::vector<int>{90});
          ++kernels;
        }
      }
    }
  }
  EXPECT_GE(kernels, 12);
  EXPECT_TRUE(wgmma_configs(kernels::Promotion::channel, kernels::Epilogue::store, 0).empty());
}

}  // namespace
}  // namespace octomoe::plan
