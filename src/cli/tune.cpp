// octomoe tune: which kernel is the fastest for a model's GEMMs on this GPU, written into the table that layers read.
#include <fmt/format.h>

#include <filesystem>
#include <optional>

#include "cli/arguments.h"
#include "cli/cli.h"
#include "cli/gpu.h"
#include "cli/output_file.h"
#include "cli/presets.h"
#include "cli/shape_arguments.h"
#include "cli/table.h"
#include "cli/terminal.h"
#include "cli/tune_bench.h"
#include "cli/tune_check.h"

namespace octomoe::cli {
namespace {

namespace fs = std::filesystem;

constexpr std::int64_t kMaxTokens = 1 << 20;
constexpr const char* kTokens = "1,2,4,8,16,32,64,128,256,512,1024,2048,4096,8192";
constexpr const char* kSchemes = "int8_channel,int8_block,int8_hybrid";

struct TuneOptions : ShapeArguments {
  std::string tokens = kTokens, schemes = kSchemes, device = "cuda", family = "automatic", out, check, json;
  bool all_models = false;
  int rounds = 7, threads = 0;
  std::uint64_t seed = 0;
};

struct Model {
  std::string name;
  ProblemShape shape;
};

// "sm90_gemm:channel:swiglu:m256n128w4t5c1" -> "sm90 m256n128w4t5c1".
std::string short_name(const std::string& id) {
  return id.substr(0, id.find('_')) + " " + id.substr(id.rfind(':') + 1);
}

class Tune {
 public:
  explicit Tune(const TuneOptions& o) : o_(o), progress_("tune") {}

  int run() {
    read_arguments();
    GpuBench gpu(device_);
    fmt::print("{}: uniform routing, weights that have left L2, median of {} round{}\n",
               gpu.describe()["name"].get<std::string>(), o_.rounds, o_.rounds == 1 ? "" : "s");
    for (std::size_t i = 0; i < models_.size(); ++i) {
      const Model& m = models_[i];
      TuneInput in{.shape = m.shape, .schemes = schemes_, .tokens = tokens_, .family = family_, .rounds = o_.rounds};
      in.threads = o_.threads;
      in.seed = o_.seed;
      in.on_step = [&](double fraction, const std::string& what) {
        progress_.update((static_cast<double>(i) + fraction) / static_cast<double>(models_.size()),
                         m.name + ", " + what);
      };
      tune(gpu, in, [&](const Scheme& scheme, const std::vector<TunePoint>& points) { take(m, scheme, points); });
      write();
    }
    return kOk;
  }

 private:
  void read_arguments() {
    device_ = parse_device("--device", o_.device);
    if (device_.type != DeviceType::cuda) throw UsageError("--device: expected cuda or cuda:N, got cpu");
    if (o_.all_models) {
      if (!o_.model.empty() || o_.any_size() || o_.experts_local > 0) {
        throw UsageError("--all-models: stands for every --model and its sizes, so it does not go with them");
      }
      for (const Preset& p : kPresets) {
        const std::int64_t local = p.experts_of_a_rank > 0 ? p.experts_of_a_rank : p.experts;
        models_.push_back({p.name, {p.experts, local, p.hidden, p.intermediate, p.top_k}});
      }
    } else {
      if (o_.model.empty() && !o_.any_size()) {
        throw UsageError(
            "give --model, or --experts, --hidden, --intermediate and --top-k, or --all-models (see octomoe tune "
            "--help)");
      }
      models_.emplace_back();
      models_.back().shape = shape_of(o_, "", &models_.back().name);
    }
    tokens_ = parse_integers("--tokens", o_.tokens, 1, kMaxTokens);
    schemes_ = parse_schemes("--schemes", o_.schemes);
    if (o_.schemes == "all") std::erase_if(schemes_, [](const Scheme& s) { return !s.is_integer(); });
    for (const Scheme& s : schemes_) {
      if (!s.is_integer()) {
        throw UsageError(fmt::format("--schemes: expected integer schemes, got {}", to_string(s)));
      }
    }
    family_ = parse_kernel_family(o_.family);
    path_ = o_.out.empty() ? plan::user_tuned_path() : o_.out;
    if (path_.empty()) {
      throw UsageError(
          "--out: expected a file, since none of OCTOMOE_TUNED, OCTOMOE_CACHE_DIR, XDG_CACHE_HOME and "
          "HOME says where your table is");
    }
    if (path_ == "-") throw UsageError("--out: expected a file, got '-': what is there is kept");
    // Everything that can be wrong is found before anything slow begins.
    std::error_code ignored;
    if (o_.out.empty()) fs::create_directories(fs::path(path_).parent_path(), ignored);
    OutputFile trial(path_);
    read_table();
  }

  plan::TunedTable read_table() const {
    std::error_code ignored;
    return fs::exists(path_, ignored) ? plan::TunedTable::read(path_) : plan::TunedTable();
  }

