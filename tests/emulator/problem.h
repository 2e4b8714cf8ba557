// Grouped GEMMs for the emulator: random problems, and docs/schemes.md section 3 as plain loops over the very arguments
// that the kernel takes.
#pragma once

#include <gtest/gtest.h>
#include <sys/mman.h>

#include "emulator/kernels.h"
#include "quant/numerics.h"
#include "support/sanitizer.h"

namespace octomoe::emulator {

inline std::string describe(const Schedule& s) {
  return std::string(s.late_copies ? "late" : "early") + " copies, " + (s.late_products ? "late" : "early") +
         " products, seed " + std::to_string(s.seed);
}
inline std::vector<Schedule> schedules(std::uint32_t seed) {
  if (test::kAddressSanitizer) return {{true, true, 2 * seed + 1}};  // ten times slower, and addresses are the same
  return {{true, true, 0},
          {false, false, 2 * seed},
          {true, true, 2 * seed + 1},
          {true, false, 2 * seed + 3},
          {false, true, 2 * seed + 5}};
}

// Memory that ends where it says: a page follows that nobody may touch.
template <class T>
class Memory {
 public:
  explicit Memory(std::size_t count = 0) : count_(count) {
    if (count == 0) return;
    bytes_ = (count * sizeof(T) + 4095) / 4096 * 4096;
    base_ = mmap(nullptr, bytes_ + 4096, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (base_ == MAP_FAILED) throw std::bad_alloc();
    mprotect(static_cast<char*>(base_) + bytes_, 4096, PROT_NONE);
  }
  ~Memory() {
    if (base_ != nullptr) munmap(base_, bytes_ + 4096);
  }
  Memory(Memory&& from) noexcept { *this = std::move(from); }
  Memory& operator=(Memory&& from) noexcept {
    std::swap(count_, from.count_);
    std::swap(bytes_, from.bytes_);
    std::swap(base_, from.base_);
    return *this;
  }
  // Where the count is no multiple of 16 bytes, the last of them can be read: so it is on a GPU.
  T* data() const {
    return base_ == nullptr
               ? nullptr
               : reinterpret_cast<T*>(static_cast<char*>(base_) + bytes_ - (count_ * sizeof(T) + 15) / 16 * 16);
  }
  std::size_t size() const { return count_; }
  T& operator[](std::size_t i) const { return data()[i]; }
  template <class Make>
  static Memory of(std::size_t count, const Make& make) {
    Memory m(count);
    for (std::size_t i = 0; i < count; ++i) m[i] = static_cast<T>(make());
    return m;
  }

 private:
  std::size_t count_ = 0, bytes_ = 0;
  void* base_ = nullptr;
};

struct GemmCase {
  kernels::Promotion promotion = kernels::Promotion::channel;
  bool gated = false, quantized = false;  // quantised: h to int8 and a scale per 128 columns
  std::vector<int> rows;                  // of each expert
  int n = 256, k = 256;
  int segments = 1, block_n = 128, block_k = 128, super_group = 256, flush_blocks = 256;
  kernels::OutType out = kernels::OutType::bf16;
  bool gather = false, masked = false, zero_points = false, per_tensor = false, bias = false, row_factor = false,
       up_first = false, scales_by_row = false;
  float limit = std::bit_cast<float>(0x7f800000u);
  bool extreme = false;  // blocks: scales and row factors that make some rows of h zero, tiny, Inf and NaN
  bool panels = false;   // of weights
  // Rows are added to those of out, a few to one, with values of which every sum is exact in whatever order.
  bool adds = false;
  // Instead of the experts' offsets: what is computed is of no interest then, only where it goes.
  std::vector<std::int32_t> wrong_offsets{};
  std::vector<std::int32_t> early_offsets{};  // what the offsets are while the launch before has not ended
  std::uint32_t seed = 1;
};

struct GemmProblem {
  static constexpr float kUntouched = 0x1.a5a5p+10f;
  GemmCase c;
  kernels::GemmArgs args{};
  Memory<std::int8_t> a, w, panels;
  Memory<float> a_scale, w_scale, row_factor, bias, out_scale;
  Memory<std::int32_t> a_q, a_zero, column_sum, offsets, row_source, taken, add_to;
  Memory<float> add_weight;
  Memory<float> a_scale_by_row;
  Memory<std::uint8_t> w_q, a_q_by_row, out;
  std::int64_t out_rows = 0, width = 0;

