// One call of a layer taken apart: for a profiler, and as a table of its stages.
#pragma once

#include <string>
#include <vector>

#include "cli/gpu.h"
#include "cli/problem.h"

namespace octomoe::cli {

// What bench times plus the routing before it: logits that lead to the given ids, route, forward.
GpuCall routed_call(MoeLayer& layer, const Tensor& x, const Tensor& out, const Routes& routes, std::int64_t experts);

// Stages in the order of their first launch; those of one name are added up. One call a round, in turn.
std::vector<StageTime> time_stages(const GpuBench& gpu, const std::vector<GpuCall>& calls,
                                   const HarnessOptions& options);

// Exactly one call between cuProfilerStart and cuProfilerStop, with an NVTX range for the call and for each stage where
// the NVTX library is there. Error(unsupported) if the driver cannot start a profiler.
struct Profiled {
  bool ranges = false;
  std::string nvtx;  // what was found, or why not
};
Profiled profile_once(const GpuBench& gpu, const GpuCall& call, const std::string& name);

}  // namespace octomoe::cli
