// What bench found out, as a table for people and JSON for files.
#pragma once

#include <cstdint>
#include <nlohmann/json.hpp>
#include <optional>
#include <string>
#include <vector>

#include "cli/harness.h"
#include "cli/machine.h"
#include "cli/problem.h"

namespace octomoe::cli {

struct Ceilings {
  double read_bytes_per_s = 0, int8_ops_per_s = 0;
};

struct BenchRow {
  std::string name;  // the scheme, or the peer
  bool is_peer = false;
  Timing timing = {};
  double bytes = 0, ops = 0;  // the least that must be moved and done
  Floor floor = {};
  double weight_bytes = 0;
  std::optional<double> workspace_bytes = {};
  // GPU
  std::optional<double> live_bytes = {};   // the most of the workspace that is alive at once: no plan can need less
  std::optional<Timing> eager = {};        // with a graph: the same calls, made one by one
  std::optional<double> host_us = {};      // what an eager call costs the host, with the same tensors every time
  std::optional<double> host_new_us = {};  // with every call's elsewhere in memory
  std::vector<double> clocks_mhz = {};     // right behind the calls of each round
  int weight_copies = 1;                   // that calls take turns with, so that weights are not found in L2

  double gb_per_s() const { return bytes / timing.median_us / 1e3; }
  double tops() const { return ops / timing.median_us / 1e6; }
};

struct StageTime {  // of one layer, with an event at each end
  std::string name;
  Timing timing;
};

struct BenchBlock {  // one token count
  std::int64_t tokens = 0;
  double routes = 0, touched_experts = 0;  // means of the calls
  std::vector<BenchRow> rows = {};
  // GPU
  std::optional<Timing> read = {};  // a plain read of read_bytes in the same rounds
  double read_bytes = 0;
  std::vector<StageTime> stages = {};  // --profile

  const BenchRow* peer() const;  // the fastest one
  const BenchRow* find(const std::string& name) const;
  double read_bytes_per_s() const;
};

struct BenchReport {
  Machine machine;
  std::string device = "cpu";
  nlohmann::ordered_json gpu = nullptr;
  std::string family = "automatic";     // GPU: LayerOptions::family
  bool graph = false;                   // GPU: calls were replayed from a CUDA graph
  bool prepack = false;                 // GPU: weights in panels
  std::string combine_order = "slots";  // GPU: LayerOptions::combine_order
  bool replay = true;                   // GPU: the layer may launch graphs of its own (LayerOptions::replays)
  int threads = 0;
  Ceilings ceilings;
  std::string model;  // the preset, or "custom"
  ProblemShape shape;
  std::string routing;
  std::uint64_t seed = 0;
  std::string peer_version;                  // of torch; empty without a peer
  std::optional<double> python_overhead_us;  // of a call of octomoe from Python
  std::vector<BenchBlock> blocks;
};

double worst_spread(const BenchReport& report);  // of the schemes
std::string render_header(const BenchReport& report, bool colour);
std::string render(const BenchBlock& block, bool colour);
nlohmann::ordered_json to_json(const BenchReport& report);

}  // namespace octomoe::cli
