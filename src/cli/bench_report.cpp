#include "cli/bench_report.h"

#include <fmt/format.h>

#include <algorithm>
#include <cmath>

#include "cli/table.h"
#include "octomoe/version.h"

namespace octomoe::cli {

using Json = nlohmann::ordered_json;

const BenchRow* BenchBlock::peer() const {
  const BenchRow* best = nullptr;
  for (const BenchRow& r : rows) {
    if (r.is_peer && (!best || r.timing.median_us < best->timing.median_us)) best = &r;
  }
  return best;
}
const BenchRow* BenchBlock::find(const std::string& name) const {
  for (const BenchRow& r : rows) {
    if (r.name == name) return &r;
  }
  return nullptr;
}

double worst_spread(const BenchReport& report) {
  double worst = 0;
  for (const BenchBlock& b : report.blocks) {
    for (const BenchRow& r : b.rows) worst = r.is_peer ? worst : std::max(worst, r.timing.spread());
  }
  return worst;
}

std::string render_header(const BenchReport& r, bool colour) {
  const ProblemShape& s = r.shape;
  const std::string local = s.experts_local < s.experts ? fmt::format(" ({} here)", s.experts_local) : "";
  if (!r.gpu.is_null()) {
    return fmt::format(
        "{}: E {}{}, k {}, H {}, I {}, routing {}\n"
        "{} ({}), {}; ceilings: read {:.0f} GB/s, int8 by mma.sync {:.0f} TOPS\n",
        styled(r.model, Style::bold, colour), s.experts, local, s.top_k, s.hidden, s.intermediate, r.routing,
        r.gpu["name"].get<std::string>(), r.device, r.graph ? "CUDA graph" : "eager", r.ceilings.read_bytes_per_s / 1e9,
        r.ceilings.int8_ops_per_s / 1e12);
  }
  return fmt::format(
      "{}: E {}{}, k {}, H {}, I {}, routing {}\n"
      "CPU engine ({}), {} thread{}; ceilings: read {:.1f} GB/s, int8 {:.3f} TOPS\n",
      styled(r.model, Style::bold, colour), s.experts, local, s.top_k, s.hidden, s.intermediate, r.routing,
      r.machine.isa, r.threads, r.threads == 1 ? "" : "s", r.ceilings.read_bytes_per_s / 1e9,
      r.ceilings.int8_ops_per_s / 1e12);
}

namespace {

// Events between the launches keep them from overlapping, so the stages take longer than the layer.
std::string render_stages(const BenchBlock& b, bool colour) {
  double sum = 0;
  for (const StageTime& s : b.stages) sum += s.timing.median_us;
  Table table({{"stage", true}, {"time"}, {"spread"}, {"share"}});
  for (const StageTime& s : b.stages) {
    table.add({s.name, Table::Cell(format_us(s.timing.median_us), Style::bold),
               fmt::format("+-{:.1f} %", 100 * s.timing.spread()),
               fmt::format("{:.1f} %", 100 * s.timing.median_us / sum)});
  }
  table.add({"sum", format_us(sum), "", ""});
  return table.render(colour);
}

Json timing_json(const Timing& t) {
  return {{"median_us", t.median_us}, {"p10_us", t.p10_us}, {"p90_us", t.p90_us}, {"min_us", t.min_us}};
}

}  // namespace

double BenchBlock::read_bytes_per_s() const { return read ? 1e6 * read_bytes / read->median_us : 0; }

std::string render(const BenchBlock& b, bool colour) {
  const BenchRow* const peer = b.peer();
  const BenchRow* const bf16 = b.find("bf16");
  std::vector<Table::Column> columns = {{fmt::format("T = {}", b.tokens), true},
                                        {"time"},
                                        {"spread"},
                                        {"floor"},
                                        {"limit", true},
                                        {"of floor"},
                                        {"GB/s"},
                                        {"TOPS"}};
  if (bf16) columns.push_back({"vs bf16"});
  if (peer) columns.push_back({"vs peer"});
  const bool on_gpu = b.read.has_value();
  const bool eager = !b.rows.empty() && b.rows.front().eager.has_value();
  if (eager) columns.push_back({"eager"});
  if (on_gpu) columns.insert(columns.end(), {{"host"}, {"host new"}, {"SM clock"}});
  columns.push_back({"workspace"});
  Table table(columns);
  for (const BenchRow& r : b.rows) {
    std::vector<Table::Cell> cells = {Table::Cell(r.name, r.is_peer ? Style::dim : Style::plain),
                                      {format_us(r.timing.median_us), Style::bold},
                                      fmt::format("+-{:.1f} %", 100 * r.timing.spread()),
                                      format_us(r.floor.us),
                                      r.floor.by_memory ? "memory" : "compute",
                                      fmt::format("{:.0f} %", 100 * r.floor.us / r.timing.median_us),
                                      fmt::format("{:.1f}", r.gb_per_s()),
                                      fmt::format("{:.3f}", r.tops())};
    const auto ratio = [&](const BenchRow* other) {
      if (!other) return;
      const double x = other->timing.median_us / r.timing.median_us;
      cells.emplace_back(format_ratio(x), x > 1.005 ? Style::good : Style::plain);
    };
    ratio(bf16);
    ratio(peer);
    if (eager) cells.emplace_back(r.eager ? format_us(r.eager->median_us) : "-");
    if (on_gpu) {
      for (const auto& us : {r.host_us, r.host_new_us}) cells.emplace_back(us ? format_us(*us) : "-");
      cells.emplace_back(fmt::format("{:.0f} MHz", quantile(r.clocks_mhz, 0.5)));
    }
    std::string workspace = r.workspace_bytes ? format_bytes(*r.workspace_bytes) : "-";
    if (r.live_bytes) {
      workspace += fmt::format(" = {:.2f} x {} live", *r.workspace_bytes / *r.live_bytes, format_bytes(*r.live_bytes));
    }
    cells.emplace_back(workspace);
    table.add(cells);
  }
  std::string gpu;
  if (on_gpu) {
    gpu = fmt::format("; a plain read of {}: {} ({:.0f} GB/s)", format_bytes(b.read_bytes),
                      format_us(b.read->median_us), b.read_bytes_per_s() / 1e9);
  }
  const auto count = [](double x) { return fmt::format("{:.{}f}", x, x == std::floor(x) ? 0 : 1); };
  std::string text = fmt::format("{} routes to {} experts, {} rounds{}\n{}", count(b.routes), count(b.touched_experts),
                                 b.rows.empty() ? 0 : b.rows.front().timing.rounds, gpu, table.render(colour));
  if (!b.stages.empty()) text += "\n" + render_stages(b, colour);
  return text;
}

Json to_json(const BenchReport& r) {
  const auto or_null = [](const auto& value) { return value ? Json(*value) : Json(nullptr); };
  Json results = Json::array();
  for (const BenchBlock& b : r.blocks) {
    for (const BenchRow& row : b.rows) {
      const auto clock = [&](double q) {
        return row.clocks_mhz.empty() ? Json(nullptr) : Json(quantile(row.clocks_mhz, q));
      };
      const auto ratio = [&](const BenchRow* other) {
        return other ? Json(other->timing.median_us / row.timing.median_us) : Json(nullptr);
      };
      results.push_back({{"tokens", b.tokens},
                         {"name", row.name},
                         {"kind", row.is_peer ? "peer" : "scheme"},
                         {"device", r.device},
                         {"median_us", row.timing.median_us},
                         {"p10_us", row.timing.p10_us},
                         {"p90_us", row.timing.p90_us},
                         {"min_us", row.timing.min_us},
                         {"rounds", row.timing.rounds},
                         {"floor_us", row.floor.us},
                         {"floor_by", row.floor.by_memory ? "memory" : "compute"},
                         {"bytes", row.bytes},
                         {"ops", row.ops},
                         {"gb_per_s", row.gb_per_s()},
                         {"tops", row.tops()},
                         {"routes", b.routes},
                         {"touched_experts", b.touched_experts},
                         {"speedup_over_bf16", ratio(b.find("bf16"))},
                         {"speedup_over_peer", ratio(b.peer())},
                         {"weight_bytes", row.weight_bytes},
                         {"workspace_bytes", or_null(row.workspace_bytes)},
                         {"workspace_live_bytes", or_null(row.live_bytes)},
                         {"weight_copies", row.weight_copies},
                         {"eager", row.eager ? timing_json(*row.eager) : Json(nullptr)},
                         {"host_us", or_null(row.host_us)},
                         {"host_new_us", or_null(row.host_new_us)},
                         {"read_bytes_per_s", b.read ? Json(b.read_bytes_per_s()) : Json(nullptr)},
                         {"clock_mhz", clock(0.5)},
                         {"clock_low_mhz", clock(0.0)},
                         {"clock_high_mhz", clock(1.0)}});
      if (b.stages.empty()) continue;
      Json stages = Json::array();
      for (const StageTime& s : b.stages) {
        Json stage = timing_json(s.timing);
        stage["name"] = s.name;
        stages.push_back(stage);
      }
      results.back()["stages"] = stages;
    }
  }
  const ProblemShape& s = r.shape;
  return {
      {"version", OCTOMOE_VERSION},
      {"date", date_utc()},
      {"commit", commit()},
      {"machine", to_json(r.machine, r.threads)},
      {"gpu", r.gpu},
      {"family", r.family},
      {"graph", r.graph},
      {"replay", r.replay},
      {"prepack", r.prepack},
      {"combine_order", r.combine_order},
      {"ceilings", {{"read_bytes_per_s", r.ceilings.read_bytes_per_s}, {"int8_ops_per_s", r.ceilings.int8_ops_per_s}}},
      {"problem",
       {{"model", r.model},
        {"experts", s.experts},
        {"experts_local", s.experts_local},
        {"hidden", s.hidden},
        {"intermediate", s.intermediate},
        {"top_k", s.top_k},
        {"activation", "swiglu"},
        {"routing", r.routing},
        {"seed", r.seed}}},
      {"peer", r.peer_version.empty() ? Json(nullptr) : Json{{"name", "torch"}, {"version", r.peer_version}}},
      {"python_overhead_us", or_null(r.python_overhead_us)},
      {"results", results}};
}

}  // namespace octomoe::cli
