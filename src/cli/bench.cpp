// octomoe bench: times one MoE layer of a model's shape with random weights, every scheme and a peer in turns.
#include <fmt/format.h>

#include <filesystem>
#include <memory>
#include <optional>

#include "cli/arguments.h"
#include "cli/bench_report.h"
#include "cli/cli.h"
#include "cli/cuda_probe.h"
#include "cli/gpu.h"
#include "cli/harness.h"
#include "cli/output_file.h"
#include "cli/peer.h"
#include "cli/plot.h"
#include "cli/presets.h"
#include "cli/problem.h"
#include "cli/profile.h"
#include "cli/shape_arguments.h"
#include "cli/study.h"
#include "cli/table.h"
#include "cli/terminal.h"
#include "cpu/ceilings.h"
#include "octomoe/layer.h"

namespace octomoe::cli {
namespace {

constexpr std::int64_t kMaxTokens = 1 << 20;
constexpr double kBusySpread = 0.3;  // a quiet machine stays below a tenth

struct BenchOptions : ShapeArguments {
  std::string tokens, schemes, device = "cpu", routing = "uniform", peer = "none", family, combine_order = "slots",
                               study, json, plot;
  int threads = 0;
  std::uint64_t seed = 0;
  bool graph = false, profile = false, no_fused_gather = false, no_fused_activation = false,
       no_fused_requantize = false, no_replay = false, prepack = false;
  HybridParameters hybrid;
  HarnessOptions timing;
};

constexpr const char *kCpuModel = "qwen3-30b", *kCpuTokens = "1,16,128,1024";
constexpr const char *kCudaModel = "qwen3.6-35b", *kCudaTokens = "8192";  // where neither is given

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
  explicit Bench(const BenchOptions& o) : o_(o), progress_("bench") {
    if (!o_.study.empty() && o_.model.empty()) o_.model = kCudaModel;
  }

