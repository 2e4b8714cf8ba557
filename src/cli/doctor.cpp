// octomoe doctor: what this machine offers to each engine, and how to get what is missing.
#include <fmt/format.h>
#include <fmt/ranges.h>

#include <memory>
#include <nlohmann/json.hpp>
#include <set>

#include "cli/cli.h"
#include "cli/cuda_probe.h"
#include "cli/machine.h"
#include "cli/table.h"
#include "cli/terminal.h"
#include "octomoe/error.h"
#include "octomoe/packs.h"
#include "octomoe/version.h"
#include "plan/tuned.h"

namespace octomoe::cli {
namespace {

using Json = nlohmann::ordered_json;

// Packs that the library would use; why not, where one is refused.
Json packs() {
  Json list = Json::array();
  try {
    for (const std::string& p : kernel_packs()) list.push_back(p);
  } catch (const Error& e) {
    list.push_back(std::string("refused: ") + e.what());
  }
  return list;
}

// Tuned tables that the library would use, or why not; how many of their entries are for GPUs of this machine.
Json tables(const CudaProbe& cuda) {
  Json list = Json::array();
  for (const plan::TunedFile& f : plan::tuned_files()) {
    std::set<std::string> names;
    for (const Gpu& g : cuda.gpus) names.insert(g.name);
    std::size_t here = 0;
    for (const std::string& name : names) here += f.table.count(name);
    list.push_back({{"path", f.path}, {"entries", f.table.size()}, {"entries_for_gpus", here}});
    if (!f.problem.empty()) list.back()["problem"] = f.problem;
  }
  return list;
}

Json describe(const Machine& machine, const CudaProbe& cuda) {
  Json libraries = Json::array();
  for (const cuda::LibraryStatus& l : cuda.libraries) {
    Json j{{"name", l.name},     {"found", l.found},     {"usable", l.usable}, {"path", nullptr},
           {"version", nullptr}, {"purpose", l.purpose}, {"tried", l.tried}};
    if (!l.path.empty()) j["path"] = l.path;
    if (!l.version.empty()) j["version"] = l.version;
    if (!l.problem.empty()) j["problem"] = l.problem;
    if (!l.found) j["fix"] = l.fix;
    libraries.push_back(j);
  }
  Json gpus = Json::array();
  for (const Gpu& g : cuda.gpus) gpus.push_back({{"name", g.name}, {"arch", g.arch}, {"memory_bytes", g.memory_bytes}});
  return {{"version", OCTOMOE_VERSION},
          {"commit", commit()},
          {"machine", to_json(machine, machine.threads)},
          {"engines",
           {{"cpu", {{"available", true}, {"isa", machine.isa}, {"threads", machine.threads}}},
            {"cuda", {{"available", !cuda.gpus.empty()}, {"kernel_packs", packs()}, {"tuned_tables", tables(cuda)}}}}},
          {"cuda", {{"gpus", gpus}, {"libraries", libraries}, {"folders", cuda.folders}}}};
}

void print_machine(const Machine& m, bool colour) {
  const auto line = [&](const char* name, const std::string& value) {
    fmt::print("  {}  {}\n", styled(fmt::format("{:<12}", name), Style::dim, colour), value);
  };
  std::string caches;
  for (const Cache& c : m.caches) {
    if (c.type == "instruction") continue;
    caches += fmt::format("{}L{} {}", caches.empty() ? "" : ", ", c.level, format_bytes(static_cast<double>(c.bytes)));
  }
  line("CPU", m.cpu);
  line("cores", m.physical_cores > 0 && m.physical_cores != m.cores
                    ? fmt::format("{} usable threads, {} physical cores", m.cores, m.physical_cores)
                    : fmt::format("{}", m.cores));
  line("features", m.features.empty() ? "none known" : fmt::format("{}", fmt::join(m.features, " ")));
  line("caches", caches.empty() ? "not known" : caches);
  line("memory", fmt::format("{}, {} available", format_bytes(static_cast<double>(m.memory_bytes)),
                             format_bytes(static_cast<double>(m.available_bytes))));
}

void print_libraries(const CudaProbe& cuda, bool colour) {
  for (const cuda::LibraryStatus& l : cuda.libraries) {
    const Style style = l.usable ? Style::good : l.found ? Style::warn : Style::dim;
    const std::string state = l.found ? "found " + l.version : "not found";
    fmt::print("  {}  {}", styled(fmt::format("{:<12}", l.name), Style::dim, colour), styled(state, style, colour));
    fmt::print("{}\n", l.found ? "  " + l.path : fmt::format("  (for {})", l.purpose));
    if (!l.problem.empty()) fmt::print("                problem: {}{}\n", l.found ? "" : l.path + ": ", l.problem);
    if (!l.found) {
      fmt::print("                tried: {}\n", fmt::join(l.tried, ", "));
      fmt::print("                fix: {}\n", l.fix);
    }
  }
  if (!cuda.folders.empty()) fmt::print("  searched beside the system's folders:\n");
  for (const std::string& folder : cuda.folders) fmt::print("    {}\n", folder);
}

int doctor(bool as_json) {
  const Machine machine = Machine::read();
  const CudaProbe cuda = CudaProbe::read();
  if (as_json) {
    fmt::print("{}\n", describe(machine, cuda).dump(2, ' ', false, Json::error_handler_t::replace));
    return kOk;
  }
  const bool colour = wants_colour();
  const auto title = [&](const char* text) { fmt::print("{}\n", styled(text, Style::bold, colour)); };
  fmt::print("{} {} (commit {})\n\n", styled("OctoMoE", Style::bold, colour), OCTOMOE_VERSION, commit());
  title("Machine");
  print_machine(machine, colour);
  fmt::print("\n");
  title("Engines");
  fmt::print("  {} ISA {}, {} thread{} (OCTOMOE_NUM_THREADS or --threads change that)\n",
             styled("CPU engine:", Style::good, colour), machine.isa, machine.threads, machine.threads == 1 ? "" : "s");
  if (cuda.gpus.empty()) {
    fmt::print("  {} no GPU here (see the CUDA driver below)\n", styled("CUDA engine:", Style::dim, colour));
  } else {
    fmt::print("  {} int8_channel, int8_block and int8_hybrid on {} GPU{}\n",
               styled("CUDA engine:", Style::good, colour), cuda.gpus.size(), cuda.gpus.size() == 1 ? "" : "s");
  }
  const Json found = packs();
  if (found.empty()) {
    fmt::print("  kernel packs: none; kernels are compiled by NVRTC when they are first used and kept in the cache\n");
  }
  for (const Json& p : found) fmt::print("  kernel pack: {}\n", p.get<std::string>());
  const Json tuned = tables(cuda);
  if (tuned.empty()) fmt::print("  tuned tables: none; a cost model chooses kernels (octomoe tune measures them)\n");
  for (const Json& t : tuned) {
    const std::string path = t["path"];
    if (t.contains("problem")) {
      fmt::print("  tuned table: {}\n", styled("not used: " + t["problem"].get<std::string>(), Style::warn, colour));
    } else {
      fmt::print("  tuned table: {} ({} entries, {} for GPUs here)\n", path, t["entries"].get<std::size_t>(),
                 t["entries_for_gpus"].get<std::size_t>());
    }
  }
  fmt::print("\n");
  title("NVIDIA libraries (nothing above needs them)");
  for (const Gpu& g : cuda.gpus) {
    fmt::print("  {}  {} ({}), {}\n", styled("GPU         ", Style::dim, colour), g.name, g.arch,
               format_bytes(static_cast<double>(g.memory_bytes)));
  }
  print_libraries(cuda, colour);
  return kOk;
}

}  // namespace

void add_doctor(CLI::App& app, Action& action) {
  CLI::App* sub = app.add_subcommand("doctor", "Show what this machine offers and what is missing");
  auto as_json = std::make_shared<bool>(false);
  sub->add_flag("--json", *as_json, "Print JSON");
  sub->footer("Examples:\n  octomoe doctor\n  octomoe doctor --json");
  sub->callback([as_json, &action] { action = [as_json] { return doctor(*as_json); }; });
}

}  // namespace octomoe::cli
