// Timing on a GPU: its ceilings, its clock, and layers that are called many times between two events.
#pragma once

#include <cstdint>
#include <memory>
#include <nlohmann/json.hpp>
#include <vector>

#include "cli/bench_report.h"
#include "cli/harness.h"
#include "octomoe/layer.h"

namespace octomoe::cli {

class GpuBench {
 public:
  explicit GpuBench(Device device);
  ~GpuBench();

  Ceilings ceilings();  // a plain read of 1 GiB; mma.sync m16n8k32 on registers
  double clock_mhz();   // right now
  nlohmann::ordered_json describe() const;

  // Calls of one layer, each with its own routes, so that successive calls want other experts' weights, as a model's
  // layers do, and find few of them in L2.
  struct Work {
    MoeLayer* layer;
    Tensor x, out;
    std::vector<Routes> routes;
  };
  // Microseconds a call. With `graph`, all calls are one captured graph.
  Contender contender(const std::string& name, Work work, bool graph);
  // What one of the calls costs the host when they are made eagerly, over and over, on a stream that was idle.
  double host_us(const Work& work);

 private:
  struct Impl;
  std::unique_ptr<Impl> impl_;
};

inline constexpr int kGpuCalls = 16;  // between two events

}  // namespace octomoe::cli
