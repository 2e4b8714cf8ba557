#include "checkpoint/quantize_plan.h"

#include <algorithm>
#include <set>
#include <unordered_map>
#include <utility>

#include "checkpoint/expert_reader.h"
#include "checkpoint/model_config.h"
#include "checkpoint/safetensors_format.h"
#include "quant/matrix.h"
#include "tensor/check.h"

namespace octomoe::checkpoint {
namespace {

const std::vector<std::string> kFloats = {"F32", "F16", "BF16"};

class Planner {
 public:
  Planner(const TensorStore& store, const ModelConfig& config, const Scheme& scheme)
      : store_(store), config_(config), scheme_(scheme) {}

  void add_layer(int index, const LayerNames& names, bool shared_experts) {
    const std::string what = fmt::format("{}: layer {}", store_.folder(), index);
    if (names.fused) {
      add_fused(names);
    } else {
      for (std::int64_t e = 0; e < config_.experts; ++e) {
        add_mlp(names.expert(e), names.gate, names.up, names.down, config_.intermediate, what);
      }
    }
    if (shared_experts && config_.shared_intermediate > 0) {
      add_mlp(names.shared(!config_.shared_gate), "gate_proj", "up_proj", "down_proj", config_.shared_intermediate,
              what);
    }
  }

  // The steps of one source tensor, and nullopt if it stays as it is.
  const std::vector<QuantizeStep>* find(const std::string& name) const {
    const auto it = steps_.find(name);
    return it == steps_.end() ? nullptr : &it->second;
  }

 private:
  void add_mlp(const std::string& prefix, const std::string& gate, const std::string& up, const std::string& down,
               std::int64_t intermediate, const std::string& what) {
    const std::string g = prefix + gate + ".weight", u = prefix + up + ".weight", d = prefix + down + ".weight";
    expect_present(store_, {g, u, d}, what);
    const std::int64_t h = config_.hidden;
    expect_tensor(store_, g, kFloats, {{intermediate, h}});
    expect_tensor(store_, u, {store_.find(g)->dtype_name}, {{intermediate, h}});
    expect_tensor(store_, d, kFloats, {{h, intermediate}});
    add_matrix(g, prefix + gate, {0, 0, intermediate, h}, u, 0, false);
    add_matrix(u, prefix + up, {0, 0, intermediate, h}, g, 0, true);
    add_matrix(d, prefix + down, {0, 0, h, intermediate}, "", 0, false);
  }

  void add_fused(const LayerNames& names) {
    const std::string gu = names.fused_gate_up(), d = names.fused_down();
    const std::int64_t h = config_.hidden, i = config_.intermediate;
    expect_tensor(store_, gu, kFloats, {{config_.experts, 2 * i, h}});
    expect_tensor(store_, d, kFloats, {{config_.experts, h, i}});
    if (format_of(scheme_) == QuantFormat::none) {  // stays one tensor, expert behind expert
      for (const auto& [name, rows, k] : {std::tuple(gu, 2 * i, h), std::tuple(d, h, i)}) {
        for (std::int64_t e = 0; e < config_.experts; ++e) {
          add_matrix(name, "", {e, 0, rows, k}, "", 0, false);
          if (e > 0) steps_[name].back().outputs.clear();
        }
        steps_[name].front().outputs = {
            {name, scheme_.kind == SchemeKind::bf16 ? "BF16" : "F16", {config_.experts, rows, k}}};
      }
      return;
    }
    for (std::int64_t e = 0; e < config_.experts; ++e) {
      add_matrix(gu, names.expert(e) + "gate_proj", {e, 0, i, h}, gu, i, false);
      add_matrix(gu, names.expert(e) + "up_proj", {e, i, i, h}, gu, 0, true);
      add_matrix(d, names.expert(e) + "down_proj", {e, 0, h, i}, "", 0, false);
    }
  }

  struct Where {
    std::int64_t expert, row, rows, k;
  };
  void add_matrix(const std::string& source, const std::string& module, const Where& at, const std::string& partner,
                  std::int64_t partner_row, bool partner_first) {
    QuantizeStep step;
    step.kind = QuantizeStep::Kind::matrix;
    step.source = source;
    step.source_bytes = static_cast<std::uint64_t>(at.rows) * static_cast<std::uint64_t>(at.k) *
                        size_bytes(*store_.find(source)->dtype);
    step.expert = at.expert;
    step.row = at.row;
    step.rows = at.rows;
    step.k = at.k;
    if (scheme_.per_tensor && !partner.empty()) {
      step.partner = partner;
      step.partner_row = partner_row;
      step.partner_first = partner_first;
    }
    step.outputs = outputs_of(module, at.rows, at.k);
    step.module = module;
    steps_[source].push_back(std::move(step));
  }