  explicit GemmProblem(const GemmCase& with) : c(with) {
    std::mt19937 rng(c.seed);
    const auto byte = [&] {
      if (c.adds) return rng() % 14 != 0 ? 0 : rng() % 2 != 0 ? 1 : -1;
      return static_cast<int>(rng() % 256) - 128;
    };
    const auto scale = [&] {
      return c.adds ? (rng() % 2 != 0 ? 1.0f : 0.5f) : 0.001f + 0.00001f * static_cast<float>(rng() % 1000);
    };
    const auto experts = static_cast<int>(c.rows.size());
    const auto count = [](std::int64_t a, std::int64_t b = 1, std::int64_t d = 1) {
      return static_cast<std::size_t>(a * b * d);
    };
    int rows = 0, most = 0;
    offsets = Memory<std::int32_t>(count(experts + (c.masked ? 0 : 1)));
    for (int e = 0; e < experts; ++e) {
      offsets[count(e)] = c.masked ? c.rows[count(e)] : rows;
      rows += c.rows[count(e)];
      most = std::max(most, c.rows[count(e)]);
    }
    if (c.masked) {
      most += 3;
      rows = experts * most;
    } else {
      offsets[count(experts)] = rows;
    }
    for (std::size_t i = 0; i < c.wrong_offsets.size(); ++i) offsets[i] = c.wrong_offsets[i];
    const int a_rows = c.gather ? rows / 2 + 1 : rows;
    const bool blocks = c.promotion >= kernels::Promotion::block;
    const int blocks_k = (c.k + c.block_k - 1) / c.block_k, super = (blocks_k + c.super_group - 1) / c.super_group;
    const int per_segment = (c.n / c.segments + c.block_n - 1) / c.block_n, blocks_n = c.segments * per_segment;
    a = Memory<std::int8_t>::of(count(a_rows, c.k), byte);
    w = Memory<std::int8_t>::of(count(experts, c.n, c.k), byte);
    a_scale = Memory<float>::of(count(c.promotion == kernels::Promotion::block ? blocks_k
                                      : blocks                                 ? super
                                                                               : 1,
                                      a_rows),
                                scale);
    w_scale = Memory<float>::of(
        !blocks ? count(experts, c.per_tensor ? 1 : c.n)
                : count(experts, blocks_n, c.promotion == kernels::Promotion::block ? blocks_k : super),
        scale);
    const auto integer_scale = [&] { return 1 + rng() % (c.adds ? 2 : 16); };
    if (c.promotion >= kernels::Promotion::hybrid) {
      a_q = Memory<std::int32_t>::of(count(blocks_k, a_rows), integer_scale);
      w_q = Memory<std::uint8_t>::of((count(experts, blocks_n, blocks_k) + 3) / 4 * 4, integer_scale);
    }
    if (c.zero_points) {
      a_zero = Memory<std::int32_t>::of(count(a_rows), byte);
      column_sum = Memory<std::int32_t>(count(experts, c.n));
      for (std::size_t r = 0; r < column_sum.size(); ++r) {
        column_sum[r] = 0;
        for (int i = 0; i < c.k; ++i) column_sum[r] += w[r * count(c.k) + count(i)];
      }
    }
    if (c.gather)
      row_source = Memory<std::int32_t>::of(count(rows), [&] { return rng() % static_cast<unsigned>(a_rows); });
    if (c.row_factor)
      row_factor = Memory<float>::of(count(rows), [&] { return 0.1f + static_cast<float>(rng() % 97) * 0.01f; });
    if (c.extreme) {
      constexpr float kFactors[] = {0x1p-140f, 0x1p-70f, 0x1p60f, 0x1p100f, 0x1p127f, 0.0f, 1.0f};
      row_factor = Memory<float>::of(count(rows), [&] { return kFactors[rng() % std::size(kFactors)]; });
    }
    if (c.bias) bias = Memory<float>::of(count(experts, c.n), [&] { return static_cast<float>(byte()) * 0.37f; });
    width = c.gated ? c.n / 2 : c.n;
    out_rows = rows;
    out = Memory<std::uint8_t>(count(rows, width + 16, elem_bytes()));
    if (c.quantized) out_scale = Memory<float>(count((width + 127) / 128, rows));
    taken = Memory<std::int32_t>(1);
    taken[0] = 0;
    if (c.adds) {
      const auto to = static_cast<unsigned>(rows / 3 + 1);
      if (c.seed % 3 != 2) add_to = Memory<std::int32_t>::of(count(rows), [&] { return rng() % to; });
      if (c.seed % 3 != 1) add_weight = Memory<float>::of(count(rows), scale);
    }
    clear();
    if (c.panels) {
      panels = Memory<std::int8_t>(w.size());
      const std::size_t n = count(c.n), k = count(c.k);
      for (std::size_t i = 0; i < w.size(); ++i) {
        const std::size_t row = i / k, column = i % k;
        panels[row / n * n * k + column / 128 * n * 128 + row % n * 128 + column % 128] = w[i];
      }
    }
    if (c.scales_by_row) {
      const auto of = count(a_rows), each = count(blocks_k);
      const std::size_t groups = c.promotion == kernels::Promotion::block ? each : count(super);
      a_scale_by_row = Memory<float>(groups * of);
      for (std::size_t i = 0; i < groups * of; ++i) a_scale_by_row[i] = a_scale[i % groups * of + i / groups];
      a_q_by_row = Memory<std::uint8_t>(a_q.size() > 0 ? (each * of + 3) / 4 * 4 : 0);
      for (std::size_t i = 0; i < a_q.size(); ++i) {
        a_q_by_row[i] = static_cast<std::uint8_t>(a_q[i % each * of + i / each]);
      }
    }
    args = {.a = a.data(),
            .w = c.panels ? panels.data() : w.data(),
            .a_rows = a_rows,
            .a_scale = a_scale_by_row.size() > 0 ? a_scale_by_row.data() : a_scale.data(),
            .w_scale = w_scale.data(),
            .a_q = a_q_by_row.size() > 0 ? reinterpret_cast<const std::int32_t*>(a_q_by_row.data()) : a_q.data(),
            .scales_by_row = c.scales_by_row,
            .w_q = w_q.data(),
            .a_zero = a_zero.data(),
            .column_sum = column_sum.data(),
            .expert_offsets = offsets.data(),
            .offsets_limit =
                !c.masked && (c.seed % 2 == 0 || !c.wrong_offsets.empty() || !c.early_offsets.empty()) ? rows : 0,
            .taken = c.seed % 4 == 3 ? nullptr : taken.data(),
            .row_source = row_source.data(),
            .row_factor = row_factor.data(),
            .bias = bias.data(),
            .out = out.data(),
            .out_stride = width + 16,
            .out_type = c.out,
            .experts = experts,
            .n = c.n,
            .k = c.k,
            .w_row = c.panels ? 128 : c.k,
            .w_panel = c.panels ? c.n * 128 : 128,
            .masked_rows = c.masked ? most : 0,
            .w_scale_per_tensor = c.per_tensor,
            .block_n = c.block_n,
            .block_k = c.block_k,
            .blocks_n = blocks_n,
            .blocks_k = blocks_k,
            .segments = c.segments,
            .super_group = c.super_group,
            .flush_blocks = c.flush_blocks,
            .up_first = c.up_first,
            .limit = c.limit,
            .out_rows = out_rows,
            .out_scale = out_scale.data(),
            .out_hint = kernels::kEvictNormal,
            .add_to = add_to.data(),
            .add_weight = add_weight.data()};
  }

