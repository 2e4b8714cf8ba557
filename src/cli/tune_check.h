// octomoe tune --check: what the cost model's choices are worth beside those that a table has measured.
#pragma once

#include <cstdint>
#include <nlohmann/json.hpp>
#include <string>
#include <vector>

#include "plan/cost.h"
#include "plan/tuned.h"

namespace octomoe::cli {

// How much longer the choices take than the fastest kernel, 0.1: 10 %.
struct Losses {
  double mean = 0, worst = 0;
  std::size_t over_goal = 0;  // choices that take more than kLossGoal longer
};
inline constexpr double kLossGoal = 0.1;

struct CheckRow {
  std::string model;   // of presets.h, else "n x k"
  std::string family;  // "sm90": its choices among wgmma kernels, beside the fastest of all; "sm80": mma.sync only
  std::size_t points = 0;
  Losses built = {};          // with the constants of this build
  Losses left_out = {};       // with constants fitted to the other models
  std::string worst_at = {};  // of left_out, else of built
};

struct TuneCheck {
  std::vector<std::string> devices = {};
  std::vector<CheckRow> rows = {};              // at the end of each family all of its models together
  bool leaves_out = false;                      // false: the table has one model only, and left_out is empty
  plan::CostConstants built = {}, fitted = {};  // fitted to all models
};

TuneCheck check_costs(const plan::TunedTable& table);
std::string render(const TuneCheck& check, bool colour);
nlohmann::ordered_json to_json(const TuneCheck& check);

}  // namespace octomoe::cli
