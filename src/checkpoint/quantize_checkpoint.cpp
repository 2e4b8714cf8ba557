// quantize_checkpoint: runs the plan into a folder beside `out`, checks the result, and renames it.
#include <cstring>
#include <filesystem>
#include <utility>

#include "checkpoint/calibration.h"
#include "checkpoint/expert_names.h"
#include "checkpoint/file_io.h"
#include "checkpoint/json_read.h"
#include "checkpoint/model_config.h"
#include "checkpoint/quantize_plan.h"
#include "checkpoint/side_files.h"
#include "octomoe/checkpoint.h"
#include "tensor/check.h"

namespace octomoe {

using namespace checkpoint;
namespace fs = std::filesystem;

namespace {

// A folder that disappears with everything in it unless it is renamed.
class TemporaryFolder {
 public:
  explicit TemporaryFolder(const std::string& out) : path_(unused_name(out)) {
    std::error_code error;
    if (!fs::create_directory(path_, error)) fail(ErrorCode::io, "cannot create {}: {}", path_, error.message());
  }
  ~TemporaryFolder() {
    std::error_code ignored;
    fs::remove_all(path_, ignored);  // after a swap: what `out` held before
  }
  TemporaryFolder(const TemporaryFolder&) = delete;
  TemporaryFolder& operator=(const TemporaryFolder&) = delete;
  const std::string& path() const { return path_; }

 private:
  std::string path_;
};

// [1, rows, k] of a step: where it lies, or with its partner as [1, 2 rows, k].
Tensor step_matrix(const TensorStore& store, const QuantizeStep& step, const Tensor& source) {
  const auto rows_of = [&](const Tensor& t, std::int64_t row) {
    const std::int64_t all = t.elems() / step.k;
    const std::int64_t per_expert = t.shape().rank() == 3 ? t.dim(1) : all;
    auto* p =
        t.as<std::byte>() + static_cast<std::size_t>((step.expert * per_expert + row) * step.k) * size_bytes(t.dtype());
    return TensorView(p, t.dtype(), {1, step.rows, step.k});
  };
  const TensorView own = rows_of(source, step.row);
  if (step.partner.empty()) return Tensor::wrap(own, std::make_shared<const Tensor>(source));
  const Tensor partner_source = store.tensor(step.partner);
  const TensorView other = rows_of(partner_source, step.partner_row);
  Tensor both = Tensor::empty(own.dtype(), {1, 2 * step.rows, step.k});
  std::memcpy(both.view().data(), (step.partner_first ? other : own).data(), own.bytes());
  std::memcpy(both.as<std::byte>() + own.bytes(), (step.partner_first ? own : other).data(), own.bytes());
  return both;
}

void write_matrix(const TensorStore& store, const QuantizeStep& step, const Scheme& scheme, int threads,
                  const std::string& target, SafetensorsWriter& writer) {
  const Tensor source = store.tensor(step.source);
  const Tensor w = step_matrix(store, step, source);
  const std::string name = fmt::format("{}, expert {} of it", store.describe(step.source), step.expert);
  const QuantizedMatrix m = quantize_matrix(scheme, w, step.partner.empty() ? 1 : 2, threads, name);
  // With a partner: the half that is ours.
  const std::size_t bytes = m.values.bytes() / (step.partner.empty() ? 1 : 2);
  writer.write(target, m.values.as<std::byte>() + (step.partner_first ? bytes : 0), bytes);
  if (step.outputs.size() > 1) writer.write(step.outputs[1].name, m.scale.view().data(), m.scale.bytes());
  if (m.q.defined()) writer.write(step.outputs[2].name, m.q.view().data(), m.q.bytes());
}

struct Run {
  const TensorStore& store;
  const QuantizePlan& plan;
  const Scheme& scheme;
  const QuantizeCheckpointOptions& options;
  const std::map<std::string, float>& input_scales;  // static: by module
  QuantizeProgress progress;

  void write_shard(const std::string& path, const std::vector<QuantizeStep>& steps) {
    std::vector<SafetensorsWriter::Entry> entries;
    for (const QuantizeStep& step : steps) entries.insert(entries.end(), step.outputs.begin(), step.outputs.end());
    SafetensorsWriter writer(path, std::move(entries), {{"format", "pt"}});
    std::string target;
    for (const QuantizeStep& step : steps) {
      if (!step.outputs.empty()) target = step.outputs.front().name;
      const std::span<const std::byte> bytes = store.bytes(step.source);
      if (step.kind == QuantizeStep::Kind::copy) {
        writer.write(target, bytes.data(), bytes.size());
      } else {
        write_matrix(store, step, scheme, options.threads, target, writer);
        if (const auto scale = input_scales.find(step.module); scale != input_scales.end())
          writer.write(step.module + ".input_scale", &scale->second, sizeof(float));
      }
      release_pages(bytes);
      progress.done += static_cast<std::int64_t>(step.source_bytes);
      progress.current = step.source;
      if (options.progress) options.progress(progress);
    }
    writer.finish();
  }