  int elem_bytes() const { return c.quantized ? 1 : !c.gated && c.out == kernels::OutType::f32 ? 4 : 2; }
  void clear() {
    std::fill_n(out.data(), out.size(), std::uint8_t{0xa5});
    std::fill_n(out_scale.data(), out_scale.size(), kUntouched);
    for (std::int64_t i = 0; c.adds && i < out_rows * width; ++i) {
      put(out.data(), i / width, i % width, static_cast<float>(i % 3));
    }
  }
  // A value of out, as bf16 or fp16.
  std::uint8_t* place(std::uint8_t* all, std::int64_t row, std::int64_t column) const {
    return all + (row * (width + 16) + column) * elem_bytes();
  }
  void put(std::uint8_t* all, std::int64_t row, std::int64_t column, float v) const {
    const std::uint16_t h = c.gated || c.out == kernels::OutType::bf16 ? num::float_to_bf16(v) : num::float_to_fp16(v);
    std::memcpy(place(all, row, column), &h, 2);
  }

  // v of an output row and a weight row of expert e, bias included.
  float value(int e, std::int64_t row, int weight_row) const {
    using kernels::Promotion;
    const kernels::GemmArgs& g = args;
    const std::int64_t from = g.row_source != nullptr ? g.row_source[row] : row;
    const std::int8_t* x = g.a + from * g.k;
    const std::int8_t* y = w.data() + (std::int64_t{e} * g.n + weight_row) * g.k;
    const auto sum = [&](int begin, int end) {
      std::int32_t s = 0;
      for (int i = begin; i < end; ++i) s += x[i] * y[i];
      return s;
    };
    const float factor = g.row_factor != nullptr ? g.row_factor[row] : 1.0f;
    const int part = g.n / g.segments;
    const std::int64_t block =
        std::int64_t{e} * g.blocks_n + weight_row / part * (g.blocks_n / g.segments) + weight_row % part / g.block_n;
    float v = 0.0f;
    if (c.promotion == Promotion::channel) {
      std::int32_t acc = sum(0, g.k);
      if (g.a_zero != nullptr) acc -= g.a_zero[from] * g.column_sum[std::int64_t{e} * g.n + weight_row];
      const float s = g.w_scale[g.w_scale_per_tensor ? e : std::int64_t{e} * g.n + weight_row];
      v = static_cast<float>(acc) * (s * (a_scale[static_cast<std::size_t>(from)] * factor));
    } else if (c.promotion == Promotion::block) {
      for (int b = 0; b < g.blocks_k; ++b) {
        const auto partial = static_cast<float>(sum(b * g.block_k, std::min(g.k, (b + 1) * g.block_k)));
        const float p =
            g.w_scale[block * g.blocks_k + b] * (a_scale[static_cast<std::size_t>(b * g.a_rows + from)] * factor);
        v = b == 0 ? partial * p : std::fma(partial, p, v);
      }
    } else {
      const int super = (g.blocks_k + g.super_group - 1) / g.super_group;
      std::int32_t acc = 0;
      bool first = true;
      for (int b = 0, in_chunk = 0; b < g.blocks_k; ++b) {
        acc += a_q[static_cast<std::size_t>(b * g.a_rows + from)] * g.w_q[block * g.blocks_k + b] *
               sum(b * g.block_k, std::min(g.k, (b + 1) * g.block_k));
        ++in_chunk;
        if (b + 1 < g.blocks_k && (b + 1) % g.super_group != 0 && in_chunk < g.flush_blocks) continue;
        const int sg = b / g.super_group;
        const float p =
            g.w_scale[block * super + sg] * (a_scale[static_cast<std::size_t>(sg * g.a_rows + from)] * factor);
        v = first ? static_cast<float>(acc) * p : std::fma(static_cast<float>(acc), p, v);
        first = false;
        acc = in_chunk = 0;
      }
    }
    return g.bias != nullptr ? v + g.bias[std::int64_t{e} * g.n + weight_row] : v;
  }

