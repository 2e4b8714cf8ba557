// grouped_gemm on the CPU: rows of the caller, quantised here or by him, times a packed matrix.
#include <algorithm>
#include <utility>

#include "base/thread_pool.h"
#include "cpu/carver.h"
#include "cpu/gemm.h"
#include "cpu/isa.h"
#include "cpu/ops.h"
#include "layer/backend.h"
#include "quant/matrix.h"

namespace octomoe::cpu {
namespace {

constexpr std::int64_t kQuantizedRows = 32768;  // rows that are quantised before they are multiplied

std::int64_t index_at(const TensorView& t, std::int64_t i) {
  const std::int64_t offset = i * t.strides()[0];
  return t.dtype() == DType::int32 ? t.as<std::int32_t>()[offset] : t.as<std::int64_t>()[offset];
}

class CpuMatrix final : public MatrixBackend {
 public:
  CpuMatrix(const QuantizedMatrix& m, int threads) : pool_(threads) {
    PackOptions options;
    options.isa = best_isa();
    matrix_ = pack(m, options, pool_);
  }

  std::size_t workspace_bytes(std::int64_t /*rows*/) const override { return 0; }
  void gemm(const GemmArgs& args) override {
    const FloatEnv env;
    const std::int64_t experts = matrix_.experts;
    const bool masked = args.groups.layout == Groups::Layout::masked;
    const auto first_row = [&](std::int64_t e) { return masked ? 0 : index_at(args.groups.index, e); };
    const auto row_count = [&](std::int64_t e) {
      return masked ? index_at(args.groups.index, e) : index_at(args.groups.index, e + 1) - first_row(e);
    };
    std::int64_t total = 0;
    for (std::int64_t e = 0; e < experts; ++e) total += row_count(e);
    if (total == 0) return;

    const Call call{&args, masked, adopts_rows(args.a.values.dtype())};
    const std::int64_t chunk = call.adopted ? total : std::min(total, kQuantizedRows);
    Buffers b;
    const std::size_t bytes = carve(chunk, call.adopted, nullptr, nullptr);
    if (bytes > workspace_.size()) {
      workspace_ = {};
      workspace_ = HugeBuffer(bytes);
    }
    carve(chunk, call.adopted, workspace_.as<std::uint8_t>(), &b);
    if (args.bias.defined()) copy_bias(args.bias, b.bias);

    // Pieces of groups until a chunk is full.
    std::int64_t used = 0, pieces = 0;
    const auto flush = [&] {
      if (pieces > 0) run(call, b, pieces);
      used = pieces = 0;
    };
    for (std::int64_t e = 0; e < experts; ++e) {
      const std::int64_t rows = row_count(e);
      for (std::int64_t done = 0; done < rows;) {
        if (used == chunk) flush();
        const std::int64_t count = std::min(rows - done, chunk - used);
        b.pieces[pieces] = {e, first_row(e) + done, count, used};
        b.groups[pieces] = {static_cast<std::int32_t>(pieces), static_cast<std::int32_t>(e), 0, count};
        ++pieces;
        used += count;
        done += count;
      }
    }
    flush();
  }

 private:
  // `count` rows of expert e from `row` (masked: of that expert's own rows); `place`: in the chunk.
  struct Piece {
    std::int64_t expert, row, count, place;
  };
  struct Call {
    const GemmArgs* args;
    bool masked;
    bool adopted;  // the caller's rows are what the kernels multiply: nothing to quantise
  };
  struct Buffers {
    std::uint8_t* threads;
    std::size_t thread_bytes;
    RowSet rows;
    Piece* pieces;
    Group* groups;
    Product* products;
    Task* tasks;
    float* bias;
  };

  bool adopts_rows(DType dtype) const {
    switch (matrix_.scheme.kind) {
      case SchemeKind::bf16:
        return dtype == DType::bfloat16;
      case SchemeKind::fp16:
        return dtype == DType::float16;
      case SchemeKind::w4a8_fp8:
        return dtype == DType::float8_e4m3;
      default:
        return dtype == DType::int8;
    }
  }

  std::size_t carve(std::int64_t rows, bool adopted, std::uint8_t* base, Buffers* out) const {
    Carver c(base);
    Buffers b{};
    const std::int64_t pieces = matrix_.experts + 1;
    const auto floats = static_cast<std::size_t>(round_up(matrix_.k, 16)) * sizeof(float);
    b.thread_bytes = std::max(scratch_bytes(matrix_, rows), floats);
    b.threads = c.take<std::uint8_t>(static_cast<std::int64_t>(b.thread_bytes) * pool_.threads());
    if (!adopted) {
      auto* at = c.take<std::uint8_t>(static_cast<std::int64_t>(row_set_bytes(matrix_, rows)));
      if (base) b.rows = lay_out_rows(matrix_, rows, at);
    }
    b.pieces = c.take<Piece>(pieces);
    b.groups = c.take<Group>(pieces);
    b.products = c.take<Product>(pieces);
    b.tasks = c.take<Task>(static_cast<std::int64_t>(max_tasks(matrix_, rows, pieces, pool_.threads())));
    b.bias = c.take<float>(matrix_.experts * matrix_.units * kUnit);
    if (out) *out = b;
    return c.used();
  }

