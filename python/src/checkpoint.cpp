// Checkpoints, and what the library says of itself.
#include <string>
#include <vector>

#include "cuda/library_search.h"
#include "objects.h"

namespace octomoe::python {
namespace {

CheckpointRef open_checkpoint(const ffi::String& path) {
  return guarded([&] { return CheckpointRef(Checkpoint::open(path)); });
}

const char* name_of(Scoring scoring) { return scoring == Scoring::softmax ? "softmax" : "sigmoid"; }

const char* name_of(Renormalize renormalize) {
  switch (renormalize) {
    case Renormalize::divide:
      return "divide";
    case Renormalize::add_eps:
      return "add_eps";
    default:
      return "none";
  }
}

OptionMap checkpoint_config(const CheckpointRef& checkpoint) {
  return guarded([&] {
    const ModelConfig& c = (*checkpoint).config();
    OptionMap route;
    route.Set("scoring", ffi::String(name_of(c.route.scoring)));
    route.Set("renormalize", ffi::String(name_of(c.route.renormalize)));
    route.Set("renormalize_min", static_cast<double>(c.route.renormalize_min));
    route.Set("scaling_factor", static_cast<double>(c.route.scaling_factor));
    route.Set("groups", static_cast<std::int64_t>(c.route.groups));
    route.Set("topk_groups", static_cast<std::int64_t>(c.route.topk_groups));
    OptionMap out;
    out.Set("model_type", ffi::String(c.model_type));
    out.Set("hidden", c.hidden);
    out.Set("intermediate", c.intermediate);
    out.Set("experts", c.experts);
    out.Set("layers", c.layers);
    out.Set("top_k", static_cast<std::int64_t>(c.top_k));
    out.Set("shared_intermediate", c.shared_intermediate);
    out.Set("shared_gate", c.shared_gate);
    out.Set("activation", ffi::String(to_string(c.activation)));
    out.Set("has_correction_bias", c.has_correction_bias);
    out.Set("format", ffi::String(to_string(c.format)));
    out.Set("scheme", ffi::String(to_string(c.scheme)));
    out.Set("route", route);
    return out;
  });
}

ffi::Array<std::int64_t> checkpoint_moe_layers(const CheckpointRef& checkpoint) {
  return guarded([&] {
    ffi::Array<std::int64_t> out;
    for (const int index : (*checkpoint).moe_layers()) out.push_back(index);
    return out;
  });
}

OptionMap checkpoint_layer(const CheckpointRef& checkpoint, std::int64_t index, std::int64_t first_expert,
                           std::int64_t expert_count) {
  return guarded([&] {
    Checkpoint::Layer layer = (*checkpoint).layer(static_cast<int>(index), first_expert, expert_count);
    OptionMap out;
    out.Set("experts", MoeWeightsRef(std::move(layer.experts)));
    if (layer.shared_expert) out.Set("shared_expert", MoeWeightsRef(std::move(*layer.shared_expert)));
    if (layer.shared_gate.defined()) out.Set("shared_gate", to_ffi(layer.shared_gate).value());
    if (layer.router.defined()) out.Set("router", to_ffi(layer.router).value());
    if (layer.correction_bias.defined()) out.Set("correction_bias", to_ffi(layer.correction_bias).value());
    return out;
  });
}

// `options`: max_shard_bytes, threads, overwrite, progress (a function of done bytes, total bytes, tensor name).
void run_quantize_checkpoint(const ffi::String& in, const ffi::String& out, const ffi::String& scheme,
                             const OptionMap& options) {
  guarded([&] {
    const Options o(options);
    QuantizeCheckpointOptions q;
    q.max_shard_bytes = o.get<std::int64_t>("max_shard_bytes", q.max_shard_bytes);
    q.threads = static_cast<int>(o.get<std::int64_t>("threads", 0));
    q.overwrite = o.get<bool>("overwrite", false);
    if (o.has("progress")) {
      const auto progress = o.get<ffi::Optional<ffi::Function>>("progress", std::nullopt).value();
      q.progress = [progress](const QuantizeProgress& p) { progress(p.done, p.total, ffi::String(p.current)); };
    }
    quantize_checkpoint(std::string(in), std::string(out), Scheme::parse(scheme), q);
  });
}

void add_cuda_library_paths(const ffi::Array<ffi::String>& paths) {
  guarded([&] {
    std::vector<std::string> folders;
    for (const ffi::String& path : paths) folders.emplace_back(path);
    cuda::add_python_paths(folders);
  });
}

ffi::String version() { return OCTOMOE_VERSION; }

ffi::Array<ffi::String> schemes() {
  return guarded([&] {
    ffi::Array<ffi::String> out;
    for (const Scheme& scheme : all_schemes()) out.push_back(to_string(scheme));
    return out;
  });
}

ffi::String canonical_scheme(const ffi::String& text) {
  return guarded([&] {
    const Scheme scheme = Scheme::parse(text);
    check(scheme);
    return ffi::String(to_string(scheme));
  });
}

}  // namespace
}  // namespace octomoe::python

TVM_FFI_DLL_EXPORT_TYPED_FUNC(open_checkpoint, octomoe::python::open_checkpoint)
TVM_FFI_DLL_EXPORT_TYPED_FUNC(checkpoint_config, octomoe::python::checkpoint_config)
TVM_FFI_DLL_EXPORT_TYPED_FUNC(checkpoint_moe_layers, octomoe::python::checkpoint_moe_layers)
TVM_FFI_DLL_EXPORT_TYPED_FUNC(checkpoint_layer, octomoe::python::checkpoint_layer)
TVM_FFI_DLL_EXPORT_TYPED_FUNC(quantize_checkpoint, octomoe::python::run_quantize_checkpoint)
TVM_FFI_DLL_EXPORT_TYPED_FUNC(add_cuda_library_paths, octomoe::python::add_cuda_library_paths)
TVM_FFI_DLL_EXPORT_TYPED_FUNC(version, octomoe::python::version)
TVM_FFI_DLL_EXPORT_TYPED_FUNC(schemes, octomoe::python::schemes)
TVM_FFI_DLL_EXPORT_TYPED_FUNC(canonical_scheme, octomoe::python::canonical_scheme)
