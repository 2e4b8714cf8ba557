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
  std::string adding = {};  // of the kernel that has the same tiles and adds them to rows of out; empty: there is none
  bool wgmma = false;
  int block_m = 0, block_n = 0;  // a tile: weight rows, most tokens
  int min_n = 16;                // wgmma: tokens that a tile is computed for at least
  int step_n = 16;               // a tile is as wide as its rows need, in steps of so many tokens
  int features = 0;              // output columns of a tile
  int cluster = 1;               // CTAs that share the weights of neighbouring token tiles
  int resident = 1;              // CTAs of a multiprocessor
  int token_box = 0;             // wgmma: rows of a box of the tokens' map
  bool token_major = false;      // wgmma: tokens are the M operand
  int weight_box = 0;            // token_major: rows of a box of the weights' map
  bool stands_in = false;        // mma.sync, for wgmma kernels where their tiles are few
  double stands_for = 0;         // mma.sync: it may stand in with so many tiles of its own a multiprocessor

  bool can_stand_in() const { return stands_for > 0; }
};
// Of the wgmma kernels, and of the mma.sync ones with the tiles of a family (catalogue.h: tile_family).
std::vector<GemmKernel> wgmma_kernels(kernels::Promotion promotion, kernels::Epilogue epilogue, int block_k);
std::vector<GemmKernel> mma_kernels(kernels::Promotion promotion, kernels::Epilogue epilogue, int block_k, int family);

// The unit of all that follows: the products of one token and one stage (128 columns of K) of a 256-row tile.
// `octomoe tune --check` fits them to a table and says what they are worth on shapes that the fit has not seen; those
// here are round values near such a fit.
struct CostConstants {
  // wgmma
  double opening = 400;           // a tile's, whatever its width
  double epilogue = 1;            // of a token
  double feed = 0.1;              // a row's part of a stage, of weights or tokens, on its way from L2
  double token_major = 1;         // the opening's factor where tokens are the M operand
  double stand_in_opening = 600;  // of a kernel that stands in for wgmma's
  // mma.sync
  double mma_opening = 1000;
  double mma_resident = 1.3;  // a tile of two that share a multiprocessor
  double mma_least = 0.2;     // a stage of a tile without rows would take so much of a full one's time
  double mma_feed = 0.3;      // a row's part of a stage on its way from L2
};

// What a kernel has to do, however long that takes.
struct GemmWork {
  double rounds;  // tiles of the CTA that has most of them
  double tiles;   // in all
  double each;    // and of a multiprocessor
  double width;   // tokens that a tile is computed for, on average
  double fed;     // and those that it reads
  double stages;  // of K
};
GemmWork work_of(const GemmKernel& kernel, const TuneKey& key, double rows);

double cost(const GemmKernel& kernel, const GemmWork& work, const CostConstants& constants = {});

}  // namespace octomoe::plan
