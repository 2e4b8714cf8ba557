#include "cli/tune_bench.h"

#include <fmt/format.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <memory>

#include "cuda/gemm.h"
#include "cuda/memory.h"
#include "quant/matrix.h"
#include "tensor/check.h"

namespace octomoe::cli {
namespace {

constexpr std::int64_t kFewTokens = 512;  // above them every expert's share is near the mean: few routings are drawn
constexpr int kRoutings = 4;
constexpr std::int64_t kRandomRows = 512;  // of activations; more rows repeat them
constexpr double kEqual = 1.02;            // times the fastest: what another run may turn round
constexpr double kHopeless = 1.5;          // times the fastest of its family in the first round: measured no further

// One expert's tensors for all of them: what the values are changes nothing as long as they are random.
Tensor for_experts(const Tensor& one, std::int64_t experts, Device device) {
  if (!one.defined()) return {};
  Shape shape = one.shape();
  shape[0] = experts;
  const Tensor all = Tensor::empty(one.dtype(), shape, device);
  cuda::copy(one, all.view().slice(0, 1));
  for (std::int64_t have = 1; have < experts; have *= 2) {
    const std::int64_t more = std::min(have, experts - have);
    cuda::copy(all.view().slice(0, more), all.view().slice(have, more));
  }
  return all;
}

// The rows of the first tokens of a routing, experts in turn from `begin` on, which is moved on.
struct ExpertRows {
  std::vector<std::int32_t> offsets;  // [E + 1]
  std::vector<std::int32_t> token;    // of each row
  std::int64_t busy = 0;
};
ExpertRows rows_of(const Routes& routes, std::int64_t tokens, std::int64_t top_k, std::int64_t experts,
                   std::int64_t& begin) {
  std::vector<std::vector<std::int32_t>> tokens_of(static_cast<std::size_t>(experts));
  for (std::int64_t t = 0; t < tokens; ++t) {
    for (std::int64_t j = 0; j < top_k; ++j) {
      const std::int32_t e = routes.ids.as<std::int32_t>()[t * top_k + j];
      if (e >= 0 && e < experts) tokens_of[static_cast<std::size_t>(e)].push_back(static_cast<std::int32_t>(t));
    }
  }
  std::erase_if(tokens_of, [](const auto& list) { return list.empty(); });
  ExpertRows r;
  r.busy = static_cast<std::int64_t>(tokens_of.size());
  // Successive calls want other experts, as a model's layers do, as far as there are any.
  std::vector<const std::vector<std::int32_t>*> expert(static_cast<std::size_t>(experts));
  for (const auto& list : tokens_of) {
    expert[static_cast<std::size_t>(begin)] = &list;
    begin = (begin + 1) % experts;
  }
  r.offsets.push_back(0);
  for (const auto* list : expert) {
    if (list != nullptr) r.token.insert(r.token.end(), list->begin(), list->end());
    r.offsets.push_back(static_cast<std::int32_t>(r.token.size()));
  }
  return r;
}

Tensor upload(const std::vector<std::int32_t>& values, Device device) {
  const Tensor host = Tensor::empty(DType::int32, {static_cast<std::int64_t>(values.size())});
  std::copy(values.begin(), values.end(), host.as<std::int32_t>());
  return Tensor::copy_of(host, device);
}

// One stack of matrices, and the rows that meet it.
class Stack {
 public:
  Stack(GpuBench& gpu, const TuneInput& in, const Scheme& scheme, bool is_w13, const std::vector<Routes>& routings)
      : gpu_(gpu), in_(in), is_w13_(is_w13), routings_(routings) {
    const ProblemShape& s = in.shape;
    experts_ = s.experts_local;
    n_ = is_w13 ? 2 * s.intermediate : s.hidden;
    k_ = is_w13 ? s.hidden : s.intermediate;
    const QuantizedMatrix one = random_matrix(scheme, {1, n_, k_}, is_w13 ? 2 : 1, in.seed, in.threads);
    weights_ = one;
    weights_.experts = experts_;
    for (Tensor QuantizedMatrix::*t :
         {&QuantizedMatrix::values, &QuantizedMatrix::scale, &QuantizedMatrix::q, &QuantizedMatrix::column_sum}) {
      weights_.*t = for_experts(one.*t, experts_, gpu.device());
    }
    copies_.push_back(matrix(weights_));
    const std::int64_t most = *std::max_element(in.tokens.begin(), in.tokens.end());
    a_rows_ = is_w13 ? most : most * s.top_k;
    quantise();
    taken_ = upload(std::vector<std::int32_t>{0}, gpu.device());
    out_ = Tensor::empty(DType::bfloat16, {most * s.top_k, columns()}, gpu.device());
    out_scale_ = Tensor::empty(DType::float32, {ceil_div(columns(), 128), most * s.top_k}, gpu.device());
  }

