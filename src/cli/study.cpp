#include "cli/study.h"

#include <fmt/format.h>

#include <algorithm>
#include <array>
#include <memory>
#include <numeric>

#include "cli/cublas.h"
#include "cli/cuda_probe.h"
#include "cuda/gemm.h"
#include "cuda/stream.h"
#include "quant/matrix.h"
#include "quant/numerics.h"
#include "tensor/check.h"

namespace octomoe::cli {
namespace {

constexpr Skew kSkews[] = {Skew::even, Skew::uniform, Skew::zipf, Skew::quarter};
constexpr std::size_t kStreams = 8;
constexpr int kLeastCalls = 4;              // between two events
constexpr std::int64_t kCheckedRows = 256;  // cases of at most that many rows are compared value by value

// A part of a matrix stack, without a copy.
QuantizedMatrix one_expert(const QuantizedMatrix& m, std::int64_t e) {
  const auto part = [&](const Tensor& t) {
    return t.defined() ? Tensor::wrap(t.view().slice(e, 1), std::make_shared<Tensor>(t)) : t;
  };
  QuantizedMatrix one = m;
  one.experts = 1;
  one.values = part(m.values);
  one.scale = part(m.scale);
  one.q = part(m.q);
  one.column_sum = part(m.column_sum);
  return one;
}

QuantizedMatrix on_device(QuantizedMatrix m, Device device) {
  for (Tensor* t : {&m.values, &m.scale, &m.q, &m.column_sum}) {
    if (t->defined()) *t = Tensor::copy_of(*t, device);
  }
  return m;
}

std::int64_t busy(const std::vector<std::int64_t>& rows) {
  return std::count_if(rows.begin(), rows.end(), [](std::int64_t r) { return r > 0; });
}

// The weights of one expert count, and everything that the ways share.
class Bench {
 public:
  Bench(const StudyInput& in, GpuBench& gpu, Cublas& cublas, std::int64_t experts)
      : in_(in), gpu_(gpu), cublas_(cublas), experts_(experts), n_(2 * in.shape.intermediate), k_(in.shape.hidden) {
    // A case's calls want the same experts: the case with the fewest needs most copies of the weights.
    std::int64_t least = experts;
    for (const std::int64_t tokens : in.tokens) {
      for (const Skew skew : kSkews)
        least = std::min(least, busy(draw_rows(skew, experts, tokens * in.shape.top_k, in.seed)));
    }
    const QuantizedMatrix original = on_device(random_matrix(in.scheme, {experts, n_, k_}, 1, in.seed, 0), in.device);
    for (int c = 0; c < copies_for(least); ++c) {
      const QuantizedMatrix m = on_device(original, in.device);
      values_.push_back(m.values);
      scale_.push_back(m.scale);
      grouped_.push_back(matrix(m));
      singles_.emplace_back();
      for (std::int64_t e = 0; e < experts; ++e) singles_.back().push_back(matrix(one_expert(m, e)));
    }
    const std::int64_t most = *std::max_element(in.tokens.begin(), in.tokens.end()) * in.shape.top_k;
    quantise(most);
    out_ = Tensor::empty(DType::bfloat16, {most, n_}, in.device);
    sums_ = Tensor::empty(DType::int32, {most, n_}, in.device);
  }

  const char* family() const { return grouped_.front()->choose(1).wgmma ? "sm90" : "sm80"; }

