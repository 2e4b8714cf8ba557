// MoeWeights and QuantizedMatrix: making them, looking into them.
#include <vector>

#include "objects.h"
#include "quant/matrix.h"

namespace octomoe::python {
namespace {

// Biases and static scales are read by the CPU: `kept` holds the copies of those on a GPU.
MoeWeights::Options weight_options(const Options& o, std::vector<Tensor>& kept) {
  const auto host = [&](const char* key) { return TensorView(kept.emplace_back(o.host(key))); };
  MoeWeights::Options w;
  w.activation = parse_activation(o.text("activation", "swiglu"));
  w.gate_up_order = parse_gate_up_order(o.text("gate_up_order", "gate_up"));
  w.b13 = host("b13");
  w.b2 = host("b2");
  w.x_scale = host("x_scale");
  w.act_scale = host("act_scale");
  w.threads = static_cast<int>(o.get<std::int64_t>("threads", 0));
  return w;
}

MoeWeightsRef quantize_weights(const ffi::String& scheme, const ffi::Tensor& w13, const ffi::Tensor& w2,
                               const OptionMap& options) {
  return guarded([&] {
    const Scheme parsed = Scheme::parse(scheme);
    const Tensor first = on_host(w13, "w13"), second = on_host(w2, "w2");
    std::vector<Tensor> kept;
    return MoeWeightsRef(quantize(parsed, first, second, weight_options(Options(options), kept)));
  });
}

MoeWeightsRef weights_from_integers(const ffi::String& scheme_name, const ffi::Tensor& w13,
                                    const ffi::Tensor& w13_scale, const ffi::Tensor& w2, const ffi::Tensor& w2_scale,
                                    const OptionMap& options) {
  return guarded([&] {
    const Scheme scheme = Scheme::parse(scheme_name);
    const Options named(options);
    std::vector<Tensor> kept;
    const MoeWeights::Options o = weight_options(named, kept);
    const bool int4 = scheme.kind == SchemeKind::w4a8_fp8;
    Tensor first = int4 ? adopt_int4x2(w13, "w13") : adopt(w13, "w13");
    const Tensor s13 = on_host(w13_scale, "w13_scale");
    Tensor second = int4 ? adopt_int4x2(w2, "w2") : adopt(w2, "w2");
    const Tensor s2 = on_host(w2_scale, "w2_scale");
    switch (scheme.kind) {
      case SchemeKind::int8_channel:
        return MoeWeightsRef(MoeWeights::from_int8_channel(std::move(first), s13, std::move(second), s2, o, scheme));
      case SchemeKind::int8_block:
        return MoeWeightsRef(MoeWeights::from_int8_block(std::move(first), s13, std::move(second), s2, o, scheme));
      case SchemeKind::w4a8_fp8:
        return MoeWeightsRef(MoeWeights::from_w4a8_fp8(std::move(first), s13, std::move(second), s2, o, scheme));
      case SchemeKind::int8_hybrid:
        return MoeWeightsRef(MoeWeights::from_int8_hybrid(std::move(first), s13, named.host("w13_q"), std::move(second),
                                                          s2, named.host("w2_q"), o, scheme));
      default:
        throw Error(ErrorCode::invalid_argument,
                    "scheme: " + to_string(scheme) + " has no constructor from integers and float scales");
    }
  });
}

MoeWeightsRef weights_from_float(const ffi::Tensor& w13, const ffi::Tensor& w2, const OptionMap& options) {
  return guarded([&] {
    Tensor first = adopt(w13, "w13"), second = adopt(w2, "w2");
    std::vector<Tensor> kept;
    const MoeWeights::Options o = weight_options(Options(options), kept);
    return MoeWeightsRef(MoeWeights::from_float(std::move(first), std::move(second), o));
  });
}

MoeWeightsRef weights_with_activation(const MoeWeightsRef& weights, const ffi::String& name) {
  return guarded([&] {
    MoeWeights copy = *weights;  // shares the tensors
    const Activation activation = parse_activation(name);
    if (is_gated(activation) != is_gated(copy.activation)) {
      throw Error(ErrorCode::invalid_argument, std::string("activation: ") + to_string(activation) +
                                                   " does not fit weights made for " + to_string(copy.activation) +
                                                   " (one is gated, the other is not)");
    }
    copy.activation = activation;
    return MoeWeightsRef(std::move(copy));
  });
}

OptionMap weights_info(const MoeWeightsRef& weights) {
  return guarded([&] {
    const MoeWeights& w = *weights;
    OptionMap info;
    info.Set("scheme", ffi::String(to_string(w.scheme)));
    info.Set("activation", ffi::String(to_string(w.activation)));
    info.Set("gate_up_order", ffi::String(to_string(w.gate_up_order)));
    info.Set("experts", w.experts());
    info.Set("hidden", w.hidden());
    info.Set("intermediate", w.intermediate());
    info.Set("bytes", static_cast<std::int64_t>(w.bytes()));
    return info;
  });
}

OptionMap matrix_tensors(const QuantizedMatrix& m) {
  OptionMap out;
  const auto add = [&](const char* name, const Tensor& t) {
    if (t.defined()) out.Set(name, to_ffi(t).value());
  };
  add("values", m.values);
  add("scale", m.scale);
  add("q", m.q);
  add("column_sum", m.column_sum);
  add("activation_scale", m.activation_scale);
  return out;
}

OptionMap weights_tensors(const MoeWeightsRef& weights) {
  return guarded([&] {
    const MoeWeights& w = *weights;
    OptionMap out;
    out.Set("w13", matrix_tensors(w.w13));
    out.Set("w2", matrix_tensors(w.w2));
    if (w.b13.defined()) out.Set("b13", to_ffi(w.b13).value());
    if (w.b2.defined()) out.Set("b2", to_ffi(w.b2).value());
    return out;
  });
}

ffi::Array<ffi::Tensor> weights_dequantize(const MoeWeightsRef& weights, std::int64_t threads) {
  return guarded([&] {
    const int n = static_cast<int>(threads);
    return ffi::Array<ffi::Tensor>{to_ffi(dequantize((*weights).w13, n)).value(),
                                   to_ffi(dequantize((*weights).w2, n)).value()};
  });
}

QuantizedMatrixRef quantize_one_matrix(const ffi::String& scheme, const ffi::Tensor& w, std::int64_t segments,
                                       std::int64_t threads) {
  return guarded([&] {
    return QuantizedMatrixRef(
        quantize_matrix(Scheme::parse(scheme), on_host(w, "w"), static_cast<int>(segments), static_cast<int>(threads)));
  });
}

// `parts`: scale, q (hybrid), activation_scale (static), segments, threads.
QuantizedMatrixRef matrix_from_parts(const ffi::String& scheme, const ffi::Tensor& values, const OptionMap& parts) {
  return guarded([&] {
    const Options o(parts);
    const Scheme parsed = Scheme::parse(scheme);
    Tensor owned = parsed.kind == SchemeKind::w4a8_fp8 ? adopt_int4x2(values, "values") : adopt(values, "values");
    QuantizedMatrix m = adopt_matrix(parsed, std::move(owned), o.host("scale"), o.host("q"),
                                     static_cast<int>(o.get<std::int64_t>("segments", 1)), "values",
                                     static_cast<int>(o.get<std::int64_t>("threads", 0)));
    m.activation_scale = o.host("activation_scale");
    return QuantizedMatrixRef(std::move(m));
  });
}

OptionMap describe(const QuantizedMatrix& m) {
  OptionMap info;
  info.Set("scheme", ffi::String(to_string(m.scheme)));
  info.Set("experts", m.experts);
  info.Set("n", m.n);
  info.Set("k", m.k);
  info.Set("segments", static_cast<std::int64_t>(m.segments));
  info.Set("bytes", static_cast<std::int64_t>(m.bytes()));
  info.Set("flush_blocks", static_cast<std::int64_t>(m.flush_blocks));
  return info;
}

OptionMap matrix_info(const QuantizedMatrixRef& matrix) {
  return guarded([&] { return describe(*matrix); });
}

OptionMap matrix_parts(const QuantizedMatrixRef& matrix) {
  return guarded([&] { return matrix_tensors(*matrix); });
}

ffi::Tensor matrix_dequantize(const QuantizedMatrixRef& matrix, std::int64_t threads) {
  return guarded([&] { return to_ffi(dequantize(*matrix, static_cast<int>(threads))).value(); });
}

PreparedMatrixRef prepare_matrix(const ffi::String& device, const QuantizedMatrixRef& matrix, std::int64_t threads,
                                 const ffi::String& family, bool prepack) {
  return guarded([&] {
    OptionMap info = describe(*matrix);
    info.Set("device", ffi::String(to_string(Device::parse(device))));
    return PreparedMatrixRef(Prepared{
        PreparedMatrix(Device::parse(device), *matrix, static_cast<int>(threads), parse_kernel_family(family), prepack),
        std::move(info)});
  });
}

OptionMap prepared_info(const PreparedMatrixRef& matrix) { return (*matrix).info; }

std::int64_t prepared_workspace_bytes(const PreparedMatrixRef& matrix, std::int64_t rows) {
  return guarded([&] { return static_cast<std::int64_t>((*matrix).matrix.workspace_bytes(rows)); });
}

// `extras`: a_scale, a_q, a_zero (quantised activations), bias, workspace.
void run_grouped_gemm(const ffi::Tensor& a, const PreparedMatrixRef& b, const ffi::Tensor& out,
                      const ffi::Tensor& index, bool masked, const ffi::Optional<OptionMap>& extras,
                      const ffi::Optional<std::int64_t>& stream) {
  guarded([&] {
    const Options o(extras);
    // Braces evaluate in order: the first wrong argument is the one that is named.
    const Activations activations{view_of(a, "a"), o.view("a_scale"), o.view("a_q"), o.view("a_zero")};
    const TensorView rows = view_of(index, masked ? "rows_per_expert" : "expert_offsets");
    const TensorView d = view_of(out, "out");
    grouped_gemm(activations, (*b).matrix, d, masked ? Groups::masked(rows) : Groups::offsets(rows),
                 GemmOptions{o.view("bias"), o.view("workspace")}, stream_of(stream, d.device()));
  });
}

}  // namespace
}  // namespace octomoe::python

