#include "plan/cost.h"

#include <algorithm>
#include <cmath>

#include "plan/catalogue.h"

namespace octomoe::plan {
namespace {

using kernels::Epilogue;
using kernels::GemmConfig;
using kernels::Promotion;
using kernels::WgmmaConfig;

}  // namespace

std::vector<GemmKernel> wgmma_kernels(Promotion promotion, Epilogue epilogue, int block_k) {
  // Of 128 columns in a K-block, as WgmmaConfig counts them.
  if (block_k % WgmmaConfig::kBlockK != 0) return {};
  const int block_stages = block_k == 0 ? 1 : block_k / WgmmaConfig::kBlockK;
  std::vector<GemmKernel> list;
  for (const WgmmaConfig& c : wgmma_configs(promotion, epilogue, block_stages)) {
    list.push_back({.id = gemm_id(c),
                    .wgmma = true,
                    .block_m = c.block_m(),
                    .block_n = c.block_n,
                    .features = c.features(),
                    .cluster = c.cluster,
                    .resident = c.min_blocks()});
  }
  return list;
}

std::vector<GemmKernel> mma_kernels(Promotion promotion, Epilogue epilogue, int block_k, int family) {
  const bool fine = block_k != 0 && block_k != 128;
  std::vector<GemmKernel> list;
  for (const GemmConfig& c : gemm_configs(promotion, fine, epilogue, family)) {
    list.push_back({.id = gemm_id(c),
                    .block_m = c.block_m,
                    .block_n = c.block_n,
                    .features = c.features(),
                    .resident = c.min_blocks});
  }
  return list;
}

namespace {

// Token tiles that an expert's rows need on average, where tokens choose experts at random: the rows are Poisson
// distributed, near enough to a normal distribution. E[ceil(rows / block)] = sum over j of P(rows > j * block).
double expected_tiles(double mean, int block) {
  const double spread = std::sqrt(2 * mean) + 1e-9;
  double tiles = 0;
  for (int j = 0;; ++j) {
    const double above = 0.5 * std::erfc((static_cast<double>(j) * block + 0.5 - mean) / spread);
    if (above < 1e-3) return tiles;
    tiles += above;
  }
}

}  // namespace

double cost(const GemmKernel& kernel, const TuneKey& key, double rows, const CostConstants& constants) {
  const double mean = rows / static_cast<double>(key.experts);
  if (kernel.wgmma) {
    // As wide as its rows need; CTAs of a cluster share the weights.
    const double tiles = expected_tiles(mean, kernel.block_n * kernel.cluster) * kernel.cluster;
    return mean + std::max(1e-3, tiles) * (kernel.cluster > 1 ? 36 : kernel.resident > 1 ? 64 : constants.tile);
  }
  return std::max(1e-3, expected_tiles(mean, kernel.block_n)) * (kernel.block_n + 48);
}

std::size_t cheapest(const std::vector<GemmKernel>& list, const TuneKey& key, double rows,
                     const CostConstants& constants) {
  std::size_t best = 0;
  double least = std::numeric_limits<double>::infinity();
  for (std::size_t i = 0; i < list.size(); ++i) {
    const double c = cost(list[i], key, rows, constants);
    if (c < least) {
      least = c;
      best = i;
    }
  }
  return best;
}

}  // namespace octomoe::plan