  TunePoint measure(std::int64_t tokens) {
    const ProblemShape& s = in_.shape;
    TunePoint point{.tokens = tokens, .matrix = is_w13_ ? "w13" : "w2", .key = copies_.front()->tune_key()};
    const std::int64_t routes = tokens * s.top_k;
    point.rows = std::max<std::int64_t>(1, routes * s.experts_local / s.experts);
    make_calls(tokens, routes, point.rows);

    const auto& candidates = copies_.front()->candidates();
    std::vector<Contender> all;
    for (const auto& k : candidates) all.push_back(contender(k.id));
    const std::vector<Timing> first = interleave(all, {.warmup = 0, .iters = 1});
    double least[2] = {std::numeric_limits<double>::infinity(), std::numeric_limits<double>::infinity()};
    for (std::size_t i = 0; i < all.size(); ++i) {
      double& of_family = least[candidates[i].wgmma ? 1 : 0];
      of_family = std::min(of_family, first[i].median_us);
    }
    std::vector<Contender> finalists;
    for (std::size_t i = 0; i < all.size(); ++i) {
      point.choice.us[all[i].name] = rounded(first[i].median_us);
      if (first[i].median_us <= kHopeless * least[candidates[i].wgmma ? 1 : 0]) finalists.push_back(all[i]);
    }
    const std::vector<Timing> timings = interleave(finalists, {.warmup = 0, .iters = in_.rounds});
    std::size_t best = 0;
    for (std::size_t i = 0; i < finalists.size(); ++i) {
      point.choice.us[finalists[i].name] = rounded(timings[i].median_us);
      if (timings[i].median_us < timings[best].median_us) best = i;
    }
    // Between equals the cost model's: it is loaded in any case.
    point.by_cost = copies_.front()->by_cost(point.rows).id;
    const double least_us = point.choice.us.at(finalists[best].name);
    point.choice.kernel = point.choice.us.at(point.by_cost) <= kEqual * least_us ? point.by_cost : finalists[best].name;
    return point;
  }

 private:
  struct Call {
    const cuda::DeviceMatrix* matrix;
    Tensor offsets, source;
    cuda::DeviceMatrix::Problem problem;
  };
  static double rounded(double us) { return std::round(100 * us) / 100; }
  std::int64_t columns() const { return is_w13_ ? n_ / 2 : n_; }

  std::unique_ptr<cuda::DeviceMatrix> matrix(const QuantizedMatrix& m) const {
    return std::make_unique<cuda::DeviceMatrix>(m, Tensor(),
                                                is_w13_ ? cuda::swiglu_epilogue(m.scheme) : kernels::Epilogue::store,
                                                in_.family, false, gpu_.info(), is_w13_ ? "w13" : "w2");
  }
  const cuda::DeviceMatrix& copy(std::int64_t i) {
    while (static_cast<std::int64_t>(copies_.size()) <= i) {
      QuantizedMatrix m = weights_;
      for (Tensor* t : {&m.values, &m.scale, &m.q, &m.column_sum}) {
        if (t->defined()) *t = Tensor::copy_of(*t, gpu_.device());
      }
      copies_.push_back(matrix(m));
    }
    return *copies_[static_cast<std::size_t>(i)];
  }

  void quantise() {
    const cuda::ScaleColumns c = copies_.front()->scale_columns();
    const Device device = gpu_.device();
    a_q_ = Tensor::empty(DType::int8, {a_rows_, k_}, device);
    a_scale_ = Tensor::empty(DType::float32, {c.scale, a_rows_}, device);
    a_block_q_ = Tensor::empty(DType::int32, {std::max<std::int64_t>(c.block_q, 1), a_rows_}, device);
    a_zero_ = Tensor::empty(DType::int32, {a_rows_}, device);
    const std::int64_t random_rows = std::min(kRandomRows, a_rows_);
    const Tensor x = Tensor::copy_of(random_activations(random_rows, k_, in_.seed), device);
    const cuda::Launcher launcher(gpu_.info(), gpu_.stream());
    for (std::int64_t begin = 0; begin < a_rows_; begin += random_rows) {
      copies_.front()->quantize(launcher, cuda::row_view(x), std::min(random_rows, a_rows_ - begin), nullptr, a(begin));
    }
    gpu_.synchronize();
  }
  cuda::QuantizedRows a(std::int64_t begin) const {
    return {a_q_.as<std::int8_t>() + begin * k_, a_scale_.as<float>() + begin, a_block_q_.as<std::int32_t>() + begin,
            a_zero_.as<std::int32_t>() + begin, a_rows_};
  }