  void copy_bias(const TensorView& bias, float* packed) const {
    const std::int64_t columns = matrix_.units * kUnit;
    for (std::int64_t e = 0; e < matrix_.experts; ++e) {
      const float* row = bias.as<float>() + e * bias.strides()[0];
      std::copy_n(row, matrix_.n, packed + e * columns);
      std::fill_n(packed + e * columns + matrix_.n, columns - matrix_.n, 0.0f);
    }
  }

  // The first row of a piece in the caller's tensor [R, ...] or [E, max_rows, ...].
  static std::uint8_t* row_of(const TensorView& t, bool masked, const Piece& p) {
    const std::int64_t offset = masked ? p.expert * t.strides()[0] + p.row * t.strides()[1] : p.row * t.strides()[0];
    return t.as<std::uint8_t>() + offset * static_cast<std::int64_t>(size_bytes(t.dtype()));
  }
  static std::int64_t row_bytes(const TensorView& t, bool masked) {
    return t.strides()[masked ? 1 : 0] * static_cast<std::int64_t>(size_bytes(t.dtype()));
  }

  // The caller's own quantised rows.
  RowSet adopt(const Call& call, const Piece& p) const {
    static const float one = 1.0f;
    const Activations& a = call.args->a;
    const Scheme& s = matrix_.scheme;
    const std::int64_t flat = call.masked ? p.expert * a.values.dim(1) + p.row : p.row;  // scales are contiguous
    RowSet set;
    set.values = row_of(a.values, call.masked, p);
    set.stride_bytes = row_bytes(a.values, call.masked);
    set.scale_stride = matrix_.row_scales();
    if (set.scale_stride == 0) return set;
    if (s.activation_scale == ActivationScale::dynamic) {
      set.scale = a.scale.as<float>() + flat * set.scale_stride;
    } else {
      set.scale_stride = 0;
      set.scale = const_cast<float*>(&one);
      if (s.activation_scale == ActivationScale::static_)
        set.scale = a.scale.as<float>() + (s.is_integer() ? 0 : p.expert);
    }
    if (s.kind == SchemeKind::int8_hybrid) set.q = a.q.as<std::uint8_t>() + flat * matrix_.blocks;
    if (s.asymmetric) set.zero = a.zero.as<std::int32_t>() + flat;
    return set;
  }

  // The chunk's rows from `place` on.
  RowSet quantized(const Buffers& b, std::int64_t place) const {
    RowSet set = b.rows;
    set.values += place * set.stride_bytes;
    if (set.scale) set.scale += place * set.scale_stride;
    if (set.q) set.q += place * matrix_.blocks;
    if (set.zero) set.zero += place;
    return set;
  }

  void quantize_piece(const Call& call, const Piece& p, Buffers& b) {
    const TensorView& a = call.args->a.values;
    const std::uint8_t* first = row_of(a, call.masked, p);
    const std::int64_t stride = row_bytes(a, call.masked);
    pool_.parallel_for(p.count, [&](std::int64_t i, int thread) {
      const FloatEnv env;
      auto* row = reinterpret_cast<float*>(b.threads + b.thread_bytes * static_cast<std::size_t>(thread));
      to_float(first + i * stride, a.dtype(), matrix_.k, row);
      quantize_row(matrix_, row, matrix_.static_scale_of(p.expert), b.rows, p.place + i);
    });
  }

  void run(const Call& call, Buffers& b, std::int64_t pieces) {
    const TensorView& d = call.args->d;
    for (std::int64_t i = 0; i < pieces; ++i) {
      const Piece& p = b.pieces[i];
      if (!call.adopted) quantize_piece(call, p, b);
      Product product;
      product.b = &matrix_;
      product.a = call.adopted ? adopt(call, p) : quantized(b, p.place);
      product.bias = call.args->bias.defined() ? b.bias : nullptr;
      product.out = row_of(d, call.masked, p);
      product.out_stride_bytes = row_bytes(d, call.masked);
      product.out_dtype = d.dtype();
      b.products[i] = product;
    }
    const std::int64_t count = make_tasks(b.products, b.groups, pieces, pool_.threads(), b.tasks);
    pool_.parallel_for(count, [&](std::int64_t i, int thread) {
      const FloatEnv env;
      run_task(b.products[b.tasks[i].product], b.tasks[i],
               b.threads + b.thread_bytes * static_cast<std::size_t>(thread));
    });
  }

  PackedMatrix matrix_;
  ThreadPool pool_;
  HugeBuffer workspace_;
};

}  // namespace

std::unique_ptr<MatrixBackend> make_matrix(QuantizedMatrix matrix, int threads) {
  return std::make_unique<CpuMatrix>(matrix, threads);
}

}  // namespace octomoe::cpu
