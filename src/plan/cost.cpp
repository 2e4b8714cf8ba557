#include "plan/cost.h"

#include <algorithm>
#include <cmath>
#include <limits>

#include "plan/catalogue.h"

namespace octomoe::plan {
namespace {

using kernels::Epilogue;
using kernels::GemmConfig;
using kernels::Promotion;
using kernels::TokenMajorConfig;
using kernels::WgmmaConfig;

// Of the kernel that adds what this one stores.
template <class Config>
std::string adding_id(Config c) {
  if (c.epilogue != Epilogue::store) return {};
  c.epilogue = Epilogue::add;
  return gemm_id(c);
}

}  // namespace

std::vector<GemmKernel> wgmma_kernels(Promotion promotion, Epilogue epilogue, int block_k) {
  std::vector<GemmKernel> list;
  for (const WgmmaConfig& c : wgmma_configs()) {
    if (promotion != Promotion::channel || c.epilogue != epilogue) continue;
    list.push_back({.id = gemm_id(c),
                    .adding = adding_id(c),
                    .wgmma = true,
                    .block_m = c.block_m(),
                    .block_n = c.block_n,
                    .min_n = c.min_n(),
                    .features = c.features(),
                    .cluster = c.cluster,
                    .token_box = WgmmaConfig::kTokenBox});
  }
  for (const TokenMajorConfig& c : token_major_configs()) {
    if (c.promotion != promotion || c.epilogue != epilogue || c.block_stages * TokenMajorConfig::kBlockK != block_k) {
      continue;
    }
    list.push_back({.id = gemm_id(c),
                    .adding = adding_id(c),
                    .wgmma = true,
                    .block_m = c.block_m(),
                    .block_n = TokenMajorConfig::kBlockN,
                    .min_n = TokenMajorConfig::kTokenBox,
                    .step_n = TokenMajorConfig::kTokenBox,
                    .features = c.features(),
                    .token_box = TokenMajorConfig::kTokenBox,
                    .token_major = true,
                    .weight_box = c.box_rows()});
  }
  return list;
}

std::vector<GemmKernel> mma_kernels(Promotion promotion, Epilogue epilogue, int block_k, int family) {
  const bool fine = block_k != 0 && block_k != 128;
  // With gate and up, each with whole-number scales, a wgmma tile takes as long as a few of these.
  const bool whole_scales = promotion == Promotion::hybrid || promotion == Promotion::hybrid_flush;
  const double stands_for = whole_scales && epilogue != Epilogue::store ? 3 : 1;
  std::vector<GemmKernel> list;
  for (const GemmConfig& c : gemm_configs(promotion, fine, epilogue, family)) {
    // The narrowest, with which the catalogue begins, where those are tuned.
    list.push_back({.id = gemm_id(c),
                    .block_m = c.block_m,
                    .block_n = c.block_n,
                    .step_n = c.step_n(),
                    .features = c.features(),
                    .resident = c.min_blocks,
                    .stands_for = !fine && list.empty() ? stands_for : 0});
  }
  return list;
}

namespace {

struct Moments {
  double mean, variance;
};

// Of ceil(x / block) for a whole number x that is near normally distributed; more than 0 with probability `busy`.
// E[c] = sum over j of P(x > j * block), E[c^2] = sum of (2j + 1) P(x > j * block).
Moments ceil_of(Moments x, double block, double busy) {
  const double deviation = std::sqrt(x.variance) + 1e-9;
  const double certain = std::max(0.0, std::floor((x.mean - 5 * deviation) / block));  // P is 1 before
  double sum = certain, squares = certain * certain;
  for (double j = certain;; ++j) {
    const double above = j == 0 ? busy : 0.5 * std::erfc((j * block + 0.5 - x.mean) / (deviation * std::sqrt(2.0)));
    if (above < 1e-3) break;
    sum += above;
    squares += (2 * j + 1) * above;
  }
  return {sum, std::max(0.0, squares - sum * sum)};
}

}  // namespace

GemmWork work_of(const GemmKernel& kernel, const TuneKey& key, double rows) {
  // Tokens choose experts at random: an expert's rows are Poisson distributed.
  const auto experts = static_cast<double>(key.experts);
  const double mean = rows / experts;
  const Moments of_expert = ceil_of({mean, mean}, kernel.block_n * kernel.cluster, -std::expm1(-mean));
  const double weight_tiles = std::ceil(static_cast<double>(key.n) / kernel.block_m) * kernel.cluster;
  const Moments tiles{experts * of_expert.mean * weight_tiles,
                      experts * of_expert.variance * weight_tiles * weight_tiles};
  const double ctas = static_cast<double>(key.multiprocessors) * kernel.resident;
  // A wgmma tile reads its share of the rows in steps of 16, and is as wide in steps of its own. Of mma.sync tiles all
  // are full but an expert's last.
  const double of_tile = std::max(of_expert.mean * kernel.cluster, 1e-9), most = kernel.block_n;
  const double share = mean / of_tile;
  const double steps = kernel.wgmma ? 0 : ceil_of({mean, mean}, kernel.step_n, -std::expm1(-mean)).mean / of_tile;
  const double width = kernel.wgmma ? std::clamp<double>(share + kernel.step_n / 2.0, kernel.min_n, most)
                                    : std::clamp<double>(steps * kernel.step_n, kernel.step_n, most);
  return {.rounds = ceil_of(tiles, ctas, 1).mean,
          .tiles = tiles.mean,
          .each = tiles.mean / static_cast<double>(key.multiprocessors),
          .width = width,
          .fed = kernel.wgmma ? std::clamp<double>(share + 8, 16, most) : width,
          .stages = std::ceil(static_cast<double>(key.k) / 128)};
}

double cost(const GemmKernel& kernel, const GemmWork& work, const CostConstants& constants) {
  if (kernel.stands_in) {
    if (work.each > kernel.stands_for) return std::numeric_limits<double>::infinity();
    return std::max(work.each, 1.0) * constants.feed * (kernel.block_m + work.fed) * work.stages +
           constants.stand_in_opening;
  }
  // A multiprocessor's tiles of a round have 256 rows, most of them.
  const double resident = std::clamp(work.each, 1.0, static_cast<double>(kernel.resident));
  const double part = kernel.block_m * resident / 256.0;
  if (!kernel.wgmma) {
    const double width = constants.mma_least * kernel.block_n + (1 - constants.mma_least) * work.width;
    const double stage = std::max(width, constants.mma_feed * (kernel.block_m + work.fed));
    const double shared = 1 + (constants.mma_resident - 1) * (resident - 1);
    return work.rounds * shared * (part * stage * work.stages + constants.mma_opening);
  }
  const double stage = std::max(work.width, constants.feed * (kernel.block_m + work.fed));
  const double opening = constants.opening * (kernel.token_major ? constants.token_major : 1);
  return work.rounds * (part * (stage * work.stages + work.fed * constants.epilogue) + opening);
}

}  // namespace octomoe::plan
