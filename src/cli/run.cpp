// octomoe run: feeds real activations through the MoE layers of a checkpoint in every scheme, and says how far each is
// from float64 arithmetic, whether the engine equals the scheme's definition, and how fast it is.
#include <fmt/format.h>

#include <algorithm>
#include <filesystem>
#include <memory>
#include <nlohmann/json.hpp>
#include <optional>

#include "checkpoint/calibration.h"
#include "cli/arguments.h"
#include "cli/cli.h"
#include "cli/gpu.h"
#include "cli/judge.h"
#include "cli/machine.h"
#include "cli/output_file.h"
#include "cli/problem.h"
#include "cli/table.h"
#include "cli/terminal.h"
#include "octomoe/version.h"

namespace octomoe::cli {
namespace {

namespace fs = std::filesystem;
using Json = nlohmann::ordered_json;

struct RunOptions {
  std::string checkpoint, schemes = "all", activations, layers, device = "cpu", json;
  std::int64_t tokens = 0, reference_tokens = 0;
  int threads = 0, iters = 0;
  double min_time_s = 0.2;
  std::uint64_t seed = 0;
  bool random = false;
};

// Where the hidden states come from.
class Source {
 public:
  Source(const RunOptions& o, const ModelConfig& config) : o_(o), config_(config) {
    if (o.random) return;
    std::string path = o.activations;
    if (path.empty()) {
      const fs::path folder =
          fs::is_directory(o.checkpoint) ? fs::path(o.checkpoint) : fs::path(o.checkpoint).parent_path();
      path = (folder / "activations.safetensors").string();
      if (!fs::exists(path)) {
        throw Error(ErrorCode::io,
                    fmt::format("no activations: {} does not exist; give --activations FILE with tensors "
                                "layers.L.hidden_states [T, {}], or --random for standard normal ones",
                                path, config.hidden));
      }
    }
    file_.emplace(path, config);
  }

  struct Tokens {
    Tensor x, logits;  // logits: as stored, or undefined
  };
  Tokens tokens(int layer) const {
    if (!file_) {
      return {
          random_activations(o_.tokens > 0 ? o_.tokens : 256, config_.hidden, o_.seed + static_cast<unsigned>(layer)),
          {}};
    }
    const Tensor x = file_->hidden_states(layer), logits = file_->logits(layer, x.dim(0));
    const std::int64_t rows = o_.tokens > 0 ? std::min(o_.tokens, x.dim(0)) : x.dim(0);
    return {rows_of(x, 0, rows), rows_of(logits, 0, rows)};
  }
  static Tensor rows_of(const Tensor& t, std::int64_t begin, std::int64_t count) {
    return t.defined() ? Tensor::wrap(t.view().slice(begin, count), std::make_shared<Tensor>(t)) : t;
  }

 private:
  const RunOptions& o_;
  const ModelConfig& config_;
  std::optional<checkpoint::CapturedStates> file_;
};

std::vector<Scheme> choose_schemes(const RunOptions& o, const ModelConfig& config, Device device) {
  if (config.format == QuantFormat::none) {
    std::vector<Scheme> schemes = parse_schemes("--scheme", o.schemes);
    if (device.type == DeviceType::cpu) return schemes;
    if (o.schemes == "all") std::erase_if(schemes, [](const Scheme& s) { return !s.is_integer(); });
    for (const Scheme& s : schemes) {
      if (!s.is_integer()) {
        throw UsageError(
            fmt::format("--scheme: expected int8_channel, int8_block or int8_hybrid with --device {}, got {}", o.device,
                        to_string(s)));
      }
    }
    return schemes;
  }
  const std::string own = to_string(config.scheme);
  if (o.schemes != "all" && !(parse_schemes("--scheme", o.schemes) == std::vector{config.scheme})) {
    throw UsageError(
        fmt::format("--scheme: the checkpoint is already quantised ({}) and runs in its own scheme only: {}",
                    to_string(config.format), own));
  }
  return {config.scheme};
}

std::vector<int> choose_layers(const RunOptions& o, const Checkpoint& checkpoint) {
  std::vector<int> have = checkpoint.moe_layers();
  if (have.empty()) throw Error(ErrorCode::format, o.checkpoint + ": no layer has experts");
  if (o.layers.empty()) return have;
  std::vector<int> wanted = parse_layers(o.layers);
  for (const int l : wanted) {
    if (std::find(have.begin(), have.end(), l) == have.end()) {
      throw UsageError(
          fmt::format("--layers: layer {} has no experts; MoE layers are {} to {}", l, have.front(), have.back()));
    }
  }
  return wanted;
}

// All schemes of one layer are held at a time, twice while they are packed, beside the source.
void check_memory(const ModelConfig& config, const std::vector<Scheme>& schemes) {
  const ProblemShape shape{config.experts, config.experts, config.hidden, config.intermediate, config.top_k};
  double need = 2 * shape.weight_bytes(Scheme::bf16());
  for (const Scheme& s : schemes) need += 2 * shape.weight_bytes(s);
  const auto have = static_cast<double>(Machine::read().available_bytes);
  if (have > 0 && need > have) {
    throw Error(
        ErrorCode::out_of_memory,
        fmt::format("one layer in {} scheme(s) needs about {}, {} are available: give fewer schemes to --scheme",
                    schemes.size(), format_bytes(need), format_bytes(have)));
  }
}

// Tokens that the slow reference judges: all, unless that would take minutes.
std::int64_t judged_tokens(const RunOptions& o, const ModelConfig& config, std::size_t schemes, std::int64_t tokens) {
  if (o.reference_tokens > 0) return std::min(o.reference_tokens, tokens);
  constexpr double kMultiplyAdds = 8e9;  // a layer; the reference does about 1e9 a second and core
  constexpr double kAtLeast = 16;
  const double per_token = 3.0 * static_cast<double>(config.hidden) *
                           static_cast<double>(config.top_k * config.intermediate + config.shared_intermediate);
  const double fits = kMultiplyAdds / per_token / static_cast<double>(schemes + 1);
  return std::min(tokens, static_cast<std::int64_t>(std::max(kAtLeast, fits)));
}

struct SchemeResult {
  Scheme scheme;
  std::vector<LayerJudgement> layers;

