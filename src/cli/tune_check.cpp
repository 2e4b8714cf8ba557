#include "cli/tune_check.h"

#include <fmt/format.h>
#include <fmt/ranges.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <set>

#include "cli/machine.h"
#include "cli/presets.h"
#include "cli/table.h"
#include "cli/terminal.h"
#include "octomoe/version.h"

namespace octomoe::cli {
namespace {

using plan::CostConstants;
using plan::GemmKernel;

struct Candidate {
  GemmKernel kernel;
  plan::GemmWork work;
  double us;
};
// One entry of the table for one family.
struct Point {
  std::size_t model;
  std::string where;
  std::vector<Candidate> candidates;  // that the cost model may choose
  double least_us;                    // of all that were measured, or of the family
};

std::string model_of(const plan::TuneKey& key) {
  const bool gated = key.epilogue != kernels::Epilogue::store;
  for (const Preset& p : kPresets) {
    const std::int64_t n = gated ? 2 * p.intermediate : p.hidden, k = gated ? p.hidden : p.intermediate;
    if (key.n == n && key.k == k) return p.name;
  }
  return fmt::format("{} x {}", key.n, key.k);
}

std::vector<GemmKernel> known_kernels(const plan::TuneKey& key) {
  std::vector<GemmKernel> all = plan::wgmma_kernels(key.promotion, key.epilogue, key.block_k);
  for (const int family : {90, 80, 89}) {
    for (GemmKernel& k : plan::mma_kernels(key.promotion, key.epilogue, key.block_k, family)) {
      if (std::ranges::find(all, k.id, &GemmKernel::id) == all.end()) all.push_back(std::move(k));
    }
  }
  return all;
}

std::vector<Point> points_of(const plan::TunedTable& table, bool wgmma, std::vector<std::string>& models) {
  std::vector<Point> points;
  for (const auto& [key, by_rows] : table.entries()) {
    const std::vector<GemmKernel> known = known_kernels(key);
    for (const auto& [rows, choice] : by_rows) {
      Point p{.model = 0, .where = {}, .candidates = {}, .least_us = std::numeric_limits<double>::infinity()};
      for (const GemmKernel& k : known) {
        const auto us = choice.us.find(k.id);
        if (us == choice.us.end()) continue;
        // With wgmma kernels at hand the model looks at one other at most, but all count.
        if (wgmma || !k.wgmma) p.least_us = std::min(p.least_us, us->second);
        if (wgmma == k.wgmma || (wgmma && k.can_stand_in())) {
          p.candidates.push_back({k, plan::work_of(k, key, static_cast<double>(rows)), us->second});
          p.candidates.back().kernel.stands_in = wgmma && !k.wgmma;
        }
      }
      // A family of which nothing was measured has no choice; a kernel that stands in is none of its own.
      if (std::ranges::none_of(p.candidates, [&](const Candidate& c) { return c.kernel.wgmma == wgmma; })) continue;
      const std::string model = model_of(key);
      p.model = static_cast<std::size_t>(std::ranges::find(models, model) - models.begin());
      if (p.model == models.size()) models.push_back(model);
      p.where = fmt::format("{} {} of {} rows", plan::to_string(key.promotion),
                            key.epilogue != kernels::Epilogue::store ? "w13" : "w2", rows);
      points.push_back(std::move(p));
    }
  }
  return points;
}

double loss(const Point& p, const CostConstants& constants) {
  double least = std::numeric_limits<double>::infinity(), us = 0;
  for (const Candidate& c : p.candidates) {
    const double cost = plan::cost(c.kernel, c.work, constants);
    if (cost < least) {
      least = cost;
      us = c.us;
    }
  }
  return us / p.least_us - 1;
}

// The same where costs are uncertain by `kDoubt`: what the near misses of the choice would cost counts too, so that
// constants stand off from values at which a choice turns over.
double doubtful_loss(const Point& p, const CostConstants& constants) {
  constexpr double kDoubt = 0.05;
  std::vector<double> costs;
  for (const Candidate& c : p.candidates) costs.push_back(plan::cost(c.kernel, c.work, constants));
  const double least = *std::ranges::min_element(costs);
  double sum = 0, weights = 0;
  for (std::size_t i = 0; i < costs.size(); ++i) {
    const double weight = std::exp((least - costs[i]) / (kDoubt * std::max(least, 1e-9)));
    sum += weight * (p.candidates[i].us / p.least_us - 1);
    weights += weight;
  }
  return sum / weights;
}

template <class Wanted>
Losses losses(const std::vector<Point>& points, const CostConstants& constants, const Wanted& wanted,
              std::string* worst_at = nullptr) {
  Losses l;
  double count = 0;
  for (const Point& p : points) {
    if (!wanted(p)) continue;
    const double x = loss(p, constants);
    ++count;
    l.mean += x;
    l.over_goal += x > kLossGoal ? 1 : 0;
    if (x > l.worst) {
      l.worst = x;
      if (worst_at != nullptr) *worst_at = p.where;
    }
  }
  if (count > 0) l.mean /= count;
  return l;
}

// From an opening and constants that say nothing, one after another is set to the value with the least doubtful loss
// (mean square), four times through; of neighbouring values that are equally good, the middle one. What a tile's stages
// and its opening cost depend on each other, so several openings are tried first.
template <class Wanted>
CostConstants fit(const std::vector<Point>& points, bool wgmma, const Wanted& wanted) {
  const std::vector<double> openings = {0, 25, 50, 75, 100, 150, 200, 300, 400, 600, 800, 1200};
  const std::vector<double> epilogues = {0, 1, 1.5, 2, 2.5, 3, 4, 5, 6, 8};
  const std::vector<double> feeds = {0, 0.1, 0.15, 0.2, 0.225, 0.25, 0.275, 0.3, 0.325, 0.35, 0.4};
  const std::vector<double> ratios = {0.5, 0.75, 1, 1.25, 1.5, 1.75, 2};
  std::vector<double> factors, parts;
  for (int percent = 100; percent <= 150; percent += 2) factors.push_back(percent / 100.0);
  for (int percent = 0; percent <= 20; percent += 2) parts.push_back(percent / 100.0);
  struct Search {
    double CostConstants::*constant;
    const std::vector<double>& values;
  };
  const std::vector<Search> of_wgmma = {{&CostConstants::epilogue, epilogues},
                                        {&CostConstants::feed, feeds},
                                        {&CostConstants::token_major, ratios},
                                        {&CostConstants::stand_in_opening, openings},
                                        {&CostConstants::opening, openings}};
  const std::vector<Search> of_mma = {{&CostConstants::mma_feed, feeds},
                                      {&CostConstants::mma_resident, factors},
                                      {&CostConstants::mma_least, parts},
                                      {&CostConstants::mma_opening, openings}};
  CostConstants best;
  double least_of_all = std::numeric_limits<double>::infinity();
  for (const double opening : {0, 200, 400, 800}) {
    CostConstants c{opening, 0, 0, 1, 0, opening, 1, 0, 0};
    double least = 0;
    for (int sweep = 0; sweep < 4; ++sweep) {
      for (const auto& [constant, values] : wgmma ? of_wgmma : of_mma) {
        least = std::numeric_limits<double>::infinity();
        std::vector<double> equals;
        for (const double v : values) {
          c.*constant = v;
          double sum = 0;
          for (const Point& p : points) {
            if (!wanted(p)) continue;
            const double x = doubtful_loss(p, c);
            sum += x * x;
          }
          if (sum < least - 1e-9) {
            least = sum;
            equals.clear();
          }
          if (sum <= least + 1e-9) equals.push_back(v);
        }
        c.*constant = equals[equals.size() / 2];
      }
    }
    if (least < least_of_all) {
      least_of_all = least;
      best = c;
    }
  }
  return best;
}

}  // namespace

TuneCheck check_costs(const plan::TunedTable& table) {
  TuneCheck check;
  std::set<std::string> devices;
  for (const auto& [key, by_rows] : table.entries()) devices.insert(key.device);
  check.devices.assign(devices.begin(), devices.end());
  for (const bool wgmma : {true, false}) {
    std::vector<std::string> models;
    const std::vector<Point> points = points_of(table, wgmma, models);
    if (points.empty()) continue;
    const auto all = [](const Point&) { return true; };
    const CostConstants fitted = fit(points, wgmma, all);
    if (wgmma) {
      check.fitted = fitted;
    } else {
      check.fitted.mma_opening = fitted.mma_opening;
      check.fitted.mma_resident = fitted.mma_resident;
      check.fitted.mma_least = fitted.mma_least;
      check.fitted.mma_feed = fitted.mma_feed;
    }
    check.leaves_out = models.size() > 1;
    CheckRow total{.model = "all", .family = wgmma ? "sm90" : "sm80", .points = points.size()};
    total.built = losses(points, check.built, all);
    for (std::size_t m = 0; m < models.size(); ++m) {
      const auto this_one = [m](const Point& p) { return p.model == m; };
      CheckRow row{.model = models[m], .family = total.family};
      row.points = static_cast<std::size_t>(std::ranges::count_if(points, this_one));
      row.built = losses(points, check.built, this_one, &row.worst_at);
      if (check.leaves_out) {
        const CostConstants others = fit(points, wgmma, [m](const Point& p) { return p.model != m; });
        row.worst_at.clear();
        row.left_out = losses(points, others, this_one, &row.worst_at);
        total.left_out.mean += row.left_out.mean * static_cast<double>(row.points) / static_cast<double>(points.size());
      }
      const Losses& counted = check.leaves_out ? row.left_out : row.built;
      const Losses& so_far = check.leaves_out ? total.left_out : total.built;
      if (counted.worst >= so_far.worst) total.worst_at = row.model + ", " + row.worst_at;
      total.left_out.worst = std::max(total.left_out.worst, row.left_out.worst);
      total.left_out.over_goal += row.left_out.over_goal;
      check.rows.push_back(row);
    }
    check.rows.push_back(total);
  }
  return check;
}

std::string render(const TuneCheck& check, bool colour) {
  Table table({{"model", true},
               {"family", true},
               {"points"},
               {"mean"},
               {"worst"},
               {"over 10 %"},
               {"left out: mean"},
               {"worst"},
               {"over 10 %"},
               {"worst at", true}});
  const auto percent = [](double x) {
    return Table::Cell(fmt::format("{:.1f} %", 100 * x), x > kLossGoal ? Style::warn : Style::plain);
  };
  for (const CheckRow& r : check.rows) {
    const auto cells = [&](const Losses& l, bool known) -> std::vector<Table::Cell> {
      if (!known) return {"-", "-", "-"};
      return {percent(l.mean), percent(l.worst), fmt::format("{}", l.over_goal)};
    };
    std::vector<Table::Cell> row = {r.model, r.family, fmt::format("{}", r.points)};
    for (Table::Cell& c : cells(r.built, true)) row.push_back(std::move(c));
    for (Table::Cell& c : cells(r.left_out, check.leaves_out)) row.push_back(std::move(c));
    row.emplace_back(r.worst_at);
    table.add(std::move(row));
  }
  std::string text = fmt::format("How much longer the cost model's choices take than the fastest kernel, on {}\n\n{}\n",
                                 fmt::join(check.devices, ", "), table.render(colour));
  text += check.leaves_out ? "left out: with constants fitted to the other models\n"
                           : "left out: - (that takes tables of two models)\n";
  for (const auto& [name, c] : {std::pair{"built in", &check.built}, {"fitted to all", &check.fitted}}) {
    text += fmt::format(
        "constants {}: opening {}, epilogue {}, feed {}, token_major {}, stand_in_opening {}, mma_opening {}, "
        "mma_resident {}, mma_least {}, mma_feed {}\n",
        name, c->opening, c->epilogue, c->feed, c->token_major, c->stand_in_opening, c->mma_opening, c->mma_resident,
        c->mma_least, c->mma_feed);
  }
  return text;
}

nlohmann::ordered_json to_json(const TuneCheck& check) {
  const auto constants = [](const CostConstants& c) {
    return nlohmann::ordered_json{{"opening", c.opening},
                                  {"epilogue", c.epilogue},
                                  {"feed", c.feed},
                                  {"token_major", c.token_major},
                                  {"stand_in_opening", c.stand_in_opening},
                                  {"mma_opening", c.mma_opening},
                                  {"mma_resident", c.mma_resident},
                                  {"mma_least", c.mma_least},
                                  {"mma_feed", c.mma_feed}};
  };
  const auto rounded = [](double x) { return std::round(1e4 * x) / 1e4; };
  nlohmann::ordered_json rows = nlohmann::ordered_json::array();
  for (const CheckRow& r : check.rows) {
    rows.push_back({{"model", r.model},
                    {"family", r.family},
                    {"points", r.points},
                    {"mean_loss", rounded(r.built.mean)},
                    {"worst_loss", rounded(r.built.worst)},
                    {"over_10_percent", r.built.over_goal},
                    {"left_out_mean_loss", nullptr},
                    {"left_out_worst_loss", nullptr},
                    {"left_out_over_10_percent", nullptr},
                    {"worst_at", r.worst_at}});
    if (check.leaves_out) {
      rows.back()["left_out_mean_loss"] = rounded(r.left_out.mean);
      rows.back()["left_out_worst_loss"] = rounded(r.left_out.worst);
      rows.back()["left_out_over_10_percent"] = r.left_out.over_goal;
    }
  }
  return {{"version", OCTOMOE_VERSION},
          {"date", date_utc()},
          {"commit", commit()},
          {"devices", check.devices},
          {"constants", constants(check.built)},
          {"fitted", constants(check.fitted)},
          {"results", rows}};
}

}  // namespace octomoe::cli