  // Bytes of out as they must become: outside of the experts' rows, as they were. scales: the same of out_scale.
  std::vector<std::uint8_t> expected(std::vector<float>& scales) const {
    std::vector<std::uint8_t> to(out.size(), 0xa5);
    scales.assign(out_scale.size(), kUntouched);
    std::vector<float> values(static_cast<std::size_t>(width));  // of a row that is quantised
    if (c.adds) {
      expect_sums(to);
      return to;
    }
    for (int e = 0; e < args.experts; ++e) {
      const std::int64_t begin = c.masked ? std::int64_t{e} * args.masked_rows : args.expert_offsets[e];
      for (std::int64_t row = begin; row < begin + c.rows[static_cast<std::size_t>(e)]; ++row) {
        for (int column = 0; column < width; ++column) {
          float v;
          if (c.gated) {
            const int half = args.n / 2;
            float g = value(e, row, column + (args.up_first ? half : 0));
            float u = value(e, row, column + (args.up_first ? 0 : half));
            if (g > args.limit) g = args.limit;
            u = num::clamp(u, -args.limit, args.limit);
            v = num::silu(g) * u;
          } else {
            v = value(e, row, column);
          }
          if (c.quantized) {
            values[static_cast<std::size_t>(column)] = num::bf16_to_float(num::float_to_bf16(v));
            continue;
          }
          if (elem_bytes() == 4) {
            std::memcpy(place(to.data(), row, column), &v, 4);
          } else {
            put(to.data(), row, column, v);
          }
        }
        for (int begin = 0; c.quantized && begin < width; begin += 128) {
          const std::span<const float> group(values.data() + begin,
                                             static_cast<std::size_t>(std::min<std::int64_t>(128, width - begin)));
          std::uint32_t top = 0;
          for (const float v : group) top = std::max(top, num::abs_bits(v));
          const num::GroupScale scale = num::symmetric_scale(top, num::kInt8Max);
          scales[static_cast<std::size_t>(begin / 128 * out_rows + row)] = scale.scale;
          for (std::size_t i = 0; i < group.size(); ++i) {
            const std::int32_t q = num::quantize(group[i], scale.inverse, 0, -num::kInt8Max, num::kInt8Max);
            to[static_cast<std::size_t>(row * args.out_stride + begin) + i] = static_cast<std::uint8_t>(q);
          }
        }
      }
    }
    return to;
  }

