#include "cli/shape_arguments.h"

#include <fmt/format.h>

#include "cli/presets.h"

namespace octomoe::cli {

void add_size_options(CLI::App& command, ShapeArguments& a) {
  const auto size = CLI::Range(1, 1 << 20);
  command.add_option("--experts", a.experts, "Experts")->check(CLI::Range(1, 65536));
  command
      .add_option(
          "--experts-local", a.experts_local,
          "Hold only the first N experts, as one rank of an expert-parallel group; routes to the others are skipped")
      ->check(CLI::Range(1, 65536));
  command.add_option("--hidden", a.hidden, "Hidden size")->check(size);
  command.add_option("--intermediate", a.intermediate, "Intermediate size of an expert")->check(size);
  command.add_option("--top-k", a.top_k, "Experts of a token")->check(CLI::Range(1, 65536));
}

ProblemShape shape_of(const ShapeArguments& a, const char* default_model, std::string* model) {
  const bool custom = a.experts > 0 && a.hidden > 0 && a.intermediate > 0 && a.top_k > 0;
  ProblemShape s{a.experts, a.experts_local, a.hidden, a.intermediate, a.top_k};
  *model = "custom";
  if (!custom) {
    if (a.any_size() && a.model.empty()) {
      throw UsageError("give all of --experts, --hidden, --intermediate and --top-k, or --model to take the rest from");
    }
    const Preset& p = find_preset(a.model.empty() ? default_model : a.model);
    if (s.experts == 0) s.experts = p.experts;
    if (s.hidden == 0) s.hidden = p.hidden;
    if (s.intermediate == 0) s.intermediate = p.intermediate;
    if (s.top_k == 0) s.top_k = p.top_k;
    *model = a.any_size() ? fmt::format("{} (changed)", p.name) : p.name;
  }
  if (s.experts_local == 0) s.experts_local = s.experts;
  if (s.top_k > s.experts)
    throw UsageError(fmt::format("--top-k: expected at most {} (the experts), got {}", s.experts, s.top_k));
  if (s.experts_local > s.experts) {
    throw UsageError(
        fmt::format("--experts-local: expected at most {} (the experts), got {}", s.experts, s.experts_local));
  }
  return s;
}

}  // namespace octomoe::cli
