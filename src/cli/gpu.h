// Timing on a GPU: its ceilings, its clock, and calls that are made many times between two events. Every GPU time of
// the command comes from here, by way of the rounds of harness.h.
#pragma once

#include <cstdint>
#include <functional>
#include <memory>
#include <nlohmann/json.hpp>
#include <string>
#include <vector>

#include "cli/bench_report.h"
#include "cli/harness.h"
#include "octomoe/layer.h"

namespace octomoe::cuda {
struct DeviceInfo;
}

namespace octomoe::cli {

// Puts work on a stream and returns: a layer's forward, a GEMM, a read.
using GpuCall = std::function<void(Stream)>;

inline constexpr int kGpuCalls = 16;  // of a layer, between two events

class GpuBench {
 public:
  explicit GpuBench(Device device);
  ~GpuBench();

  Ceilings ceilings();  // a plain read of 1 GiB; mma.sync m16n8k32 on registers
  nlohmann::ordered_json describe() const;
  Device device() const;
  const cuda::DeviceInfo& info() const;
  Stream stream() const;  // everything is timed there
  void synchronize() const;

  // How many copies of something that a call reads `bytes` of must take turns, so that four times L2 passes before a
  // call meets the same bytes again; at most kGpuCalls.
  int copies(double bytes) const;

  // Microseconds a call: all of them between two events. With `graph`, they are one captured graph. `clocks` gets the
  // clock of the SMs in MHz right behind the calls, each time.
  using Clocks = std::shared_ptr<std::vector<double>>;
  Contender contender(const std::string& name, std::vector<GpuCall> calls, bool graph, const Clocks& clocks = {}) const;
  // The same for one call that finds nothing of its own in L2: another read comes first, outside the events.
  Contender cold_contender(const std::string& name, GpuCall call);
  // Plain reads of `bytes`, each elsewhere in memory: what a floor by memory is made of.
  Contender read_contender(double bytes, bool graph);
  GpuCall empty_call() const;  // one launch of one block that does next to nothing
  // What a call costs the thread that makes it, over and over, on a stream that was idle.
  double host_us(const std::vector<GpuCall>& calls) const;

  struct WorkspaceUse {
    double bytes = 0, live_bytes = 0;
  };
  WorkspaceUse workspace(const GpuCall& layer_call) const;  // makes the call

 private:
  struct Impl;
  std::unique_ptr<Impl> impl_;
};

}  // namespace octomoe::cli