  void take(const Model& m, const Scheme& scheme, const std::vector<TunePoint>& points) {
    const bool colour = wants_colour();
    Table table({{"T", false}, {"rows"}, {"matrix", true}, {"kernel", true}, {"time"}, {"cost model", true}, {"loss"}});
    double worst = 0, sum = 0;
    for (const TunePoint& p : points) {
      found_.set(p.key, p.rows, p.choice);
      const bool same = p.by_cost == p.choice.kernel;
      table.add(
          {fmt::format("{}", p.tokens),
           fmt::format("{}", p.rows),
           p.matrix,
           short_name(p.choice.kernel),
           format_us(p.choice.us.at(p.choice.kernel)),
           same ? "the same" : short_name(p.by_cost),
           {same ? "" : fmt::format("{:.1f} %", 100 * p.loss()), p.loss() > kLossGoal ? Style::warn : Style::plain}});
      worst = std::max(worst, p.loss());
      sum += p.loss();
    }
    progress_.clear();
    fmt::print("\n{}, {}\n{}the cost model's choices take {:.1f} % longer on average, {:.1f} % at worst\n",
               styled(m.name, Style::bold, colour), to_string(scheme), table.render(colour),
               100 * sum / static_cast<double>(points.size()), 100 * worst);
    std::fflush(stdout);
  }

  // With what is in the file now: another process may have written it meanwhile.
  void write() {
    plan::TunedTable all = read_table();
    const std::size_t before = all.size();
    all.merge(found_);
    OutputFile(path_).commit(all.text());
    fmt::print("\n{}: {} entries measured, {} in all ({} before)\n", path_, found_.size(), all.size(), before);
    found_ = {};
  }

  TuneOptions o_;
  Progress progress_;
  Device device_;
  KernelFamily family_ = KernelFamily::automatic;
  std::vector<Model> models_;
  std::vector<std::int64_t> tokens_;
  std::vector<Scheme> schemes_;
  std::string path_;
  plan::TunedTable found_;
};

int check(const TuneOptions& o) {
  std::optional<OutputFile> json;
  if (!o.json.empty()) json.emplace(o.json);
  const plan::TunedTable table = plan::TunedTable::read(o.check);
  if (table.empty()) throw Error(ErrorCode::format, o.check + ": expected entries, got none of this version's kernels");
  const TuneCheck result = check_costs(table);
  fmt::print("{}", render(result, wants_colour()));
  if (json) {
    nlohmann::ordered_json j = to_json(result);
    json->commit(j.dump(2, ' ', false, nlohmann::ordered_json::error_handler_t::replace) + "\n");
  }
  return kOk;
}

}  // namespace

void add_tune(CLI::App& app, Action& action) {
  CLI::App* sub = app.add_subcommand("tune", "Measure which GEMM kernels are the fastest for a model on this GPU");
  auto o = std::make_shared<TuneOptions>();
  sub->add_option("--model", o->model, "Shape: " + preset_names());
  add_size_options(*sub, *o);
  sub->add_flag("--all-models", o->all_models, "Every shape that --model knows, one after another");
  sub->add_option("--tokens", o->tokens,
                  "Token counts, separated by commas; others take what was nearest, up to twice as many or half")
      ->capture_default_str();
  sub->add_option("--schemes,--scheme", o->schemes, "all, or integer schemes separated by commas (docs/schemes.md)")
      ->capture_default_str();
  sub->add_option("--device", o->device, "cuda or cuda:N")->capture_default_str();
  sub->add_option("--family", o->family, "Only these kernels: automatic (all), sm80 (mma.sync), sm90 (wgmma)")
      ->check(CLI::IsMember({"automatic", "sm80", "sm90"}))
      ->capture_default_str();
  sub->add_option("--rounds", o->rounds, "Timed rounds of the kernels that the first one leaves")
      ->check(CLI::Range(1, 1000))
      ->capture_default_str();
  sub->add_option("--threads", o->threads, "Threads that make weights; 0: OCTOMOE_NUM_THREADS, else all cores")
      ->check(CLI::Range(0, 1024));
  sub->add_option("--seed", o->seed, "Seed of weights, activations and routes")->capture_default_str();
  sub->add_option("--out", o->out,
                  "The table; what it has of other shapes stays (default: OCTOMOE_TUNED, else tuned.json in the kernel "
                  "cache, which layers read)");
  auto* check_option = sub->add_option(
      "--check", o->check,
      "Measure nothing: how good the cost model's choices are beside this table's, also with constants fitted to all "
      "models but the one they choose for. Needs no GPU");
  sub->add_option("--json", o->json, "With --check: also write the result to this file ('-': standard output)")
      ->needs(check_option);
  sub->footer(
      "Layers take the fastest kernel that a table has for their shape, your table before the shipped one, else what a "
      "cost model says. The default table is read by every process that starts afterwards.\n\n"
      "Examples:\n"
      "  octomoe tune --model qwen3-30b\n"
      "  octomoe tune --model deepseek-v3 --experts-local 32 --schemes int8_channel --tokens 1,16,128,1024\n"
      "  octomoe tune --experts 64 --hidden 2560 --intermediate 1536 --top-k 6 --out tuned.json\n"
      "  octomoe tune --check tuned.json");
  for (CLI::Option* option : sub->get_options()) {
    const std::string name = option->get_name();
    if (name != "--help" && name != "--check" && name != "--json") check_option->excludes(option);
  }
  sub->callback([o, &action] { action = [o] { return o->check.empty() ? Tune(*o).run() : check(*o); }; });
}

}  // namespace octomoe::cli