  void write_all(const std::string& folder) {
    const std::size_t count = plan.shards.size();
    nlohmann::ordered_json weight_map = nlohmann::ordered_json::object();
    std::uint64_t total = 0;
    progress.total = static_cast<std::int64_t>(plan.total_bytes);
    for (std::size_t i = 0; i < count; ++i) {
      const std::string name =
          count == 1 ? "model.safetensors" : fmt::format("model-{:05}-of-{:05}.safetensors", i + 1, count);
      write_shard((fs::path(folder) / name).string(), plan.shards[i]);
      for (const QuantizeStep& step : plan.shards[i]) {
        total += step.output_bytes();
        for (const auto& e : step.outputs) weight_map[e.name] = name;
      }
    }
    if (count == 1) return;
    const nlohmann::ordered_json index{{"metadata", {{"total_size", total}}}, {"weight_map", weight_map}};
    write_text((fs::path(folder) / "model.safetensors.index.json").string(), index.dump(2) + "\n");
  }
};

void check_target(const std::string& in, const std::string& out, bool overwrite) {
  std::error_code ignored;
  if (!fs::is_directory(in, ignored)) fail(ErrorCode::io, "in: expected a folder, got {}", in);
  const fs::path from = fs::weakly_canonical(in), to = fs::weakly_canonical(out);
  const auto inside = [](const fs::path& a, const fs::path& b) {
    return std::mismatch(b.begin(), b.end(), a.begin(), a.end()).first == b.end();
  };
  if (inside(from, to) || inside(to, from)) {
    bad_argument("out: expected a folder outside of in ({}), got {}", from.string(), to.string());
  }
  if (!fs::is_directory(to.parent_path(), ignored)) {
    fail(ErrorCode::io, "out: expected an existing parent folder, got {}", to.string());
  }
  if (!fs::exists(to, ignored)) return;
  if (!fs::is_directory(to, ignored)) bad_argument("out: expected a folder, got the file {}", to.string());
  if (fs::is_empty(to)) return;
  if (!overwrite) bad_argument("out: expected an empty or new folder (or overwrite), got {}", to.string());
  if (!fs::exists(to / "config.json", ignored)) {
    bad_argument("out: expected a checkpoint to overwrite, got {} without config.json", to.string());
  }
}

}  // namespace

void quantize_checkpoint(const std::string& in, const std::string& out, const Scheme& scheme,
                         const QuantizeCheckpointOptions& options) {
  check(scheme);
  const bool wants_calibration = scheme.activation_scale == ActivationScale::static_;
  if (wants_calibration == options.calibration.empty()) {
    bad_argument("calibration: expected {}, got {}",
                 wants_calibration ? "a file of captured hidden states (activation scales are static)"
                                   : "none (activation scales are not static)",
                 wants_calibration ? "none" : options.calibration);
  }
  if (options.max_shard_bytes < 1)
    bad_argument("max_shard_bytes: expected at least 1, got {}", options.max_shard_bytes);
  check_target(in, out, options.overwrite);

  const TensorStore store = TensorStore::open(in);
  const std::string config_path = (fs::path(in) / "config.json").string();
  const std::string config_text = read_text(config_path, kMaxConfigBytes);
  const Checkpoint source = Checkpoint::open(in);
  if (source.config().format != QuantFormat::none) {
    fail(ErrorCode::unsupported, "in: expected bf16, fp16 or float32 weights, got {} ({})", in,
         to_string(source.config().format));
  }
  const std::map<int, LayerNames> layers = find_expert_layers(store.names());
  const QuantizePlan plan = plan_quantize(store, source.config(), layers, scheme, options);
  std::map<std::string, float> input_scales;
  if (wants_calibration) {
    input_scales = calibrate_modules(
        {store, source, layers, scheme, options.calibration, options.shared_experts, options.threads}, [&](int layer) {
          if (options.progress)
            options.progress(
                {0, static_cast<std::int64_t>(plan.total_bytes), fmt::format("calibrating layer {}", layer)});
        });
  }

  const std::string target = fs::weakly_canonical(out).string();
  const TemporaryFolder folder(target);
  Run run{store, plan, scheme, options, input_scales, {}};
  run.write_all(folder.path());
  nlohmann::ordered_json config = parse_ordered_json(config_text, config_path);
  if (format_of(scheme) != QuantFormat::none)
    config["quantization_config"] = make_quantization_config(scheme, plan.ignored);
  write_text((fs::path(folder.path()) / "config.json").string(), config.dump(2) + "\n");
  copy_side_files(in, folder.path());
  static_cast<void>(Checkpoint::open(folder.path()));  // headers, index and config read back
  rename_or_swap(folder.path(), target);
}

}  // namespace octomoe