  StudyCase run(std::int64_t tokens, Skew skew, const Ceilings& ceilings) {
    StudyCase c{.tokens = tokens, .experts = experts_, .skew = skew};
    c.rows = tokens * in_.shape.top_k;
    rows_ = draw_rows(skew, experts_, c.rows, in_.seed);
    c.busy_experts = busy(rows_);
    c.largest = *std::max_element(rows_.begin(), rows_.end());
    c.weight_copies = std::min(copies_for(c.busy_experts), static_cast<int>(grouped_.size()));
    TileUse padded;
    for (const std::int64_t r : rows_) padded.add(r, {.tokens = 128, .columns = n_}, n_, k_);
    c.waste_128 = padded.waste();
    c.bytes = static_cast<double>(c.busy_experts * n_ * k_ + c.rows * (k_ + 2 * n_));
    const double ops = 2.0 * static_cast<double>(c.rows * n_ * k_);
    upload_index();
    check_results(c.rows);

    const int calls = std::max(kLeastCalls, c.weight_copies);
    std::vector<Contender> contenders;
    std::vector<GpuCall> first;
    std::vector<GpuBench::Clocks> clocks;
    const auto add = [&](const StudyWay& way, const std::function<GpuCall(int copy)>& make) {
      std::vector<GpuCall> all;
      for (int i = 0; i < calls; ++i) all.push_back(make(i));
      clocks.push_back(std::make_shared<std::vector<double>>());
      contenders.push_back(gpu_.contender(way.name, all, true, clocks.back()));
      contenders.push_back(gpu_.contender(way.name, all, false));
      first.push_back(all.front());
      c.ways.push_back(way);
      const auto one = cuda::Graph::capture(gpu_.stream(), [&] { all.front()(gpu_.stream()); });
      c.ways.back().launches = static_cast<std::int64_t>(one.nodes());
    };
    add(grouped_way("grouped"), [&](int i) { return grouped_call(i % c.weight_copies, c.rows); });
    if (c.weight_copies > 1) {
      add(grouped_way("grouped, weights in L2"), [&](int) { return grouped_call(0, c.rows); });
    }
    add(single_way("per expert"), [&](int i) { return single_call(i % c.weight_copies); });
    add(single_way("per expert, 8 streams"), [&](int i) { return forked_call(i % c.weight_copies); });
    add({.name = "cuBLAS"}, [&](int i) { return cublas_call(i % c.weight_copies); });
    contenders.push_back(gpu_.read_contender(c.bytes, true));

    const std::vector<Timing> timings = interleave(contenders, in_.timing);
    for (std::size_t w = 0; w < c.ways.size(); ++w) {
      c.ways[w].graph = timings[2 * w];
      c.ways[w].eager = timings[2 * w + 1];
      c.ways[w].clock_mhz = quantile(*clocks[w], 0.5);
      c.ways[w].host_us = gpu_.host_us({first[w]});
    }
    c.floor = floor_of(c.bytes, 1e6 * c.bytes / timings.back().median_us, ops, ceilings.int8_ops_per_s);
    return c;
  }

 private:
  std::unique_ptr<cuda::DeviceMatrix> matrix(QuantizedMatrix m) const {
    return std::make_unique<cuda::DeviceMatrix>(std::move(m), Tensor(), kernels::Epilogue::store, in_.family, false,
                                                gpu_.info(), "w");
  }

  int copies_for(std::int64_t experts) const { return gpu_.copies(static_cast<double>(experts * n_ * k_)); }

  void quantise(std::int64_t rows) {
    const cuda::ScaleColumns columns = grouped_.front()->scale_columns();
    const Tensor x = Tensor::copy_of(random_activations(rows, k_, in_.seed), in_.device);
    a_q_ = Tensor::empty(DType::int8, {rows, k_}, in_.device);
    a_scale_ = Tensor::empty(DType::float32, {columns.scale, rows}, in_.device);
    a_block_q_ = Tensor::empty(DType::int32, {std::max<std::int64_t>(columns.block_q, 1), rows}, in_.device);
    a_zero_ = Tensor::empty(DType::int32, {rows}, in_.device);
    a_rows_ = rows;
    grouped_.front()->quantize(cuda::Launcher(gpu_.info(), gpu_.stream()), cuda::row_view(x), rows, nullptr, a(0));
    gpu_.synchronize();
  }
  cuda::QuantizedRows a(std::int64_t begin) const {
    return {a_q_.as<std::int8_t>() + begin * k_, a_scale_.as<float>() + begin, a_block_q_.as<std::int32_t>() + begin,
            a_zero_.as<std::int32_t>() + begin, a_rows_};
  }

  // [E + 1] offsets, then 0 and its rows for each expert.
  void upload_index() {
    Tensor index = Tensor::zeros(DType::int32, {3 * experts_ + 1});
    auto* v = index.as<std::int32_t>();
    begin_.assign(1, 0);
    for (std::int64_t e = 0; e < experts_; ++e) {
      const auto rows = static_cast<std::int32_t>(rows_[static_cast<std::size_t>(e)]);
      v[e + 1] = v[e] + rows;
      v[experts_ + 1 + 2 * e + 1] = rows;
      begin_.push_back(v[e + 1]);
    }
    index_ = Tensor::copy_of(index, in_.device);
    taken_ = Tensor::copy_of(Tensor::zeros(DType::int32, {1}), in_.device);
  }

