#include "checkpoint/expert_reader.h"

#include <algorithm>
#include <utility>

#include "checkpoint/expert_values.h"
#include "checkpoint/json_read.h"
#include "checkpoint/safetensors_format.h"
#include "cpu/ops.h"
#include "quant/matrix.h"
#include "tensor/check.h"

namespace octomoe::checkpoint {
namespace {

using Shapes = std::vector<std::vector<std::int64_t>>;
const std::vector<std::string> kFloats = {"F32", "F16", "BF16"};

enum class Storage {
  floating,       // .weight F32/F16/BF16 [N, K]
  fp8_block,      // .weight F8_E4M3 [N, K], .weight_scale_inv [N/128, K/128]
  int8,           // .weight I8 [N, K] and scales
  int4_bytes,     // .weight I8/U8 [N, K/2], two values a byte, the even one low
  int4_unpacked,  // .weight I8 [N, K], one value a byte
  int4_words,     // .weight_packed I32 [N, ceil(K/8)]; .weight_shape [2]
};

// A failure of MoeWeights is a fault of the file: say which stack.
template <class Fn>
MoeWeights adopt(const std::string& what, const Fn& make) {
  try {
    return make();
  } catch (const Error& e) {
    fail(e.code() == ErrorCode::invalid_argument ? ErrorCode::format : e.code(), "{}: {}", what, e.what());
  }
}

class MlpReader {
 public:
  MlpReader(const TensorStore& store, const ModelConfig& config, const MlpNames& names, const MlpSizes& sizes,
            const std::string& what)
      : store_(store), config_(config), scheme_(config.scheme), what_(what) {
    w13_ = {{}, 2, sizes.intermediate, sizes.hidden};
    w2_ = {{}, 1, sizes.hidden, sizes.intermediate};
    for (const std::string& prefix : names.prefixes) {
      w13_.names.push_back(prefix + names.gate);
      w13_.names.push_back(prefix + names.up);
      w2_.names.push_back(prefix + names.down);
    }
    storage_ = find_storage();
    quantized_ = storage_ != Storage::floating && storage_ != Storage::fp8_block;
    hybrid_ = quantized_ && scheme_.kind == SchemeKind::int8_hybrid;
    static_ = quantized_ && scheme_.activation_scale == ActivationScale::static_;
  }

  MoeWeights read() const {
    check_present();
    check_parts(w13_);
    check_parts(w2_);
    MoeWeights::Options options;
    options.activation = config_.activation;
    return adopt(what_, [&] { return quantized_ ? read_quantized(options) : read_float(options); });
  }

 private:
  // compressed-tensors and w8a8_int8 say weight_scale, DeepSeek's heirs weight_scale_inv; one multiplies by both.
  const char* scale_suffix() const {
    const bool inv = storage_ == Storage::fp8_block || config_.format == QuantFormat::block_int8 ||
                     config_.format == QuantFormat::w4afp8;
    return inv ? ".weight_scale_inv" : ".weight_scale";
  }

  Storage find_storage() const {
    const std::string& first = w13_.names.front();
    const SafetensorsFile::Info* weight = store_.find(first + ".weight");
    const bool scaled = store_.has(first + ".weight_scale") || store_.has(first + ".weight_scale_inv");
    if (weight && weight->dtype_name == "F8_E4M3" && scaled) return Storage::fp8_block;
    if (weight && is_float_dtype(weight->dtype_name) && !scaled) return Storage::floating;
    if (scheme_.kind == SchemeKind::w4a8_fp8) {
      if (!weight && store_.has(first + ".weight_packed")) return Storage::int4_words;
      const bool full = weight && weight->shape.size() == 2 && weight->shape[1] == w13_.k;
      return full ? Storage::int4_unpacked : Storage::int4_bytes;
    }
    return scheme_.is_integer() ? Storage::int8 : Storage::floating;
  }

  // ---- checks: all of them come before anything is allocated ----