  double worst(double LayerJudgement::*field) const {
    double top = 0;
    for (const auto& l : layers) top = !(l.*field <= top) ? l.*field : top;  // a NaN wins
    return top;
  }
  double mean(double LayerJudgement::*field) const {
    double sum = 0;
    for (const auto& l : layers) sum += l.*field;
    return sum / static_cast<double>(layers.size());
  }
  bool bit_equal() const {
    return std::all_of(layers.begin(), layers.end(), [](const LayerJudgement& l) { return l.bit_equal; });
  }
};

struct Report {
  ModelConfig config;
  std::vector<int> layers = {};
  std::int64_t tokens = 0, judged = 0, calibration = 0;  // calibration: tokens before those measured, 0 = none
  Machine machine = {};
  int threads = 0;
  std::vector<SchemeResult> results = {};
  std::optional<double> bf16_us = {};  // mean layer
  Device device = {};
  Json gpu = nullptr;
};

Json to_json(const Report& r, const RunOptions& o) {
  Json results = Json::array();
  for (const SchemeResult& s : r.results) {
    const double us = s.mean(&LayerJudgement::us);
    Json layers = Json::array();
    for (std::size_t i = 0; i < s.layers.size(); ++i) {
      layers.push_back({{"layer", r.layers[i]},
                        {"error_vs_float32", s.layers[i].error_vs_float},
                        {"error_vs_quantised", s.layers[i].error_vs_quantised},
                        {"bit_equal", s.layers[i].bit_equal},
                        {"us", s.layers[i].us}});
    }
    results.push_back({{"scheme", to_string(s.scheme)},
                       {"error_vs_float32_worst", s.worst(&LayerJudgement::error_vs_float)},
                       {"error_vs_float32_mean", s.mean(&LayerJudgement::error_vs_float)},
                       {"error_vs_quantised_worst", s.worst(&LayerJudgement::error_vs_quantised)},
                       {"bit_equal", s.bit_equal()},
                       {"weight_bytes", static_cast<std::int64_t>(s.mean(&LayerJudgement::weight_bytes) *
                                                                  static_cast<double>(s.layers.size()))},
                       {"us_per_token", us / static_cast<double>(r.tokens)},
                       {"speedup_over_bf16", r.bf16_us ? Json(*r.bf16_us / us) : Json(nullptr)},
                       {"layers", layers}});
  }
  return {{"version", OCTOMOE_VERSION},
          {"date", date_utc()},
          {"commit", commit()},
          {"machine", cli::to_json(r.machine, r.threads)},
          {"device", to_string(r.device)},
          {"gpu", r.gpu},
          {"checkpoint", fs::path(o.checkpoint).lexically_normal().filename().string()},
          {"model_type", r.config.model_type},
          {"format", to_string(r.config.format)},
          {"hidden", r.config.hidden},
          {"intermediate", r.config.intermediate},
          {"experts", r.config.experts},
          {"top_k", r.config.top_k},
          {"layers", r.layers},
          {"tokens", r.tokens},
          {"reference_tokens", r.judged},
          {"calibration_tokens", r.calibration},
          {"activations", o.random ? "random" : "file"},
          {"results", results}};
}

void print(const Report& r, const RunOptions& o) {
  const bool colour = wants_colour();
  const bool quantised = r.config.format != QuantFormat::none;
  fmt::print("{}{}: {} MoE layer{}, E {}, k {}, H {}, I {}{}\n", styled(r.config.model_type, Style::bold, colour),
             quantised ? fmt::format(" ({})", to_string(r.config.format)) : "", r.layers.size(),
             r.layers.size() == 1 ? "" : "s", r.config.experts, r.config.top_k, r.config.hidden, r.config.intermediate,
             r.config.shared_intermediate > 0 ? fmt::format(", shared {}", r.config.shared_intermediate) : "");
  const std::string engine =
      r.gpu.is_null() ? fmt::format("CPU engine ({}), {} thread{}", r.machine.isa, r.threads, r.threads == 1 ? "" : "s")
                      : fmt::format("{} ({})", r.gpu["name"].get<std::string>(), to_string(r.device));
  fmt::print("{} tokens a layer{}, {}\n", r.tokens, o.random ? " (standard normal)" : "", engine);
  if (r.calibration > 0)
    fmt::print("static scales: calibrated on the {} tokens before those, which no scheme is measured on\n",
               r.calibration);
  if (r.judged < r.tokens)
    fmt::print("errors are over the first {} tokens (--reference-tokens changes that)\n", r.judged);
  if (quantised)
    fmt::print("the float reference uses the dequantised weights: the errors are those of the activations\n");
  fmt::print("\n");

  std::vector<Table::Column> columns = {{"scheme", true},     {"error, worst"}, {"mean layer"},
                                        {"vs own reference"}, {"weights"},      {"per token"}};
  if (r.bf16_us) columns.push_back({"vs bf16"});
  Table table(columns);
  for (const SchemeResult& s : r.results) {
    const double us = s.mean(&LayerJudgement::us), own = s.worst(&LayerJudgement::error_vs_quantised);
    const bool broken = s.scheme.is_integer() && !s.bit_equal();
    Table::Cell verdict = s.bit_equal() ? Table::Cell("bit-equal", Style::good)
                          : broken      ? Table::Cell("NOT bit-equal, " + format_error(own), Style::bad)
                                        : Table::Cell(format_error(own));
    std::vector<Table::Cell> cells = {
        to_string(s.scheme),
        format_error(s.worst(&LayerJudgement::error_vs_float)),
        format_error(s.mean(&LayerJudgement::error_vs_float)),
        verdict,
        format_bytes(s.mean(&LayerJudgement::weight_bytes) * static_cast<double>(s.layers.size())),
        format_us(us / static_cast<double>(r.tokens))};
    if (r.bf16_us) {
      const double speedup = *r.bf16_us / us;
      cells.emplace_back(format_ratio(speedup), speedup > 1.005 ? Style::good : Style::plain);
    }
    table.add(cells);
  }
  fmt::print("{}", table.render(colour));
  fmt::print("\nerror: ||out - ref|| / ||ref|| of a layer's output against float64 arithmetic on {} weights\n",
             quantised ? "the dequantised" : "the unquantised");
}

int run_command(const RunOptions& o) {
  const Device device = parse_device("--device", o.device);
  const Checkpoint checkpoint = Checkpoint::open(o.checkpoint);
  Report report{.config = checkpoint.config()};
  report.device = device;
  const ModelConfig& config = report.config;
  const std::vector<Scheme> schemes = choose_schemes(o, config, device);
  const bool fixed = std::any_of(schemes.begin(), schemes.end(),
                                 [](const Scheme& s) { return s.activation_scale == ActivationScale::static_; });
  report.layers = choose_layers(o, checkpoint);
  const Source source(o, config);
  std::optional<OutputFile> json;
  if (!o.json.empty()) json.emplace(o.json);
  check_memory(config, schemes);
  if (device.type == DeviceType::cuda) report.gpu = GpuBench(device).describe();
  report.machine = Machine::read();
  report.threads = o.threads > 0 ? o.threads : report.machine.threads;
  for (const Scheme& s : schemes) report.results.push_back({s, {}});

  {
    Progress progress("running");
    std::optional<double> bf16_us;
    for (std::size_t i = 0; i < report.layers.size(); ++i) {
      const int index = report.layers[i];
      JudgeInput input{.config = config, .layer = checkpoint.layer(index), .schemes = schemes};
      const Source::Tokens all = source.tokens(index);
      // A quantised checkpoint brings its scales, but not those of a shared expert that it keeps in floats.
      const auto& shared = input.layer.shared_expert;
      const bool calibrates =
          fixed && (config.format == QuantFormat::none || (shared && shared->scheme != config.scheme));
      const std::int64_t tokens = all.x.dim(0), first = calibrates ? tokens / 2 : 0;
      if (calibrates && first < 1) {
        throw UsageError("--scheme: static activation scales take half of the tokens: expected at least 2, got 1");
      }
      input.x = Source::rows_of(all.x, first, tokens - first);
      input.logits = Source::rows_of(all.logits, first, tokens - first);
      if (calibrates) {
        input.calibration_x = Source::rows_of(all.x, 0, first);
        input.calibration_logits = Source::rows_of(all.logits, 0, first);
      }
      input.judged_tokens = judged_tokens(o, config, schemes.size(), input.x.dim(0));
      input.threads = o.threads;
      input.device = device;
      input.timing = {.warmup = 1, .iters = o.iters, .min_time_s = o.min_time_s, .min_rounds = 3};
      input.on_step = [&](double fraction, const std::string& what) {
        progress.update((static_cast<double>(i) + fraction) / static_cast<double>(report.layers.size()),
                        fmt::format("layer {}: {}", index, what));
      };
      const Judgement judgement = judge(input);
      if (judgement.bf16_us) bf16_us = bf16_us.value_or(0) + *judgement.bf16_us;
      report.tokens = input.x.dim(0);
      report.judged = input.judged_tokens;
      report.calibration = first;
      for (std::size_t s = 0; s < schemes.size(); ++s) report.results[s].layers.push_back(judgement.schemes[s]);
    }
    if (bf16_us) report.bf16_us = *bf16_us / static_cast<double>(report.layers.size());
  }
  print(report, o);
  if (json) json->commit(to_json(report, o).dump(2) + "\n");
  for (const SchemeResult& s : report.results) {
    if (s.scheme.is_integer() && !s.bit_equal()) {
      throw Error(ErrorCode::internal,
                  to_string(s.scheme) + ": the engine's result differs from the reference's: please report this");
    }
  }
  return kOk;
}

}  // namespace

void add_run(CLI::App& app, Action& action) {
  CLI::App* sub = app.add_subcommand("run", "Error and speed of every scheme on a checkpoint's MoE layers");
  auto o = std::make_shared<RunOptions>();
  sub->add_option("--checkpoint", o->checkpoint, "Hugging Face folder, or a .safetensors file beside a config.json")
      ->required();
  sub->add_option("--scheme", o->schemes, "all, or schemes separated by commas (docs/schemes.md)")
      ->capture_default_str();
  sub->add_option("--device", o->device, "cpu, cuda or cuda:N: where the layers run (cuda: the integer schemes)")
      ->capture_default_str();
  auto* file =
      sub->add_option("--activations", o->activations,
                      "safetensors file with layers.L.hidden_states [T, H] and, if at hand, layers.L.router_logits "
                      "[T, E] (default: activations.safetensors beside the checkpoint)");
  sub->add_flag("--random", o->random, "Standard normal activations instead of a file")->excludes(file);
  sub->add_option("--layers", o->layers, "Layers, such as 0,4-7 (default: every MoE layer)");
  sub->add_option("--tokens", o->tokens, "Only the first N tokens (with --random: how many, default 256)")
      ->check(CLI::Range(1, 1 << 20));
  sub->add_option("--reference-tokens", o->reference_tokens,
                  "Tokens that the slow reference judges (default: all, fewer for large layers)")
      ->check(CLI::Range(1, 1 << 20));
  sub->add_option("--threads", o->threads, "Threads; 0: OCTOMOE_NUM_THREADS, else all cores")
      ->check(CLI::Range(0, 1024));
  sub->add_option("--iters", o->iters, "Timed rounds; 0: as many as --min-time asks for")
      ->check(CLI::Range(0, 100'000));
  sub->add_option("--min-time", o->min_time_s, "Seconds to time each scheme and layer")
      ->check(CLI::Range(0.0, 3600.0))
      ->capture_default_str();
  sub->add_option("--seed", o->seed, "Seed of --random");
  sub->add_option("--json", o->json, "Also write the results to this file ('-': standard output)");
  sub->footer(
      "The exit code is 1 if an integer scheme is not bit-equal to its reference.\n\n"
      "Examples:\n"
      "  octomoe run --checkpoint data/tiny-qwen3-moe --scheme all\n"
      "  octomoe run --checkpoint Qwen3-30B-A3B --scheme int8_channel,int8_hybrid --layers 0 --random --tokens 64\n"
      "  octomoe run --checkpoint data/tiny-qwen3-moe --device cuda");
  sub->callback([o, &action] { action = [o] { return run_command(*o); }; });
}

}  // namespace octomoe::cli