  // As many calls as it takes until a call's weights have left L2 when their turn comes again, and enough for the
  // events around them not to matter.
  void make_calls(std::int64_t tokens, std::int64_t routes, std::int64_t likely_rows) {
    const double expert_bytes = static_cast<double>(n_ * k_);
    const double untouched = std::pow(1 - 1.0 / static_cast<double>(experts_), static_cast<double>(likely_rows));
    const double touched = std::max(1.0, static_cast<double>(experts_) * (1 - untouched));
    const double us =
        std::max(touched * expert_bytes / 3e6, 2.0 * static_cast<double>(likely_rows) * expert_bytes / 1e9);
    const int for_events = us < 100 ? 8 : us < 400 ? 4 : us < 2000 ? 2 : 1;
    const int count = std::max(gpu_.copies(touched * expert_bytes), for_events);
    // Once all experts have had their turn, the next copy of the weights.
    const std::int64_t copies = gpu_.copies(static_cast<double>(experts_) * expert_bytes);
    calls_.clear();
    std::int64_t begin = 0, passed = 0;  // experts
    for (int i = 0; i < count; ++i) {
      const std::size_t which = static_cast<std::size_t>(i) % (tokens > kFewTokens ? kRoutings : routings_.size());
      const ExpertRows rows = rows_of(routings_[which], tokens, in_.shape.top_k, experts_, begin);
      Call call{&copy(passed / experts_ % copies),
                upload(rows.offsets, gpu_.device()),
                upload(rows.token, gpu_.device()),
                {}};
      passed += rows.busy;
      call.problem.a = a(0);
      call.problem.index = call.offsets.as<std::int32_t>();
      // In a layer only short kernels run before GEMM1, so no call may begin beside the one before: kernels that leave
      // multiprocessors idle would look as good as others.
      call.problem.index_late = is_w13_;
      call.problem.taken = taken_.as<std::int32_t>();
      call.problem.rows = routes;
      call.problem.likely_rows = likely_rows;
      call.problem.row_source = is_w13_ ? call.source.as<std::int32_t>() : nullptr;
      call.problem.out = out_.as<std::uint16_t>();
      call.problem.out_stride = columns();
      call.problem.out_scale = out_scale_.as<float>();
      call.problem.out_rows = out_scale_.dim(1);
      call.problem.limit = std::numeric_limits<float>::infinity();
      calls_.push_back(std::move(call));
    }
  }

  Contender contender(const std::string& id) {
    for (auto& m : copies_) m->force(id);
    std::vector<GpuCall> calls;
    for (const Call& call : calls_) {
      calls.emplace_back(
          [this, call](Stream stream) { call.matrix->gemm(cuda::Launcher(gpu_.info(), stream), call.problem); });
    }
    Contender c = gpu_.contender(id, std::move(calls), true);
    for (auto& m : copies_) m->force("");
    return c;
  }

  GpuBench& gpu_;
  const TuneInput& in_;
  bool is_w13_;
  const std::vector<Routes>& routings_;
  std::int64_t experts_ = 0, n_ = 0, k_ = 0, a_rows_ = 0;
  QuantizedMatrix weights_;
  std::vector<std::unique_ptr<cuda::DeviceMatrix>> copies_;
  Tensor a_q_, a_scale_, a_block_q_, a_zero_, out_, out_scale_, taken_;
  std::vector<Call> calls_;  // of the point at hand
};

}  // namespace

void tune(GpuBench& gpu, const TuneInput& in,
          const std::function<void(const Scheme& scheme, const std::vector<TunePoint>& points)>& on_scheme) {
  const std::int64_t most = *std::max_element(in.tokens.begin(), in.tokens.end());
  std::vector<Routes> routings;
  for (int i = 0; i < kGpuCalls; ++i) {
    const std::int64_t tokens = i < kRoutings ? most : std::min(most, kFewTokens);
    routings.push_back(make_routes({}, in.shape, tokens, in.seed + static_cast<std::uint64_t>(i)));
  }
  const double all = static_cast<double>(in.schemes.size() * 2 * in.tokens.size());
  double done = 0;
  for (const Scheme& scheme : in.schemes) {
    std::vector<TunePoint> points;
    for (const bool is_w13 : {true, false}) {
      Stack stack(gpu, in, scheme, is_w13, routings);
      for (const std::int64_t tokens : in.tokens) {
        in.on_step(done++ / all, fmt::format("{}, {}, T = {}", to_string(scheme), is_w13 ? "w13" : "w2", tokens));
        points.push_back(stack.measure(tokens));
      }
    }
    on_scheme(scheme, points);
  }
}

}  // namespace octomoe::cli
