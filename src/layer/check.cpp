#include "layer/check.h"

#include <cmath>

#include "quant/matrix.h"
#include "quant/numerics.h"
#include "tensor/check.h"

namespace octomoe {
namespace {

const std::initializer_list<DType> kFloats = {DType::float32, DType::float16, DType::bfloat16};

}  // namespace

void check_matrix(const QuantizedMatrix& m, const char* name, Device device) {
  check_defined(m.values, name);
  if (m.values.device() != Device::cpu() && m.values.device() != device) {
    bad_argument("{}.values: expected a tensor on {}, got one on {}", name,
                 device == Device::cpu() ? "cpu" : fmt::format("cpu or {}", to_string(device)),
                 to_string(m.values.device()));
  }
  const MatrixLayout l = layout_of(m.scheme, m.experts, m.n, m.k, m.segments);
  const auto part = [&](const Tensor& t, const char* what, const Shape& shape, DType dtype) {
    if (!t.defined() || t.shape() != shape || t.dtype() != dtype) {
      bad_argument("{}.{}: expected {} {}, got {}", name, what, to_string(dtype), to_string(shape),
                   t.defined() ? fmt::format("{} {}", to_string(t.dtype()), to_string(t.shape())) : "none");
    }
  };
  check_layout(m, name);
  if (const Shape want = values_shape(m); m.values.shape() != want) {
    bad_argument("{}.values: expected shape {}, got {}", name, to_string(want), to_string(m.values.shape()));
  }
  if (l.scale.rank() > 0) part(m.scale, "scale", l.scale, DType::float32);
  if (m.scheme.kind == SchemeKind::int8_hybrid) {
    part(m.q, "q", Shape{m.experts, l.blocks_n, l.blocks_k}, DType::uint8);
    if (m.flush_blocks < 1)
      bad_argument("{}.flush_blocks: expected at least 1 (finish_matrix sets it), got {}", name, m.flush_blocks);
  }
  if (m.scheme.asymmetric) part(m.column_sum, "column_sum", Shape{m.experts, m.n}, DType::int32);
}

namespace {

void check_weights(const MoeWeights& w, const char* what, Device device) {
  const auto name = [&](const char* part) { return fmt::format("{}{}", what, part); };
  check_matrix(w.w13, name("w13").c_str(), device);
  check_matrix(w.w2, name("w2").c_str(), device);
  const std::int64_t factor = is_gated(w.activation) ? 2 : 1;
  if (w.w13.experts != w.w2.experts || w.w13.n != factor * w.w2.k || w.w13.k != w.w2.n || w.w13.segments != factor) {
    bad_argument("{}: expected w2 [E, H, I] to fit w13 [E, {}, H] (activation {}), got w13 {}, w2 {}", name("weights"),
                 factor == 2 ? "2I" : "I", to_string(w.activation), to_string(Shape{w.w13.experts, w.w13.n, w.w13.k}),
                 to_string(Shape{w.w2.experts, w.w2.n, w.w2.k}));
  }
  if (w.b13.defined()) check_shape(w.b13, name("b13").c_str(), {w.w13.experts, w.w13.n});
  if (w.b2.defined()) check_shape(w.b2, name("b2").c_str(), {w.w2.experts, w.w2.n});
}

}  // namespace

void check_layer(Device device, const MoeWeights& w, const LayerOptions& o) {
  check_weights(w, "", device);
  if (!(o.swiglu_alpha == o.swiglu_alpha) || std::isinf(o.swiglu_alpha)) {
    bad_argument("swiglu_alpha: expected a finite number, got {}", o.swiglu_alpha);
  }
  if (o.swiglu_limit && !(*o.swiglu_limit > 0))
    bad_argument("swiglu_limit: expected a number above 0, got {}", *o.swiglu_limit);
  if (o.swiglu_limit && w.activation != Activation::swiglu && w.activation != Activation::swigluoai) {
    bad_argument("swiglu_limit: expected none with activation {}, got {}", to_string(w.activation), *o.swiglu_limit);
  }
  if (o.threads < 0 || o.threads > 1024) bad_argument("threads: expected 0..1024, got {}", o.threads);
  if (o.replays < 0 || o.replays > 64) bad_argument("replays: expected 0..64, got {}", o.replays);
  if (o.expert_map.defined()) {
    check_device(o.expert_map, "expert_map", Device::cpu());
    check_dtype(o.expert_map, "expert_map", {DType::int32});
    check_shape(o.expert_map, "expert_map", {-1});
    check_contiguous(o.expert_map, "expert_map");
    for (std::int64_t i = 0; i < o.expert_map.elems(); ++i) {
      const std::int32_t e = o.expert_map.as<std::int32_t>()[i];
      if (e < -1 || e >= w.experts()) {
        bad_argument("expert_map: expected -1 or a local expert below {}, got {} for expert {}", w.experts(), e, i);
      }
    }
  }
  if (o.shared_expert) {
    check_weights(*o.shared_expert, "shared_expert.", device);
    if (o.shared_expert->experts() != 1 || o.shared_expert->hidden() != w.hidden() ||
        o.shared_expert->scheme != w.scheme) {
      bad_argument("shared_expert: expected one expert of hidden size {} in {}, got {} of {} in {}", w.hidden(),
                   to_string(w.scheme), o.shared_expert->experts(), o.shared_expert->hidden(),
                   to_string(o.shared_expert->scheme));
    }
  }
  if (o.shared_gate.defined()) {
    if (!o.shared_expert) bad_argument("shared_gate: expected none without a shared_expert, got one");
    check_device(o.shared_gate, "shared_gate", Device::cpu());
    check_dtype(o.shared_gate, "shared_gate", kFloats);
    check_shape(o.shared_gate, "shared_gate", {w.hidden()});
    check_contiguous(o.shared_gate, "shared_gate");
  }
}

namespace {

void check_ids(const TensorView& ids, std::int64_t limit) {
  for (std::int64_t t = 0; t < ids.dim(0); ++t) {
    for (std::int64_t j = 0; j < ids.dim(1); ++j) {
      const std::int64_t offset = t * ids.strides()[0] + j * ids.strides()[1];
      const std::int64_t id =
          ids.dtype() == DType::int32 ? ids.as<std::int32_t>()[offset] : ids.as<std::int64_t>()[offset];
      if (id < -1 || id >= limit) {
        bad_argument("topk_ids: expected expert ids in -1..{}, got {} at token {}, slot {}", limit - 1, id, t, j);
      }
    }
  }
}

bool overlap(const TensorView& a, const TensorView& b) {
  if (a.elems() == 0 || b.elems() == 0) return false;
  const auto extent = [](const TensorView& t) {
    std::int64_t last = 0;
    for (int i = 0; i < t.rank(); ++i) last += (t.dim(i) - 1) * t.strides()[i];
    return (last + 1) * static_cast<std::int64_t>(size_bytes(t.dtype()));
  };
  return a.as<char>() < b.as<char>() + extent(b) && b.as<char>() < a.as<char>() + extent(a);
}

void check_no_overlap(const TensorView& out, const char* out_name, const TensorView& in, const char* in_name) {
  if (overlap(out, in)) bad_argument("{}: expected memory apart from {}, got overlapping tensors", out_name, in_name);
}

}  // namespace

void check_forward(const LayerShape& layer, const ForwardArgs& a) {
  check_defined(a.x, "x");
  check_defined(a.topk_ids, "topk_ids");
  check_defined(a.topk_weights, "topk_weights");
  check_defined(a.out, "out");
  check_shape(a.x, "x", {-1, layer.hidden});
  const std::int64_t tokens = a.x.dim(0);
  check_shape(a.topk_ids, "topk_ids", {tokens, -1});
  const std::int64_t top_k = a.topk_ids.dim(1);
  check_shape(a.topk_weights, "topk_weights", {tokens, top_k});
  check_shape(a.out, "out", {tokens, layer.hidden});
  if (top_k < 1 || top_k > layer.id_limit) {
    bad_argument("topk_ids: expected a top_k in 1..{} (the number of experts), got {}", layer.id_limit, top_k);
  }
  check_dtype(a.x, "x", kFloats);
  check_dtype(a.topk_ids, "topk_ids", {DType::int32, DType::int64});
  check_dtype(a.topk_weights, "topk_weights", {DType::float32});
  check_dtype(a.out, "out", kFloats);
  const std::pair<const TensorView*, const char*> all[] = {
      {&a.x, "x"}, {&a.topk_ids, "topk_ids"}, {&a.topk_weights, "topk_weights"}, {&a.out, "out"}};
  for (const auto& [tensor, name] : all) {
    check_device(*tensor, name, layer.device);
    check_rows(*tensor, name);
    check_aligned(*tensor, name);
  }
  if (a.out.dim(0) > 1 && a.out.strides()[0] < layer.hidden) {
    bad_argument("out: expected rows at least {} elements apart, got {}", layer.hidden, a.out.strides()[0]);
  }
  check_no_overlap(a.out, "out", a.x, "x");
  check_no_overlap(a.out, "out", a.topk_ids, "topk_ids");
  check_no_overlap(a.out, "out", a.topk_weights, "topk_weights");
  if (layer.device.type == DeviceType::cpu) {
    if (a.workspace.defined()) bad_argument("workspace: expected none on cpu, got one");
    check_ids(a.topk_ids, layer.id_limit);
  } else if (a.check_ids) {
    check_ids(Tensor::copy_of(a.topk_ids), layer.id_limit);
  }
}

namespace {

void check_scales(const TensorView& t, const char* name) {
  for (std::int64_t i = 0; i < t.elems(); ++i) {
    const float v = t.as<float>()[i];
    // NaN marks a row that held NaN (docs/schemes.md 1), so it passes.
    if (v < 0 || std::isinf(v))
      bad_argument("{}: expected scales that are finite and at least 0, got {} at element {}", name, v, i);
  }
}

void check_given_activations(const MatrixShape& m, const Activations& a, std::initializer_list<std::int64_t> rows,
                             bool host) {
  const Scheme& s = m.scheme;
  const auto shape = [&](std::int64_t columns) {
    std::vector<std::int64_t> d(rows);
    if (columns >= 0) d.push_back(columns);
    return Shape(std::span<const std::int64_t>(d));
  };
  const auto part = [&](const TensorView& t, const char* name, const Shape& want, DType dtype) {
    check_defined(t, name);
    check_device(t, name, m.device);
    check_dtype(t, name, {dtype});
    if (t.shape() != want) bad_argument("{}: expected shape {}, got {}", name, to_string(want), to_string(t.shape()));
    check_contiguous(t, name);
    check_aligned(t, name);
  };
  const MatrixLayout l = layout_of(s, m.experts, m.n, m.k, 1);
  const auto unwanted = [&](const TensorView& t, const char* name) {
    if (t.defined()) bad_argument("{}: expected none in scheme {}, got one", name, to_string(s));
  };
  if (s.kind == SchemeKind::int8_block)
    part(a.scale, "a.scale", shape(l.blocks_k), DType::float32);
  else if (s.kind == SchemeKind::int8_hybrid)
    part(a.scale, "a.scale", shape(l.super_groups), DType::float32);
  else if (s.activation_scale == ActivationScale::none)
    unwanted(a.scale, "a.scale");
  else if (s.activation_scale == ActivationScale::static_)
    part(a.scale, "a.scale", Shape{s.is_integer() ? 1 : m.experts}, DType::float32);
  else
    part(a.scale, "a.scale", shape(-1), DType::float32);
  if (host && a.scale.defined()) check_scales(a.scale, "a.scale");
  if (s.kind == SchemeKind::int8_hybrid) {
    part(a.q, "a.q", shape(l.blocks_k), DType::uint8);
    for (std::int64_t i = 0; host && i < a.q.elems(); ++i) {
      const int q = a.q.as<std::uint8_t>()[i];
      if (q < 1 || q > s.q_max)
        bad_argument("a.q: expected integer scales in 1..{}, got {} at element {}", s.q_max, q, i);
    }
  } else {
    unwanted(a.q, "a.q");
  }
  if (s.asymmetric) {
    part(a.zero, "a.zero", shape(-1), DType::int32);
    for (std::int64_t i = 0; host && i < a.zero.elems(); ++i) {
      const std::int32_t z = a.zero.as<std::int32_t>()[i];
      if (z < -128 || z > 127) bad_argument("a.zero: expected zero points in -128..127, got {} at row {}", z, i);
    }
  } else {
    unwanted(a.zero, "a.zero");
  }
}

std::int64_t index_at(const TensorView& t, std::int64_t i) {
  return t.dtype() == DType::int32 ? t.as<std::int32_t>()[i] : t.as<std::int64_t>()[i];
}

}  // namespace

void check_gemm(const MatrixShape& m, const GemmArgs& g) {
  const bool masked = g.groups.layout == Groups::Layout::masked;
  const bool host = m.device.type == DeviceType::cpu;
  const char* index_name = masked ? "rows_per_expert" : "expert_offsets";
  const TensorView& index = g.groups.index;
  const Activations& a = g.a;
  check_defined(a.values, "a");
  check_defined(g.d, "d");
  check_defined(index, index_name);
  for (const auto& [tensor, name] : {std::pair{&a.values, "a"}, std::pair{&g.d, "d"}, std::pair{&index, index_name}}) {
    check_device(*tensor, name, m.device);
    check_rows(*tensor, name);
    check_aligned(*tensor, name);
  }
  check_dtype(index, index_name, {DType::int32, DType::int64});
  check_shape(index, index_name, {masked ? m.experts : m.experts + 1});
  check_contiguous(index, index_name);
  check_dtype(g.d, "d", kFloats);
  std::int64_t rows = 0;
  if (masked) {
    check_shape(a.values, "a", {m.experts, -1, m.k});
    rows = a.values.dim(1);
    check_shape(g.d, "d", {m.experts, rows, m.n});
  } else {
    check_shape(a.values, "a", {-1, m.k});
    rows = a.values.dim(0);
    check_shape(g.d, "d", {rows, m.n});
  }
  const bool given = m.scheme.is_integer()                   ? a.values.dtype() == DType::int8
                     : m.scheme.kind == SchemeKind::w4a8_fp8 ? a.values.dtype() == DType::float8_e4m3
                                                             : false;
  if (given) {
    if (masked)
      check_given_activations(m, a, {m.experts, rows}, host);
    else
      check_given_activations(m, a, {rows}, host);
  } else {
    switch (m.scheme.kind) {
      case SchemeKind::bf16:
      case SchemeKind::fp16:
        check_dtype(a.values, "a", kFloats);
        break;
      case SchemeKind::w4a8_fp8:
        check_dtype(a.values, "a", {DType::float8_e4m3, DType::float32, DType::float16, DType::bfloat16});
        break;
      default:
        check_dtype(a.values, "a", {DType::int8, DType::float32, DType::float16, DType::bfloat16});
        break;
    }
    for (const auto& [tensor, name] :
         {std::pair{&a.scale, "a.scale"}, std::pair{&a.q, "a.q"}, std::pair{&a.zero, "a.zero"}}) {
      if (tensor->defined()) bad_argument("{}: expected none with floating-point activations, got one", name);
    }
    if (m.scheme.activation_scale == ActivationScale::static_ && !m.has_static_scale) {
      bad_argument("b.activation_scale: expected a static scale for floating-point activations in {}, got none",
                   to_string(m.scheme));
    }
  }
  if (g.bias.defined()) {
    check_device(g.bias, "bias", m.device);
    check_dtype(g.bias, "bias", {DType::float32});
    check_shape(g.bias, "bias", {m.experts, m.n});
    check_contiguous(g.bias, "bias");
    check_aligned(g.bias, "bias");
  }
  check_no_overlap(g.d, "d", a.values, "a");
  if (!host) return;
  if (g.workspace.defined()) bad_argument("workspace: expected none on cpu, got one");
  for (std::int64_t e = 0; masked && e < m.experts; ++e) {
    const std::int64_t count = index_at(index, e);
    if (count < 0 || count > rows)
      bad_argument("rows_per_expert: expected counts in 0..{}, got {} for expert {}", rows, count, e);
  }
  if (masked) return;
  if (index_at(index, 0) != 0) bad_argument("expert_offsets: expected 0 first, got {}", index_at(index, 0));
  for (std::int64_t e = 0; e < m.experts; ++e) {
    if (index_at(index, e + 1) < index_at(index, e)) {
      bad_argument("expert_offsets: expected values that do not decrease, got {} after {} at {}",
                   index_at(index, e + 1), index_at(index, e), e + 1);
    }
  }
  if (index_at(index, m.experts) != rows) {
    bad_argument("expert_offsets: expected {} (the rows of a) last, got {}", rows, index_at(index, m.experts));
  }
}

void check_route(const TensorView& logits, const TensorView& topk_weights, const TensorView& topk_ids,
                 const RouteOptions& o) {
  check_defined(logits, "logits");
  check_defined(topk_weights, "topk_weights");
  check_defined(topk_ids, "topk_ids");
  check_shape(logits, "logits", {-1, -1});
  const std::int64_t tokens = logits.dim(0), experts = logits.dim(1);
  check_shape(topk_ids, "topk_ids", {tokens, -1});
  check_shape(topk_weights, "topk_weights", {tokens, topk_ids.dim(1)});
  check_dtype(logits, "logits", kFloats);
  check_dtype(topk_weights, "topk_weights", {DType::float32});
  check_dtype(topk_ids, "topk_ids", {DType::int32});
  for (const auto& [tensor, name] :
       {std::pair{&logits, "logits"}, std::pair{&topk_weights, "topk_weights"}, std::pair{&topk_ids, "topk_ids"}}) {
    check_device(*tensor, name, logits.device());
    check_rows(*tensor, name);
    check_aligned(*tensor, name);
  }
  const std::int64_t k = topk_ids.dim(1);
  if (experts < 1) bad_argument("logits: expected at least one expert, got {}", to_string(logits.shape()));
  if (k < 1 || k > experts)
    bad_argument("topk_ids: expected a top_k in 1..{} (the number of experts), got {}", experts, k);
  if (o.groups < 1 || experts % o.groups != 0)
    bad_argument("groups: expected a divisor of {} experts, got {}", experts, o.groups);
  if (o.topk_groups < 1 || o.topk_groups > o.groups)
    bad_argument("topk_groups: expected 1..{}, got {}", o.groups, o.topk_groups);
  if (o.groups > 1 && experts / o.groups * o.topk_groups < k) {
    bad_argument("topk_groups: expected groups with at least top_k = {} experts in all, got {} of {}", k, o.topk_groups,
                 experts / o.groups);
  }
  if (!(o.renormalize_min >= 0) || std::isinf(o.renormalize_min))
    bad_argument("renormalize_min: expected a finite number of at least 0, got {}", o.renormalize_min);
  if (!std::isfinite(o.scaling_factor))
    bad_argument("scaling_factor: expected a finite number, got {}", o.scaling_factor);
  if (o.correction_bias.defined()) {
    check_device(o.correction_bias, "correction_bias", logits.device());
    check_dtype(o.correction_bias, "correction_bias", {DType::float32});
    check_shape(o.correction_bias, "correction_bias", {experts});
    check_contiguous(o.correction_bias, "correction_bias");
  }
  check_no_overlap(topk_weights, "topk_weights", logits, "logits");
  check_no_overlap(topk_ids, "topk_ids", logits, "logits");
  check_no_overlap(topk_ids, "topk_ids", topk_weights, "topk_weights");
}

}  // namespace octomoe
