#include "cpu/packed.h"

#include <algorithm>
#include <cstring>

#include "cpu/carver.h"
#include "quant/matrix.h"

namespace octomoe::cpu {
namespace {

// Behind the last panel: AMX reads whole tiles, also where a K-block ends inside one (their products are zero).
constexpr std::size_t kSlackBytes = 4096;

// The rows of one panel; null for padding.
struct PanelRows {
  const std::uint8_t* row[kPanel];
};

// dst[K/step][16][step] from rows of `size`-byte elements. The rows of a panel are read side by side.
template <int kStepBytes>
void interleave(const PanelRows& rows, std::int64_t row_bytes, std::uint8_t* dst) {
  for (std::int64_t b = 0; b < row_bytes; b += kStepBytes) {
    for (int c = 0; c < kPanel; ++c, dst += kStepBytes) {
      if (rows.row[c])
        std::memcpy(dst, rows.row[c] + b, kStepBytes);
      else
        std::memset(dst, 0, kStepBytes);
    }
  }
}

bool width_is_one(const QuantizedMatrix& m, const PackedMatrix& out) {
  for (std::int64_t u = 0; u < out.units; ++u) {
    for (int p = 0; p < 2; ++p) {
      const std::int64_t first = out.source_row(u, p, 0);
      for (int c = 1; c < kPanel && first >= 0; ++c) {
        const std::int64_t row = out.source_row(u, p, c);
        if (row >= 0 && m.block_of_row(row) != m.block_of_row(first)) return false;
      }
    }
  }
  return true;
}

// fn(index of the packed column, source row or -1) for all columns of an expert.
template <class Fn>
void for_columns(const PackedMatrix& out, const Fn& fn) {
  for (std::int64_t u = 0; u < out.units; ++u) {
    for (int p = 0; p < 2; ++p) {
      for (int c = 0; c < kPanel; ++c) fn(u * kUnit + p * kPanel + c, out.source_row(u, p, c));
    }
  }
}

// Per-column values [E][units][32] from a natural [E, N].
template <class T>
std::vector<T> pack_columns(const PackedMatrix& out, const T* natural) {
  const std::int64_t columns = out.units * kUnit;
  std::vector<T> packed(static_cast<std::size_t>(out.experts * columns));
  for (std::int64_t e = 0; e < out.experts; ++e) {
    for_columns(out, [&](std::int64_t i, std::int64_t row) {
      if (row >= 0) packed[static_cast<std::size_t>(e * columns + i)] = natural[e * out.n + row];
    });
  }
  return packed;
}

// Block scales [E][units][2][count][width] from a natural [E, NB, count].
template <class T>
std::vector<T> pack_blocks(const QuantizedMatrix& m, const PackedMatrix& out, std::int64_t count, const T* natural) {
  const std::int64_t panels = out.units * 2, nb = m.blocks_n();
  std::vector<T> packed(static_cast<std::size_t>(out.experts * panels * count * out.width));
  T* dst = packed.data();
  for (std::int64_t e = 0; e < out.experts; ++e) {
    for (std::int64_t panel = 0; panel < panels; ++panel) {
      for (std::int64_t b = 0; b < count; ++b) {
        for (int c = 0; c < out.width; ++c, ++dst) {
          const std::int64_t row = out.source_row(panel / 2, static_cast<int>(panel % 2), c);
          if (row >= 0) *dst = natural[(e * nb + m.block_of_row(row)) * count + b];
        }
      }
    }
  }
  return packed;
}

// w4a8 [E][units][2][groups][16] from [E, N, groups].
std::vector<float> pack_groups(const PackedMatrix& out, const float* natural) {
  std::vector<float> packed(static_cast<std::size_t>(out.experts * out.units * kUnit * out.groups));
  float* dst = packed.data();
  for (std::int64_t e = 0; e < out.experts; ++e) {
    for (std::int64_t panel = 0; panel < out.units * 2; ++panel) {
      for (std::int64_t g = 0; g < out.groups; ++g) {
        for (int c = 0; c < kPanel; ++c, ++dst) {
          const std::int64_t row = out.source_row(panel / 2, static_cast<int>(panel % 2), c);
          if (row >= 0) *dst = natural[(e * out.n + row) * out.groups + g];
        }
      }
    }
  }
  return packed;
}

void pack_scales(const QuantizedMatrix& m, PackedMatrix& out) {
  const float* scale = m.scale.as<float>();
  switch (out.scheme.kind) {
    case SchemeKind::int8_channel: {
      if (!out.scheme.per_tensor) {
        out.scale = pack_columns(out, scale);
        break;
      }
      out.scale.resize(static_cast<std::size_t>(out.experts * out.units * kUnit));
      for (std::int64_t e = 0; e < out.experts; ++e) {
        std::fill_n(out.scale.begin() + e * out.units * kUnit, out.units * kUnit, scale[e]);
      }
      break;
    }
    case SchemeKind::int8_block:
      out.scale = pack_blocks(m, out, out.blocks, scale);
      break;
    case SchemeKind::int8_hybrid:
      out.scale = pack_blocks(m, out, out.super_groups, scale);
      out.q = pack_blocks(m, out, out.blocks, m.q.as<std::uint8_t>());
      break;
    case SchemeKind::w4a8_fp8:
      out.scale = pack_groups(out, scale);
      break;
    case SchemeKind::bf16:
    case SchemeKind::fp16:
      break;
  }
  if (out.scheme.asymmetric) out.column_sum = pack_columns(out, m.column_sum.as<std::int32_t>());
}

// Which kernel, and with it which order.
void choose_kernel(PackedMatrix& out) {
  const Kernels kernels = kernels_for(out.isa);
  out.row_tile = kernels.row_tile;
  out.integer = kernels.integer;
  out.floating = kernels.floating;
  out.rows = out.integer_scheme() ? kernels.integer_rows : RowFormat::float32;
  out.block_stride = out.block_k;
  switch (out.scheme.kind) {
    case SchemeKind::w4a8_fp8:
      out.float_weight = FloatWeight::int4;
      break;
    case SchemeKind::fp16:
      out.float_weight = FloatWeight::fp16;
      break;
    case SchemeKind::bf16:
      if (const FloatKernel amx = amx_bf16_kernel(out.isa, out.k)) {
        out.floating = amx;
        out.rows = RowFormat::bf16;
      }
      break;
    default:
      out.block_stride = round_up(out.block_k, kernels.block_padding);
      break;
  }
}

}  // namespace

std::int64_t PackedMatrix::row_bytes() const {
  constexpr std::int64_t kElemBytes[] = {2, 1, 4, 2};  // as RowFormat
  // Rows an odd number of cache lines apart: six rows 4 KB apart would compete for one set of the first-level cache.
  const std::int64_t lines = round_up(row_elems() * kElemBytes[static_cast<int>(rows)], 64) / 64;
  return (lines | 1) * 64;
}

std::int64_t PackedMatrix::row_scales() const {
  switch (scheme.kind) {
    case SchemeKind::int8_channel:
    case SchemeKind::w4a8_fp8:
      return 1;
    case SchemeKind::int8_block:
      return blocks;
    case SchemeKind::int8_hybrid:
      return super_groups;
    default:
      return 0;
  }
}

std::size_t PackedMatrix::bytes() const {
  return weights.size() + (scale.size() + column_sum.size() + bias.size() + static_scale.size()) * 4 + q.size();
}

PackedMatrix pack(const QuantizedMatrix& m, const PackOptions& options, ThreadPool& pool) {
  PackedMatrix out;
  out.scheme = m.scheme;
  out.experts = m.experts;
  out.n = m.n;
  out.k = m.k;
  out.isa = options.isa;
  out.gated = options.gated;
  out.up_first = options.gated && options.order == GateUpOrder::up_gate;
  out.out_columns = options.gated ? m.n / 2 : m.n;
  out.units = ceil_div(out.out_columns, options.gated ? kPanel : kUnit);

  out.block_k = m.scheme.has_blocks() ? m.scheme.block_k : m.k;
  out.blocks = m.scheme.has_blocks() ? m.blocks_k() : 1;
  out.group = group_columns(m.scheme, m.k);
  out.groups = ceil_div(m.k, out.group);
  if (m.scheme.kind == SchemeKind::int8_hybrid) {
    out.super_group = m.scheme.super_group;
    out.super_groups = m.super_groups();
    out.flush_blocks = m.flush_blocks;
  }
  out.width = m.scheme.has_blocks() && !width_is_one(m, out) ? kPanel : 1;
  choose_kernel(out);
  pack_scales(m, out);
  if (options.bias.defined()) out.bias = pack_columns(out, options.bias.as<float>());
  if (m.activation_scale.defined()) {
    out.static_scale.assign(m.activation_scale.as<float>(),
                            m.activation_scale.as<float>() + m.activation_scale.elems());
  }

  const std::int64_t row_bytes = static_cast<std::int64_t>(m.values.bytes()) / (m.experts * m.n);
  out.panel_bytes = row_bytes * kPanel;
  out.weights = HugeBuffer(static_cast<std::size_t>(m.experts * out.units * 2 * out.panel_bytes) + kSlackBytes);
  const auto* source = m.values.as<std::uint8_t>();
  // Weights in panels of 128 columns: each thread gathers the rows of one of ours first, so no second matrix is needed.
  const bool gather = m.layout == WeightLayout::panels;
  std::vector<std::int8_t> gathered(gather ? static_cast<std::size_t>(pool.threads() * kPanel * row_bytes) : 0);
  pool.parallel_for(m.experts * out.units, [&](std::int64_t i, int thread) {
    const std::int64_t e = i / out.units, u = i % out.units;
    for (int p = 0; p < 2; ++p) {
      PanelRows rows;
      for (int c = 0; c < kPanel; ++c) {
        const std::int64_t row = out.source_row(u, p, c);
        rows.row[c] = row < 0 ? nullptr : source + (e * m.n + row) * row_bytes;
        if (row < 0 || !gather) continue;
        std::int8_t* copy = gathered.data() + (thread * kPanel + c) * row_bytes;
        gather_row(m, e, row, copy);
        rows.row[c] = reinterpret_cast<const std::uint8_t*>(copy);
      }
      auto* dst = out.weights.as<std::uint8_t>() + (i * 2 + p) * out.panel_bytes;
      switch (out.rows) {
        case RowFormat::int16:
          interleave<2>(rows, row_bytes, dst);
          break;  // pairs of int8
        case RowFormat::int8:
          interleave<4>(rows, row_bytes, dst);
          break;  // fours of int8
        case RowFormat::bf16:
          interleave<4>(rows, row_bytes, dst);
          break;  // pairs of bf16
        case RowFormat::float32:
          if (out.float_weight == FloatWeight::int4)
            interleave<4>(rows, row_bytes, dst);  // eights of int4
          else
            interleave<2>(rows, row_bytes, dst);
          break;
      }
    }
  });
  return out;
}

}  // namespace octomoe::cpu