  cuda::DeviceMatrix::Problem problem(std::int64_t begin, std::int64_t rows, std::int64_t index) const {
    cuda::DeviceMatrix::Problem p;
    p.a = a(begin);
    p.index = index_.as<std::int32_t>() + index;
    p.rows = rows;
    p.out = out_.as<std::uint16_t>() + begin * n_;
    p.out_stride = n_;
    return p;
  }
  GpuCall grouped_call(int copy, std::int64_t rows) const {
    cuda::DeviceMatrix::Problem p = problem(0, rows, 0);
    p.taken = taken_.as<std::int32_t>();
    return [this, m = grouped_[static_cast<std::size_t>(copy)].get(), p](Stream stream) {
      m->gemm(cuda::Launcher(gpu_.info(), stream), p);
    };
  }
  // Fn(expert, its first row, its rows) for experts with rows.
  template <class Fn>
  void for_busy(const Fn& fn) const {
    for (std::size_t e = 0; e < rows_.size(); ++e) {
      if (rows_[e] > 0) fn(e, begin_[e], rows_[e]);
    }
  }
  using Products = std::vector<std::pair<const cuda::DeviceMatrix*, cuda::DeviceMatrix::Problem>>;
  Products products(int copy) const {
    Products list;
    for_busy([&](std::size_t e, std::int64_t begin, std::int64_t rows) {
      list.emplace_back(singles_[static_cast<std::size_t>(copy)][e].get(),
                        problem(begin, rows, experts_ + 1 + 2 * static_cast<std::int64_t>(e)));
    });
    return list;
  }
  GpuCall single_call(int copy) const {
    return [this, list = products(copy)](Stream stream) {
      const cuda::Launcher launcher(gpu_.info(), stream);
      for (const auto& [matrix, p] : list) matrix->gemm(launcher, p);
    };
  }
  GpuCall forked_call(int copy) {
    return [this, list = products(copy)](Stream stream) {
      const std::size_t streams = std::min(kStreams, list.size());
      fork_.begin.record(stream);
      for (std::size_t s = 0; s < streams; ++s) {
        OCTOMOE_CUDA(cuStreamWaitEvent, fork_.streams[s].get(), fork_.begin.get(), 0);
      }
      for (std::size_t i = 0; i < list.size(); ++i) {
        list[i].first->gemm(cuda::Launcher(gpu_.info(), fork_.streams[i % streams]), list[i].second);
      }
      for (std::size_t s = 0; s < streams; ++s) {
        fork_.ends[s].record(fork_.streams[s]);
        OCTOMOE_CUDA(cuStreamWaitEvent, cuda::cu_stream(stream), fork_.ends[s].get(), 0);
      }
    };
  }
  GpuCall cublas_call(int copy) const {
    std::vector<Cublas::Product> list;
    const auto* w = values_[static_cast<std::size_t>(copy)].as<std::int8_t>();
    for_busy([&](std::size_t e, std::int64_t begin, std::int64_t rows) {
      list.push_back({a_q_.as<std::int8_t>() + begin * k_, w + static_cast<std::int64_t>(e) * n_ * k_,
                      sums_.as<std::int32_t>() + begin * n_, rows, n_, k_});
    });
    return [this, list](Stream) {
      for (const Cublas::Product& p : list) cublas_.multiply(p);
    };
  }

  void describe(StudyWay& way, const cuda::DeviceMatrix::Kernel& kernel, const std::vector<std::int64_t>& rows) const {
    // Not gated: an output column is a weight row.
    const TileUse::Size size{kernel.block_n, kernel.features, kernel.step_n, kernel.cluster};
    TileUse use;
    for (const std::int64_t r : rows) use.add(r, size, n_, k_);
    way.use.tiles += use.tiles;
    way.use.token_slots += use.token_slots;
    way.use.rows += use.rows;
    way.use.bytes += use.bytes;
    const double resident = static_cast<double>(gpu_.info().multiprocessors) * kernel.loaded->blocks_per_multiprocessor;
    way.occupancy += std::min(1.0, static_cast<double>(use.tiles) / resident);
    const std::string tile = fmt::format("{}x{}", kernel.features, kernel.block_n);
    way.tile = way.tile.empty() || way.tile == tile ? tile : "several";
  }
  StudyWay grouped_way(const std::string& name) const {
    StudyWay way{.name = name};
    describe(way, grouped_.front()->choose(std::accumulate(rows_.begin(), rows_.end(), std::int64_t{0})), rows_);
    return way;
  }
  StudyWay single_way(const std::string& name) const {
    StudyWay way{.name = name};
    double busy = 0;
    for_busy([&](std::size_t e, std::int64_t, std::int64_t rows) {
      describe(way, singles_.front()[e]->choose(rows), {rows});
      ++busy;
    });
    way.occupancy /= busy;
    return way;
  }

