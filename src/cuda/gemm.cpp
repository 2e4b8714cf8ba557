#include "cuda/gemm.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <utility>

#include "cuda/stream.h"
#include "plan/catalogue.h"
#include "quant/matrix.h"
#include "tensor/check.h"

namespace octomoe::cuda {
namespace {

using kernels::Epilogue;
using kernels::GemmConfig;
using kernels::Promotion;

Promotion promotion_of(const QuantizedMatrix& m) {
  switch (m.scheme.kind) {
    case SchemeKind::int8_block:
      return Promotion::block;
    case SchemeKind::int8_hybrid:
      return m.super_groups() == 1 && m.flush_blocks >= m.blocks_k() ? Promotion::hybrid : Promotion::hybrid_flush;
    default:
      return Promotion::channel;
  }
}

int row_scheme_of(const Scheme& s) {  // kernels::RowScheme
  if (s.kind == SchemeKind::int8_block) return 3;
  if (s.kind == SchemeKind::int8_hybrid) return 4;
  if (s.asymmetric) return 2;
  return s.activation_scale == ActivationScale::static_ ? 1 : 0;
}

Tensor upload(const Tensor& t, Device device) {
  if (!t.defined() || t.device() == device) return t;
  return Tensor::copy_of(t.view(), device);
}

}  // namespace

kernels::RowView row_view(const TensorView& rows) {
  const auto type = rows.dtype() == DType::float32   ? kernels::RowType::f32
                    : rows.dtype() == DType::float16 ? kernels::RowType::fp16
                                                     : kernels::RowType::bf16;
  return {rows.data(), rows.strides()[0], type, rows_are_aligned(rows)};
}

kernels::OutType out_type(DType dtype) {
  return dtype == DType::float32   ? kernels::OutType::f32
         : dtype == DType::float16 ? kernels::OutType::fp16
                                   : kernels::OutType::bf16;
}

bool rows_are_aligned(const TensorView& t) {
  bool aligned = reinterpret_cast<std::uintptr_t>(t.data()) % 16 == 0;
  for (int i = 0; i + 1 < t.rank(); ++i) {
    aligned &= t.dim(i) <= 1 || t.strides()[i] * static_cast<std::int64_t>(size_bytes(t.dtype())) % 16 == 0;
  }
  return aligned;
}

DeviceMatrix::DeviceMatrix(QuantizedMatrix matrix, const Tensor& bias, Epilogue epilogue, const DeviceInfo& device,
                           const char* name)
    : m_(std::move(matrix)) {
  const Scheme& s = m_.scheme;
  const Device where = Device::cuda(device.index);
  if (!s.is_integer()) {
    fail(ErrorCode::unsupported, "scheme: expected int8_channel, int8_block or int8_hybrid on {}, got {}",
         to_string(where), to_string(s));
  }
  if (s.has_blocks() && s.block_n % 16 != 0) {
    fail(ErrorCode::unsupported, "scheme: expected block_n of a multiple of 16 on {}, got {}", to_string(where),
         s.block_n);
  }
  if (m_.n % 8 != 0) {
    fail(ErrorCode::unsupported, "{}: expected a multiple of 8 rows on {}, got {}", name, to_string(where), m_.n);
  }
  if (m_.experts > kernels::kMaxExperts) {
    fail(ErrorCode::unsupported, "{}: expected at most {} experts on {}, got {}", name, kernels::kMaxExperts,
         to_string(where), m_.experts);
  }
  blocks_n_ = m_.blocks_n();
  blocks_k_ = m_.blocks_k();
  super_groups_ = m_.super_groups();
  if (m_.activation_scale.defined()) static_scale_ = *m_.activation_scale.as<float>();
  const Promotion promotion = promotion_of(m_);
  const bool fine = s.has_blocks() && s.block_k != 128;
  const int family = plan::tile_family(device.max_shared_bytes);
  for (const GemmConfig& c : plan::gemm_configs(promotion, fine, epilogue, family)) {
    kernels_.push_back({c, &load(plan::entry(plan::gemm_id(c)), device.index)});
  }
  quantizer_ = &load(plan::entry(plan::quantize_id(row_scheme_of(s), plan::quantize_kernel(m_.k))), device.index);
  m_.values = upload(m_.values, where);
  if (reinterpret_cast<std::uintptr_t>(m_.values.view().data()) % 16 != 0) {
    bad_argument("{}: expected values aligned to 16 bytes, got {}", name, m_.values.view().data());
  }
  m_.scale = upload(m_.scale, where);
  m_.q = upload(m_.q, where);
  m_.column_sum = upload(m_.column_sum, where);
  m_.activation_scale = upload(m_.activation_scale, where);
  bias_ = upload(bias, where);
}

ScaleColumns DeviceMatrix::scale_columns() const {
  switch (m_.scheme.kind) {
    case SchemeKind::int8_block:
      return {blocks_k_, 0};
    case SchemeKind::int8_hybrid:
      return {super_groups_, blocks_k_};
    default:
      return {1, 0};
  }
}

void DeviceMatrix::quantize(const Launcher& launcher, const kernels::RowView& x, std::int64_t rows,
                            const std::int32_t* row_count, const QuantizedRows& out) const {
  const Scheme& s = m_.scheme;
  const int rows_per_block = 256 / plan::quantize_kernel(m_.k).row_threads;
  const kernels::QuantizeArgs args{.x = x,
                                   .rows = static_cast<std::int32_t>(rows),
                                   .row_count = row_count,
                                   .k = static_cast<std::int32_t>(m_.k),
                                   .q = out.q,
                                   .scale = out.scale,
                                   .zero = out.zero,
                                   .block_q = out.block_q,
                                   .rows_total = out.rows,
                                   .static_scale = m_.activation_scale.as<float>(),
                                   .block_k = s.block_k,
                                   .super_group = s.super_group,
                                   .q_max = s.q_max};
  launcher(*quantizer_, ceil_div(rows, rows_per_block), args);
}

namespace {

// Token tiles that an expert's rows need on average, where tokens choose experts at random: the rows are Poisson
// distributed, near enough to a normal distribution. E[ceil(rows / block)] = sum over j of P(rows > j * block).
double expected_tiles(double mean, int block) {
  const double spread = std::sqrt(2 * mean) + 1e-9;
  double tiles = 0;
  for (int j = 0;; ++j) {
    const double above = 0.5 * std::erfc((static_cast<double>(j) * block + 0.5 - mean) / spread);
    if (above < 1e-3) return tiles;
    tiles += above;
  }
}

}  // namespace

// The tile with the least work: a token tile costs its width and, for opening and storing it, as much as 48 tokens
// more (docs/kernels.md). Remembered: the next call usually has as many rows.
const DeviceMatrix::Kernel& DeviceMatrix::choose(std::int64_t rows) const {
  if (chosen_ != nullptr && chosen_rows_ == rows) return *chosen_;
  const double mean = static_cast<double>(rows) / static_cast<double>(m_.experts);
  double least = std::numeric_limits<double>::infinity();
  for (const Kernel& k : kernels_) {
    constexpr int kOverhead = 48;
    const double cost = std::max(1e-3, expected_tiles(mean, k.config.block_n)) * (k.config.block_n + kOverhead);
    if (cost < least) {
      least = cost;
      chosen_ = &k;
    }
  }
  chosen_rows_ = rows;
  return *chosen_;
}

void DeviceMatrix::gemm(const Launcher& launcher, const Problem& p) const {
  const Kernel& kernel = choose(p.rows);
  const GemmConfig& c = kernel.config;
  const Scheme& s = m_.scheme;
  const kernels::GemmArgs args{
      .a = p.a.q,
      .w = m_.values.as<std::int8_t>(),
      .a_rows = p.a.rows,
      .a_scale = p.a.scale,
      .w_scale = m_.scale.as<float>(),
      .a_q = p.a.block_q,
      .w_q = m_.q.as<std::uint8_t>(),
      .a_zero = s.asymmetric ? p.a.zero : nullptr,
      .column_sum = m_.column_sum.as<std::int32_t>(),
      .expert_offsets = p.index,
      .row_source = p.row_source,
      .row_factor = p.row_factor,
      .bias = p.bias != nullptr ? p.bias : bias_.as<float>(),
      .out = p.out,
      .out_stride = p.out_stride,
      .out_type = p.out_type,
      .experts = static_cast<std::int32_t>(m_.experts),
      .n = static_cast<std::int32_t>(m_.n),
      .k = static_cast<std::int32_t>(m_.k),
      .masked_rows = static_cast<std::int32_t>(p.masked_rows),
      .w_scale_per_tensor = s.per_tensor,
      .block_n = s.block_n,
      .block_k = s.block_k,
      .blocks_n = static_cast<std::int32_t>(blocks_n_),
      .blocks_k = static_cast<std::int32_t>(blocks_k_),
      .segments = m_.segments,
      .super_group = s.super_group,
      .flush_blocks = m_.flush_blocks,
      .up_first = p.up_first,
      .limit = p.limit,
  };
  const std::int64_t columns = c.gated() ? m_.n / 2 : m_.n;
  const std::int64_t token_tiles = std::min(p.rows, ceil_div(p.rows, c.block_n) + m_.experts);
  launcher(*kernel.loaded, token_tiles * ceil_div(columns, c.features()), args);
}

}  // namespace octomoe::cuda
