#include "cpu/gemm.h"

#include <algorithm>
#include <cstring>

#include "cpu/carver.h"
#include "cpu/ops.h"
#include "quant/matrix.h"
#include "quant/numerics.h"

namespace octomoe::cpu {
namespace {

constexpr std::int64_t kTaskRows = 96;              // c of a unit is then 12 KB: it stays in the first-level cache
constexpr std::int64_t kTaskRowBytes = 384 * 1024;  // of a second-level cache of 1 MB
constexpr std::int64_t kTasksPerThread = 8;         // enough to even out the end of a phase
constexpr std::int64_t kRowsWorthOfStreaming = 8;   // a task also reads its weights: about 8 rows' arithmetic
constexpr std::int64_t kMinUnits = 4;               // per task: gathering rows is paid once for these

std::int64_t value_bytes(const PackedMatrix& b) {
  return b.scheme.kind == SchemeKind::bf16 || b.scheme.kind == SchemeKind::fp16 ? 2 : 1;
}

std::size_t carve_rows(const PackedMatrix& b, std::int64_t rows, std::uint8_t* base, RowSet* set) {
  Carver c(base);
  RowSet s;
  s.stride_bytes = b.k * value_bytes(b);
  s.values = c.take<std::uint8_t>(rows * s.stride_bytes);
  s.scale_stride = b.row_scales();
  s.scale = c.take<float>(rows * s.scale_stride);
  if (s.scale_stride == 0) s.scale = nullptr;
  if (b.scheme.kind == SchemeKind::int8_hybrid) s.q = c.take<std::uint8_t>(rows * b.blocks);
  if (b.scheme.asymmetric) s.zero = c.take<std::int32_t>(rows);
  if (set) *set = s;
  return c.used();
}

// What a task keeps beside its weights.
struct Scratch {
  std::uint8_t* rows;
  float* scale;
  std::int32_t* q;
  std::int32_t* zero;
  float* factor;
  std::uint8_t* c;
  std::int32_t* chunk;
  std::uint8_t** out;
};

std::size_t carve_scratch(const PackedMatrix& b, std::int64_t rows, std::uint8_t* base, Scratch* scratch) {
  Carver c(base);
  Scratch s{};
  s.rows = c.take<std::uint8_t>(rows * b.row_bytes());
  s.scale = c.take<float>(rows * b.row_scales());
  const bool hybrid = b.scheme.kind == SchemeKind::int8_hybrid;
  if (hybrid) s.q = c.take<std::int32_t>(rows * b.blocks);
  s.zero = c.take<std::int32_t>(rows);
  s.factor = c.take<float>(rows);
  s.c = c.take<std::uint8_t>(rows * kUnit * 4);
  if (hybrid) s.chunk = c.take<std::int32_t>(rows * kUnit);
  s.out = c.take<std::uint8_t*>(rows);
  if (scratch) *scratch = s;
  return c.used();
}

// One row as the kernel wants it.
void expand_row(const PackedMatrix& b, const std::uint8_t* src, std::uint8_t* dst) {
  switch (b.rows) {
    case RowFormat::int16:
      widen_int8(reinterpret_cast<const std::int8_t*>(src), b.k, reinterpret_cast<std::int16_t*>(dst));
      return;
    case RowFormat::int8:
      for (std::int64_t i = 0; i < b.blocks; ++i) {
        const std::int64_t first = i * b.block_k, count = std::min(b.block_k, b.k - first);
        std::memcpy(dst + i * b.block_stride, src + first, static_cast<std::size_t>(count));
        if (count < b.block_stride) {
          std::memset(dst + i * b.block_stride + count, 0, static_cast<std::size_t>(b.block_stride - count));
        }
      }
      return;
    case RowFormat::bf16:
      std::memcpy(dst, src, static_cast<std::size_t>(b.k) * 2);
      return;
    case RowFormat::float32:
      if (b.scheme.kind == SchemeKind::w4a8_fp8) return e4m3_to_float(src, b.k, reinterpret_cast<float*>(dst));
      to_float(src, b.scheme.kind == SchemeKind::fp16 ? DType::float16 : DType::bfloat16, b.k,
               reinterpret_cast<float*>(dst));
      return;
  }
}

void gather_rows(const Product& p, const Task& t, const Scratch& s) {
  const PackedMatrix& b = *p.b;
  const std::int64_t scales = b.row_scales(), row_bytes = b.row_bytes();
  for (std::int64_t i = 0; i < t.rows; ++i) {
    const std::int64_t r = t.row + i, from = p.source ? p.source[r] : r, to = p.dest ? p.dest[r] : r;
    expand_row(b, p.a.values + from * p.a.stride_bytes, s.rows + i * row_bytes);
    const float factor = p.factor ? p.factor[r] : 1.0f;
    const bool scaled = p.factor && b.integer_scheme();  // float schemes multiply the result
    for (std::int64_t j = 0; j < scales; ++j) {
      const float scale = p.a.scale[from * p.a.scale_stride + j];
      s.scale[i * scales + j] = scaled ? scale * factor : scale;
    }
    if (p.a.q) {
      for (std::int64_t j = 0; j < b.blocks; ++j) s.q[i * b.blocks + j] = p.a.q[from * b.blocks + j];
    }
    if (p.a.zero) s.zero[i] = p.a.zero[from];
    s.factor[i] = factor;
    s.out[i] = p.out + to * p.out_stride_bytes;
  }
}

void multiply_unit(const PackedMatrix& b, const Task& t, std::int64_t u, bool last, const Scratch& s) {
  const std::int64_t e = t.expert, panel = (e * b.units + u) * 2;
  const std::uint8_t* w = b.unit(e, u);
  const auto* next = last ? nullptr : reinterpret_cast<const char*>(w + 2 * b.panel_bytes);
  if (!b.integer_scheme()) {
    FloatUnit f;
    f.a = s.rows;
    f.a_stride = b.row_bytes();
    f.rows = t.rows;
    f.format = b.float_weight;
    f.w = w;
    f.panel_bytes = b.panel_bytes;
    f.k = b.k;
    f.group = b.group;
    f.groups = b.groups;
    if (b.scheme.kind == SchemeKind::w4a8_fp8) {
      f.sa = s.scale;
      f.sw = b.scale.data() + panel * b.groups * kPanel;
    }
    f.c = reinterpret_cast<float*>(s.c);
    f.prefetch = next;
    return b.floating(f);
  }
  IntUnit x;
  x.a = s.rows;
  x.a_stride = b.row_bytes();
  x.a_block_stride = b.block_stride;
  x.rows = t.rows;
  x.w = reinterpret_cast<const std::int8_t*>(w);
  x.panel_bytes = b.panel_bytes;
  x.k = b.k;
  x.block_k = b.block_k;
  x.blocks = b.blocks;
  x.super_groups = b.super_groups;
  x.super_group = b.super_group;
  x.flush_blocks = b.flush_blocks;
  x.width = b.width;
  x.c = s.c;
  x.chunk = s.chunk;
  x.prefetch = next;
  x.sa = s.scale;
  x.qa = s.q;
  if (b.scheme.kind == SchemeKind::int8_block) {
    x.promote = Promote::block;
    x.sw = b.scale.data() + panel * b.blocks * b.width;
  } else if (b.scheme.kind == SchemeKind::int8_hybrid) {
    x.promote = Promote::hybrid;
    x.sw = b.scale.data() + panel * b.super_groups * b.width;
    x.qw = b.q.data() + panel * b.blocks * b.width;
  }
  b.integer(x);
}

}  // namespace

std::size_t row_set_bytes(const PackedMatrix& b, std::int64_t rows) { return carve_rows(b, rows, nullptr, nullptr); }

RowSet lay_out_rows(const PackedMatrix& b, std::int64_t rows, std::uint8_t* base) {
  RowSet set;
  carve_rows(b, rows, base, &set);
  return set;
}

void quantize_row(const PackedMatrix& b, const float* x, float static_scale, const RowSet& set, std::int64_t row) {
  const Scheme& s = b.scheme;
  std::uint8_t* values = set.values + row * set.stride_bytes;
  auto* q = reinterpret_cast<std::int8_t*>(values);
  float* scale = set.scale + row * set.scale_stride;
  const auto int8 = [&](std::int64_t begin, std::int64_t count, float inverse) {
    quantize_int8(x + begin, count, inverse, 0, -num::kInt8Max, num::kInt8Max, q + begin);
  };

  switch (s.kind) {
    case SchemeKind::bf16:
      return from_float(x, b.k, DType::bfloat16, values);
    case SchemeKind::fp16:
      return from_float(x, b.k, DType::float16, values);
    case SchemeKind::int8_block:
      for (std::int64_t i = 0; i < b.blocks; ++i) {
        const std::int64_t first = i * b.block_k, count = std::min(b.block_k, b.k - first);
        const num::GroupScale g = num::symmetric_scale(absmax_bits(x + first, count), num::kInt8Max);
        scale[i] = g.scale;
        int8(first, count, g.inverse);
      }
      return;
    case SchemeKind::int8_hybrid:
      for (std::int64_t g = 0; g < b.super_groups; ++g) {
        const std::int64_t begin = g * b.super_group, end = std::min(begin + b.super_group, b.blocks);
        const std::int64_t first = begin * b.block_k, stop = std::min(end * b.block_k, b.k);
        const num::SuperScale f = num::super_scale(absmax_bits(x + first, stop - first), s.q_max);
        scale[g] = f.f;
        for (std::int64_t i = begin; i < end; ++i) {
          const std::int64_t at = i * b.block_k, count = std::min(b.block_k, b.k - at);
          const num::BlockScale block = num::block_scale(f, absmax_bits(x + at, count), s.q_max);
          set.q[row * b.blocks + i] = static_cast<std::uint8_t>(block.q);
          int8(at, count, block.inverse);
        }
      }
      return;
    case SchemeKind::int8_channel:
    case SchemeKind::w4a8_fp8:
      break;
  }

  if (s.asymmetric) {
    float lo = 0, hi = 0;
    min_max(x, b.k, &lo, &hi);
    const num::RowScale g = num::asymmetric_scale(lo, hi, absmax_bits(x, b.k) < num::kInfBits);
    scale[0] = g.scale;
    set.zero[row] = g.zero;
    return quantize_int8(x, b.k, g.inverse, g.zero, -128.0f, 127.0f, q);
  }
  num::GroupScale g{1.0f, 1.0f};
  if (s.activation_scale != ActivationScale::none) {
    const std::uint32_t top = absmax_bits(x, b.k);
    g = num::symmetric_scale(top, s.is_integer() ? num::kInt8Max : num::kE4m3Max);
    if (s.activation_scale == ActivationScale::static_) {
      const bool finite = top < num::kInfBits;
      g = {finite ? static_scale : num::nan(), finite ? 1.0f / static_scale : 0.0f};
    }
  }
  scale[0] = g.scale;
  if (s.is_integer())
    int8(0, b.k, g.inverse);
  else
    quantize_e4m3(x, b.k, g.inverse, values);
}

std::int64_t rows_per_task(const PackedMatrix& b) {
  const std::int64_t fit = kTaskRowBytes / b.row_bytes();
  return std::max<std::int64_t>(std::min(fit, kTaskRows) / b.row_tile * b.row_tile, b.row_tile);
}

std::size_t scratch_bytes(const PackedMatrix& b, std::int64_t rows) {
  return carve_scratch(b, std::min(rows, rows_per_task(b)), nullptr, nullptr);
}

// A group of r rows makes ceil(r / most) row blocks; every row block is cut along its columns into at most
// 1 + 2 * cost / target pieces, where target is the whole cost over the wanted number of tasks.
std::size_t max_tasks(const PackedMatrix& b, std::int64_t rows, std::int64_t groups, int threads) {
  return static_cast<std::size_t>(rows / rows_per_task(b) + groups + 3 * kTasksPerThread * threads + 8);
}

std::int64_t make_tasks(const Product* products, const Group* groups, std::int64_t count, int threads, Task* tasks) {
  const auto blocks_of = [&](const Group& g) { return ceil_div(g.rows, rows_per_task(*products[g.product].b)); };
  // Multiply-adds over 2^10, streaming included.
  const auto cost_of = [&](const PackedMatrix& b, std::int64_t rows) {
    return (rows + kRowsWorthOfStreaming) * b.k * kUnit / 1024 + 1;
  };
  std::int64_t total = 0;
  for (std::int64_t i = 0; i < count; ++i) {
    if (groups[i].rows == 0) continue;
    const PackedMatrix& b = *products[groups[i].product].b;
    const std::int64_t blocks = blocks_of(groups[i]);
    total += blocks * cost_of(b, ceil_div(groups[i].rows, blocks)) * b.units;
  }
  const std::int64_t target = std::max<std::int64_t>(1, ceil_div(total, kTasksPerThread * threads));

  std::int64_t made = 0;
  for (std::int64_t i = 0; i < count; ++i) {
    const Group& g = groups[i];
    if (g.rows == 0) continue;
    const PackedMatrix& b = *products[g.product].b;
    const std::int64_t blocks = blocks_of(g), even = ceil_div(g.rows, blocks);
    const std::int64_t step = std::min(ceil_div(even, b.row_tile) * b.row_tile, rows_per_task(b));
    for (std::int64_t row = 0; row < g.rows; row += step) {
      const std::int64_t rows = std::min(step, g.rows - row), cost = cost_of(b, rows);
      const std::int64_t wanted = std::max(threads == 1 ? b.units : kMinUnits, target / cost);
      const std::int64_t pieces = ceil_div(b.units, wanted), width = ceil_div(b.units, pieces);
      for (std::int64_t u = 0; u < b.units; u += width) {
        const std::int64_t units = std::min(width, b.units - u);
        tasks[made] = {g.product,
                       g.expert,
                       g.row + row,
                       static_cast<std::int32_t>(rows),
                       static_cast<std::int32_t>(u),
                       static_cast<std::int32_t>(units),
                       static_cast<std::int32_t>(made),
                       cost * units};
        ++made;
      }
    }
  }
  std::sort(tasks, tasks + made,
            [](const Task& a, const Task& b) { return a.cost != b.cost ? a.cost > b.cost : a.order < b.order; });
  return made;
}

void run_task(const Product& p, const Task& t, std::uint8_t* scratch) {
  const PackedMatrix& b = *p.b;
  Scratch s;
  carve_scratch(b, t.rows, scratch, &s);
  gather_rows(p, t, s);

  FinishArgs f;
  f.c = s.c;
  f.rows = t.rows;
  f.integers = b.scheme.kind == SchemeKind::int8_channel;
  f.sa = s.scale;
  f.zero = p.a.zero ? s.zero : nullptr;
  f.factor = p.factor && !b.integer_scheme() ? s.factor : nullptr;
  f.gated = b.gated;
  f.activation = p.activation;
  f.out = s.out;
  f.out_dtype = p.out_dtype;
  const std::int64_t width = b.gated ? kPanel : kUnit;
  const auto step_bytes = static_cast<std::int64_t>(size_bytes(p.out_dtype)) * width;
  for (std::int64_t i = 0; i < t.rows; ++i) s.out[i] += t.unit * step_bytes;

  for (std::int64_t u = t.unit; u < t.unit + t.units; ++u) {
    multiply_unit(b, t, u, u + 1 == t.unit + t.units, s);
    const std::int64_t column = (t.expert * b.units + u) * kUnit;
    if (f.integers) f.sw = b.scale.data() + column;
    if (!b.column_sum.empty()) f.column_sum = b.column_sum.data() + column;
    if (p.bias) f.bias = p.bias + column;
    f.columns = std::min(width, b.out_columns - u * width);
    finish(f);
    for (std::int64_t i = 0; i < t.rows; ++i) s.out[i] += step_bytes;
  }
}

}  // namespace octomoe::cpu
