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
  std::optional<double> host_us = {};  // GPU: what an eager call costs the host

  double gb_per_s() const { return bytes / timing.median_us / 1e3; }
  double tops() const { return ops / timing.median_us / 1e6; }
};

struct BenchBlock {  // one token count
  std::int64_t tokens = 0, routes = 0, touched_experts = 0;
  std::vector<BenchRow> rows = {};
  std::optional<double> clock_mhz = {};  // GPU: after the last round

  const BenchRow* peer() const;  // the fastest one
  const BenchRow* find(const std::string& name) const;
};

struct BenchReport {
  Machine machine;
  std::string device = "cpu";
  nlohmann::ordered_json gpu = nullptr;
  bool graph = false;  // GPU: calls were replayed from a CUDA graph
  bool replay = true;  // GPU: the layer may launch graphs of its own (LayerOptions::replays)
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
