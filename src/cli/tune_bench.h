// What octomoe tune measures: every kernel that can run a layer's two GEMMs, as the layer launches them.
#pragma once

#include <cstdint>
#include <functional>
#include <string>
#include <vector>

#include "cli/gpu.h"
#include "cli/problem.h"
#include "plan/tuned.h"

namespace octomoe::cli {

struct TuneInput {
  ProblemShape shape;
  std::vector<Scheme> schemes;  // integer ones
  std::vector<std::int64_t> tokens;
  KernelFamily family = KernelFamily::automatic;  // only its kernels
  int rounds = 7;                                 // of the kernels that are not hopeless after the first
  int threads = 0;
  std::uint64_t seed = 0;
  std::function<void(double fraction, const std::string& what)> on_step = {};
};

struct TunePoint {
  std::int64_t tokens = 0;
  const char* matrix = "";  // "w13", "w2"
  plan::TuneKey key = {};
  std::int64_t rows = 0;  // the table's: what the layer asks it for
  plan::TuneChoice choice = {};
  std::string by_cost = {};  // what the cost model takes

  // How much longer the cost model's choice takes, 0.1: 10 %.
  double loss() const { return choice.us.at(by_cost) / choice.us.at(choice.kernel) - 1; }
};

// on_scheme gets what was measured of each scheme as soon as it is.
void tune(GpuBench& gpu, const TuneInput& in,
          const std::function<void(const Scheme& scheme, const std::vector<TunePoint>& points)>& on_scheme);

}  // namespace octomoe::cli