  void check_present() const {
    std::vector<std::string> suffixes = {storage_ == Storage::int4_words ? ".weight_packed" : ".weight"};
    if (storage_ != Storage::floating) suffixes.emplace_back(scale_suffix());
    if (hybrid_) suffixes.emplace_back(".weight_scale_q");
    if (static_) suffixes.emplace_back(".input_scale");
    std::vector<std::string> wanted;
    for (const Parts* p : {&w13_, &w2_}) {
      for (const std::string& name : p->names) {
        for (const std::string& suffix : suffixes) wanted.push_back(name + suffix);
      }
    }
    expect_present(store_, wanted, what_);
  }

  MatrixLayout part_layout(const Parts& p) const { return layout_of(scheme_, 1, p.n, p.k, 1); }

  Shapes scale_shapes(const Parts& p) const {
    if (storage_ == Storage::fp8_block) return {{ceil_div(p.n, kFp8Block), ceil_div(p.k, kFp8Block)}};
    if (scheme_.per_tensor) return {{1}, {}};
    const Shape scale = part_layout(p).scale;  // [1, ...]
    const std::vector<std::int64_t> shape(scale.dims().begin() + 1, scale.dims().end());
    const bool column = !scheme_.has_blocks() && (shape.size() == 1 || shape[1] == 1);
    return column ? Shapes{{shape[0], 1}, {shape[0]}} : Shapes{shape};
  }

  void check_parts(const Parts& p) const {
    for (const std::string& name : p.names) {
      const std::string weight = name + ".weight";
      switch (storage_) {
        case Storage::floating:  // all of one type
          expect_tensor(store_, weight, kFloats, {{p.n, p.k}});
          expect_tensor(store_, weight, {store_.find(w13_.names.front() + ".weight")->dtype_name}, {{p.n, p.k}});
          break;
        case Storage::fp8_block:
          expect_tensor(store_, weight, {"F8_E4M3"}, {{p.n, p.k}});
          break;
        case Storage::int8:
        case Storage::int4_unpacked:
          expect_tensor(store_, weight, {"I8"}, {{p.n, p.k}});
          break;
        case Storage::int4_bytes:
          expect_tensor(store_, weight, {"I8", "U8"}, {{p.n, p.k / 2}});
          break;
        case Storage::int4_words:
          expect_tensor(store_, name + ".weight_packed", {"I32"}, {{p.n, ceil_div(p.k, 8)}});
          check_weight_shape(name + ".weight_shape", p);
          break;
      }
      if (storage_ != Storage::floating) expect_tensor(store_, name + scale_suffix(), kFloats, scale_shapes(p));
      if (hybrid_) {
        const MatrixLayout layout = part_layout(p);
        expect_tensor(store_, name + ".weight_scale_q", {"U8"}, {{layout.blocks_n, layout.blocks_k}});
      }
      if (static_) expect_tensor(store_, name + ".input_scale", kFloats, {{1}, {}});
    }
  }

  void check_weight_shape(const std::string& name, const Parts& p) const {
    if (!store_.has(name)) return;
    expect_tensor(store_, name, {"I64", "I32"}, {{2}});
    const Tensor t = store_.tensor(name);
    const auto at = [&](int i) -> std::int64_t {
      return t.dtype() == DType::int64 ? t.as<std::int64_t>()[i] : t.as<std::int32_t>()[i];
    };
    if (at(0) != p.n || at(1) != p.k) {
      fail(ErrorCode::format, "{}: expected [{}, {}], got [{}, {}]", store_.describe(name), p.n, p.k, at(0), at(1));
    }
  }

  // ---- reading ----

  Tensor values(const Parts& p) const {
    switch (storage_) {
      case Storage::int4_bytes:
        return stack_bytes(store_, p, ".weight", DType::int4x2, p.n, p.k / 2);
      case Storage::int4_unpacked:
        return pack_int4(store_, p);
      case Storage::int4_words:
        return unpack_int4_words(store_, p);
      default:
        return stack_bytes(store_, p, ".weight", DType::int8, p.n, p.k);
    }
  }