TVM_FFI_DLL_EXPORT_TYPED_FUNC(quantize, octomoe::python::quantize_weights)
TVM_FFI_DLL_EXPORT_TYPED_FUNC(weights_from_integers, octomoe::python::weights_from_integers)
TVM_FFI_DLL_EXPORT_TYPED_FUNC(weights_from_float, octomoe::python::weights_from_float)
TVM_FFI_DLL_EXPORT_TYPED_FUNC(weights_with_activation, octomoe::python::weights_with_activation)
TVM_FFI_DLL_EXPORT_TYPED_FUNC(weights_info, octomoe::python::weights_info)
TVM_FFI_DLL_EXPORT_TYPED_FUNC(weights_tensors, octomoe::python::weights_tensors)
TVM_FFI_DLL_EXPORT_TYPED_FUNC(weights_dequantize, octomoe::python::weights_dequantize)
TVM_FFI_DLL_EXPORT_TYPED_FUNC(quantize_matrix, octomoe::python::quantize_one_matrix)
TVM_FFI_DLL_EXPORT_TYPED_FUNC(matrix_from_parts, octomoe::python::matrix_from_parts)
TVM_FFI_DLL_EXPORT_TYPED_FUNC(matrix_info, octomoe::python::matrix_info)
TVM_FFI_DLL_EXPORT_TYPED_FUNC(matrix_parts, octomoe::python::matrix_parts)
TVM_FFI_DLL_EXPORT_TYPED_FUNC(matrix_dequantize, octomoe::python::matrix_dequantize)
TVM_FFI_DLL_EXPORT_TYPED_FUNC(prepare_matrix, octomoe::python::prepare_matrix)
TVM_FFI_DLL_EXPORT_TYPED_FUNC(prepared_info, octomoe::python::prepared_info)
TVM_FFI_DLL_EXPORT_TYPED_FUNC(prepared_workspace_bytes, octomoe::python::prepared_workspace_bytes)
TVM_FFI_DLL_EXPORT_TYPED_FUNC(grouped_gemm, octomoe::python::run_grouped_gemm)
