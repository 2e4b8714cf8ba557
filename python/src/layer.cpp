// MoeLayer and route.
#include <tvm/ffi/extra/c_env_api.h>

#include "objects.h"

namespace octomoe::python {
namespace {

MoeLayerRef make_layer(const ffi::String& device, const MoeWeightsRef& weights, const OptionMap& options) {
  return guarded([&] {
    const Options o(options);
    LayerOptions l;
    l.swiglu_alpha = static_cast<float>(o.get<double>("swiglu_alpha", l.swiglu_alpha));
    if (o.has("swiglu_limit")) l.swiglu_limit = static_cast<float>(o.get<double>("swiglu_limit", 0));
    l.router_weight_on_input = o.get<bool>("router_weight_on_input", false);
    if (o.has("shared_expert")) {
      l.shared_expert = *o.get<ffi::Optional<MoeWeightsRef>>("shared_expert", std::nullopt).value();
    }
    l.shared_gate = o.host("shared_gate");
    l.expert_map = o.host("expert_map");
    l.threads = static_cast<int>(o.get<std::int64_t>("threads", 0));
    l.fused_gather = o.get<bool>("fused_gather", true);
    l.fused_activation = o.get<bool>("fused_activation", true);
    l.fused_requantize = o.get<bool>("fused_requantize", true);
    if (o.has("family")) l.family = parse_kernel_family(o.get<ffi::String>("family", ffi::String("automatic")));
    if (o.has("combine_order")) {
      l.combine_order = parse_combine_order(o.get<ffi::String>("combine_order", ffi::String("slots")));
    }
    l.prepack = o.get<bool>("prepack", false);
    l.replays = static_cast<int>(o.get<std::int64_t>("replays", l.replays));
    l.keep_weights = o.get<bool>("keep_weights", false);
    return MoeLayerRef(MoeLayer(Device::parse(device), *weights, std::move(l)));
  });
}

void layer_forward(const MoeLayerRef& layer, const ffi::Tensor& x, const ffi::Tensor& topk_ids,
                   const ffi::Tensor& topk_weights, const ffi::Tensor& out, bool accumulate, bool check_ids,
                   const OptionalTensor& workspace, const ffi::Optional<std::int64_t>& stream) {
  guarded([&] {
    // One after the other: the first wrong argument is the one that is named.
    const TensorView x_view = view_of(x, "x"), ids = view_of(topk_ids, "topk_ids");
    const TensorView weights = view_of(topk_weights, "topk_weights"), out_view = view_of(out, "out");
    const ForwardOptions options{accumulate, check_ids, view_of(workspace, "workspace")};
    (*layer).forward(x_view, ids, weights, out_view, options, stream_of(stream, (*layer).device()));
  });
}

// layer_forward with a workspace from the allocator of the tensors' framework, as PyTorch's operator wants it: memory
// of its own for this call on the framework's current stream, in a graph's pool while one is captured.
void layer_forward_allocating(const MoeLayerRef& layer, const ffi::Tensor& x, const ffi::Tensor& topk_ids,
                              const ffi::Tensor& topk_weights, const ffi::Tensor& out) {
  guarded([&] {
    MoeLayer& l = *layer;
    const TensorView x_view = view_of(x, "x"), ids = view_of(topk_ids, "topk_ids");
    const TensorView weights = view_of(topk_weights, "topk_weights"), out_view = view_of(out, "out");
    const Stream stream = stream_of(std::nullopt, l.device());
    OptionalTensor workspace;
    if (x_view.rank() == 2 && ids.rank() == 2) {  // else forward() says what it expected
      const std::size_t bytes = l.workspace_bytes(x_view.dim(0), static_cast<int>(ids.dim(1)));
      const auto size = static_cast<std::int64_t>(bytes);
      workspace = ffi::Tensor::FromEnvAlloc(TVMFFIEnvTensorAlloc, ffi::ShapeView(&size, 1), DLDataType{kDLUInt, 8, 1},
                                            DLDevice{kDLCUDA, l.device().index});
    }
    l.forward(x_view, ids, weights, out_view, {.workspace = view_of(workspace, "workspace")}, stream);
  });
}

void layer_reserve(const MoeLayerRef& layer, std::int64_t max_tokens, std::int64_t top_k) {
  guarded([&] { (*layer).reserve(max_tokens, static_cast<int>(top_k)); });
}

std::int64_t layer_workspace_bytes(const MoeLayerRef& layer, std::int64_t tokens, std::int64_t top_k) {
  return guarded([&] { return static_cast<std::int64_t>((*layer).workspace_bytes(tokens, static_cast<int>(top_k))); });
}

OptionMap layer_info(const MoeLayerRef& layer) {
  return guarded([&] {
    const MoeLayer& l = *layer;
    OptionMap info;
    info.Set("experts", l.experts());
    info.Set("hidden", l.hidden());
    info.Set("intermediate", l.intermediate());
    info.Set("scheme", ffi::String(to_string(l.scheme())));
    info.Set("device", ffi::String(to_string(l.device())));
    info.Set("weight_bytes", static_cast<std::int64_t>(l.weight_bytes()));
    return info;
  });
}

template <class E>
E choice(const std::string& value, const char* name, std::initializer_list<std::pair<const char*, E>> choices) {
  std::string known;
  for (const auto& [text, result] : choices) {
    if (value == text) return result;
    known += (known.empty() ? "" : ", ") + std::string(text);
  }
  throw Error(ErrorCode::invalid_argument, std::string(name) + ": expected one of " + known + ", got '" + value + "'");
}

RouterRef make_router(const OptionMap& options) {
  return guarded([&] {
    const Options o(options);
    RouteOptions r;
    r.scoring = choice<Scoring>(o.text("scoring", "softmax"), "scoring",
                                {{"softmax", Scoring::softmax}, {"sigmoid", Scoring::sigmoid}});
    r.renormalize = choice<Renormalize>(
        o.text("renormalize", "divide"), "renormalize",
        {{"none", Renormalize::none}, {"divide", Renormalize::divide}, {"add_eps", Renormalize::add_eps}});
    r.renormalize_min = static_cast<float>(o.get<double>("renormalize_min", r.renormalize_min));
    r.scaling_factor = static_cast<float>(o.get<double>("scaling_factor", r.scaling_factor));
    r.groups = static_cast<int>(o.get<std::int64_t>("groups", r.groups));
    r.topk_groups = static_cast<int>(o.get<std::int64_t>("topk_groups", r.topk_groups));
    return RouterRef(r);
  });
}

void run_route(const RouterRef& router, const ffi::Tensor& logits, const OptionalTensor& bias,
               const ffi::Tensor& topk_weights, const ffi::Tensor& topk_ids,
               const ffi::Optional<std::int64_t>& stream) {
  guarded([&] {
    RouteOptions options = *router;
    options.correction_bias = view_of(bias, "correction_bias");
    const TensorView l = view_of(logits, "logits"), w = view_of(topk_weights, "topk_weights");
    route(l, w, view_of(topk_ids, "topk_ids"), options, stream_of(stream, l.device()));
  });
}

}  // namespace
}  // namespace octomoe::python

TVM_FFI_DLL_EXPORT_TYPED_FUNC(make_layer, octomoe::python::make_layer)
TVM_FFI_DLL_EXPORT_TYPED_FUNC(layer_forward, octomoe::python::layer_forward)
TVM_FFI_DLL_EXPORT_TYPED_FUNC(layer_forward_allocating, octomoe::python::layer_forward_allocating)
TVM_FFI_DLL_EXPORT_TYPED_FUNC(layer_reserve, octomoe::python::layer_reserve)
TVM_FFI_DLL_EXPORT_TYPED_FUNC(layer_workspace_bytes, octomoe::python::layer_workspace_bytes)
TVM_FFI_DLL_EXPORT_TYPED_FUNC(layer_info, octomoe::python::layer_info)
TVM_FFI_DLL_EXPORT_TYPED_FUNC(make_router, octomoe::python::make_router)
TVM_FFI_DLL_EXPORT_TYPED_FUNC(route, octomoe::python::run_route)
