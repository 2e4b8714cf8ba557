// PackedMatrix: the weights of one QuantizedMatrix in the order that the kernels read them, at the same size.
//
// A unit is two panels of 16 columns: gate and up of the same columns for a gated w13, otherwise 32 neighbouring
// columns. Columns are padded to whole units with zero weights; K is not padded. Units of an expert follow each other,
// experts too: a task streams one piece of memory.
#pragma once

#include <cstdint>
#include <vector>

#include "base/thread_pool.h"
#include "cpu/kernel.h"
#include "cpu/memory.h"
#include "octomoe/weights.h"

namespace octomoe::cpu {

struct PackOptions {
  bool gated = false;  // pair gate and up (segments == 2)
  GateUpOrder order = GateUpOrder::gate_up;
  Tensor bias;  // float32 [E, N] or undefined
  Isa isa = Isa::portable;
};

struct PackedMatrix {
  Scheme scheme;
  std::int64_t experts = 0, n = 0, k = 0;
  bool gated = false;
  std::int64_t out_columns = 0;  // N, or N/2 where gated
  std::int64_t units = 0;        // per expert
  RowFormat rows = RowFormat::int16;
  Isa isa = Isa::portable;
  IntKernel integer = nullptr;
  FloatKernel floating = nullptr;
  FloatWeight float_weight = FloatWeight::bf16;
  int row_tile = 6;

  std::int64_t panel_bytes = 0;
  HugeBuffer weights;  // [E][units][2 panels]

  std::int64_t block_k = 0, blocks = 1, block_stride = 0;  // block_stride: elements of a padded K-block of a row
  std::int64_t super_group = 1, super_groups = 1, flush_blocks = 1, groups = 1, group = 0;
  int width = 1;                // 1: a block scale holds for all columns of a panel, else 16
  std::vector<float> scale;     // channel [E][units][32]; block [E][units][2][blocks][width]; hybrid the same with
                                // super groups; w4a8 [E][units][2][groups][16]
  std::vector<std::uint8_t> q;  // hybrid [E][units][2][blocks][width]
  std::vector<std::int32_t> column_sum;  // asymmetric [E][units][32]
  std::vector<float> bias;               // [E][units][32], empty without
  std::vector<float> static_scale;       // [1] or [E]

  bool integer_scheme() const { return scheme.is_integer(); }
  const std::uint8_t* unit(std::int64_t e, std::int64_t u) const {
    return weights.as<std::uint8_t>() + (e * units + u) * 2 * panel_bytes;
  }
  float static_scale_of(std::int64_t e) const {
    return static_scale.empty() ? 0.0f : static_scale[static_scale.size() == 1 ? 0 : static_cast<std::size_t>(e)];
  }
  // Elements and bytes of a row as the kernels read it, and its number of scales.
  std::int64_t row_elems() const { return blocks * block_stride; }
  std::int64_t row_bytes() const;
  std::int64_t row_scales() const;
  // The source row of column c of panel p of unit u, or -1 for padding.
  std::int64_t source_row(std::int64_t u, int p, std::int64_t c) const {
    const std::int64_t column = gated ? u * kPanel + c : u * kUnit + p * kPanel + c;
    if (column >= out_columns) return -1;
    return gated ? ((p == 1) != up_first) * out_columns + column : column;
  }
  bool up_first = false;
  std::size_t bytes() const;
};

// Reads `m`; the caller drops it.
PackedMatrix pack(const QuantizedMatrix& m, const PackOptions& options, ThreadPool& pool);

}  // namespace octomoe::cpu