  // All ways compute the same: ours to the bit, cuBLAS's sums times the scales to bf16's accuracy.
  void check_results(std::int64_t rows) {
    const auto result = [&](const Tensor& t, const GpuCall& call) {
      call(gpu_.stream());
      gpu_.synchronize();
      return Tensor::copy_of(t.view().slice(0, std::min(rows, kCheckedRows)));
    };
    const Tensor ours = result(out_, grouped_call(0, rows)), single = result(out_, single_call(0));
    const Tensor sums = result(sums_, cublas_call(0));
    if (!std::equal(ours.as<std::uint16_t>(), ours.as<std::uint16_t>() + ours.elems(), single.as<std::uint16_t>()))
      fail(ErrorCode::internal, "study: the grouped GEMM and one GEMM per expert differ in {} experts", experts_);
    if (in_.scheme != Scheme::int8_channel()) return;
    const Tensor a_scale = Tensor::copy_of(a_scale_), w_scale = Tensor::copy_of(scale_.front());
    double error = 0, norm = 0;
    for_busy([&](std::size_t e, std::int64_t begin, std::int64_t count) {
      for (std::int64_t r = begin; r < std::min(begin + count, ours.dim(0)); ++r) {
        for (std::int64_t n = 0; n < n_; ++n) {
          const double scale =
              double{a_scale.as<float>()[r]} * double{w_scale.as<float>()[static_cast<std::int64_t>(e) * n_ + n]};
          const double expected = num::bf16_to_float(ours.as<std::uint16_t>()[r * n_ + n]);
          const double got = scale * sums.as<std::int32_t>()[r * n_ + n];
          error += (got - expected) * (got - expected);
          norm += expected * expected;
        }
      }
    });
    if (!(error <= 1e-4 * norm)) fail(ErrorCode::internal, "study: cuBLAS's sums differ from ours");
  }

  struct Fork {
    std::array<cuda::OwnedStream, kStreams> streams;
    cuda::Event begin{false};
    std::vector<cuda::Event> ends;
    Fork() {
      for (std::size_t i = 0; i < kStreams; ++i) ends.emplace_back(false);
    }
  };

  const StudyInput& in_;
  GpuBench& gpu_;
  Cublas& cublas_;
  std::int64_t experts_, n_, k_;
  std::vector<Tensor> values_, scale_;                                     // of each copy
  std::vector<std::unique_ptr<cuda::DeviceMatrix>> grouped_;               // the same
  std::vector<std::vector<std::unique_ptr<cuda::DeviceMatrix>>> singles_;  // the same, one for each expert
  Tensor a_q_, a_scale_, a_block_q_, a_zero_, out_, sums_, index_, taken_;
  std::int64_t a_rows_ = 0;
  Fork fork_;
  std::vector<std::int64_t> rows_, begin_;  // of the case at hand
};

}  // namespace

const StudyWay* StudyCase::find(const std::string& name) const {
  const auto at = std::find_if(ways.begin(), ways.end(), [&](const StudyWay& w) { return w.name == name; });
  return at == ways.end() ? nullptr : &*at;
}

GroupingStudy study_grouping(const StudyInput& input) {
  search_python_wheels();
  GpuBench gpu(input.device);
  Cublas cublas(input.device);
  cublas.use(gpu.stream());
  StudyInput in = input;
  // Some ways take a hundred times as long as others: as many rounds for all.
  if (in.timing.iters == 0) in.timing.iters = 12;
  GroupingStudy study{.scheme = in.scheme, .n = 2 * in.shape.intermediate, .k = in.shape.hidden};
  study.top_k = in.shape.top_k;
  study.device = to_string(in.device);
  study.cublas = cublas.version();
  study.gpu = gpu.describe();
  study.ceilings = gpu.ceilings();
  const std::vector<GpuCall> launches(64, gpu.empty_call());
  const std::vector<Timing> empty =
      interleave({gpu.contender("graph", launches, true), gpu.contender("eager", launches, false)}, in.timing);
  study.launch_graph_us = empty[0].median_us;
  study.launch_eager_us = empty[1].median_us;
  const double all = static_cast<double>(in.experts.size() * in.tokens.size() * std::size(kSkews));
  for (const std::int64_t experts : in.experts) {
    Bench bench(in, gpu, cublas, experts);
    study.family = bench.family();
    for (const std::int64_t tokens : in.tokens) {
      for (const Skew skew : kSkews) {
        in.on_step(static_cast<double>(study.cases.size()) / all,
                   fmt::format("{} experts, T = {}, {}", experts, tokens, to_string(skew)));
        study.cases.push_back(bench.run(tokens, skew, study.ceilings));
      }
    }
  }
  return study;
}

}  // namespace octomoe::cli
