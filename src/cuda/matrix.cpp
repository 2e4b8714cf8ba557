// grouped_gemm on a GPU.
#include <limits>
#include <utility>

#include "core/args.h"
#include "cuda/engine.h"
#include "cuda/gemm.h"
#include "cuda/stream.h"
#include "cuda/workspace.h"
#include "plan/catalogue.h"
#include "quant/matrix.h"
#include "tensor/check.h"

namespace octomoe::cuda {
namespace {

// Up to so many rows an expert the GEMM reads the caller's offsets itself, and its tiles are shared out beforehand.
// From there on taking them one by one is worth the launch that zeroes their counter (docs/kernels.md).
constexpr std::int64_t kOffsetsRows = 48;

struct GemmPlan {
  WorkspacePlan memory;
  int index, q, scale, block_q, zero;
};

class CudaMatrix final : public MatrixBackend {
 public:
  CudaMatrix(int device, QuantizedMatrix matrix, KernelFamily family, bool prepack)
      : info_(device_info(device)),
        matrix_(std::move(matrix), {}, kernels::Epilogue::store, family, prepack, info_, "b"),
        index_kernel_(load(plan::entry("group_index"), device)),
        transpose_kernel_(load(plan::entry("transpose_scales"), device)),
        workspaces_(device) {
    // GEMMs ask for weights while the launch before them may still run: whoever makes the values must have ended.
    const ContextGuard context(info_);
    OCTOMOE_CUDA(cuCtxSynchronize);
  }

  std::size_t workspace_bytes(std::int64_t rows) const override { return plan(rows).memory.bytes(); }

  void gemm(const GemmArgs& g) override {
    const bool masked = g.groups.layout == Groups::Layout::masked;
    const TensorView a = flat(g.a.values, "a"), d = flat(g.d, "d");
    const std::int64_t rows = a.dim(0);
    if (rows == 0) return;
    if (rows > std::numeric_limits<std::int32_t>::max()) {
      bad_argument("a: expected at most {} rows, got {}", std::numeric_limits<std::int32_t>::max(), rows);
    }
    if (!rows_are_aligned(d)) {
      bad_argument("d: expected rows that begin at multiples of 16 bytes on {}, got strides {}", to_string(d.device()),
                   to_string(g.d.strides()));
    }
    const bool given = a.dtype() == DType::int8;
    if (given && (!a.is_contiguous() || !rows_are_aligned(a))) {
      bad_argument("a: expected contiguous int8 rows, aligned to 16 bytes, on {}, got strides {}",
                   to_string(d.device()), to_string(g.a.values.strides()));
    }
    const ContextGuard context(info_);
    const GemmPlan p = plan(rows);
    auto* base = static_cast<std::uint8_t*>(workspaces_.choose(g.workspace, p.memory.bytes(), g.stream));
    const auto at = [&](int buffer) { return base + p.memory.offset(buffer); };
    const Launcher launcher(info_, g.stream);
    DeviceMatrix::Problem problem;
    const std::int64_t group_rows = masked ? g.a.values.dim(1) : rows;
    const bool few = rows <= kOffsetsRows * matrix_.experts();
    const bool is_64 = g.groups.index.dtype() == DType::int64;
    // A caller's kernel, or the one here, may still write the index, unless another launch lies between.
    problem.index_late = true;
    if (!masked && !is_64 && few) {
      problem.index = g.groups.index.as<std::int32_t>();
      problem.index_limit = static_cast<std::int32_t>(rows);
    } else {
      auto* index = reinterpret_cast<std::int32_t*>(at(p.index));
      launcher(index_kernel_, 1,
               kernels::GroupIndexArgs{.index = g.groups.index.data(),
                                       .is_64 = is_64,
                                       .masked = masked,
                                       .experts = static_cast<std::int32_t>(matrix_.experts()),
                                       .rows = static_cast<std::int32_t>(group_rows),
                                       .offsets = index});
      problem.index = index;
      problem.taken = index + matrix_.experts() + 1;
    }
    QuantizedRows q{reinterpret_cast<std::int8_t*>(at(p.q)), reinterpret_cast<float*>(at(p.scale)),
                    reinterpret_cast<std::int32_t*>(at(p.block_q)), reinterpret_cast<std::int32_t*>(at(p.zero)), rows};
    if (given) {
      q.q = a.as<std::int8_t>();
      q.zero = g.a.zero.as<std::int32_t>();
      const ScaleColumns c = matrix_.scale_columns();
      const bool broadcast = matrix_.scheme().activation_scale == ActivationScale::static_;
      const bool words = reinterpret_cast<std::uintptr_t>(g.a.q.data()) % 4 == 0 && rows * c.block_q % 4 == 0;
      if (c.scale == 1 && c.block_q == 0 && !broadcast) {  // as it is
        q.scale = g.a.scale.as<float>();
      } else if (few && words && !broadcast && matrix_.reads_scales_by_row(rows)) {
        // A launch that transposes them takes longer than reading a few rows here and there.
        problem.scales_by_row = true;
        q.scale = g.a.scale.as<float>();
        q.block_q = reinterpret_cast<std::int32_t*>(g.a.q.data());
      } else {
        problem.index_late = false;
        const kernels::TransposeScalesArgs args{
            .scale = g.a.scale.as<float>(),
            .q = g.a.q.as<std::uint8_t>(),
            .scale_out = q.scale,
            .q_out = q.block_q,
            .rows = rows,
            .columns = static_cast<std::int32_t>(c.scale),
            .q_columns = static_cast<std::int32_t>(c.block_q),
            .broadcast = broadcast,
        };
        launcher(transpose_kernel_, ceil_div(rows * std::max(c.scale, c.block_q), 256), args);
      }
    } else {
      problem.index_late = false;
      matrix_.quantize(launcher, row_view(a), rows, nullptr, q);
    }
    problem.a = q;
    problem.masked_rows = masked ? group_rows : 0;
    problem.rows = rows;
    problem.bias = g.bias.as<float>();
    problem.out = d.data();
    problem.out_stride = d.strides()[0];
    problem.out_type = out_type(d.dtype());
    matrix_.gemm(launcher, problem);
  }