  // `reduce` of the float that every part has, per expert.
  template <class Fn>
  Tensor per_expert(const Parts& p, const std::string& suffix, const Fn& reduce) const {
    const Tensor all = stack_float32(store_, p, suffix, {p.experts() * p.segments});
    Tensor out = Tensor::empty(DType::float32, {p.experts()});
    for (std::int64_t e = 0; e < p.experts(); ++e) {
      const float* v = all.as<float>() + e * p.segments;
      out.as<float>()[e] = reduce(e, v[0], v[p.segments - 1]);
    }
    return out;
  }

  Tensor scale(const Parts& p) const {
    if (scheme_.per_tensor) {
      return per_expert(p, scale_suffix(), [&](std::int64_t e, float first, float last) {
        if (first != last) {
          fail(ErrorCode::unsupported, "expert {}: expected one per-tensor scale for gate and up, got {} and {}", e,
               first, last);
        }
        return first;
      });
    }
    const auto segments = static_cast<int>(p.segments);
    const MatrixLayout layout = layout_of(scheme_, p.experts(), p.segments * p.n, p.k, segments);
    return stack_float32(store_, p, scale_suffix(), layout.scale);
  }

  Tensor integer_scale(const Parts& p) const {
    if (!hybrid_) return {};
    const MatrixLayout layout = part_layout(p);
    return stack_bytes(store_, p, ".weight_scale_q", DType::uint8, layout.blocks_n, layout.blocks_k);
  }

  Tensor input_scale(const Parts& p) const {
    if (!static_) return {};
    const Tensor each =
        per_expert(p, ".input_scale", [](std::int64_t, float first, float last) { return std::max(first, last); });
    if (scheme_.kind != SchemeKind::int8_channel) return each;
    // One scale for all experts: x is quantised once.
    Tensor one = Tensor::empty(DType::float32, {1});
    *one.as<float>() = *std::max_element(each.as<float>(), each.as<float>() + each.elems());
    return one;
  }

  MoeWeights read_quantized(MoeWeights::Options& options) const {
    const Tensor x_scale = input_scale(w13_), act_scale = input_scale(w2_);
    options.x_scale = x_scale;
    options.act_scale = act_scale;
    const Tensor w13 = values(w13_), w13_scale = scale(w13_), w13_q = integer_scale(w13_);
    const Tensor w2 = values(w2_), w2_scale = scale(w2_), w2_q = integer_scale(w2_);
    switch (scheme_.kind) {
      case SchemeKind::int8_channel:
        return MoeWeights::from_int8_channel(w13, w13_scale, w2, w2_scale, options, scheme_);
      case SchemeKind::int8_block:
        return MoeWeights::from_int8_block(w13, w13_scale, w2, w2_scale, options, scheme_);
      case SchemeKind::int8_hybrid:
        return MoeWeights::from_int8_hybrid(w13, w13_scale, w13_q, w2, w2_scale, w2_q, options, scheme_);
      case SchemeKind::w4a8_fp8:
        return MoeWeights::from_w4a8_fp8(w13, w13_scale, w2, w2_scale, options, scheme_);
      case SchemeKind::bf16:
      case SchemeKind::fp16:
        break;
    }
    fail(ErrorCode::internal, "no quantised reader for {}", to_string(scheme_));
  }

  MoeWeights read_float(const MoeWeights::Options& options) const {
    if (storage_ == Storage::fp8_block) {
      return MoeWeights::from_float(dequantize_fp8_blocks(store_, w13_), dequantize_fp8_blocks(store_, w2_), options);
    }
    const DType dtype = *store_.find(w13_.names.front() + ".weight")->dtype;
    Tensor w13 = stack_bytes(store_, w13_, ".weight", dtype, w13_.n, w13_.k);
    Tensor w2 = stack_bytes(store_, w2_, ".weight", dtype, w2_.n, w2_.k);
    if (dtype == DType::float32) return quantize(Scheme::bf16(), w13, w2, options);
    return MoeWeights::from_float(std::move(w13), std::move(w2), options);
  }