  int run() {
    read_arguments();
    if (!o_.study.empty()) return study();
    check_memory(report_.shape, schemes_, *std::max_element(tokens_.begin(), tokens_.end()), o_.peer == "torch");
    for (const std::int64_t t : tokens_) {
      const auto calls = static_cast<std::uint64_t>(device_.type == DeviceType::cuda ? kGpuCalls : 1);
      routes_.emplace_back();
      for (std::uint64_t i = 0; i < calls; ++i) {
        routes_.back().push_back(make_routes(routing_, report_.shape, t, o_.seed + i));
      }
    }
    if (o_.peer == "torch") {
      progress_.update(0, "peer");
      peer_ = std::make_unique<Peer>();
      std::vector<Peer::Routing> routings;
      for (std::size_t i = 0; i < tokens_.size(); ++i) routings.push_back({tokens_[i], routes_[i].front()});
      peer_->prepare(report_.shape, routings, report_.threads, o_.seed);
      report_.peer_version = peer_->version();
      report_.python_overhead_us = peer_->python_overhead_us();
    }
    progress_.update(0, "ceilings");
    if (device_.type == DeviceType::cuda) {
      if (o_.profile) search_python_wheels();  // for NVTX
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
    for (std::size_t i = 0; i < tokens_.size(); ++i) {
      report_.blocks.push_back(gpu_ ? time_on_gpu(tokens_[i], routes_[i])
                                    : time_on_cpu(tokens_[i], routes_[i].front()));
      progress_.clear();
      fmt::print("\n{}", render(report_.blocks.back(), wants_colour()));
      std::fflush(stdout);
    }
    if (!profiled_.empty()) fmt::print("\n{}\n", profiled_);
    fmt::print("\nfloor: the weights of the experts in use, x and out once {}, or the operations at the int8 ceiling\n",
               gpu_ ? "as fast as a plain read of as many bytes" : "at the read ceiling");
    if (const double spread = worst_spread(report_); spread > kBusySpread) {
      fmt::print("{}\n",
                 styled(fmt::format("the spread reaches {:.0f} %: the machine is busy with other things; do not quote "
                                    "these numbers (the ceilings suffer too)",
                                    100 * spread),
                        Style::warn, wants_colour()));
    }
    write_files(to_json(report_));
    return kOk;
  }

 private:
  // Everything that can be wrong is found before anything slow begins.
  void read_arguments() {
    device_ = parse_device("--device", o_.device);
    const bool on_gpu = device_.type == DeviceType::cuda;
    const bool sizes = o_.experts > 0 || o_.hidden > 0 || o_.intermediate > 0 || o_.top_k > 0;
    const bool whole_default = on_gpu && o_.model.empty() && !sizes && o_.tokens.empty();
    report_.shape = shape_of(o_, whole_default ? kCudaModel : kCpuModel, &report_.model);
    const std::string tokens = !o_.tokens.empty() ? o_.tokens : whole_default ? kCudaTokens : kCpuTokens;
    tokens_ = parse_integers("--tokens", tokens, 1, kMaxTokens);
    const std::string schemes = !o_.schemes.empty() ? o_.schemes : o_.profile ? "int8_channel" : "all";
    schemes_ = parse_schemes("--schemes", schemes);
    if (on_gpu) {
      if (o_.peer != "none")
        throw UsageError("--peer torch: times PyTorch on the CPU, so it does not go with --device cuda");
      if (schemes == "all") std::erase_if(schemes_, [](const Scheme& s) { return !s.is_integer(); });
    } else if (o_.graph || o_.profile || o_.no_fused_gather || o_.no_fused_activation || o_.no_fused_requantize ||
               o_.no_replay || o_.prepack || !o_.family.empty() || o_.combine_order != "slots" || !o_.study.empty()) {
      throw UsageError(
          "--graph, --profile, --study, --no-fused-gather, --no-fused-activation, --no-fused-requantize, --no-replay, "
          "--prepack, --family, --combine-order: for --device cuda");
    }
    set_hybrid(o_.hybrid, schemes_);
    if (o_.profile && (schemes_.size() != 1 || tokens_.size() != 1)) {
      throw UsageError(fmt::format("--profile: expected one scheme and one token count, got {} and {}", schemes_.size(),
                                   tokens_.size()));
    }
    report_.device = to_string(device_);
    if (!o_.family.empty()) family_ = parse_kernel_family(o_.family);
    report_.family = o_.family.empty() ? "automatic" : o_.family;
    report_.graph = o_.graph;
    report_.replay = !o_.no_replay;
    report_.prepack = o_.prepack;
    report_.combine_order = o_.combine_order;
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

  // On a GPU as many copies as it takes for calls not to find their weights in L2.
  int copies_of(const Scheme& scheme) const {
    int copies = 1;
    for (std::size_t i = 0; gpu_ && i < tokens_.size(); ++i) {
      std::vector<bool> touched(static_cast<std::size_t>(report_.shape.experts_local));
      for (const Routes& r : routes_[i]) r.mark(touched);
      const double part = static_cast<double>(std::count(touched.begin(), touched.end(), true)) /
                          static_cast<double>(report_.shape.experts_local);
      copies = std::max(copies, gpu_->copies(part * report_.shape.weight_bytes(scheme)));
    }
    return copies;
  }

  void make_layers() {
    const ProblemShape& s = report_.shape;
    LayerOptions options;
    options.threads = o_.threads;
    options.expert_map = s.expert_map();
    options.fused_gather = !o_.no_fused_gather;
    options.fused_activation = !o_.no_fused_activation;
    options.fused_requantize = !o_.no_fused_requantize;
    options.family = family_;
    options.prepack = o_.prepack;
    options.combine_order = parse_combine_order(o_.combine_order);
    if (o_.no_replay) options.replays = 0;
    for (std::size_t i = 0; i < schemes_.size(); ++i) {
      progress_.update(static_cast<double>(i) / static_cast<double>(schemes_.size()),
                       "weights: " + to_string(schemes_[i]));
      layers_.emplace_back();
      for (int copy = 0; copy < copies_of(schemes_[i]); ++copy) {
        const std::uint64_t seed = o_.seed + 1000 * static_cast<std::uint64_t>(copy);
        layers_.back().push_back(
            std::make_unique<MoeLayer>(device_, random_weights(schemes_[i], s, seed, o_.threads), options));
      }
    }
  }

  std::vector<Timing> time(const std::vector<Contender>& contenders, std::int64_t tokens) {
    return interleave(contenders, o_.timing, [&](int round, double fraction) {
      progress_.update(fraction, fmt::format("T = {}, round {}", tokens, round));
    });
  }

  // What the calls must do at least, `part` of the experts being in use.
  BenchRow row_of(const std::string& name, bool is_peer, const Scheme& scheme, const Timing& timing,
                  const BenchBlock& block) const {
    const ProblemShape& s = report_.shape;
    const double part = block.touched_experts / static_cast<double>(s.experts_local);
    BenchRow row{.name = name, .is_peer = is_peer, .timing = timing};
    row.weight_bytes = s.weight_bytes(scheme);
    row.bytes = row.weight_bytes * part + 2.0 * 2.0 * static_cast<double>(block.tokens * s.hidden);  // x, out in bf16
    row.ops = 2.0 * 3.0 * block.routes * static_cast<double>(s.hidden * s.intermediate);
    const double bandwidth = block.read ? block.read_bytes_per_s() : report_.ceilings.read_bytes_per_s;
    row.floor = floor_of(row.bytes, bandwidth, row.ops, report_.ceilings.int8_ops_per_s);
    return row;
  }

  BenchBlock time_on_cpu(std::int64_t tokens, const Routes& routes) {
    const ProblemShape& s = report_.shape;
    const Tensor x = random_activations(tokens, s.hidden, o_.seed);
    const Tensor out = Tensor::empty(DType::bfloat16, {tokens, s.hidden});
    std::vector<Contender> contenders;
    for (std::size_t i = 0; i < schemes_.size(); ++i) {
      MoeLayer* layer = layers_[i].front().get();
      layer->reserve(tokens, s.top_k);
      contenders.push_back({to_string(schemes_[i]), [=, &routes] {
                              return time_us([&] { layer->forward(x, routes.ids, routes.weights, out); });
                            }});
    }
    for (const std::string& way : peer_ ? peer_->ways() : std::vector<std::string>()) {
      contenders.push_back({"torch " + way, [=, this] { return peer_->run_us(way, tokens); }});
    }
    const std::vector<Timing> timings = time(contenders, tokens);
    BenchBlock block{.tokens = tokens,
                     .routes = static_cast<double>(routes.local),
                     .touched_experts = static_cast<double>(routes.touched_experts)};
    for (std::size_t i = 0; i < contenders.size(); ++i) {
      const bool is_peer = i >= schemes_.size();
      block.rows.push_back(
          row_of(contenders[i].name, is_peer, is_peer ? Scheme::bf16() : schemes_[i], timings[i], block));
      if (!is_peer) {
        block.rows.back().workspace_bytes = static_cast<double>(layers_[i].front()->workspace_bytes(tokens, s.top_k));
      }
    }
    return block;
  }

  // The calls of a round: each with its own routes, so that successive calls want other experts' weights, as a model's
  // layers do; where that is not enough to get past L2, also other copies of the weights.
  BenchBlock time_on_gpu(std::int64_t tokens, const std::vector<Routes>& routes) {
    const ProblemShape& s = report_.shape;
    const Tensor x = Tensor::copy_of(random_activations(tokens, s.hidden, o_.seed), device_);
    const Tensor out = Tensor::empty(DType::bfloat16, {tokens, s.hidden}, device_);
    BenchBlock block{.tokens = tokens};
    std::vector<std::pair<Tensor, Tensor>> on_device;
    for (const Routes& r : routes) {
      on_device.emplace_back(Tensor::copy_of(r.ids, device_), Tensor::copy_of(r.weights, device_));
      block.routes += static_cast<double>(r.local) / kGpuCalls;
      block.touched_experts += static_cast<double>(r.touched_experts) / kGpuCalls;
    }

    std::vector<std::vector<GpuCall>> calls;  // of each scheme
    for (const auto& copies : layers_) {
      calls.emplace_back();
      for (const auto& layer : copies) layer->reserve(tokens, s.top_k);
      for (std::size_t i = 0; i < on_device.size(); ++i) {
        calls.back().emplace_back([=, layer = copies[i % copies.size()].get(), r = on_device[i]](Stream stream) {
          layer->forward(x, r.first, r.second, out, {}, stream);
        });
      }
    }
    std::vector<GpuBench::Clocks> clocks;  // the same
    block.read_bytes = row_of("", false, schemes_.front(), {}, block).bytes;
    std::vector<Contender> contenders;
    for (std::size_t i = 0; i < schemes_.size(); ++i) {
      clocks.push_back(std::make_shared<std::vector<double>>());
      contenders.push_back(gpu_->contender(to_string(schemes_[i]), calls[i], o_.graph, clocks.back()));
      if (o_.graph) contenders.push_back(gpu_->contender("eager", calls[i], false));
    }
    contenders.push_back(gpu_->read_contender(block.read_bytes, o_.graph));
    const std::vector<Timing> timings = time(contenders, tokens);
    block.read = timings.back();
    for (std::size_t i = 0, t = 0; i < schemes_.size(); ++i) {
      BenchRow row = row_of(to_string(schemes_[i]), false, schemes_[i], timings[t++], block);
      if (o_.graph) row.eager = timings[t++];
      row.clocks_mhz = *clocks[i];
      time_host(row, *layers_[i].front(), tokens, on_device);
      const GpuBench::WorkspaceUse workspace = gpu_->workspace(calls[i].front());
      row.workspace_bytes = workspace.bytes;
      row.live_bytes = workspace.live_bytes;
      row.weight_copies = static_cast<int>(layers_[i].size());
      block.rows.push_back(row);
    }
    if (o_.profile) profile(block, x, out, routes);
    return block;
  }

  // One layer's calls: with the same tensors, and with each call's one row further. What they hold does not matter.
  void time_host(BenchRow& row, MoeLayer& layer, std::int64_t tokens,
                 const std::vector<std::pair<Tensor, Tensor>>& routes) const {
    const std::int64_t hidden = report_.shape.hidden;
    const Tensor xs = Tensor::zeros(DType::bfloat16, {tokens + kGpuCalls - 1, hidden}, device_);
    const Tensor outs = Tensor::empty(DType::bfloat16, {tokens + kGpuCalls - 1, hidden}, device_);
    std::vector<GpuCall> same, moved;
    for (std::int64_t i = 0; i < kGpuCalls; ++i) {
      const auto from = [&](std::int64_t row_begin, const std::pair<Tensor, Tensor>& r) -> GpuCall {
        return [=, &layer, x = xs.view().slice(row_begin, tokens), out = outs.view().slice(row_begin, tokens)](
                   Stream stream) { layer.forward(x, r.first, r.second, out, {}, stream); };
      };
      same.push_back(from(0, routes.front()));
      moved.push_back(from(i, routes[static_cast<std::size_t>(i)]));
    }
    row.host_us = gpu_->host_us(same);
    row.host_new_us = gpu_->host_us(moved);
  }

  void profile(BenchBlock& block, const Tensor& x, const Tensor& out, const std::vector<Routes>& routes) {
    const auto& copies = layers_.front();
    std::vector<GpuCall> calls;
    for (std::size_t i = 0; i < routes.size(); ++i) {
      calls.push_back(routed_call(*copies[i % copies.size()], x, out, routes[i], report_.shape.experts));
    }
    block.stages = time_stages(*gpu_, calls, o_.timing);
    const std::string name = fmt::format("{} T={}", to_string(schemes_.front()), block.tokens);
    const Profiled p = profile_once(*gpu_, calls.front(), name);
    profiled_ = fmt::format("profiled: one call between cuProfilerStart and cuProfilerStop, {}: {}",
                            p.ranges ? "with ranges" : "without ranges", p.nvtx);
  }

  int study() {
    if (o_.profile || o_.graph || o_.no_fused_gather || o_.no_fused_activation || o_.no_fused_requantize ||
        o_.no_replay || o_.prepack || o_.combine_order != "slots" || o_.routing != "uniform" || o_.experts_local > 0) {
      throw UsageError(
          "--study: has its own routings and graphs, so it does not go with --profile, --graph, --no-fused-gather, "
          "--no-fused-activation, --no-fused-requantize, --no-replay, --prepack, --combine-order, --routing and "
          "--experts-local");
    }
    StudyInput in{.shape = report_.shape, .timing = o_.timing, .device = device_, .seed = o_.seed};
    in.on_step = [&](double fraction, const std::string& what) { progress_.update(fraction, what); };
    if (!o_.tokens.empty()) in.tokens = tokens_;
    if (o_.experts > 0) in.experts = {o_.experts};
    const std::vector<Scheme> given = o_.schemes.empty() ? std::vector{Scheme::int8_channel()} : std::vector(schemes_);
    if (given.size() != 1 || !given.front().is_integer()) {
      throw UsageError(fmt::format("--study: expected one of the integer schemes, got {}", o_.schemes));
    }
    in.scheme = given.front();
    in.family = family_;
    const GroupingStudy result = study_grouping(in);
    progress_.clear();
    fmt::print("{}", render(result, wants_colour()));
    write_files(to_json(result));
    return kOk;
  }

  void write_files(const nlohmann::ordered_json& result) {
    const std::string text = result.dump(2, ' ', false, nlohmann::ordered_json::error_handler_t::replace) + "\n";
    if (json_) json_->commit(text);
    if (plot_) plot_->draw(text);
  }

  BenchOptions o_;
  Progress progress_;
  BenchReport report_;
  std::vector<std::int64_t> tokens_;
  std::vector<Scheme> schemes_;
  Routing routing_;
  std::optional<OutputFile> json_;
  std::optional<Plot> plot_;
  std::vector<std::vector<Routes>> routes_;  // of each token count: one for a CPU, one for each call on a GPU
  std::unique_ptr<Peer> peer_;
  std::vector<std::vector<std::unique_ptr<MoeLayer>>> layers_;  // of each scheme, copies of the weights
  std::string profiled_;
  Device device_;
  KernelFamily family_ = KernelFamily::automatic;
  std::optional<GpuBench> gpu_;
};

}  // namespace

void add_bench(CLI::App& app, Action& action) {
  CLI::App* sub = app.add_subcommand("bench", "Time one MoE layer of a model's shape with random weights");
  auto o = std::make_shared<BenchOptions>();
  sub->add_option("--model", o->model,
                  "Shape: " + preset_names() +
                      " (default: qwen3-30b; on CUDA with neither model, sizes nor tokens given qwen3.6-35b)");
  add_size_options(*sub, *o);
  sub->add_option("--tokens", o->tokens,
                  "Token counts, separated by commas (default: 1,16,128,1024; on CUDA with neither model, sizes nor "
                  "tokens given 8192)");
  sub->add_option("--schemes,--scheme", o->schemes,
                  "all, or schemes separated by commas (docs/schemes.md). Default: all (on CUDA the integer ones; with "
                  "--profile and --study int8_channel)");
  sub->add_option("--quant-block-size", o->hybrid.block_k, "int8_hybrid: columns of a K-block, a multiple of 32")
      ->check(CLI::Range(32, 1024));
  sub->add_option("--super-group-size", o->hybrid.super_group, "int8_hybrid: K-blocks that share one float")
      ->check(CLI::Range(1, 65536));
  sub->add_option("--q-max", o->hybrid.q_max, "int8_hybrid: largest integer scale")->check(CLI::Range(1, 64));
  sub->add_option("--device", o->device, "cpu, cuda or cuda:N")->capture_default_str();
  sub->add_flag("--graph", o->graph, "CUDA: replay the calls from a CUDA graph; eager calls are timed beside it");
  sub->add_flag(
      "--profile", o->profile,
      "CUDA: time each stage of the layer; then make exactly one call between cuProfilerStart and "
      "cuProfilerStop, with NVTX ranges (nsys profile --capture-range=cudaProfilerApi, ncu --profile-from-start "
      "off). One scheme, one token count");
  sub->add_option("--family", o->family,
                  "CUDA: the GEMM kernels: automatic (the faster ones), sm80 (mma.sync), sm90 (wgmma)")
      ->check(CLI::IsMember({"automatic", "sm80", "sm90"}));
  sub->add_option(
         "--study", o->study,
         "CUDA: grouping: one grouped GEMM beside one GEMM for each expert, by the same kernels and by cuBLAS, "
         "over tokens, experts and skew")
      ->check(CLI::IsMember({"grouping"}));
  sub->add_flag("--no-fused-gather", o->no_fused_gather, "CUDA: gather quantised tokens in a kernel of its own");
  sub->add_flag("--no-fused-activation", o->no_fused_activation, "CUDA: apply the activation in a kernel of its own");
  sub->add_flag(
      "--no-fused-requantize", o->no_fused_requantize,
      "CUDA: quantise between the GEMMs in a kernel of its own (int8_block on SM90; other schemes always do)");
  sub->add_flag("--prepack", o->prepack, "CUDA: copy integer weights into panels on the device, which it reads faster");
  sub->add_option("--combine-order", o->combine_order,
                  "CUDA: slots: a token's rows are added up in the order of its slots; any: where it is faster GEMM2 "
                  "adds them to out as they come")
      ->check(CLI::IsMember({"slots", "any"}))
      ->capture_default_str();
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
      "  octomoe bench --experts 64 --hidden 2560 --intermediate 1536 --top-k 6 --routing zipf:1.0\n"
      "  octomoe bench --device cuda --graph\n"
      "  octomoe bench --device cuda --schemes int8_hybrid --quant-block-size 128 --super-group-size 16 --q-max 32\n"
      "  octomoe bench --device cuda --study grouping --json grouping.json --plot grouping.png");
  sub->callback([o, &action] { action = [o] { return Bench(*o).run(); }; });
}

}  // namespace octomoe::cli