  std::vector<SafetensorsWriter::Entry> outputs_of(const std::string& module, std::int64_t n, std::int64_t k) const {
    check_sizes(scheme_, 1, n, k, 1, store_.folder() + ": " + module);
    const MatrixLayout layout = layout_of(scheme_, 1, n, k, 1);
    const auto tail = [](const Shape& s) { return std::vector<std::int64_t>(s.dims().begin() + 1, s.dims().end()); };
    std::vector<SafetensorsWriter::Entry> out = {
        {module + ".weight", file_dtype_name(layout.value_dtype), tail(layout.values)}};
    if (layout.scale.rank() == 0) return out;
    std::vector<std::int64_t> scale = tail(layout.scale);
    if (scheme_.kind == SchemeKind::int8_channel)
      scale = scheme_.per_tensor ? std::vector<std::int64_t>{1} : std::vector<std::int64_t>{n, 1};
    const bool inv = scheme_.kind == SchemeKind::int8_block || scheme_.kind == SchemeKind::w4a8_fp8;
    out.push_back({module + (inv ? ".weight_scale_inv" : ".weight_scale"), "F32", scale});
    if (scheme_.kind == SchemeKind::int8_hybrid)
      out.push_back({module + ".weight_scale_q", "U8", {layout.blocks_n, layout.blocks_k}});
    if (scheme_.activation_scale == ActivationScale::static_) out.push_back({module + ".input_scale", "F32", {1}});
    return out;
  }

  const TensorStore& store_;
  const ModelConfig& config_;
  const Scheme& scheme_;
  std::unordered_map<std::string, std::vector<QuantizeStep>> steps_;
};

// "model.layers.0.self_attn.q_proj" of "....q_proj.weight" [N, K]; what quantising engines would take for a Linear
// module.
std::optional<std::string> linear_module(const SafetensorsFile::Info& info) {
  const std::size_t dot = info.name.rfind('.');
  if (dot == std::string::npos) return std::nullopt;
  const std::string module = info.name.substr(0, dot);
  if (info.shape.size() == 3 && info.name.find("experts.") != std::string::npos)
    return module;  // fused, of a draft model
  if (info.shape.size() != 2 || info.name.substr(dot) != ".weight" || module.ends_with("embed_tokens"))
    return std::nullopt;
  return module;
}

}  // namespace

std::uint64_t QuantizeStep::output_bytes() const {
  std::uint64_t sum = 0;
  for (const auto& e : outputs) sum += *tensor_bytes(*find_dtype(e.dtype_name), e.shape);
  return sum;
}

QuantizePlan plan_quantize(const TensorStore& store, const ModelConfig& config, const std::map<int, LayerNames>& layers,
                           const Scheme& scheme, const QuantizeCheckpointOptions& options) {
  Planner planner(store, config, scheme);
  for (const auto& [index, names] : layers) planner.add_layer(index, names, options.shared_experts);

  QuantizePlan plan;
  std::set<std::string> ignored;
  std::uint64_t shard_bytes = 0;
  const auto most = static_cast<std::uint64_t>(options.max_shard_bytes);
  const auto add = [&](QuantizeStep step) {
    const std::uint64_t bytes = step.output_bytes();
    // A step without outputs of its own goes on filling the tensor of the step before it.
    if (plan.shards.empty() ||
        (shard_bytes > 0 && bytes > most - std::min(most, shard_bytes) && !step.outputs.empty())) {
      plan.shards.emplace_back();
      shard_bytes = 0;
    }
    shard_bytes += bytes;
    plan.total_bytes += step.source_bytes;
    plan.shards.back().push_back(std::move(step));
  };
  for (const SafetensorsFile& file : store.files()) {
    for (const SafetensorsFile::Info& info : file.tensors()) {
      if (store.find(info.name) != file.find(info.name)) continue;  // a copy that the index does not use
      if (const auto* steps = planner.find(info.name)) {
        for (const QuantizeStep& step : *steps) add(step);
        continue;
      }
      if (const auto module = linear_module(info)) ignored.insert(*module);
      QuantizeStep step;
      step.source = info.name;
      step.source_bytes = info.end - info.begin;
      step.outputs = {{info.name, info.dtype_name, info.shape}};
      add(std::move(step));
    }
  }
  plan.ignored.assign(ignored.begin(), ignored.end());
  return plan;
}

}  // namespace octomoe::checkpoint
