// The grouping study as a table and as JSON.
#include <fmt/format.h>

#include "cli/machine.h"
#include "cli/study.h"
#include "cli/table.h"
#include "octomoe/version.h"

namespace octomoe::cli {
namespace {

using Json = nlohmann::ordered_json;

std::string percent(double part) { return fmt::format("{:.0f} %", 100 * part); }

Json to_json(const Timing& t) {
  return {{"median_us", t.median_us}, {"p10_us", t.p10_us}, {"p90_us", t.p90_us}, {"rounds", t.rounds}};
}

Json to_json(const StudyWay& w) {
  const bool ours = !w.tile.empty();
  const auto if_ours = [&](const auto& value) { return ours ? Json(value) : Json(nullptr); };
  return {{"name", w.name},
          {"launches", w.launches},
          {"tile", if_ours(w.tile)},
          {"tiles", if_ours(w.use.tiles)},
          {"waste", if_ours(w.use.waste())},
          {"tile_bytes", if_ours(w.use.bytes)},
          {"occupancy", if_ours(w.occupancy)},
          {"graph", to_json(w.graph)},
          {"eager", to_json(w.eager)},
          {"host_us", w.host_us},
          {"clock_mhz", w.clock_mhz}};
}

}  // namespace

std::string render(const GroupingStudy& s, bool colour) {
  std::string text = fmt::format(
      "{}: {} of [rows, {}] x [{}, {}] for each expert, k {}, {} kernels beside cuBLAS {} (int8 -> int32, no scales)\n"
      "{} ({}); ceilings: read {:.0f} GB/s, int8 by mma.sync {:.0f} TOPS; a launch that does nothing: {} in a graph, "
      "{} "
      "eager\n",
      styled("grouping", Style::bold, colour), to_string(s.scheme), s.k, s.n, s.k, s.top_k, s.family, s.cublas,
      s.gpu["name"].get<std::string>(), s.device, s.ceilings.read_bytes_per_s / 1e9, s.ceilings.int8_ops_per_s / 1e12,
      format_us(s.launch_graph_us), format_us(s.launch_eager_us));
  std::int64_t experts = 0;
  Table table({});
  const auto flush = [&] {
    if (!table.empty()) text += fmt::format("\n{}", table.render(colour));
  };
  for (const StudyCase& c : s.cases) {
    if (c.experts != experts) {
      flush();
      experts = c.experts;
      table = Table({{fmt::format("E = {}", experts), true},
                     {"rows/expert"},
                     {"way", true},
                     {"launches"},
                     {"tile"},
                     {"tiles"},
                     {"waste"},
                     {"occupancy"},
                     {"graph"},
                     {"spread"},
                     {"of floor"},
                     {"eager"},
                     {"host"},
                     {"vs grouped"}});
    }
    const StudyWay* const grouped = c.find("grouped");
    for (const StudyWay& w : c.ways) {
      const bool first = &w == &c.ways.front(), ours = !w.tile.empty();
      table.add({first ? fmt::format("T {} {}", c.tokens, to_string(c.skew)) : "",
                 first ? fmt::format("{:.1f}", c.rows_per_expert()) : "", w.name, fmt::format("{}", w.launches),
                 ours ? w.tile : "-", ours ? fmt::format("{}", w.use.tiles) : "-", ours ? percent(w.use.waste()) : "-",
                 ours ? percent(w.occupancy) : "-", Table::Cell(format_us(w.graph.median_us), Style::bold),
                 fmt::format("+-{:.1f} %", 100 * w.graph.spread()), percent(c.floor.us / w.graph.median_us),
                 format_us(w.eager.median_us), format_us(w.host_us),
                 format_ratio(w.graph.median_us / grouped->graph.median_us)});
    }
  }
  flush();
  return text +
         "\nrows/expert: of those that have rows. waste: tokens of the tiles that are not there. occupancy: CTAs over "
         "those that fit at once, mean of the launches.\nfloor: weights in use, rows and result once as fast as a "
         "plain "
         "read of as many bytes, or the operations at the int8 ceiling\n";
}

Json to_json(const GroupingStudy& s) {
  Json cases = Json::array();
  for (const StudyCase& c : s.cases) {
    Json ways = Json::array();
    for (const StudyWay& w : c.ways) ways.push_back(to_json(w));
    cases.push_back({{"tokens", c.tokens},
                     {"experts", c.experts},
                     {"skew", to_string(c.skew)},
                     {"rows", c.rows},
                     {"busy_experts", c.busy_experts},
                     {"rows_per_expert", c.rows_per_expert()},
                     {"largest_expert", c.largest},
                     {"waste_128", c.waste_128},
                     {"bytes", c.bytes},
                     {"floor_us", c.floor.us},
                     {"floor_by", c.floor.by_memory ? "memory" : "compute"},
                     {"weight_copies", c.weight_copies},
                     {"ways", ways}});
  }
  return {
      {"version", OCTOMOE_VERSION},
      {"date", date_utc()},
      {"commit", commit()},
      {"study", "grouping"},
      {"gpu", s.gpu},
      {"device", s.device},
      {"cublas", s.cublas},
      {"scheme", to_string(s.scheme)},
      {"family", s.family},
      {"n", s.n},
      {"k", s.k},
      {"top_k", s.top_k},
      {"ceilings", {{"read_bytes_per_s", s.ceilings.read_bytes_per_s}, {"int8_ops_per_s", s.ceilings.int8_ops_per_s}}},
      {"launch", {{"graph_us", s.launch_graph_us}, {"eager_us", s.launch_eager_us}}},
      {"cases", cases}};
}

}  // namespace octomoe::cli