 private:
  // [E, max_rows, K] as [E * max_rows, K].
  static TensorView flat(const TensorView& t, const char* name) {
    if (t.rank() == 2) return t;
    if (t.dim(0) > 1 && t.dim(1) > 0 && t.strides()[0] != t.dim(1) * t.strides()[1]) {
      bad_argument("{}: expected groups that follow one another on {}, got strides {}", name, to_string(t.device()),
                   to_string(t.strides()));
    }
    return TensorView(t.data(), t.dtype(), Shape{t.dim(0) * t.dim(1), t.dim(2)}, Shape{t.strides()[1], t.strides()[2]},
                      t.device());
  }

  GemmPlan plan(std::int64_t rows) const {
    const ScaleColumns c = matrix_.scale_columns();
    GemmPlan p;
    p.index = p.memory.add((matrix_.experts() + 1 + kernels::kTakenWords) * 4, 0, 0);
    p.q = p.memory.add(rows * matrix_.k(), 0, 0);
    p.scale = p.memory.add(rows * c.scale * 4, 0, 0);
    p.block_q = p.memory.add(rows * c.block_q * 4, 0, 0);
    p.zero = p.memory.add(matrix_.scheme().asymmetric ? rows * 4 : 0, 0, 0);
    p.memory.place();
    return p;
  }

  const DeviceInfo& info_;
  DeviceMatrix matrix_;
  const LoadedKernel &index_kernel_, &transpose_kernel_;
  Workspaces workspaces_;
};

}  // namespace

std::unique_ptr<MatrixBackend> make_matrix(Device device, QuantizedMatrix matrix, KernelFamily family, bool prepack) {
  return std::make_unique<CudaMatrix>(device.index, std::move(matrix), family, prepack);
}

void route(const TensorView& logits, const TensorView& topk_weights, const TensorView& topk_ids, const RouteOptions& o,
           Stream stream) {
  const int device = logits.device().index;
  const DeviceInfo& info = device_info(device);
  const ContextGuard context(info);
  const LoadedKernel& kernel = load(plan::entry("route"), device);
  if (logits.dim(1) > kernels::kMaxExperts) {
    fail(ErrorCode::unsupported, "logits: expected at most {} experts on {}, got {}", kernels::kMaxExperts,
         to_string(logits.device()), logits.dim(1));
  }
  if (logits.dim(0) == 0) return;
  const kernels::RouteArgs args{
      .logits = row_view(logits),
      .weights = topk_weights.as<float>(),
      .ids = topk_ids.as<std::int32_t>(),
      .weights_stride = topk_weights.strides()[0],
      .ids_stride = topk_ids.strides()[0],
      .bias = o.correction_bias.as<float>(),
      .tokens = static_cast<std::int32_t>(logits.dim(0)),
      .experts = static_cast<std::int32_t>(logits.dim(1)),
      .top_k = static_cast<std::int32_t>(topk_ids.dim(1)),
      .groups = o.groups,
      .topk_groups = o.topk_groups,
      .scoring = static_cast<kernels::Scoring>(o.scoring),
      .renormalize = static_cast<kernels::Renormalize>(o.renormalize),
      .renormalize_min = o.renormalize_min,
      .scaling_factor = o.scaling_factor,
  };
  const int shared = 4 * 8 * static_cast<int>(logits.dim(1) + o.groups);
  if (stage_observer != nullptr) stage_observer->on_stage("route", stream);
  launch(kernel,
         {.grid = {static_cast<unsigned>(ceil_div(logits.dim(0), 4))},
          .shared_bytes = shared,
          .stream = stream,
          .pdl = true},
         args);
  if (stage_observer != nullptr) stage_observer->on_stage(nullptr, stream);
}

}  // namespace octomoe::cuda