  const TensorStore& store_;
  const ModelConfig& config_;
  const Scheme& scheme_;
  const std::string& what_;
  Parts w13_, w2_;
  Storage storage_;
  bool quantized_, hybrid_, static_;
};

}  // namespace

bool is_float_dtype(const std::string& dtype_name) {
  return std::find(kFloats.begin(), kFloats.end(), dtype_name) != kFloats.end();
}

void expect_tensor(const TensorStore& store, const std::string& name, const std::vector<std::string>& dtypes,
                   const std::vector<std::vector<std::int64_t>>& shapes) {
  const SafetensorsFile::Info* info = store.find(name);
  if (!info)
    fail(ErrorCode::format, "{}: expected a tensor {}, got none of that name", store.folder(), in_quotes(name));
  const bool good = std::find(dtypes.begin(), dtypes.end(), info->dtype_name) != dtypes.end() &&
                    std::find(shapes.begin(), shapes.end(), info->shape) != shapes.end();
  if (good) return;
  std::vector<std::string> texts;
  for (const auto& shape : shapes) texts.push_back(shape_text(shape));
  fail(ErrorCode::format, "{}: expected {} {}, got {} {}", store.describe(name), fmt::join(dtypes, " or "),
       fmt::join(texts, " or "), info->dtype_name, shape_text(info->shape));
}

void expect_present(const TensorStore& store, const std::vector<std::string>& names, const std::string& what) {
  constexpr std::size_t kNamed = 4;
  std::size_t count = 0;
  std::string first;
  for (const std::string& name : names) {
    if (store.has(name)) continue;
    if (count++ < kNamed) first += (first.empty() ? "" : ", ") + in_quotes(name);
  }
  if (count == 0) return;
  fail(ErrorCode::format, "{}: {} of {} tensors are missing: {}{}", what, count, names.size(), first,
       count > kNamed ? ", ..." : "");
}

Tensor read_float32(const TensorStore& store, const std::string& name, Shape shape) {
  const Tensor stored = store.tensor(name);
  Tensor out = Tensor::empty(DType::float32, shape);
  cpu::to_float(stored.view().data(), stored.dtype(), out.elems(), out.as<float>());
  return out;
}

MoeWeights read_mlp(const TensorStore& store, const ModelConfig& config, const MlpNames& names, const MlpSizes& sizes,
                    const std::string& what) {
  return MlpReader(store, config, names, sizes, what).read();
}

MoeWeights read_fused_mlp(const TensorStore& store, const ModelConfig& config, const std::string& gate_up,
                          const std::string& down, std::int64_t first, std::int64_t count, const std::string& what) {
  expect_present(store, {gate_up, down}, what);
  expect_tensor(store, gate_up, kFloats, {{config.experts, 2 * config.intermediate, config.hidden}});
  expect_tensor(store, down, {store.find(gate_up)->dtype_name}, {{config.experts, config.hidden, config.intermediate}});
  const auto part = [&](const std::string& name) {
    auto whole = std::make_shared<const Tensor>(store.tensor(name));  // keeps the map alive
    return Tensor::wrap(whole->view().slice(first, count), whole);
  };
  Tensor w13 = part(gate_up), w2 = part(down);
  MoeWeights::Options options;
  options.activation = config.activation;
  return adopt(what, [&] {
    if (w13.dtype() == DType::float32) return quantize(Scheme::bf16(), w13, w2, options);
    return MoeWeights::from_float(std::move(w13), std::move(w2), options);
  });
}

}  // namespace octomoe::checkpoint
