// octomoe bench --study grouping: what one launch for all experts is worth against one launch for each.
#pragma once

#include <cstdint>
#include <functional>
#include <nlohmann/json.hpp>
#include <string>
#include <vector>

#include "cli/gpu.h"
#include "cli/harness.h"
#include "cli/problem.h"
#include "cli/row_groups.h"

namespace octomoe::cli {

struct StudyInput {
  ProblemShape shape;  // of a layer; its GEMM1 is studied: N 2I, K H
  Scheme scheme = Scheme::int8_channel();
  KernelFamily family = KernelFamily::automatic;
  std::vector<std::int64_t> tokens = {1, 16, 128, 1024, 8192}, experts = {8, 64, 256};
  HarnessOptions timing = {};
  Device device = {};
  std::uint64_t seed = 0;
  std::function<void(double fraction, const std::string& what)> on_step = {};
};

struct StudyWay {
  std::string name;  // "grouped", "grouped, weights in L2", "per expert", "per expert, 8 streams", "cuBLAS"
  std::int64_t launches = 0;
  std::string tile = {};  // "256x128"; empty: not known
  TileUse use = {};
  double occupancy = 0;  // CTAs / CTAs that fit on the GPU at once, the mean of the launches; 0: not known
  Timing graph = {}, eager = {};
  double host_us = 0;
  double clock_mhz = 0;  // right behind the calls
};

struct StudyCase {
  std::int64_t tokens = 0, experts = 0;
  Skew skew = Skew::even;
  std::int64_t rows = 0, busy_experts = 0, largest = 0;  // experts with rows; rows of the largest
  double waste_128 = 0;                                  // if every expert's rows were filled up to a multiple of 128
  double bytes = 0;                                      // weights in use, rows, result, once
  Floor floor = {};
  int weight_copies = 1;
  std::vector<StudyWay> ways = {};

  const StudyWay* find(const std::string& name) const;
  double rows_per_expert() const { return static_cast<double>(rows) / static_cast<double>(busy_experts); }
};

struct GroupingStudy {
  Scheme scheme = {};
  std::string family = {};  // of the kernels that ran: "sm80", "sm90"
  std::int64_t n = 0, k = 0;
  int top_k = 0;
  std::string device = {}, cublas = {};
  nlohmann::ordered_json gpu = nullptr;
  Ceilings ceilings = {};
  double launch_graph_us = 0, launch_eager_us = 0;  // of a kernel that does nothing
  std::vector<StudyCase> cases = {};
};

GroupingStudy study_grouping(const StudyInput& input);
std::string render(const GroupingStudy& study, bool colour);
nlohmann::ordered_json to_json(const GroupingStudy& study);

}  // namespace octomoe::cli