  // Sums of rows and what out held before: exact, or the problem is a wrong one.
  void expect_sums(std::vector<std::uint8_t>& to) const {
    std::vector<float> sums(static_cast<std::size_t>(out_rows * width));
    for (std::size_t i = 0; i < sums.size(); ++i) sums[i] = static_cast<float>(i % 3);
    float most = 0.0f;  // what the additions pass by
    for (int e = 0; e < args.experts; ++e) {
      for (std::int64_t row = args.expert_offsets[e]; row < args.expert_offsets[e + 1]; ++row) {
        const std::int64_t at = args.add_to != nullptr ? args.add_to[row] : row;
        const float weight = args.add_weight != nullptr ? args.add_weight[row] : 1.0f;
        for (int column = 0; column < width; ++column) {
          float& sum = sums[static_cast<std::size_t>(at * width + column)];
          const float v = weight * value(e, row, column);
          sum += v;
          most = std::max({most, std::abs(sum), std::abs(v)});
          ASSERT_EQ(v * 8.0f, std::rint(v * 8.0f));
        }
      }
    }
    ASSERT_LE(most, 32.0f) << "problem " << c.seed;  // eight bits, of which three behind the point
    for (std::size_t i = 0; i < sums.size(); ++i) {
      put(to.data(), static_cast<std::int64_t>(i) / width, static_cast<std::int64_t>(i) % width, sums[i]);
    }
  }

  // Runs run(args, schedule) and compares every byte of out and out_scale.
  template <class Run>
  void check(const Run& run) {
    std::vector<float> scales;
    const std::vector<std::uint8_t> want = c.wrong_offsets.empty() ? expected(scales) : std::vector<std::uint8_t>();
    for (const Schedule& s : schedules(c.seed)) {
      clear();
      try {
        run(args, s);
      } catch (const Fault& fault) {
        FAIL() << describe(s) << ": " << fault.what();
      }
      EXPECT_EQ(taken[0], 0) << describe(s) << ": left for the next launch";
      if (!c.wrong_offsets.empty()) continue;
      std::size_t wrong = 0, first = 0;
      for (std::size_t i = want.size(); i-- > 0;) {
        if (out[i] != want[i]) {
          ++wrong;
          first = i;
        }
      }
      const auto at = static_cast<std::int64_t>(first) / elem_bytes();
      ASSERT_EQ(wrong, 0u) << "problem " << c.seed << ", " << describe(s) << ": bytes differ, the first in row "
                           << at / args.out_stride << ", column " << at % args.out_stride;
      for (std::size_t i = 0; i < scales.size(); ++i) {
        ASSERT_EQ(num::bits(out_scale[i]), num::bits(scales[i]))
            << "problem " << c.seed << ", " << describe(s) << ": scale of block "
            << static_cast<std::int64_t>(i) / out_rows << ", row " << static_cast<std::int64_t>(i) % out_rows;
      }
    }
  }
};

}  // namespace octomoe::emulator
