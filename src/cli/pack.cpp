// octomoe pack: compiles the kernel catalogue into a pack file; octomoe pack --check FILE: shows and judges one.
#include <fmt/format.h>
#include <fmt/ranges.h>

#include <algorithm>
#include <chrono>
#include <map>
#include <memory>
#include <nlohmann/json.hpp>
#include <optional>
#include <thread>

#include "cli/arguments.h"
#include "cli/cli.h"
#include "cli/cuda_probe.h"
#include "cli/output_file.h"
#include "cli/table.h"
#include "cli/terminal.h"
#include "cuda/nvrtc.h"
#include "jit/pack_build.h"
#include "jit/sass.h"

namespace octomoe::cli {
namespace {

using Json = nlohmann::ordered_json;
using jit::PackEntry;

constexpr const char* kNoDisassembler =
    "neither nvdisasm nor cuobjdump was found in $PATH, $CUDA_HOME/bin or a Python wheel (pip install "
    "nvidia-cuda-nvdisasm)";

struct PackOptions {
  std::string archs = "sm_80,sm_86,sm_89,sm_90a";
  std::string out, check, only;
  int jobs = 0;
  bool fresh = false, json = false;
};

std::string version_text(int nvrtc) { return fmt::format("{}.{}", nvrtc / 1000, nvrtc % 1000 / 10); }

std::vector<jit::Target> parse_targets(const std::string& list) {
  std::vector<jit::Target> targets;
  for (std::size_t begin = 0; begin <= list.size();) {
    const std::size_t end = std::min(list.find(',', begin), list.size());
    const jit::Target t = [&] {
      try {
        return jit::parse_target(list.substr(begin, end - begin));
      } catch (const Error& e) {
        throw UsageError(fmt::format("--{}", e.what()));
      }
    }();
    if (std::find(targets.begin(), targets.end(), t) == targets.end()) targets.push_back(t);
    begin = end + 1;
  }
  return targets;
}

// ---- octomoe pack --out FILE ----

// What the file holds already; nullptr if there is none, or one that cannot be used.
std::shared_ptr<const jit::Pack> existing_pack(const PackOptions& o) {
  if (o.fresh || o.out == "-") return nullptr;
  try {
    return jit::Pack::open(o.out);
  } catch (const Error&) {
    return nullptr;
  }
}

int build(const PackOptions& o) {
  const std::vector<jit::Target> targets = parse_targets(o.archs);
  std::vector<KernelEntry> entries;
  for (const KernelEntry& e : catalogue()) {
    if (e.id.find(o.only) != std::string::npos) entries.push_back(e);
  }
  if (entries.empty()) throw UsageError(fmt::format("--only: expected a part of a kernel's id, got '{}'", o.only));
  search_python_wheels();
  OutputFile file(o.out);
  const std::string tool = jit::find_disassembler();
  const auto begin = std::chrono::steady_clock::now();
  jit::PackBuild result;
  {
    Progress progress("compiling");
    jit::PackBuildOptions options{.targets = targets, .jobs = o.jobs, .disassembler = tool, .reuse = existing_pack(o)};
    if (options.jobs <= 0) options.jobs = std::max(1, static_cast<int>(std::thread::hardware_concurrency()));
    options.progress = [&](std::size_t done, std::size_t total, const std::string& current) {
      progress.update(static_cast<double>(done) / static_cast<double>(total), current);
    };
    try {
      result = jit::build_pack(entries, options);
    } catch (const Error& e) {
      if (e.code() == ErrorCode::invalid_argument) throw UsageError(fmt::format("--{}", e.what()));
      throw;
    }
  }
  if (!result.failures.empty()) {
    for (const std::string& line : result.failures) fmt::print(stderr, "{}\n", line);
    throw Error(ErrorCode::cuda,
                fmt::format("{} of {} kernels did not compile; {} was not written", result.failures.size(),
                            result.failures.size() + result.items.size(), o.out));
  }
  const std::vector<std::byte> bytes = jit::make_pack(result.items);
  file.commit(std::string(reinterpret_cast<const char*>(bytes.data()), bytes.size()));
  if (file.path() == "-") return kOk;

  const double seconds = std::chrono::duration<double>(std::chrono::steady_clock::now() - begin).count();
  std::size_t faulty = 0;
  for (const jit::PackItem& item : result.items) faulty += !faults(item.kernel.report, item.entry.expect).empty();
  const bool colour = wants_colour();
  fmt::print("{} {}: {} kernels for {}, {}, NVRTC {}, {:.1f} s\n", styled("wrote", Style::good, colour), o.out,
             result.items.size(), o.archs, format_bytes(static_cast<double>(bytes.size())),
             version_text(cuda::Nvrtc::get().version()), seconds);
  const std::size_t compiled = result.items.size() - result.reused;
  if (result.reused > 0) fmt::print("{} kernels were in it already\n", result.reused);
  if (compiled > 0) {
    fmt::print("compile time: {:.2f} s a kernel, slowest {:.2f} s ({})\n",
               result.total_s / static_cast<double>(compiled), result.slowest_s, result.slowest);
  }
  if (tool.empty()) fmt::print("tensor-core instructions not counted: {}\n", kNoDisassembler);
  if (faulty > 0) {
    fmt::print("{}: octomoe pack --check {}\n",
               styled(fmt::format("{} kernels have faults", faulty), Style::bad, colour), o.out);
  }
  return kOk;
}

// ---- octomoe pack --check FILE ----

struct Judged {
  PackEntry entry;
  std::vector<std::string> faults;
};

// Reads every image, so that a damaged one is found; counts instructions where the pack's maker could not.
std::vector<Judged> judge_pack(const jit::Pack& pack, const std::string& tool) {
  std::vector<Judged> out;
  Progress progress("checking");
  for (const PackEntry& entry : pack.entries()) {
    progress.update(static_cast<double>(out.size()) / static_cast<double>(pack.entries().size()), entry.id);
    Judged j{entry, {}};
    const std::vector<std::byte> image = pack.image(entry);
    if (!entry.expect.empty() && entry.report.tensor_instructions < 0 && !tool.empty() && !entry.target.ptx) {
      j.entry.report.tensor_instructions = jit::count_mnemonic(jit::disassemble(image, tool), entry.expect);
    }
    j.faults = jit::faults(j.entry.report, entry.expect);
    out.push_back(std::move(j));
  }
  return out;
}

std::string tensor_text(const PackEntry& e) {
  if (e.expect.empty() || e.target.ptx) return "-";
  const int n = e.report.tensor_instructions;
  return fmt::format("{} {}", n < 0 ? "?" : std::to_string(n), e.expect);
}

Json to_json(const jit::Pack& pack, const std::vector<Judged>& all) {
  Json kernels = Json::array();
  for (const auto& [e, faults] : all) {
    const jit::ResourceReport& r = e.report;
    Json j{{"id", e.id}, {"arch", to_string(e.target)}, {"threads", e.threads}};
    j["registers"] = r.registers < 0 ? Json() : Json(r.registers);
    j["shared_bytes"] = e.shared_bytes + r.static_shared_bytes;
    j["spill_store_bytes"] = r.spill_store_bytes;
    j["spill_load_bytes"] = r.spill_load_bytes;
    j["local_bytes"] = r.stack_bytes;
    if (!e.expect.empty()) {
      j["tensor_mnemonic"] = e.expect;
      j["tensor_instructions"] = r.tensor_instructions < 0 ? Json() : Json(r.tensor_instructions);
    }
    j["bytes"] = e.raw_bytes;
    j["stored_bytes"] = e.stored_bytes;
    j["nvrtc"] = version_text(e.nvrtc_version);
    j["faults"] = faults;
    kernels.push_back(std::move(j));
  }
  return {{"file", pack.name()}, {"version", jit::kPackVersion}, {"bytes", pack.file_bytes()}, {"kernels", kernels}};
}

int check(const PackOptions& o) {
  const auto pack = jit::Pack::open(o.check);
  search_python_wheels();
  const std::string tool = jit::find_disassembler();
  const std::vector<Judged> all = judge_pack(*pack, tool);
  const auto bad = static_cast<std::size_t>(
      std::count_if(all.begin(), all.end(), [](const Judged& j) { return !j.faults.empty(); }));
  if (o.json) {
    fmt::print("{}\n", to_json(*pack, all).dump(2, ' ', false, Json::error_handler_t::replace));
    return bad == 0 ? kOk : kFailure;
  }
  const bool colour = wants_colour();
  Table table({{"kernel", true},
               {"arch", true},
               {"threads"},
               {"regs"},
               {"shared"},
               {"spill"},
               {"local"},
               {"tensor"},
               {"size"},
               {"stored"},
               {"", true}});
  struct Total {
    std::size_t kernels = 0;
    double raw = 0, stored = 0;
  };
  std::map<std::string, Total> totals;
  bool uncounted = false;
  for (const auto& [e, faults] : all) {
    const jit::ResourceReport& r = e.report;
    const int spill = std::max(r.spill_store_bytes, r.spill_load_bytes);
    const bool counted = e.expect.empty() || e.target.ptx || r.tensor_instructions >= 0;
    uncounted = uncounted || !counted;
    const auto flag = [](bool fault) { return fault ? Style::bad : Style::plain; };
    table.add({e.id,
               to_string(e.target),
               std::to_string(e.threads),
               r.registers < 0 ? std::string("-") : std::to_string(r.registers),
               std::to_string(e.shared_bytes + r.static_shared_bytes),
               {std::to_string(spill), flag(spill > 0)},
               {std::to_string(r.stack_bytes), flag(r.stack_bytes > 0)},
               {tensor_text(e), counted ? flag(!e.expect.empty() && r.tensor_instructions == 0) : Style::warn},
               format_bytes(static_cast<double>(e.raw_bytes)),
               format_bytes(static_cast<double>(e.stored_bytes)),
               {faults.empty() ? "" : fmt::format("{}", fmt::join(faults, "; ")), Style::bad}});
    Total& t = totals[to_string(e.target)];
    ++t.kernels;
    t.raw += static_cast<double>(e.raw_bytes);
    t.stored += static_cast<double>(e.stored_bytes);
  }
  fmt::print("{}\n", table.render(colour));
  for (const auto& [arch, t] : totals) {
    fmt::print("{}: {} kernels, {}, {} stored\n", arch, t.kernels, format_bytes(t.raw), format_bytes(t.stored));
  }
  fmt::print("{}: {} kernels, {}\n", pack->name(), all.size(), format_bytes(static_cast<double>(pack->file_bytes())));
  if (uncounted)
    fmt::print("{}: {}\n", styled("tensor-core instructions not checked", Style::warn, colour), kNoDisassembler);
  if (bad > 0) {
    fmt::print("{}\n", styled(fmt::format("{} of {} kernels have faults", bad, all.size()), Style::bad, colour));
  }
  return bad == 0 ? kOk : kFailure;
}

}  // namespace

void add_pack(CLI::App& app, Action& action) {
  CLI::App* sub = app.add_subcommand("pack", "Compile the GPU kernels into a pack file, or check one");
  auto o = std::make_shared<PackOptions>();
  CLI::Option* out = sub->add_option("--out", o->out, "Pack file to write; - is standard output");
  sub->add_option("--arch", o->archs, "Comma-separated: sm_80, sm_86, sm_89, sm_90a, another sm_NN, compute_90 (PTX)")
      ->capture_default_str();
  sub->add_option("--only", o->only, "Only kernels whose id contains this");
  sub->add_flag("--fresh", o->fresh, "Compile all; without it, kernels that FILE holds unchanged are kept");
  sub->add_option("-j,--jobs", o->jobs, "Kernels compiled at the same time; 0: one per core")
      ->check(CLI::Range(0, 4096));
  CLI::Option* check_file =
      sub->add_option(
             "--check", o->check,
             "Show what is in a pack; exit code 1 if a kernel spills, uses local memory, lacks its tensor-core "
             "instruction or has a serialisation warning")
          ->excludes(out);
  sub->add_flag("--json", o->json, "--check: print JSON")->needs(check_file);
  sub->footer(
      "Needs NVRTC, no GPU. docs/packs.md says where the library looks for packs.\n\n"
      "Examples:\n"
      "  octomoe pack --arch sm_80,sm_90a --out kernels.pack\n"
      "  octomoe pack --check kernels.pack");
  sub->callback([o, &action] {
    if (o->out.empty() == o->check.empty()) throw UsageError("pack: expected --out FILE or --check FILE");
    action = [o] { return o->check.empty() ? build(*o) : check(*o); };
  });
}

}  // namespace octomoe::cli
