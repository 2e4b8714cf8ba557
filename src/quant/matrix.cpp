#include "quant/matrix.h"

#include <algorithm>
#include <atomic>
#include <vector>

#include "base/thread_pool.h"
#include "cpu/ops.h"
#include "quant/numerics.h"
#include "tensor/check.h"

namespace octomoe {

std::int64_t QuantizedMatrix::blocks_n() const { return layout_of(scheme, experts, n, k, segments).blocks_n; }
std::int64_t QuantizedMatrix::blocks_k() const { return layout_of(scheme, experts, n, k, segments).blocks_k; }
std::int64_t QuantizedMatrix::super_groups() const { return layout_of(scheme, experts, n, k, segments).super_groups; }

std::int64_t QuantizedMatrix::block_of_row(std::int64_t row) const {
  const std::int64_t half = n / segments;
  return row / half * ceil_div(half, scheme.block_n) + row % half / scheme.block_n;
}

std::size_t QuantizedMatrix::bytes() const {
  return values.bytes() + scale.bytes() + q.bytes() + column_sum.bytes() + activation_scale.bytes();
}

std::int64_t group_columns(const Scheme& scheme, std::int64_t k) {
  if (scheme.has_blocks()) return scheme.block_k;
  if (scheme.kind == SchemeKind::w4a8_fp8 && scheme.group_size > 0) return scheme.group_size;
  return std::max<std::int64_t>(k, 1);
}

MatrixLayout layout_of(const Scheme& s, std::int64_t experts, std::int64_t n, std::int64_t k, int segments) {
  MatrixLayout l{};
  l.blocks_n = s.has_blocks() ? segments * ceil_div(n / segments, s.block_n) : 0;
  l.groups_k = ceil_div(k, group_columns(s, k));
  l.blocks_k = s.has_blocks() ? l.groups_k : 0;
  l.super_groups = s.kind == SchemeKind::int8_hybrid ? ceil_div(l.blocks_k, s.super_group) : 0;
  l.values = Shape{experts, n, k};
  l.value_dtype = DType::int8;
  switch (s.kind) {
    case SchemeKind::int8_channel:
      l.scale = s.per_tensor ? Shape{experts} : Shape{experts, n};
      break;
    case SchemeKind::int8_block:
      l.scale = Shape{experts, l.blocks_n, l.blocks_k};
      break;
    case SchemeKind::int8_hybrid:
      l.scale = Shape{experts, l.blocks_n, l.super_groups};
      break;
    case SchemeKind::w4a8_fp8:
      l.value_dtype = DType::int4x2;
      l.values = Shape{experts, n, k / 2};
      l.scale = Shape{experts, n, l.groups_k};
      break;
    case SchemeKind::bf16:
      l.value_dtype = DType::bfloat16;
      break;
    case SchemeKind::fp16:
      l.value_dtype = DType::float16;
      break;
  }
  return l;
}

void check_sizes(const Scheme& s, std::int64_t experts, std::int64_t n, std::int64_t k, int segments,
                 const std::string& name) {
  check(s);
  constexpr std::int64_t kMaxK = 65536;  // 255 * 128 * K < 2^31: int32 sums cannot overflow
  const std::int64_t step = s.is_integer() ? 16 : (s.kind == SchemeKind::w4a8_fp8 ? 32 : 8);  // 16 bytes a row
  const auto got = [&] { return to_string(Shape{experts, n, k}); };
  if (experts < 1 || n < 1 || k < 1)
    bad_argument("{}: expected at least one expert, row and column, got {}", name, got());
  if (n % segments != 0) bad_argument("{}: expected an even number of rows (gate and up), got {}", name, got());
  if (k % step != 0) {
    bad_argument("{}: expected rows of a multiple of 16 bytes (K a multiple of {} in {}), got {}", name, step,
                 to_string(s.kind), got());
  }
  if (k > kMaxK) bad_argument("{}: expected K of at most {}, got {}", name, kMaxK, got());
}

Tensor to_float32(const TensorView& t, const std::string& name, const Shape& shape, bool is_scale) {
  check_defined(t, name.c_str());
  if (t.device() != Device::cpu()) return to_float32(Tensor::copy_of(t), name, shape, is_scale);
  check_dtype(t, name.c_str(), {DType::float32, DType::float16, DType::bfloat16});
  check_aligned(t, name.c_str());
  // A trailing dimension of 1 (weight_scale [N, 1]) may stand or be left out.
  std::vector<std::int64_t> have(t.shape().dims().begin(), t.shape().dims().end());
  std::vector<std::int64_t> want(shape.dims().begin(), shape.dims().end());
  const auto trim = [](std::vector<std::int64_t>& d) {
    while (d.size() > 1 && d.back() == 1) d.pop_back();
  };
  trim(have);
  trim(want);
  if (have != want) bad_argument("{}: expected shape {}, got {}", name, to_string(shape), to_string(t.shape()));
  const Tensor dense = t.is_contiguous() ? Tensor::wrap(t, nullptr) : Tensor::copy_of(t);
  Tensor out = Tensor::empty(DType::float32, shape);
  cpu::to_float(dense.view().data(), t.dtype(), out.elems(), out.as<float>());
  if (is_scale) {
    for (std::int64_t i = 0; i < out.elems(); ++i) {
      const float v = out.as<float>()[i];
      if (!(v >= 0.0f) || !num::is_finite(v)) {
        bad_argument("{}: expected finite scales of at least 0, got {} at element {}", name, v, i);
      }
    }
  }
  return out;
}

namespace {

// One expert's rows as float32, one at a time.
class RowReader {
 public:
  RowReader(const TensorView& w, std::int64_t k, const std::string& name)
      : w_(w), buffer_(static_cast<std::size_t>(k)), name_(name) {}
  // Valid until the next call. Error names expert and row of an Inf or NaN.
  const float* read(std::int64_t expert, std::int64_t row) {
    const std::int64_t size = static_cast<std::int64_t>(size_bytes(w_.dtype()));
    const char* src = w_.as<char>() + (expert * w_.strides()[0] + row * w_.strides()[1]) * size;
    const auto k = static_cast<std::int64_t>(buffer_.size());
    cpu::to_float(src, w_.dtype(), k, buffer_.data());
    if (cpu::absmax_bits(buffer_.data(), k) >= num::kInfBits) {
      std::int64_t column = 0;
      while (num::is_finite(buffer_[static_cast<std::size_t>(column)])) ++column;
      bad_argument("{}: expected finite weights, got {} at expert {}, row {}, column {}", name_,
                   buffer_[static_cast<std::size_t>(column)], expert, row, column);
    }
    return buffer_.data();
  }

