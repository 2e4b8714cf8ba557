#include "cuda/gemm.h"

#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <string>
#include <utility>

#include "cuda/stream.h"
#include "cuda/tensor_map.h"
#include "plan/catalogue.h"
#include "quant/matrix.h"
#include "tensor/check.h"

namespace octomoe::cuda {
namespace {

using kernels::Epilogue;
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

// Bytes that kernels read by words of four, the last one too.
Tensor upload_words(const Tensor& t, Device device) {
  if (!t.defined() || (t.bytes() % 4 == 0 && reinterpret_cast<std::uintptr_t>(t.view().data()) % 4 == 0)) {
    return upload(t, device);
  }
  const Tensor bytes = upload(t, Device::cpu());
  const Tensor words = Tensor::zeros(t.dtype(), {ceil_div(t.elems(), 4) * 4});
  std::memcpy(words.view().data(), bytes.view().data(), t.bytes());
  return Tensor::copy_of(words.view(), device);
}

// [E, N, K] on the device -> panels there.
Tensor panels_of(const QuantizedMatrix& m, const DeviceInfo& device) {
  const Device where = Device::cuda(device.index);
  Tensor panels = Tensor::empty(m.values.dtype(), {m.experts, m.k / kPanelColumns, m.n, kPanelColumns}, where);
  const kernels::PanelArgs args{.from = m.values.as<std::int8_t>(),
                                .to = panels.as<std::int8_t>(),
                                .rows = m.experts * m.n,
                                .n = static_cast<std::int32_t>(m.n),
                                .k = static_cast<std::int32_t>(m.k)};
  const ContextGuard context(device);
  OCTOMOE_CUDA(cuCtxSynchronize);  // the values may still be written, on whatever stream
  const OwnedStream stream;
  Launcher(device, stream.get())(load(plan::entry("panels"), device.index), ceil_div(args.rows * m.k / 16, 256), args);
  stream.synchronize();
  return panels;
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

// What KernelFamily::automatic means in this process. Read once: a launch path reads no environment.
KernelFamily default_family() {
  static const KernelFamily family = [] {
    const char* text = std::getenv("OCTOMOE_KERNEL_FAMILY");
    if (text == nullptr || *text == 0) return KernelFamily::automatic;
    try {
      return parse_kernel_family(text);
    } catch (const Error& e) {
      fail(e.code(), "OCTOMOE_KERNEL_FAMILY: {}", e.what());
    }
  }();
  return family;
}

DeviceMatrix::DeviceMatrix(QuantizedMatrix matrix, const Tensor& bias, Epilogue epilogue, KernelFamily family,
                           bool prepack, const DeviceInfo& device, const char* name)
    : m_(std::move(matrix)), epilogue_(epilogue) {
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
  // Kernels count the bytes of an expert in 32 bits.
  if (m_.n * m_.k > std::numeric_limits<std::uint32_t>::max()) {
    fail(ErrorCode::unsupported, "{}: expected less than 4 GiB an expert on {}, got {} x {}", name, to_string(where),
         m_.n, m_.k);
  }
  blocks_n_ = m_.blocks_n();
  blocks_k_ = m_.blocks_k();
  super_groups_ = m_.super_groups();
  if (m_.activation_scale.defined()) static_scale_ = *m_.activation_scale.as<float>();
  quantizer_ = &load(plan::entry(plan::quantize_id(row_scheme_of(s), plan::quantize_kernel(m_.k))), device.index);
  m_.values = upload(m_.values, where);
  if (reinterpret_cast<std::uintptr_t>(m_.values.view().data()) % 16 != 0) {
    bad_argument("{}: expected values aligned to 16 bytes, got {}", name, m_.values.view().data());
  }
  if (prepack && !in_panels()) {
    if (m_.k % kPanelColumns != 0) {
      bad_argument("{}: expected K of a multiple of {} for prepack, got {}", name, kPanelColumns, m_.k);
    }
    m_.values = panels_of(m_, device);
    m_.layout = WeightLayout::panels;
  }
  // Kernels count the bytes of a panel in 32 bits.
  if (in_panels() && m_.n > std::numeric_limits<std::int32_t>::max() / kPanelColumns) {
    fail(ErrorCode::unsupported, "{}: expected at most {} rows in panels on {}, got {}", name,
         std::numeric_limits<std::int32_t>::max() / kPanelColumns, to_string(where), m_.n);
  }
  m_.scale = upload(m_.scale, where);
  m_.q = upload_words(m_.q, where);
  m_.column_sum = upload(m_.column_sum, where);
  m_.activation_scale = upload(m_.activation_scale, where);
  bias_ = upload(bias, where);

  const bool asked = family == KernelFamily::sm90;
  if (family == KernelFamily::automatic) family = default_family();
  const Promotion promotion = promotion_of(m_);
  if (epilogue_ == Epilogue::swiglu_block &&
      (family == KernelFamily::sm80 || !why_not_wgmma(device).empty() ||
       plan::wgmma_kernels(promotion, epilogue_, s.has_blocks() ? s.block_k : 0).empty())) {
    epilogue_ = Epilogue::swiglu;
  }
  const std::string why_not = why_not_wgmma(device);
  if (asked && !why_not.empty()) fail(ErrorCode::unsupported, "{}: the sm90 family expects {}", name, why_not);
  const bool automatic = family == KernelFamily::automatic, wgmma = why_not.empty() && family != KernelFamily::sm80;
  key_ = {.device = device.name,
          .multiprocessors = device.multiprocessors,
          .promotion = promotion,
          .epilogue = epilogue_,
          .block_k = s.has_blocks() ? s.block_k : 0,
          .experts = m_.experts,
          .n = m_.n,
          .k = m_.k};
  if (wgmma) {
    for (plan::GemmKernel& k : plan::wgmma_kernels(promotion, epilogue_, key_.block_k)) {
      kernels_.push_back({std::move(k), true});
    }
    const ContextGuard context(device);
    const Kernel& any = kernels_.front();  // they all read the same boxes
    const void* w = m_.values.view().data();
    const std::int64_t stacks = in_panels() ? m_.experts * (m_.k / kPanelColumns) : m_.experts;
    const std::int64_t columns = in_panels() ? kPanelColumns : m_.k;
    weight_map_ = any.token_major ? token_major_weight_map(w, stacks, m_.n, columns, any.weight_box)
                                  : weight_map(w, stacks, m_.n, columns, gated());
  }
  if (!wgmma || automatic) {
    const int tiles = plan::tile_family(device.max_shared_bytes);
    for (plan::GemmKernel& k : plan::mma_kernels(promotion, epilogue_, key_.block_k, tiles)) {
      k.stands_in = wgmma && k.can_stand_in();
      const bool by_model = !wgmma || k.stands_in;
      kernels_.push_back({std::move(k), by_model});
    }
  }
  const std::vector<std::string> tuned = plan::tuned_table().kernels(key_);
  tuned_ = !tuned.empty();
  for (Kernel& kernel : kernels_) {
    const bool in_table = std::find(tuned.begin(), tuned.end(), kernel.id) != tuned.end();
    if (kernel.by_model || in_table) kernel.loaded = &load(plan::entry(kernel.id), device.index);
  }
}

void DeviceMatrix::force(const std::string& id) {
  chosen_ = nullptr;
  forced_ = nullptr;
  if (id.empty()) return;
  const auto at = std::find_if(kernels_.begin(), kernels_.end(), [&](const Kernel& k) { return k.id == id; });
  if (at == kernels_.end()) bad_argument("id: expected a kernel that can run these weights, got {}", id);
  if (at->loaded == nullptr) at->loaded = &load(plan::entry(id), m_.values.device().index);
  forced_ = &*at;
}

std::string DeviceMatrix::why_not_wgmma(const DeviceInfo& device) const {
  const Scheme& s = m_.scheme;
  if (device.compute_capability != 90) {
    return fmt::format("compute capability 9.0, got {}.{}", device.compute_capability / 10,
                       device.compute_capability % 10);
  }
  if (!driver().cuTensorMapEncodeTiled) return "a driver of CUDA 12.0 or newer";
  const std::int64_t rows = gated() ? m_.n / 2 : m_.n, unit = gated() && !s.has_blocks() ? 16 : 32;
  if (rows % unit != 0) return fmt::format("a multiple of {} output columns, got {}", unit, rows);
  if (s.has_blocks()) {
    if (plan::wgmma_kernels(promotion_of(m_), epilogue_, s.block_k).empty()) {
      return fmt::format("scale blocks of 128 or 256 columns, got {}", s.block_k);
    }
    // 128 rows of a tile share a scale block; gated, those of each half.
    constexpr std::int64_t kGroup = 128;
    if (s.block_n % kGroup != 0) return fmt::format("block_n of a multiple of {}, got {}", kGroup, s.block_n);
    if (!gated() && m_.segments > 1 && m_.n / m_.segments % kGroup != 0) {
      return fmt::format("halves of w13 of a multiple of {} rows, got {}", kGroup, m_.n / m_.segments);
    }
  }
  return {};
}

std::optional<kernels::FewMatrix> DeviceMatrix::few() const {
  const Scheme& s = m_.scheme;
  if (s.has_blocks() && s.block_k != kernels::kFewPiece && s.block_k != 2 * kernels::kFewPiece) return std::nullopt;
  return kernels::FewMatrix{.w = m_.values.as<std::int8_t>(),
                            .scale = m_.scale.as<float>(),
                            .bias = bias_.as<float>(),
                            .column_sum = s.asymmetric ? m_.column_sum.as<std::int32_t>() : nullptr,
                            .static_scale = m_.activation_scale.as<float>(),
                            .q = m_.q.as<std::uint8_t>(),
                            .n = static_cast<std::int32_t>(m_.n),
                            .k = static_cast<std::int32_t>(m_.k),
                            .per_tensor = s.per_tensor,
                            .w_row = w_row(),
                            .w_panel = w_panel(),
                            .block_n = s.block_n,
                            .block_k = s.block_k,
                            .block_n_inverse = kernels::few_inverse(s.block_n),
                            .blocks_n = static_cast<std::int32_t>(blocks_n_),
                            .blocks_k = static_cast<std::int32_t>(blocks_k_),
                            .super_groups = static_cast<std::int32_t>(super_groups_),
                            .super_group = s.super_group,
                            .flush_blocks = static_cast<std::int32_t>(m_.flush_blocks),
                            .q_max = s.q_max};
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
                            const std::int32_t* row_count, const QuantizedRows& out, Overlap overlap, bool read_once,
                            const ClearedRows& cleared) const {
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
                                   .q_max = s.q_max,
                                   .beside_last = overlap.beside_last,
                                   .next_early = overlap.next_early,
                                   .read_once = read_once && drops_lines() && x.stride == m_.k &&
                                                reinterpret_cast<std::uintptr_t>(x.data) % kLineBytes == 0,
                                   .clear = static_cast<std::uint8_t*>(cleared.first),
                                   .clear_stride = cleared.stride,
                                   .clear_bytes = static_cast<std::int32_t>(cleared.bytes)};
  launcher(*quantizer_, ceil_div(rows, rows_per_block), args);
}

bool DeviceMatrix::drops_lines() const { return m_.k * 2 % kLineBytes == 0 && plan::quantize_kernel(m_.k).passes > 0; }

bool DeviceMatrix::has_stand_ins() const {
  return std::any_of(kernels_.begin(), kernels_.end(), [](const Kernel& k) { return k.stands_in; });
}

bool DeviceMatrix::leaves_idle(std::int64_t rows) const {
  return 2 * plan::work_of(choose(rows), key_, static_cast<double>(rows)).tiles <= key_.multiprocessors;
}

std::int64_t DeviceMatrix::most_idle_rows() const {
  std::int64_t most = 0;  // each tile has at most block_n rows
  for (const Kernel& k : kernels_) {
    most = std::max<std::int64_t>(most, key_.multiprocessors * k.block_n / ceil_div(m_.n, k.block_m));
  }
  return most;
}

// Remembered: the next call usually has as many rows.
const DeviceMatrix::Kernel& DeviceMatrix::choose(std::int64_t rows) const {
  if (chosen_ != nullptr && chosen_rows_ == rows) return *chosen_;
  chosen_rows_ = rows;
  if (forced_ != nullptr) return *(chosen_ = forced_);
  if (tuned_) {
    if (const plan::TuneChoice* choice = plan::tuned_table().find(key_, rows)) {
      // On a device with wgmma, tiles of mma.sync that do not stand in ask for no weights before their turn.
      const Kernel* best = choice->best_of(
          kernels_, [](const Kernel& k) { return k.loaded != nullptr; }, [](const Kernel& k) { return k.by_model; });
      if (best != nullptr) return *(chosen_ = best);
    }
  }
  return *(chosen_ = &by_cost(rows));
}

const DeviceMatrix::Kernel& DeviceMatrix::by_cost(std::int64_t rows) const {
  const Kernel* best = nullptr;
  double least = std::numeric_limits<double>::infinity();
  for (const Kernel& k : kernels_) {
    if (!k.by_model) continue;
    const double cost = plan::cost(k, plan::work_of(k, key_, static_cast<double>(rows)));
    if (best == nullptr || cost < least) {
      least = cost;
      best = &k;
    }
  }
  return *best;
}

bool DeviceMatrix::load_adding() {
  if (bias_.defined() || m_.scheme.asymmetric) return false;
  bool any = false;
  for (Kernel& k : kernels_) {
    if (k.loaded == nullptr || k.adding.empty()) continue;
    k.loaded_adding = &load(plan::entry(k.adding), m_.values.device().index);
    any = true;
  }
  return any;
}

bool DeviceMatrix::can_add(std::int64_t rows) const { return choose(rows).loaded_adding != nullptr; }

bool DeviceMatrix::reads_scales_by_row(std::int64_t rows) const {
  return choose(rows).token_major && rows * blocks_k_ <= std::numeric_limits<std::int32_t>::max();
}

void DeviceMatrix::gemm(const Launcher& launcher, const Problem& p) const {
  const std::int64_t rows = p.likely_rows > 0 ? p.likely_rows : p.rows;
  const Kernel& kernel = choose(rows);
  const Scheme& s = m_.scheme;
  if (p.added && kernel.loaded_adding == nullptr) fail(ErrorCode::internal, "{} cannot add to rows", kernel.id);
  const kernels::GemmArgs args{
      .a = p.a.q,
      .w = m_.values.as<std::int8_t>(),
      .a_rows = p.a.rows,
      .a_scale = p.a.scale,
      .w_scale = m_.scale.as<float>(),
      .a_q = p.a.block_q,
      .scales_by_row = p.scales_by_row,
      .w_q = m_.q.as<std::uint8_t>(),
      .a_zero = s.asymmetric ? p.a.zero : nullptr,
      .column_sum = m_.column_sum.as<std::int32_t>(),
      .expert_offsets = p.index,
      .offsets_limit = p.index_limit,
      .taken = p.taken,
      .row_source = p.row_source,
      .row_factor = p.row_factor,
      .bias = p.bias != nullptr ? p.bias : bias_.as<float>(),
      .out = p.out,
      .out_stride = p.out_stride,
      .out_type = p.out_type,
      .experts = static_cast<std::int32_t>(m_.experts),
      .n = static_cast<std::int32_t>(m_.n),
      .k = static_cast<std::int32_t>(m_.k),
      .w_row = w_row(),
      .w_panel = w_panel(),
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
      .out_rows = p.out_rows,
      .out_scale = p.out_scale,
      .out_hint = p.keep_out ? kernels::kEvictLast : kernels::kEvictNormal,
      .add_to = p.added ? p.added->to : nullptr,
      .add_weight = p.added ? p.added->weight : nullptr,
  };
  const std::int64_t columns = gated() ? m_.n / 2 : m_.n;
  const std::int64_t token_tiles = std::min(p.rows, ceil_div(p.rows, kernel.block_n * kernel.cluster) + m_.experts);
  const std::int64_t blocks = token_tiles * ceil_div(columns, kernel.features) * kernel.cluster;
  // SM90's kernels count a row's place in units of 16 bytes, in 32 bits. One limit for all.
  if (p.a.rows * m_.k / 16 > std::numeric_limits<std::uint32_t>::max()) {
    fail(ErrorCode::unsupported, "a: expected less than 64 GiB of rows, got {} x {}", p.a.rows, m_.k);
  }
  if (kernel.wgmma) {
    // Weights that are read once, by an expert's only tile, may just pass through L2. One rule for a launch: where both
    // kinds of lines live in L2, the evict-first ones are squeezed out at once. So much of out may be written that it
    // fills L2 then: good for whoever reads out next, but weights no longer live until their other half is wanted. With
    // fewer rows than kPairRows, larger requests cost more than they save (docs/kernels.md).
    constexpr double kPairRows = 4, kFewRows = 48;
    const double each = static_cast<double>(rows) / static_cast<double>(m_.experts);  // rows of an expert
    const bool once = each + 2 * std::sqrt(each) <= kernel.block_n && (p.read_next || each <= kFewRows);
    kernels::WgmmaArgs all{.weights = weight_map_,
                           .gemm = args,
                           .evict_first = once,
                           .weights_in_pairs = once && kernel.cluster == 1 && !in_panels() && each >= kPairRows,
                           .tokens_by_map = p.row_source == nullptr && p.a.rows > 0,
                           .offsets_late = p.index_late,
                           .routes = p.routes,
                           .tokens = {}};
    if (all.tokens_by_map != 0) all.tokens = token_map(p.a.q, p.a.rows, m_.k, kernel.token_box);
    launcher(p.added ? *kernel.loaded_adding : *kernel.loaded, blocks, all, true,
             static_cast<unsigned>(kernel.cluster));
  } else {
    launcher(*kernel.loaded, blocks, args);
  }
}

}  // namespace octomoe::cuda
