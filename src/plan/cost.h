// The cost model of grouped GEMMs: how long a kernel of the catalogue takes for a matrix stack and a number of rows, as
// far as that decides between kernels. It knows no device but by its number of multiprocessors and takes no look at the
// routing (docs/performance.md says what its choices are worth beside measured ones).
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "plan/tuned.h"

namespace octomoe::plan {

// A GEMM kernel that can run a matrix stack.
struct GemmKernel {
  std::string id;
  bool wgmma = false;
  int block_m = 0, block_n = 0;  // a tile: weight rows, most tokens
  int features = 0;              // output columns of a tile
  int cluster = 1;               // CTAs that share the weights of neighbouring token tiles
  int resident = 1;              // CTAs of a multiprocessor
};
// Of the wgmma kernels, and of the mma.sync ones with the tiles of a family (catalogue.h: tile_family).
std::vector<GemmKernel> wgmma_kernels(kernels::Promotion promotion, kernels::Epilogue epilogue, int block_k);
std::vector<GemmKernel> mma_kernels(kernels::Promotion promotion, kernels::Epilogue epilogue, int block_k, int family);

// What of the model was measured.
struct CostConstants {
  double tile = 48;
};

// In no unit: only to be compared.
double cost(const GemmKernel& kernel, const TuneKey& key, double rows, const CostConstants& constants = {});

// The cheapest of `list`, which is not empty; the first of several.
std::size_t cheapest(const std::vector<GemmKernel>& list, const TuneKey& key, double rows,
                     const CostConstants& constants = {});

}  // namespace octomoe::plan
