// octomoe bench: times one MoE layer of a model's shape with random weights, every scheme and a peer in turns.
#include <fmt/format.h>

#include <filesystem>
#include <memory>
#include <optional>

#include "cli/arguments.h"
#include "cli/bench_report.h"
#include "cli/cli.h"
#include "cli/gpu.h"
#include "cli/harness.h"
#include "cli/output_file.h"
#include "cli/peer.h"
#include "cli/plot.h"
#include "cli/presets.h"
#include "cli/problem.h"
#include "cli/table.h"
#include "cli/terminal.h"
#include "cpu/ceilings.h"
#include "octomoe/layer.h"

namespace octomoe::cli {
namespace {

constexpr std::int64_t kMaxTokens = 1 << 20;
constexpr double kBusySpread = 0.3;  // a quiet machine stays below a tenth

struct Options {
  std::string model, tokens = "1,16,128,1024", schemes = "all", device = "cpu", routing = "uniform", peer = "none",
                     json, plot;
  std::int64_t experts = 0, experts_local = 0, hidden = 0, intermediate = 0;
  int top_k = 0, threads = 0;
  std::uint64_t seed = 0;
  bool graph = false, no_fused_gather = false, no_fused_activation = false, no_replay = false;
  HarnessOptions timing;
};

// The preset, with single sizes replaced by what was given.
ProblemShape shape_of(const Options& o, std::string* model) {
  const bool custom = o.experts > 0 && o.hidden > 0 && o.intermediate > 0 && o.top_k > 0;
  const bool any = o.experts > 0 || o.hidden > 0 || o.intermediate > 0 || o.top_k > 0;
  ProblemShape s{o.experts, o.experts_local, o.hidden, o.intermediate, o.top_k};
  *model = "custom";
  if (!custom) {
    if (any && o.model.empty()) {
      throw UsageError("give all of --experts, --hidden, --intermediate and --top-k, or --model to take the rest from");
    }
    const Preset& p = find_preset(o.model.empty() ? "qwen3-30b" : o.model);
    if (s.experts == 0) s.experts = p.experts;
    if (s.hidden == 0) s.hidden = p.hidden;
    if (s.intermediate == 0) s.intermediate = p.intermediate;
    if (s.top_k == 0) s.top_k = p.top_k;
    *model = any ? fmt::format("{} (changed)", p.name) : p.name;
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

// Everything is held at once, so that rounds can interleave; the scheme in the making is held twice while it is packed.
double needed_bytes(const ProblemShape& s, const std::vector<Scheme>& schemes, std::int64_t tokens, bool peer) {
  double need = 0, largest = 0;
  for (const Scheme& scheme : schemes) {
    need += s.weight_bytes(scheme);
    largest = std::max(largest, s.weight_bytes(scheme));
  }
  if (peer) need += 1.1 * s.weight_bytes(Scheme::bf16()) + 1e9;  // the process itself takes most of a gigabyte
  const double row = static_cast<double>(s.top_k) * static_cast<double>(2 * s.intermediate + 2 * s.hidden) * 4;
  return need + largest + 0.3e9 + static_cast<double>(tokens) * row * static_cast<double>(schemes.size());
}

void check_memory(const ProblemShape& shape, const std::vector<Scheme>& schemes, std::int64_t tokens, bool peer) {
  const auto have = static_cast<double>(Machine::read().available_bytes);
  const double need = needed_bytes(shape, schemes, tokens, peer);
  if (have <= 0 || need <= have) return;
  std::string advice = "give fewer --schemes or tokens";
  ProblemShape part = shape;
  while (part.experts_local > 1 && needed_bytes(part, schemes, tokens, peer) > have) part.experts_local /= 2;
  if (needed_bytes(part, schemes, tokens, peer) <= have) {
    advice = fmt::format("give fewer --schemes, or --experts-local {} for one rank of an expert-parallel group",
                         part.experts_local);
  }
  throw Error(ErrorCode::out_of_memory, fmt::format("{} scheme{} of {} experts need about {}, {} are available: {}",
                                                    schemes.size(), schemes.size() == 1 ? "" : "s", shape.experts_local,
                                                    format_bytes(need), format_bytes(have), advice));
}

class Bench {
 public:
  explicit Bench(const Options& o) : o_(o), progress_("bench") {}

  int run() {
    read_arguments();
    check_memory(report_.shape, schemes_, *std::max_element(tokens_.begin(), tokens_.end()), o_.peer == "torch");
    for (const std::int64_t t : tokens_) routings_.push_back({t, make_routes(routing_, report_.shape, t, o_.seed)});
    if (o_.peer == "torch") {
      progress_.update(0, "peer");
      peer_ = std::make_unique<Peer>();
      peer_->prepare(report_.shape, routings_, report_.threads, o_.seed);
      report_.peer_version = peer_->version();
      report_.python_overhead_us = peer_->python_overhead_us();
    }
    progress_.update(0, "ceilings");
    if (device_.type == DeviceType::cuda) {
      gpu_.emplace(device_);
      report_.gpu = gpu_->describe();
      report_.ceilings = gpu_->ceilings();
    } else {
      report_.ceilings = {cpu::measure_read_bandwidth(o_.threads), cpu::measure_int8_peak(o_.threads)};
    }
    make_layers();
    progress_.clear();
    fmt::print("{}", render_header(report_, wants_colour()));
    if (peer_) fmt::print("peer: PyTorch {} in bf16, same threads and routes\n", peer_->version());
    if (report_.python_overhead_us) fmt::print("a call from Python adds {}\n", format_us(*report_.python_overhead_us));
    for (const Peer::Routing& r : routings_) {
      report_.blocks.push_back(time_tokens(r.tokens, r.routes));
      progress_.clear();
      fmt::print("\n{}", render(report_.blocks.back(), wants_colour()));
      std::fflush(stdout);
    }
    fmt::print(
        "\nfloor: the weights of the experts in use, x and out once at the read ceiling, or the operations at the int8 "
        "ceiling\n");
    if (const double spread = worst_spread(report_); spread > kBusySpread) {
      fmt::print("{}\n",
                 styled(fmt::format("the spread reaches {:.0f} %: the machine is busy with other things; do not quote "
                                    "these numbers (the ceilings suffer too)",
                                    100 * spread),
                        Style::warn, wants_colour()));
    }
    write_files();
    return kOk;
  }

 private:
  // Everything that can be wrong is found before anything slow begins.
  void read_arguments() {
    report_.shape = shape_of(o_, &report_.model);
    tokens_ = parse_integers("--tokens", o_.tokens, 1, kMaxTokens);
    schemes_ = parse_schemes("--schemes", o_.schemes);
    try {
      device_ = Device::parse(o_.device);
    } catch (const Error& e) {
      throw UsageError(std::string("--device: ") + e.what());
    }
    if (device_.type == DeviceType::cuda) {
      if (o_.peer != "none")
        throw UsageError("--peer torch: times PyTorch on the CPU, so it does not go with --device cuda");
      if (o_.schemes == "all") std::erase_if(schemes_, [](const Scheme& s) { return !s.is_integer(); });
    } else if (o_.graph || o_.no_fused_gather || o_.no_fused_activation || o_.no_replay) {
      throw UsageError("--graph, --no-fused-gather, --no-fused-activation, --no-replay: for --device cuda");
    }
    report_.device = to_string(device_);
    report_.graph = o_.graph;
    report_.replay = !o_.no_replay;
    routing_ = Routing::parse(o_.routing);
    report_.machine = Machine::read();
    report_.threads = o_.threads > 0 ? o_.threads : report_.machine.threads;
    report_.routing = routing_.kind == Routing::Kind::from_file ? "from-file" : o_.routing;  // no paths in results
    report_.seed = o_.seed;
    if (!o_.json.empty()) json_.emplace(o_.json);
    if (!o_.plot.empty()) plot_.emplace(o_.plot);
    const ProblemShape& s = report_.shape;
    if (o_.peer == "torch" && s.experts_local < s.experts) {
      throw UsageError("--peer torch: the peer cannot skip routes, so it does not go with --experts-local");
    }
  }

  void make_layers() {
    const ProblemShape& s = report_.shape;
    LayerOptions options;
    options.threads = o_.threads;
    options.expert_map = s.expert_map();
    options.fused_gather = !o_.no_fused_gather;
    options.fused_activation = !o_.no_fused_activation;
    if (o_.no_replay) options.replays = 0;
    for (std::size_t i = 0; i < schemes_.size(); ++i) {
      progress_.update(static_cast<double>(i) / static_cast<double>(schemes_.size()),
                       "weights: " + to_string(schemes_[i]));
      layers_.push_back(
          std::make_unique<MoeLayer>(device_, random_weights(schemes_[i], s, o_.seed, o_.threads), options));
    }
  }

  BenchBlock time_tokens(std::int64_t tokens, const Routes& routes) {
    const ProblemShape& s = report_.shape;
    const Tensor host_x = random_activations(tokens, s.hidden, o_.seed);
    const Tensor x = gpu_ ? Tensor::copy_of(host_x, device_) : host_x;
    const Tensor out = Tensor::empty(DType::bfloat16, {tokens, s.hidden}, device_);
    std::vector<Contender> contenders;
    GpuBench::Work work{nullptr, x, out, {}};
    for (std::uint64_t i = 0; gpu_ && i < kGpuCalls; ++i) {
      work.routes.push_back(make_routes(routing_, s, tokens, o_.seed + i));
    }
    for (std::size_t i = 0; i < schemes_.size(); ++i) {
      MoeLayer* layer = layers_[i].get();
      layer->reserve(tokens, s.top_k);
      work.layer = layer;
      if (gpu_) {
        contenders.push_back(gpu_->contender(to_string(schemes_[i]), work, o_.graph));
        continue;
      }
      contenders.push_back({to_string(schemes_[i]), [=, &routes] {
                              return time_us([&] { layer->forward(x, routes.ids, routes.weights, out); });
                            }});
    }
    for (const std::string& way : peer_ ? peer_->ways() : std::vector<std::string>()) {
      contenders.push_back({"torch " + way, [=, this] { return peer_->run_us(way, tokens); }});
    }
    const std::vector<Timing> timings = interleave(contenders, o_.timing, [&](int round, double fraction) {
      progress_.update(fraction, fmt::format("T = {}, round {}", tokens, round));
    });

    BenchBlock block{.tokens = tokens, .routes = routes.local, .touched_experts = routes.touched_experts};
    if (gpu_) {
      block.clock_mhz = gpu_->clock_mhz();
      // The calls have other routes each: the mean of what they touch.
      block.routes = block.touched_experts = 0;
      for (const Routes& r : work.routes) {
        block.routes += r.local;
        block.touched_experts += r.touched_experts;
      }
      block.routes /= kGpuCalls;
      block.touched_experts /= kGpuCalls;
    }
    const double part = static_cast<double>(block.touched_experts) / static_cast<double>(s.experts_local);
    const double activations = 2.0 * 2.0 * static_cast<double>(tokens * s.hidden);  // x and out in bf16
    for (std::size_t i = 0; i < contenders.size(); ++i) {
      BenchRow row{.name = contenders[i].name, .is_peer = i >= schemes_.size(), .timing = timings[i]};
      row.weight_bytes = s.weight_bytes(row.is_peer ? Scheme::bf16() : schemes_[i]);
      row.bytes = row.weight_bytes * part + activations;
      row.ops = 2.0 * 3.0 * static_cast<double>(block.routes) * static_cast<double>(s.hidden * s.intermediate);
      row.floor = floor_of(row.bytes, report_.ceilings.read_bytes_per_s, row.ops, report_.ceilings.int8_ops_per_s);
      if (gpu_) {
        work.layer = layers_[i].get();
        row.host_us = gpu_->host_us(work);
      }
      if (!row.is_peer) row.workspace_bytes = static_cast<double>(layers_[i]->workspace_bytes(tokens, s.top_k));
      block.rows.push_back(row);
    }
    return block;
  }

  void write_files() {
    const std::string text =
        to_json(report_).dump(2, ' ', false, nlohmann::ordered_json::error_handler_t::replace) + "\n";
    if (json_) json_->commit(text);
    if (plot_) plot_->draw(text);
  }

  const Options& o_;
  Progress progress_;
  BenchReport report_;
  std::vector<std::int64_t> tokens_;
  std::vector<Scheme> schemes_;
  Routing routing_;
  std::optional<OutputFile> json_;
  std::optional<Plot> plot_;
  std::vector<Peer::Routing> routings_;
  std::unique_ptr<Peer> peer_;
  std::vector<std::unique_ptr<MoeLayer>> layers_;
  Device device_;
  std::optional<GpuBench> gpu_;
};

}  // namespace

void add_bench(CLI::App& app, Action& action) {
  CLI::App* sub = app.add_subcommand("bench", "Time one MoE layer of a model's shape with random weights");
  auto o = std::make_shared<Options>();
  const auto size = CLI::Range(1, 1 << 20);
  sub->add_option("--model", o->model, "Shape: " + preset_names() + " (default: qwen3-30b)");
  sub->add_option("--experts", o->experts, "Experts")->check(CLI::Range(1, 65536));
  sub->add_option(
         "--experts-local", o->experts_local,
         "Hold only the first N experts, as one rank of an expert-parallel group; routes to the others are skipped")
      ->check(CLI::Range(1, 65536));
  sub->add_option("--hidden", o->hidden, "Hidden size")->check(size);
  sub->add_option("--intermediate", o->intermediate, "Intermediate size of an expert")->check(size);
  sub->add_option("--top-k", o->top_k, "Experts of a token")->check(CLI::Range(1, 65536));
  sub->add_option("--tokens", o->tokens, "Token counts, separated by commas")->capture_default_str();
  sub->add_option("--schemes,--scheme", o->schemes, "all, or schemes separated by commas (docs/schemes.md)")
      ->capture_default_str();
  sub->add_option("--device", o->device, "cpu, cuda or cuda:N")->capture_default_str();
  sub->add_flag("--graph", o->graph, "CUDA: replay the calls from a CUDA graph");
  sub->add_flag("--no-fused-gather", o->no_fused_gather, "CUDA: gather quantised tokens in a kernel of its own");
  sub->add_flag("--no-fused-activation", o->no_fused_activation, "CUDA: apply the activation in a kernel of its own");
  sub->add_flag("--no-replay", o->no_replay, "CUDA: launch the kernels of an eager call one by one");
  sub->add_option("--threads", o->threads, "Threads; 0: OCTOMOE_NUM_THREADS, else all cores")
      ->check(CLI::Range(0, 1024));
  sub->add_option("--routing", o->routing,
                  "uniform; zipf:S (popularity 1 / rank^S); single (all tokens take the same experts); from-file:FILE "
                  "(safetensors with topk_ids or router_logits)")
      ->capture_default_str();
  sub->add_option("--seed", o->seed, "Seed of weights, activations and routes")->capture_default_str();
  sub->add_option("--warmup", o->timing.warmup, "Untimed rounds")->check(CLI::Range(0, 10'000))->capture_default_str();
  auto* iters = sub->add_option("--iters", o->timing.iters, "Timed rounds")->check(CLI::Range(1, 1'000'000));
  sub->add_option("--min-time", o->timing.min_time_s,
                  "Without --iters: seconds that everyone runs at least (and 5 rounds)")
      ->check(CLI::Range(0.0, 3600.0))
      ->capture_default_str()
      ->excludes(iters);
  sub->add_option("--peer", o->peer, "torch: PyTorch's bf16 layer on the CPU in the same rounds; none")
      ->check(CLI::IsMember({"none", "torch"}))
      ->capture_default_str();
  sub->add_option("--json", o->json, "Also write the results to this file ('-': standard output)");
  sub->add_option("--plot", o->plot, "Draw the results into this .png (needs Python with octomoe and matplotlib)");
  sub->footer(
      "A round runs every scheme and the peer once; medians over the rounds are shown, the spread is half of "
      "p10..p90.\n\n"
      "Examples:\n"
      "  octomoe bench --model qwen3-30b --tokens 1,128 --peer torch --json bench.json --plot bench.png\n"
      "  octomoe bench --model deepseek-v3 --experts-local 32 --schemes int8_channel,int8_block\n"
      "  octomoe bench --experts 64 --hidden 2560 --intermediate 1536 --top-k 6 --routing zipf:1.0");
  sub->callback([o, &action] { action = [o] { return Bench(*o).run(); }; });
}

}  // namespace octomoe::cli