 private:
  TensorView w_;
  std::vector<float> buffer_;
  std::string name_;
};

struct Job {
  const TensorView& w;
  QuantizedMatrix& m;
  const MatrixLayout& layout;
  const std::string& name;
};

void quantize_row_int8(const float* x, std::int64_t k, float inverse, std::int8_t* out) {
  cpu::quantize_int8(x, k, inverse, 0, -num::kInt8Max, num::kInt8Max, out);
}

void quantize_channel(const Job& job, std::int64_t expert, std::int64_t begin, std::int64_t end, float tensor_inverse) {
  const std::int64_t n = job.m.n, k = job.m.k;
  RowReader rows(job.w, k, job.name);
  for (std::int64_t r = begin; r < end; ++r) {
    const float* x = rows.read(expert, r);
    float inverse = tensor_inverse;
    if (inverse == 0.0f) {
      const num::GroupScale g = num::symmetric_scale(cpu::absmax_bits(x, k), num::kInt8Max);
      job.m.scale.as<float>()[expert * n + r] = g.scale;
      inverse = g.inverse;
    }
    quantize_row_int8(x, k, inverse, job.m.values.as<std::int8_t>() + (expert * n + r) * k);
  }
}

void quantize_int4(const Job& job, std::int64_t expert, std::int64_t begin, std::int64_t end) {
  const std::int64_t n = job.m.n, k = job.m.k, groups = job.layout.groups_k, width = group_columns(job.m.scheme, k);
  RowReader rows(job.w, k, job.name);
  std::vector<std::int8_t> q(static_cast<std::size_t>(k));
  for (std::int64_t r = begin; r < end; ++r) {
    const float* x = rows.read(expert, r);
    for (std::int64_t g = 0; g < groups; ++g) {
      const std::int64_t c = g * width, count = std::min(width, k - c);
      const num::GroupScale s = num::symmetric_scale(cpu::absmax_bits(x + c, count), 7.0f);
      job.m.scale.as<float>()[(expert * n + r) * groups + g] = s.scale;
      cpu::quantize_int8(x + c, count, s.inverse, 0, -7.0f, 7.0f, q.data() + c);
    }
    auto* out = job.m.values.as<std::uint8_t>() + (expert * n + r) * (k / 2);
    for (std::int64_t i = 0; i < k / 2; ++i) {
      const auto lo = static_cast<std::uint8_t>(q[static_cast<std::size_t>(2 * i)]) & 0xfu;
      const auto hi = static_cast<std::uint8_t>(q[static_cast<std::size_t>(2 * i + 1)]) & 0xfu;
      out[i] = static_cast<std::uint8_t>(lo | (hi << 4));
    }
  }
}

void convert_float(const Job& job, std::int64_t expert, std::int64_t begin, std::int64_t end) {
  const std::int64_t n = job.m.n, k = job.m.k;
  RowReader rows(job.w, k, job.name);
  for (std::int64_t r = begin; r < end; ++r) {
    const float* x = rows.read(expert, r);
    if (job.layout.value_dtype == DType::float16 && num::from_bits(cpu::absmax_bits(x, k)) >= 65520.0f) {
      bad_argument("{}: expected weights within fp16's range (65504), got {} at expert {}, row {}", job.name,
                   num::from_bits(cpu::absmax_bits(x, k)), expert, r);
    }
    cpu::from_float(x, k, job.layout.value_dtype, job.m.values.as<std::uint16_t>() + (expert * n + r) * k);
  }
}

// Rows of scale-block row nb: [begin, end).
std::pair<std::int64_t, std::int64_t> block_rows(const QuantizedMatrix& m, std::int64_t nb, std::int64_t blocks_n) {
  const std::int64_t half = m.n / m.segments, per_half = blocks_n / m.segments;
  const std::int64_t first = nb / per_half * half, begin = first + nb % per_half * m.scheme.block_n;
  return {begin, std::min(begin + m.scheme.block_n, first + half)};
}

// int8_block and int8_hybrid: one row of scale blocks.
void quantize_block_row(const Job& job, std::int64_t expert, std::int64_t nb) {
  QuantizedMatrix& m = job.m;
  const Scheme& s = m.scheme;
  const std::int64_t k = m.k, kb = job.layout.blocks_k;
  const auto [begin, end] = block_rows(m, nb, job.layout.blocks_n);
  RowReader rows(job.w, k, job.name);
  std::vector<std::uint32_t> absmax(static_cast<std::size_t>(kb), 0);
  for (std::int64_t r = begin; r < end; ++r) {
    const float* x = rows.read(expert, r);
    for (std::int64_t b = 0; b < kb; ++b) {
      const std::int64_t c = b * s.block_k;
      auto& a = absmax[static_cast<std::size_t>(b)];
      a = std::max(a, cpu::absmax_bits(x + c, std::min<std::int64_t>(s.block_k, k - c)));
    }
  }
  std::vector<float> inverse(static_cast<std::size_t>(kb));
  const std::int64_t block = expert * job.layout.blocks_n + nb;
  if (s.kind == SchemeKind::int8_block) {
    for (std::int64_t b = 0; b < kb; ++b) {
      const num::GroupScale g = num::symmetric_scale(absmax[static_cast<std::size_t>(b)], num::kInt8Max);
      m.scale.as<float>()[block * kb + b] = g.scale;
      inverse[static_cast<std::size_t>(b)] = g.inverse;
    }
  } else {
    for (std::int64_t g = 0; g < job.layout.super_groups; ++g) {
      const std::int64_t first = g * s.super_group, last = std::min<std::int64_t>(first + s.super_group, kb);
      const num::SuperScale f =
          num::super_scale(*std::max_element(absmax.begin() + first, absmax.begin() + last), s.q_max);
      m.scale.as<float>()[block * job.layout.super_groups + g] = f.f;
      for (std::int64_t b = first; b < last; ++b) {
        const num::BlockScale q = num::block_scale(f, absmax[static_cast<std::size_t>(b)], s.q_max);
        m.q.as<std::uint8_t>()[block * kb + b] = static_cast<std::uint8_t>(q.q);
        inverse[static_cast<std::size_t>(b)] = q.inverse;
      }
    }
  }
  for (std::int64_t r = begin; r < end; ++r) {
    const float* x = rows.read(expert, r);
    for (std::int64_t b = 0; b < kb; ++b) {
      const std::int64_t c = b * s.block_k;
      quantize_row_int8(x + c, std::min<std::int64_t>(s.block_k, k - c), inverse[static_cast<std::size_t>(b)],
                        m.values.as<std::int8_t>() + (expert * m.n + r) * k + c);
    }
  }
}

// Calls fn(expert, begin, end) over runs of rows.
template <class Fn>
void for_row_runs(ThreadPool& pool, std::int64_t experts, std::int64_t n, const Fn& fn) {
  constexpr std::int64_t kRows = 64;
  const std::int64_t runs = ceil_div(n, kRows);
  pool.parallel_for(experts * runs, [&](std::int64_t i, int) {
    fn(i / runs, i % runs * kRows, std::min(n, i % runs * kRows + kRows));
  });
}

}  // namespace

QuantizedMatrix quantize_matrix(const Scheme& scheme, TensorView w, int segments, int threads,
                                const std::string& name) {
  check_defined(w, name.c_str());
  if (w.device() != Device::cpu()) return quantize_matrix(scheme, Tensor::copy_of(w), segments, threads, name);
  check_dtype(w, name.c_str(), {DType::float32, DType::float16, DType::bfloat16});
  if (w.rank() != 3) bad_argument("{}: expected shape [E, N, K], got {}", name, to_string(w.shape()));
  check_rows(w, name.c_str());
  check_aligned(w, name.c_str());
  if (threads < 0 || threads > 1024) bad_argument("threads: expected 0..1024, got {}", threads);
  const std::int64_t experts = w.dim(0), n = w.dim(1), k = w.dim(2);
  check_sizes(scheme, experts, n, k, segments, name);

  const MatrixLayout layout = layout_of(scheme, experts, n, k, segments);
  QuantizedMatrix m;
  m.scheme = scheme;
  m.experts = experts;
  m.n = n;
  m.k = k;
  m.segments = segments;
  m.values = Tensor::empty(layout.value_dtype, layout.values);
  if (layout.scale.rank() > 0) m.scale = Tensor::empty(DType::float32, layout.scale);
  if (scheme.kind == SchemeKind::int8_hybrid)
    m.q = Tensor::empty(DType::uint8, {experts, layout.blocks_n, layout.blocks_k});

  ThreadPool& pool = ThreadPool::shared(threads);
  const Job job{w, m, layout, name};
  if (scheme.has_blocks()) {
    pool.parallel_for(experts * layout.blocks_n,
                      [&](std::int64_t i, int) { quantize_block_row(job, i / layout.blocks_n, i % layout.blocks_n); });
  } else if (scheme.kind == SchemeKind::int8_channel && scheme.per_tensor) {
    std::vector<std::atomic<std::uint32_t>> absmax(static_cast<std::size_t>(experts));
    for_row_runs(pool, experts, n, [&](std::int64_t e, std::int64_t begin, std::int64_t end) {
      RowReader rows(w, k, name);
      std::uint32_t top = 0;
      for (std::int64_t r = begin; r < end; ++r) top = std::max(top, cpu::absmax_bits(rows.read(e, r), k));
      auto& a = absmax[static_cast<std::size_t>(e)];
      std::uint32_t seen = a.load();
      while (seen < top && !a.compare_exchange_weak(seen, top)) {
      }
    });
    for_row_runs(pool, experts, n, [&](std::int64_t e, std::int64_t begin, std::int64_t end) {
      const num::GroupScale g = num::symmetric_scale(absmax[static_cast<std::size_t>(e)].load(), num::kInt8Max);
      if (begin == 0) m.scale.as<float>()[e] = g.scale;
      quantize_channel(job, e, begin, end, g.inverse);
    });
  } else {
    for_row_runs(pool, experts, n, [&](std::int64_t e, std::int64_t begin, std::int64_t end) {
      switch (scheme.kind) {
        case SchemeKind::int8_channel:
          return quantize_channel(job, e, begin, end, 0.0f);
        case SchemeKind::w4a8_fp8:
          return quantize_int4(job, e, begin, end);
        default:
          return convert_float(job, e, begin, end);
      }
    });
  }
  finish_matrix(m, name, threads);
  return m;
}

namespace {

// K-blocks of a chunk: as few chunks, as equal as can be, as int32 sums allow (docs/schemes.md section 5).
int prove_flush_blocks(const QuantizedMatrix& m, const std::string& name, ThreadPool& pool) {
  const std::int64_t kb = m.blocks_k(), nb = m.blocks_n();
  const std::int64_t group = std::min<std::int64_t>(m.scheme.super_group, kb);
  std::vector<std::int64_t> candidates{group};  // falling
  for (std::int64_t chunks = 2; candidates.back() > 1; ++chunks) {
    const std::int64_t s = ceil_div(group, chunks);
    if (s < candidates.back()) candidates.push_back(s);
  }
  std::vector<std::atomic<std::int64_t>> worst(candidates.size());
  for_row_runs(pool, m.experts, m.n, [&](std::int64_t e, std::int64_t begin, std::int64_t end) {
    std::vector<std::int64_t> prefix(static_cast<std::size_t>(kb) + 1, 0);
    IntegerRows rows(m);
    for (std::int64_t r = begin; r < end; ++r) {
      const std::int8_t* w = rows.read(e, r);
      const std::uint8_t* q = m.q.as<std::uint8_t>() + (e * nb + m.block_of_row(r)) * kb;
      for (std::int64_t b = 0; b < kb; ++b) {
        const std::int64_t c = b * m.scheme.block_k, count = std::min<std::int64_t>(m.scheme.block_k, m.k - c);
        std::int32_t l1 = 0;
        for (std::int64_t i = 0; i < count; ++i) l1 += std::abs(static_cast<std::int32_t>(w[c + i]));
        prefix[static_cast<std::size_t>(b) + 1] = prefix[static_cast<std::size_t>(b)] + std::int64_t{q[b]} * l1;
      }
      for (std::size_t i = 0; i < candidates.size(); ++i) {
        std::int64_t top = 0;
        for (std::int64_t g = 0; g < kb; g += m.scheme.super_group) {
          const std::int64_t last = std::min<std::int64_t>(g + m.scheme.super_group, kb);
          for (std::int64_t b = g; b < last; b += candidates[i]) {
            const std::int64_t stop = std::min(b + candidates[i], last);
            top = std::max(top, prefix[static_cast<std::size_t>(stop)] - prefix[static_cast<std::size_t>(b)]);
          }
        }
        std::int64_t seen = worst[i].load();
        while (seen < top && !worst[i].compare_exchange_weak(seen, top)) {
        }
      }
    }
  });
  for (std::size_t i = 0; i < candidates.size(); ++i) {
    // 128: a caller's own activations may hold -128.
    if (128 * m.scheme.q_max * worst[i].load() < (std::int64_t{1} << 31)) return static_cast<int>(candidates[i]);
  }
  bad_argument(
      "{}: expected integer scales with which one block of {} columns fits int32, got q_max {}: choose a smaller one",
      name, m.scheme.block_k, m.scheme.q_max);
}

}  // namespace

void finish_matrix(QuantizedMatrix& m, const std::string& name, int threads) {
  check_sizes(m.scheme, m.experts, m.n, m.k, m.segments, name);
  check_layout(m, name);
  if (m.values.device() != Device::cpu() && (m.scheme.kind == SchemeKind::int8_hybrid || m.scheme.asymmetric)) {
    QuantizedMatrix host = m;
    host.values = Tensor::copy_of(m.values);
    finish_matrix(host, name, threads);
    m.flush_blocks = host.flush_blocks;
    m.column_sum = host.column_sum;
    return;
  }
  ThreadPool& pool = ThreadPool::shared(threads);
  if (m.scheme.kind == SchemeKind::int8_hybrid) {
    const std::uint8_t* q = m.q.as<std::uint8_t>();
    for (std::int64_t i = 0; i < m.q.elems(); ++i) {
      if (q[i] < 1 || q[i] > m.scheme.q_max) {
        bad_argument("{} q: expected integer scales in 1..{}, got {} at element {}", name, m.scheme.q_max, q[i], i);
      }
    }
    m.flush_blocks = prove_flush_blocks(m, name, pool);
  }
  if (m.scheme.asymmetric) {
    m.column_sum = Tensor::empty(DType::int32, {m.experts, m.n});
    for_row_runs(pool, m.experts, m.n, [&](std::int64_t e, std::int64_t begin, std::int64_t end) {
      IntegerRows rows(m);
      for (std::int64_t r = begin; r < end; ++r) {
        const std::int8_t* w = rows.read(e, r);
        std::int32_t sum = 0;
        for (std::int64_t i = 0; i < m.k; ++i) sum += w[i];
        m.column_sum.as<std::int32_t>()[e * m.n + r] = sum;
      }
    });
  }
}

Tensor dequantize(const QuantizedMatrix& m, int threads) {
  if (m.values.device() != Device::cpu()) {
    QuantizedMatrix host = m;
    host.values = Tensor::copy_of(m.values);
    return dequantize(host, threads);
  }
  const MatrixLayout layout = layout_of(m.scheme, m.experts, m.n, m.k, m.segments);
  Tensor out = Tensor::empty(DType::float32, {m.experts, m.n, m.k});
  const std::int64_t width = group_columns(m.scheme, m.k);
  for_row_runs(ThreadPool::shared(threads), m.experts, m.n, [&](std::int64_t e, std::int64_t begin, std::int64_t end) {
    IntegerRows rows(m);
    for (std::int64_t r = begin; r < end; ++r) {
      const std::int64_t row = e * m.n + r;
      const std::int8_t* integers = m.scheme.is_integer() ? rows.read(e, r) : nullptr;
      float* dst = out.as<float>() + row * m.k;
      if (!m.scheme.is_integer() && m.scheme.kind != SchemeKind::w4a8_fp8) {
        cpu::to_float(m.values.as<std::uint16_t>() + row * m.k, m.values.dtype(), m.k, dst);
        continue;
      }
      for (std::int64_t g = 0; g < layout.groups_k; ++g) {
        float s = 0;
        const std::int64_t block = m.scheme.has_blocks() ? e * layout.blocks_n + m.block_of_row(r) : 0;
        switch (m.scheme.kind) {
          case SchemeKind::int8_channel:
            s = m.scale.as<float>()[m.scheme.per_tensor ? e : row];
            break;
          case SchemeKind::int8_block:
            s = m.scale.as<float>()[block * layout.blocks_k + g];
            break;
          case SchemeKind::int8_hybrid:
            s = static_cast<float>(m.q.as<std::uint8_t>()[block * layout.blocks_k + g]) *
                m.scale.as<float>()[block * layout.super_groups + g / m.scheme.super_group];
            break;
          default:
            s = m.scale.as<float>()[row * layout.groups_k + g];
            break;
        }
        for (std::int64_t c = g * width; c < std::min(m.k, (g + 1) * width); ++c) {
          int v = 0;
          if (m.scheme.is_integer()) {
            v = integers[c];
          } else {
            const int byte = m.values.as<std::uint8_t>()[row * (m.k / 2) + c / 2];
            v = ((c % 2 ? byte >> 4 : byte & 0xf) ^ 8) - 8;
          }
          dst[c] = static_cast<float>(v) * s;
        }
      }
    }
  });
  return out;
}

}  // namespace octomoe
